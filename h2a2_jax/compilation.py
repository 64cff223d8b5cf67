"""JAX's persistent compilation cache in a folder, and a count of compiled programs.

JAX writes an entry of the cache in place and never over an existing one. A process that is killed while it writes
leaves a part of an entry behind, which every later process would fail to read and compile anew. Such parts are removed
here before JAX uses the folder.
"""

import contextlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from h2a2_jax.errors import InputError

_ENTRY, _LAST_USE = "-cache", "-atime"
"""Endings of the names of JAX's entries, and of the files with the time of their last use."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20


@contextlib.contextmanager
def compilation_cache(folder: Path | None) -> Iterator[None]:
    """Inside, JAX keeps what it compiles in the folder.

    Programs that took a second or more to compile are kept, as train steps do, unless
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise. A cache that JAX_COMPILATION_CACHE_DIR or `jax.config`
    names already is used instead, unchanged.

    Args:
        folder: made if missing; None: nothing is kept.

    Raises:
        InputError: the folder cannot be made or written to.
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

    Args:
        folder: made if missing; damaged entries in it are removed.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The cache {folder} cannot be made ({error.strerror}): give another folder.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"The cache {folder} cannot be written to: give another folder.")
    remove_damaged_entries(folder)
    _set_cache_folder(folder)


def remove_damaged_entries(folder: Path) -> int:
    """Remove incomplete entries, as a kill leaves them; an entry that cannot be read or removed stays.

    An entry that another process is writing at this moment is removed too; it is compiled again when next needed.

    Args:
        folder: a compilation cache; may be missing.

    Returns:
        Number of removed entries.
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


_BACKEND = "/jax/core/compile/backend_compile_duration"
"""A program was compiled, or loaded from the persistent cache; in the thread that asked for it."""
_LOADED = "/jax/compilation_cache/cache_hits"
"""It was loaded; told before the event above."""


class CompilationCounter:
    """Counts what JAX compiles while it is entered, in all threads of this process.

    The train step is compiled once for each bucket of padded shapes, and a run meets most of its buckets early. What
    the steps after the first ones compile is counted apart, for `warning`.

        with CompilationCounter(expected=config.train.max_bucket + 1) as compilations:
            for ...:
                with compilations.step():
                    state, metrics = take_step(state, batch)
                if sentence := compilations.warning(step):
                    say(sentence)

    Args:
        expected: programs that late steps may compile without a warning: the number of buckets.
        first_steps: of this process, that are not late yet.

    Attributes:
        count: programs, compiled or loaded.
        loaded: those of them that were loaded from the persistent compilation cache.
        seconds: that compiling and loading took.
    """

    def __init__(self, expected: int, first_steps: int = 20):
        self.count, self.loaded, self.seconds = 0, 0, 0.0
        self._expected, self._first_steps = expected, first_steps
        self._steps, self._late, self._late_seconds = 0, 0, 0.0
        self._warn_at = expected + 1
        self._stepping: int | None = None
        self._lock = threading.Lock()

    @property
    def compiled(self) -> int:
        """Programs that were not loaded."""
        return self.count - self.loaded

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """To be entered around a train step: what this thread compiles inside is the step's."""
        self._steps += 1
        self._stepping = threading.get_ident()
        try:
            yield
        finally:
            self._stepping = None

    def warning(self, step: int) -> str | None:
        """A sentence when late steps compiled more than is expected; again whenever the number doubled, else None.

        Args:
            step: optimiser steps done, for the sentence.
        """
        if self._late < self._warn_at:
            return None
        self._warn_at = 2 * self._late
        return (
            f"Step {step}: {self._late} programs were compiled after the first {self._first_steps} steps, which took "
            f"{self._late_seconds:.0f} s; the buckets of padded shapes account for {self._expected} at most. Shapes "
            "keep changing from step to step: JAX_EXPLAIN_CACHE_MISSES=1 in the environment says which, and "
            "train.max_bucket=0 gives all steps one shape (larger batches are cropped)."
        )

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != _BACKEND:
            return
        with self._lock:
            self.count += 1
            self.seconds += duration_secs
            if self._stepping == threading.get_ident() and self._steps > self._first_steps:
                self._late += 1
                self._late_seconds += duration_secs

    def _on_event(self, event: str, **_: Any) -> None:
        if event == _LOADED:
            with self._lock:
                self.loaded += 1

    def __enter__(self) -> "CompilationCounter":
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *exception: object) -> None:
        # Who else uses JAX's listeners may have cleared them all, which JAX asserts has not happened.
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_duration_listener(self._on_duration)
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_listener(self._on_event)
