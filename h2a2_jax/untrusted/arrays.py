"""Archives of numpy (.npz) and arrays in its format, of unknown origin: the sizes are checked before they are taken."""

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2a2_jax.errors import quoted
from h2a2_jax.untrusted import check_growth, check_regular

LONGEST_HEADER = 10_000
"""Longest header of an array (bytes), numpy's own limit."""

_LARGEST_DIRECTORY = 4 << 20  # bytes, some 50,000 members
_SHORTEST_ENTRY = 30  # bytes of the header of a member


class NotAnArray(ValueError):
    """Bytes are no array in numpy's format, or no archive of such; the message is a part of a sentence."""


class ArrayHeader(NamedTuple):
    """Header of an array: its shape, True if its columns lie one behind the other, and its type."""

    shape: tuple[Any, ...]
    is_fortran: bool
    dtype: np.dtype

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return self.entries * self.dtype.itemsize


def read_header(file: Any) -> ArrayHeader:
    """Read the header of an array, of version 1 or 2 of the format; the file is left behind it.

    Raises:
        NotAnArray: it is damaged, or of an array of objects.
    """
    start = file.read(8)
    if start not in (b"\x93NUMPY\1\0", b"\x93NUMPY\2\0"):
        raise NotAnArray("it does not begin as one")
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    text = file.read(min(length, LONGEST_HEADER))
    # Python's parser can crash on bytes that are no text.
    if len(text) < length or not all(32 <= byte < 127 or byte == 10 for byte in text):
        raise NotAnArray("its header is damaged")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = np.lib.format.read_array_header_2_0(io.BytesIO(struct.pack("<I", length) + text))
    except Exception as error:  # of many kinds
        raise NotAnArray(f"its header is damaged: {quoted(error, 100)}") from error
    shape, is_fortran, dtype = found
    if dtype.hasobject:
        raise NotAnArray("it holds Python objects, which are never loaded")
    header = ArrayHeader(tuple(map(int, shape)), is_fortran, dtype)
    if any(length < 0 for length in header.shape):
        raise NotAnArray(f"its header states the shape {quoted(header.shape, 60)}")
    return header


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive made to be larger than it looks: members of one name, or members that share bytes.

    Args:
        archive: the archive, whose directory is read.
        size: size of its file (bytes).

    Raises:
        BadZipFile: it is one.
    """
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if info.header_offset < end or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile("its members overlap, or are packed in another way than numpy packs them")
        end = info.header_offset + _SHORTEST_ENTRY + len(info.filename) + info.compress_size
    if end > size:
        raise zipfile.BadZipFile("its members are larger than the file")
    if len({info.filename for info in archive.infolist()}) < len(archive.infolist()):
        raise zipfile.BadZipFile("it has two members of one name")


def check_directory(file: Any) -> None:
    """Refuse an archive with more members than a file of arrays has, before all of them are listed.

    Raises:
        BadZipFile: it has more, or is no archive.
    """
    end = vars(zipfile)["_EndRecData"](file)
    if not end:
        raise zipfile.BadZipFile("File is not a zip file")
    if end[5] > _LARGEST_DIRECTORY:
        raise zipfile.BadZipFile(f"its directory has {end[5]:,} bytes")
    file.seek(0)


def load_arrays(path: str | Path, content: bytes | None = None) -> Mapping[str, np.ndarray]:
    """Read all arrays of an .npz file, as `numpy.load` does.

    Args:
        path: the file.
        content: what stands in for its content; None: the file is read.

    Raises:
        OSError: it cannot be read, or takes more memory than is free (`check_growth`).
        NotAnArray: it is no archive of arrays, or a damaged one.
    """
    if content is not None:
        return _load(io.BytesIO(content), len(content))
    check_regular(path)
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        return _load(file, size)


def _load(file: Any, size: int) -> Mapping[str, np.ndarray]:
    try:
        check_directory(file)
        with zipfile.ZipFile(file) as archive:
            check_archive(archive, size)
            members = archive.infolist()
            check_growth(size, sum(info.file_size for info in members), "its content")
            return {info.filename.removesuffix(".npy"): _member(archive, info) for info in members}
    except NotAnArray:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        raise NotAnArray(quoted(error)) from error  # of kinds by which zipfile and zlib tell of damage


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        header = read_header(file)
        if header.size > info.file_size or (header.dtype.itemsize == 0 and header.entries):
            raise NotAnArray(f"{quoted(info.filename, 60)} is cut off")
        content = bytearray(file.read(header.size))
        if len(content) < header.size:
            raise NotAnArray(f"{quoted(info.filename, 60)} is cut off")
    flat = np.frombuffer(content, header.dtype) if header.size else np.zeros(header.entries, header.dtype)
    check_letters(flat)
    return flat.reshape(header.shape, order="F" if header.is_fortran else "C")


def check_letters(array: np.ndarray) -> None:
    """Refuse an array of text with numbers that no letter has: using such an element ends in a SystemError.

    Raises:
        NotAnArray: it has one.
    """
    if array.dtype.kind == "U" and array.size:
        letters = np.ascontiguousarray(array).reshape(-1).view(f"{array.dtype.str[0]}u4")
        if letters.max() > 0x10FFFF:
            raise NotAnArray("it has text with letters that there are not")
