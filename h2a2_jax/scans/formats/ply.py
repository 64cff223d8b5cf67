"""Elements of PLY files: ascii, and binary of either byte order, with lists in any place.

The header is parsed by plyfile. NumPy reads rows of numbers, and rows whose lists are as long as those of the first, as
of triangles; rows with lists that vary in length are read by plyfile, some three seconds for a million.
"""

import io
import itertools
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from plyfile import PlyData, PlyHeaderParseError, PlyListProperty, PlyParseError, PlyProperty

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import Thinning
from h2a2_jax.scans.formats.columns import to_type

_LONGEST_HEADER = 1 << 20
_FORMATS = {"=": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}
_OTHER_NAMES = ("vertices", "point", "points")  # of the element vertex
_LONG = {"int64": "i8", "uint64": "u8"}  # types that trimesh writes and plyfile does not know


class Element(NamedTuple):
    """An element: its name, number of rows, byte order ("=" for text), properties, and the names of its lists.

    `dtype` is the type of a row without the lists.
    """

    name: str
    rows: int
    order: str
    properties: tuple[PlyProperty, ...]
    lists: list[str]
    dtype: np.dtype


class Header(NamedTuple):
    """Header of a PLY file: its elements in their order, its comments with single blanks, and its size in bytes."""

    elements: list[Element]
    comments: list[str]
    size: int


def read_ply_columns(
    path: Path, thinning: Thinning | None = None, *, complete: bool = False
) -> Mapping[str, np.ndarray]:
    """Read the properties of the vertices, one array of a number per vertex each; lists are left out.

    `thinning` chooses the vertices. Numbers have the types of the header, but x, y, z of a text are float64: a text
    has the digits that it has. With `complete`, a file that ends before the elements behind the vertices, such as
    faces, can is refused.
    """
    header = read_ply_header(path)
    place = find_vertices(header)
    if place is None:
        raise InputError(f"{path} is a PLY file without vertices; expected an element vertex with x, y, z.")
    columns = read_element(path, header, place, thinning or Thinning(), complete=complete)
    return {name: columns[name] for name in header.elements[place].dtype.names or ()}


def find_vertices(header: Header) -> int | None:
    """Return the place of the vertices: the element of that name, or else the only one of a name in its place."""
    names = [element.name.lower() for element in header.elements]
    others = [place for place, name in enumerate(names) if name in _OTHER_NAMES]
    return names.index("vertex") if "vertex" in names else others[0] if len(others) == 1 else None


def read_ply_header(path: Path) -> Header:
    """Parse the header of a file.

    Raises:
        InputError: the file is no PLY file, or a line of its header is not understood.
    """
    with path.open("rb") as file:
        lines, rows, comments = _tidy_lines(path, file)
        size = file.tell()
    try:
        found = PlyData.read(io.BytesIO("\n".join([*lines, ""]).encode()))
    except PlyHeaderParseError as error:
        raise InputError(
            f"{path} has the PLY header line {quoted(repr(lines[error.line - 1]), 100)}, not understood "
            f"({quoted(error.message)}); expected is "
            "PLY 1.0 in the format ascii, binary_little_endian or binary_big_endian: export it again."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} has a PLY header with {quoted(error)}: export it again.") from error
    order, elements = "=" if found.text else found.byte_order, []
    for element, (count, kinds) in zip(found.elements, rows, strict=True):
        lists = [item.name for item in element.properties if isinstance(item, PlyListProperty)]
        numbers = [item for item in element.properties if item.name not in lists]
        dtype = np.dtype([(item.name, order + _LONG.get(kinds[item.name], item.val_dtype)) for item in numbers])
        elements.append(Element(element.name, count, order, element.properties, lists, dtype))
    return Header(elements, comments, size)


