"""Results of a prediction as files: boxes as JSON and as a table, points and boxes as PLY, a page and a picture.

    DIR/predictions.json    boxes of all scans, the schema of `h2a2_jax.inference.results`
    DIR/boxes.csv           the same as a table, a line for each box
    DIR/<scan>.json         boxes of one scan
    DIR/<scan>_points.ply   its points in the frame of the file, with the class, number and score of the box they are in
    DIR/<scan>_boxes.ply    frames of its boxes as a mesh, in the same frame
    DIR/<scan>.html, .png   the viewer's page and picture

boxes.csv has the columns `CSV_COLUMNS`. In a file of any frame, a corner of a box is center + Q @ (+-size_x/2,
+-size_y/2, +-size_z/2), Q the rotation of the unit quaternion qw, qx, qy, qz.

Every file is written under another name and renamed when it is complete.
"""

import csv
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.boxes.codec import BOX_EDGES, CORNER_SIGNS, box_corners
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.inference.input_files import OWN_COMMENT
from h2a2_jax.inference.results import PREDICTIONS_VERSION, document_of, predicted_scan
from h2a2_jax.scans.scan import Scan, points_in_box
from h2a2_jax.scans.specs import DatasetSpec

CSV_COLUMNS = (
    *("scan", "file", "class", "label", "score"),
    *("center_x", "center_y", "center_z", "size_x", "size_y", "size_z", "yaw", "upright", "up", "unit"),
    *("qw", "qx", "qy", "qz"),
)
ALL_BOXES, TABLE = "predictions.json", "boxes.csv"
_BAR = 0.012  # m, thickness of the bars of a box's frame
# Corners of each face, counter-clockwise seen from outside: programs take the other side of a face for its back.
_CUBE = ((0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5))


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a document as JSON."""
    with whole_file(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_table(path: Path, entries: Iterable[dict[str, Any]], spec: DatasetSpec) -> None:
    """Write the boxes of scans, given by their entries (`results.scan_entry`), as a table."""
    from scipy.spatial.transform import Rotation  # takes .2 s

    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(CSV_COLUMNS)
        for entry in entries:
            scan = predicted_scan(entry)
            found = scan.detections
            # Rounded, so that 1e-17 is 0 in the table.
            turns = Rotation.from_matrix(scan.rotations).as_quat(scalar_first=True).round(9) if len(found) else ()
            upright = int(scan.alignment is None)
            for box, score, label, turn in zip(found.boxes, found.scores, found.labels, turns, strict=True):
                numbers = [f"{value:.9g}" if abs(value) < 1e5 else f"{value:.6f}" for value in box]
                named = (scan.name, scan.file or "", spec.classes[label], int(label), f"{score:.6g}")
                quaternion = (f"{value + 0:.9g}" for value in turn)
                rows.writerow([*named, *numbers, upright, scan.up, scan.unit, *quaternion])


def write_points(path: Path, scan: Scan, matrix: Float[np.ndarray, "4 4"], found: Detections) -> None:
    """Write the points of a scan as a binary PLY in the frame of its file.

    Vertices have x, y, z (double where float would lose a tenth of a millimetre), red, green, blue, label and instance
    (class and number of the box of the highest score that holds the point; -1 where there is none), score. The matrix
    transforms from the file's frame and unit to that of the scan and the boxes.
    """
    more = [("label", "<i4"), ("instance", "<i4"), ("score", "<f4")]
    rows = _vertices(scan.points.astype(np.float64), scan.colors, matrix, more)
    rows["label"], rows["instance"], rows["score"] = point_labels(scan.points, found)
    _write_ply(path, rows, None)


def point_labels(
    points: Float[np.ndarray, "m 3"], found: Detections
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Class, number and score of the best box that holds each point; -1, -1 and 0 where there is none."""
    labels, instances = np.full(len(points), -1, np.int32), np.full(len(points), -1, np.int32)
    scores = np.zeros(len(points), np.float32)
    order = np.argsort(points[:, 0], kind="stable")
    along = points[order, 0]
    for i in np.argsort(found.scores, kind="stable"):
        box = found.boxes[i].astype(np.float64)
        reach = np.hypot(box[3], box[4]) / 2 + 1e-3
        first, last = np.searchsorted(along, (box[0] - reach, box[0] + reach))
        near = order[first:last]
        inside = near[points_in_box(points[near].astype(np.float64), box)]
        labels[inside], instances[inside], scores[inside] = found.labels[i], i, found.scores[i]
    return labels, instances, scores


def write_box_frames(path: Path, matrix: Float[np.ndarray, "4 4"], found: Detections) -> None:
    """Write boxes as a PLY mesh of bars along their edges, in the colours of their classes.

    The matrix transforms from the file's frame and unit to that of the boxes.
    """
    from h2a2_jax.viewer.content import class_color  # here, for training loads this module and draws nothing

    vertices, colors, faces = [np.zeros((0, 3))], [np.zeros((0, 3))], [np.zeros((0, 3), np.int64)]
    triangles = np.array([(face[0], face[i], face[i + 1]) for face in _CUBE for i in (1, 2)])
    for number, (box, corners) in enumerate(zip(found.boxes, box_corners(found.boxes), strict=True)):
        axes = np.stack([corners[bit] - corners[0] for bit in (1, 2, 4)])
        axes /= np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), 1e-12)
        for bar, (one, other) in enumerate(BOX_EDGES):
            half = np.full(3, _BAR / 2)
            direction = int(np.log2(one ^ other))
            half[direction] += box[3 + direction] / 2
            vertices.append((corners[one] + corners[other]) / 2 + (CORNER_SIGNS * half) @ axes)
            faces.append(triangles + 8 * (len(BOX_EDGES) * number + bar))
        colors.append(np.tile(class_color(int(found.labels[number])), (8 * len(BOX_EDGES), 1)))
    rows = _vertices(np.concatenate(vertices), np.concatenate(colors), matrix)
    _write_ply(path, rows, np.concatenate(faces))


