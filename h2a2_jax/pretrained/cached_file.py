"""The published file of weights in the user's cache: downloaded once or put there by hand, and never changed since.

Beside `<file>` lies `<file>.json` with its size, its SHA-256 and the address that it came from ("" by hand), as they
were when the file was first used.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json, whole_file
from h2a2_jax.pretrained.catalog import CatalogEntry
from h2a2_jax.pretrained.download import SILENCE_S, download
from h2a2_jax.user_cache import CACHE_VARIABLE


def fetch_file(entry: CatalogEntry, say: Callable[[str], None], silence: float = SILENCE_S) -> Path:
    """Return the file of an entry: as it lies in the cache, else downloaded.

    Raises:
        InputError: it differs from what it was at first (`check_file`), cannot be downloaded or cannot be written.
    """
    file = entry.file
    if file.is_file():
        if not _record_file(file).is_file():
            _write_record(file, "")
        check_file(file)
        return file
    say(f"{entry.name} is downloaded from {entry.address} to {file}.")
    download(entry.address, file, silence=silence)
    _write_record(file, entry.address)
    return file


def check_file(file: Path) -> None:
    """Compare a file with the size and the SHA-256 that it had at first; one that is not there, or is new, passes.

    Raises:
        InputError: it differs, or cannot be read.
    """
    record = read_json(_record_file(file))
    if not isinstance(record, dict) or not file.is_file():
        return
    if (file.stat().st_size, _sha256(file)) != (record.get("bytes"), record.get("sha256")):
        raise InputError(
            f"{file} is not the file that was stored (its sha256 differs), and nothing of it is loaded: remove it and "
            f"{_record_file(file).name} beside it, and it is downloaded again."
        )


def discard_download(file: Path) -> bool:
    """Remove a file that was downloaded; return False, and leave it, if it was put there by hand."""
    record = read_json(_record_file(file))
    if not isinstance(record, dict) or not record.get("address"):
        _record_file(file).unlink(missing_ok=True)  # so that another file may take its place
        return False
    file.unlink(missing_ok=True)
    _record_file(file).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def alone_with(entry: CatalogEntry, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time fetch an entry; the others wait. The folder of the cache is made if missing.

    The system releases the lock however a process ends. Without locks in the system or the file system none is taken.

    Raises:
        InputError: the cache cannot be written.
    """
    folder = entry.file.parent
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may hold compiled programs, which are code
        folder.mkdir(exist_ok=True)
        lock = (folder / f"{entry.name}.lock").open("a+")
    except OSError as error:
        raise InputError(
            f"The cache {folder} cannot be written to ({error.strerror or error}): make it writable, or name another "
            f"folder with {CACHE_VARIABLE}."
        ) from error
    with lock:
        with contextlib.suppress(ImportError, OSError):
            _wait_for(lock.fileno(), lambda: say(f"Another process fetches {entry.name}: waiting for it."))
        yield


def _wait_for(descriptor: int, tell: Callable[[], None]) -> None:
    import fcntl  # POSIX only

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tell()
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _record_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _write_record(file: Path, address: str) -> None:
    record = {"address": address, "bytes": file.stat().st_size, "sha256": _sha256(file)}
    try:
        with whole_file(_record_file(file)) as part:
            part.write_text(json.dumps(record) + "\n")
    except OSError as error:
        raise InputError(
            f"{_record_file(file)} cannot be written ({error.strerror or error}): free space there, or name another "
            f"folder with {CACHE_VARIABLE}."
        ) from error


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or os.strerror(error.errno or 0)}).") from error
