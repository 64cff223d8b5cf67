"""Compiled programs in a folder of the user: signed, and checked by their contents before they run.

A compiled program is machine code. Each file is signed with a random key of this user (`signing_key`) over its name and
its content, and a file whose signature is another one is never loaded: a damaged file, one under another name, one of
another user or machine. Its program is compiled anew and takes its place. The bytes that were checked are the bytes
that run.

JAX's own cache checks nothing. Inside `compilation_cache` JAX reads and writes through `SignedFolder` instead.
"""

import contextlib
import errno
import hashlib
import hmac
import importlib
import inspect
import os
import secrets
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from h2a2_jax.errors import InputError
from h2a2_jax.user_cache import CACHE_VARIABLE, OFF, user_cache, user_data

_KEY_FILE, _KEY_BYTES = "cache.key", 32
_SIGNED = b"h2a2_jax compiled program 1\n"
_DIGEST = hashlib.sha256().digest_size
_PART = ".part"
_PART_SECONDS = 3600
"""Age of an unfinished file from which on the process that wrote it counts as dead."""
_ENDING = ".compiled"
_MOST_BYTES = 1 << 31
"""Size of all programs that JAX keeps for training; those that were not used for the longest time are removed."""
_PROBE = "h2a2_jax-probe"
_WRITTEN = ("cache_key", "compile_time_secs", "module_name", "backend", "executable", "host_callbacks")
"""Parameters of JAX's function that stores a program."""
_UNUSED = object()
_named_by_user: Any = _UNUSED
"""Inside of `compilation_cache`, the folder that jax.config named outside of it."""

Say = Callable[[str], object]


# --- folders and the key ---------------------------------------------------------------------------------------------


def default_folder() -> Path | None:
    """Folder for compiled programs of this user, which may be missing; None if none are to be kept.

    That of the environment variable H2A2_CACHE ("off": none); else "h2a2_jax" in JAX's compilation cache, if the user
    has set one on this machine (JAX_COMPILATION_CACHE_DIR), or the folder of the user's caches (`user_cache`).

    Raises:
        InputError: nothing names a folder, and the user has no home folder.
    """
    named = os.environ.get(CACHE_VARIABLE, "")
    if named == OFF or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    of_jax = _folder_of_jax()
    if not named and of_jax and not _is_remote(of_jax):
        return Path(of_jax) / "h2a2_jax"
    try:
        return user_cache()
    except RuntimeError as error:
        raise InputError(
            f"This user has no home folder for compiled programs: set {CACHE_VARIABLE} to a folder, or to off."
        ) from error


def private_folder(folder: Path) -> Path:
    """Make a folder for compiled programs, to which the user alone has access, and return it.

    Raises:
        InputError: the folder cannot be made or written to, belongs to another user, or others can write to it; or
            there is no key to sign programs with (`signing_key`).
    """
    remedy = f"give another folder, or set {CACHE_VARIABLE} to one or to off"
    _make_private(folder, f"The cache {folder}", remedy)
    signing_key()
    return folder


def default_cache(say: Say) -> Path | None:
    """Make the default folder; None if none is to be kept, or it is not private: `say` is told why."""
    try:
        folder = default_folder()
        return None if folder is None else private_folder(folder)
    except InputError as error:
        say(f"Compiled programs are not kept. {error}")
        return None


def signing_key() -> bytes:
    """Return the random key, 32 bytes, with which this user signs compiled programs; made if it is missing.

    It is a file of mode 0600 in the user's data (`user_data`), apart from the caches: a cache that is copied without it
    does not run. A key that is damaged, or that others can read, is replaced. Of two processes that make the first key
    at once, one takes that of the other.

    Raises:
        InputError: the key cannot be read or made, or others can write to its folder.
    """
    remedy = f"set XDG_DATA_HOME to a folder that you alone can write to, or {CACHE_VARIABLE} to off"
    try:
        path = user_data() / _KEY_FILE
    except RuntimeError as error:
        raise InputError(f"This user has no home folder for the key of compiled programs: {remedy}.") from error
    _make_private(path.parent, f"The folder {path.parent} with the key of compiled programs", remedy, written=False)
    try:
        for _ in range(3):
            if (key := _read_key(path)) is not None:
                return key
            _make_key(path)
    except OSError as error:
        raise InputError(
            f"The key of compiled programs, {path}, cannot be read or made ({error.strerror}): {remedy}."
        ) from error
    raise InputError(f"The key of compiled programs, {path}, changes while it is read: {remedy}.")


def _make_private(folder: Path, what: str, remedy: str, *, written: bool = True) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise InputError(f"{what} cannot be made ({error.strerror}): {remedy}.") from error
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise InputError(f"{what} belongs to another user, whose programs would be run: {remedy}.")
    if os.name == "posix" and status.st_mode & 0o022:
        raise InputError(
            f"{what} can be written to by other users, whose programs would be run: forbid it (chmod go-w), {remedy}."
        )
    if written and not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{what} cannot be written to: {remedy}.")


