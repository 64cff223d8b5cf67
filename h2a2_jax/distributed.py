"""The mesh of devices, and the processes of a run, each with its own devices and its own datasets' scans.

Every process builds the same mesh over all devices and calls the same step. A process opens only the datasets whose
shards lie on its devices. The processes agree on numbers of scans, the bucket of a step and failures by exchanging
small arrays on the devices, always from the main thread and in the same order.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32, PyTree

from h2a2_jax.errors import InputError, Stopped

DATASET, REPLICA = "dataset", "replica"


def train_mesh(num_datasets: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices for training: as many along 'dataset' as divide the datasets evenly.

    With D datasets on N devices the axes are gcd(D, N) and N / gcd(D, N): 3 datasets on 1, 3 and 6 devices are
    3 datasets a device, one each, and one each on two replicas.

    Args:
        num_datasets: D.
        devices: all of them by default.
    """
    devices = list(devices) if devices is not None else jax.devices()
    rows = math.gcd(num_datasets, len(devices))
    grid = np.array(devices).reshape(rows, len(devices) // rows)
    return Mesh(grid, (DATASET, REPLICA), axis_types=(jax.sharding.AxisType.Auto,) * 2)


_EXAMPLE = "--coordinator=localhost:12345 --num_processes=3 --process_id=0"
_HEARTBEAT_S = 30
"""After a kill of one process, the others end within this time."""


@contextmanager
def processes(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Join the processes of a run, if there are several; enter this context before JAX is used.

    An error in one process ends that process at once, with status 2 for wrong input, the status of `Stopped`, and 1
    otherwise. An orderly end would wait for the other processes, which wait for this one.

    Args:
        coordinator: "host:port" of process 0, reachable by all; "auto" where JAX finds the coordinator itself, as under
            SLURM; None for a run of one process.
        num_processes: number of processes in the run; None with "auto".
        process_id: number of this process, from 0; None with "auto".

    Raises:
        InputError: some of the three are missing, or make no sense.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if coordinator == "auto" and not any(given[1:]):
        options: dict[str, Any] = {}
    elif all(given):
        options = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    elif any(given):
        raise InputError(
            "--coordinator, --num_processes and --process_id go together, all three or none; or --coordinator=auto "
            f"alone, where a cluster such as SLURM started the processes. An example is {_EXAMPLE}."
        )
    else:
        yield
        return
    if options and not 0 <= options["process_id"] < options["num_processes"]:
        raise InputError(
            f"--process_id is {process_id}, expected is one from 0 to --num_processes - 1; an example is {_EXAMPLE}."
        )
    if options and ":" not in str(coordinator):
        raise InputError(f"--coordinator is {coordinator!r}; expected host:port of process 0, as in {_EXAMPLE}.")
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=_HEARTBEAT_S)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes of the run did not come together: {str(error).splitlines()[0]}") from error
    try:
        yield
    except BaseException as error:
        _end(error)
    jax.distributed.shutdown()


def is_main() -> bool:
    """Return True in the process that prints and writes for the run."""
    return jax.process_index() == 0


def say(*text: str) -> None:
    """Print, in one process of the run."""
    if is_main():
        print(*text, flush=True)


class ExchangeFuture(NamedTuple):
    """Numbers that all processes exchange, perhaps still on their way.

    Attributes:
        values: int32 [devices, n].
        rows: the first device of each process.
    """

    values: np.ndarray | jax.Array
    rows: Sequence[int]

    def result(self) -> Int32[np.ndarray, "processes n"]:
        """Wait for the numbers; a row per process."""
        return np.asarray(self.values)[list(self.rows)]


class MeshLayout:
    """The shards (dataset, replica) of a mesh that each process prepares, and exchanges between the processes.

    A shard is the scans of one dataset on one device in one step. With D datasets on a mesh of rows x replicas, a row
    of devices works on D / rows datasets. A run of one process exchanges nothing.

    Args:
        mesh: over the devices of all processes (`train_mesh`).
        num_datasets: D.
    """

    def __init__(self, mesh: Mesh, num_datasets: int):
        self.mesh, self.num_datasets = mesh, num_datasets
        self.replicas = mesh.shape[REPLICA]
        self._per_row = num_datasets // mesh.shape[DATASET]

    @property
    def alone(self) -> bool:
        """True if all devices of the mesh belong to this process."""
        return not self.mesh.is_multi_process

    @cached_property
    def datasets(self) -> tuple[int, ...]:
        """Datasets whose training scans this process loads."""
        return tuple(sorted({d for d, _ in self.shards}))

    @cached_property
    def evaluated(self) -> tuple[int, ...]:
        """Datasets that this process evaluates; each dataset belongs to one of the processes that load it."""
        return tuple(d for d in self.datasets if self.owns(d, 0))

    @property
    def shards(self) -> list[tuple[int, int]]:
        """Shards (dataset, replica) of this process, in order."""
        return [(d, r) for d in range(self.num_datasets) for r in range(self.replicas) if self.owns(d, r)]

    def owns(self, dataset: int, replica: int) -> bool:
        """Return True if a shard lies on a device of this process."""
        return self.mesh.devices[dataset // self._per_row, replica] in self._local

    def exchange(self, values: Int32[np.ndarray, " n"]) -> ExchangeFuture:
        """Send numbers to the other processes; returns at once, and the future waits.

        All processes call it in the same order and with as many numbers.
        """
        if self.alone:
            return ExchangeFuture(values[None], [0])
        parts = [jax.device_put(values[None], device) for device in self._local]
        shape = (self.mesh.size, len(values))
        along = NamedSharding(self._flat, P("all"))
        gathered = self._gather_rows(jax.make_array_from_single_device_arrays(shape, along, parts))
        # Devices of one process sent the same row.
        owners = [device.process_index for device in self._flat.devices]
        return ExchangeFuture(gathered.addressable_data(0), [owners.index(process) for process in sorted(set(owners))])

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes by process, in every process; JSON must be able to express them."""
        if self.alone:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        longest = int(self.exchange(np.array([len(text)], np.int32)).result().max())
        padded = np.zeros(longest, np.int32)
        padded[: len(text)] = text
        rows = self.exchange(padded).result()
        return [json.loads(bytes(row[row > 0].astype(np.uint8))) for row in rows]

    def exchange_flag(self, flag: bool) -> ExchangeFuture:
        """Exchange a number that is 1 where the flag is set."""
        return self.exchange(np.array([flag], np.int32))

    def all_or_raise(self, action: Callable[[], Any], description: str) -> Any:
        """Return the action's result once the action succeeded in every process.

        Args:
            action: local, exchanges nothing.
            description: the action, for the error: "open its data".

        Raises:
            InputError: the action failed in another process.
            BaseException: the action's error in this process.
        """
        try:
            result = action()
        except BaseException:
            self.exchange_flag(True).result()  # before this process ends
            raise
        if self.exchange_flag(False).result().any():
            raise InputError(f"another process failed to {description}; what it printed says why.")
        return result

    def assemble(self, shards: Mapping[tuple[int, int], PyTree]) -> PyTree:
        """The arrays of a step on the mesh, with leading axes [D, replicas], from the shards of this process."""
        sharding = NamedSharding(self.mesh, P(DATASET, REPLICA))
        size = (self.num_datasets, self.replicas)
        if self.alone:
            return jax.device_put(
                stack_batches([[shards[d, r] for r in range(size[1])] for d in range(size[0])]), sharding
            )
        parts = []
        for (row, column), device in np.ndenumerate(self.mesh.devices):
            if device in self._local:
                of_device = [shards[row * self._per_row + i, column] for i in range(self._per_row)]
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves)[:, None], *of_device)
                parts.append(jax.device_put(stacked, device))

        def whole(*leaves: jax.Array) -> jax.Array:
            return jax.make_array_from_single_device_arrays((*size, *leaves[0].shape[2:]), sharding, list(leaves))

        return jax.tree.map(whole, *parts)

    def fetch(self, tree: PyTree) -> PyTree:
        """Arrays on the mesh as whole numpy arrays, in every process."""
        if not self.alone:
            tree = jax.jit(lambda same: same, out_shardings=NamedSharding(self.mesh, P()))(tree)
        return jax.device_get(tree)

    @cached_property
    def _local(self) -> list[jax.Device]:
        return [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]

    @cached_property
    def _flat(self) -> Mesh:
        return Mesh(self.mesh.devices.reshape(-1), ("all",))

    @cached_property
    def _gather_rows(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda rows: rows, out_shardings=NamedSharding(self._flat, P()))


def stack_batches(grid: Sequence[Sequence[PyTree]]) -> PyTree:
    """Batches [dataset][replica] as one with leading axes [D, R]; a single one is not copied."""
    stacked: dict[tuple[int, ...], np.ndarray] = {}

    def stack(*leaves: np.ndarray) -> np.ndarray:
        # Maps share the arrays of their sites: those are stacked once.
        key = tuple(map(id, leaves))
        if key not in stacked:
            whole = leaves[0][None] if len(leaves) == 1 else np.stack(leaves)
            stacked[key] = whole.reshape(len(grid), len(grid[0]), *leaves[0].shape)
        return stacked[key]

    return jax.tree.map(stack, *(batch for row in grid for batch in row))


def _end(error: BaseException) -> None:
    """End this process at once: an orderly end would wait for the other processes."""
    if isinstance(error, Stopped):
        status = error.status
    elif isinstance(error, InputError):
        status = 2
        print(f"run.py: {error}", file=sys.stderr)
    else:
        status = 1
        traceback.print_exception(error)
        process = jax.process_index()
        print(
            f"run.py: process {process} ends. If another ended before, what that one printed says why.", file=sys.stderr
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
