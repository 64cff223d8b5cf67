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
          ["up": "y", "unit": "mm",]          of a file whose y points up, in mm; without them z and m
          "boxes": [
            {
              "center": [x, y, z],            gravity centre
              "size": [dx, dy, dz],           along the axes of the file, before the box is turned
              "yaw": 0.0,                     counter-clockwise about z (or the axis that is up), in [-pi, pi)
              "score": 0.93,                  0 to 1
              "label": 2,
              "name": "chair"
            }
          ]
        }
      ]
    }

A detector works in the frame of its dataset; `Scan.transform` leads there from the input file, by a rotation about z
and a shift (for a user's own scans also from another axis that points up and another unit, see
`h2a2_jax.inputs.scan_folder`), and boxes are led back by its inverse. A box that is axis-aligned in the dataset's frame
(ScanNet, after its alignment) is therefore turned in the input file's, by minus the angle of the alignment: its yaw
says so.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from h2a2_jax.boxes.detections import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.inputs.scan import Scan
from h2a2_jax.inputs.scan_folder import UNITS, UPRIGHT
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
        transform: from the file's frame to the scan's: a rotation about z and a shift, of a file in m, cm or mm whose
            x, y or z points up or down.

    Returns:
        The boxes with yaw in [-pi, pi), float64, in the unit of the file; sizes along its axes, yaw about the one that
        points up.

    Raises:
        ValueError: the transform scales, mirrors or tilts, as that of an augmented scan may.
    """
    up, unit = _file_frame(transform)
    matrix, upright = transform.astype(np.float64), np.array(UPRIGHT[up], np.float64)
    turned = matrix[:3, :3] @ upright.T / UNITS[unit]
    angle = math.atan2(turned[1, 0], turned[0, 0])
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    if np.abs(turned - rotation).max() > _TOLERANCE:
        raise _not_led_back(transform)
    moved = boxes.astype(np.float64)
    moved[:, :3] = (moved[:, :3] - matrix[:3, 3]) @ rotation @ upright / UNITS[unit]
    moved[:, 3:6] = moved[:, 3:6] @ np.abs(upright) / UNITS[unit]
    moved[:, 6] = (moved[:, 6] - angle + math.pi) % (2 * math.pi) - math.pi
    return moved


def _file_frame(transform: np.ndarray) -> tuple[str, str]:
    """Which axis of the file points up, and the file's unit."""
    metres = float(np.linalg.norm(transform[2, :3]))
    for unit, size in UNITS.items():
        for up, upright in UPRIGHT.items():
            if abs(metres / size - 1) < _TOLERANCE and np.abs(transform[2, :3] / size - upright[2]).max() < _TOLERANCE:
                return up, unit
    raise _not_led_back(transform)


def _not_led_back(transform: np.ndarray) -> ValueError:
    return ValueError(
        f"the scan's transform {transform[:3, :3].round(4).tolist()} is no rotation about z; "
        "boxes can be led back only for scans that were not augmented."
    )


def _scan_entry(scan: Scan, found: Detections, spec: DatasetSpec) -> dict[str, Any]:
    boxes = boxes_in_input_frame(found.boxes, scan.transform)
    up, unit = _file_frame(scan.transform)
    return {
        "name": scan.name,
        **({} if (up, unit) == ("z", "m") else {"up": up, "unit": unit}),
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
