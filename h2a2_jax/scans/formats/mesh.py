"""Points of meshes by trimesh: .obj, .glb, .gltf, .stl, .off, and PLY files with a texture."""

import io
import json
import re
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from jaxtyping import Float, Int, UInt8

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import Thinning
from h2a2_jax.scans.formats.folders import without_options
from h2a2_jax.scans.formats.surface import face_areas, sample_surface

_MOST_FACES = 20_000_000  # of all copies of the parts of a scene
_PACKED = {"KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression", "KHR_mesh_quantization"}
_GREY = 0.5
_ROUNDING = 1e-3  # by which colours may exceed 1


class MeshPoints(NamedTuple):
    """Points of a mesh in the file's frame: as `point_cloud.PointCloud` has them."""

    points: Float[np.ndarray, "n 3"]
    colors: UInt8[np.ndarray, "n 3"] | None
    assumed: tuple[str, ...]
    up: str | None = None
    unit: str | None = None


def read_mesh(path: Path, thinning: Thinning) -> MeshPoints:
    """Read points on the surface of a mesh, or the points of a file without faces, with their colours.

    Colours are those of textures, vertices, faces or materials, in this order. A glTF file is in metres with y up, and
    its parts are placed as its scene says; the other formats say nothing of either. Files that a mesh names are
    looked for in its folder and below, nowhere else.
    """
    import trimesh  # a tenth of a second, which only these files should take

    content, kind, said = path.read_bytes(), path.suffix.lower()[1:], list[str]()
    if kind in ("glb", "gltf"):
        said += _check_gltf(path, content)
    if kind == "obj":
        content, more = _tidy_obj(content)
        said += more
    if kind == "stl":
        _check_stl(path, content)
    folder: Any = _Folder(path.parent, said)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "string or file could not be read")  # NumPy on text that is no number
            scene = trimesh.load_scene(io.BytesIO(content), file_type=kind, resolver=folder, process=False)
    except FileNotFoundError as error:
        raise InputError(f"{path} needs the file {error}, which is not in its folder: put it there.") from error
    if kind == "off":
        _color_off(content, scene)
    places = map(scene.graph.get, scene.graph.nodes_geometry)
    parts = [_Part(scene.geometry[name], matrix, said) for matrix, name in places]
    meshes = [part for part in parts if len(part.triangles)]
    if sum(len(part.triangles) for part in meshes) > _MOST_FACES:
        raise InputError(f"{path} has more than {_MOST_FACES:,} faces: export a simpler mesh, or points.")
    up, unit = ("y", "m") if kind in ("glb", "gltf") else (None, None)
    cloud = _on_surface(meshes, thinning, unit) if meshes else _vertices(parts, thinning)
    return MeshPoints(*cloud[:2], (*cloud.assumed, *dict.fromkeys(said)), up, unit)


class _Folder:
    """Files that a mesh names, for trimesh: those in its folder and below; what is missing is said."""

    def __init__(self, folder: Path, said: list[str]):
        self._folder, self._said = folder.resolve(), said

    def get(self, name: str) -> bytes:
        """Read a file; raises FileNotFoundError with its name."""
        name = name.strip()
        for spelt in (name, without_options(unquote(name).replace("\\", "/"))):
            try:
                path = (self._folder / spelt).resolve()
                if path.is_relative_to(self._folder) and path.is_file():
                    content = path.read_bytes()
                    break
            except (OSError, ValueError):  # a name that no file can have
                pass
        else:
            self._said.append(f"names {name[:200]}, which is not in its folder: its colours are missing")
            raise FileNotFoundError(name[:200])
        if path.suffix.lower() not in (".mtl", ".bin") and not _is_picture(content):
            self._said.append(f"names {name[:200]}, which is no picture that can be read: its colours are missing")
        return content

    __getitem__ = get


def _is_picture(content: bytes) -> bool:
    from PIL import Image

    try:
        Image.open(io.BytesIO(content)).close()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


