"""The same work on many scans in several processes, which end with the process that started them."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.host import end_with_parent, keep_output
from h2a2_jax.prepare.scan_cache import OutputError

_MAX_EARLY_DEATHS = 3  # in a row, of processes that died before their first scan: the next would die too


@dataclass(frozen=True)
class ScanOutcome:
    """Return value of the work on one scan; if the work failed, a sentence with the reason instead."""

    name: str
    value: Any = None
    failure: str | None = None


def run_in_processes(work: Callable[[str], Any], names: Sequence[str], workers: int) -> Iterator[ScanOutcome]:
    """Do the work for every name, several at once, and yield the outcomes as they come.

    A scan whose work raises, or whose process dies, fails alone; a new process takes the place of the dead one. The
    processes end when the iteration ends, also when this process is killed.

    An OutputError of the (picklable) work ends the iteration, and so do processes that cannot be started, or die before
    they begin, with an InputError.
    """
    waiting = list(reversed(names))
    running: list[_Worker] = []
    early_deaths = 0
    try:
        while waiting or running:
            busy = sum(worker.name is not None for worker in running)
            while waiting and len(running) < min(workers, len(waiting) + busy):
                running.append(_Worker(work))
            wait([worker.future for worker in running], return_when=FIRST_COMPLETED)
            for worker in [worker for worker in running if worker.future.done()]:
                name = worker.name
                try:
                    outcome = worker.future.result()  # raises OutputError before the worker begins another scan
                except BrokenProcessPool:
                    running.remove(worker)
                    cause = worker.cause_of_death()
                    if name is not None:
                        yield ScanOutcome(name, failure=f"The process that worked on {name} {cause}.")
                        continue
                    early_deaths += 1
                    if early_deaths == _MAX_EARLY_DEATHS:
                        raise InputError(f"One process after another {cause}, before it had begun.") from None
                    continue
                # The next scan first: the worker goes on while this process looks at the outcome.
                if waiting:
                    worker.begin(waiting.pop())
                else:
                    worker.executor.shutdown()
                    running.remove(worker)
                early_deaths = 0
                if name is not None:
                    yield outcome
    finally:
        for worker in running:  # not by shutdown alone, which waits for the scans under way
            worker.process.kill()
        for worker in running:
            worker.executor.shutdown()


class _Worker:
    """A process with an executor of its own: when it dies, the executor breaks and the scan that it had is known.

    One executor of many processes would end all of them with the first that dies, and the scan could not be named. The
    attribute `name` is the scan under way, None until the process is ready; `future` is the outcome of that scan.
    """

    def __init__(self, work: Callable[[str], Any]):
        with _environment("ignore", "PYTHONWARNINGS"):  # or the tracker warns of semaphores when this process is killed
            resource_tracker.ensure_running()  # its start unblocks SIGINT, so not below
        context = _KeepingContext()
        self.name: str | None = None
        # Ctrl-C in a terminal goes to all processes: workers must not see it, also not while they start.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.executor = ProcessPoolExecutor(1, context, _prepare_process, (work,))
            # One thread a process for linear algebra: they would each take all cores.
            with _environment("1", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                # Starts the process; done once the process runs, and broken if it dies before.
                self.future: Future[Any] = self.executor.submit(os.getpid)
        except OSError as error:
            raise InputError(f"No process can be started ({error}): use fewer --workers.") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.process = context.process

    def begin(self, name: str) -> None:
        self.name = name
        try:
            self.future = self.executor.submit(_outcome, name)
        except BrokenProcessPool as error:  # it died between two scans
            self.future = Future()
            self.future.set_exception(error)

    def cause_of_death(self) -> str:
        self.executor.shutdown()
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL; where memory ran out, use fewer --workers)"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


class _KeepingContext(SpawnContext):
    """Context that keeps the process that an executor starts, for its exit code and to kill it.

    Spawned, not forked: threads of libraries do not survive a fork, and open files and locks stay with the parent.
    """

    process: SpawnProcess

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        self.process = SpawnProcess(*args, **options)
        return self.process


@contextlib.contextmanager
def _environment(value: str, *names: str) -> Iterator[None]:
    """Set environment variables that are not set, for processes that start inside."""
    unset = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, value))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


_work: Callable[[str], Any]  # of this worker process: sent once, not with every scan


def _prepare_process(work: Callable[[str], Any]) -> None:
    global _work
    end_with_parent()
    keep_output()
    _work = work


def _outcome(name: str) -> ScanOutcome:
    try:
        return ScanOutcome(name, _work(name))
    except OutputError:  # no other scan would fare better
        raise
    except InputError as error:
        return ScanOutcome(name, failure=str(error))
    except MemoryError:
        return ScanOutcome(name, failure=f"There was not enough memory for {name}: use fewer --workers.")
    except Exception as error:  # one scan must not stop the others, whatever it holds
        return ScanOutcome(name, failure=f"{name} cannot be prepared ({type(error).__name__}: {error}).")
