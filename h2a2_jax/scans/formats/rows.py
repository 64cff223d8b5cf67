"""Points of numpy's files (.npy, .npz) and of raw rows of floats (.bin)."""

import math
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud, Thinning
from h2a2_jax.scans.formats.columns import COLUMNS_NOT_USED, Layout, from_columns, plain, roles
from h2a2_jax.scans.formats.unnamed import WIDTHS, from_rows
from h2a2_jax.untrusted import check_growth
from h2a2_jax.untrusted.arrays import NotAnArray, check_archive, check_directory, read_header

_POINT_ARRAYS = (
    *("points", "xyz", "coords", "coordinates", "arr0", "point", "positions", "position", "pos", "vertices", "verts"),
    *("pointcloud", "pointclouds", "cloud", "pcd", "pcl", "pc", "coord", "data"),
)
_COLOR_ARRAYS = ("colors", "colours", "rgb", "color", "colour", "rgbs", "vertexcolors", "pointcolors")
_BIN_WIDTHS = (6, 4, 3, 5, 7, 8, 9, 10)  # the usual ones first
_PARTS, _PART = 24, 840  # of a file, and numbers of each, that tell points in a row from columns
_HEAD = 1 << 20  # bytes that the type and the width are found by


def read_npy(path: Path, thinning: Thinning, columns: Layout | None) -> RawCloud:
    """Read one array of points; `columns` gives the meaning of its columns."""
    with path.open("rb") as file:
        rows, turned = _array(path, file, path.stat().st_size, thinning)
    return from_rows(path, rows, columns).remarked(*turned)


