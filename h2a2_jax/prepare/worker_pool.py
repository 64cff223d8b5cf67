"""The same work on many scans in processes of their own, which never outlive the one that started them."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.host import end_with_parent
from h2a2_jax.prepare.scan_cache import OutputError

_GRACE_SECONDS = 5.0
_MOST_DEATHS = 3  # in a row, of processes that had not begun: the next would die too


@dataclass(frozen=True)
class ScanOutcome:
    """What became of one scan.

    Attributes:
        name: of the scan.
        value: what the work returned; None if it failed.
        failure: why it failed, one sentence; None if it did not.
    """

    name: str
    value: Any = None
    failure: str | None = None


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    name: str | None = None  # of the scan under way; None until the process says that it is ready


def in_processes(work: Callable[[str], Any], names: Sequence[str], workers: int) -> Iterator[ScanOutcome]:
    """Does the work for every name, several at once, and yields outcomes as they come.

    A scan whose work raises, or whose process dies, fails alone; a new process takes the place of the dead one. However
    the iteration ends, also by a kill of this process, the other processes end too.

    Args:
        work: picklable; called with a name in another process.
        names: of the scans.
        workers: processes at once.

    Yields:
        An outcome for each name, in the order in which they are done.

    Raises:
        OutputError: the work raised it.
        InputError: processes cannot be started, or die before they begin.
    """
    waiting = list(reversed(names))
    running: list[_Worker] = []
    deaths = 0
    try:
        while waiting or running:
            busy = sum(worker.name is not None for worker in running)
            while waiting and len(running) < min(workers, len(waiting) + busy):
                running.append(_start(work))
            told = wait([worker.connection for worker in running])
            for worker in [worker for worker in running if worker.connection in told]:
                name, worker.name = worker.name, None
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):  # it has died
                    running.remove(worker)
                    how = _how_it_ended(worker)
                    if name is not None:
                        yield ScanOutcome(name, failure=f"The process that worked on {name} {how}.")
                        continue
                    deaths += 1
                    if deaths == _MOST_DEATHS:
                        raise InputError(f"One process after another {how}, before it had begun.") from None
                    continue
                if kind == "stop":  # before it begins another scan, which would be cut off
                    raise OutputError(value)
                # What to do next first: the worker goes on while this process looks at the outcome.
                if waiting:
                    worker.name = waiting.pop()
                    with contextlib.suppress(OSError):  # it has died: the next recv tells
                        worker.connection.send(worker.name)
                else:
                    worker.connection.close()
                    worker.process.join()
                    running.remove(worker)
                deaths = 0
                if name is not None:
                    yield ScanOutcome(name, value) if kind == "done" else ScanOutcome(name, failure=value)
    finally:
        _stop(running)


def _start(work: Callable[[str], Any]) -> _Worker:
    # Started anew, not forked: threads of libraries do not survive a fork, and open files and locks stay with us.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    # Ctrl-C in a terminal goes to all processes: the others must not see it, also not while they start.
    resource_tracker.ensure_running()  # which unblocks the signal where it is started, so not while a worker is
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _one_thread_each():
            process.start()
    except OSError as error:
        raise InputError(f"No process can be started ({error}): use fewer --workers.") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, ours)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside do not each take all cores for their linear algebra."""
    names = [name for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if name not in os.environ]
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def _serve(work: Callable[[str], Any], connection: Connection) -> None:
    end_with_parent()
    connection.send(("ready", None))
    with contextlib.suppress(EOFError, OSError):  # the parent has no more work, or is no more
        while True:
            connection.send(_answer(work, connection.recv()))


def _answer(work: Callable[[str], Any], name: str) -> tuple[str, Any]:
    try:
        return "done", work(name)
    except OutputError as error:
        return "stop", str(error)
    except InputError as error:
        return "failed", str(error)
    except MemoryError:
        return "failed", f"There was not enough memory for {name}: use fewer --workers."
    except Exception as error:  # one scan must not stop the others, whatever it holds
        return "failed", f"{name} cannot be prepared ({type(error).__name__}: {error})."


def _how_it_ended(worker: _Worker) -> str:
    worker.connection.close()
    worker.process.join()
    code = worker.process.exitcode or 0
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; where memory ran out, use fewer --workers)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_GRACE_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
