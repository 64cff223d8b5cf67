"""A folder that one program at a time may work in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from h2a2_jax.errors import InputError

FILE_NAME = "lock"


@contextlib.contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Keeps a second program out of a folder while this one works there; the system lets go of it however that ends.

    The file `lock` in the folder holds the process that has it, or had it last. Where the system or the file system
    knows no locks, the user has to take care.

    Args:
        folder: made if missing.
        what: works there, as in "training run".

    Raises:
        InputError: another one works there, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / FILE_NAME).open("a+")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror or error}): make it writable, or give another --workdir."
        ) from error
    with file:
        _lock(file.fileno(), folder, what)
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def _lock(descriptor: int, folder: Path, what: str) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = (folder / FILE_NAME).read_text().strip() or "another process"
        raise InputError(
            f"Another {what} is at work in {folder} ({holder}): wait for it, or give another --workdir."
        ) from error
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        return
