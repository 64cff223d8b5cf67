"""Pickles read without running anything that they name.

A pickle is a program: it names functions and gives their arguments. Two readers admit a handful of names each, all of
which stand for code of this package. `load_plain_pickle` reads plain data and refuses a file that names anything else.
`load_inert_pickle` passes other names over: each becomes an `Inert`, which takes any arguments, contents and state and
keeps nothing.
"""

import codecs
import io
import math
import mmap
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric

from h2a2_jax.errors import InputError

MAX_READS = 2_000_000
"""Reads of a pickle with unknown names, some four an object; detectors with optimiser and history take a twentieth.
The limit bounds the memory that a file made of nothing but small objects can take to some 150 MB."""

Source = io.BytesIO | mmap.mmap
"""Content in memory or mapped to it: a read returns no more than there is, whatever a length in the pickle says."""
Admitted = Mapping[tuple[str, str], Any]
"""Stand-ins by module and name."""


class NotAdmittedError(pickle.UnpicklingError):
    """A pickle of plain data names a class or function that is none."""


class Inert:
    """Object that ignores whatever is done to it."""

    def __call__(self, *_: Any) -> "Inert":
        """Return the object itself."""
        return self

    append = extend = __call__


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle of builtin containers, numbers, strings and numpy arrays.

    Raises:
        InputError: the file is missing, is no complete pickle, or names any other class or function
            (which could run arbitrary code).
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}: check the folder and the file name.")
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return _PlainUnpickler(content).load()
    except NotAdmittedError as error:
        raise InputError(
            f"{path} holds {error}, which is not plain data: only numpy arrays and Python's own containers "
            "are loaded; write the file again without it."
        ) from None
    except (MemoryError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} asks for more memory than there is: write or download it again.") from error
    except Exception as error:  # a damaged pickle raises anything; none of its code has run
        what = "it ends too early" if isinstance(error, EOFError) else f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(f"{path} is not a readable pickle ({what}): write or download it again.") from error


def load_inert_pickle(
    source: Source, admitted: Admitted, load_persistent: Callable[[Any], Any]
) -> tuple[Any, set[str]]:
    """Load one pickle of a program that need not be installed.

    Args:
        source: at the first byte of the pickle; left behind its last one.
        admitted: stand-ins of the names that matter; one that makes a dict leaves out keys that are not plain
            (`is_plain_key`).
        load_persistent: returns the object of a persistent id.

    Returns:
        The object, of builtin containers, numbers, text, results of `admitted`, and `Inert`; and the names not read.

    Raises:
        Exception: any that a damaged pickle, or one of more than `MAX_READS`, leads to; none of its code has run.
    """
    unpickler = _InertUnpickler(_Counted(source), admitted, load_persistent)
    return unpickler.load(), unpickler.not_read


def is_plain_key(key: Any) -> bool:
    """Return True if a key is hashed in no time; a tuple of tuples of tuples is not."""
    return key is None or isinstance(key, str | int | float)


# The one in Python: its steps can be replaced, and a few damaged bytes do not make it fill the memory.
_Unpickler: Any = pickle._Unpickler


class _RestrictedUnpickler(_Unpickler):
    def __init_subclass__(cls) -> None:
        # The original finds its steps in a table of functions, in which those of a subclass take their places here.
        cls.dispatch = {code: getattr(cls, step.__name__) for code, step in _Unpickler.dispatch.items()}

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"the extension {code}")

    def load_frame(self) -> None:
        # Frames are hints for buffering; the original would take the content of one without its being counted.
        self.read(8)

    def load_bytearray8(self) -> None:
        # Takes the bytes that are there; the original first makes as many zeros as a number says.
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))


