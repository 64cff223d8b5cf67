"""The frame of a scan: its up axis and unit by the spread of its points, gravity and walls by its surfaces.

Floors, table tops and ceilings have normals along gravity, walls and cupboards across it (Gupta, Arbelaez, Malik,
"Perceptual organization and recognition of indoor scenes from RGB-D images", CVPR 2013, which refines a first guess
by the eigenvectors of what is nearly parallel and nearly perpendicular to it). Here the first guess is the best of a
grid of directions, so that a tilt of 30 degrees is no local matter.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.point_cloud import ColorRange, PointCloud, unit_colors
from h2a2_jax.scans.scan import FAR_POINTS, Scan, ScanError, within_reach

UNITS: Mapping[str, float] = {"m": 1.0, "cm": 0.01, "mm": 0.001}
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

GREY = 0.5  # colour of points without colour: between black and white
NO_COLORS = "scans without colours, made grey"
_FAR = 100.0
_STEP = 96.0  # m; whole metres are exact in float32, and this is a multiple of 64 voxels of 1, 1.5 or 2 cm


def upright_matrix(up: str, unit: str) -> Float[np.ndarray, "4 4"]:
    """Return the matrix from a frame with that axis up (a key of `UPRIGHT`), in that unit, to metres with z up."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(UPRIGHT[up]) * UNITS[unit]
    return matrix


@dataclass(frozen=True, eq=False)
class PlacedCloud:
    """A scan, and its place in the frame of its file.

    Attributes:
        scan: points in metres, z up, without boxes.
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
    near = within_reach(name, points)
    if not near.all():
        notes[FAR_POINTS] += int((~near).sum())
        points, unit = points[near], unit[near]
    boxes, labels = np.zeros((0, 7), np.float32), np.zeros(0, np.int32)
    transform = matrix.astype(np.float32)
    return PlacedCloud(Scan(name, points.astype(np.float32), unit, boxes, labels, transform, dict(notes)), matrix)


_SLABS = 100  # along the longest side
_ENDS = 0.05
_MIDDLE = (0.15, 0.85)


@dataclass(frozen=True)
class AxisFinding:
    """Spread of points along one axis of the file.

    Attributes:
        extent: length between the .2 and the 99.8 percentile.
        slab: share of points in the fullest slab of 2 % of the longest extent: a floor or a ceiling across this axis.
        low: share of points in the lowest 5 % of the extent; `high` is that in the highest.
        lower_half: share below the middle of the points between 15 and 85 % of the extent: furniture.
    """

    extent: float
    slab: float
    low: float
    high: float
    lower_half: float


def spread(points: Float[np.ndarray, "m 3"]) -> tuple[AxisFinding, ...]:
    """Measure the spread of at least one point along x, y and z."""
    low, high = np.percentile(points, [0.2, 99.8], axis=0)
    extent = np.maximum(high - low, 1e-9)
    slab = extent.max() / _SLABS
    found = []
    for axis in range(3):
        bins = max(2, int(np.ceil(extent[axis] / slab)))
        counts, _ = np.histogram(points[:, axis], bins, (low[axis], low[axis] + bins * slab))
        fullest = float((counts[:-1] + counts[1:]).max() / len(points))
        place = (points[:, axis] - low[axis]) / extent[axis]
        middle = place[(place > _MIDDLE[0]) & (place < _MIDDLE[1])]
        lower_half = float((middle < 0.5).mean()) if len(middle) else 0.5
        ends = float((place < _ENDS).mean()), float((place > 1 - _ENDS).mean())
        found.append(AxisFinding(float(extent[axis]), fullest, *ends, lower_half))
    return tuple(found)


AXES = "xyz"
_CLEAR, _CERTAIN = 1.25, 1.6  # by how much more a slab must hold than those across the other axes
_UNIT_RANGES = (("m", 0.3, 40), ("cm", 40, 700), ("mm", 700, 40e3))
"""Middle extents of rooms and parts of rooms: one of 8 m is 8, 800 or 8000, a corner of 1 m is 1, 100 or 1000."""


@dataclass(frozen=True)
class Guess:
    """An up axis or a unit that points look like, beside the declared one.

    Attributes:
        declared: value that the user or the format gives.
        guess: value that the points look like; None if they leave it open.
        evidence: the numbers behind the guess, in words.
    """

    declared: str
    guess: str | None
    certain: bool
    evidence: str

    @property
    def differs(self) -> bool:
        """True if the guess is another than the declared value."""
        return self.guess not in (None, self.declared)


def guess_up(declared: str, scans: Sequence[Sequence[AxisFinding]]) -> Guess:
    """Guess the axis that points up: a floor and a ceiling are the fullest slabs, and furniture stands on the floor.

    `scans` has the findings along x, y, z of each scan; several scans are surer than one.
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
    """Return 1 if an axis points up, -1 if down, 0 if the points leave it open."""
    if axis.low > 3 * axis.high:
        return 1
    if axis.high > 3 * axis.low:
        return -1
    return int(axis.lower_half > 0.52) - int(axis.lower_half < 0.48)


