"""Point clouds from files of any usual format, in the frame, unit and colour scale of the file.

| suffix | what is read |
|---|---|
| .ply | the element vertex: x, y, z and red, green, blue (or r, g, b); ascii, binary, big-endian; lists are skipped |
| .ply with large faces | points on the faces: where vertices are far apart |
| .pcd | x, y, z and rgb, rgba (packed) or r, g, b; ascii, binary, binary_compressed |
| .npy | rows x, y, z, r, g, b, or x, y, z, anything else; or a structured array with these names |
| .npz | `points` (or `xyz`, `coords`) of 3 columns with `colors` (or `rgb`), or of 6 |
| .bin | float32 rows of 6, 4 or 3 numbers; `PointCloud.assumed` says which |
| .txt, .xyz, .pts, .csv, .asc | a point a line; blanks, commas or semicolons between; leading lines of names pass |
| .las, .laz | versions to 1.4, point formats 0 to 10 |
| .e57 | all scans in the file's frame, in metres, z up (the extra `e57`) |
| .ptx | all scans in the file's frame |
| .obj, .glb, .gltf, .stl, .off | points on the faces, or the points of a file without faces; glTF is in metres, y up |

The counts of a header are compared with the size of the file before anything is allocated. A large file can be thinned
out while it is read, so that memory does not grow with the file.
"""

import contextlib
import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import Thinning
from h2a2_jax.scans.formats.e57 import read_e57
from h2a2_jax.scans.formats.folders import ADVICE
from h2a2_jax.scans.formats.las import read_las
from h2a2_jax.scans.formats.mesh import read_mesh
from h2a2_jax.scans.formats.pcd import read_pcd_columns
from h2a2_jax.scans.formats.ply_mesh import read_ply_points
from h2a2_jax.scans.formats.ptx import read_ptx
from h2a2_jax.scans.scan import NOT_FINITE

ColorRange = Literal["auto", "0-1", "0-255", "none"]
COLOR_RANGES: tuple[ColorRange, ...] = ("auto", "0-1", "0-255", "none")

