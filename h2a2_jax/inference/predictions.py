"""Boxes as JSON, in the coordinates of the file the points came from.

Schema, version 1:

    {
      "version": 1,
      "frame": "input file, z up",           x, y, z are those of the points as the input file stores them
      "units": {"length": "m", "angle": "rad"},
      "dataset": "scannet",                   whose classes the labels count
      "scans": [
        {
          "name": "scene0000_00",
          "boxes": [
            {
              "center": [x, y, z],            gravity centre
              "size": [dx, dy, dz],           along the box's own axes, before it is turned
              "yaw": 0.0,                     counter-clockwise about z, in [-pi, pi)
              "score": 0.93,                  0 to 1
              "label": 2,
              "name": "chair"
            }
          ]
        }
      ]
    }

A detector works in the frame of its dataset; `Scan.transform` leads there from the input file, by a rotation about z
and a shift, and boxes are led back by its inverse. A box that is axis-aligned in the dataset's frame (ScanNet, after
its alignment) is therefore turned in the input file's, by minus the angle of the alignment: its yaw says so.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from h2a2_jax.boxes.detections import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.inputs.scan import Scan
from h2a2_jax.inputs.specs import DatasetSpec

PREDICTIONS_VERSION = 1
_FRAME = "input file, z up"
_UNITS = {"length": "m", "angle": "rad"}
_TOLERANCE = 1e-3


def predictions_json(scans: Iterable[Scan], detections: Iterable[Detections], spec: DatasetSpec) -> dict[str, Any]:
    """The document of the boxes found in scans, ready for `json.dump`.

    Args:
        scans: only name and transform are read; an iterator will do, so that points need not stay in memory.
        detections: boxes of each scan, in the scan's frame.
        spec: of the dataset whose classes the labels count.

    Raises:
        ValueError: see `boxes_in_input_frame`; or there are not as many scans as detections.
    """
    return {
        "version": PREDICTIONS_VERSION,
        "frame": _FRAME,
        "units": dict(_UNITS),
        "dataset": spec.name,
        "scans": [_scan_entry(scan, found, spec) for scan, found in zip(scans, detections, strict=True)],
    }


def read_predictions(document: dict[str, Any]) -> dict[str, Detections]:
    """Boxes by scan name, in the frame of the input files, from a document of `predictions_json`.

    Raises:
        InputError: the document has another version or lacks something.
    """
    if document.get("version") != PREDICTIONS_VERSION:
        raise InputError(
            f"The predictions have version {document.get('version')}, this program reads version "
            f"{PREDICTIONS_VERSION}: predict again."
        )
    try:
        return {scan["name"]: _detections(scan["boxes"]) for scan in document["scans"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"The predictions cannot be read ({type(error).__name__}: {error}): predict again.") from error


def boxes_in_input_frame(
    boxes: Float[np.ndarray, "n 7"], transform: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "n 7"]:
    """Boxes led back from the frame of a scan to that of its file.

    Args:
        boxes: centre, sizes (m), yaw (rad) in the scan's frame.
        transform: from the file's frame to the scan's: a rotation about z and a shift.

    Returns:
        The boxes with yaw in [-pi, pi), float64.

    Raises:
        ValueError: the transform scales, mirrors or tilts, as that of an augmented scan may.
    """
    matrix = transform.astype(np.float64)
    angle = math.atan2(matrix[1, 0], matrix[0, 0])
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    if np.abs(matrix[:3, :3] - rotation).max() > _TOLERANCE:
        raise ValueError(
            f"the scan's transform {matrix[:3, :3].round(4).tolist()} is no rotation about z; "
            "boxes can be led back only for scans that were not augmented."
        )
    moved = boxes.astype(np.float64)
    moved[:, :3] = (moved[:, :3] - matrix[:3, 3]) @ rotation
    moved[:, 6] = (moved[:, 6] - angle + math.pi) % (2 * math.pi) - math.pi
    return moved


def _scan_entry(scan: Scan, found: Detections, spec: DatasetSpec) -> dict[str, Any]:
    boxes = boxes_in_input_frame(found.boxes, scan.transform)
    return {
        "name": scan.name,
        "boxes": [
            {
                "center": box[:3].round(6).tolist(),
                "size": box[3:6].round(6).tolist(),
                "yaw": round(float(box[6]), 6),
                "score": round(float(score), 6),
                "label": int(label),
                "name": spec.classes[label],
            }
            for box, score, label in zip(boxes, found.scores, found.labels, strict=True)
        ],
    }


def _detections(entries: list[dict[str, Any]]) -> Detections:
    boxes = [[*entry["center"], *entry["size"], entry["yaw"]] for entry in entries]
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 7),
        np.array([entry["score"] for entry in entries], np.float32),
        np.array([entry["label"] for entry in entries], np.int32),
    )
