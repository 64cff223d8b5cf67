"""The mesh of devices, and the processes of a run, each with its own devices and its own datasets' scans.

Every process builds the same mesh over all devices and calls the same step. A process opens only the datasets whose
shards lie on its devices. The processes agree on numbers of scans, the bucket of a step and failures by exchanging
small arrays on the devices, always from the main thread and in the same order.
"""

import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32, PyTree

from h2a2_jax.errors import INTERRUPTED, InputError, Stopped, reason_of
from h2a2_jax.rendezvous import Hub, Link, Loss, Member, Relay, Watch, parse_address

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
TIMEOUT_S = 60.0
"""Seconds to wait for another process, by default."""


@contextmanager
def processes(
    coordinator: str | None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | None = None,
    facts: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Join the processes of a run, if there are several; enter this context before JAX is used.

    The processes meet at the coordinator (`h2a2_jax.rendezvous`) and watch one another from then on. If one ends early,
    each of the others prints one sentence that names it and ends at once: an orderly end would wait for it. The exit
    status is 2 after wrong input and after the death of a process, that of `Stopped` after a signal, and 1 for other
    errors.

    Args:
        coordinator: "host:port" of process 0, reachable by all; "auto" where JAX finds the coordinator itself, as under
            SLURM; None for a run of one process.
        num_processes: number of processes in the run; None with "auto".
        process_id: number of this process, from 0; None with "auto".
        timeout: seconds to wait for the other processes at the start, and for a sign of life later; None: 60.
        facts: what must be the same in all processes, by name.

    Raises:
        InputError: some of the three are missing or make no sense; the processes did not come together in time or
            disagree.
    """
    joined = _member(coordinator, num_processes, process_id, timeout, facts or {})
    if joined is None:
        yield
        return
    member, local_devices = joined
    watch = Hub(member) if member.index == 0 else Link(member)
    end = _End(watch)
    port = watch.meet()
    watch.watch(end.after_loss)
    _ends.append(end)
    relay = None
    try:
        relay = _start_jax(member, port, local_devices)
        yield
    except Stopped as stopped:
        if not stopped.together:
            end.after_error(stopped)
        _finish(watch, relay)
        raise
    except BaseException as error:
        end.after_error(error)
    _finish(watch, relay)


def _member(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: float | None,
    facts: Mapping[str, str],
) -> tuple[Member, Sequence[int] | None] | None:
    """This process and the numbers of its devices, if they are not all; None in a run of one process."""
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    limit, local_devices = TIMEOUT_S if timeout is None else timeout, None
    if coordinator == "auto" and not any(given[1:]):
        coordinator, num_processes, process_id, local_devices = _detect(limit)
    elif not any(given):
        return None
    elif not all(given):
        raise InputError(
            "--coordinator, --num_processes and --process_id go together, all three or none; or --coordinator=auto "
            f"alone, where a cluster such as SLURM started the processes. An example is {_EXAMPLE}."
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id is {process_id}, expected is one from 0 to --num_processes - 1; an example is {_EXAMPLE}."
        )
    host, port = parse_address(coordinator, _EXAMPLE)
    return Member(host, port, num_processes, process_id, limit, facts), local_devices


def _detect(timeout: float) -> tuple[str, int, int, Sequence[int] | None]:
    """Coordinator, number of processes, number of this process and its devices, from the cluster's variables."""
    try:
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
    except Exception as error:  # of any cluster's client
        raise InputError(
            f"--coordinator=auto failed to ask the cluster ({reason_of(error)}): "
            f"give numbers by hand, as in {_EXAMPLE}."
        ) from error
    coordinator, num_processes, process_id, local_devices = found
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError(
            "--coordinator=auto finds no cluster here, such as a step of SLURM: start the processes with srun, or give "
            f"numbers by hand, as in {_EXAMPLE}."
        )
    return coordinator, num_processes, process_id, None if "JAX_LOCAL_DEVICE_IDS" in os.environ else local_devices


def _start_jax(member: Member, port: int, local_devices: Sequence[int] | None) -> Relay | None:
    """Start JAX's service in process 0 and connect to it, by way of a relay in the other processes."""
    # Its handler of SIGTERM, in C++, would swallow the signal.
    jax.config.update("jax_enable_preemption_service", False)
    relay, host = None, os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0]
    address = f"{'127.0.0.1' if host in ('', '[::]', '0.0.0.0') else host}:{port}"
    if member.index:
        relay = Relay(member.host, port, member.timeout)
        address = f"127.0.0.1:{relay.port}"
    # The addresses are of this machine: no proxy can reach them.
    if any("_proxy" in name.lower() for name in os.environ):
        direct = [os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy", ""), address.rpartition(":")[0]]
        os.environ["no_grpc_proxy"] = ",".join(filter(None, direct))
    limit = max(1, round(member.timeout))
    try:
        jax.distributed.initialize(
            address,
            member.count,
            member.index,
            local_device_ids=local_devices,
            initialization_timeout=limit,
            heartbeat_timeout_seconds=10 * limit,  # the watch comes first, with a sentence
            shutdown_timeout_seconds=limit,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"JAX did not start in process {member.index}: {reason_of(error)}") from error
    return relay


def _finish(watch: Watch, relay: Relay | None) -> None:
    """End orderly, together with the other processes."""
    watch.finish()
    _ends.clear()
    jax.distributed.shutdown()
    watch.close()
    if relay is not None:
        relay.close()


def end_now(stopped: Stopped, sentence: str) -> NoReturn:
    """Print a sentence and end this process at once, from any thread; other processes of the run are told."""
    print(sentence, flush=True)
    if _ends:
        _ends[-1].after_error(stopped)
    sys.stderr.flush()
    os._exit(stopped.status)


_describers: list[Callable[[], str]] = []


@contextmanager
def described(describe: Callable[[], str]) -> Iterator[None]:
    """Inside, the sentence on a lost process tells what is saved.

    Args:
        describe: returns it, as "step 8 is saved in runs/joint"; called in another thread.
    """
    _describers.append(describe)
    try:
        yield
    except BaseException:
        if not _ends:  # or `_End` needs it yet
            _describers.remove(describe)
        raise
    _describers.remove(describe)


_GRACE_S = {"failed": 2.0, "stopped": 5.0}
"""Time for a process to end by itself, with a sentence of its own, when another one ended in this way."""
_NETWORK = re.compile("gloo|nccl|connection|deadline|timed out|unavailable", re.IGNORECASE)
"""In errors of JAX that the end of another process causes."""


_ends: list["_End"] = []
"""Of the run of several processes that this process belongs to."""


class _End:
    """The end of this process, with one sentence, because of an error or of another process."""

    def __init__(self, watch: Watch):
        self._watch, self._member = watch, watch.member
        self._lock = threading.Lock()  # never released: the first reason ends the process

    def after_loss(self, loss: Loss) -> None:
        """End after another process; called in a thread of the watch, for the main thread may wait for that process."""
        time.sleep(_GRACE_S.get(loss.kind, 0))
        self._lock.acquire()
        text = loss.text(self._member.index, self._member.count)
        saved = _in_time(_describers[-1]) if _describers else "start all processes again"
        self._exit(loss.status, f"{text}; {saved}.")

    def after_error(self, error: BaseException) -> NoReturn:
        """End after an error in the main thread; other processes are told."""
        kind, detail, sentence = "failed", "", str(error)
        if isinstance(error, Stopped | KeyboardInterrupt):
            status, kind, detail, sentence = INTERRUPTED, "stopped", "SIGINT", "stopped."
            if isinstance(error, Stopped):  # the training loop printed what is saved
                status, detail, sentence = error.status, error.signal_name, ""
        elif isinstance(error, InputError):
            status = 2
        else:
            # Likely of the end of another process, which the watch knows soon, or after some time of silence.
            is_network = isinstance(error, jax.errors.JaxRuntimeError) and _NETWORK.search(str(error))
            self._watch.lost.wait(self._member.timeout if is_network else 2)
            if self._watch.lost.is_set():
                threading.Event().wait()  # `after_loss` ends this process
            status, sentence = 1, f"process {self._member.index} of {self._member.count} ends."
        self._lock.acquire()
        if status == 1:
            traceback.print_exception(error)
        if sentence:
            print(f"run.py: {sentence}", file=sys.stderr, flush=True)
        others = status if kind == "stopped" else 2
        self._watch.leave(Loss(self._member.index, kind, others, detail))
        self._exit(status)

    def _exit(self, status: int, sentence: str = "") -> NoReturn:
        if sentence:
            print(f"run.py: {sentence}", file=sys.stderr, flush=True)
        if isinstance(self._watch, Hub):
            self._watch.wait_for_others()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _in_time(describe: Callable[[], str]) -> str:
    """What a function returns within ten seconds; it may wait for a checkpoint that is being written."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(describe()), daemon=True)
    thread.start()
    thread.join(10)
    return found[0] if found else "the same commands go on from the newest checkpoint"


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