def write_scan(
    folder: Path,
    formats: Sequence[str],
    entry: dict[str, Any],
    scan: Scan,
    matrix: Float[np.ndarray, "4 4"],
    found: Detections,
    spec: DatasetSpec,
    truth: GroundTruth | None = None,
    shown: float = 0.3,
    every: Detections | None = None,
) -> None:
    """Write the results of one scan in some of `input_files.FORMATS`; "csv", a table of all scans, is not written here.

    The entry is that of `results.scan_entry`; the matrix transforms from the file's frame and unit to that of the scan
    and the boxes found. Page and picture show `truth` beside them, and boxes from the score `shown` on, the page until
    one moves its slider. The page has the boxes of `every` score; None: those found.
    """
    stem = folder / str(entry["name"])
    if "json" in formats:
        write_document(_with_end(stem, ".json"), document_of([entry], spec))
    if "ply" in formats:
        write_points(_with_end(stem, "_points.ply"), scan, matrix, found)
        write_box_frames(_with_end(stem, "_boxes.ply"), matrix, found)
    if "html" in formats or "png" in formats:
        from h2a2_jax.viewer.image import write_image
        from h2a2_jax.viewer.scan_page import write_viewer

        moved = not np.allclose(matrix, np.eye(4), rtol=0, atol=1e-9)
        note = "Numbers on this page are in metres with z up; JSON and CSV have those of the file." if moved else ""
        if "html" in formats:
            on_page = found if every is None else every
            with whole_file(_with_end(stem, ".html")) as part:
                write_viewer(part, scan, on_page, spec.classes, truth=truth, score=shown, note=note)
        if "png" in formats:
            with whole_file(_with_end(stem, ".png")) as part:
                write_image(part, scan, found, spec.classes, truth=truth, score=shown)


def check_results_folder(folder: Path) -> None:
    """Make a folder of results and check that files can be written to it.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{folder} cannot be written to ({reason}): choose another folder with --output.") from error


def check_output(folder: Path, names: Iterable[str], formats: Sequence[str]) -> None:
    """Make the folder of the results and check that those of scans with these names can be written to it.

    Raises:
        InputError: it cannot be made or written to, or a file of another program is in the place of a result.
    """
    check_results_folder(folder)
    wanted = [folder / name for kind, name in (("json", ALL_BOXES), ("csv", TABLE)) if kind in formats]
    ends = {"json": (".json",), "ply": ("_points.ply", "_boxes.ply"), "html": (".html",), "png": (".png",)}
    for name in names:
        wanted += [_with_end(folder / name, end) for kind in formats for end in ends.get(kind, ())]
    for path in wanted:
        if path.is_dir() or (path.is_file() and not _is_result(path)):
            problem = f"{path} is there already and is no result of a prediction"
            raise InputError(f"{problem}: choose another folder with --output.")


def _is_result(path: Path) -> bool:
    """Return True for a file that a prediction wrote."""
    try:
        with path.open("rb") as file:
            start = file.read(400)
        if path.suffix == ".json":
            document = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(document, dict) and document.get("version") == PREDICTIONS_VERSION and "frame" in document
    except (OSError, ValueError):
        return False
    return start.startswith(",".join(CSV_COLUMNS).encode()) or OWN_COMMENT.encode() in start


def _with_end(stem: Path, end: str) -> Path:
    return stem.with_name(stem.name + end)  # not with_suffix, for a name may hold a dot


def _vertices(
    places: np.ndarray, colors: np.ndarray, matrix: np.ndarray, more: Sequence[tuple[str, str]] = ()
) -> np.ndarray:
    """Rows of a PLY: places in the frame of the file, colours (given as 0-1), and further columns to fill in."""
    places = np.linalg.solve(matrix[:3, :3].astype(np.float64), (places - matrix[:3, 3]).T).T
    metres = float(np.linalg.norm(matrix[2, :3]))
    real = "<f8" if np.abs(places).max(initial=0) * metres > 1e3 else "<f4"
    channels = ("red", "green", "blue")
    rows = np.empty(len(places), np.dtype([*((axis, real) for axis in "xyz"), *((c, "u1") for c in channels), *more]))
    for i, (axis, channel) in enumerate(zip("xyz", channels, strict=True)):
        rows[axis], rows[channel] = places[:, i], np.round(255 * colors[:, i])
    return rows


def _write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray | None) -> None:
    names = {"<f8": "double", "<f4": "float", "|u1": "uchar", "<i4": "int"}
    assert vertices.dtype.fields is not None
    lines = ["ply", "format binary_little_endian 1.0", f"comment {OWN_COMMENT}", f"element vertex {len(vertices)}"]
    lines += [f"property {names[kind.str]} {name}" for name, (kind, *_) in vertices.dtype.fields.items()]
    if faces is not None:
        lines += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    with whole_file(path) as part, part.open("wb") as file:
        file.write("\n".join([*lines, "end_header", ""]).encode("ascii"))
        vertices.tofile(file)
        if faces is not None:
            rows = np.empty(len(faces), np.dtype([("count", "u1"), ("corners", "<i4", (3,))]))
            rows["count"], rows["corners"] = 3, faces
            rows.tofile(file)
