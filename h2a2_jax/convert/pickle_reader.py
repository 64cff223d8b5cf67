"""The pickle inside a PyTorch file, read without importing or calling anything that it names.

A pickle is a program: it names functions and gives their arguments. Of those names a handful are known here, and stand
for code of this module: how PyTorch writes a tensor, a parameter, an ordered dictionary. Every other one, what training
frameworks store beside the weights, becomes an `Inert` that takes any arguments, contents and state and keeps nothing.
"""

import io
import math
import mmap
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

MAX_READS = 2_000_000
"""Reads of a pickle, some four an object; detectors with optimiser and history take a twentieth of it. It bounds the
memory that a file made of nothing but small objects can take to some 150 MB."""
MAX_DIMENSIONS = 8

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Storage:
    """Where numbers lie.

    Attributes:
        key: name of the storage in the file.
        dtype: of its numbers.
        numel: how many there are, as the pickle says.
    """

    key: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle tells it: a view of a storage, checked to lie within `numel`.

    Attributes:
        storage: its numbers.
        offset: of the first one.
        shape: of the tensor.
        strides: in numbers, along each dimension.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Stands for what is not read: whatever is done to it leaves no trace."""

    def __call__(self, *_: Any) -> "Inert":
        """Itself, for no call has an effect."""
        return self

    def append(self, _: Any) -> None:
        """Nothing."""

    def extend(self, _: Any) -> None:
        """Nothing."""


Source = io.BytesIO | mmap.mmap
"""What a pickle is read from: content in memory or mapped to it, which gives no more than there is, whatever a length
in it says."""


def load_inert(source: Source) -> tuple[Any, set[str]]:
    """Reads one pickle.

    Args:
        source: where it begins; left where it ends.

    Returns:
        The object, of builtin containers, numbers, text, `StoredTensor` and `Inert`; and the names that were not read.

    Raises:
        pickle.UnpicklingError: it is no pickle, or holds what no PyTorch file does.
        Exception: anything else that a damaged pickle leads to; none of its code has run.
    """
    unpickler = _InertUnpickler(_Counted(source))
    return unpickler.load(), unpickler.not_read


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


def _is_count(value: Any) -> bool:
    # A product of numbers of a million digits takes minutes.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """Stands for torch._utils._rebuild_tensor_v2."""
    good = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    good = good and len(shape) == len(strides) <= MAX_DIMENSIONS and all(map(_is_count, (offset, *shape, *strides)))
    if not good:
        raise pickle.UnpicklingError("a tensor without storage, shape or strides")
    # As many numbers as the storage has, at most: a stride of zero could claim any number.
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.numel or (math.prod(shape) and last >= storage.numel):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} in a storage of {storage.numel} numbers")
    return StoredTensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter."""
    return tensor


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    """Stands for collections.OrderedDict; dicts keep their order too."""
    if not arguments:
        return {}
    (pairs,) = arguments
    return {key: value for key, value in pairs if _is_key(key)}


def _is_key(key: Any) -> bool:
    """Whether a key is hashed in no time; a tuple of tuples of tuples is not."""
    return key is None or isinstance(key, str | int | float)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    **{(module, name): dtype for module in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()},
}

_Unpickler: Any = pickle._Unpickler


class _InertUnpickler(_Unpickler):
    # The one in Python: its steps can be replaced, and a few damaged bytes do not make it fill the memory.
    dispatch: ClassVar[dict[int, Callable]] = dict(_Unpickler.dispatch)

    def __init__(self, source: _Counted):
        # Python 2's text, as torch reads it.
        super().__init__(source, encoding="utf-8")
        self.not_read: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        self.not_read.add(f"{module}.{name}"[:100])
        return Inert()

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"the extension {code}")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str() as key, _, int() as numel, *more) if _is_count(numel):
                if not any(more):
                    return Storage(key, dtype, numel)
        raise pickle.UnpicklingError("a storage of an unknown kind")

    def load_build(self) -> None:
        self.stack.pop()  # the state of whatever it is

    def load_newobj(self) -> None:
        del self.stack[-2:]
        self.append(Inert())

    def load_newobj_ex(self) -> None:
        del self.stack[-3:]
        self.append(Inert())

    def load_frame(self) -> None:
        # Frames are hints for buffering; the original would take what is in one without its being counted.
        self.read(8)

    def load_bytearray8(self) -> None:
        # What is there; the original makes as many zeros first as a number says.
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def load_set(self) -> None:
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
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if _is_key(key):
                    target[key] = value
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError("items of no dictionary")

    for _opcode, _load in (
        (pickle.BUILD, load_build),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.FRAME, load_frame),
        (pickle.BYTEARRAY8, load_bytearray8),
        (pickle.EMPTY_SET, load_set),
        (pickle.FROZENSET, load_frozenset),
        (pickle.ADDITEMS, load_additems),
        (pickle.DICT, load_dict),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
    ):
        dispatch[_opcode[0]] = _load
