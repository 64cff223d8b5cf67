"""Files of unknown origin: opened without waiting, read within the memory that is free, never run.

All functions raise `OSError`, with an English `strerror`, for a file that cannot be read here: a reader then has one
place for what the system and what these limits refuse. Pickles are read by `restricted_pickle`, archives and arrays of
numpy by `arrays`.
"""

import errno
import os
import stat
from pathlib import Path

from h2a2_jax.host import available_memory

ALWAYS_FITS = 64 << 20
"""Bytes below which no limit by growth applies."""

MOST_GROWTH = 100
"""Bytes of content a stored byte, above `ALWAYS_FITS`: packed coordinates, colours and masks of that size grow less."""

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: str | Path) -> None:
    """Refuse what is no file: opening a pipe waits for whoever writes to it, and a device may have no end.

    Raises:
        OSError: the path is a folder, a pipe, a socket or a device, or cannot be looked at.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise OSError(errno.EINVAL, f"it is {name} and no file", os.fspath(path))


def check_room(size: int, what: str) -> None:
    """Refuse what takes more than half of the memory that is free.

    Args:
        size: memory that it takes (bytes).
        what: subject of the sentence, as in "its array points".

    Raises:
        OSError: it takes more.
    """
    free = available_memory()
    if size > ALWAYS_FITS and size > free // 2:
        raise OSError(
            errno.EFBIG, f"{what} takes {_megabytes(size)}, more than half of the {_megabytes(free)} of free memory"
        )


def check_growth(stored: int, content: int, what: str) -> None:
    """Refuse content that is far larger than what is stored of it, and what takes more memory than is free.

    Args:
        stored: size in the file (bytes).
        content: size that the file states for it once it is unpacked (bytes).
        what: subject of the sentence, as in "its array points".

    Raises:
        OSError: it is `MOST_GROWTH` times as large and more than `ALWAYS_FITS`, or too large for the free memory.
    """
    if content > ALWAYS_FITS and content > MOST_GROWTH * stored:
        raise OSError(
            errno.EFBIG,
            f"{what} claims {_megabytes(content)} in {stored:,} bytes of the file, more than measured values pack into "
            "them",
        )
    check_room(content, what)


def read_bytes(path: str | Path, growth: int = 1) -> bytes:
    """Read a file as a whole.

    Args:
        path: the file.
        growth: memory that is taken for a byte of it.

    Raises:
        OSError: it is no file, is too large for the free memory, or cannot be read.
    """
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        check_room(size * growth, "it")
        return file.read(size)  # what is appended meanwhile is another version of the file


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