class _PlainUnpickler(_RestrictedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise NotAdmittedError(f"{module}.{name}")
        return _PLAIN[module, name]

    def load_build(self) -> None:
        _check_state(self.stack[-2], self.stack[-1])
        if isinstance(self.stack[-2], np.dtype):
            self.stack.pop()  # the type is already what its state says
        else:
            super().load_build()


def _check_state(instance: Any, state: Any) -> None:
    """Refuse what numpy would take for the state of a type or an array and crash on."""
    good = False
    match instance, state:
        case np.dtype(), (3, "<" | "|" | "=", None, None, None, int() as size, int() as alignment, int() as flags):
            good = size in (-1, instance.itemsize) and alignment in (-1, instance.alignment) and flags == instance.flags
        case np.ndarray(), (int(), tuple() as shape, np.dtype() as dtype, bool() | int(), bytes() | list() as content):
            if all(isinstance(length, int) and length >= 0 for length in shape):
                size = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize)
                good = size == len(content) and dtype.hasobject == isinstance(content, list)
    if not good:
        raise pickle.UnpicklingError(f"the state of a {type(instance).__name__}")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stand for `_codecs.encode`, with which old protocols write bytes; no other codec is run."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return codecs.latin_1_encode(text)[0]


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> Any:
    """Stand for numpy's, which allocates any shape; a pickle gives an empty one and sets the state afterwards."""
    if kind is not _NDARRAY or shape != (0,) or dtype not in (b"b", "b"):
        raise pickle.UnpicklingError(f"an array of shape {shape} before its content")
    return multiarray._reconstruct(np.ndarray, (0,), b"b")


def _dtype(text: Any, *_: Any) -> np.dtype:
    """Stand for numpy.dtype: a type of numbers, text or objects, not of records."""
    dtype = np.dtype(text) if isinstance(text, str) else None
    if dtype is None or dtype.kind not in "biufcSUO" or dtype.subdtype is not None:
        raise pickle.UnpicklingError(f"the type {text!r}")
    return dtype


def _scalar(dtype: Any, content: Any) -> Any:
    """Stand for numpy's scalar from bytes."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(content, bytes):
        raise pickle.UnpicklingError("a scalar of objects")
    return multiarray.scalar(dtype, content)


def _byte_string(kind: type) -> Any:
    """Stand for bytes or bytearray, which make as many zeros as a number says."""

    def make(*arguments: Any) -> Any:
        if any(isinstance(argument, int) for argument in arguments):
            raise pickle.UnpicklingError(f"{kind.__name__} of a number")
        return kind(*arguments)

    return make


_NDARRAY = object()  # stands for numpy.ndarray, which pickles name and do not call
_PLAIN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _NDARRAY,
}
# Files written by numpy 1 say numpy.core, those by numpy 2 numpy._core; Python 2 says __builtin__.
for _core in ("numpy.core", "numpy._core"):
    _PLAIN[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _PLAIN[f"{_core}.multiarray", "scalar"] = _scalar
    _PLAIN[f"{_core}.numeric", "_frombuffer"] = vars(numeric)["_frombuffer"]
for _builtins in ("builtins", "__builtin__"):
    for _container in (dict, list, tuple, set, frozenset, complex):
        _PLAIN[_builtins, _container.__name__] = _container
    for _bytes in (bytes, bytearray):
        _PLAIN[_builtins, _bytes.__name__] = _byte_string(_bytes)


class _Counted:
    def __init__(self, source: Source):
        self._source, self._left = source, MAX_READS

    def read(self, size: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError("it holds more objects than a checkpoint has")
        return self._source.read(size)

    def readline(self) -> bytes:
        return self._source.readline()


class _InertUnpickler(_RestrictedUnpickler):
    def __init__(self, source: _Counted, admitted: Admitted, load_persistent: Callable[[Any], Any]):
        super().__init__(source, encoding="utf-8")  # of Python 2's text, as torch reads it
        self._admitted, self.persistent_load = admitted, load_persistent
        self.not_read: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._admitted:
            return self._admitted[module, name]
        self.not_read.add(f"{module}.{name}"[:100])
        return Inert()

    def load_build(self) -> None:
        self.stack.pop()  # a state, of any object

    def load_newobj(self) -> None:
        del self.stack[-2:]
        self.append(Inert())

    def load_newobj_ex(self) -> None:
        del self.stack[-3:]
        self.append(Inert())

    def load_empty_set(self) -> None:
        self.append(Inert())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert())

    def load_additems(self) -> None:
        self.pop_mark()

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitem(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if is_plain_key(key))
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError("items of no dictionary")
