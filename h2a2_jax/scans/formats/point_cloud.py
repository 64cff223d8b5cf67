"""Point clouds from files of any usual format, in the frame, unit and colour scale of the file.

| suffix | what is read |
|---|---|
| .ply | the element vertex: x, y, z and colours by name (`columns`); ascii, binary, big-endian; lists are skipped |
| .ply with large faces | points on the faces: where vertices are far apart |
| .pcd | x, y, z and rgb, rgba (packed) or red, green, blue; ascii, binary, binary_compressed |
| .npy | rows of numbers (`unnamed`), also transposed; or a structured array with names |
| .npz | `points` (or `xyz`, `coords`, ...), maybe with `colors` (or `rgb`, ...); or `x`, `y`, `z` |
| .bin | rows of float32 or float64 numbers (`unnamed`); `PointCloud.assumed` says which |
| .txt, .xyz, .xyzrgb, .xyzn, .pts, .csv, .asc | a point a line (`text`): columns by their names, or by their values |
| .las, .laz | versions to 1.4, point formats 0 to 10 |
| .e57 | all scans in the file's frame, in metres, z up (the extra `e57`) |
| .ptx | all scans in the file's frame |
| .obj, .glb, .gltf, .stl, .off | points on the faces, or the points of a file without faces; glTF is in metres, y up |

The counts of a header are compared with the size of the file before anything is allocated. A large file can be thinned
out while it is read, so that memory does not grow with the file.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int

from h2a2_jax.errors import InputError, quoted, reason_of
from h2a2_jax.scans.formats import RawCloud, Thinning
from h2a2_jax.scans.formats.colors import COLOR_RANGES, ColorRange, real, scaled_colors, settle_colors
from h2a2_jax.scans.formats.columns import COLUMNS_NOT_USED, Layout, parse_columns
from h2a2_jax.scans.formats.e57 import read_e57
from h2a2_jax.scans.formats.folders import ADVICE
from h2a2_jax.scans.formats.las import read_las
from h2a2_jax.scans.formats.mesh import read_mesh
from h2a2_jax.scans.formats.pcd import read_pcd
from h2a2_jax.scans.formats.ply_mesh import read_ply
from h2a2_jax.scans.formats.ptx import read_ptx
from h2a2_jax.scans.formats.rows import read_bin, read_npy, read_npz
from h2a2_jax.scans.formats.text import read_text
from h2a2_jax.scans.scan import NOT_FINITE
from h2a2_jax.untrusted import check_regular

__all__ = [
    "COLOR_RANGES",
    "SUFFIXES",
    "THINNED",
    "ColorRange",
    "PointCloud",
    "cloud_of_arrays",
    "read_point_cloud",
    "unit_colors",
]

THINNED = "points left out of a large file"  # a kind of note, of a file with more points than the caller wants
_LONGEST_REMARK = 400  # letters; remarks name arrays and columns of a file
_COARSE = 0.02  # m; step of float32 that a detector would notice
_LARGEST = 200.0  # extent that is one in metres, whatever the unit
_STEPS = 500  # in the extent of a scan, less than which are coarse in any unit
_SAMPLE = 20_000
_FEW = 1000  # points, of less than which nothing tells whether they are rounded
_SHARED = 10  # points of a scan to each of its coordinates on an axis, if these are rounded


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Finite points of a file.

    Attributes:
        points: x, y, z in the file's frame and unit; float64 if the file has more digits than float32 holds.
        colors: red, green, blue in the file's scale, finite, or None if it has none.
        full_color: number of full brightness if the type or the values decide it (255 for bytes); None for floats of
            0-1 or 0-255, which `unit_colors` tells apart, or if it is left open.
        assumed: sentences on assumptions, for the file leaves them open.
        notes: counts by kind of points left out, and of points without a colour, which are grey.
        up: axis that points up (a key of `frame.UPRIGHT`) if the format or the file says so, as glTF does, else None.
        unit: unit of the points ("m", "cm", "mm") if the format or the file says so, else None.
        rows: number of each point among those of the file, from 0, rising; None: all of them are there.
    """

    points: Float[np.ndarray, "n 3"]
    colors: Float[np.ndarray, "n 3"] | None
    full_color: float | None = None
    assumed: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    up: str | None = None
    unit: str | None = None
    rows: Int[np.ndarray, " n"] | None = None