_COLOR_NAMES = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
_POINT_ARRAYS = ("points", "xyz", "coords", "coordinates", "arr_0")
_COLOR_ARRAYS = ("colors", "colours", "rgb", "color")
_MOST_ZIP_GROWTH = 1040  # deflate packs at most 258 bytes into two bits
_LONGEST_HEADER = 10_000  # numpy's own limit
THINNED = "points left out of a large file"  # a kind of note, of a file with more points than the caller wants
_SHORTEST_LINE = 6  # bytes of "1 2 3"
_ROUNDING = 1e-3  # by which colours may exceed their range


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Finite points of a file.

    Attributes:
        points: x, y, z in the file's frame and unit; float64 if the file has more digits than float32 holds.
        colors: red, green, blue in the file's scale, or None if it has none.
        full_color: number of full brightness if the type of the colours fixes it (255 for bytes), else None.
        assumed: sentences on assumptions, for the file leaves them open.
        notes: counts by kind of points left out.
        up: axis that points up (a key of `frame.UPRIGHT`) if the format or the file says so, as glTF does, else None.
        unit: unit of the points ("m", "cm", "mm") if the format or the file says so, else None.
    """

    points: Float[np.ndarray, "n 3"]
    colors: Float[np.ndarray, "n 3"] | None
    full_color: float | None = None
    assumed: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    up: str | None = None
    unit: str | None = None


@dataclass(frozen=True, eq=False)
class _Raw:
    points: np.ndarray
    colors: np.ndarray | None
    assumed: tuple[str, ...] = ()
    up: str | None = None
    unit: str | None = None


def read_point_cloud(path: str | Path, most: int | None = None) -> PointCloud:
    """Read a point cloud; points with a NaN or infinite coordinate or colour are left out and counted.

    Args:
        path: a file with one of the suffixes in `SUFFIXES`.
        most: largest number of points; a larger file is thinned to one point at random out of each of `most` equal
            parts, and the others are counted (`THINNED`). It bounds the memory, but not for compressed PCD. The surface
            of a mesh has at most that many points, or `surface.MOST`.

    Raises:
        InputError: the file is missing or damaged, or its suffix is unknown. A file without points raises nothing.
    """
    path, thinning = Path(path), Thinning(most)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        advice = f": {ADVICE[path.suffix.lower()]}" if path.suffix.lower() in ADVICE else ""
        known = ", ".join(SUFFIXES)
        raise InputError(f"{path} has the suffix {path.suffix!r}{advice}; point clouds are read from {known}.")
    try:
        raw = reader(path, thinning)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the folder and the file name.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except InputError:
        raise
    except (MemoryError, OverflowError) as error:
        raise InputError(f"{path} asks for more memory than there is ({error}): split it or thin it out.") from error
    except Exception as error:  # libraries raise anything on damaged bytes
        what = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {what}): copy it again or write it again."
        ) from error
    cloud = _finite(raw)
    return replace(cloud, notes={**cloud.notes, THINNED: thinning.left_out}) if thinning.left_out else cloud


def cloud_of_arrays(points: np.ndarray, colors: np.ndarray | None = None) -> PointCloud:
    """Make a point cloud of arrays; points with a NaN or infinite coordinate or colour are left out and counted.

    Args:
        points: [n, 3] x, y, z, numbers of any type.
        colors: [n, 3] red, green, blue; an unsigned type fixes their range.

    Raises:
        InputError: an array has another shape or holds no real numbers.
    """
    points = np.asarray(points)
    for what, values, shape in (
        ("points", points, (len(points) if points.ndim else 0, 3)),
        ("colors", colors, points.shape),
    ):
        if values is not None and (np.shape(values) != shape or np.asarray(values).dtype.kind not in "fiu"):
            raise InputError(
                f"The {what} are {np.asarray(values).dtype} of shape {np.shape(values)}; expected are numbers of shape "
                f"{shape if what == 'colors' else '[n, 3]'}, x, y, z or red, green, blue in a row."
            )
    return _finite(_Raw(points, None if colors is None else np.asarray(colors)))


def unit_colors(cloud: PointCloud, color_range: ColorRange = "auto") -> Float32[np.ndarray, "n 3"] | None:
    """Scale colours to 0-1; None if the cloud has none or `color_range`, that of the file's numbers, is "none".

    "auto" goes by the type of the numbers, or by the largest if the type leaves it open: up to 1 is 0-1, up to 255
    is 0-255.

    Raises:
        InputError: a number lies outside the range.
    """
    if cloud.colors is None or color_range == "none":
        return None
    low, high = float(cloud.colors.min(initial=0)), float(cloud.colors.max(initial=0))
    if color_range == "auto":
        scale = cloud.full_color or (1.0 if high <= 1 + _ROUNDING else 255.0)
    else:
        scale = 1.0 if color_range == "0-1" else 255.0
    if low < -_ROUNDING * scale or high > scale * (1 + _ROUNDING):
        raise InputError(f"its colours reach from {low:g} to {high:g}, but 0 to {scale:g} is expected: rescale them")
    return np.clip(cloud.colors / scale, 0, 1).astype(np.float32)


def _finite(raw: _Raw) -> PointCloud:
    """Leave out the points that are not finite."""
    points, colors, full_color = _real(raw.points), None, None
    finite = np.isfinite(points).all(axis=1)
    if raw.colors is not None:
        colors = _real(raw.colors)
        finite &= np.isfinite(colors).all(axis=1)
        full_color = float(np.iinfo(raw.colors.dtype).max) if raw.colors.dtype.kind == "u" else None
    notes = {}
    if not finite.all():
        notes[NOT_FINITE] = int((~finite).sum())
        points, colors = points[finite], None if colors is None else colors[finite]
    return PointCloud(points, colors, full_color, raw.assumed, notes, raw.up, raw.unit)


def _real(values: np.ndarray) -> np.ndarray:
    """Convert to float32 if that is exact for the type, else to float64; native byte order."""
    exact = values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 2)
    return np.ascontiguousarray(values, np.float32 if exact else np.float64)


def _from_columns(path: Path, columns: Mapping[str, np.ndarray]) -> _Raw:
    by_name = {name.lower(): values for name, values in columns.items()}
    if missing := [name for name in "xyz" if name not in by_name]:
        raise InputError(f"{path} has no {', '.join(missing)} among its fields ({', '.join(columns) or 'none'}).")
    points = np.stack([by_name[name] for name in "xyz"], axis=1)
    names = next((names for names in _COLOR_NAMES if all(name in by_name for name in names)), None)
    return _Raw(points, None if names is None else np.stack([by_name[name] for name in names], axis=1))


def _from_rows(path: Path, rows: np.ndarray, what: str = "its array") -> _Raw:
    if rows.dtype.names:
        return _from_columns(path, {name: rows[name].reshape(-1) for name in rows.dtype.names})
    if rows.dtype.kind not in "fiu":
        raise InputError(f"{path}: {what} has the type {rows.dtype}; expected are real numbers.")
    if rows.ndim != 2 or rows.shape[1] < 3:
        raise InputError(f"{path}: {what} has the shape {rows.shape}; expected are rows x, y, z or x, y, z, r, g, b.")
    width, colors = rows.shape[1], rows[:, 3:6] if rows.shape[1] >= 6 else None
    used = "x, y, z" if colors is None else "the first 6"
    return _Raw(rows[:, :3], colors, () if width in (3, 6) else (f"columns after {used} of {width} are not used",))


def _read_ply(path: Path, thinning: Thinning) -> _Raw:
    columns, said, up = read_ply_points(path, thinning)
    raw = _from_columns(path, columns)
    return replace(raw, assumed=(*raw.assumed, *said), up=up)


def _read_npy(path: Path, thinning: Thinning) -> _Raw:
    with path.open("rb") as file:
        return _from_rows(path, _array(path, file, path.stat().st_size, thinning))


def _array(path: Path, file: Any, size: int, thinning: Thinning) -> np.ndarray:
    """Read one array in numpy's format, or some of its rows, if the file can hold as many bytes as its header says."""
    start = file.read(8)
    if start not in (b"\x93NUMPY\1\0", b"\x93NUMPY\2\0"):
        raise InputError(f"{path} is no numpy array: save it again with numpy.save.")
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    header = file.read(min(length, _LONGEST_HEADER))
    # Python's parser can crash on bytes that are no text.
    if len(header) < length or not all(32 <= byte < 127 or byte == 10 for byte in header):
        raise InputError(f"{path} is no numpy array or is cut off: its header is damaged; save it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(io.BytesIO(struct.pack("<I", length) + header))
    except Exception as error:  # of many kinds
        raise InputError(f"{path} is no numpy array ({error}): save it again with numpy.save.") from error
    if dtype.hasobject:
        raise InputError(f"{path} holds Python objects, which are never loaded: save plain numbers.")
    count = math.prod(shape)
    if count * dtype.itemsize > size:
        raise InputError(
            f"{path} is cut off: its header says {shape} of {dtype}, but it has {size} bytes; copy it again."
        )
    try:
        if len(shape) == 2 and shape[0] and fortran:  # a column after the other
            return np.stack([thinning.read(file, dtype, shape[0]) for _ in range(shape[1])], axis=1)
        if len(shape) == 2 and shape[0] and shape[1]:
            return thinning.read(file, dtype, shape[0], shape[1]).reshape(-1, shape[1])
        if len(shape) == 1:
            return thinning.read(file, dtype, shape[0])
        return Thinning().read(file, dtype, count).reshape(shape, order="F" if fortran else "C")
    except EOFError as error:
        raise InputError(f"{path} is cut off: of {count * dtype.itemsize} bytes {error}; copy it again.") from error


def _read_npz(path: Path, thinning: Thinning) -> _Raw:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            points = next((name for name in _POINT_ARRAYS if name in members), None)
            if points is None:
                raise InputError(
                    f"{path} has the arrays {', '.join(members) or 'none'}; expected is one called "
                    f"{' or '.join(_POINT_ARRAYS[:3])}."
                )
            colors = next((name for name in _COLOR_ARRAYS if name in members), None)
            raw = _from_rows(path, _member(path, archive, members[points], thinning), f"its array {points}")
            if colors is None:
                return raw
            values = _member(path, archive, members[colors], thinning)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no readable .npz ({error}): copy it again or write it again.") from error
    if values.shape != raw.points.shape or values.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: its array {colors} is {values.dtype} of shape {values.shape}, its points are {raw.points.shape}; "
            "expected are as many colours of three numbers."
        )
    return _Raw(raw.points, values, raw.assumed)


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, thinning: Thinning) -> np.ndarray:
    if info.file_size > _MOST_ZIP_GROWTH * info.compress_size + 4096:
        raise InputError(f"{path} is damaged: {info.filename} claims {info.file_size} bytes; write it again.")
    try:
        with archive.open(info) as file:
            return _array(path, file, info.file_size, thinning)
    except zlib.error as error:
        raise InputError(f"{path} is damaged ({error}): copy it again.") from error


