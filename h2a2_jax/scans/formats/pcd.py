"""Points of PCD files (Point Cloud Library, version .7 and before): ascii, binary, binary_compressed."""

import math
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud, Thinning
from h2a2_jax.scans.formats.columns import from_columns, to_type, unread_colors

_MOST_LZF_GROWTH = 88  # three bytes stand for at most 264
_LONGEST_HEADER = 1 << 16
_KINDS = ("<f4", "<f8", *(f"<{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)))


class _Header(NamedTuple):
    dtype: np.dtype  # of one point; a field of several numbers is a subarray, which nobody reads
    points: int
    data: str
    remarks: tuple[str, ...]


def read_pcd(path: Path, thinning: Thinning) -> RawCloud:
    """Read the points that `thinning` chooses; compressed data are unpacked as a whole.

    Fields of several numbers are left out; packed colours (rgb, rgba) become three (`columns.unpacked`).
    """
    with path.open("rb") as file:
        header = _read_header(path, file)
        reader = {"ascii": _text_columns, "binary": _binary_columns, "binary_compressed": _compressed_columns}
        columns = reader[header.data](path, file, header, thinning)
    return from_columns(path, columns).remarked(after=header.remarks)


def _read_header(path: Path, file: BinaryIO) -> _Header:
    entries: dict[str, list[str]] = {}
    while "DATA" not in entries:
        line = file.readline(_LONGEST_HEADER)
        if not line or file.tell() > _LONGEST_HEADER:
            raise InputError(f"{path} is no PCD file or is cut off: its header has no line DATA; copy it again.")
        words = line.decode("latin1").split("#")[0].split()
        if words:
            entries[words[0].upper()] = words[1:]
    try:
        fields = entries["COLUMNS" if "COLUMNS" in entries else "FIELDS"]  # the name up to version .5
        sizes = [int(size) for size in entries["SIZE"]]
        types = [kind.upper() for kind in entries["TYPE"]]
        counts = [int(count) for count in entries.get("COUNT", ["1"] * len(fields))]
        if not len(fields) == len(sizes) == len(types) == len(counts):
            raise ValueError("FIELDS, SIZE, TYPE and COUNT differ in length")
        if min(counts, default=1) < 0 or max(counts, default=0) > 1 << 20:
            raise ValueError("a COUNT is out of range")
        width, height = int(entries["WIDTH"][0]), int(entries.get("HEIGHT", ["1"])[0])
        points = int(entries["POINTS"][0]) if "POINTS" in entries else width * height
        if points < 0:
            raise ValueError(f"{points} points")
        # Every field of padding is called _, but the names of a type must differ.
        names = [f"_{i}" if name == "_" or name in fields[:i] else name for i, name in enumerate(fields)]
        kinds = [f"<{kind.lower()}{size}" for kind, size in zip(types, sizes, strict=True)]
        for kind in kinds:
            if kind not in _KINDS:
                raise ValueError(f"a field of type {kind[1].upper()} and size {kind[2:]}")
        shapes = [() if count == 1 else (count,) for count in counts]
        dtype = np.dtype(list(zip(names, kinds, shapes, strict=True)))
        (data,) = entries["DATA"]
        if data.lower() not in ("ascii", "binary", "binary_compressed"):
            raise ValueError(f"DATA {data}")
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} has a PCD header that cannot be understood ({quoted(error)}); write it again."
        ) from error
    turn = " ".join(entries.get("VIEWPOINT", ())[3:])
    # Half turns tell a camera's axes from those of a screen; drivers of depth cameras write them.
    is_turned = turn and not re.fullmatch(r"(-?[01](\.0*)? ?){4}", turn)
    said = [f"has a VIEWPOINT that is turned (by the quaternion {turn}), which is not used"] if is_turned else []
    said += unread_colors(name for name, shape in zip(names, shapes, strict=True) if shape)
    return _Header(dtype, points, data.lower(), tuple(said))


def _cut_off(path: Path, header: _Header, expected: str, left: int) -> InputError:
    return InputError(
        f"{path} is cut off: its header says {quoted(header.points, 30)} points, which take {quoted(expected, 60)}, "
        f"but {left} bytes follow; copy it again."
    )


