"""Points of PLY files: their vertices, or, where these are far apart, points on their faces."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import Thinning
from h2a2_jax.scans.formats.mesh import MeshPoints, read_mesh
from h2a2_jax.scans.formats.ply import read_ply_columns
from h2a2_jax.scans.formats.ply_header import read_ply_header
from h2a2_jax.scans.formats.ply_lists import read_ply_faces
from h2a2_jax.scans.formats.surface import is_coarse, sample_surface

_MOST_VERTICES = 2_000_000  # of a mesh whose faces are looked at; more are close to one another
_USED = 0.9  # share of the vertices of a mesh that are corners of faces


def read_ply_points(path: Path, thinning: Thinning) -> tuple[Mapping[str, np.ndarray], tuple[str, ...], str | None]:
    """Read the columns of points of a PLY file: its vertices, or points on its faces if these are large.

    Returns:
        columns, sentences on what was done, and the axis that points up, if the file says it.
    """
    with path.open("rb") as file:
        header = read_ply_header(path, file)
    faces = sum(each.rows for each in header.elements if each.name == "face" and each.corners is not None)
    vertices = 0 if header.vertex is None else header.elements[header.vertex].rows
    if not faces or not vertices:
        return read_ply_columns(path, thinning), (), header.up
    unused = f"has {faces:,} faces, which are not used: its {vertices:,} vertices are the points"
    if vertices > _MOST_VERTICES:
        return read_ply_columns(path, thinning), (unused,), header.up
    columns = read_ply_columns(path)
    try:
        found, said = _on_faces(path, columns, header.texture, thinning)
    except InputError as error:
        found, said = None, (f"has faces that cannot be read: {error}".replace(f"{path} ", "it ").removesuffix("."),)
    if found is not None:
        return found, said, header.up
    chosen = thinning.rows(vertices)
    return {name: v if chosen is None else v[chosen] for name, v in columns.items()}, (unused, *said), header.up


def _on_faces(
    path: Path, columns: Mapping[str, np.ndarray], texture: str | None, thinning: Thinning
) -> tuple[Mapping[str, np.ndarray] | None, tuple[str, ...]]:
    """Columns of points on the faces, None if the vertices serve as well, and sentences."""
    names = {name.lower(): name for name in columns}
    xyz = [names[axis] for axis in "xyz" if axis in names]
    triangles, of_faces = read_ply_faces(path)
    if len(xyz) < 3 or not _is_surface(triangles, len(columns[xyz[0]])):
        return None, ()
    points = np.stack([columns[axis] for axis in xyz], axis=1).astype(np.float64)
    is_finite = np.asarray(np.isfinite(points).all(axis=1))
    sound = np.flatnonzero(is_finite[triangles].all(axis=1))
    triangles = triangles[sound]
    said: tuple[str, ...] = ()
    is_colored, are_faces = (
        any(name.lower().endswith("red") or name == "r" for name in each) for each in (names, of_faces)
    )
    if texture and not is_colored:
        try:
            cloud = read_mesh(path, thinning)
        except Exception as error:  # trimesh raises anything, and the vertices are readable without it
            cloud = MeshPoints(points, None, (f"has a texture {texture} that cannot be read ({error})",))
        if cloud.colors is not None:
            named = zip(("x", "y", "z", "red", "green", "blue"), (*cloud.points.T, *cloud.colors.T), strict=True)
            return dict(named), cloud.assumed
        said = cloud.assumed[-1:]
    if not is_coarse(points, triangles) and (is_colored or not are_faces):
        return None, said
    samples = sample_surface(points, triangles, thinning.most)
    found = {name: samples.blend(triangles, values) for name, values in columns.items()}
    found |= dict(zip(xyz, samples.blend(triangles, points).T, strict=True))
    if not is_colored:
        found |= {name: values[sound][samples.faces] for name, values in of_faces.items() if name not in found}
    return found, (samples.said, *said)


def _is_surface(triangles: Int[np.ndarray, "f 3"], vertices: int) -> bool:
    """Return True if the triangles have vertices that there are, and nearly all of them."""
    if not len(triangles) or triangles.min() < 0 or triangles.max() >= vertices:
        return False
    used = np.zeros(vertices, bool)
    used[triangles] = True
    return bool(used.mean() >= _USED)
