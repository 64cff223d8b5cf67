"""Pickles read without running anything that they name.

A pickle is a program: it names functions and gives their arguments. Two readers admit a handful of names each, all of
which stand for code of this package. `load_plain_pickle` reads plain data and refuses a file that names anything else.
`load_inert_pickle` passes other names over: each becomes an `Inert`, which takes any arguments, contents and state and
keeps nothing.

Plain data can still be made to harm: a few bytes refer to one object a million times, or nest it a thousand times. So
what steps may take is counted while a pickle is read (`_Unpickler._spend`), keys are of kinds that are hashed in no
time, and an object of plain data is looked over before it is handed on (`_check_extent`).
"""

import codecs
import io
import math
import mmap
import os
import pickle
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.untrusted import check_regular, check_room
from h2a2_jax.untrusted.arrays import check_letters

MAX_READS = 2_000_000
"""Reads of a pickle with unknown names, some four an object; detectors with optimiser and history take a twentieth.
The limit bounds the memory that a file made of nothing but small objects can take to some 150 MB."""

_READ_BYTES, _STEP_BYTES, _SET_BYTES = 16, 64, 256
"""Memory that is counted for a read, for a step that makes a container or remembers an object, and for a set."""

_ROOM, _GROWTH = 32 << 20, 32
"""Memory that the objects of a plain pickle may take: a base, and a multiple of the file. Annotations of rooms, nearly
all numbers and short names in lists and dictionaries, take some 10 times their file."""

_DEEPEST = 100
"""Deepest nesting of plain data: comparing and printing go down by recursion."""

_LONGEST_NUMBER, _LONGEST_TYPE = 255, 32
"""Longest whole number (bytes) and longest name of a numpy type."""

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
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            check_room(2 * size, "it")
            room = _ROOM + _GROWTH * size
            found = _PlainUnpickler(file, size, room).load()
            _check_extent(found, room)
            return found
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the folder and the file name.") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}; check the file and its permissions."
        ) from error
    except NotAdmittedError as error:
        raise InputError(
            f"{path} holds {quoted(error)}, which is not plain data: only numpy arrays and Python's own containers "
            "are loaded; write the file again without it."
        ) from None
    except (MemoryError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} asks for more memory than there is: write or download it again.") from error
    except Exception as error:  # a damaged pickle raises anything; none of its code has run
        what = "it ends too early" if isinstance(error, EOFError) else f"{type(error).__name__}: {quoted(error)}"
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
    """Return True if a key is hashed in no time, and unlike others; a tuple of tuples of tuples is not.

    Nor are long whole numbers: all multiples of one of 61 bits have the same hash, and are compared with one another.
    """
    if isinstance(key, int):
        return key.bit_length() < 64
    return key is None or isinstance(key, str | bytes | float | np.number)


# The one in Python: its steps can be replaced, and a few damaged bytes do not make it fill the memory.
_Unpickler: Any = pickle._Unpickler


