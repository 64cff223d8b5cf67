"""Flat surfaces of a scan: its floor, and gravity and the direction of walls by the normals of its surfaces.

Floors, table tops and ceilings have normals along gravity, walls and cupboards across it (Gupta, Arbelaez, Malik,
"Perceptual organization and recognition of indoor scenes from RGB-D images", CVPR 2013, which refines a first guess
by the eigenvectors of what is nearly parallel and nearly perpendicular to it). Here the first guess is the best of a
grid of directions, so that a tilt of 30 degrees is no local matter.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MAX_TILT = math.radians(35)  # between z and gravity
_CELL = 0.04  # m
_SUPPORTS = 40_000  # points whose neighbourhoods are planes
_VOTERS = 500
_NEIGHBOURS = 24
_FLATNESS = 0.02  # share of the variance of a neighbourhood across its plane
_GRID = math.radians(3)
_WIDTHS = tuple(math.radians(angle) for angle in (12, 6, 4))
_SURE_GAP = 0.08
_SURE_WALLS = 0.35
_UPRIGHT_WALL = 0.15  # sine of the tilt of a wall
_WALL_BIN = math.radians(1)

_SLAB = 0.03  # m, half the thickness of a plane
_FLOOR_SHARE = 0.03  # of the points, beyond what upright surfaces have in a slab
_BELOW = 0.02  # of the points may lie below a floor: reflections, strays
_STRAY = 0.3  # m
_FEW = 200  # cells


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


def without_strays(points: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "n 3"]:
    """Leave out the few points (m) that lie more than 30 cm off all but the outermost .2 % along some axis."""
    if not len(points):
        return points
    low, high = np.percentile(points, [0.2, 99.8], axis=0)
    return points[((points > low - _STRAY) & (points < high + _STRAY)).all(axis=1)]


def extents(points: Float[np.ndarray, "m 3"]) -> tuple[float, float, float]:
    """Extents of at least one point along x, y and z, between the .2 and the 99.8 percentiles."""
    low, high = np.percentile(points, [0.2, 99.8], axis=0)
    x, y, z = (high - low).tolist()
    return x, y, z


def slab_shares(heights: Float[np.ndarray, " m"]) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Places every 3 cm along an axis, and the share of the points within 3 cm of each; of at least one point."""
    low, high = np.percentile(heights, [0.5, 99.5])
    edges = np.arange(low - 2 * _SLAB, high + 3 * _SLAB, _SLAB)
    counts, _ = np.histogram(heights, edges)
    return edges[1:-1], (counts[:-1] + counts[1:]) / len(heights)


def find_floor(points: Float[np.ndarray, "m 3"]) -> float | None:
    """Return the height of the floor of a scan (m, z up): its lowest large plane with next to nothing below it.

    None where no plane is clear, for the floor is not seen, or is tilted, or of fewer than 200 cells of 4 cm.
    """
    points = cell_points(without_strays(points[:: max(1, len(points) // 200_000)]), most=40_000)
    if len(points) < _FEW:
        return None
    heights = points[:, 2]
    places, shares = slab_shares(heights)
    middle = (places[0] + places[-1]) / 2
    for i in np.flatnonzero(places <= middle + 4 * _SLAB):
        upright = float(np.median(shares[i + 4 : i + 20])) if i + 4 < len(shares) else 0.0
        if shares[i] - upright >= _FLOOR_SHARE and shares[i] >= shares[max(i - 2, 0) : i + 3].max():
            floor = float(np.median(heights[np.abs(heights - places[i]) < 0.05]))
            return floor if (heights < floor - 0.1).mean() <= _BELOW else None
    return None


def cell_points(points: Float[np.ndarray, "m 3"], most: int) -> Float[np.ndarray, "n 3"]:
    """Choose up to `most` points (m), one a cell of 4 cm: surfaces near a sensor count no more than far ones."""
    rng = np.random.default_rng(0)
    if len(points) > 1_000_000:
        points = points[rng.choice(len(points), 1_000_000, replace=False)]
    cells = np.floor((points - points.min(axis=0, initial=0)) / _CELL).astype(np.int64)
    _, first = np.unique(cells @ np.array([1, 1 << 20, 1 << 40]), return_index=True)
    chosen = points[first].astype(np.float64)
    return chosen if len(chosen) <= most else chosen[rng.choice(len(chosen), most, replace=False)]


def surface_normals(points: Float[np.ndarray, "m 3"], most: int = 6_000) -> Float[np.ndarray, "n 3"]:
    """Estimate normals, of arbitrary sign, at up to `most` places spread evenly over the flat surfaces of a scan (m).

    A scan of fewer than 24 points has none.
    """
    from scipy.spatial import cKDTree  # takes .2 s, for scans whose frame is to be found

    rng = np.random.default_rng(0)
    supports = cell_points(points, most=_SUPPORTS)
    if len(supports) < _NEIGHBOURS:
        supports = points[:_SUPPORTS].astype(np.float64)
    if len(supports) < _NEIGHBOURS:
        return np.zeros((0, 3))
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
