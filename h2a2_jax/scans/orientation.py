"""The axis of a file that points up, by what its points show.

No single sign tells a floor from a wall. Each sign gives each of the six axes that may point up a vote, a difference of
log-odds; an axis is named only where the votes together are clear and several signs agree:

| sign | the axis that points up |
|---|---|
| floor | has a large plane at its low end and next to nothing below it |
| furniture | has things that touch that plane, and most of them near it |
| walls | is the one that upright surfaces of any direction are along: turned or round things are turned about it |
| proportions | is that of a room: 2.6 m or so high, wider than high |
| camera | is across the view of a camera at the origin: of its usual frames, z or x forward, one is likelier |

One plane that holds most of a scan, a wall or a floor alone, names no axis unless a camera's frame agrees. The weights
are fitted to procedural rooms (`python -m benchmarks.orientation --fit`), which also measures how often the decision
is right, wrong and silent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.scans.frame import UPRIGHT
from h2a2_jax.scans.surfaces import (
    cell_points,
    estimate_gravity,
    estimate_walls,
    extents,
    slab_shares,
    surface_normals,
    without_strays,
)

AXES = tuple(UPRIGHT)
"""The six axes that may point up, in the order of all votes."""
SIGNS = ("floor", "furniture", "walls", "proportions", "camera")

_OUTER = 0.35  # of the extent: planes nearer to the middle are no floor
_CLEAR_OF_PLANES = 0.08  # m
_TOUCHING = (0.2, 0.5)  # m; legs thinner than a sensor's resolution leave gaps below seats
_VOXEL = 0.06  # m
_THING = 15  # points 4 cm apart
_FURNITURE = 1.1  # m above the floor
_ROOM_HEIGHT = 2.6  # m
_STOREY = 3.8  # m, which few storeys exceed
_PLACES = 3_000
_LARGEST = 100.0  # m; a scan in another unit would fill the memory
_CONE = 0.95  # tangent of half the widest field of view of a camera
_RANGE = 8.0  # m, of a depth camera

FEATURES = ("plane", "below", "standing", "low", "round", "flatness", "height", "room")
WEIGHTS: Mapping[str, float] = {
    "plane": 10.99,
    "below": -0.65,
    "standing": 1.57,
    "low": 6.98,
    "round": 0.65,
    "flatness": 0.21,
    "height": -3.14,
    "room": -2.27,
}
"""Log-odds per unit of each feature of `_features`, in the order of `FEATURES`."""
_PARTS = {"plane": "floor", "below": "floor", "standing": "furniture", "low": "furniture", "round": "walls"} | {
    "flatness": "walls",
    "height": "proportions",
    "room": "proportions",
}
_ALONG_VIEW, _USUAL_CAMERA = -4.0, 1.5
_PRIOR = 0.5  # for z: most files have it up
_CLEAR = 2.0  # of votes between the best axis and the next
_AGREEING, _AGREES = 2, 0.3  # signs, each by a difference of votes
_CERTAIN = 5.0
_ONE_SURFACE = 0.55  # of the points


@dataclass(frozen=True, eq=False)
class UpVotes:
    """The votes of one scan.

    Attributes:
        votes: by sign, log-odds of each axis of `AXES`.
        one_surface: True if one plane holds most of the scan.
        high: True if each extent is more than the height of a storey: floors above one another hide which way is up
            from the signs other than the floor and the camera.
    """

    votes: Mapping[str, tuple[float, ...]]
    one_surface: bool
    high: bool = False


def up_votes(points: Float[np.ndarray, "m 3"]) -> UpVotes:
    """Let the points of a scan (m, any axis up) vote on the axis that points up.

    One of fewer than 200 cells of 4 cm, or of more than 100 m, does not vote.
    """
    rows, largest = features(points)
    votes = {sign: np.zeros(6) for sign in SIGNS}
    if rows is not None:
        for i, name in enumerate(FEATURES):
            votes[_PARTS[name]] += WEIGHTS[name] * rows[:, i]
        votes["camera"] = _camera_votes(points)
    relative = {sign: tuple((vote - vote.mean()).round(2).tolist()) for sign, vote in votes.items()}
    return UpVotes(relative, largest > _ONE_SURFACE, rows is not None and min(extents(points)) > _STOREY)


def features(points: Float[np.ndarray, "m 3"]) -> tuple[Float[np.ndarray, "6 f"] | None, float]:
    """Return `FEATURES` of each axis of `AXES`, and the share of the largest plane; None, 0 of too few points."""
    points = without_strays(points)
    if not len(points) or np.ptp(points, axis=0).max() > _LARGEST:
        return None, 0.0
    points = cell_points(points, most=40_000)
    if len(points) < 200:
        return None, 0.0
    normals = surface_normals(points, _PLACES)
    rows: dict[str, list[float]] = {}
    largest = 0.0
    for axis in "zyx":
        upright, planes, turned = _stand_up(points, normals, axis)
        largest = max(largest, *(share for _, share in planes.values()))
        rows[axis], rows[f"-{axis}"] = _features(upright, planes, turned)
    return np.array([rows[axis] for axis in AXES]), largest


Planes = Mapping[tuple[int, int], tuple[float, float]]


def _stand_up(
    points: Float[np.ndarray, "m 3"], normals: Float[np.ndarray, "n 3"], axis: str
) -> tuple[Float[np.ndarray, "m 3"], Planes, Float[np.ndarray, "n 3"]]:
    """Turn a scan so that an axis, or gravity near it, is z and walls are along x and y; find its six outer planes.

    Planes are by axis and end (0 low, 1 high): place, and share of the points.
    """
    rotation = np.array(UPRIGHT[axis], np.float64)
    gravity = estimate_gravity(normals @ rotation.T)
    if gravity.sure:
        rotation = gravity.rotation @ rotation
    walls = estimate_walls(normals @ rotation.T)
    if walls.sure:
        rotation = walls.rotation @ rotation
    upright = points @ rotation.T
    planes = {(i, end): plane for i in range(3) for end, plane in enumerate(_outer_planes(upright[:, i]))}
    return upright, planes, normals @ rotation.T


def _outer_planes(heights: Float[np.ndarray, " m"]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Find the outermost large planes across an axis at its low and high end: the place and the share of each."""
    places, shares = slab_shares(heights)
    low, high = np.percentile(heights, [0.5, 99.5])
    margin = _OUTER * (high - low)

    def plane(outer: np.ndarray, outermost: int) -> tuple[float, float]:
        first = np.flatnonzero(outer & (shares >= shares[outer].max() / 2))[outermost]
        near = np.arange(max(first - 2, 0), min(first + 3, len(shares)))
        best = near[np.argmax(shares[near])]
        return float(places[best]), float(shares[best])

    return plane(places < low + margin, 0), plane(places > high - margin, -1)


