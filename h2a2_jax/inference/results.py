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
          ["file": "scans/scene0000_00.ply",] the input file, as it was found
          ["up": "y", "unit": "mm",]          of a file whose y points up, in mm; without them z and m
          ["alignment": [[...], ...],]        of a file whose ground is tilted, 3 x 3, see below
          "boxes": [
            {
              "center": [x, y, z],            gravity centre
              "size": [dx, dy, dz],           along the axes of the file, before the box is turned
              "yaw": 0.0,                     counter-clockwise about z (or the axis that is up), in [-pi, pi)
              ["upright": false,]             of a scan with an alignment
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
`h2a2_jax.scans.scan_folder`), and boxes are led back by its inverse. A box that is axis-aligned in the dataset's frame
(ScanNet, after its alignment) is therefore turned in the input file's, by minus the angle of the alignment: its yaw
says so.

A file whose ground is tilted has boxes that stand upright along none of its axes. Its scan has "alignment", a rotation
R from the axes of the file to upright ones, z up (aligned = R @ file), and its boxes say so again ("upright": false):
their centre is in the file's frame as ever, their size along the upright axes before the box is turned, their yaw about
the upright z. A corner is then center + R.T @ Rz(yaw) @ (+-dx/2, +-dy/2, +-dz/2). `PredictedScan.corners` gives corners
in the file's frame and unit for any scan.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.scans.frame import UNITS, UPRIGHT
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import DatasetSpec

PREDICTIONS_VERSION = 1
_FRAME = "input file, z up"
_UNITS = {"length": "m", "angle": "rad"}
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class PredictedScan:
    """The boxes of one scan as a document has them.

    Attributes:
        name: of the scan.
        detections: boxes (float64) in the frame and unit of the file; those of a tilted file as the module says.
        up: axis of the file that points up.
        unit: of the file.
        alignment: of a tilted file, rotation from its axes to upright ones; else None.
        file: the input file, if the document says so.
    """

    name: str
    detections: Detections
    up: str = "z"
    unit: str = "m"
    alignment: Float[np.ndarray, "3 3"] | None = None
    file: str | None = None

    @property
    def rotations(self) -> Float[np.ndarray, "n 3 3"]:
        """The rotation of each box: a corner is center + rotation @ (+-dx/2, +-dy/2, +-dz/2)."""
        yaw = self.detections.boxes[:, 6].astype(np.float64)
        turns = np.zeros((len(yaw), 3, 3))
        turns[:, 0, 0], turns[:, 0, 1], turns[:, 1, 0], turns[:, 1, 1] = (
            np.cos(yaw),
            -np.sin(yaw),
            np.sin(yaw),
            np.cos(yaw),
        )
        turns[:, 2, 2] = 1
        if self.alignment is not None:
            return self.alignment.T @ turns
        upright = np.array(UPRIGHT[self.up], np.float64)
        return upright.T @ turns @ upright

    @property
    def corners(self) -> Float[np.ndarray, "n 8 3"]:
        """Corners of the boxes in the frame and unit of the file, float64; of bits as in `box_corners`."""
        boxes = self.detections.boxes.astype(np.float64)
        still = np.concatenate([np.zeros((len(boxes), 3)), boxes[:, 3:6], np.zeros((len(boxes), 1))], axis=1)
        return np.einsum("nij,nkj->nki", self.rotations, box_corners(still)) + boxes[:, None, :3]


def predictions_json(scans: Iterable[Scan], detections: Iterable[Detections], spec: DatasetSpec) -> dict[str, Any]:
    """The document of the boxes found in scans, ready for `json.dump`.

    Args:
        scans: only name and transform are read; an iterator will do, so that points need not stay in memory.
        detections: boxes of each scan, in the scan's frame.
        spec: of the dataset whose classes the labels count.

    Raises:
        ValueError: see `scan_entry`; or there are not as many scans as detections.
    """
    pairs = zip(scans, detections, strict=True)
    return document_of((scan_entry(scan.name, scan.transform, found, spec) for scan, found in pairs), spec)


def document_of(entries: Iterable[dict[str, Any]], spec: DatasetSpec) -> dict[str, Any]:
    """The document of entries of `scan_entry`."""
    return {
        "version": PREDICTIONS_VERSION,
        "frame": _FRAME,
        "units": dict(_UNITS),
        "dataset": spec.name,
        "scans": list(entries),
    }


def scan_entry(
    name: str, transform: Float[np.ndarray, "4 4"], found: Detections, spec: DatasetSpec, file: str | None = None
) -> dict[str, Any]:
    """What a document says of one scan.

    Args:
        name: of the scan.
        transform: from the frame and unit of the file to that of the boxes; float64 keeps map coordinates exact.
        found: boxes in the scan's frame.
        spec: of the dataset whose classes the labels count.
        file: the input file.

    Raises:
        ValueError: the transform scales or mirrors, as that of an augmented scan may.
    """
    try:
        up, unit = _file_frame(transform)
        boxes, alignment = boxes_in_input_frame(found.boxes, transform), None
    except ValueError:
        up, unit, alignment = "z", *_alignment(transform)
        boxes = found.boxes.astype(np.float64)
        boxes[:, :3] = (boxes[:, :3] - transform[:3, 3]) @ alignment / UNITS[unit]
        boxes[:, 3:6] /= UNITS[unit]
    return {
        "name": name,
        **({} if file is None else {"file": file}),
        **({} if (up, unit) == ("z", "m") else {"up": up, "unit": unit}),
        **({} if alignment is None else {"alignment": alignment.round(9).tolist()}),
        "boxes": [
            {
                "center": box[:3].round(6).tolist(),
                "size": box[3:6].round(6).tolist(),
                "yaw": round(float(box[6]), 6),
                **({} if alignment is None else {"upright": False}),
                "score": round(float(score), 6),
                "label": int(label),
                "name": spec.classes[label],
            }
            for box, score, label in zip(boxes, found.scores, found.labels, strict=True)
        ],
    }


def read_predictions(document: dict[str, Any]) -> dict[str, Detections]:
    """Boxes by scan name, in the frame of the input files, from a document of `predictions_json`.

    Raises:
        InputError: the document has another version or lacks something, or has a scan whose boxes are not upright in
            its file; `read_predicted_scans` reads those as well.
    """
    scans = read_predicted_scans(document)
    tilted = [scan.name for scan in scans if scan.alignment is not None]
    if tilted:
        raise InputError(
            f"The boxes of scan {tilted[0]} do not stand upright in its file, which was predicted with an alignment: "
            "read them with read_predicted_scans, or turn the file upright and predict again."
        )
    found = {scan.name: scan.detections for scan in scans}
    return {name: replace(boxes, boxes=boxes.boxes.astype(np.float32)) for name, boxes in found.items()}


def read_predicted_scans(document: dict[str, Any]) -> list[PredictedScan]:
    """The scans of a document of `predictions_json`, also of tilted files.

    Raises:
        InputError: the document has another version or lacks something.
    """
    if document.get("version") != PREDICTIONS_VERSION:
        raise InputError(
            f"The predictions have version {document.get('version')}, this program reads version "
            f"{PREDICTIONS_VERSION}: predict again."
        )
    try:
        return [_predicted_scan(entry) for entry in document["scans"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
    # A tilt too small to say of a box is kilometres in the frame of a map: centres are led back by the whole rotation.
    left, _, right = np.linalg.svd(turned)
    moved[:, :3] = (moved[:, :3] - matrix[:3, 3]) @ (left @ right) @ upright / UNITS[unit]
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
        f"the scan's transform {transform[:3, :3].round(4).tolist()} is no rotation about z and no other; "
        "boxes can be led back only for scans that were not augmented."
    )


def _alignment(transform: np.ndarray) -> tuple[str, Float[np.ndarray, "3 3"]]:
    """The file's unit, and the rotation of a transform that may tilt."""
    matrix = transform[:3, :3].astype(np.float64)
    metres = np.linalg.det(matrix)
    for unit, size in UNITS.items():
        rotation = matrix / size
        if abs(metres / size**3 - 1) < _TOLERANCE and np.abs(rotation @ rotation.T - np.eye(3)).max() < _TOLERANCE:
            return unit, rotation
    raise _not_led_back(transform)


def _predicted_scan(entry: dict[str, Any]) -> PredictedScan:
    alignment = entry.get("alignment")
    if alignment is not None:
        alignment = np.array(alignment, np.float64)
        if alignment.shape != (3, 3) or not np.abs(alignment @ alignment.T - np.eye(3)).max() < _TOLERANCE:
            raise ValueError(f"the alignment of {entry['name']} is no rotation")
    up, unit = entry.get("up", "z"), entry.get("unit", "m")
    if up not in UPRIGHT or unit not in UNITS:
        raise ValueError(f"the frame of {entry['name']} is {up} up in {unit}")
    return PredictedScan(entry["name"], _detections(entry["boxes"]), up, unit, alignment, entry.get("file"))


def _detections(entries: list[dict[str, Any]]) -> Detections:
    boxes = [[*entry["center"], *entry["size"], entry["yaw"]] for entry in entries]
    return Detections(
        np.array(boxes, np.float64).reshape(-1, 7),
        np.array([entry["score"] for entry in entries], np.float32),
        np.array([entry["label"] for entry in entries], np.int32),
    )
