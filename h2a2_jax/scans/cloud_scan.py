"""A scan of a point cloud alone: from the frame and unit of a file, or of arrays, to metres with z up."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.point_cloud import ColorRange, PointCloud, unit_colors
from h2a2_jax.scans.scan import FAR_POINTS, Scan, ScanError, within_reach

GREY = 0.5
"""Of points without colour: what is between black and white."""
NO_COLORS = "scans without colours, made grey"
_FAR = 100.0
_STEP = 96.0  # m; whole metres are exact in float32, and this is a multiple of 64 voxels of 1, 1.5 or 2 cm


@dataclass(frozen=True, eq=False)
class PlacedCloud:
    """A scan, and where it was exactly.

    Attributes:
        scan: in metres, z up, without boxes.
        matrix: `scan.transform` in float64, for map coordinates have more digits than float32.
    """

    scan: Scan
    matrix: Float[np.ndarray, "4 4"]


def place_cloud(
    name: str,
    cloud: PointCloud,
    matrix: Float[np.ndarray, "4 4"],
    colors: ColorRange = "auto",
    *,
    colors_hint: str = "",
) -> PlacedCloud:
    """A scan of points as their file has them.

    Without colours it is made grey. Far from the origin (in the frame of a map, for example) it is shifted there by
    multiples of 96 m, which leaves its voxels as they are at all levels.

    Args:
        name: of the scan.
        cloud: points and colours.
        matrix: from the file's frame and unit to metres, z up.
        colors: range of the colours.
        colors_hint: what else to do about another range than expected, as in "say --colors".

    Raises:
        ScanError: there is no usable point, most are too far away, or the colours are in another range.
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
    near = within_reach(name, points)
    if not near.all():
        notes[FAR_POINTS] += int((~near).sum())
        points, unit = points[near], unit[near]
    boxes, labels = np.zeros((0, 7), np.float32), np.zeros(0, np.int32)
    transform = matrix.astype(np.float32)
    return PlacedCloud(Scan(name, points.astype(np.float32), unit, boxes, labels, transform, dict(notes)), matrix)
