"""Points on the surface of a mesh, evenly spread."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SPACING = 0.02
"""Distance in metres between points, about that of the vertices of ScanNet's meshes."""
FEWEST, MOST = 50_000, 500_000
"""Points of a small surface, whose unit may be another one, and of a large one."""

_METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001}
_LARGEST_ROOM = (("m", 40.0), ("cm", 700.0), ("mm", math.inf))  # by the middle one of three extents
_COARSE_FACE = 0.0025  # m²: a right triangle with sides of 7 cm
_COARSE_SHARE = 0.25
_FEWEST_FACES = 4  # of a tetrahedron; fewer are no room


class Samples(NamedTuple):
    """Points on a surface: the face of each, and its weights of the face's corners; a sentence that says so."""

    faces: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, "n 3"]
    said: str

    def blend(self, triangles: Int[np.ndarray, "f 3"], values: np.ndarray) -> np.ndarray:
        """Interpolate values of vertices, [v] or [v, c]; whole numbers are rounded to their type."""
        found = np.einsum("nk,nk...->n...", self.weights, values[triangles[self.faces]])
        return found if values.dtype.kind == "f" else np.rint(found).astype(values.dtype)


def sample_surface(corners: Float[np.ndarray, "f 3 3"], most: int | None, unit: str | None = None) -> Samples:
    """Spread points over triangles, `SPACING` apart where `FEWEST` and `most` (or `MOST`) allow it.

    The number of points of a face follows its area. The same triangles always give the same points.

    Args:
        corners: finite triangles of a positive area in all.
        most: largest number of points.
        unit: of the corners; None: the one in which they are as large as a room.
    """
    areas = face_areas(corners)
    metres = _METRES[unit or guess_room_unit(corners)]
    total, most = float(areas.sum()), MOST if most is None else most
    count = int(np.clip(total * metres**2 / SPACING**2, min(FEWEST, most), most))
    # One point in each of equal parts of the area; within large faces, a sequence that leaves no gaps (R2).
    places = (np.arange(count) + np.random.default_rng(0).random(count)) * (total / count)
    faces = np.minimum(np.searchsorted(np.cumsum(areas), places, side="right"), len(areas) - 1)
    b, c = (np.arange(1, count + 1)[:, None] * (0.7548776662466927, 0.5698402909980532) % 1).T
    outside = b + c > 1
    b, c = np.where(outside, 1 - b, b), np.where(outside, 1 - c, c)
    said = (
        f"is a mesh of {len(areas):,} faces and {total * metres**2:,.3g} m²"
        f"{'' if unit else f' (its unit taken as {guess_room_unit(corners)})'}, whose surface is sampled at a spacing "
        f"of about {100 * metres * math.sqrt(total / count):.2g} cm: {count:,} points"
    )
    return Samples(faces, np.stack([1 - b - c, b, c], axis=1), said)


def face_areas(corners: Float[np.ndarray, "f 3 3"]) -> Float[np.ndarray, " f"]:
    """Return the areas of triangles."""
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2


def guess_room_unit(corners: Float[np.ndarray, "f 3 3"]) -> str:
    """Return the unit in which a surface is as large as a room."""
    points = corners.reshape(-1, 3)
    middle = float(np.sort(points.max(axis=0) - points.min(axis=0))[1])
    return next(unit for unit, largest in _LARGEST_ROOM if middle < largest)


def is_coarse(corners: Float[np.ndarray, "f 3 3"]) -> bool:
    """Return True if much of a surface lies between vertices that are further apart than points of a scan."""
    if len(corners) < _FEWEST_FACES:
        return False
    areas = face_areas(corners) * _METRES[guess_room_unit(corners)] ** 2
    return bool(areas[areas > _COARSE_FACE].sum() > _COARSE_SHARE * areas.sum() > 0)
