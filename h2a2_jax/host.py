"""The machine and the process: CPU cores, signals, log messages, progress bars, versions of the software that runs."""

import atexit
import contextlib
import ctypes
import errno
import gc
import io
import logging
import multiprocessing
import os
import platform
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

from absl import logging as absl_logging

import h2a2_jax
from h2a2_jax.errors import quoted

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def core_numbers() -> list[int]:
    """Numbers of the CPU cores that this process may use; on a shared machine fewer than there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(core_numbers())


def available_memory() -> int:
    """Bytes of memory that the process may still take without swapping, as far as the system tells; else 8 GB."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return 8 << 30
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


@cache
def cpu_features() -> str:
    """The processor's kind and instructions, which a program compiled for it needs, as far as the system tells them."""
    kind = f"{platform.system()} {platform.machine()} {platform.processor()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return kind
    return "\n".join([kind, *sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})])


def release_memory() -> None:
    """Give freed memory back to the system, where glibc is the allocator; no effect elsewhere.

    XLA's compiler takes hundreds of MB for a large program. glibc keeps what is freed of them for the process, and the
    temporaries of the program, which are larger than any free piece, come on top. What the tracing of a program leaves
    behind goes too.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def end_with_parent() -> None:
    """End this process, which `multiprocessing` started, as soon as its parent ends for any reason.

    The thread waits on a pipe that the parent holds, instead of watching the parent's process number: a parent that was
    killed while this process began has another number already.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


@contextlib.contextmanager
def sigterm_raises(kind: type[KeyboardInterrupt]) -> Iterator[None]:
    """Inside, SIGTERM raises an exception of this kind; no effect outside of the main thread, which gets no signals."""

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
    """Restore the handler of a signal, the result of `signal.signal`.

    None stands for a handler that was not set from Python; Python cannot set it again, so that the system's default
    takes its place.
    """
    signal.signal(number, signal.SIG_DFL if before is None else before)


def allow_open_files() -> None:
    """Raise this process's limit on open files to the system's, where there are such limits; for command lines."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def shortage(error: BaseException) -> str | None:
    """Say what the machine has too little of, and what to do, without a full stop; None for another error.

    Args:
        error: as a lack of memory on the host or a device, of open files, or of threads raises it.
    """
    why = quoted(error, 150)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return (
            f"there is not enough memory ({why or 'no more can be had'}): end other programs, raise the limit "
            "(ulimit -v), or take fewer scans at once (--config.train.batch_size, --config.eval.batch_size)"
        )
    if isinstance(error, RuntimeError) and ("RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)):
        return (
            f"the device has not enough memory ({why}): take fewer scans at once (--config.train.batch_size, "
            "--config.eval.batch_size), or set --config.train.rematerialize=true"
        )
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({why}): allow more (ulimit -n 4096)"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"no further thread can be started ({why}): allow more (ulimit -u), or end other programs"
    return None


def leave(status: int) -> NoReturn:
    """End this process with an exit status, from the main thread of a program.

    A program that ends early, because of an error, leaves XLA at work. A thread of XLA that then frees an array of
    numpy waits for Python, which ends it in C++ code that cannot be left: the process aborts. So Python is not taken
    down in that case; what is registered with `atexit` is done.
    """
    if status:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


class OutputFile(io.RawIOBase):
    """Standard output or error whose reader may go away: what cannot be written is dropped, without an error.

    A pipe that nobody reads, a terminal that was closed and the like never come back: the null device then takes the
    file's number, so that libraries and child processes lose nothing but text, too. A full disk may have space later.

    Args:
        number: file descriptor.

    Attributes:
        is_lost: True if something could not be written.
    """

    _FOR_NOW = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

    def __init__(self, number: int):
        self._number, self.is_lost = number, False

    def fileno(self) -> int:
        """The file descriptor."""
        return self._number

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return True for a terminal."""
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        """Write what goes, and return the number of all bytes."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                left = left[os.write(self._number, left) :]
            except BlockingIOError:  # a reader that is slow, of a pipe that someone made non-blocking
                select.select([], [self._number], [])
            except OSError as error:
                self.is_lost = True
                if error.errno not in self._FOR_NOW:
                    _take_number(self._number)
                break
        return size


_outputs: list[OutputFile] = []


def keep_output() -> None:
    """Let this process outlive standard output and error: what cannot be written is dropped (`OutputFile`).

    Letters that the encoding of the output lacks are written as escapes.

    Streams that a caller put in place of the system's, as pytest does, stay. Calling it twice has no further effect.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:  # closed before Python began: the next file that is opened would get the number
            try:
                os.fstat(number)
                continue_with = os.open(os.devnull, os.O_RDWR)  # a file has got it already
            except OSError:
                _take_number(number)
                continue_with = number
            setattr(sys, name, os.fdopen(continue_with, "r" if number == 0 else "w", closefd=False))
        elif number and stream is original and not isinstance(getattr(stream.buffer, "raw", stream.buffer), OutputFile):
            with contextlib.suppress(OSError):
                stream.flush()
            file = OutputFile(stream.fileno())
            buffer: Any = file if stream.write_through else io.BufferedWriter(file)
            kept = io.TextIOWrapper(
                buffer,
                encoding=stream.encoding,
                errors="backslashreplace",  # names of files may hold letters that the terminal does not have
                line_buffering=number == 2 or stream.line_buffering,
                write_through=stream.write_through,
            )
            _outputs.append(file)
            setattr(sys, name, kept)
            setattr(sys, f"__{name}__", kept)
    absl_logging.get_absl_handler().python_handler.setStream(sys.stderr)