def _features(upright: np.ndarray, planes: Planes, normals: np.ndarray) -> tuple[list[float], list[float]]:
    """Features of an axis with the floor at its low end, and of its opposite with the floor at the high end."""
    things = upright[_off_planes(upright, planes)]
    owners = _connected(things)
    tilts = np.abs(normals)
    is_upright = tilts[:, 2] < 0.14
    count = max(len(normals), 1)
    extents = np.diff(np.percentile(upright, [0.5, 99.5], axis=0), axis=0)[0] + 0.05
    of_axis = [
        float(np.log((is_upright & (tilts[:, :2].min(axis=1) > 0.26)).sum() / count + 0.003)),
        float((is_upright | (tilts[:, 2] > 0.99)).sum() / count),
        float(np.log(extents[2] / np.sqrt(extents[0] * extents[1]))),
        float(abs(np.log(extents[2] / _ROOM_HEIGHT))),
    ]

    def of_end(end: int) -> list[float]:
        place, share = planes[2, end]
        sign = 1 - 2 * end
        above = (things[:, 2] - place) * sign
        above = above[above > 0]
        return [
            share,
            float(np.log(((upright[:, 2] - place) * sign < -0.1).mean() + 0.002)),
            _standing(things, owners, place),
            float((above < _FURNITURE).mean()) if len(above) else 0.5,
        ]

    return of_end(0) + of_axis, of_end(1) + of_axis


def _off_planes(upright: np.ndarray, planes: Planes) -> np.ndarray:
    """Mask of the points inside of the outer planes, clear of them."""
    inside = np.ones(len(upright), bool)
    for (axis, end), (place, share) in planes.items():
        if share > 0.04:
            inside &= (upright[:, axis] - place) * (1 - 2 * end) > _CLEAR_OF_PLANES
    return inside


def _connected(things: Float[np.ndarray, "k 3"]) -> Int[np.ndarray, " k"]:
    """Number of the connected thing, from 1 on, that each point belongs to; 0 of too few points."""
    from scipy import ndimage

    if len(things) < 2 * _THING:
        return np.zeros(len(things), np.int32)
    cells = np.floor((things - things.min(axis=0)) / _VOXEL).astype(np.int64)
    filled = np.zeros(cells.max(axis=0) + 1, bool)
    filled[tuple(cells.T)] = True
    return ndimage.label(filled, np.ones((3, 3, 3)))[0][tuple(cells.T)]