def _read_key(path: Path) -> bytes | None:
    """The key in a file; None if it is missing, is no key, or is not private."""
    try:
        with _open_regular(path, getattr(os, "O_NOFOLLOW", 0)) as file:
            status, key = os.fstat(file.fileno()), file.read(_KEY_BYTES + 1)
    except (FileNotFoundError, _NotRegular):
        return None
    private = os.name != "posix" or (status.st_uid == os.geteuid() and not status.st_mode & 0o077)
    return key if private and len(key) == _KEY_BYTES and any(key) else None


def _make_key(path: Path) -> None:
    """Write a new key, unless another process has just written one."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PART}")
    try:
        _write_new(part, secrets.token_bytes(_KEY_BYTES))
        try:
            os.link(part, path)
        except (OSError, AttributeError, NotImplementedError):  # a file is there, or there are no hard links here
            if _read_key(path) is None:  # else another process was first, whose programs a renaming would lose
                os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# --- signed files ----------------------------------------------------------------------------------------------------


class _NotRegular(Exception):
    """A folder, link, pipe or device stands where a file should."""


@contextlib.contextmanager
def _open_regular(path: Path, flags: int = 0) -> Iterator[Any]:
    """Open a regular file; a pipe that nobody writes to does not block."""
    flags |= os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link, with O_NOFOLLOW
            raise _NotRegular from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _NotRegular
        yield file


def _write_new(path: Path, *parts: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        for part in parts:
            file.write(part)


class SignedFolder:
    """Files in a folder, each signed with the user's key over its name and its content.

    May be used from several threads, and by several processes at once: a file is written under another name and
    renamed when it is whole.

    Args:
        folder: a folder of the user, such as `private_folder` returns; it is there.
        say: is told once that there are files of another signature.

    Raises:
        InputError: there is no key (`signing_key`).
    """

    def __init__(self, folder: Path, say: Say = warnings.warn):
        self.folder = folder.absolute()
        self._key, self._say, self._said = signing_key(), say, False

    def read(self, name: str, most_bytes: int = _MOST_BYTES) -> bytes | None:
        """Return the content of a file; None if it is missing, cannot be read, is larger, or is not ours."""
        path = self.folder / name
        try:
            with _open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                signature, content = file.read(_DIGEST), file.read(most_bytes) if size <= most_bytes else b""
        except _NotRegular:
            signature, content = b"", b""
        except OSError:
            return None
        if not hmac.compare_digest(signature, self._sign(name, content)):
            self._say_refused()
            return None
        return content

    def note_use(self, name: str) -> None:
        """Make a file the one that was used last (`make_room`)."""
        with contextlib.suppress(OSError):  # no place for a time is no reason not to use the file
            os.utime(self.folder / name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file in place of any other of its name.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        part = self.folder / f".{name}.{secrets.token_hex(8)}{_PART}"
        try:
            _write_new(part, self._sign(name, content), content)
            try:
                os.replace(part, self.folder / name)
            except IsADirectoryError:  # an empty folder of this name is nobody's
                os.rmdir(self.folder / name)
                os.replace(part, self.folder / name)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()

    def make_room(self, ending: str, most_bytes: int) -> None:
        """Remove files of an ending that were not used for the longest time, and what killed processes left."""
        found, now = [], time.time()
        for entry in _entries(self.folder):
            with contextlib.suppress(OSError):  # another process has just removed it
                status = entry.stat(follow_symlinks=False)
                if entry.name.startswith(".") and f"{ending}." in entry.name and entry.name.endswith(_PART):
                    if now - status.st_mtime > _PART_SECONDS:
                        os.unlink(entry)
                elif entry.name.endswith(ending):
                    found.append((status.st_mtime, status.st_size, entry.path))
        size = 0
        for _, length, path in sorted(found, reverse=True):
            size += length
            if size > most_bytes:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _sign(self, name: str, content: bytes) -> bytes:
        signature = hmac.new(self._key, _SIGNED + name.encode() + b"\n", hashlib.sha256)
        signature.update(content)
        return signature.digest()

    def _say_refused(self) -> None:
        if not self._said:
            self._said = True
            self._say(
                f"Compiled programs in {self.folder} are damaged or of another user or machine: they do not run, and "
                "are compiled anew."
            )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


# --- JAX's cache -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def compilation_cache(say: Say = warnings.warn) -> Iterator[None]:
    """Inside, JAX keeps what it compiles in the user's folder (`default_folder`), and loads it from there once checked.

    Programs that took a second or more to compile are kept, as train steps do, unless
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise. They are found by the program, the versions, the device
    and the number of cores, wherever a run lies. JAX loads nothing else inside: a folder that
    JAX_COMPILATION_CACHE_DIR or `jax.config` names is set aside for "h2a2_jax" in it. Where that is an address
    (gs://...), or H2A2_CACHE is "off", JAX's settings stay as they are.

    Of the processes of a run, each keeps its own programs, for JAX's keys differ by process on CPUs.

    A folder that cannot be used or written to, or a JAX that takes no cache of ours, costs the cache alone: `say` is
    told once. One inside of another changes nothing.
    """
    global _named_by_user
    if _named_by_user is not _UNUSED or _is_remote(_folder_of_jax()):
        yield
        return
    is_off, cache = False, None
    try:
        folder = default_folder()
        is_off = folder is None
        if folder is not None:
            cache = _CheckedCache(SignedFolder(private_folder(folder), say), say)
    except InputError as error:
        say(f"Compiled programs are not kept. {error}")
    if is_off:  # not inside of the block above: an InputError of the caller is none of the cache
        yield
        return
    _named_by_user = _folder_of_jax()
    try:
        _set_cache(cache, say)
        with _every_process_stores() if cache is not None and cache.asked else contextlib.nullcontext():
            yield
    finally:
        jax_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", _named_by_user)
        _named_by_user = _UNUSED


def _folder_of_jax() -> str | None:
    """The folder of JAX's own cache that the user named; None if there is none."""
    if _named_by_user is not _UNUSED:
        return _named_by_user
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


def _is_remote(folder: str | None) -> bool:
    return folder is not None and "://" in folder


def _set_cache(cache: "_CheckedCache | None", say: Say) -> None:
    """Make JAX use the cache and no folder: a JAX that took no notice of the cache would have none at all.

    JAX has no public way to give it a cache. Naming no folder also leaves XLA's options as they are, in which JAX would
    put the path, so that a program would not be found again in another folder.
    """
    jax_cache.reset_cache()  # JAX decides once whether and where it keeps programs
    jax.config.update("jax_compilation_cache_dir", None)
    if cache is None:
        return
    try:
        private: Any = importlib.import_module("jax._src.compilation_cache")
        private._cache, private._cache_initialized = cache, True
        private.get_executable_and_time(_PROBE, None, SimpleNamespace(runtime_type=_PROBE), None)
    except Exception:  # whatever a later JAX does with a call that it does not know
        cache.asked = False
    if not cache.asked:
        jax_cache.reset_cache()
        say(f"JAX {jax.__version__} keeps no compiled programs for this version of h2a2_jax: install JAX 0.10.")


@contextlib.contextmanager
def _every_process_stores() -> Iterator[None]:
    """Inside, processes other than the first store what they compiled, too; without effect if JAX does it otherwise."""
    compiler: Any = importlib.import_module("jax._src.compiler")
    private: Any = importlib.import_module("jax._src.compilation_cache")
    write = getattr(compiler, "_cache_write", None)
    if write is None or (*inspect.signature(write).parameters,) != _WRITTEN:
        yield
        return

    def store(
        cache_key: str,
        compile_time_secs: float,
        module_name: str,
        backend: Any,
        executable: Any,
        host_callbacks: Sequence[Any],
    ) -> None:
        write(cache_key, compile_time_secs, module_name, backend, executable, host_callbacks)
        least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
        if jax.process_index() and not host_callbacks and compile_time_secs >= least:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # of a program that has no bytes to keep
                private.put_executable_and_time(cache_key, module_name, executable, backend, int(compile_time_secs))

    compiler._cache_write = store
    try:
        yield
    finally:
        compiler._cache_write = write


class _CheckedCache:
    """JAX's interface of a cache, over signed files.

    Attributes:
        asked: True once JAX has looked for a program.
    """

    def __init__(self, files: SignedFolder, say: Say):
        self.asked = False
        self._path = files.folder  # JAX logs it
        self._files, self._say, self._said = files, say, False
        self._until_room = 0

    def get(self, key: str) -> bytes | None:
        """Return what JAX stored under a key; None if there is nothing, or nothing that may run."""
        self.asked = True
        if key == _PROBE:
            return None
        name = _file_name(key)
        content = self._files.read(name)
        if content is not None:
            self._files.note_use(name)
        return content

    def put(self, key: str, value: bytes) -> None:
        """Store a program; it takes the place of one that JAX could not load."""
        try:
            self._files.write(_file_name(key), value)
        except OSError as error:
            if not self._said:
                self._said = True
                self._say(f"Compiled programs cannot be kept in {self._files.folder} ({error.strerror}).")
            return
        self._until_room -= len(value)
        if self._until_room <= 0:  # not each time: it looks at every file
            self._files.make_room(_ENDING, _MOST_BYTES)
            self._until_room = _MOST_BYTES >> 5


def _file_name(key: str) -> str:
    """File of a key of JAX: the program's name, cut, and a digest of the key and of what JAX leaves out of it."""
    # XLA splits the work of a program for CPUs by the cores there are when it compiles.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in key[:40])
    digest = hashlib.sha256(f"{cores}\n{key}".encode()).hexdigest()[:32]
    return f"{name}-{digest}{_ENDING}"
