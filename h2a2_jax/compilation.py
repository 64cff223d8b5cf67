"""JAX's persistent compilation cache in a folder: later processes load what one process compiled.

JAX writes an entry in place and never over one that is there. A process that is killed while it writes leaves a part of
an entry behind, which every later process would fail to read and compile anew; such parts are removed here first.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from h2a2_jax.errors import InputError
from h2a2_jax.user_cache import CACHE_VARIABLE, OFF, user_cache

_ENTRY, _LAST_USE = "-cache", "-atime"
"""Endings of the names of JAX's entries, and of the files with the time of their last use."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20


@contextlib.contextmanager
def compilation_cache(folder: Path | None) -> Iterator[None]:
    """Inside, JAX keeps what it compiles in the folder.

    Programs that took a second or more to compile are kept, as train steps do, unless
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise. A cache that JAX_COMPILATION_CACHE_DIR or `jax.config`
    names already is used instead, unchanged. Without a folder nothing is kept.
    """
    if folder is None or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        yield
        return
    use_compilation_cache(folder)
    try:
        yield
    finally:
        _set_cache_folder(None)


def use_compilation_cache(folder: Path) -> None:
    """Make the folder JAX's compilation cache for the rest of this process, in place of any other.

    A folder that is missing is made, and damaged entries in it are removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The cache {folder} cannot be made ({error.strerror}): give another folder.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"The cache {folder} cannot be written to: give another folder.")
    remove_damaged_entries(folder)
    _set_cache_folder(folder)


def default_folder() -> Path | None:
    """Folder for compiled programs of this user, which may be missing; None if none are to be kept.

    That of the environment variable H2A2_CACHE ("off": none); else "h2a2_jax" in JAX's compilation cache, if the user
    has set one on this machine (JAX_COMPILATION_CACHE_DIR), or the folder of the user's caches (`user_cache`).
    """
    named = os.environ.get(CACHE_VARIABLE, "")
    if named == OFF or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    of_jax = jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]
    if not named and of_jax and "://" not in of_jax:
        return Path(of_jax) / "h2a2_jax"
    return user_cache()


def private_folder(folder: Path) -> Path:
    """Make a folder for compiled programs, to which the user alone has access, and return it.

    Who can write a compiled program runs code in the processes that load it.

    Raises:
        InputError: the folder cannot be made or written to, belongs to another user, or others can write to it.
    """
    remedy = f"give another folder, or set {CACHE_VARIABLE} to one or to off"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise InputError(f"The cache {folder} cannot be made ({error.strerror}): {remedy}.") from error
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise InputError(f"The cache {folder} belongs to another user, whose programs would be run: {remedy}.")
    if os.name == "posix" and status.st_mode & 0o022:
        raise InputError(
            f"The cache {folder} can be written to by other users, whose programs would be run: take that right away "
            f"(chmod go-w), {remedy}."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"The cache {folder} cannot be written to: {remedy}.")
    return folder


def default_cache(say: Callable[[str], None]) -> Path | None:
    """Make the default folder; None if none is to be kept, or it is not private: `say` is told why."""
    folder = default_folder()
    try:
        return None if folder is None else private_folder(folder)
    except InputError as error:
        say(f"Compiled programs are not kept. {error}")
        return None


def remove_damaged_entries(folder: Path) -> int:
    """Remove incomplete entries, as a kill leaves them, and return their number; the folder may be missing.

    An entry that cannot be read or removed stays. One that another process is writing at this moment is removed too; it
    is compiled again when next needed.
    """
    removed = 0
    for entry in folder.glob(f"*{_ENTRY}"):
        with contextlib.suppress(OSError):
            if not _is_whole(entry):
                entry.unlink()
                entry.with_name(entry.name.removesuffix(_ENTRY) + _LAST_USE).unlink(missing_ok=True)
                removed += 1
    return removed


def _set_cache_folder(folder: Path | None) -> None:
    jax_cache.reset_cache()  # JAX decides once whether and where it keeps programs
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder.absolute()))


def _is_whole(entry: Path) -> bool:
    """Return True if JAX can decompress an entry up to the end of its data."""
    with entry.open("rb") as file:
        magic = file.read(len(_ZSTD_MAGIC))
        file.seek(0)
        decompressor: Any = zlib.decompressobj()
        damaged: type[Exception] = zlib.error
        if magic == _ZSTD_MAGIC:
            module, decompressor = _zstandard()
            if module is None:  # JAX cannot read the entry either, nor write another one in its place
                return False
            damaged = module.ZstdError
        try:
            while chunk := file.read(_CHUNK):
                decompressor.decompress(chunk)
                if decompressor.eof:
                    return True
        except damaged:
            return False
    return False


def _zstandard() -> tuple[ModuleType | None, Any]:
    """The Zstandard package that JAX uses, and a decompressor of it; None without one."""
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        with contextlib.suppress(ImportError):
            import zstandard

            return zstandard, zstandard.ZstdDecompressor().decompressobj()
        return None, None
    return zstd, zstd.ZstdDecompressor()