def _standing(things: Float[np.ndarray, "k 3"], owner: Int[np.ndarray, " k"], place: float) -> float:
    """Share of connected things that touch a plane across z: the mean of that by points and that by number."""
    number = int(owner.max(initial=0))
    if not number:
        return 0.0
    sizes = np.bincount(owner, minlength=number + 1)
    gaps = np.full(number + 1, np.inf)
    np.minimum.at(gaps, owner, np.abs(things[:, 2] - place))
    near, far = _TOUCHING
    touching = np.clip((far - gaps) / (far - near), 0, 1)
    large = sizes >= _THING
    if not large.any():
        return 0.0
    return float(((sizes * touching)[large].sum() / sizes[large].sum() + touching[large].mean()) / 2)


def _camera_votes(points: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, " 6"]:
    """Votes by the view of a camera at the origin: against the axis of the view, for the usual one across it."""
    votes = np.zeros(6)
    points = points[:: max(1, len(points) // 50_000)]
    usual = {"z": "-y", "-z": "y", "y": "z", "x": "z"}  # OpenCV, OpenGL, SUN RGB-D, robots
    for i, axis in enumerate("xyz"):
        for sign, name in ((1, axis), (-1, f"-{axis}")):
            depth = points[:, i] * sign
            if np.percentile(depth, 0.5) < 0.2 or np.median(depth) > _RANGE:
                continue
            across = np.delete(points, i, axis=1) / np.maximum(depth, 0.1)[:, None]
            if np.abs(np.median(across, axis=0)).max() > _CONE / 2:
                continue
            near = depth < np.median(depth)
            # Of a wall that faces the camera and is half of the points, nothing is nearer than the median.
            parts = (part if part.any() else ~part for part in (near, ~near))
            wide, far = (np.percentile(np.abs(across[part]), 98, axis=0) for part in parts)
            # The sides of a view are planes through the camera: near and far points reach as far to the side.
            if (
                (np.maximum(wide, far) < _CONE).all()
                and (np.minimum(wide, far) > 0.25).all()
                and (far > 0.6 * wide).any()
            ):
                votes[[AXES.index(axis), AXES.index(f"-{axis}")]] = _ALONG_VIEW
                if name in usual:
                    votes[AXES.index(usual[name])] += _USUAL_CAMERA
    return votes


@dataclass(frozen=True)
class Guess:
    """An up axis or a unit that points look like, beside the declared one.

    Attributes:
        declared: value that the user or the format gives.
        guess: value that the points look like; None if they leave it open.
        evidence: what the guess rests on, in words.
    """

    declared: str
    guess: str | None
    certain: bool
    evidence: str

    @property
    def differs(self) -> bool:
        """True if the guess is another than the declared value."""
        return self.guess not in (None, self.declared)


def guess_up(declared: str, scans: Sequence[UpVotes]) -> Guess:
    """Guess the axis that points up by the votes of scans in one frame; several scans are surer than one."""
    if not scans:
        return Guess(declared, None, False, "no scan could be read")
    votes = {sign: np.sum([scan.votes[sign] for scan in scans], axis=0) for sign in SIGNS}
    total = sum(votes.values()) + _PRIOR * np.array([axis == "z" for axis in AXES])
    best = int(np.argmax(total))
    opposite, across = best ^ 1, [i for i in range(6) if i // 2 != best // 2]
    # Half of the signs see an axis and not its direction.
    of_axis = {sign: float(max(vote[best], vote[opposite]) - vote[across].max()) for sign, vote in votes.items()}
    of_end = {sign: float(vote[best] - vote[opposite]) for sign, vote in votes.items()}
    margin = float(total[best] - np.delete(total, best).max())
    margin_of_axis = float(total[best] - total[across].max())
    agreeing = [sign for sign in SIGNS if of_axis[sign] > _AGREES]
    upright = [sign for sign in SIGNS if of_end[sign] > _AGREES]
    evidence = _listed([sign for sign in SIGNS if sign in agreeing or sign in upright])
    if all(scan.one_surface for scan in scans) and "camera" not in agreeing:
        return Guess(declared, None, False, "one plane holds most of the points, a floor or a wall")
    if margin < _CLEAR or len(agreeing) < _AGREEING or not upright:
        reason = f"its signs are weak: {evidence}" if evidence else "nothing in it tells"
        if margin_of_axis >= _CLEAR and len(agreeing) >= _AGREEING:
            reason = f"by its {_listed(agreeing)} it stands along {AXES[best][-1]}, but either end may be up"
        return Guess(declared, None, False, reason)
    if any(scan.high for scan in scans) and not {"floor", "camera"} & {*agreeing, *upright}:
        return Guess(declared, None, False, "it is as large as several storeys, and no floor tells")
    return Guess(declared, AXES[best], margin > _CERTAIN and len(agreeing) > _AGREEING, evidence)


def _listed(signs: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(signs[:-1]), *signs[-1:])))