def _binary_columns(path: Path, file: BinaryIO, header: _Header, thinning: Thinning) -> dict[str, np.ndarray]:
    wanted, left = header.points * header.dtype.itemsize, path.stat().st_size - file.tell()
    if wanted > left:
        raise _cut_off(path, header, f"{wanted} bytes", left)
    rows = thinning.read(file, header.dtype, header.points if header.dtype.itemsize else 0)
    return {name: rows[name] for name in header.dtype.names or () if not header.dtype[name].shape}


def _compressed_columns(path: Path, file: BinaryIO, header: _Header, thinning: Thinning) -> dict[str, np.ndarray]:
    """Read the fields one after the other: they compress better than points."""
    wanted = header.points * header.dtype.itemsize
    sizes = np.frombuffer(file.read(8), "<u4")
    left = path.stat().st_size - file.tell()
    if len(sizes) < 2 or sizes[0] > left:
        expected = f"{sizes[0]} compressed bytes" if len(sizes) == 2 else "8 bytes of sizes and more"
        raise _cut_off(path, header, expected, left)
    if sizes[1] != wanted or wanted > _MOST_LZF_GROWTH * int(sizes[0]):
        raise InputError(
            f"{path} is damaged: its header says {header.points} points of {header.dtype.itemsize} bytes, its data "
            f"claim {sizes[1]} bytes compressed to {sizes[0]}; write it again."
        )
    try:
        content = memoryview(decompress_lzf(file.read(int(sizes[0])), wanted))
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{path} is damaged: its compressed data are not LZF ({quoted(error)}); write it again."
        ) from error
    columns, first = {}, 0
    for name in header.dtype.names or ():
        dtype = header.dtype[name]
        if not dtype.shape:
            columns[name] = thinning.take(np.frombuffer(content, dtype, header.points, first))
        first += header.points * dtype.itemsize
    return columns


def _text_columns(path: Path, file: BinaryIO, header: _Header, thinning: Thinning) -> dict[str, np.ndarray]:
    fields = {name: header.dtype[name] for name in header.dtype.names or ()}
    width = sum(math.prod(field.shape) for field in fields.values())
    left = path.stat().st_size - file.tell()
    if 2 * width * header.points > left + 1:
        raise _cut_off(path, header, f"{width} numbers each", left)
    if not header.points:
        return {name: np.zeros(0, field) for name, field in fields.items() if not field.shape}
    row = np.dtype([(name, "f8", field.shape) for name, field in fields.items()])
    try:
        rows = np.loadtxt(thinning.lines(file, header.points), row, comments=None, ndmin=1, encoding="latin1")
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{path} has a point that is not {width} numbers ({quoted(error)}): write it again."
        ) from error
    if len(rows) != thinning.kept(header.points):
        raise _cut_off(path, header, f"{width} numbers each (read were {len(rows)} rows)", left)
    return {name: to_type(path, name, rows[name], field) for name, field in fields.items() if not field.shape}


def decompress_lzf(content: bytes, size: int) -> bytearray:
    """Undo LZF (Marc Lehmann's liblzf), the compression of PCD files.

    A control byte below 32 is followed by that many literal bytes and one more; a larger one repeats bytes written
    up to 8 KiB before: 3 bits of length, 13 of distance, and one byte more of length if the 3 bits are full.

    Raises:
        ValueError: the content does not make `size` bytes, or repeats bytes that were never written.
        IndexError: the content ends in the middle.
    """
    output = bytearray(size)
    read, written, end = 0, 0, len(content)
    while read < end:
        control = content[read]
        if control < 32:
            length = control + 1
            if written + length > size or read + 1 + length > end:
                raise ValueError("literal bytes beyond the end")
            output[written : written + length] = content[read + 1 : read + 1 + length]
            read += length + 1
        else:
            length = (control >> 5) + 2
            if length == 9:
                read += 1
                length += content[read]
            distance = ((control & 31) << 8) + content[read + 1] + 1
            read += 2
            start = written - distance
            if start < 0 or written + length > size:
                raise ValueError("a repetition of what is not there")
            if distance >= length:
                output[written : written + length] = output[start : start + length]
            else:  # the repeated bytes overlap with the written ones: a pattern
                pattern = output[start:written]
                output[written : written + length] = (pattern * (length // distance + 1))[:length]
        written += length
    if written != size:
        raise ValueError(f"{written} bytes instead of {size}")
    return output
