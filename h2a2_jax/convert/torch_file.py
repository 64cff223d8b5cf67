"""PyTorch files (.pth) without PyTorch: what their tensors hold, read and written; nothing in them is run.

Since PyTorch 1.6 such a file is a zip archive, uncompressed: <name>/data.pkl, a pickle in which tensors refer to
storages, and <name>/data/<key>, each storage's numbers. Before, and as OpenMMLab publishes its models, it is a row of
pickles and behind them the storages. Both are read, the first is written.
"""

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from h2a2_jax.errors import InputError, quoted, reason_of
from h2a2_jax.files import whole_file
from h2a2_jax.untrusted import check_regular, check_room
from h2a2_jax.untrusted.arrays import check_archive, check_directory
from h2a2_jax.untrusted.restricted_pickle import Source, is_plain_key, load_inert_pickle

MAX_PICKLE = 64 * 2**20
"""Largest pickle of an archive that is read (bytes); that of a detector with its optimiser has some 200 kB."""

MAX_DIMENSIONS = 8

_NUMBERS = {"Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
            "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8,
            "Bool": np.bool_}  # fmt: skip
_STORAGES = {f"{name}Storage": np.dtype(number) for name, number in _NUMBERS.items()}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STATE_KEYS = ("state_dict", "model_state_dict", "model")


class _Damaged(Exception):
    pass


@dataclass(frozen=True)
class TorchFile:
    """Model of a file."""

    tensors: dict[str, np.ndarray]  # of the state dict by name, in order; of the type they are stored in
    others: tuple[str, ...]  # names of its entries that are no tensors
    not_read: tuple[str, ...]  # classes and functions that the file names, neither imported nor called
    classes: tuple[str, ...]  # class names that the training framework stored beside it, if any


@dataclass(frozen=True)
class Storage:
    """Numbers behind the pickle, as many as it states."""

    key: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the pickle: a view of a storage, checked to lie within `numel`; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: str | Path) -> TorchFile:
    """Read the state dict of a file, a checkpoint of a training framework or a bare one.

    The memory taken is that of the state dict: of optimisers and the like nothing is read.

    Raises:
        InputError: no such file, one that is not PyTorch's, damaged, or one without a state dict.
    """
    path = Path(path)
    try:
        check_regular(path)
        with open(path, "rb") as file:
            head = file.read(4)
            if head == b"PK\x03\x04":
                check_directory(file)
                return _read_archive(path)
            if head[:2] == b"\x80\x02":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    return _read_legacy(path, content)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: give a checkpoint of PyTorch, such as tr3d.pth.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}; check the file.") from error
    except InputError:
        raise
    except (_Damaged, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged or cut off ({quoted(error)}): download or write it again.") from None
    except (MemoryError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} asks for more memory than a checkpoint needs: download or write it again.") from error
    except Exception as error:  # what a damaged file leads to is anything; nothing of it is run
        raise InputError(
            f"{path} is damaged or cut off ({type(error).__name__}: {quoted(error)}): download or write it again."
        ) from error
    raise InputError(f"{path} is no file of PyTorch: it begins neither as a zip archive nor as a pickle of torch.save.")


def _read_archive(path: Path) -> TorchFile:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, size)
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path} is a zip archive, but not one of torch.save: it holds no data.pkl.")
        folder = pickles[0].removesuffix("data.pkl")

        def record(name: str) -> bytes:
            if name not in records:
                raise _Damaged(f"{name} is missing")
            info = records[name]
            if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size <= size:
                raise _Damaged(f"{name} is compressed or larger than the file")
            return archive.read(info)

        if records[pickles[0]].file_size > MAX_PICKLE:
            raise InputError(f"{path} holds a pickle of more than {MAX_PICKLE >> 20} MB, which no detector needs.")
        content, not_read = _load(io.BytesIO(record(pickles[0])))
        order = record(f"{folder}byteorder") if f"{folder}byteorder" in records else b"little"
        state, classes = _find_state(path, content)
        # Records may overlap in a file made to; what is read of them together may not exceed it.
        keys = {tensor.storage.key for tensor in state.values() if isinstance(tensor, StoredTensor)}
        names = {key: f"{folder}data/{key}" for key in keys}
        used = sum(records[name].file_size for name in names.values() if name in records)
        if used > size:
            raise _Damaged("its storages overlap")
        check_room(used, "its state dict")

        def numbers(storage: Storage) -> np.ndarray:
            content = record(names[storage.key])
            if storage.numel * storage.dtype.itemsize > len(content):
                raise _Damaged(f"a storage of {storage.numel} numbers has {len(content)} bytes")
            dtype = storage.dtype.newbyteorder(">") if order == b"big" else storage.dtype
            return np.frombuffer(content, dtype, storage.numel).astype(storage.dtype, copy=False)

        return _filled(state, numbers, not_read, classes)


