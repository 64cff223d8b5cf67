"""glTF 2.0, binary (.glb): points and frames of boxes, for Blender, three.js, Windows and macOS viewers.

The scene is in metres with y up, as glTF is: (x, y, z) of an input with z up is (x, z, -y) there. The root node has
the scan's name and, in "extras", the origin (m, z up) that was taken off the coordinates of a scan on a map. Below it
are "points" and a node for each box, called as in "chair 0.93", whose own axes are those of the box; its "extras" have
class, label, score and sizes (m).
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from h2a2_jax.inference.exports.upright import plain_text, upright
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.input_files import OWN_COMMENT
from h2a2_jax.inference.ply_results import frame_triangles, frame_vertices

_Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float64)
_FLOAT, _UINT, _POINTS, _ARRAY, _INDICES = 5126, 5125, 0, 34962, 34963  # glTF's numbers


class _Buffer:
    """The binary part of a file, and what describes it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.views: list[dict[str, int]] = []
        self.accessors: list[dict[str, Any]] = []
        self._length = 0

    def add(self, values: np.ndarray, kind: int, target: int, **more: Any) -> int:
        """Append an array, whose rows take multiples of 4 bytes; returns the number of its accessor."""
        data = values.tobytes()
        self.views.append({"buffer": 0, "byteOffset": self._length, "byteLength": len(data), "target": target})
        shape = "SCALAR" if values.ndim == 1 else f"VEC{values.shape[1]}"
        view = {"bufferView": len(self.views) - 1, "componentType": kind, "count": len(values), "type": shape}
        self.accessors.append(view | more)
        self.parts.append(data)
        self._length += len(data)
        return len(self.accessors) - 1

    def add_places(self, places: Float[np.ndarray, "m 3"]) -> int:
        """Append places, with their extent, which glTF asks for."""
        places = places.astype("<f4")
        extent = {"min": places.min(axis=0).tolist(), "max": places.max(axis=0).tolist()}
        return self.add(places, _FLOAT, _ARRAY, **extent)


def write(path: Path, boxes: Boxes) -> None:
    """Write points and boxes as binary glTF."""
    from scipy.spatial.transform import Rotation  # takes .2 s

    from h2a2_jax.viewer.content import class_color  # here, for training loads this package and draws nothing

    placed, buffer = upright(boxes), _Buffer()
    root: dict[str, Any] = {"name": plain_text(boxes.scan.name), "children": []}
    root["extras"] = {"origin": placed.origin.tolist(), "origin_frame": "axes of the input turned to z up, metres"}
    nodes, meshes, materials = [root], list[dict[str, Any]](), list[dict[str, Any]]()

    def add_node(node: dict[str, Any], attributes: dict[str, int], **primitive: int) -> None:
        meshes.append({"name": node["name"], "primitives": [{"attributes": attributes, **primitive}]})
        root["children"].append(len(nodes))
        nodes.append({**node, "mesh": len(meshes) - 1})

    def add_material(name: str, color: list[float]) -> int:
        surface = {"baseColorFactor": [*color, 1.0], "metallicFactor": 0.0, "roughnessFactor": 1.0}
        materials.append({"name": name, "pbrMetallicRoughness": surface, "extensions": {"KHR_materials_unlit": {}}})
        return len(materials) - 1

    if len(placed.points):
        # Bytes have too few steps for dark colours in linear light, and not all programs read 16 bits.
        shades = _linear(np.arange(256) / 255).astype("<f4")[placed.colors]
        places = buffer.add_places(placed.points @ _Y_UP.T)
        attributes = {"POSITION": places, "COLOR_0": buffer.add(shades, _FLOAT, _ARRAY)}
        add_node({"name": "points"}, attributes, mode=_POINTS, material=add_material("points", [1.0, 1.0, 1.0]))
    if len(boxes):
        triangles = buffer.add(frame_triangles().reshape(-1).astype("<u4"), _UINT, _INDICES)
        colors: dict[int, int] = {}
        turns = Rotation.from_matrix(_Y_UP @ placed.rotations).as_quat(canonical=True)
        for i, (label, score, name) in enumerate(zip(boxes.labels.tolist(), boxes.scores, boxes.names, strict=True)):
            name = plain_text(name)
            if label not in colors:
                colors[label] = add_material(name, _linear(np.array(class_color(label))).tolist())
            extras = {"class": name, "label": label, "score": round(float(score), 6)}
            node = {
                "name": f"{name} {score:.2f}",
                "translation": (_Y_UP @ placed.centers[i]).tolist(),
                "rotation": turns[i].tolist(),
                "extras": extras | {"size": placed.sizes[i].round(6).tolist()},
            }
            frame = {"POSITION": buffer.add_places(frame_vertices(placed.sizes[i]))}
            add_node(node, frame, indices=triangles, material=colors[label])
    data = b"".join(buffer.parts)
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": OWN_COMMENT},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": nodes,
    }
    if meshes:
        document |= {"meshes": meshes, "materials": materials, "accessors": buffer.accessors}
        document |= {"bufferViews": buffer.views, "buffers": [{"byteLength": len(data)}]}
        document["extensionsUsed"] = ["KHR_materials_unlit"]
    else:
        del root["children"]
    text = json.dumps(document, ensure_ascii=True, allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    if data:
        chunks += struct.pack("<I4s", len(data), b"BIN\0") + data
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def _linear(values: np.ndarray) -> np.ndarray:
    """Colours 0-1 as glTF has them, in linear light, from sRGB."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
