"""What one scan is like: the numbers from which `check` guesses frames, units and mistakes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from h2a2_jax.inputs.point_cloud import PointCloud
from h2a2_jax.inputs.scan import Scan, points_in_box

_SLABS = 100  # along the longest side
_ENDS = 0.05
_MIDDLE = (0.15, 0.85)


@dataclass(frozen=True)
class AxisFinding:
    """How points spread along one axis of the file.

    Attributes:
        extent: between the .2 and the 99.8 percentile.
        slab: share of points in the fullest slab of 2 % of the longest extent: a floor or a ceiling across this axis.
        low: share of points in the lowest 5 % of the extent.
        high: share of points in the highest 5 %.
        lower_half: of what lies between 15 and 85 % of the extent, the share below the middle: furniture.
    """

    extent: float
    slab: float
    low: float
    high: float
    lower_half: float


@dataclass(frozen=True)
class BoxFinding:
    """One box.

    Attributes:
        label: its class.
        size: dx, dy, dz (m).
        held: points in it.
        held_clockwise: points it would hold if yaw counted clockwise.
        held_from_bottom: points it would hold if its centre were that of its bottom.
        turned: whether yaw makes a difference.
        outside: whether it does not even meet the box around all points.
    """

    label: int
    size: tuple[float, float, float]
    held: int
    held_clockwise: int
    held_from_bottom: int
    turned: bool
    outside: bool


@dataclass(frozen=True)
class ScanFinding:
    """One scan.

    Attributes:
        split: "train" or "val".
        name: of the scan.
        error: why it cannot be used; then the rest is that of no points, but for `axes` if the file can be read.
        points: that can be used.
        axes: along x, y, z of the file, in its unit.
        colors: smallest and largest number, in the file's scale; None without colours.
        duplicates: share of points that are exactly where another one is.
        boxes: that can be used, in metres, z up; not those to be ignored.
        notes: what loading left out or repaired, a count by kind.
        assumed: sentences on what the file leaves open.
    """

    split: str
    name: str
    error: str | None = None
    points: int = 0
    axes: tuple[AxisFinding, ...] = ()
    colors: tuple[float, float] | None = None
    duplicates: float = 0.0
    boxes: tuple[BoxFinding, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


def examine(split: str, scan: Scan, cloud: PointCloud | None = None) -> ScanFinding:
    """Measures one scan.

    Args:
        split: it is in.
        scan: in metres, z up.
        cloud: the same as its file has it; None if that is no other frame.
    """
    points = scan.points if cloud is None else cloud.points
    colors = scan.colors if cloud is None else cloud.colors
    low, high = scan.points.min(axis=0), scan.points.max(axis=0)
    return ScanFinding(
        split,
        scan.name,
        points=len(scan.points),
        axes=spread(points),
        colors=None if colors is None or not len(colors) else (float(colors.min()), float(colors.max())),
        duplicates=_duplicates(scan.points),
        boxes=tuple(
            _box(scan.points, box, int(label), low, high)
            for box, label in zip(scan.boxes, scan.labels, strict=True)
            if label >= 0
        ),
        notes=dict(scan.notes),
        assumed=() if cloud is None else cloud.assumed,
    )


def spread(points: Float[np.ndarray, "m 3"]) -> tuple[AxisFinding, ...]:
    """How points spread along x, y and z; at least one point."""
    low, high = np.percentile(points, [0.2, 99.8], axis=0)
    extent = np.maximum(high - low, 1e-9)
    slab = extent.max() / _SLABS
    found = []
    for axis in range(3):
        bins = max(2, int(np.ceil(extent[axis] / slab)))
        counts, _ = np.histogram(points[:, axis], bins, (low[axis], low[axis] + bins * slab))
        place = (points[:, axis] - low[axis]) / extent[axis]
        middle = place[(place > _MIDDLE[0]) & (place < _MIDDLE[1])]
        found.append(
            AxisFinding(
                float(extent[axis]),
                float((counts[:-1] + counts[1:]).max() / len(points)),
                float((place < _ENDS).mean()),
                float((place > 1 - _ENDS).mean()),
                float((middle < 0.5).mean()) if len(middle) else 0.5,
            )
        )
    return tuple(found)


def _duplicates(points: np.ndarray) -> float:
    bits = np.ascontiguousarray(points, np.float32).view(np.uint32).astype(np.uint64)
    mixed = bits @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
    return 1 - len(np.unique(mixed)) / len(points)


def _box(points: np.ndarray, box: np.ndarray, label: int, low: np.ndarray, high: np.ndarray) -> BoxFinding:
    # Only what is near: boxes are small, scans are not.
    reach = 1.5 * np.linalg.norm(box[3:6])
    near = points[(np.abs(points - box[:3]) <= reach).all(axis=1)]
    clockwise, raised = box.copy(), box.copy()
    clockwise[6] *= -1
    raised[2] += box[5] / 2
    dx, dy, dz = (float(size) for size in box[3:6])
    cos, sin = np.abs(np.cos(box[6])), np.abs(np.sin(box[6]))
    half = np.array([dx * cos + dy * sin, dx * sin + dy * cos, dz]) / 2
    held, held_clockwise, held_from_bottom = (int(points_in_box(near, b).sum()) for b in (box, clockwise, raised))
    return BoxFinding(
        label,
        (dx, dy, dz),
        held,
        held_clockwise,
        held_from_bottom,
        bool(cos * sin > 0.1),
        bool((box[:3] + half < low).any() or (box[:3] - half > high).any()),
    )
