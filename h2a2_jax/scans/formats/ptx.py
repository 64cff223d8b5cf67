"""Points of PTX files (Leica): scans one behind the other, each with its place in the file's frame."""

import itertools
from collections import deque
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud, Thinning

_LONGEST_LINE = 4096
_SHORTEST_LINE = 8  # bytes of "0 0 0 0"


def read_ptx(path: Path, thinning: Thinning) -> RawCloud:
    """Read the points of all scans, turned and moved by their matrices, and colours if all scans have some.

    A scan has ten lines of header: columns, rows, the scanner's place and three axes, and four lines of a matrix for
    rows x, y, z, 1; then a line x, y, z, intensity[, red, green, blue] for each direction, zeros where the laser did
    not come back. Those are left out and counted.
    """
    points, colors, read, left_out = [np.zeros((0, 3))], list[np.ndarray](), 0, 0
    with path.open("rb") as file:
        while (line := file.readline(_LONGEST_LINE)).strip():
            count, matrix = _header(path, line, file)
            if _SHORTEST_LINE * count > path.stat().st_size:
                raise InputError(f"{path} is cut off: its header says {quoted(count, 30)} points; copy it again.")
            some = Thinning(thinning.most)
            rows = _rows(path, file, count, some)
            hits = rows[(rows[:, :3] != 0).any(axis=1)]
            points.append(hits[:, :3] @ matrix[:3, :3] + matrix[3, :3])
            colors += [hits[:, 4:7]] if hits.shape[1] == 7 else []
            read, left_out = read + len(rows), left_out + some.left_out
    xyz, rgb = np.concatenate(points), np.concatenate([np.zeros((0, 3)), *colors]).astype(np.uint8)
    is_colored = len(rgb) == len(xyz) > 0
    said = (f"has {read - len(xyz):,} directions without a point of {read:,} read",) * (read > len(xyz))
    cloud = RawCloud(thinning.take(xyz), thinning.take(rgb) if is_colored else None, said)
    thinning.left_out += left_out
    return cloud


def _header(path: Path, line: bytes, file: BinaryIO) -> tuple[int, Float[np.ndarray, "4 4"]]:
    try:
        columns, rows = int(line), int(file.readline(_LONGEST_LINE))
        numbers = [[float(word) for word in file.readline(_LONGEST_LINE).split()] for _ in range(8)]
        matrix = np.array(numbers[4:])
        if matrix.shape != (4, 4) or columns < 0 or rows < 0:
            raise ValueError("four lines of a matrix are missing")
    except ValueError as error:
        raise InputError(f"{path} has no PTX header ({quoted(error)}): export it again.") from error
    return columns * rows, matrix


def _rows(path: Path, file: BinaryIO, count: int, thinning: Thinning) -> Float[np.ndarray, "n c"]:
    """Read the lines of a scan that `thinning` chooses; the file is left behind the scan."""
    lines = itertools.islice(file, count)
    if not count:
        return np.zeros((0, 4))
    try:
        rows = np.loadtxt(thinning.lines(lines, count), comments=None, ndmin=2, encoding="latin1")
    except ValueError as error:
        raise InputError(
            f"{path} has a line that is not x y z intensity [r g b] ({quoted(error)}): export it again."
        ) from error
    deque(lines, 0)
    if len(rows) != thinning.kept(count) or rows.shape[1] not in (4, 7):
        raise InputError(f"{path} is cut off or has lines of another kind than x y z intensity [r g b]: copy it again.")
    return rows