def guess_unit(declared: str, scans: Sequence[Sequence[AxisFinding]]) -> Guess:
    """Guess the unit in which a scan is as large as a room, by the middle one of its three extents."""
    if not scans:
        return Guess(declared, None, False, "no scan could be read")
    extents = np.median([[axis.extent for axis in axes] for axes in scans], axis=0)
    middle = float(np.sort(extents)[1])
    shown = " x ".join(f"{extent:,.0f}" if extent >= 100 else f"{extent:.3g}" for extent in extents)
    unit = next((name for name, low, high in _UNIT_RANGES if low <= middle < high), None)
    return Guess(declared, unit, unit is not None, f"median extents {shown}; rooms measure 3 to 10 m")


MAX_TILT = math.radians(35)  # between z and gravity
_CELL = 0.04  # m; one point each, so that surfaces near a sensor count no more than far ones
_SUPPORTS = 40_000  # points whose neighbourhoods are planes
_VOTERS = 500
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
        tilt: angle between `up` and z (rad).
        sure: True if surfaces of two directions at least agree on it; one wall alone leaves it open.
    """

    up: Float[np.ndarray, " 3"]
    tilt: float
    sure: bool

    @property
    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """Smallest rotation that turns `up` to z."""
        axis = np.cross(self.up, [0.0, 0.0, 1.0])
        sine, cosine = float(np.linalg.norm(axis)), float(self.up[2])
        if sine < 1e-9:
            return np.eye(3)
        x, y, z = axis / sine
        skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        return np.eye(3) + sine * skew + (1 - cosine) * skew @ skew


@dataclass(frozen=True)
class Walls:
    """Direction of the walls of a scan.

    Attributes:
        angle: turn of the walls against the x and y axes, in [-pi/4, pi/4) (rad, counter-clockwise).
        sure: True if most walls agree.
    """

    angle: float
    sure: bool

    @property
    def rotation(self) -> Float[np.ndarray, "3 3"]:
        """Rotation about z that brings the walls along x and y."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


def surface_normals(points: Float[np.ndarray, "m 3"], most: int = 6_000) -> Float[np.ndarray, "n 3"]:
    """Estimate normals, of arbitrary sign, at up to `most` places spread evenly over the flat surfaces of a scan (m).

    A scan of fewer than 24 points has none.
    """
    from scipy.spatial import cKDTree  # takes .2 s, for scans whose frame is to be found

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
    places = supports[rng.choice(len(supports), min(len(supports), most), replace=False)]
    _, near = cKDTree(supports).query(places, _NEIGHBOURS)
    offsets = supports[near] - supports[near].mean(axis=1, keepdims=True)
    variances, axes = np.linalg.eigh(np.einsum("nki,nkj->nij", offsets, offsets))
    flat = variances[:, 0] < _FLATNESS * variances.sum(axis=1)
    return axes[flat, :, 0]


def estimate_gravity(normals: Float[np.ndarray, "n 3"]) -> Gravity:
    """Find the direction along and across which the normals of `surface_normals` lie best, within `MAX_TILT` of z."""
    up = np.array([0.0, 0.0, 1.0])
    if not len(normals):
        return Gravity(up, 0.0, False)
    candidates = _cap()
    # A first guess, which the loop below refines by all normals: some of them are enough.
    some = normals[:: math.ceil(len(normals) / _VOTERS)].astype(np.float32)
    squares = np.square(some @ candidates.T.astype(np.float32))
    # A normal along a candidate has |cos| 1, one across it 0; normals between the two do not count.
    width = math.sin(_WIDTHS[0]) / 2
    votes = np.exp(squares / -(width**2)) + 2 * np.exp((squares - 1) / width**2)
    # Where the scan leaves the direction open, the smaller tilt wins.
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
    """Find the angle of the walls modulo 90 degrees, by the unit normals of an upright scan."""
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
    """Return directions within `MAX_TILT` of z, evenly spread (a Fibonacci lattice)."""
    count = math.ceil(2 * math.pi * (1 - math.cos(MAX_TILT)) / _GRID**2)
    height = 1 - (np.arange(count) + 0.5) / count * (1 - math.cos(MAX_TILT))
    turn = np.arange(count) * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
