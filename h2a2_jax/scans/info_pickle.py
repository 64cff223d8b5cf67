"""Reading pickles that hold plain data, without running what else a pickle can hold."""

import codecs
import io
import math
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy._core import multiarray, numeric

from h2a2_jax.errors import InputError


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `_codecs.encode`, which old pickle protocols use to write bytes; no other codec is run."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return codecs.latin_1_encode(text)[0]


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> Any:
    """Stands for numpy's, which allocates any shape; a pickle gives an empty one and sets the state afterwards."""
    if kind is not _NDARRAY or shape != (0,) or dtype not in (b"b", "b"):
        raise pickle.UnpicklingError(f"an array of shape {shape} before its content")
    return multiarray._reconstruct(np.ndarray, (0,), b"b")


def _dtype(text: Any, *_: Any) -> np.dtype:
    """Stands for numpy.dtype: one of numbers, text or objects, not of records."""
    dtype = np.dtype(text) if isinstance(text, str) else None
    if dtype is None or dtype.kind not in "biufcSUO" or dtype.subdtype is not None:
        raise pickle.UnpicklingError(f"the type {text!r}")
    return dtype


def _scalar(dtype: Any, content: Any) -> Any:
    """Stands for numpy's scalar from bytes."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(content, bytes):
        raise pickle.UnpicklingError("a scalar of objects")
    return multiarray.scalar(dtype, content)


def _sequence(kind: type) -> Any:
    """Stands for bytes or bytearray, which make as many zeros as a number says."""

    def make(*arguments: Any) -> Any:
        if any(isinstance(argument, int) for argument in arguments):
            raise pickle.UnpicklingError(f"{kind.__name__} of a number")
        return kind(*arguments)

    return make


class _Marker:
    """Stands for numpy.ndarray, which pickles name and do not call."""


_NDARRAY = _Marker()
_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _NDARRAY,
}
# Files written by numpy 1 say numpy.core, those by numpy 2 numpy._core.
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[f"{_core}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = vars(numeric)["_frombuffer"]
for _builtins in ("builtins", "__builtin__"):
    for _container in (dict, list, tuple, set, frozenset, complex):
        _ADMITTED[_builtins, _container.__name__] = _container
    for _bytes in (bytes, bytearray):
        _ADMITTED[_builtins, _bytes.__name__] = _sequence(_bytes)


class _NotAdmitted(Exception):
    pass


def _check_state(instance: Any, state: Any) -> None:
    """Refuses what numpy would take for the state of a type or an array and crash on."""
    match instance, state:
        case np.dtype(), (
            3,
            "<" | "|" | "=",
            None,
            None,
            None,
            int() as size,
            int() as alignment,
            int() as flags,
        ):
            good = size in (-1, instance.itemsize) and alignment in (-1, instance.alignment) and flags == instance.flags
        case np.ndarray(), (int(), tuple() as shape, np.dtype() as dtype, bool() | int(), bytes() | list() as content):
            good = all(isinstance(length, int) and length >= 0 for length in shape)
            size = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize) if good else -1
            good = size == len(content) and dtype.hasobject == isinstance(content, list)
        case _:
            good = False
    if not good:
        raise pickle.UnpicklingError(f"the state of a {type(instance).__name__}")


_Unpickler: Any = pickle._Unpickler


class _PlainUnpickler(_Unpickler):
    # The one in Python: that in C can be made to fill the memory by a few damaged bytes, and checks no states.
    dispatch: ClassVar = dict(_Unpickler.dispatch)

    def load_build(self) -> None:
        _check_state(self.stack[-2], self.stack[-1])
        if isinstance(self.stack[-2], np.dtype):
            self.stack.pop()  # the type is already what its state says
        else:
            super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        """Takes what is there; the original makes as many zeros first as a number says."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _NotAdmitted(f"{module}.{name}") from None


def load_plain_pickle(path: Path) -> Any:
    """Loads a pickle of builtin containers, numbers, strings and numpy arrays.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        InputError: the file is missing, is no complete pickle, or names any other class or function
            (which could run arbitrary code).
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}: check the folder and the file name.")
    try:
        # Of bytes in memory no more can be read than are there, whatever a length in them says.
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return _PlainUnpickler(content).load()
    except _NotAdmitted as error:
        raise InputError(
            f"{path} holds {error}, which is not plain data: only numpy arrays and Python's own containers "
            "are loaded; write the file again without it."
        ) from None
    except (MemoryError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} asks for more memory than there is: write or download it again.") from error
    except Exception as error:  # what a damaged pickle does is anything; nothing of it is run
        raise InputError(f"{path} is not a readable pickle ({error}): write or download it again.") from error
