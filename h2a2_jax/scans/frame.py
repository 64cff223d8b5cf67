"""The frame of a scan: which way is up, which unit, how floor and walls lie.

Which way is up in a scan, and along which directions its walls stand, from the normals of its surfaces.

Floors, table tops and ceilings have normals along gravity, walls and cupboards across it (Gupta, Arbelaez, Malik,
"Perceptual organization and recognition of indoor scenes from RGB-D images", CVPR 2013, which refines a first guess
by the eigenvectors of what is nearly parallel and nearly perpendicular to it). Here the first guess is the best of a
grid of directions, so that a tilt of 30 degrees is no local matter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

from h2a2_jax.scans.formats.point_cloud import PointCloud
from h2a2_jax.scans.scan import Scan, points_in_box

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


AXES = "xyz"
_CLEAR, _CERTAIN = 1.25, 1.6  # by how much more a slab must hold than those across the other axes
_UNIT_RANGES = (("m", 0.3, 40), ("cm", 40, 700), ("mm", 700, 40e3))
"""Middle extents of rooms and parts of rooms: one of 8 m is 8, 800 or 8000, a corner of 1 m is 1, 100 or 1000."""


@dataclass(frozen=True)
class Guess:
    """What something looks like, beside what was said.

    Attributes:
        declared: what was said.
        guess: what it looks like; None if that cannot be told.
        certain: whether there is little doubt.
        evidence: the numbers behind, in words.
    """

    declared: str
    guess: str | None
    certain: bool
    evidence: str

    @property
    def differs(self) -> bool:
        """Whether it looks like something else than was said."""
        return self.guess not in (None, self.declared)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def guess_up(declared: str, scans: Sequence[Sequence[AxisFinding]]) -> Guess:
    """Which axis points up: a floor and a ceiling are the fullest slabs, and furniture stands on the floor.

    Args:
        declared: axis that is said to, with its sign.
        scans: findings along x, y, z of each; together they are surer than each alone.
    """
    if not scans:
        return Guess(declared, None, False, "no scan could be read")
    slabs = [float(np.mean([axes[i].slab for axes in scans])) for i in range(3)]
    best = int(np.argmax(slabs))
    shares = ", ".join(f"{AXES[i]} {slabs[i]:.0%}" for i in np.argsort(slabs)[::-1])
    evidence = f"share of points in the fullest slab across an axis: {shares}"
    if slabs[best] < _CLEAR * sorted(slabs)[1]:
        return Guess(declared, None, False, f"{evidence}: no floor stands out; is it tilted?")
    votes = sum(_points_along(axes[best]) for axes in scans)
    if 2 * abs(votes) < len(scans):
        # Which end is up stays open; what was declared is as good as its opposite.
        sign = "-" if declared == f"-{AXES[best]}" else ""
    else:
        sign = "-" if votes < 0 else ""
        evidence += f"; floor or furniture at its {'high' if votes < 0 else 'low'} end"
    certain = slabs[best] >= _CERTAIN * sorted(slabs)[1]  # less may be a wall of a corridor
    return Guess(declared, sign + AXES[best], certain, evidence)


def _points_along(axis: AxisFinding) -> int:
    """1 if an axis points up, -1 if down, 0 if that cannot be told."""
    if axis.low > 3 * axis.high:
        return 1
    if axis.high > 3 * axis.low:
        return -1
    return int(axis.lower_half > 0.52) - int(axis.lower_half < 0.48)


def guess_unit(declared: str, scans: Sequence[Sequence[AxisFinding]]) -> Guess:
    """Which unit makes rooms of rooms, by the middle one of a scan's three extents.

    Args:
        declared: unit that is said to be meant.
        scans: findings along x, y, z of each.
    """
    if not scans:
        return Guess(declared, None, False, "no scan could be read")
    extents = np.median([[axis.extent for axis in axes] for axes in scans], axis=0)
    middle = float(np.sort(extents)[1])
    shown = " x ".join(f"{extent:,.0f}" if extent >= 100 else f"{extent:.3g}" for extent in extents)
    unit = next((name for name, low, high in _UNIT_RANGES if low <= middle < high), None)
    return Guess(declared, unit, unit is not None, f"median extents {shown}; rooms measure 3 to 10 m")


MAX_TILT = math.radians(35)
"""Largest angle between z and gravity that is looked for."""
_CELL = 0.04  # m; one point each, so that what is near a sensor counts no more than what is far
_SUPPORTS = 40_000  # points whose neighbourhoods are planes
_NORMALS = 6_000
_NEIGHBOURS = 24
_FLATNESS = 0.02  # share of the variance of a neighbourhood across its plane
_GRID = math.radians(1.5)
_WIDTHS = tuple(math.radians(angle) for angle in (12, 6, 4))
_SURE_GAP = 0.08
_SURE_WALLS = 0.35
_UPRIGHT_WALL = 0.15  # sine of the tilt of a wall
_WALL_BIN = math.radians(1)


@dataclass(frozen=True, eq=False)
class Gravity:
    """The up direction of a scan.

    Attributes:
        up: unit vector, within `MAX_TILT` of z.
        tilt: angle between it and z (rad).
        sure: whether surfaces of two directions at least agree on it; one wall alone leaves it open.
    """

    up: Float[np.ndarray, " 3"]
    tilt: float
    sure: bool

    @property
    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """The smallest rotation that turns `up` to z."""
        axis = np.cross(self.up, [0.0, 0.0, 1.0])
        sine, cosine = float(np.linalg.norm(axis)), float(self.up[2])
        if sine < 1e-9:
            return np.eye(3)
        x, y, z = axis / sine
        skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        return np.eye(3) + sine * skew + (1 - cosine) * skew @ skew


@dataclass(frozen=True)
class Walls:
    """How the walls of a scan stand.

    Attributes:
        angle: by which they are turned against the x and y axes, in [-pi/4, pi/4) (rad, counter-clockwise).
        sure: whether most of them agree.
    """

    angle: float
    sure: bool

    @property
    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """The rotation about z that brings the walls along x and y."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


