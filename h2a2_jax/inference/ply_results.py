"""Points with the class of the box that they are in, and frames of boxes, as binary PLY in the frame of the input.

Points are worked on and written in chunks: thirty million of them take no more memory than they have already.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.boxes.codec import BOX_EDGES, CORNER_SIGNS, box_corners
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.files import whole_file
from h2a2_jax.inference.input_files import OWN_COMMENT
from h2a2_jax.scans.scan import Scan, points_in_box

_CHUNK = 2_000_000  # points
_CELL = 0.5  # m, smallest side of a cell of the grid in which the points of a chunk are sorted
_MOST_CELLS = 60_000  # numbers of 16 bits are sorted in linear time
_NEAR = 1e3  # m, beyond which a float32 loses a tenth of a millimetre
_BAR = 0.012  # m, thickness of the bars of a box's frame
# Corners of each face, counter-clockwise seen from outside: programs take the other side of a face for its back.
_CUBE = ((0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5))
_TYPES: Mapping[str, str] = {"double": "<f8", "float": "<f4", "uchar": "u1", "int": "<i4", "uint": "<u4"}


def write_points(
    path: Path,
    scan: Scan,
    matrix: Float[np.ndarray, "4 4"],
    found: Detections,
    rows: Int[np.ndarray, " m"] | None = None,
) -> None:
    """Write the points of a scan as a binary PLY in the frame of its file.

    Vertices have x, y, z (double where float would lose a tenth of a millimetre), red, green, blue, label and instance
    (class and number of the box of the highest score that holds the point; -1 where there is none), score, and index.

    Args:
        path: path of the file.
        scan: the points.
        matrix: transform from the file's frame and unit to that of the scan and the boxes.
        found: boxes in the frame of the scan.
        rows: index of each point in the input file, from 0; None: the points are all of its points, in order.
    """
    ends = np.stack([scan.points.min(axis=0), scan.points.max(axis=0)]) if len(scan.points) else np.zeros((2, 3))
    corners = np.stack(np.meshgrid(*ends.T), axis=-1).reshape(-1, 3)
    extra = (("int", "label"), ("int", "instance"), ("float", "score"), ("uint", "index"))
    kind = _vertex_type(_real(corners, matrix), extra)

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(scan.points), _CHUNK):
            part = slice(start, start + _CHUNK)
            points = scan.points[part]
            vertices = np.empty(len(points), kind)
            _fill(vertices, points, scan.colors[part], matrix)
            vertices["label"], vertices["instance"], vertices["score"] = point_labels(points, found)
            vertices["index"] = np.arange(start, start + len(points)) if rows is None else rows[part]
            yield vertices

    _write_ply(path, len(scan.points), kind, chunks(), None)


def point_labels(
    points: Float[np.ndarray, "m 3"], found: Detections
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Class, number and score of the best box that holds each point; -1, -1 and 0 where there is none."""
    labels, instances = np.full(len(points), -1, np.int32), np.full(len(points), -1, np.int32)
    scores = np.zeros(len(points), np.float32)
    for start in range(0, len(points), _CHUNK):
        part = slice(start, start + _CHUNK)
        instance = instances[part]
        _mark(instance, points[part], found)
        held = instance >= 0
        labels[part][held], scores[part][held] = found.labels[instance[held]], found.scores[instance[held]]
    return labels, instances, scores


def _mark(instances: np.ndarray, points: np.ndarray, found: Detections) -> None:
    """Write the number of the best box that holds each point, in place."""
    low, high = points[:, :2].min(axis=0).astype(np.float64), points[:, :2].max(axis=0).astype(np.float64)
    boxes = found.boxes.astype(np.float64)
    reach = np.hypot(boxes[:, 3], boxes[:, 4])[:, None] / 2 + 1e-3
    first, last = boxes[:, :2] - reach, boxes[:, :2] + reach
    touching = ((last >= low) & (first <= high)).all(axis=1)
    if not touching.any():
        return
    cell = max(_CELL, float(np.sqrt(np.prod(high - low + _CELL) / _MOST_CELLS)), float((high - low).max() / 16_000))
    width, depth = (int(extent / cell) + 1 for extent in high - low)
    while width * depth > _MOST_CELLS:
        cell *= 1.1
        width, depth = (int(extent / cell) + 1 for extent in high - low)
    across, along = ((points[:, axis] - low[axis]) / cell for axis in (0, 1))
    cells = np.clip(along, 0, depth - 1).astype(np.uint16) * np.uint16(width)
    cells += np.clip(across, 0, width - 1).astype(np.uint16)
    order = np.argsort(cells, kind="stable").astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=width * depth))])
    for i in np.flatnonzero(touching)[np.argsort(found.scores[touching], kind="stable")]:
        left, front = np.maximum((first[i] - low) / cell, 0).astype(int)
        right, back = np.minimum((last[i] - low) / cell, (width - 1, depth - 1)).astype(int)
        near = np.concatenate(
            [order[starts[line + left] : starts[line + right + 1]] for line in width * np.arange(front, back + 1)]
        )
        instances[near[points_in_box(points[near].astype(np.float64), boxes[i])]] = i


