"""The machine that a process runs on: its cores and memory, its progress bars, the versions of what it runs."""

import contextlib
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import h2a2_jax


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


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIT_SECONDS = 10


def versions() -> dict[str, str]:
    """Versions by name: of Python, of what computes, of this package."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "h2a2_jax": h2a2_jax.__version__,
    }


def revision(package: Path | None = None) -> str:
    """The git revision of the checkout that the package runs from.

    Args:
        package: folder of the package; None: of this one.

    Returns:
        The full hash, with " + uncommitted changes" where tracked files or new ones in the package differ from it;
        "installed package" where the package is in no checkout: a repository that a site-packages folder happens to lie
        in does not count, for it does not hold the package's files; "unknown" where git does not tell.
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


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # imported from a folder that pip does not know
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    # Not those that a hook or another tool set for another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**environment, "GIT_OPTIONAL_LOCKS": "0"},  # looking must not be in the way of who works there
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
    ).stdout.strip()
