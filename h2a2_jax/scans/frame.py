"""The place of a scan in the frame that a detector expects: metres, z up, near the origin, floors at a known height."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.colors import GREY
from h2a2_jax.scans.formats.point_cloud import ColorRange, PointCloud, unit_colors
from h2a2_jax.scans.scan import FAR_POINTS, Scan, ScanError, within_reach
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.surfaces import find_floor

UNITS: Mapping[str, float] = {"m": 1.0, "cm": 0.01, "mm": 0.001, "ft": 0.3048, "in": 0.0254}
"""Metres in a unit."""
UPRIGHT: Mapping[str, Sequence[Sequence[int]]] = {
    "z": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "-z": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "y": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "-y": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "x": ((0, 1, 0), (0, 0, 1), (1, 0, 0)),
    "-x": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
}
"""Rotation that turns the axis which points up in a file to z."""

NO_COLORS = "scans without colours, made grey"
MOVED = "scans brought to the floor, or the view, of the dataset"
_FAR = 100.0
_STEP = 96.0  # m; whole metres are exact in float32, and this is a multiple of 64 voxels of 1, 1.5 or 2 cm


def upright_matrix(up: str, unit: str) -> Float[np.ndarray, "4 4"]:
    """Return the matrix from a frame with that axis up (a key of `UPRIGHT`), in that unit, to metres with z up."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(UPRIGHT[up]) * UNITS[unit]
    return matrix


def respelt(text: str, name: str, value: str, columns: str = "columns") -> str:
    """Respell the flags of a remark, "--colors=0-255" and "--columns", for callers that have no command line.

    `name` and `columns` stand for the flags, and `value` is the form of a value behind the name, as in "={!r}".
    """

    def respell(flag: re.Match[str]) -> str:
        return (name if flag[1] == "colors" else columns) + (value.format(flag[2]) if flag[2] else "")

    return re.sub(r"--(colors|columns)(?:=([\w-]+))?", respell, text)


@dataclass(frozen=True, eq=False)
class PlacedCloud:
    """A scan, and its place in the frame of its file.

    Attributes:
        scan: points in metres, z up, without boxes.
        matrix: `scan.transform` in float64, for map coordinates have more digits than float32.
        rows: number of each point among those of the file, from 0; None: all of them are there.
    """

    scan: Scan
    matrix: Float[np.ndarray, "4 4"]
    rows: Int[np.ndarray, " m"] | None = None


def place_cloud(
    name: str,
    cloud: PointCloud,
    matrix: Float[np.ndarray, "4 4"],
    colors: ColorRange = "auto",
    *,
    colors_hint: str = "",
) -> PlacedCloud:
    """Make a scan of the points of a file, with the matrix from the file's frame and unit to metres, z up.

    A scan without colours is made grey. A scan far from the origin (in the frame of a map, for example) is shifted
    there by multiples of 96 m, which leaves its voxels as they are at all levels. `colors_hint` is the remedy for
    colours in another range than `colors`, as in "say --colors".

    Raises:
        ScanError: no point is usable, most are too far away, or the colours are in another range.
    """
    notes: Counter[str] = Counter(cloud.notes)
    if not len(cloud.points):
        raise ScanError(name, f"Scan {name} has no usable point: it is empty or all its points are NaN.")
    try:
        unit = unit_colors(cloud, colors)
    except InputError as error:
        raise ScanError(name, f"Scan {name}: {error}{f', or {colors_hint}' if colors_hint else ''}.") from error
    if unit is None:
        unit = np.full((len(cloud.points), 3), GREY, np.float32)
        notes[NO_COLORS] += 1
    matrix = matrix.astype(np.float64)
    points = cloud.points @ matrix[:3, :3].T + matrix[:3, 3]
    if np.abs(points).max() > _FAR:
        middle = np.median(points, axis=0)
        shift = -_STEP * np.round(middle / _STEP) * (np.abs(middle) > _FAR)
        matrix[:3, 3] += shift
        points = points + shift
    near, rows = within_reach(name, points), cloud.rows
    if not near.all():
        notes[FAR_POINTS] += int((~near).sum())
        points, unit = points[near], unit[near]
        rows = np.flatnonzero(near) if rows is None else rows[near]
    boxes, labels = np.zeros((0, 7), np.float32), np.zeros(0, np.int32)
    transform = matrix.astype(np.float32)
    return PlacedCloud(Scan(name, points.astype(np.float32), unit, boxes, labels, transform, dict(notes)), matrix, rows)


_NEAR_FLOOR = 0.05  # m, half of what augmentation shifts a scan by
_LEARNT_TURN = math.radians(30)  # of a view, by augmentation
_VIEW = math.radians(15), math.radians(60)  # from the middle of a camera's view to its sides
_NEAREST, _NEAR = 0.4, 4.0  # m, of what a camera sees
_VIEWED = 100_000  # points
_LINE = math.radians(1)  # width of a line of sight
_DEEP, _MOST_DEEP = 0.5, 0.2  # m, and share of the points in lines of sight that show things so far apart


Floor = float | Literal["auto", "keep"]
"""Height of a floor in a file (m, along the axis that points up); "auto": as found, "keep": heights are left alone."""


def checked_floor(floor: Floor | str, name: str) -> Floor:
    """Return a floor as it is, or of its text; raise InputError, with the name of the argument, for what is none."""
    if floor in ("auto", "keep"):
        return cast(Floor, floor)
    try:
        height = float(floor)
    except (TypeError, ValueError):
        height = math.nan
    if not math.isfinite(height):
        raise InputError(f"{name} is {floor!r}; expected is auto, keep or the height of the floor in metres.")
    return height


