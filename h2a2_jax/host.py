"""The machine that a process runs on, its parent, and times as people read them."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any, NoReturn


def core_numbers() -> list[int]:
    """Numbers of the CPU cores that this process may use, which on a shared machine are not all there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """How many CPU cores this process may use."""
    return len(core_numbers())


def end_with_parent() -> None:
    """Ends this process, one that `multiprocessing` started, as soon as its parent ends, however that ends.

    What tells is a pipe that the parent holds, not the number of the parent: a parent that was killed while this
    process began has another number already.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


@contextlib.contextmanager
def sigterm_raises(kind: type[KeyboardInterrupt]) -> Iterator[None]:
    """Inside, SIGTERM raises this; outside of the main thread, which gets no signals, nothing changes.

    Args:
        kind: KeyboardInterrupt itself, or one that tells the two apart.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise kind

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        restore_handler(signal.SIGTERM, before)


def restore_handler(number: int, before: Any) -> None:
    """Put back the handler of a signal.

    Args:
        number: of the signal.
        before: what `signal.signal` returned; None stands for a handler that was not set from Python and cannot be set
            from there, in whose place the system's default comes.
    """
    signal.signal(number, signal.SIG_DFL if before is None else before)


def progress_interval() -> float:
    """Seconds between two updates of a progress bar on standard error: often on a terminal, seldom in a log."""
    return 0.1 if sys.stderr.isatty() else 30.0


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