def _array(path: Path, file: Any, size: int, thinning: Thinning) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read one array in numpy's format, or some of its rows, if the file can hold as many bytes as its header says.

    An array [w, n] of many points is transposed, with a remark.
    """
    try:
        shape, fortran, dtype = header = read_header(file)
    except NotAnArray as error:
        raise InputError(f"{path} is no numpy array or is cut off: {error}; save it again with numpy.save.") from error
    count = math.prod(shape)
    if header.size > size:
        raise InputError(
            f"{path} is cut off: its header says {quoted(shape)} of {quoted(dtype)}, but it has {size} bytes; copy it "
            "again."
        )
    remarks: tuple[str, ...] = ()
    if len(shape) == 2 and shape[0] in WIDTHS and shape[1] > WIDTHS[-1]:
        remarks = (f"has an array of the shape {list(shape)}, taken as {shape[1]:,} points of {shape[0]} numbers",)
        shape, fortran = shape[::-1], not fortran  # the same bytes
    try:
        if len(shape) == 2 and shape[0] and fortran and shape[1] <= WIDTHS[-1]:  # a column after the other
            rows = np.stack([thinning.read(file, dtype, shape[0]) for _ in range(shape[1])], axis=1)
        elif len(shape) == 2 and shape[0] and shape[1] and not fortran:
            rows = thinning.read(file, dtype, shape[0], shape[1]).reshape(-1, shape[1])
        elif len(shape) == 1:
            rows = thinning.read(file, dtype, shape[0])
        else:
            rows = Thinning().read(file, dtype, count).reshape(shape, order="F" if fortran else "C")
    except EOFError as error:
        raise InputError(f"{path} is cut off: of {count * dtype.itemsize} bytes {error}; copy it again.") from error
    return rows, remarks


def read_npz(path: Path, thinning: Thinning, columns: Layout | None) -> RawCloud:
    """Read an archive: an array of points and maybe one of colours, by their names, or arrays x, y, z (r, g, b)."""
    try:
        with path.open("rb") as file:
            check_directory(file)
            with zipfile.ZipFile(file) as archive:
                check_archive(archive, path.stat().st_size)
                return _from_archive(path, archive, thinning, columns)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no readable .npz ({quoted(error)}): copy it again or write it again.") from error


def _from_archive(path: Path, archive: zipfile.ZipFile, thinning: Thinning, columns: Layout | None) -> RawCloud:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    names, found = list(members), roles(list(members))
    points, colors = _named(names, _POINT_ARRAYS), _named(names, _COLOR_ARRAYS)
    read = [name for name in (points, colors) if name] if points else [names[place] for place in found.used]
    # Together: colours that are all alike, beside points that are not, are packed to a thousandth.
    stored, size = (sum(getattr(members[name], each) for name in read) for each in ("compress_size", "file_size"))
    check_growth(stored, size, f"its content ({quoted(', '.join(read), 60)})")
    if points:
        rows, turned = _member(path, archive, members[points], thinning)
        raw, used = from_rows(path, rows, columns, f"its array {points}").remarked(*turned), [points]
    elif all(found.axes):
        used = [names[place] for place in found.used]
        parts = {name: _member(path, archive, members[name], thinning)[0] for name in used}
        if len({values.shape for values in parts.values()}) > 1 or next(iter(parts.values())).ndim != 1:
            shapes = ", ".join(f"{name} {values.shape}" for name, values in parts.items())
            raise InputError(f"{path} has arrays of different shapes ({shapes}); expected are as many numbers of each.")
        raw = from_columns(path, parts).remarked(after=[COLUMNS_NOT_USED] * bool(columns))
    else:
        raise InputError(
            f"{path} has the arrays {quoted(', '.join(names)) or 'none'}; expected is one called "
            f"{' or '.join(_POINT_ARRAYS[:3])}."
        )
    hues = raw.colors
    if points and colors:
        (hues, _), used = _member(path, archive, members[colors], thinning), [*used, colors]
        if hues.ndim == 2 and hues.shape[1] == 4 and len(hues) == len(raw.points):
            hues = hues[:, :3]
        if hues.shape != raw.points.shape or hues.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: its array {colors} is {hues.dtype} of shape {hues.shape}, its points are "
                f"{raw.points.shape}; expected are as many colours of three numbers."
            )
    unused = [name for name in names if name not in used]
    remark = f"has its points in {', '.join(used)}, and arrays that are not used: {', '.join(unused)}"
    return replace(raw, colors=hues).remarked(after=[remark] * bool(unused))


def _named(names: Sequence[str], known: tuple[str, ...]) -> str | None:
    """Return the first of the known names that an array has, however it is spelt."""
    spelt = {plain(name): name for name in reversed(names)}
    return next((spelt[name] for name in known if name in spelt), None)


def _member(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, thinning: Thinning
) -> tuple[np.ndarray, tuple[str, ...]]:
    with archive.open(info) as file:
        return _array(path, file, info.file_size, thinning)


def read_bin(path: Path, thinning: Thinning, columns: Layout | None) -> RawCloud:
    """Read rows of floats, whose type and number per row are found by the values, or by `columns`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
        dtype = np.dtype("<f8" if _is_double(head) else "<f4")
        widths = _BIN_WIDTHS if columns is None else (len(columns),)
        if size % dtype.itemsize or not any(size % (dtype.itemsize * width) == 0 for width in widths):
            shown = "6, 4 or 3" if columns is None else str(len(columns))
            raise InputError(
                f"{path} has {size} bytes, which are no whole rows of {shown} {dtype} numbers"
                f"{', nor of 5 or 7 to 10' * (columns is None)}: it is cut off or of another type; write x, y, z, r, "
                "g, b in float32, or say --columns."
            )
        some = np.frombuffer(head, dtype, len(head) // dtype.itemsize)
        if len(some) and _usual(some) < 0.5:
            raise InputError(f"{path} holds neither float32 nor float64 numbers, as coordinates are: write it again.")
        with np.errstate(invalid="ignore"):
            width = len(columns) if columns else _row_width(some, size // dtype.itemsize)
            is_planar = columns is None and _is_planar(file, dtype, size // dtype.itemsize)
        if is_planar:
            raise InputError(
                f"{path} looks as if all x came before all y, z and what follows: write a point after the other, or "
                "the array to .npy."
            )
        file.seek(0)
        values = thinning.read(file, dtype, size // (dtype.itemsize * width), width)
    with np.errstate(invalid="ignore"):  # bytes of another type may be signalling NaN
        raw = from_rows(path, values, columns, explain=True)
    return replace(raw, assumed=(" and ".join([f"is read as {dtype}", *raw.assumed]),))


def _is_double(content: bytes) -> bool:
    """Return True if bytes are numbers of a usual size as float64 and not as float32."""
    if len(content) % 8 or not content:
        return False
    doubles, singles = np.frombuffer(content, "<f8"), np.frombuffer(content, "<f4")
    is_double = _usual(doubles) > 0.99
    # The lower halves of whole numbers in float64 are 0.
    return bool(is_double and (_usual(singles) < 0.98 or (not singles[::2].any() and singles[1::2].any())))


def _is_planar(file: Any, dtype: np.dtype, count: int) -> bool:
    """Return True if numbers are alike in a part of the file and not in others: a column after the other.

    Taking every w-th number of a part makes it no more alike then, whatever w.
    """
    length = min(_PART, count // _PARTS)
    if length < 10 * _BIN_WIDTHS[-1]:
        return False
    parts = []
    for i in range(_PARTS):
        file.seek((count * i // _PARTS) * dtype.itemsize)
        parts.append(np.frombuffer(file.read(length * dtype.itemsize), dtype).astype(np.float64))
    some = np.stack(parts)
    if not np.isfinite(some).all() or np.abs(some).max() > 1e9:
        return False
    whole = np.log(some.std(axis=1) + 1e-6)
    gains = []
    for width in _BIN_WIDTHS:
        rows = some[:, : length // width * width].reshape(_PARTS, -1, width)
        gains.append(float(np.median(whole - np.log(rows.std(axis=1, ddof=1) + 1e-6).mean(axis=1))))
    centres = some.mean(axis=1)
    differ = np.ptp(whole) > 0.3 or np.ptp(centres) > 0.5 * some.std(axis=1).mean()
    return max(gains) < 0.03 + 2 * _BIN_WIDTHS[-1] / length and bool(differ)


def _usual(values: np.ndarray) -> float:
    """Share of numbers that coordinates or colours may be."""
    sizes = np.abs(values)
    return float((np.isnan(values) | (sizes == 0) | ((sizes > 1e-7) & (sizes < 1e8))).mean())


def _row_width(values: np.ndarray, count: int) -> int:
    """Guess the numbers per row: the period in which columns are most alike, 6 of few rows or without a difference."""
    widths = [width for width in _BIN_WIDTHS if count % width == 0]
    some = values.astype(np.float64)
    if len(widths) == 1 or len(some) < 12 * 20:
        return widths[0]
    some[~np.isfinite(some) | (np.abs(some) > 1e9)] = np.nan

    def spread(width: int) -> float:  # mean code length of a number, with a normal distribution per column
        rows = some[: len(some) // width * width].reshape(-1, width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(np.mean(np.log(np.nan_to_num(np.nanstd(rows, axis=0)) + 1e-6)))

    spreads = {width: spread(width) for width in widths}
    best = widths[0]
    for width in widths[1:]:
        # Rows of 3 are rows of 6 as well, and those of 4 rows of 8: the longer ones must be clearly better.
        margin = -0.05 if best == 6 and width == 3 else 0.05 if width not in (3, 4) else 0.0
        if spreads[width] < spreads[best] - margin:
            best = width
    return best