def _read_bin(path: Path, thinning: Thinning) -> _Raw:
    size = path.stat().st_size
    if size % 4 or not any(size % (4 * width) == 0 for width in (3, 4, 6)):
        raise InputError(
            f"{path} has {size} bytes, which are no whole rows of 6, 4 or 3 float32 numbers: it is cut off or of "
            "another type; write x, y, z, r, g, b in float32."
        )
    with path.open("rb") as file:
        some = np.frombuffer(file.read(4 * 12 * 20_000), "<f4")
        width = _row_width(some, size // 4)
        file.seek(0)
        values = thinning.read(file, np.dtype("<f4"), size // (4 * width), width)
    what = {6: "x, y, z, r, g, b", 4: "x, y, z and a value that is not used", 3: "x, y, z"}[width]
    raw = _from_rows(path, values.reshape(-1, width))
    return _Raw(raw.points, raw.colors, (f"{path.name} is taken as float32 rows of {what}",))


def _row_width(values: np.ndarray, count: int) -> int:
    """Guess the numbers per row: the period in which columns are most alike, 6 of few rows or without a difference."""
    widths = [width for width in (6, 4, 3) if count % width == 0]
    some = values.astype(np.float64)
    if len(widths) == 1 or len(some) < 12 * 20:
        return widths[0]
    some = some[: len(some) // 12 * 12]
    some[~np.isfinite(some) | (np.abs(some) > 1e9)] = np.nan

    def spread(width: int) -> float:  # mean code length of a number, with a normal distribution per column
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(np.mean(np.log(np.nan_to_num(np.nanstd(some.reshape(-1, width), axis=0)) + 1e-6)))

    spreads = {width: spread(width) for width in widths}
    best = min(widths, key=lambda width: spreads[width])
    # Rows of 3 are rows of 6 as well: the longer ones must be clearly better.
    return 3 if best == 6 and 3 in spreads and spreads[3] < spreads[6] + 0.05 else best


def _read_text(path: Path, thinning: Thinning) -> _Raw:
    with path.open("rb") as file:
        head = [line for line in (file.readline(4096) for _ in range(64)) if line.strip()]
    if b"\0" in b"".join(head):
        raise InputError(f"{path} is no text: expected is one point a line, x y z or x y z r g b.")
    skip, delimiter = 0, None
    for line in head:
        delimiter = ";" if b";" in line else "," if b"," in line else None
        words = line.decode("latin1").replace(delimiter or " ", " ").split()
        with contextlib.suppress(ValueError):
            if len([float(word) for word in words]) >= 3:
                break
        skip += 1  # names of columns, a comment, or the number of points
    if skip == len(head):
        if head:
            raise InputError(f"{path} has no line of numbers x y z in its first {len(head)} lines.")
        return _Raw(np.zeros((0, 3)), None)
    try:
        with path.open(encoding="latin1") as lines, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            filled: Iterator[str] = (line.rstrip().rstrip(delimiter or " ") for line in lines if line.strip())
            for _ in range(skip):
                next(filled)
            if thinning.kept(size := path.stat().st_size // _SHORTEST_LINE) < size:
                with path.open(encoding="latin1") as text:
                    count = sum(bool(line.strip()) for line in text) - skip
                filled = thinning.lines(filled, count)
            rows = np.loadtxt(filled, np.float64, comments=("#", "//"), delimiter=delimiter, ndmin=2)
    except ValueError as error:
        raise InputError(f"{path} has a line that is not numbers ({error}).") from error
    return _from_rows(path, rows, "the table")


_READERS: dict[str, Callable[[Path, Thinning], _Raw]] = {
    ".ply": _read_ply,
    ".pcd": lambda path, thinning: _from_columns(path, read_pcd_columns(path, thinning)),
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".bin": _read_bin,
    **dict.fromkeys((".txt", ".xyz", ".pts", ".csv", ".asc"), _read_text),
    **dict.fromkeys((".obj", ".glb", ".gltf", ".stl", ".off"), lambda path, thinning: _Raw(*read_mesh(path, thinning))),
    ".e57": lambda path, thinning: _Raw(*read_e57(path, thinning)),
    ".ptx": lambda path, thinning: _Raw(*read_ptx(path, thinning)),
    **dict.fromkeys((".las", ".laz"), lambda path, thinning: _Raw(*read_las(path, thinning))),
}
SUFFIXES = tuple(_READERS)
"""Suffixes of the files that `read_point_cloud` reads."""
