"""Reading MATLAB files of version 5 with SciPy, which trusts them, after checking that they are intact."""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from h2a2_jax.errors import InputError
from h2a2_jax.scans.raw.raw_files import shown

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_INT8, _INT32, _UINT32 = 1, 5, 6
_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}  # bytes of a number by type
_TEXT = (16, 17, 18)
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC = range(6, 16)
_COMPLEX = 0x800


def load_mat(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """Reads variables of a MATLAB file.

    Args:
        path: the file.
        names: the variables.

    Returns:
        Their values in that order, structs and cells as SciPy nests them.

    Raises:
        InputError: the file is damaged, of another version, or lacks a variable.
    """
    try:
        content = path.read_bytes()
        if content[:10] == b"MATLAB 7.3":
            raise InputError(
                f"{shown(path)} is a MATLAB file of version 7.3, but the original has version 5: download it again."
            )
        _check_intact(content)
        variables = loadmat(io.BytesIO(content), variable_names=names)
    except InputError:
        raise
    except Exception as error:  # damaged bytes bring about every kind of exception in SciPy's reader
        reason = " ".join(str(error).split())
        raise InputError(f"{shown(path)} is no readable MATLAB file ({reason}): download it again.") from None
    missing = [name for name in names if name not in variables]
    if missing:
        raise InputError(f"{shown(path)} holds no variable {' and no '.join(missing)}: download it again.")
    return [variables[name] for name in names]


def _check_intact(content: bytes) -> None:
    """Raises ValueError or zlib.error for a damaged file: SciPy's reader ends the process on a few of them."""
    if len(content) < _HEADER or content[126:128] not in (b"IM", b"MI"):
        raise ValueError("its header is not that of version 5")
    order = "<" if content[126:128] == b"IM" else ">"
    for kind, start, end in _elements(content, _HEADER, len(content), order, padded=False):
        if kind == _COMPRESSED:  # has a checksum of its own
            _check_stream(content[start:end])
        elif kind == _MATRIX:
            _check_matrix(content, start, end, order)


def _check_stream(stream: bytes) -> None:
    inflater = zlib.decompressobj()
    while stream and not inflater.eof:
        inflater.decompress(stream, 1 << 24)
        stream = inflater.unconsumed_tail
    inflater.flush()  # what the limit of the last call kept back
    if not inflater.eof:
        raise ValueError("it is cut off")


def _elements(content: bytes, start: int, end: int, order: str, padded: bool) -> Iterator[tuple[int, int, int]]:
    """Type, start and end of the data of each element."""
    tag = struct.Struct(f"{order}II")
    while start < end:
        if start + 8 > end:
            raise ValueError("it is cut off")
        kind, size = tag.unpack_from(content, start)
        small = kind >> 16  # then the size is here and the data takes the place of the size
        if small:
            kind, size = kind & 0xFFFF, small
        first = start + (4 if small else 8)
        if first + size > (start + 8 if small else end):
            raise ValueError("it is cut off")
        yield kind, first, first + size
        start = start + 8 if small else first + size + (-size % 8 if padded else 0)


def _check_matrix(content: bytes, start: int, end: int, order: str) -> None:
    """Raises ValueError unless an array has the elements that its class and its sizes ask for."""
    if start == end:
        return
    parts = list(_elements(content, start, end, order, padded=True))
    kinds = [kind for kind, _, _ in parts]
    if kinds[:3] != [_UINT32, _INT32, _INT8] or parts[0][2] - parts[0][1] != 8:
        raise ValueError("an array has no header")

    def integers(place: int) -> tuple[int, ...]:
        _, first, last = parts[place]
        return struct.unpack_from(f"{order}{(last - first) // 4}i", content, first)

    flags, sizes = integers(0)[0], integers(1)
    of_class, count = flags & 0xFF, math.prod(sizes)
    if of_class in (_CELL, _STRUCT):
        plain = 3
        if of_class == _STRUCT:
            plain = 5
            if kinds[3:5] != [_INT32, _INT8] or integers(3)[0] < 1:
                raise ValueError("a struct has no fields")
            count *= (parts[4][2] - parts[4][1]) // integers(3)[0]
        whole = len(parts) == plain + count and all(kind == _MATRIX for kind in kinds[plain:])
    elif of_class == _CHAR or of_class in _NUMERIC:
        plain = len(parts)
        data = [(kind, last - first) for kind, first, last in parts[3:]]
        # Text in UTF-8 or UTF-16 may be longer than the number of its characters.
        whole = len(data) == 1 + bool(flags & _COMPLEX) and all(
            size == count * _WIDTHS[kind] if kind in _WIDTHS else kind in _TEXT and of_class == _CHAR
            for kind, size in data
        )
    else:
        raise ValueError(f"an array is of the unknown class {of_class}")
    if not whole or len(sizes) < 2 or min(sizes) < 0:
        raise ValueError("an array holds what its class and sizes do not allow")
    for _, first, last in parts[plain:]:
        _check_matrix(content, first, last, order)