def _tidy_lines(path: Path, file: BinaryIO) -> tuple[list[str], list[tuple[int, dict[str, str]]], list[str]]:
    """Read a header as plyfile understands it: ASCII, single blanks, names without blanks, elements without rows.

    Returns:
        lines; the number of rows of each element and the types of its properties by name; comments.
    """
    lines, elements, comments = ["ply"], list[tuple[int, dict[str, str]]](), list[str]()
    if file.readline(16).strip() != b"ply":
        raise InputError(f"{path} is no PLY file: its first line is not 'ply'; export it again.")
    while lines[-1] != "end_header":
        line = file.readline(4096)
        if not line or file.tell() > _LONGEST_HEADER:
            raise InputError(f"{path} is cut off: its PLY header has no end_header; copy it again.")
        words = line.decode("ascii", "backslashreplace").split()
        if not line.endswith(b"\n") and words != ["end_header"]:
            raise InputError(f"{path} is cut off in its PLY header; copy it again.")
        match words:
            case ["comment" | "obj_info", *rest]:
                comments.append(" ".join(rest))
                continue
            case ["element", element, count] if re.fullmatch(r"[+-]?\d{1,18}", count):
                elements.append((int(count), {}))
                words[2] = "0"  # plyfile allocates whatever a header asks for
            case ["property", kind, *_] if elements:
                first = 4 if kind == "list" else 2
                words[first:] = [name] = ["_".join(words[first:])]
                if name in elements[-1][1]:
                    raise InputError(f"{path} has a PLY header that names {element}.{name} twice: export it again.")
                elements[-1][1][name] = kind
                words[1] = "double" if kind in _LONG else kind
        lines += [" ".join(words)] if words else []
    return lines, elements, comments


def read_element(
    path: Path, header: Header, place: int, thinning: Thinning, *, complete: bool = False
) -> dict[str, np.ndarray]:
    """Read the rows that `thinning` chooses of an element, by property.

    Numbers are [n]; lists are [n, k] if all have k entries, and else [n] arrays of one axis. With `complete`, the
    elements behind have to be there, with three entries in a list.
    """
    left = path.stat().st_size - header.size
    for element in header.elements if complete else header.elements[: place + 1]:
        left -= _check_size(path, element, left, entries=3 if complete else 0)
    with path.open("rb") as file:
        file.seek(header.size)
        for element in header.elements[:place]:  # to move on behind them
            if element.order == "=":
                next(itertools.islice(filter(bytes.strip, file), element.rows, element.rows), None)
            else:
                _read_rows(path, file, element, Thinning(1))
        return _read_rows(path, file, header.elements[place], thinning)


def _check_size(path: Path, element: Element, left: int, entries: int) -> int:
    """Refuse more rows than the `left` bytes hold; return the least bytes of the element, its lists of `entries`."""
    if element.rows < 0:
        raise InputError(f"{path} says it has {element.rows} {element.name} elements; write it again.")
    width, is_text = _row(element, dict.fromkeys(element.lists, entries)).itemsize, element.order == "="
    if is_text:  # every number takes a digit and a separator, but for the last one of the file
        width //= 4
    least = width * element.rows - is_text
    if least > left:
        raise InputError(
            f"{path} is cut off: its header says {element.rows} {element.name} elements of {width} bytes"
            f"{' at least' if is_text or element.lists else ''}, but {max(left, 0)} bytes follow; copy it again."
        )
    return max(least, 0)


def _row(element: Element, lengths: Mapping[str, int]) -> np.dtype:
    """Return the type of a row with lists of these lengths; all numbers of a text are float64."""
    fields: list[tuple] = []
    for item in element.properties:
        if isinstance(item, PlyListProperty):
            length, kind = item.list_dtype(element.order)
            fields += [(f"length of {item.name}", length), (item.name, kind, (lengths[item.name],))]
        else:
            fields.append((item.name, element.dtype[item.name]))
    return np.dtype([(field[0], "f8", *field[2:]) for field in fields] if element.order == "=" else fields)