def read_point_cloud(
    path: str | Path,
    most: int | None = None,
    columns: str | Sequence[str] | None = None,
    color_range: ColorRange = "auto",
) -> PointCloud:
    """Read a point cloud; points with a NaN or infinite coordinate are left out and counted.

    Args:
        path: a file with one of the suffixes in `SUFFIXES`.
        most: largest number of points; a larger file is thinned to one point at random out of each of `most` equal
            parts, and the others are counted (`THINNED`). It bounds the memory, but not for compressed PCD. The
            surface of a mesh has at most that many points, or `surface.MOST`.
        columns: meaning of the columns of a text table, .npy, .npz or .bin, in order, as in "x,y,z,_,r,g,b": _ for one
            that is not used. Without it names or values decide, with a remark. Other formats name their columns.
        color_range: range of the colours; "auto" decides by their type and values, with a remark if it is not plain.

    Raises:
        InputError: the file is missing or damaged, its suffix is unknown, its columns leave open what they are, or
            `columns` does not fit. A file without points raises nothing.
    """
    path, thinning, layout = Path(path), Thinning(most), parse_columns(columns)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        advice = f": {ADVICE[suffix]}" if suffix in ADVICE else ""
        known = ", ".join(SUFFIXES)
        raise InputError(f"{path} has the suffix {path.suffix!r}{advice}; point clouds are read from {known}.")
    try:
        check_regular(path)
        raw = _TABLES[suffix](path, thinning, layout) if suffix in _TABLES else _READERS[suffix](path, thinning)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the folder and the file name.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}; check the file, or write it again.") from error
    except InputError:
        raise
    except (MemoryError, OverflowError) as error:
        raise InputError(
            f"{path} asks for more memory than there is ({quoted(error)}): split it or thin it out."
        ) from error
    except Exception as error:  # libraries raise anything on damaged bytes
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {quoted(error)}): copy it again or write it again."
        ) from error
    raw = replace(raw, assumed=tuple(quoted(remark, _LONGEST_REMARK) for remark in raw.assumed))
    if layout and suffix not in _TABLES:
        raw = raw.remarked(after=[COLUMNS_NOT_USED])
    cloud, left_out = _finite(raw, color_range), thinning.left_out
    if not left_out:
        return cloud
    read = thinning.rows(len(raw.points) + left_out)
    rows = read if read is None or cloud.rows is None else read[cloud.rows]
    return replace(cloud, rows=rows, notes={**cloud.notes, THINNED: left_out})


def cloud_of_arrays(
    points: np.ndarray, colors: np.ndarray | None = None, color_range: ColorRange = "auto"
) -> PointCloud:
    """Make a point cloud of arrays; points with a NaN or infinite coordinate are left out and counted.

    Args:
        points: [n, 3] x, y, z, numbers of any type.
        colors: [n, 3] red, green, blue; their range is decided as in files.
        color_range: range of the colours, which settles it.

    Raises:
        InputError: an array has another shape or holds no real numbers.
    """
    points = np.asarray(points)
    for what, values, shape in (
        ("points", points, (len(points) if points.ndim else 0, 3)),
        ("colors", colors, points.shape),
    ):
        if values is not None and (np.shape(values) != shape or np.asarray(values).dtype.kind not in "fiu"):
            apart = "; give colours apart, as in points[:, :3], points[:, 3:6]" if what == "points" else ""
            raise InputError(
                f"The {what} are {np.asarray(values).dtype} of shape {np.shape(values)}; expected are numbers of shape "
                f"{shape if what == 'colors' else '[n, 3]'}, x, y, z or red, green, blue in a row{apart}."
            )
    return _finite(RawCloud(points, None if colors is None else np.asarray(colors)), color_range)