class _RestrictedUnpickler(_Unpickler):
    def __init__(self, source: Any, room: int, **options: Any):
        super().__init__(source, **options)
        self._room = room

    def _spend(self, size: int) -> None:
        """Count memory that a step takes beside what it reads."""
        self._room -= size
        if self._room < 0:
            raise pickle.UnpicklingError("its objects take far more memory than the file has bytes")

    def load_reduce(self) -> None:
        # What is called copies its arguments, of which a file may refer to the same ones again and again.
        arguments = self.stack[-1]
        self._spend(sum(_flat_size(each) for each in arguments) if isinstance(arguments, tuple) else 0)
        super().load_reduce()

    def load_long4(self) -> None:
        # The time to hash, print or multiply a number grows with its digits.
        (size,) = struct.unpack("<i", self.read(4))
        if not 0 <= size <= _LONGEST_NUMBER:
            raise pickle.UnpicklingError(f"a number of {size} bytes")
        self.append(pickle.decode_long(self.read(size)))

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
    def __init__(self, file: Any, size: int, room: int):
        super().__init__(_Bounded(file, size, self._spend), room)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise NotAdmittedError(f"{module}.{name}")
        return _PLAIN[module, name]

    def load_mark(self) -> None:
        self._spend(_STEP_BYTES)
        super().load_mark()

    def load_memoize(self) -> None:
        self._spend(_STEP_BYTES)
        super().load_memoize()

    def load_empty_list(self) -> None:
        self._spend(_STEP_BYTES)
        self.append([])

    def load_empty_dictionary(self) -> None:
        self._spend(_STEP_BYTES)
        self.append({})

    def load_build(self) -> None:
        instance, state = self.stack[-2], self.stack[-1]
        _check_state(instance, state)
        if isinstance(instance, np.dtype):
            self.stack.pop()  # the type is already what its state says
            return
        self._spend(len(state[-1]) * (8 if isinstance(state[-1], list) else 1))
        super().load_build()
        check_letters(instance)

    def load_empty_set(self) -> None:
        self._spend(_SET_BYTES)
        self.append(set())

    def load_frozenset(self) -> None:
        members = self.pop_mark()
        self.append(frozenset(_checked_keys(members)))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._target(set).update(_checked_keys(items))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(dict(zip(_checked_keys(items[::2]), items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _checked_keys([key])
        self._target(dict)[key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._target(dict).update(zip(_checked_keys(items[::2]), items[1::2], strict=True))

    def load_append(self) -> None:
        value = self.stack.pop()
        self._target(list).append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._target(list).extend(items)

    def _target(self, kind: type) -> Any:
        """Return the container to fill; items of an array or of bytes would be written over what others refer to."""
        if type(self.stack[-1]) is not kind:
            raise pickle.UnpicklingError(f"items of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]


def _checked_keys(keys: Iterable[Any]) -> list[Any]:
    """Return the keys of a dictionary or the members of a set, if they are hashed in no time."""
    listed = list(keys)
    for key in listed:
        if not is_plain_key(key):
            raise pickle.UnpicklingError(
                f"a {type(key).__name__} as a key of a dictionary or a member of a set, which text and numbers below "
                "2^63 can be"
            )
    return listed


def _flat_size(value: Any) -> int:
    """Memory (bytes) of a copy of a container, an array or a text, without what it refers to."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    return _STEP_BYTES * len(value) if isinstance(value, list | tuple | set | frozenset | dict) else 0


def _check_extent(root: Any, room: int) -> None:
    """Refuse plain data that is nested deeply, holds itself, or fills memory where it is written out or stacked.

    What is referred to in several places counts in each of them, as in a copy of nested lists as an array.
    """
    extents: dict[int, tuple[int, int]] = {}  # of a container by its id: bytes with all that it holds, and depth
    above = set[int]()  # ids of the containers around the one that is looked at, and its own
    waiting = [root]
    while waiting:
        value = waiting[-1]
        if id(value) in extents:
            waiting.pop()
            continue
        parts = _parts(value)
        inner = [part for part in parts if isinstance(part, _CONTAINERS) and id(part) not in extents]
        if inner:
            above.add(id(value))
            if not above.isdisjoint(map(id, inner)):
                raise pickle.UnpicklingError("an object that holds itself")
            waiting += inner
            continue
        extent, depth = 16 + 8 * len(parts), 0
        for part in parts:
            size, levels = extents[id(part)] if isinstance(part, _CONTAINERS) else (_flat_size(part), 0)
            extent, depth = extent + size, max(depth, levels)
        if depth >= _DEEPEST:
            raise pickle.UnpicklingError("objects nested more than a hundred times")
        if extent > room:
            raise pickle.UnpicklingError("one object in very many places")
        extents[id(value)] = extent, depth + 1
        above.discard(id(value))


def _parts(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, _CONTAINERS) else ()


_CONTAINERS = (list, tuple, dict, set, frozenset)


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
                good = good and (dtype.itemsize > 0 or math.prod(shape) == 0)
                # Arrays in arrays are freed by recursion, and could hold themselves.
                good = good and (isinstance(content, bytes) or all(map(_is_scalar, content)))
    if not good:
        raise pickle.UnpicklingError(f"the state of a {type(instance).__name__}")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bytes | int | float | complex | np.generic)


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
    dtype = np.dtype(text) if isinstance(text, str) and len(text) < _LONGEST_TYPE else None
    if dtype is None or dtype.kind not in "biufcSUO" or dtype.subdtype is not None:
        raise pickle.UnpicklingError(f"the type {text!r}")
    return dtype


def _scalar(dtype: Any, content: Any) -> Any:
    """Stand for numpy's scalar from bytes."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(content, bytes):
        raise pickle.UnpicklingError("a scalar of objects")
    made = np.frombuffer(content, dtype, 1)
    check_letters(made)
    return made[0]


def _byte_string(kind: type) -> Any:
    """Stand for bytes or bytearray, which make as many zeros as a number says."""

    def make(*arguments: Any) -> Any:
        if any(isinstance(argument, int) for argument in arguments):
            raise pickle.UnpicklingError(f"{kind.__name__} of a number")
        return kind(*arguments)

    return make


def _plain_set(kind: type) -> Any:
    """Stand for set or frozenset."""

    def make(*arguments: Any) -> Any:
        (members,) = arguments or ((),)
        return kind(_checked_keys(members))

    return make


def _plain_dict(*arguments: Any) -> dict[Any, Any]:
    """Stand for dict of pairs or of another one."""
    (given,) = arguments or ((),)
    pairs = list(given.items() if isinstance(given, dict) else given)
    _checked_keys(key for key, _ in pairs)
    return dict(pairs)


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Stand for numpy's, of protocol 5: a view of bytes, which nobody can free."""
    if not isinstance(buffer, bytes | bytearray) or not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise pickle.UnpicklingError("an array of something else than bytes")
    array = np.frombuffer(buffer, dtype).reshape(shape, order=order)
    check_letters(array)
    return array


def _sequence(kind: type) -> Any:
    """Stand for list, tuple or complex, which are called as functions and not made in another way."""

    def make(*arguments: Any) -> Any:
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
    _PLAIN[f"{_core}.numeric", "_frombuffer"] = _from_buffer
for _builtins in ("builtins", "__builtin__"):
    _PLAIN[_builtins, "dict"] = _plain_dict
    for _container in (list, tuple, complex):
        _PLAIN[_builtins, _container.__name__] = _sequence(_container)
    for _set in (set, frozenset):
        _PLAIN[_builtins, _set.__name__] = _plain_set(_set)
    for _bytes in (bytes, bytearray):
        _PLAIN[_builtins, _bytes.__name__] = _byte_string(_bytes)


class _Bounded:
    """A file of a size of which no more is asked than it has: Python would make room for any length first."""

    def __init__(self, file: Any, size: int, spend: Callable[[int], None]):
        self._file, self._left, self._spend = file, size, spend

    def read(self, size: int) -> bytes:
        self._spend(_READ_BYTES)
        found = self._file.read(min(size, self._left))
        self._left -= len(found)
        return found

    def readline(self) -> bytes:
        self._spend(_READ_BYTES)
        found = self._file.readline()
        self._left -= len(found)
        return found


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
        super().__init__(source, MAX_READS * _STEP_BYTES, encoding="utf-8")  # of Python 2's text, as torch reads it
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