def _read_legacy(path: Path, content: mmap.mmap) -> TorchFile:
    magic, _ = _load(content)
    if magic != _LEGACY_MAGIC:
        raise InputError(f"{path} is a pickle, but not one of torch.save: give a checkpoint of PyTorch.")
    protocol, _ = _load(content)
    system, _ = _load(content)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError(f"{path} is of another PyTorch or of a big-endian machine: save it anew with torch.save.")
    checkpoint, not_read = _load(content)
    keys, _ = _load(content)
    state, classes = _find_state(path, checkpoint)
    # The storages lie one behind the other; what each takes is known from its type, which the tensors name.
    dtypes = _storage_dtypes(checkpoint)
    places: dict[str, tuple[int, int]] = {}
    place, end = content.tell(), len(content)
    for key in keys:
        if key not in dtypes or place + 8 > end:
            raise _Damaged("its storages are not those of its tensors")
        (numel,) = struct.unpack_from("<q", content, place)
        places[key] = (place + 8, numel)
        place += 8 + numel * dtypes[key].itemsize
        if numel < 0 or place > end:
            raise _Damaged(f"a storage of {numel} numbers ends behind the file")

    def numbers(storage: Storage) -> np.ndarray:
        if storage.key not in places or storage.numel > places[storage.key][1]:
            raise _Damaged("a storage is missing")
        start = places[storage.key][0]
        return np.frombuffer(content[start : start + storage.numel * storage.dtype.itemsize], storage.dtype)

    return _filled(state, numbers, not_read, classes)


def _load(source: Source) -> tuple[Any, set[str]]:
    """Read one pickle: an object of builtin containers, `StoredTensor` and `Inert`, and the names not read."""
    return load_inert_pickle(source, _KNOWN, _storage)


def _is_count(value: Any) -> bool:
    # A product of numbers of a million digits takes minutes.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _storage(persistent_id: Any) -> Storage:
    match persistent_id:
        case ("storage", np.dtype() as dtype, str() as key, _, int() as numel, *more) if _is_count(numel):
            if not any(more):
                return Storage(key, dtype, numel)
    raise pickle.UnpicklingError("a storage of an unknown kind")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """Stand for torch._utils._rebuild_tensor_v2."""
    good = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not (good and len(shape) == len(strides) <= MAX_DIMENSIONS and all(map(_is_count, (offset, *shape, *strides)))):
        raise pickle.UnpicklingError("a tensor without storage, shape or strides")
    # As many numbers as the storage has, at most: a stride of zero could claim any number.
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.numel or (math.prod(shape) and last >= storage.numel):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} in a storage of {storage.numel} numbers")
    return StoredTensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Stand for torch._utils._rebuild_parameter."""
    return tensor


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    """Stand for collections.OrderedDict; dicts keep their order too."""
    if not arguments:
        return {}
    (pairs,) = arguments
    return {key: value for key, value in pairs if is_plain_key(key)}


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    **{(module, name): dtype for module in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()},
}


def _find_state(path: Path, content: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state dict and the class names of what a file holds."""
    classes: tuple[str, ...] = ()
    if isinstance(content, dict):
        classes = _stored_classes(content.get("meta"))
        inner = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), dict)), content)
        if any(isinstance(value, StoredTensor) for value in inner.values()):
            return {str(key): value for key, value in inner.items()}, classes
    raise InputError(f"{path} holds no state dict: expected tensors by name, or such under 'state_dict'.")


