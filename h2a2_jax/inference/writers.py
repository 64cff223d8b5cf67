"""Results of a prediction as files: boxes as JSON and as a table, points and boxes as PLY, a page, a picture, exports.

    DIR/predictions.json    boxes of all scans, the schema of `h2a2_jax.inference.results`
    DIR/boxes.csv           the same as a table, a line for each box
    DIR/<scan>.json         boxes of one scan
    DIR/<scan>_points.ply   its points in the frame of the file, with the class, number and score of the box they are in
                            and their index in the file
    DIR/<scan>_boxes.ply    frames of its boxes as a mesh, in the same frame
    DIR/<scan>.html, .png   the viewer's page and picture
    DIR/<scan>.glb          points and boxes as glTF, for Blender and the like (`exports.gltf`)
    DIR/<scan>.dxf          boxes for CAD (`exports.dxf`)
    DIR/<scan>.rrd          points and boxes for Rerun (`exports.rrd`)

boxes.csv has the columns `box_table.CSV_COLUMNS`.

Every file is written under another name and renamed when it is complete.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.inference.box_table import CSV_COLUMNS
from h2a2_jax.inference.exports import EXPORTS, export_boxes, require_packages
from h2a2_jax.inference.found_boxes import Boxes, frame_note
from h2a2_jax.inference.input_files import OWN_COMMENT
from h2a2_jax.inference.ply_results import write_box_frames, write_points
from h2a2_jax.inference.results import PREDICTIONS_VERSION

ALL_BOXES, TABLE = "predictions.json", "boxes.csv"


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a document as JSON."""
    with whole_file(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_scan(
    folder: Path,
    formats: Sequence[str],
    boxes: Boxes,
    *,
    truth: GroundTruth | None = None,
    shown: float = 0.3,
    every: Detections | None = None,
) -> None:
    """Write the results of one scan in some of `input_files.FORMATS`; "csv", a table of all scans, is not written here.

    Page and picture show `truth` beside the boxes, and boxes from the score `shown` on, the page until one moves its
    slider. The page has the boxes of `every` score, in the frame of the scan; None: those given.

    Raises:
        InputError: a package that a format needs is not installed.
    """
    scan, matrix, found = boxes.scan, boxes.to_scan, boxes.detections
    stem = folder / scan.name
    if "json" in formats:
        write_document(_with_end(stem, ".json"), boxes.to_dict())
    if "ply" in formats:
        write_points(_with_end(stem, "_points.ply"), scan, matrix, found, boxes.rows)
        write_box_frames(_with_end(stem, "_boxes.ply"), matrix, found)
    for kind in formats:
        if kind in EXPORTS:
            export_boxes(_with_end(stem, f".{kind}"), boxes)
    names, note = boxes.class_names, frame_note(matrix)
    if "html" in formats:
        from h2a2_jax.viewer.scan_page import write_viewer

        on_page = found if every is None else every
        with whole_file(_with_end(stem, ".html")) as part:
            write_viewer(part, scan, on_page, names, truth=truth, score=shown, note=note)
    if "png" in formats:
        from h2a2_jax.viewer.image import write_image

        with whole_file(_with_end(stem, ".png")) as part:
            write_image(part, scan, found, names, truth=truth, score=shown)


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
        InputError: it cannot be made or written to, a file of another program is in the place of a result, or a
            package that a format needs is not installed.
    """
    require_packages(formats)
    check_results_folder(folder)
    wanted = [folder / name for kind, name in (("json", ALL_BOXES), ("csv", TABLE)) if kind in formats]
    ends = {"json": (".json",), "ply": ("_points.ply", "_boxes.ply"), "html": (".html",), "png": (".png",)}
    ends |= {kind: (f".{kind}",) for kind in EXPORTS}
    for name in names:
        wanted += [_with_end(folder / name, end) for kind in formats for end in ends.get(kind, ())]
    for path in wanted:
        if path.is_dir() or (path.is_file() and not is_result(path)):
            problem = f"{path} is there already and is no result of a prediction"
            raise InputError(f"{problem}: choose another folder with --output.")


def is_result(path: Path) -> bool:
    """Return True for a file, of any of the formats, that a prediction wrote."""
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
