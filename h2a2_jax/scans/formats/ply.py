"""Vertices of PLY files: ascii, and binary of either byte order."""

import io
import itertools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from plyfile import PlyData, PlyHeaderParseError, PlyListProperty, PlyParseError

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import Thinning

_LONGEST_HEADER = 1 << 20
_COUNT = re.compile(r"^(element \S+ )([+-]?\d+)$", re.MULTILINE)


def read_ply_columns(
    path: Path, thinning: Thinning | None = None, *, complete: bool = False
) -> Mapping[str, np.ndarray]:
    """Read the properties of the vertices, one array of a number per vertex each; lists are left out.

    `thinning` chooses the vertices; a binary file with lists in its vertices or before them is parsed as a whole
    first. With `complete`, a file that ends before the elements behind the vertices, such as faces, can is refused.
    """
    thinning = thinning or Thinning()
    with path.open("rb") as file:
        header, counts = _read_header(path, file)
        elements = list(zip(header.elements, counts, strict=True))
        names = [element.name for element in header.elements]
        if "vertex" not in names:
            raise InputError(f"{path} is a PLY file without vertices; expected an element vertex with x, y, z.")
        place = names.index("vertex")
        left = path.stat().st_size - file.tell()
        for element, count in elements if complete else elements[: place + 1]:
            left -= _check_size(path, element, count, left, header.text, entries=3 if complete else 0)
        vertex, count = elements[place]
        has_lists = [any(isinstance(p, PlyListProperty) for p in element.properties) for element in header.elements]
        if has_lists[place] or (any(has_lists[:place]) and not header.text):
            return _read_with_lists(path, header, thinning)
        for element, rows in elements[:place]:
            if header.text:
                next(itertools.islice(file, rows, rows), None)  # skips as many lines
            else:
                file.seek(rows * element.dtype().itemsize, io.SEEK_CUR)
        if header.text:
            return _read_text(path, file, vertex, count, thinning)
        dtype = vertex.dtype(header.byte_order)
        table = thinning.read(file, dtype, count if dtype.itemsize else 0)
        return {name: table[name] for name in dtype.names or ()}


def _read_header(path: Path, file: BinaryIO) -> tuple[PlyData, list[int]]:
    """Parse the header: elements without content, and the number of rows of each. The file is left at its end."""
    if file.readline(16).strip() != b"ply":
        raise InputError(f"{path} is no PLY file: its first line is not 'ply'; export it again.")
    lines = ["ply"]
    while lines[-1] != "end_header":
        line = file.readline(4096)
        if not line or file.tell() > _LONGEST_HEADER:
            raise InputError(f"{path} is cut off: its PLY header has no end_header; copy it again.")
        if line.strip():
            lines.append(" ".join(line.decode("latin1").split()))
    text = "\n".join([*lines, ""])
    counts = [int(found[2]) for found in _COUNT.finditer(text)]
    # Plyfile allocates whatever a header asks for and reads all elements: it gets the header alone, with counts of 0.
    # It takes ASCII only, but comments may be in any encoding.
    empty = _COUNT.sub(r"\g<1>0", text).encode("ascii", "replace")
    try:
        header = PlyData.read(io.BytesIO(empty))
    except PlyHeaderParseError as error:
        raise InputError(
            f"{path} has the PLY header line {lines[error.line - 1]!r}, not understood ({error.message}); expected is "
            "PLY 1.0 in the format ascii, binary_little_endian or binary_big_endian: export it again."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} has a PLY header that names {error}: export it again.") from error
    return header, counts


def _check_size(path: Path, element: Any, count: int, left: int, is_text: bool, entries: int) -> int:
    """Refuse more rows than the `left` bytes hold; return the least bytes of the element, its lists of `entries`."""
    if count < 0:
        raise InputError(f"{path} says it has {count} {element.name} elements; write it again.")
    width = 0
    for item in element.properties:
        kinds = [item.dtype()]
        if isinstance(item, PlyListProperty):
            length, value = item.list_dtype()
            kinds = [length, *[value] * entries]
        # Of text, every number takes a digit and a separator, but for the last one of the file.
        width += 2 * len(kinds) if is_text else sum(np.dtype(kind).itemsize for kind in kinds)
    least = width * count - is_text
    if least > left:
        raise InputError(
            f"{path} is cut off: its header says {count} {element.name} elements of {width} bytes"
            f"{' at least' if is_text or entries else ''}, but {max(left, 0)} bytes follow; copy it again."
        )
    return max(least, 0)


def _read_text(path: Path, file: BinaryIO, vertex: Any, count: int, thinning: Thinning) -> Mapping[str, np.ndarray]:
    # By NumPy, not by plyfile: it takes a tenth of the time and leaves lines out while it reads.
    names = [item.name for item in vertex.properties]
    if not count or not names:
        return {name: np.zeros(0) for name in names}
    try:
        # ndmin keeps a single row a row; lines() stops loadtxt from reading on into the faces.
        rows = np.loadtxt(thinning.lines(file, count), np.float64, comments=None, ndmin=2, encoding="latin1")
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} has a vertex that is not {len(names)} numbers ({error}).") from error
    if rows.shape != (thinning.kept(count), len(names)):
        raise InputError(
            f"{path} is cut off: its header says {count} vertex elements of {len(names)} numbers, read were "
            f"{len(rows)} of {rows.shape[1] if len(rows) else 0}; copy it again."
        )
    return {item.name: to_type(path, item.name, rows[:, i], item.dtype()) for i, item in enumerate(vertex.properties)}


def _read_with_lists(path: Path, header: PlyData, thinning: Thinning) -> Mapping[str, np.ndarray]:
    # Lists of three, as of triangles, are memory-mapped, a hundred times faster than lists of any length.
    triangles = {
        element.name: {item.name: 3 for item in element.properties if isinstance(item, PlyListProperty)}
        for element in header.elements
        if element.name != "vertex"
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # of a list without entries
            try:
                rows = PlyData.read(str(path), known_list_len=triangles)["vertex"].data
            except PlyParseError as error:
                if "unexpected list length" not in str(error):
                    raise
                rows = PlyData.read(str(path))["vertex"].data
    except (PlyParseError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} has lists before the end of its vertices and cannot be read ({error}): copy it again, or write "
            "it with vertices first."
        ) from error
    chosen = thinning.rows(len(rows))
    plain = [name for name in rows.dtype.names if rows.dtype[name].kind in "iuf"]
    return {name: np.array(rows[name] if chosen is None else rows[name][chosen]) for name in plain}


def to_type(path: Path, name: str, values: np.ndarray, kind: str | np.dtype) -> np.ndarray:
    """Convert float64 numbers read from text to the numpy type that the header gives them, if it can hold them."""
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # to infinity, which is left out later
            return values.astype(dtype)
    bounds = np.iinfo(dtype)
    if not ((values >= bounds.min) & (values <= bounds.max)).all():
        raise InputError(f"{path} has numbers that its field {name} of type {dtype} cannot hold; write it again.")
    return values.astype(dtype)
