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
_BLOCK = 1 << 15  # triangles
_FEWEST_FACES = 4  # of a tetrahedron; fewer are no room


class Samples(NamedTuple):
    """Points on a surface: the face of each, and its weights of the face's corners; remarks."""

    faces: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, "n 3"]
    remarks: tuple[str, ...]

    def blend(self, triangles: Int[np.ndarray, "f 3"], values: np.ndarray) -> np.ndarray:
        """Interpolate values of vertices, [v] or [v, c]; whole numbers are rounded to their type."""
        found = np.einsum("nk,nk...->n...", self.weights, values[triangles[self.faces]])
        return found if values.dtype.kind == "f" else np.rint(found).astype(values.dtype)


def sample_surface(
    vertices: Float[np.ndarray, "v 3"], triangles: Int[np.ndarray, "f 3"], most: int | None, unit: str | None = None
) -> Samples:
    """Spread points over triangles, `SPACING` apart where `FEWEST` and `most` (or `MOST`) allow it.

    The number of points of a face follows its area. The same triangles always give the same points. Faces with corners
    that are not finite have none, with a remark.

    Args:
        vertices: finite or not.
        triangles: numbers of vertices; their area in all is positive.
        most: largest number of points.
        unit: of the vertices; None: the one in which they are as large as a room.
    """
    areas, guess = face_areas(vertices, triangles), guess_room_unit(vertices)
    metres, most = _METRES[unit or guess], MOST if most is None else most
    total = float(areas.sum())
    count = int(np.clip(total * metres**2 / SPACING**2, min(FEWEST, most), most))
    # One point in each of equal parts of the area; within large faces, a sequence that leaves no gaps (R2).
    places = (np.arange(count) + np.random.default_rng(0).random(count)) * (total / count)
    faces = np.minimum(np.searchsorted(np.cumsum(areas), places, side="right"), np.flatnonzero(areas)[-1])
    b, c = (np.arange(1, count + 1)[:, None] * (0.7548776662466927, 0.5698402909980532) % 1).T
    outside = b + c > 1
    b, c = np.where(outside, 1 - b, b), np.where(outside, 1 - c, c)
    area, unsound = total * metres**2, int((~np.isfinite(vertices).all(axis=1))[triangles].any(axis=1).sum())
    remarks = [
        f"is a mesh of {len(areas) - unsound:,} faces and {f'{area:,.0f}' if area >= 100 else f'{area:.3g}'} m²"
        f"{'' if unit else f' (its unit taken as {guess})'}, whose surface is sampled at a spacing of about "
        f"{100 * metres * math.sqrt(total / count):.2g} cm: {count:,} points"
    ]
    if unsound:
        remarks.append(f"has {unsound:,} faces with NaN or infinite corners, which are left out")
    return Samples(faces, np.stack([1 - b - c, b, c], axis=1), tuple(remarks))


def face_areas(vertices: Float[np.ndarray, "v 3"], triangles: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, " f"]:
    """Return the areas of triangles, 0 where a corner is not finite.

    They are computed block by block: all corners at once take much memory.
    """
    areas = np.empty(len(triangles))
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, len(triangles), _BLOCK):
            a, b, c = vertices[triangles[first : first + _BLOCK].T].transpose(0, 2, 1)
            (x, y, z), (u, v, w) = b - a, c - a
            twice = np.sqrt((y * w - z * v) ** 2 + (z * u - x * w) ** 2 + (x * v - y * u) ** 2)
            areas[first : first + _BLOCK] = np.where(np.isfinite(twice), twice / 2, 0)
    return areas


def guess_room_unit(vertices: Float[np.ndarray, "v 3"]) -> str:
    """Return the unit in which vertices lie as far apart as in a room; those that are not finite do not count."""
    finite = vertices[np.isfinite(vertices).all(axis=1)]
    middle = float(np.sort(finite.max(axis=0) - finite.min(axis=0))[1])
    return next(unit for unit, largest in _LARGEST_ROOM if middle < largest)


def is_coarse(vertices: Float[np.ndarray, "v 3"], triangles: Int[np.ndarray, "f 3"]) -> bool:
    """Return True if much of a surface lies between vertices that are further apart than points of a scan."""
    areas = face_areas(vertices, triangles)
    if np.count_nonzero(areas) < _FEWEST_FACES:
        return False
    areas *= _METRES[guess_room_unit(vertices)] ** 2
    return bool(areas[areas > _COARSE_FACE].sum() > _COARSE_SHARE * areas.sum() > 0)
