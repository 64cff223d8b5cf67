"""Vertices of PLY files: ascii, and binary of either byte order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.thinning import Thinning

_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float32": "f4",
    "float64": "f8",
}
_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
_LONGEST_HEADER = 1 << 20


@dataclass
class _Element:
    name: str
    count: int
    fields: dict[str, str] = field(default_factory=dict)
    has_lists: bool = False


def read_ply_columns(path: Path, thinning: Thinning | None = None) -> Mapping[str, np.ndarray]:
    """Properties of the vertices by name, one array of a number per vertex each.

    Args:
        path: a `.ply` file.
        thinning: which vertices; all without one.

    Raises:
        InputError: the file is no PLY, is shorter than its header says, or cannot be parsed.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        form, elements = _header(path, file)
        return _vertices(path, file, form, elements, thinning or Thinning())


def _header(path: Path, file: BinaryIO) -> tuple[str, list[_Element]]:
    if file.readline(16).strip() != b"ply":
        raise InputError(f"{path} is no PLY file: its first line is not 'ply'; export it again.")
    form, elements = "", []
    while True:
        line = file.readline(4096)
        if not line or file.tell() > _LONGEST_HEADER:
            raise InputError(f"{path} is cut off: its PLY header has no end_header; copy it again.")
        words = line.decode("latin1").split()
        try:
            match words:
                case ["end_header"]:
                    break
                case ["format", form, *_]:
                    pass
                case ["element", name, count]:
                    elements.append(_Element(name, int(count)))
                case ["property", "list", *_]:
                    elements[-1].has_lists = True
                case ["property", kind, name]:
                    if name in elements[-1].fields:
                        raise ValueError(f"property {name} twice")
                    elements[-1].fields[name] = _TYPES[kind]
        except (ValueError, KeyError, IndexError) as error:
            shown = line.decode("latin1").strip()
            raise InputError(f"{path} has the PLY header line {shown!r}, not understood ({error}).") from error
    if form not in _ORDERS:
        raise InputError(f"{path} has the PLY format {form!r}; expected one of {', '.join(_ORDERS)}.")
    return form, elements


def _vertices(
    path: Path, file: BinaryIO, form: str, elements: list[_Element], thinning: Thinning
) -> Mapping[str, np.ndarray]:
    for element in elements:
        is_vertex = element.name == "vertex"
        if element.count < 0:
            raise InputError(f"{path} says it has {element.count} {element.name} elements; write it again.")
        if element.has_lists:
            what = "holds lists" if is_vertex else f"comes after the lists of {element.name}"
            raise InputError(f"{path}: its element vertex {what}, which is not read; write it with vertices first.")
        chosen = thinning if is_vertex else Thinning()
        if form == "ascii":
            table = _text_rows(path, file, element, chosen)
        else:
            table = _binary_rows(path, file, element, _ORDERS[form], chosen)
        if is_vertex:
            return table
    raise InputError(f"{path} is a PLY file without vertices; expected an element vertex with x, y, z.")


def _binary_rows(
    path: Path, file: BinaryIO, element: _Element, order: str, thinning: Thinning
) -> Mapping[str, np.ndarray]:
    dtype = np.dtype([(name, order + kind) for name, kind in element.fields.items()])
    left = path.stat().st_size - file.tell()
    if element.count * dtype.itemsize > left:
        raise InputError(
            f"{path} is cut off: its header says {element.count} {element.name} elements of {dtype.itemsize} bytes, "
            f"but {left} bytes follow; copy it again."
        )
    rows = thinning.read(file, dtype, element.count if dtype.itemsize else 0)
    return {name: rows[name] for name in element.fields}


def _text_rows(path: Path, file: BinaryIO, element: _Element, thinning: Thinning) -> Mapping[str, np.ndarray]:
    left = path.stat().st_size - file.tell()
    columns = len(element.fields)
    if 2 * columns * element.count > left + 1:  # a digit and a separator each
        raise InputError(
            f"{path} is cut off: its header says {element.count} {element.name} elements of {columns} numbers, but "
            f"{left} bytes follow; copy it again."
        )
    if not element.count or not columns:
        return {name: np.zeros(0) for name in element.fields}
    try:
        # ndmin keeps a single row a row; lines() stops loadtxt from reading on into the faces.
        rows = np.loadtxt(thinning.lines(file, element.count), np.float64, comments=None, ndmin=2, encoding="latin1")
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} has a {element.name} that is not {columns} numbers ({error}).") from error
    if rows.shape != (thinning.kept(element.count), columns):
        raise InputError(
            f"{path} is cut off: its header says {element.count} {element.name} elements of {columns} numbers, read "
            f"were {len(rows)} of {rows.shape[1] if len(rows) else 0}; copy it again."
        )
    return {name: typed(path, name, rows[:, i], kind) for i, (name, kind) in enumerate(element.fields.items())}


def typed(path: Path, name: str, values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers read from text in the type that the header gives them.

    Args:
        path: of the file, for the error.
        name: of the field, for the error.
        values: float64 as read.
        kind: a numpy type string.

    Raises:
        InputError: a whole number is not in the range of its type.
    """
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # to infinity, which is left out later
            return values.astype(dtype)
    bounds = np.iinfo(dtype)
    if not ((values >= bounds.min) & (values <= bounds.max)).all():
        raise InputError(f"{path} has numbers that its field {name} of type {dtype} cannot hold; write it again.")
    return values.astype(dtype)
