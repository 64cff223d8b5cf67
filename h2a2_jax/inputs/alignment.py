"""Which way is up in a scan, and along which directions its walls stand, from the normals of its surfaces.

Floors, table tops and ceilings have normals along gravity, walls and cupboards across it (Gupta, Arbelaez, Malik,
"Perceptual organization and recognition of indoor scenes from RGB-D images", CVPR 2013, which refines a first guess
by the eigenvectors of what is nearly parallel and nearly perpendicular to it). Here the first guess is the best of a
grid of directions, so that a tilt of 30 degrees is no local matter.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

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
