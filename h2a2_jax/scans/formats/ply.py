"""Vertices of PLY files: ascii, and binary of either byte order, with lists in any place."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import Thinning
from h2a2_jax.scans.formats.ply_header import Element, check_size, read_ply_header
from h2a2_jax.scans.formats.ply_lists import BinaryRows, filled, skip, without_lists


def read_ply_columns(
    path: Path, thinning: Thinning | None = None, *, complete: bool = False
) -> Mapping[str, np.ndarray]:
    """Read the properties of the vertices, one array of a number per vertex each; lists are left out.

    `thinning` chooses the vertices. Numbers have the types of the header, but x, y, z of a text are float64: a text
    has the digits that it has. With `complete`, a file that ends before the elements behind the vertices, such as
    faces, can is refused.
    """
    thinning = thinning or Thinning()
    with path.open("rb") as file:
        header = read_ply_header(path, file)
        place = header.vertex
        if place is None:
            raise InputError(f"{path} is a PLY file without vertices; expected an element vertex with x, y, z.")
        left = path.stat().st_size - file.tell()
        for element in header.elements if complete else header.elements[: place + 1]:
            left -= check_size(path, element, left, header.is_text, entries=3 if complete else 0)
        for element in header.elements[:place]:
            skip(path, file, element, header.is_text)
        vertex = header.elements[place]
        if header.is_text:
            return _read_text(path, file, vertex, thinning)
        if vertex.has_lists:
            return _read_with_lists(path, file, vertex, thinning)
        table = thinning.read(file, vertex.dtype, vertex.rows if vertex.dtype.itemsize else 0)
        return {name: table[name] for name in vertex.dtype.names or ()}


def _read_text(path: Path, file: BinaryIO, vertex: Element, thinning: Thinning) -> Mapping[str, np.ndarray]:
    names, count = vertex.dtype.names or (), vertex.rows
    if not count or not names:
        return {name: np.zeros(0) for name in names}
    lines: Iterator[bytes] = thinning.lines(filled(file), count)
    if vertex.has_lists:
        lines = (b" ".join(without_lists(line.split(), vertex)[0]) for line in lines)
    try:
        # ndmin keeps a single row a row; lines() stops loadtxt from reading on into the faces.
        rows = np.loadtxt(lines, np.float64, comments=None, ndmin=2, encoding="latin1")
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} has a vertex that is not {len(names)} numbers ({error}).") from error
    if rows.shape != (thinning.kept(count), len(names)):
        raise InputError(
            f"{path} is cut off: its header says {count} vertex elements of {len(names)} numbers, read were "
            f"{len(rows)} of {rows.shape[1] if len(rows) else 0}; copy it again."
        )
    return {name: to_type(path, name, rows[:, i], vertex.dtype[name]) for i, name in enumerate(names)}


def _read_with_lists(path: Path, file: BinaryIO, vertex: Element, thinning: Thinning) -> Mapping[str, np.ndarray]:
    rows = BinaryRows(path, file, vertex)
    table = thinning.collect(lambda size: rows.read(size)[0], vertex.rows)
    return {name: table[name] for name in vertex.dtype.names or ()}


def to_type(path: Path, name: str, values: np.ndarray, kind: str | np.dtype) -> np.ndarray:
    """Convert float64 numbers read from text to the numpy type that the header gives them, if it can hold them.

    Coordinates of a floating type stay as they are: the digits of a text may be more than the type holds. So do
    fractions in a field of integers, such as colours of 0-1 in one of bytes.
    """
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        if name.lower() in ("x", "y", "z"):
            return values
        with np.errstate(over="ignore"):  # to infinity, which is left out later
            return values.astype(dtype)
    bounds = np.iinfo(dtype)
    if not ((values >= bounds.min) & (values <= bounds.max)).all():
        raise InputError(f"{path} has numbers that its field {name} of type {dtype} cannot hold; write it again.")
    return values.astype(dtype) if (values == np.rint(values)).all() else values