def _stored_classes(meta: Any) -> tuple[str, ...]:
    """Class names as mmengine ("dataset_meta") or mmcv ("CLASSES") store them."""
    meta = meta if isinstance(meta, dict) else {}
    inner = found if isinstance(found := meta.get("dataset_meta"), dict) else {}
    for names in (inner.get("classes") or inner.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(name[:100] for name in names)
    return ()


def _storage_dtypes(content: Any) -> dict[str, np.dtype]:
    """Type of every storage that an object's tensors refer to."""
    found: dict[str, np.dtype] = {}
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            found[value.storage.key] = value.storage.dtype
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found


def _filled(
    state: Mapping[str, Any], numbers: Callable[[Storage], np.ndarray], not_read: set[str], classes: tuple[str, ...]
) -> TorchFile:
    """The state dict with the tensors' numbers: views of the storages, each read once."""
    storages: dict[str, np.ndarray] = {}
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, StoredTensor):
            continue
        storage = tensor.storage
        if storage.key not in storages:
            storages[storage.key] = numbers(storage)
        flat = storages[storage.key]
        if flat.dtype != storage.dtype or len(flat) < storage.numel:
            raise _Damaged(f"two tensors disagree on the storage {storage.key[:50]}")
        strides = [stride * flat.itemsize for stride in tensor.strides]
        start = flat[tensor.offset : tensor.offset + 1] if 0 in tensor.shape else flat[tensor.offset :]
        tensors[name] = np.lib.stride_tricks.as_strided(start, tensor.shape, strides, writeable=False)
    others = tuple(name for name in state if name not in tensors)
    return TorchFile(tensors, others, tuple(sorted(not_read)), classes)


def write_torch_file(
    path: str | Path,
    state: Mapping[str, np.ndarray],
    meta: Mapping[str, Any] | None = None,
    version: int | None = None,
) -> None:
    """Write a checkpoint as torch.save does, {"meta": ..., "state_dict": ...}, in one piece.

    torch.load reads it, with weights_only=True too, and so do mmengine and mmcv.

    Args:
        path: the file; replaced in one piece where it exists.
        state: float32 or int64 arrays by name, in order.
        meta: of text, numbers, lists and dicts.
        version: version of the module that the state is of (`_version` of its class in PyTorch), by which a module may
            take names of its parameters for old ones; None for a state without a version.
    """
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in state.items()}
    with whole_file(Path(path)) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _checkpoint_pickle(arrays, meta or {}, version))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        archive.writestr("archive/version", "3\n")


_WRITTEN = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _checkpoint_pickle(state: Mapping[str, np.ndarray], meta: Mapping[str, Any], version: int | None) -> bytes:
    """A pickle of protocol 2, written by hand: the names in it are of a library that need not be here."""
    parts = [b"\x80\x02}(", _pickled("meta"), _pickled(dict(meta)), _pickled("state_dict"), _ORDERED_DICT, b"("]
    for key, (name, array) in enumerate(state.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        storage = f"ctorch\n{_WRITTEN[array.dtype]}\n".encode()
        parts += [_pickled(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        parts += [_pickled("storage"), storage, _pickled(str(key)), _pickled("cpu"), _pickled(array.size), b"tQ"]
        parts += [_pickled(0), _pickled(array.shape), _pickled(strides), b"\x89", _ORDERED_DICT, b"tR"]
    parts.append(b"u")
    if version is not None:  # an attribute of the ordered dict
        module = b"(" + _pickled("") + _pickled({"version": version}) + b"u"
        parts += [b"}(", _pickled("_metadata"), _ORDERED_DICT, module, b"ub"]
    return b"".join([*parts, b"u."])


def _pickled(value: Any) -> bytes:
    """The operations that make a plain value, without the frame of a pickle and without its memo."""
    match value:
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case int():
            return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else b"\x8a\x08" + struct.pack("<q", value)
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_pickled, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_pickled(key) + _pickled(item) for key, item in value.items()) + b"u"
    raise TypeError(f"meta holds {value!r}; expected text, numbers, lists and dicts.")