def unit_colors(cloud: PointCloud, color_range: ColorRange = "auto") -> Float32[np.ndarray, "n 3"] | None:
    """Scale colours to 0-1; None if the cloud has none or `color_range`, that of the file's numbers, is "none".

    "auto" goes by `PointCloud.full_color` or, if that is None, by the values (`colors.color_scale`).

    Raises:
        InputError: colours lie outside the range, or leave it open.
    """
    if cloud.colors is None or color_range == "none":
        return None
    return scaled_colors(cloud.colors, cloud.full_color, color_range)


def _finite(raw: RawCloud, color_range: ColorRange) -> PointCloud:
    """Leave out the points that are not finite, and settle the colours of the others."""
    points, hues = real(raw.points), raw.colors
    assumed, notes = raw.assumed, Counter[str]()
    finite, rows = np.isfinite(points).all(axis=1), None
    if not finite.all():
        notes[NOT_FINITE] = int((~finite).sum())
        points, hues, rows = points[finite], None if hues is None else hues[finite], np.flatnonzero(finite)
    if remark := _coarse(points, raw.points.dtype):
        assumed = (*assumed, remark)
    if hues is None:
        return PointCloud(points, None, None, assumed, dict(notes), raw.up, raw.unit, rows)
    colors = settle_colors(hues, color_range)
    notes.update(colors.notes)
    remarks = (*assumed, *colors.remarks)
    return PointCloud(points, colors.values, colors.full, remarks, dict(notes), raw.up, raw.unit, rows)


def _coarse(points: Float[np.ndarray, "n 3"], dtype: np.dtype) -> str | None:
    """Remark on coordinates of few digits, of their type or as they were written."""
    some = points[:: max(1, len(points) // _SAMPLE)]
    if len(some) < 2:
        return None
    extent = float(np.subtract(*np.percentile(some, [99, 1], axis=0)).max())
    remark = _coarse_type(some, dtype, extent) if dtype.kind == "f" else None
    if remark is None and (step := _grid_step(some)) > 1.1 * _COARSE and extent < _LARGEST:
        return f"has coordinates in steps of {step:.2g}: if they were rounded, export it with more digits"
    return remark


def _coarse_type(some: Float[np.ndarray, "n 3"], dtype: np.dtype, extent: float) -> str | None:
    """Remark on coordinates that are, or once were, in float32 so far from the origin that its steps are coarse."""
    place = float(np.abs(np.median(some, axis=0)).max())
    name = "float16" if dtype.itemsize == 2 else "float32"
    with np.errstate(over="ignore"):
        step = float(np.spacing(np.abs(np.dtype(name).type(place))))
        if not extent or not (step > extent / _STEPS or (step > _COARSE and extent < _LARGEST)):
            return None
        if dtype.itemsize > 4 and not (some.astype(np.float32) == some).all():
            return None
    tense = "are" if dtype.itemsize <= 4 else "once were"
    return (
        f"has coordinates that {tense} in {name}, which has steps of {step:.2g} at {place:.3g}: export it in double, "
        "or shifted to the origin"
    )


def _grid_step(some: Float[np.ndarray, "n 3"]) -> float:
    """Largest step of an axis on which many points share few coordinates, as rounded numbers do; else 0."""
    steps = [0.0]
    for column in some.T:
        places = np.unique(column)
        if len(some) >= _FEW and len(places) > 2 and len(some) > _SHARED * len(places):
            steps.append(float(np.diff(places).min()))
    return max(steps)


_READERS: dict[str, Callable[[Path, Thinning], RawCloud]] = {
    ".ply": read_ply,
    ".pcd": read_pcd,
    **dict.fromkeys((".obj", ".glb", ".gltf", ".stl", ".off"), read_mesh),
    ".e57": read_e57,
    ".ptx": read_ptx,
    **dict.fromkeys((".las", ".laz"), read_las),
}
_TABLES: dict[str, Callable[[Path, Thinning, Layout | None], RawCloud]] = {
    ".npz": read_npz,
    ".npy": read_npy,
    ".bin": read_bin,
    **dict.fromkeys((".txt", ".xyz", ".xyzrgb", ".xyzn", ".pts", ".csv", ".asc"), read_text),
}
SUFFIXES = (*_READERS, *_TABLES)
"""Suffixes of the files that `read_point_cloud` reads."""
