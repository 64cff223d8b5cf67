"""Points of meshes by trimesh: .obj, .glb, .gltf, .stl, .off, and PLY files with a texture."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud, Thinning
from h2a2_jax.scans.formats.colors import GREY
from h2a2_jax.scans.formats.mesh_files import (
    Colored,
    MeshFolder,
    check_gltf,
    check_obj,
    check_stl,
    color_faces,
    count_from_first,
    text_colors,
    without_comments,
)
from h2a2_jax.scans.formats.surface import face_areas, sample_surface
from h2a2_jax.untrusted import read_bytes

_MOST_FACES = 20_000_000  # of all copies of the parts of a scene


def read_mesh(path: Path, thinning: Thinning) -> RawCloud:
    """Read points on the surface of a mesh, or the points of a file without faces, with their colours.

    Colours are those of textures, vertices, faces or materials, in this order. A glTF file is in metres with y up, and
    its parts are placed as its scene says; the other formats say nothing of either. Files that a mesh names are
    looked for in its folder and below, nowhere else.
    """
    import trimesh  # a tenth of a second, which only these files should take

    content, kind, said = read_bytes(path), path.suffix.lower()[1:], list[str]()
    if kind in ("glb", "gltf"):
        said += check_gltf(path, content)
    elif kind == "stl":
        check_stl(path, content)
    elif kind == "obj":
        check_obj(path, content)
        content = count_from_first(without_comments(content))
    folder: Any = MeshFolder(path.parent, said)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "string or file could not be read")  # NumPy on text that is no number
            scene = trimesh.load_scene(io.BytesIO(content), file_type=kind, resolver=folder, process=False)
    except FileNotFoundError as error:
        raise InputError(f"{path} needs the file {error}, which is not in its folder: put it there.") from error
    colored = text_colors(kind, content) if kind in ("obj", "off") else None
    said += colored[1] if colored else []
    places = map(scene.graph.get, scene.graph.nodes_geometry)
    if kind == "off":
        said += color_faces(scene, content)
    placed = [(scene.geometry[name], matrix) for matrix, name in places]
    if sum(max(len(getattr(each, "faces", ())), len(each.vertices)) for each, _ in placed) > _MOST_FACES:
        raise InputError(f"{path} has more than {_MOST_FACES:,} faces: export a simpler mesh, or points.")
    parts = [_Part(each, matrix, colored and colored[0], said) for each, matrix in placed]
    meshes = [part for part in parts if len(part.triangles)]
    if meshes and (loose := sum(len(part.vertices) for part in parts if not len(part.triangles))):
        said.append(f"has {loose:,} points beside its faces, which are left out")
    up, unit = ("y", "m") if kind in ("glb", "gltf") else (None, None)
    cloud = _on_surface(meshes, thinning, unit) if meshes else _vertices(parts, thinning)
    return RawCloud(cloud.points, cloud.colors, (*cloud.assumed, *dict.fromkeys(said)), up, unit)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep trimesh from logging what is said here in a sentence, such as a missing picture."""
    log = logging.getLogger("trimesh.util")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _Part:
    """A part of a scene, in the scene's frame."""

    def __init__(self, geometry: Any, matrix: Float[np.ndarray, "4 4"], colored: Colored | None, said: list[str]):
        self.vertices = np.asarray(geometry.vertices, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        self.triangles: Int[np.ndarray, "f 3"] = np.asarray(getattr(geometry, "faces", np.zeros((0, 3))), np.int64)
        self.geometry, self._said = geometry, said
        if len(self.triangles) and np.any(getattr(geometry, "face_attributes", {}).get("stl", False)):
            said.append("has numbers with its faces that may be colours, which are not read")
        if len(self.triangles) and not 0 <= self.triangles.min() <= self.triangles.max() < len(self.vertices):
            raise ValueError("a face names a vertex that there is not")
        self.vertex_colors = np.asarray(getattr(geometry, "colors", ()))
        if geometry.visual.kind == "vertex":
            self.vertex_colors = geometry.visual.vertex_colors
        if colored is not None:
            from scipy.spatial import cKDTree

            places = cKDTree(np.nan_to_num(colored[0]))
            self.vertex_colors = colored[1][places.query(np.nan_to_num(geometry.vertices))[1]]

    def colors(
        self, faces: Int[np.ndarray, " n"], weights: Float[np.ndarray, "n 3"]
    ) -> Float[np.ndarray, "n 3"] | None:
        """Colours in 0-1 of points on the faces, by their weights of the corners; None if the part has none."""
        visual = self.geometry.visual

        def blend(values: np.ndarray) -> np.ndarray:
            return np.einsum("nk,nkc->nc", weights, np.asarray(values, np.float64)[self.triangles[faces]])

        image = self._texture(visual.material) if visual.kind == "texture" else None
        if len(self.vertex_colors) and (image is None or visual.uv is None):
            return blend(self.vertex_colors[:, :3]) / 255
        if visual.kind == "face":
            return visual.face_colors[faces, :3] / 255
        if visual.kind != "texture":
            return None
        base = _base_color(visual.material, image)
        if image is not None and base is not None and base.min() == base.max() < 1:
            self._said.append(f"darkens its texture by a factor of {base[0]:.2g}, which is left out")
            base = None
        found = None if base is None else np.broadcast_to(base, (len(faces), 3))
        if "color" in visual.vertex_attributes:
            values = np.asarray(visual.vertex_attributes["color"])[:, :3]
            full = 1.0 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
            found = blend(values / full) * (1.0 if found is None else found)
        if image is not None and visual.uv is not None:
            height, width = image.shape[:2]
            u, v = blend(visual.uv).T % 1
            columns = np.minimum((u * width).astype(int), width - 1)
            rows = np.minimum(((1 - v) * height).astype(int), height - 1)
            found = image[rows, columns] / 255 * (1.0 if found is None else found)
        return found

    def _texture(self, material: Any) -> UInt8[np.ndarray, "h w 3"] | None:
        image = material.baseColorTexture if hasattr(material, "baseColorTexture") else material.image
        if getattr(image, "format", None) is None:  # trimesh puts a picture of its own where there is none
            return None
        try:
            return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            self._said.append(f"has a texture that cannot be read ({quoted(error)}): its colours are missing")
            return None


def _base_color(material: Any, image: np.ndarray | None) -> np.ndarray | None:
    """Colour of a material in 0-1; that of an .mtl file only counts where it has no texture."""
    if hasattr(material, "baseColorFactor"):
        factor = material.baseColorFactor
        return None if factor is None else np.asarray(factor[:3], np.float64) / 255
    given = material.kwargs.get("kd") if image is None else None
    return None if given is None else np.clip(np.broadcast_to(np.asarray(given, np.float64), 3), 0, 1)


def _on_surface(parts: list[_Part], thinning: Thinning, unit: str | None) -> RawCloud:
    vertices = np.concatenate([part.vertices for part in parts])
    first_vertices = np.cumsum([0, *(len(part.vertices) for part in parts)])
    triangles = np.concatenate([part.triangles + first for part, first in zip(parts, first_vertices, strict=False)])
    if not face_areas(vertices, triangles).sum():
        return _vertices(parts, thinning)
    samples = sample_surface(vertices, triangles, thinning.most, unit)
    faces, said = samples.faces, list(samples.remarks)
    starts = np.cumsum([0, *(len(part.triangles) for part in parts)])
    bounds = np.searchsorted(faces, starts)
    points, colors, without = samples.blend(triangles, vertices), np.full((len(faces), 3), GREY), 0
    for part, start, first, last in zip(parts, starts, bounds, bounds[1:], strict=False):
        own = part.colors(faces[first:last] - start, samples.weights[first:last])
        if own is None:
            without += 1
        else:
            colors[first:last] = own
    if without == len(parts):
        return RawCloud(points, None, tuple(said))
    if without:
        said.append(f"has {without} of {len(parts)} parts without colours, taken as grey")
    return RawCloud(points, np.rint(255 * np.clip(colors, 0, 1)).astype(np.uint8), tuple(said))


def _vertices(parts: list[_Part], thinning: Thinning) -> RawCloud:
    """Points of a file without faces, with colours if all parts have some."""
    points = np.concatenate([np.zeros((0, 3)), *(part.vertices for part in parts)])
    colors = [part.vertex_colors for part in parts]
    if not len(points) or any(len(each) != len(part.vertices) for each, part in zip(colors, parts, strict=True)):
        return RawCloud(thinning.take(points))
    return RawCloud(thinning.take(points), thinning.take(np.concatenate(colors))[:, :3].astype(np.uint8))