def place_as_dataset(
    placed: PlacedCloud, spec: DatasetSpec, floor: Floor = "auto", flag: str | None = None
) -> tuple[PlacedCloud, list[str]]:
    """Bring a scan (m, z up) into the frame that a dataset has its scans in, with remarks on what was done.

    The floor goes to the dataset's height, for networks see more than differences of heights: the floors of a dataset
    all lie at the same place in the grids of the coarse voxels. One within 5 cm is left where it is. Where the scans of
    the dataset are views along y (`DatasetSpec.faces_y`), a view from the origin in another direction is turned there.
    `flag` is the form in which the remarks name the argument `floor` and its value, if the user has one.
    """
    remarks = []
    if spec.faces_y and (turn := _turn_to_y(placed.scan.points)) is not None:
        cos, sin = math.cos(turn), math.sin(turn)
        placed = moved(placed, np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]))
        remarks.append(
            f"is a view from its origin, turned by {math.degrees(turn):.0f} degrees: views of {spec.name} are along y"
        )
    if floor == "keep":
        return placed, remarks
    origin = float(placed.matrix[2, 3])  # of the file
    found = find_floor(placed.scan.points) if floor == "auto" else floor + origin
    if found is None:
        remarks.append(
            f"shows no clear floor: its heights are kept, which is right if its floor is at {spec.floor:g} m, as in "
            f"{spec.name}{'; else say ' + flag.split('=')[0] + '=HEIGHT' if flag else ''}"
        )
        return placed, remarks
    if abs(found - spec.floor) > _NEAR_FLOOR:
        placed = moved(placed, np.eye(3), np.array([0.0, 0.0, spec.floor - found]))
        if floor == "auto":
            left = f"; {flag.format('keep')} leaves it" if flag else ""
            height = f"{found - origin:.2f} m, brought to {spec.floor:g} m"
            remarks.append(f"has its floor at {height}, where the floors of {spec.name} are{left}")
    return placed, remarks


def moved(
    placed: PlacedCloud, rotation: Float[np.ndarray, "3 3"], shift: Float[np.ndarray, " 3"] | None = None
) -> PlacedCloud:
    """Turn a scan, then shift it (m). Boxes go with it where the turn is about z."""
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation, 0.0 if shift is None else shift
    matrix, boxes = motion @ placed.matrix, placed.scan.boxes.astype(np.float64)
    points = placed.scan.points.astype(np.float64) @ rotation.T + motion[:3, 3]
    boxes[:, :3] = boxes[:, :3] @ rotation.T + motion[:3, 3]
    boxes[:, 6] += math.atan2(rotation[1, 0], rotation[0, 0])
    transform = matrix.astype(np.float32)
    scan = replace(placed.scan, points=points.astype(np.float32), boxes=boxes.astype(np.float32), transform=transform)
    return PlacedCloud(scan, matrix, placed.rows)


def camera_direction(points: Float[np.ndarray, "m 3"]) -> float | None:
    """Return the direction (rad, from x to y) of the view of a camera at the origin; None for another scan (m, z up).

    A view has nothing next to the camera, reaches less than 60 degrees to its sides, and shows one surface along most
    lines of sight, where a scan from several places shows the walls behind the furniture.
    """
    some = points[:: max(1, len(points) // _VIEWED)].astype(np.float64)
    across, distances = np.linalg.norm(some[:, :2], axis=1), np.linalg.norm(some, axis=1)
    nearest, near = np.percentile(across, [2, 20])
    # A room whose corner is the origin is no view: it has points next to it.
    if nearest < _NEAREST or near > _NEAR:
        return None
    directions = some[:, :2] / np.maximum(across, 1e-6)[:, None]
    middle = math.atan2(*directions.mean(axis=0)[::-1])
    azimuth = np.arctan2(directions[:, 1], directions[:, 0])
    off = np.abs((azimuth - middle + math.pi) % (2 * math.pi) - math.pi)
    if not _VIEW[0] < np.percentile(off, 98) < _VIEW[1]:
        return None
    elevation = np.arcsin(some[:, 2] / np.maximum(distances, 1e-6))
    lines = np.floor(np.stack([azimuth, elevation]) / _LINE).astype(np.int64)
    _, line, counts = np.unique(lines[0] * 1000 + lines[1], return_inverse=True, return_counts=True)
    nearest_of, farthest_of = np.full(len(counts), np.inf), np.zeros(len(counts))
    np.minimum.at(nearest_of, line, distances)
    np.maximum.at(farthest_of, line, distances)
    is_seen = counts[line] > 2
    is_deep = (farthest_of - nearest_of > _DEEP)[line]
    return middle if is_seen.any() and is_deep[is_seen].mean() < _MOST_DEEP else None


def _turn_to_y(points: Float[np.ndarray, "m 3"]) -> float | None:
    """Quarter turns about z (rad) that bring a camera's view from the origin to y; None for no view, or one along y."""
    middle = camera_direction(points)
    if middle is None:
        return None
    quarters = round((math.pi / 2 - middle) / (math.pi / 2)) % 4
    rest = abs((math.pi / 2 - middle - quarters * math.pi / 2 + math.pi) % (2 * math.pi) - math.pi)
    return quarters * math.pi / 2 if quarters and rest < _LEARNT_TURN else None