def _read_rows(path: Path, file: BinaryIO, element: Element, thinning: Thinning) -> dict[str, np.ndarray]:
    """Read an element that begins at the file's position; leave the file behind it if it is binary."""
    names, start, is_text = [item.name for item in element.properties], file.tell(), element.order == "="
    if not element.rows or not names or not (is_text or element.lists):
        rows = thinning.read(file, element.dtype, element.rows if names else 0)
        return {name: rows[name] for name in element.dtype.names or ()}

    def read(some: Callable[[Any, int], np.ndarray]) -> np.ndarray:
        file.seek(start)
        if not is_text:
            return thinning.collect(lambda size: some(file, size), element.rows)
        return some(thinning.lines(filter(bytes.strip, file), element.rows), thinning.kept(element.rows))

    one_by_one = partial(_one_by_one, path, element)
    first = one_by_one(filter(bytes.strip, file) if is_text else file, 1)[0] if element.lists else {}
    lengths = {name: len(first[name]) for name in element.lists}
    try:
        rows = read(partial(_alike, element, lengths))
    except ValueError as error:
        if not element.lists:
            raise InputError(
                f"{path} has a {element.name} that is not {len(names)} numbers ({quoted(error)}): write it again."
            ) from error
        rows = read(one_by_one)
    if len(rows) != thinning.kept(element.rows):
        raise InputError(
            f"{path} is cut off: its header says {element.rows} {element.name} elements of {len(names)} numbers, read "
            f"were {len(rows)}; copy it again."
        )
    columns = {name: rows[name] for name in names}
    for name in element.dtype.names or ():
        kind = element.dtype[name]
        if is_text:
            columns[name] = to_type(path, name, rows[name], kind)
        else:  # plyfile takes integers of 8 bytes for floats
            columns[name] = rows[name].view(rows[name].dtype.str[0] + kind.str[1:])
    return columns


def _alike(element: Element, lengths: Mapping[str, int], rows: Any, size: int) -> np.ndarray:
    """Read the next rows, all with lists of these lengths; ValueError if they have others."""
    row = _row(element, lengths)
    if element.order == "=":
        # ndmin keeps a single row a row.
        found = np.loadtxt(rows, row, comments=None, ndmin=1, encoding="latin1")
    else:
        found = np.frombuffer(rows.read(size * row.itemsize), row, size)
    if any((found[f"length of {name}"] != length).any() for name, length in lengths.items()):
        raise ValueError("lists of other lengths")
    return found


def _one_by_one(path: Path, element: Element, rows: Any, size: int) -> np.ndarray:
    """Read the next rows by plyfile, from a file or from lines of text: lists are arrays in fields of objects."""
    is_text = element.order == "="
    doubles = {name: f"property double {name}" for name in element.dtype.names or ()} if is_text else {}
    lines = ["ply", f"format {_FORMATS[element.order]} 1.0", f"element {element.name} {size}"]
    lines += [*(doubles.get(item.name, str(item)) for item in element.properties), "end_header", ""]
    header: Any = io.BytesIO("\n".join(lines).encode())
    content = io.BytesIO(b"".join([*header, *itertools.islice(rows, size)])) if is_text else _Joined(header, rows)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # of a list without entries
            return PlyData.read(content)[element.name].data
    except (PlyParseError, ValueError, OverflowError) as error:
        if is_text:
            numbers = f"{len(element.dtype.names or ())} numbers and its lists"
            raise InputError(
                f"{path} has a {element.name} that is not {numbers} ({quoted(error)}): write it again."
            ) from error
        raise InputError(
            f"{path} is cut off or damaged: a list of its {element.name} elements does not end in the file; copy it "
            "again."
        ) from error


class _Joined(NamedTuple):
    """A header, and behind it the rest of a file; plyfile asks no more of a file than to be read."""

    header: BinaryIO
    file: BinaryIO

    def read(self, size: int) -> bytes:
        if size < 0:  # of a list
            raise ValueError(f"{size} bytes")
        return self.header.read(size) or self.file.read(size)
