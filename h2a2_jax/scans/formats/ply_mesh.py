"""Points of PLY files: their vertices, or, where these are far apart, points on their faces."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import Thinning
from h2a2_jax.scans.formats.mesh import MeshPoints, read_mesh
from h2a2_jax.scans.formats.ply import Header, find_vertices, read_ply_columns, read_ply_header, read_table
from h2a2_jax.scans.formats.surface import is_coarse, sample_surface

_MOST_VERTICES = 2_000_000  # of a mesh whose faces are looked at; more are close to one another
_UPRIGHT = re.compile(r"vertical axis\s*:\s*(-?[xyz])$", re.IGNORECASE)  # as Nerfstudio writes it
_USED = 0.9  # share of the vertices of a mesh that are corners of faces


def read_ply_points(path: Path, thinning: Thinning) -> tuple[Mapping[str, np.ndarray], tuple[str, ...], str | None]:
    """Read the columns of points of a PLY file: its vertices, or points on its faces if these are large.

    Returns:
        columns, sentences on what was done, and the axis that points up, if the file says it.
    """
    header = read_ply_header(path)
    up = next((found[1].lower() for found in map(_UPRIGHT.search, header.comments) if found), None)
    place, faces = find_vertices(header), _find_faces(header)
    vertices = 0 if place is None else header.tables[place].rows
    if not vertices or faces is None:
        return read_ply_columns(path, thinning), (), up
    unused = f"has {header.tables[faces[0]].rows:,} faces, which are not used: its {vertices:,} vertices are the points"
    if vertices > _MOST_VERTICES:
        return read_ply_columns(path, thinning), (unused,), up
    columns = read_ply_columns(path)
    try:
        found, said = _on_faces(path, columns, header, thinning)
    except InputError as error:
        found, said = None, (f"has faces that cannot be read: {error}".replace(f"{path} ", "it ").removesuffix("."),)
    if found is not None:
        return found, said, up
    chosen = thinning.rows(vertices)
    return {name: v if chosen is None else v[chosen] for name, v in columns.items()}, (unused, *said), up


def _on_faces(
    path: Path, columns: Mapping[str, np.ndarray], header: Header, thinning: Thinning
) -> tuple[Mapping[str, np.ndarray] | None, tuple[str, ...]]:
    """Columns of points on the faces, None if the vertices serve as well, and sentences."""
    names = {name.lower(): name for name in columns}
    xyz = [names[axis] for axis in "xyz" if axis in names]
    triangles, of_faces = read_ply_faces(path, header)
    if len(xyz) < 3 or not _is_surface(triangles, len(columns[xyz[0]])):
        return None, ()
    points = np.stack([columns[axis] for axis in xyz], axis=1).astype(np.float64)
    is_finite = np.asarray(np.isfinite(points).all(axis=1))
    sound = np.flatnonzero(is_finite[triangles].all(axis=1))
    triangles = triangles[sound]
    said: tuple[str, ...] = ()
    is_colored = any(name.endswith("red") or name == "r" for name in names)
    texture = next((each for each in header.comments if each.startswith("TextureFile ")), None)  # as MeshLab writes it
    if texture and not is_colored:
        try:
            cloud = read_mesh(path, thinning)
        except Exception as error:  # trimesh raises anything, and the vertices are readable without it
            cloud = MeshPoints(points, None, (f"has a texture {texture[12:]} that cannot be read ({error})",))
        if cloud.colors is not None:
            named = zip(("x", "y", "z", "red", "green", "blue"), (*cloud.points.T, *cloud.colors.T), strict=True)
            return dict(named), cloud.assumed
        said = cloud.assumed[-1:]
    if not is_coarse(points, triangles):
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


def _find_faces(header: Header) -> tuple[int, str] | None:
    """Return the place of the faces and the name of the list of their corners; None without faces."""
    for place, table in enumerate(header.tables):
        for name in table.lists:
            if table.name == "face" and table.rows and name.lower() in ("vertex_indices", "vertex_index"):
                return place, name
    return None


def read_ply_faces(path: Path, header: Header) -> tuple[Int[np.ndarray, "f 3"], Mapping[str, np.ndarray]]:
    """Read the triangles, three numbers of vertices each, and the other numbers of the face that each is a part of.

    A polygon is cut into triangles at its first corner. A file without faces gives no triangles.
    """
    found = _find_faces(header)
    if found is None:
        return np.zeros((0, 3), np.int64), {}
    columns = read_table(path, header, found[0], Thinning())
    polygons, numbers = columns[found[1]], header.tables[found[0]].dtype.names or ()
    lengths = np.full(len(polygons), polygons.shape[1]) if polygons.ndim == 2 else np.array([len(p) for p in polygons])
    triangles, faces = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        corners = polygons if polygons.ndim == 2 else np.stack(list(polygons[rows]))
        for k in range(1, length - 1):
            triangles.append(corners[:, [0, k, k + 1]].astype(np.int64))
            faces.append(rows)
    face_of = np.concatenate(faces)
    return np.concatenate(triangles), {name: columns[name][face_of] for name in numbers}