class _Part:
    """A part of a scene, in the scene's frame."""

    def __init__(self, geometry: Any, matrix: Float[np.ndarray, "4 4"], said: list[str]):
        self.vertices = np.asarray(geometry.vertices, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        self.triangles: Int[np.ndarray, "f 3"] = np.asarray(getattr(geometry, "faces", np.zeros((0, 3))), np.int64)
        self.geometry, self._said = geometry, said
        if len(self.triangles) and not 0 <= self.triangles.min() <= self.triangles.max() < len(self.vertices):
            raise ValueError("a face names a vertex that there is not")

    def colors(
        self, faces: Int[np.ndarray, " n"], weights: Float[np.ndarray, "n 3"]
    ) -> Float[np.ndarray, "n 3"] | None:
        """Colours in 0-1 of points on the faces, by their weights of the corners; None if the part has none."""
        visual = self.geometry.visual

        def blend(values: np.ndarray) -> np.ndarray:
            return np.einsum("nk,nkc->nc", weights, np.asarray(values, np.float64)[self.triangles[faces]])

        if visual.kind == "vertex":
            return blend(visual.vertex_colors[:, :3]) / 255
        if visual.kind == "face":
            return visual.face_colors[faces, :3] / 255
        if visual.kind != "texture":
            return None
        image = self._texture(visual.material)
        base = _base_color(visual.material, image)
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
            self._said.append(f"has a texture that cannot be read ({error}): its colours are missing")
            return None


def _base_color(material: Any, image: np.ndarray | None) -> np.ndarray | None:
    """Colour of a material in 0-1; that of an .mtl file only counts where it has no texture."""
    if hasattr(material, "baseColorFactor"):
        factor = material.baseColorFactor
        return None if factor is None else np.asarray(factor[:3], np.float64) / 255
    given = material.kwargs.get("kd") if image is None else None
    return None if given is None else np.clip(np.broadcast_to(np.asarray(given, np.float64), 3), 0, 1)


def _on_surface(parts: list[_Part], thinning: Thinning, unit: str | None) -> MeshPoints:
    vertices = np.concatenate([part.vertices for part in parts])
    first_vertices = np.cumsum([0, *(len(part.vertices) for part in parts)])
    triangles = np.concatenate([part.triangles + first for part, first in zip(parts, first_vertices, strict=False)])
    sound = np.flatnonzero(np.isfinite(vertices).all(axis=1)[triangles].all(axis=1))
    if not face_areas(vertices, triangles[sound]).sum():
        return _vertices(parts, thinning)
    samples = sample_surface(vertices, triangles[sound], thinning.most, unit)
    faces, said = sound[samples.faces], [samples.said]
    if len(sound) < len(triangles):
        said.append(f"has {len(triangles) - len(sound):,} faces with NaN or infinite corners, which are left out")
    starts = np.cumsum([0, *(len(part.triangles) for part in parts)])
    bounds = np.searchsorted(faces, starts)
    found = [
        part.colors(faces[first:last] - start, samples.weights[first:last])
        for part, start, first, last in zip(parts, starts, bounds, bounds[1:], strict=False)
    ]
    without = sum(each is None for each in found)
    if 0 < without < len(found):
        said.append(f"has {without} of {len(found)} parts without colours, taken as grey")
    points = samples.blend(triangles[sound], vertices)
    if without == len(found):
        return MeshPoints(points, None, tuple(said))
    filled = [
        np.full((last - first, 3), _GREY) if each is None else each
        for each, first, last in zip(found, bounds, bounds[1:], strict=False)
    ]
    return MeshPoints(points, np.rint(255 * np.clip(np.concatenate(filled), 0, 1)).astype(np.uint8), tuple(said))


def _vertices(parts: list[_Part], thinning: Thinning) -> MeshPoints:
    """Points of a file without faces."""
    points = np.concatenate([np.zeros((0, 3)), *(part.vertices for part in parts)])
    colors = [np.asarray(getattr(part.geometry, "colors", ())) for part in parts]
    chosen = thinning.rows(len(points))
    rows = slice(None) if chosen is None else chosen
    if not len(points) or any(len(each) != len(part.vertices) for each, part in zip(colors, parts, strict=True)):
        return MeshPoints(points[rows], None, ())
    return MeshPoints(points[rows], np.concatenate(colors)[rows, :3].astype(np.uint8), ())


def _check_gltf(path: Path, content: bytes) -> list[str]:
    """Refuse what trimesh would read as zeros: compressed and sparse geometry, and counts without bytes.

    Returns:
        sentences on what is not read.
    """
    text = content
    if content[:4] == b"glTF":
        length = struct.unpack_from("<I", content, 12)[0]
        text = content[20 : 20 + length]
    tree = json.loads(text)
    extensions = {*tree.get("extensionsRequired", ()), *tree.get("extensionsUsed", ())}
    if packed := sorted(_PACKED & extensions):
        raise InputError(f"{path} is compressed ({', '.join(packed)}): export it without compression.")
    for accessor in tree.get("accessors", ()):
        if "sparse" in accessor:
            raise InputError(f"{path} has sparse arrays, which are not read: export it without them.")
        if "bufferView" not in accessor and accessor["count"] > len(content):
            raise InputError(f"{path} is damaged: it claims {accessor['count']} numbers; export it again.")
    return ["has textures in KTX2, which are not read: its colours are missing"] * ("KHR_texture_basisu" in extensions)


def _tidy_obj(content: bytes) -> tuple[bytes, list[str]]:
    """Make an OBJ file count its vertices from the beginning, and its colours reach to 1: trimesh takes both for given.

    Returns:
        content, and sentences on what was assumed.
    """
    if re.search(rb"^f\s.*-\d", content, re.MULTILINE):
        counts, lines = {b"v": 0, b"vt": 0, b"vn": 0}, []
        for line in content.splitlines():
            word = line.split(None, 1)[0] if line.strip() else b""
            if word in counts:
                counts[word] += 1
            elif word == b"f":
                line = b"f " + b" ".join(_absolute(corner, list(counts.values())) for corner in line.split()[1:])
            lines.append(line)
        content = b"\n".join(lines)
    colored = re.compile(
        rb"^(v(?:[ \t]+\S+){3})[ \t]+([\d.eE+-]+)[ \t]+([\d.eE+-]+)[ \t]+([\d.eE+-]+)[ \t]*\r?$", re.MULTILINE
    )
    if not any(float(value) > 1 + _ROUNDING for match in colored.finditer(content) for value in match.groups()[1:]):
        return content, []
    scaled = colored.sub(
        lambda match: match[1] + b"".join(b" %.6f" % (float(match[k]) / 255) for k in (2, 3, 4)), content
    )
    return scaled, ["has colours beyond 1, which are taken as 0-255"]


def _color_off(content: bytes, scene: Any) -> None:
    """Give a mesh the colours of its vertices in a COFF or CNOFF file, which trimesh leaves out."""
    lines = [line for line in (each.split(b"#")[0].split() for each in content.splitlines()) if line]
    if not lines or lines[0][0] not in (b"COFF", b"CNOFF"):
        return
    start = 1 if len(lines[0]) > 1 else 2  # the counts may be on the first line
    first = 6 if lines[0][0] == b"CNOFF" else 3
    for mesh in scene.geometry.values():
        rows = np.array([line[first : first + 3] for line in lines[start : start + len(mesh.vertices)]], np.float64)
        mesh.visual.vertex_colors = np.rint(rows * (1 if rows.max(initial=0) > 1 else 255)).astype(np.uint8)


def _check_stl(path: Path, content: bytes) -> None:
    """Refuse an STL file that is cut off: trimesh would take a binary one for a text without faces."""
    text = content[:1000].lstrip().lower()
    if text.startswith(b"solid") and (b"facet" in text or b"endsolid" in text):
        if b"endsolid" not in content[-1000:].lower():
            raise InputError(f"{path} is cut off: its text does not end with 'endsolid'; copy it again.")
        return
    faces = struct.unpack_from("<I", content, 80)[0] if len(content) >= 84 else 0
    if len(content) != 84 + 50 * faces:
        raise InputError(
            f"{path} is no STL file or is cut off: its header says {faces} faces, which take {84 + 50 * faces} bytes, "
            f"but it has {len(content)}; copy it again."
        )


def _absolute(corner: bytes, counts: list[int]) -> bytes:
    numbers = [
        number if int(number or 0) >= 0 else b"%d" % (count + 1 + int(number))
        for number, count in zip(corner.split(b"/"), counts, strict=False)
    ]
    return b"/".join(numbers)
