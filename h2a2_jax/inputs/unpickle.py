"""Reading pickles that hold plain data, without running what else a pickle can hold."""

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric

from h2a2_jax.errors import InputError


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `_codecs.encode`, which old pickle protocols use to write bytes; no other codec is run."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return codecs.latin_1_encode(text)[0]


_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
}
# Files written by numpy 1 say numpy.core, those by numpy 2 numpy._core.
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = multiarray._reconstruct
    _ADMITTED[f"{_core}.multiarray", "scalar"] = multiarray.scalar
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = vars(numeric)["_frombuffer"]
for _container in (dict, list, tuple, set, frozenset, bytes, bytearray, complex):
    for _builtins in ("builtins", "__builtin__"):
        _ADMITTED[_builtins, _container.__name__] = _container


class _NotAdmitted(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
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
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except _NotAdmitted as error:
            raise InputError(
                f"{path} holds {error}, which is not plain data: only numpy arrays and Python's own containers "
                "are loaded; write the file again without it."
            ) from None
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is not a readable pickle ({error}): write or download it again.") from error
