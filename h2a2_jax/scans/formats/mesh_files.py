"""Parts of mesh files that trimesh does not read, checks that it leaves out, and the files that a mesh names."""

import io
import json
import re
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from jaxtyping import Float, UInt8

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats.folders import without_options
from h2a2_jax.untrusted import check_growth, check_room, read_bytes

_PACKED = {"KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression", "KHR_mesh_quantization"}
_UNREAD = {
    "KHR_texture_basisu": "has textures in KTX2, which are not read: its colours are missing",
    "KHR_texture_transform": "has textures that are moved or scaled, which is not done: its colours may be wrong",
}
_MOST_NODES, _MOST_MATERIALS = 50_000, 5_000
_LARGEST_ENTRY = 64  # bytes of an entry of an array of glTF, a matrix
_ROUNDING = 1e-3  # by which colours may exceed 1
_NUMBER = rb"[ \t]+([\d.eE+-]+)"
_COMMENT = re.compile(rb"^([vf][^\r\n#]*)#[^\r\n]*", re.MULTILINE)
_COLORED = re.compile(rb"^v" + 6 * _NUMBER + rb"[ \t]*\r?$", re.MULTILINE)

Colored = tuple[Float[np.ndarray, "v 3"], UInt8[np.ndarray, "v 3"]]
"""Places and colours of vertices."""


class MeshFolder:
    """Files that a mesh names, for trimesh: those in its folder and below, with a remark on each that is missing."""

    def __init__(self, folder: Path, said: list[str]):
        self._folder, self._said = folder.resolve(), said

    def get(self, name: str) -> bytes:
        """Read a file; raises FileNotFoundError with its name."""
        name = name.strip()
        for spelt in (name, without_options(unquote(name).replace("\\", "/"))):
            try:
                path = (self._folder / spelt).resolve()
                if path.is_relative_to(self._folder) and path.is_file():
                    content = read_bytes(path)
                    break
            except (OSError, ValueError):  # a name that no file can have
                pass
        else:
            self._said.append(f"names {quoted(name)}, which is not in its folder: it is left out")
            raise FileNotFoundError(name[:200])
        if path.suffix.lower() not in (".mtl", ".bin") and not _is_picture(content):
            self._said.append(f"names {quoted(name)}, which is no picture that can be read: it is left out")
        return content

    __getitem__ = get


