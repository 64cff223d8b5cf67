"""Points of PLY files: their vertices, or, where these are far apart, points on their faces."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import RawCloud, Thinning
from h2a2_jax.scans.formats.columns import from_columns, roles
from h2a2_jax.scans.formats.mesh import read_mesh
from h2a2_jax.scans.formats.ply import Header, find_vertices, read_element, read_ply_columns, read_ply_header
from h2a2_jax.scans.formats.surface import is_coarse, sample_surface

_MOST_VERTICES = 2_000_000  # of a mesh whose faces are looked at; more are close to one another
_UPRIGHT = re.compile(r"vertical axis\s*:\s*(-?[xyz])$", re.IGNORECASE)  # as Nerfstudio writes it
_USED = 0.9  # share of the vertices of a mesh that are corners of faces


def read_ply(path: Path, thinning: Thinning) -> RawCloud:
    """Read the points of a PLY file: its vertices, or points on its faces if these are large."""
    header = read_ply_header(path)
    up = next((found[1].lower() for found in map(_UPRIGHT.search, header.comments) if found), None)
    place, faces = find_vertices(header), _find_faces(header)
    vertices = 0 if place is None else header.elements[place].rows
    if not vertices or faces is None:
        return replace(from_columns(path, read_ply_columns(path, thinning)), up=up)
    count = header.elements[faces[0]].rows
    said = [f"has {count:,} faces, which are not used: its {vertices:,} vertices are the points"]
    if vertices > _MOST_VERTICES:
        columns = read_ply_columns(path, thinning)
    else:
        columns = read_ply_columns(path)
        try:
            surface, more = _on_faces(path, columns, header, thinning)
        except InputError as error:
            reason = str(error).replace(f"{path} ", "it ").removesuffix(".")
            surface, more = None, (f"has faces that cannot be read: {reason}",)
        if surface is not None:
            return replace(surface, up=up)
        said += more
        columns = {name: thinning.take(values) for name, values in columns.items()}
    return replace(from_columns(path, columns).remarked(after=said), up=up)


def _on_faces(
    path: Path, columns: Mapping[str, np.ndarray], header: Header, thinning: Thinning
) -> tuple[RawCloud | None, tuple[str, ...]]:
    """Return points on the faces, or None if the vertices serve as well, with remarks."""
    names, found = list(columns), roles(list(columns))
    triangles, of_faces = read_ply_faces(path, header)
    if not all(found.axes) or not _is_surface(triangles, len(columns[names[0]])):
        return None, ()
    xyz = [names[places[0]] for places in found.axes]
    points = np.stack([columns[axis] for axis in xyz], axis=1).astype(np.float64)
    said: tuple[str, ...] = ()
    texture = next((each for each in header.comments if each.startswith("TextureFile ")), None)  # as MeshLab writes it
    if texture and not found.colors:
        try:
            cloud = read_mesh(path, thinning)
        except Exception as error:  # trimesh raises anything, and the vertices are readable without it
            cloud = RawCloud(points, assumed=(f"has a texture {texture[12:]} that cannot be read ({error})",))
        if cloud.colors is not None:
            return cloud, ()
        said = cloud.assumed[-1:]
    if not is_coarse(points, triangles):
        return None, said
    samples = sample_surface(points, triangles, thinning.most)
    table = {name: samples.blend(triangles, values) for name, values in columns.items()}
    table |= dict(zip(xyz, samples.blend(triangles, points).T, strict=True))
    if not found.colors:
        table |= {name: values[samples.faces] for name, values in of_faces.items() if name not in table}
    return from_columns(path, table).remarked(after=[*samples.remarks, *said]), ()


def _is_surface(triangles: Int[np.ndarray, "f 3"], vertices: int) -> bool:
    """Return True if the triangles have vertices that there are, and nearly all of them."""
    if not len(triangles) or triangles.min() < 0 or triangles.max() >= vertices:
        return False
    used = np.zeros(vertices, bool)
    used[triangles] = True
    return bool(used.mean() >= _USED)


def _find_faces(header: Header) -> tuple[int, str] | None:
    """Return the place of the faces and the name of the list of their corners; None without faces."""
    for place, element in enumerate(header.elements):
        for name in element.lists:
            if element.name == "face" and element.rows and name.lower() in ("vertex_indices", "vertex_index"):
                return place, name
    return None


def read_ply_faces(path: Path, header: Header) -> tuple[Int[np.ndarray, "f 3"], Mapping[str, np.ndarray]]:
    """Read the triangles, three numbers of vertices each, and the other numbers of the face that each is a part of.

    A polygon is cut into triangles at its first corner. A file without faces gives no triangles.
    """
    found = _find_faces(header)
    if found is None:
        return np.zeros((0, 3), np.int64), {}
    columns = read_element(path, header, found[0], Thinning())
    polygons, numbers = columns[found[1]], header.elements[found[0]].dtype.names or ()
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
