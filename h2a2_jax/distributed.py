"""The mesh of devices, and the processes of a run.

One run in several processes, each with its own devices and its own datasets' scans.

Every process builds the same mesh over all devices and calls the same step. A process opens only the datasets whose
cells of the mesh lie on its devices; what all have to agree on (numbers of scans, the bucket of a step, whether
something failed) they exchange as small arrays on the devices, always from the main thread and in the same order.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32, PyTree

from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.loader.batching import Batch
from h2a2_jax.loader.process_layout import Answer, ProcessLayout

DATASET, REPLICA = "dataset", "replica"


def train_mesh(num_datasets: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a training run: as many devices along 'dataset' as divide the datasets evenly.

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
"""A process that was killed is missed after this long, and the others end too."""


@contextmanager
def processes(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Joins the processes of a run, if there are several; to be entered before JAX is used.

    An error in one process ends it at once, with status 2 for wrong input, that of `Stopped`, and 1 otherwise: waiting
    for the others, as a process that ends in order does, would leave them waiting for it.

    Args:
        coordinator: "host:port" of process 0, reachable by all; "auto" where JAX finds it itself, as under SLURM; None
            for a run of one process.
        num_processes: of the run; None with "auto".
        process_id: of this one, from 0; None with "auto".

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
    """Whether this process prints and writes for the run."""
    return jax.process_index() == 0


def say(*text: str) -> None:
    """Print, in one process of the run."""
    if is_main():
        print(*text, flush=True)


class MeshLayout(ProcessLayout):
    """What each process of a mesh prepares: the cells that lie on its devices.

    With D datasets on a mesh of rows x replicas, a row of devices works on D / rows datasets. In a run of one process
    nothing is exchanged.

    Args:
        mesh: over the devices of all processes (`train_mesh`).
        num_datasets: D.
    """

    def __init__(self, mesh: Mesh, num_datasets: int):
        self.mesh, self.num_datasets = mesh, num_datasets
        self._per_row = num_datasets // mesh.shape[DATASET]

    @property
    def alone(self) -> bool:
        """Whether all of the mesh is this process's."""
        return not self.mesh.is_multi_process

    @cached_property
    def datasets(self) -> tuple[int, ...]:
        """Those of which this process loads training scans."""
        replicas = range(self.mesh.shape[REPLICA])
        return tuple(d for d in range(self.num_datasets) if any(self.owns(d, r) for r in replicas))

    @cached_property
    def evaluated(self) -> tuple[int, ...]:
        """Those that this process evaluates: each dataset belongs to one of the processes that load it."""
        return tuple(d for d in self.datasets if self.owns(d, 0))

    def owns(self, dataset: int, replica: int) -> bool:
        """Whether a cell lies on a device of this process."""
        device = self.mesh.devices[dataset // self._per_row, replica]
        return bool(device.process_index == jax.process_index())

    def exchange(self, values: Int32[np.ndarray, " n"]) -> Answer:
        """See `ProcessLayout`."""
        if self.alone:
            return super().exchange(values)
        parts = [jax.device_put(values[None], device) for device in self._local]
        shape = (self.mesh.size, len(values))
        along = NamedSharding(self._flat, P("all"))
        told = self._gathered(jax.make_array_from_single_device_arrays(shape, along, parts))
        # Devices of one process told the same.
        owners = [device.process_index for device in self._flat.devices]
        rows = [owners.index(process) for process in sorted(set(owners))]
        return lambda: np.asarray(told.addressable_data(0))[rows]

    def gather(self, value: Any) -> list[Any]:
        """What each process has to tell, as JSON can express it; by process, in all of them."""
        if self.alone:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        longest = int(self.exchange(np.array([len(text)], np.int32))().max())
        padded = np.zeros(longest, np.int32)
        padded[: len(text)] = text
        rows = self.exchange(padded)()
        return [json.loads(bytes(row[row > 0].astype(np.uint8))) for row in rows]

    def all_or_raise(self, action: Callable[[], Any], of_what: str) -> Any:
        """The action's result, once it succeeded in every process.

        Args:
            action: local, exchanges nothing.
            of_what: the action, for the error: "open its data".

        Raises:
            InputError: it failed in another process.
            BaseException: what it raised here.
        """
        try:
            result = action()
        except BaseException:
            self.exchange(np.ones(1, np.int32))()
            raise
        if self.exchange(np.zeros(1, np.int32))().any():
            raise InputError(f"another process failed to {of_what}; what it printed says why.")
        return result

    def assemble(self, cells: Mapping[tuple[int, int], Batch]) -> Batch:
        """See `ProcessLayout`; the arrays lie on the mesh, each process holding its devices' part."""
        sharding = NamedSharding(self.mesh, P(DATASET, REPLICA))
        if self.alone:
            return jax.device_put(super().assemble(cells), sharding)
        parts = []
        for (row, column), device in np.ndenumerate(self.mesh.devices):
            if device in self._local:
                own = [cells[row * self._per_row + i, column] for i in range(self._per_row)]
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves)[:, None], *own)
                parts.append(jax.device_put(stacked, device))
        size = (self.num_datasets, self.mesh.shape[REPLICA])

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
    def _gathered(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda rows: rows, out_shardings=NamedSharding(self._flat, P()))


def _end(error: BaseException) -> None:
    """Leave a run of several processes at once: an error here shall not wait for the others."""
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