def _is_picture(content: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            check_growth(len(content), 4 * image.width * image.height, "it")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def check_gltf(path: Path, content: bytes) -> list[str]:
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
    _check_sharing(path, tree, len(content))
    said = [text for name, text in _UNREAD.items() if name in extensions]
    modes = [part.get("mode", 4) for mesh in tree.get("meshes", ()) for part in mesh.get("primitives", ())]
    if others := sum(mode in (1, 2, 3, 6) for mode in modes):
        said.append(f"has {others} of {len(modes)} parts of lines or fans, which are left out")
    return said


def _check_sharing(path: Path, tree: dict[str, Any], size: int) -> None:
    """Refuse parts that share arrays so often that their copies, which trimesh makes, fill the memory."""
    if len(tree.get("nodes", ())) > _MOST_NODES:
        raise InputError(f"{path} has more than {_MOST_NODES:,} parts in its scene: join them, or export points.")
    accessors, total = tree.get("accessors", ()), 0
    for mesh in tree.get("meshes", ()):
        for part in mesh.get("primitives", ()):
            used = [*part.get("attributes", {}).values(), *(part[key] for key in ("indices",) if key in part)]
            total += sum(_LARGEST_ENTRY * min(int(accessors[i]["count"]), size) for i in used)
    check_room(max(total - _LARGEST_ENTRY * size, 0), "what its parts share")


def check_obj(path: Path, content: bytes) -> None:
    """Refuse more materials than scenes have: trimesh makes a part of each, in a time that grows with their square."""
    if len(set(re.findall(rb"^usemtl[ \t]+(.*)", content, re.MULTILINE))) > _MOST_MATERIALS:
        raise InputError(f"{path} has more than {_MOST_MATERIALS:,} materials: join them, or export points.")


def check_stl(path: Path, content: bytes) -> None:
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


def text_colors(kind: str, content: bytes) -> tuple[Colored, list[str]] | None:
    """Read the places and colours of the vertices of an OBJ or OFF file, and sentences on what was assumed.

    Trimesh leaves out those of OFF files and of OBJ files with a material, and cuts numbers at 1. None without colours.
    """
    if kind == "obj":
        rows = np.array(_COLORED.findall(content), np.float64).reshape(-1, 6)
        if not len(rows) or len(rows) < len(re.findall(rb"^v[ \t]", content, re.MULTILINE)):
            return None
    else:
        name, vertices, _ = _off_lines(content)
        first = 6 if b"N" in name else 3
        if not vertices or len(vertices[0]) < first + 3:
            return None
        rows = np.array([line[:3] + line[first : first + 3] for line in vertices], np.float64).reshape(-1, 6)
    colors = rows[:, 3:]
    if (colors < 0).any():  # rather normals
        return None
    is_bytes = colors.max(initial=0) > 1 + _ROUNDING
    said = ["has colours beyond 1, which are taken as 0-255"] * bool(is_bytes and kind == "obj")
    full = 255 * np.clip(colors / (255 if is_bytes else 1), 0, 1)
    return (rows[:, :3], np.rint(full).astype(np.uint8)), said


def _off_lines(content: bytes) -> tuple[bytes, list[list[bytes]], list[list[bytes]]]:
    """Split an OFF file into the name of its kind and the words of its vertices and of its faces."""
    lines = [line for line in (each.split(b"#")[0].split() for each in content.splitlines()) if line]
    start = 1 if len(lines[0]) > 1 else 2  # the counts may be on the first line
    vertices, faces = (int(word) for word in lines[start - 1][-3:-1])
    lines = [*lines[:1], *lines[start:]]
    return lines[0][0], lines[1 : 1 + vertices], lines[1 + vertices : 1 + vertices + faces]


def color_faces(scene: Any, content: bytes) -> list[str]:
    """Give the triangles of an OFF file the colours that stand behind their corners; say where that cannot be done."""
    faces = _off_lines(content)[2]
    if not any(len(face) >= int(face[0]) + 4 for face in faces):
        return []
    meshes = list(scene.geometry.values())
    if [len(mesh.faces) for mesh in meshes] != [len(faces)] or any(len(face) not in (7, 8) for face in faces):
        return ["has colours at some faces, or at faces of more than three corners, which are not read"]
    colors = np.array([face[4:7] for face in faces], np.float64)
    meshes[0].visual.face_colors = np.clip(np.rint(colors * (1 if colors.max() > 1 else 255)), 0, 255).astype(np.uint8)
    return []


def without_comments(content: bytes) -> bytes:
    """Leave out what stands behind the numbers of an OBJ file's lines, which trimesh takes for damage."""
    return _COMMENT.sub(rb"\1", content) if b"#" in content else content


def count_from_first(content: bytes) -> bytes:
    """Number the corners of an OBJ file's faces from its first vertex: they may count back from the face itself."""
    if not re.search(rb"^f\s.*-\d", content, re.MULTILINE):
        return content
    counts, lines = {b"v": 0, b"vt": 0, b"vn": 0}, []
    for line in content.splitlines():
        word = line.split(None, 1)[0] if line.strip() else b""
        if word in counts:
            counts[word] += 1
        elif word == b"f":
            line = b"f " + b" ".join(_absolute(corner, list(counts.values())) for corner in line.split()[1:])
        lines.append(line)
    return b"\n".join(lines)


def _absolute(corner: bytes, counts: list[int]) -> bytes:
    numbers = [
        number if int(number or 0) >= 0 else b"%d" % (count + 1 + int(number))
        for number, count in zip(corner.split(b"/"), counts, strict=False)
    ]
    return b"/".join(numbers)