def surface_normals(points: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "n 3"]:
    """Normals at places spread evenly over the flat surfaces of a scan, of either sign; none of fewer than 24 points.

    Args:
        points: metres.
    """
    rng = np.random.default_rng(0)
    if len(points) > 1_000_000:
        points = points[rng.choice(len(points), 1_000_000, replace=False)]
    cells = np.floor((points - points.min(axis=0, initial=0)) / _CELL).astype(np.int64)
    _, first = np.unique(cells @ np.array([1, 1 << 20, 1 << 40]), return_index=True)
    supports = points[first].astype(np.float64)
    if len(supports) < _NEIGHBOURS:
        supports = points.astype(np.float64)
    if len(supports) < _NEIGHBOURS:
        return np.zeros((0, 3))
    if len(supports) > _SUPPORTS:
        supports = supports[rng.choice(len(supports), _SUPPORTS, replace=False)]
    places = supports[rng.choice(len(supports), min(len(supports), _NORMALS), replace=False)]
    _, near = cKDTree(supports).query(places, _NEIGHBOURS)
    offsets = supports[near] - supports[near].mean(axis=1, keepdims=True)
    variances, axes = np.linalg.eigh(np.einsum("nki,nkj->nij", offsets, offsets))
    flat = variances[:, 0] < _FLATNESS * variances.sum(axis=1)
    return axes[flat, :, 0]


def estimate_gravity(normals: Float[np.ndarray, "n 3"]) -> Gravity:
    """The direction along and across which the normals lie best, within `MAX_TILT` of z.

    Args:
        normals: unit vectors, see `surface_normals`.
    """
    up = np.array([0.0, 0.0, 1.0])
    if not len(normals):
        return Gravity(up, 0.0, False)
    candidates = _cap()
    sines = np.abs(normals.astype(np.float32) @ candidates.T.astype(np.float32))
    # A normal along a candidate has |cos| 1, one across it 0; what lies between says nothing.
    width = math.sin(_WIDTHS[0]) / 2
    votes = np.exp(-((sines / width) ** 2)) + 2 * np.exp(-(1 - sines**2) / width**2)
    # Where the scan leaves it open, the smaller tilt.
    up = candidates[np.argmax(votes.mean(axis=0) + 0.01 * candidates[:, 2])]
    gap = 0.0
    for width in _WIDTHS:
        cosines = np.abs(normals @ up)
        along, across = normals[cosines > math.cos(width)], normals[cosines < math.sin(width)]
        if not len(along) + len(across):
            break
        values, vectors = np.linalg.eigh(across.T @ across - along.T @ along)
        gap = float(values[1] - values[0]) / len(normals)
        if gap < _SURE_GAP:
            break
        up = vectors[:, 0] * np.sign(vectors[2, 0] or 1)
    tilt = math.acos(float(np.clip(up[2], -1, 1)))
    return Gravity(up, tilt, gap >= _SURE_GAP and tilt <= MAX_TILT)


def estimate_walls(normals: Float[np.ndarray, "n 3"]) -> Walls:
    """The angle of the walls, those that stand at right angles taken together.

    Args:
        normals: unit vectors of an upright scan.
    """
    upright = normals[np.abs(normals[:, 2]) < _UPRIGHT_WALL]
    if len(upright) < 20:
        return Walls(0.0, False)
    angles = np.arctan2(upright[:, 1], upright[:, 0]) % (math.pi / 2)
    bins = math.ceil(math.pi / 2 / _WALL_BIN)
    counts = np.bincount((angles / (math.pi / 2) * bins).astype(int) % bins, minlength=bins).astype(float)
    smooth = sum(np.roll(counts, shift) for shift in range(-2, 3))
    peak = (np.argmax(smooth) + 0.5) / bins * math.pi / 2
    for width in _WIDTHS:
        off = (angles - peak + math.pi / 4) % (math.pi / 2) - math.pi / 4
        peak += float(np.median(off[np.abs(off) < width]))
    off = (angles - peak + math.pi / 4) % (math.pi / 2) - math.pi / 4
    share = float((np.abs(off) < _WIDTHS[1]).mean())
    return Walls((peak + math.pi / 4) % (math.pi / 2) - math.pi / 4, share > _SURE_WALLS)


def _cap() -> Float[np.ndarray, "k 3"]:
    """Directions within `MAX_TILT` of z, evenly spread (a Fibonacci lattice)."""
    count = math.ceil(2 * math.pi * (1 - math.cos(MAX_TILT)) / _GRID**2)
    height = 1 - (np.arange(count) + 0.5) / count * (1 - math.cos(MAX_TILT))
    turn = np.arange(count) * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