def output_is_lost() -> bool:
    """Return True if something that was printed on standard output could not be written."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return any(file.is_lost and file.fileno() == 1 for file in _outputs)


def _take_number(number: int) -> None:
    """Open the null device in place of a file descriptor."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def quiet_command_line() -> None:
    """Keep messages of absl and Orbax that are no news to the user of a command off standard error.

    For command lines alone, before they open a checkpoint: the verbosity, the filter on absl's logger and
    `sys.unraisablehook` belong to the process. Calling it twice has no further effect.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)  # JAX logs the accelerators that it did not find
    logger = logging.getLogger("absl")
    if _is_news in logger.filters:
        return
    logger.addFilter(_is_news)
    hook = sys.unraisablehook

    def skip_closed_loop(unraisable: Any) -> None:
        # TensorStore prints the first if a file could not be read and Orbax no longer waits for the other ones; Python
        # the second of a loop that could not be opened, for want of open files.
        error = unraisable.exc_value
        is_closed = isinstance(error, RuntimeError) and "loop is closed" in str(error)
        if not is_closed and not (isinstance(error, AttributeError) and "_ssock" in str(error)):
            hook(unraisable)

    sys.unraisablehook = skip_closed_loop


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for what Orbax logs below an error about each folder, and for exceptions, which it raises too."""
    return "orbax" not in record.pathname or (record.levelno >= logging.ERROR and not record.exc_info)


def progress_interval() -> float:
    """Seconds between two updates of a progress bar on standard error: short on a terminal, long in a log file."""
    return 0.1 if sys.stderr.isatty() else 30.0


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def versions() -> dict[str, str]:
    """Versions of Python, of the numerical packages and of this package, by name."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:  # imported from a folder that pip does not know
            return "unknown"

    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "h2a2_jax": h2a2_jax.__version__}


def revision(package: Path | None = None) -> str:
    """The git revision of the checkout that the package runs from.

    The full hash, with " + uncommitted changes" if tracked files or new ones in the package differ from it; "installed
    package" outside of a checkout, and in a repository that does not track the package's files, such as one around a
    site-packages folder; "unknown" if git fails.
    """
    package = package or Path(h2a2_jax.__file__).parent
    if not any((folder / ".git").exists() for folder in package.absolute().parents):
        return "installed package"
    try:
        if not _git(package, "ls-files", "--", "__init__.py"):
            return "installed package"
        commit = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ":/")
        new = _git(package, "ls-files", "--others", "--exclude-standard", "--", ".")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a folder that git does not trust
        return "unknown"
    return commit + (" + uncommitted changes" if changed or new else "")


def _git(folder: Path, *arguments: str) -> str:
    # Without the GIT_ variables, which a hook or another tool may have set for another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**environment, "GIT_OPTIONAL_LOCKS": "0"},  # so that reading never blocks someone's commit
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout.strip()