def write_box_frames(path: Path, matrix: Float[np.ndarray, "4 4"], found: Detections) -> None:
    """Write boxes as a PLY mesh of bars along their edges, in the colours of their classes.

    The matrix transforms from the file's frame and unit to that of the boxes.
    """
    from h2a2_jax.viewer.content import class_color  # here, for training loads this module and draws nothing

    places, triangles = np.zeros((0, 3)), frame_triangles()
    colors, faces = np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    if len(found):
        boxes, corners = found.boxes.astype(np.float64), box_corners(found.boxes)
        axes = np.stack([corners[:, bit] - corners[:, 0] for bit in (1, 2, 4)], axis=1)
        axes /= np.maximum(np.linalg.norm(axes, axis=2, keepdims=True), 1e-12)
        bars = np.stack([frame_vertices(size) for size in boxes[:, 3:6]])
        places = (bars @ axes + boxes[:, None, :3]).reshape(-1, 3)
        colors = np.repeat([class_color(int(label)) for label in found.labels], bars.shape[1], axis=0)
        faces = (triangles + bars.shape[1] * np.arange(len(found))[:, None, None]).reshape(-1, 3)
    vertices = np.empty(len(places), _vertex_type(_real(places, matrix)))
    _fill(vertices, places, colors, matrix)
    _write_ply(path, len(vertices), vertices.dtype, [vertices], faces)


def frame_vertices(size: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "96 3"]:
    """Vertices of the bars along the 12 edges of a box about the origin, before it is turned (m)."""
    bars = []
    for one, other in BOX_EDGES:
        half = np.full(3, _BAR / 2)
        half[int(np.log2(one ^ other))] += size[int(np.log2(one ^ other))] / 2
        bars.append((CORNER_SIGNS[one] + CORNER_SIGNS[other]) * size / 4 + CORNER_SIGNS * half)
    return np.concatenate(bars)


def frame_triangles() -> Int[np.ndarray, "144 3"]:
    """Triangles between the vertices of `frame_vertices`, counter-clockwise seen from outside."""
    cube = np.array([(face[0], face[i], face[i + 1]) for face in _CUBE for i in (1, 2)])
    return (cube + 8 * np.arange(len(BOX_EDGES))[:, None, None]).reshape(-1, 3)


def _real(places: np.ndarray, matrix: np.ndarray) -> str:
    """The type of PLY that holds the coordinates of places in the frame of the file."""
    metres = float(np.linalg.norm(matrix[2, :3]))
    return "double" if np.abs(_in_file(places, matrix)).max(initial=0) * metres > _NEAR else "float"


def _in_file(places: np.ndarray, matrix: np.ndarray) -> Float[np.ndarray, "m 3"]:
    inverse = np.linalg.inv(matrix[:3, :3].astype(np.float64))
    x, y, z = (places[:, axis] - np.float64(matrix[axis, 3]) for axis in range(3))
    # Not by a product of matrices: BLAS takes twice the time for rows of three.
    return np.stack([row[0] * x + row[1] * y + row[2] * z for row in inverse], axis=1)


def _vertex_type(real: str, extra: Sequence[tuple[str, str]] = ()) -> np.dtype:
    properties = [*((real, axis) for axis in "xyz"), *(("uchar", channel) for channel in ("red", "green", "blue"))]
    return np.dtype([(name, _TYPES[kind]) for kind, name in (*properties, *extra)])


def _fill(vertices: np.ndarray, places: np.ndarray, colors: np.ndarray, matrix: np.ndarray) -> None:
    """Write places, in the frame of the file, and colours (given as 0-1) to rows of a PLY."""
    moved = _in_file(places, matrix)
    for i, (axis, channel) in enumerate(zip("xyz", ("red", "green", "blue"), strict=True)):
        vertices[axis], vertices[channel] = moved[:, i], np.round(255 * colors[:, i])


def _write_ply(
    path: Path, count: int, kind: np.dtype, vertices: Iterable[np.ndarray], faces: np.ndarray | None
) -> None:
    assert kind.fields is not None
    names = {np.dtype(code).str: name for name, code in _TYPES.items()}
    lines = ["ply", "format binary_little_endian 1.0", f"comment {OWN_COMMENT}", f"element vertex {count}"]
    lines += [f"property {names[field.str]} {name}" for name, (field, *_) in kind.fields.items()]
    if faces is not None:
        lines += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    with whole_file(path) as part, part.open("wb") as file:
        file.write("\n".join([*lines, "end_header", ""]).encode("ascii"))
        for chunk in vertices:
            chunk.tofile(file)
        if faces is not None:
            rows = np.empty(len(faces), np.dtype([("count", "u1"), ("corners", "<i4", (3,))]))
            rows["count"], rows["corners"] = 3, faces
            rows.tofile(file)
