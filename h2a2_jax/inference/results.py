"""Boxes as JSON, in the coordinates of the file the points came from.

Schema, version 1:

    {
      "version": 1,
      "frame": "input file, z up",           x, y, z are those of the points as the input file stores them
      "units": {"length": "m", "angle": "rad"},
      "dataset": "scannet",                   those of the scans; null for boxes of no dataset
      "scans": [
        {
          "name": "scene0000_00",
          ["file": "scans/scene0000_00.ply",] path of the input file
          ["dataset": "scannet",]             dataset whose head found the boxes
          ["up": "y", "unit": "mm",]          if the file's y points up and its unit is mm; without them z and m
          ["remarks": ["has its floor ..."],] what was decided or looks odd, parts of sentences
          ["alignment": [[...], ...],]        3 x 3, if the file's ground is tilted, see below
          "boxes": [
            {
              "center": [x, y, z],            gravity centre
              "size": [dx, dy, dz],           along the axes of the file, before the box is turned
              "yaw": 0.0,                     counter-clockwise about z (or the axis that is up), in [-pi, pi)
              ["upright": false,]             if the scan has an alignment
              "score": 0.93,                  0 to 1
              "label": 2,                     index among the classes of the dataset
              "name": "chair"
            }
          ]
        }
      ]
    }

A detector works in the frame of its dataset. `Scan.transform` maps the input file's frame to it by a rotation about z
and a shift (for a user's own scans also from another axis that points up and another unit, see
`h2a2_jax.scans.scan_folder`), and its inverse maps boxes back. A box that is axis-aligned in the dataset's frame
(ScanNet, after its alignment) is therefore turned in the input file's, by minus the angle of the alignment, which is
its yaw.

A file whose ground is tilted has boxes that stand upright along none of its axes. Its scan has "alignment", a rotation
R from the axes of the file to upright ones, z up (aligned = R @ file), and each of its boxes has "upright": false. The
centre of such a box is in the file's frame like any other, its size is along the upright axes before the box is turned,
and its yaw is about the upright z. A corner is then center + R.T @ Rz(yaw) @ (+-dx/2, +-dy/2, +-dz/2).
`PredictedScan.corners` gives corners in the file's frame and unit for any scan.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.scans.frame import UNITS, UPRIGHT
from h2a2_jax.scans.specs import DatasetSpec

PREDICTIONS_VERSION = 1
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class PredictedScan:
    """The boxes of one scan in a document, whose schema says more.

    Attributes:
        name: name of the scan.
        detections: boxes (float64) in the frame and unit of the file; in a tilted file upright.
        up: axis of the file that points up.
        unit: unit of the file.
        alignment: rotation from the axes of a tilted file to upright ones; None for other files.
        file: path of the input file; None if the document has none.
    """

    name: str
    detections: Detections
    up: str = "z"
    unit: str = "m"
    alignment: Float[np.ndarray, "3 3"] | None = None
    file: str | None = None

    @property
    def quaternions(self) -> Float[np.ndarray, "n 4"]:
        """The rotations as unit quaternions w, x, y, z, w >= 0."""
        from scipy.spatial.transform import Rotation  # takes .2 s

        if not len(self.detections):
            return np.zeros((0, 4))
        return Rotation.from_matrix(self.rotations).as_quat(canonical=True, scalar_first=True)

    @property
    def rotations(self) -> Float[np.ndarray, "n 3 3"]:
        """The rotation of each box: a corner is center + rotation @ (+-dx/2, +-dy/2, +-dz/2)."""
        yaw = self.detections.boxes[:, 6].astype(np.float64)
        turns = np.zeros((len(yaw), 3, 3))
        turns[:, 0, 0] = turns[:, 1, 1] = np.cos(yaw)
        turns[:, 1, 0] = np.sin(yaw)
        turns[:, 0, 1] = -turns[:, 1, 0]
        turns[:, 2, 2] = 1
        if self.alignment is not None:
            return self.alignment.T @ turns
        upright = np.array(UPRIGHT[self.up], np.float64)
        return upright.T @ turns @ upright

    @property
    def corners(self) -> Float[np.ndarray, "n 8 3"]:
        """Corners of the boxes in the frame and unit of the file, float64, numbered as in `box_corners`."""
        boxes = self.detections.boxes.astype(np.float64)
        still = np.concatenate([np.zeros((len(boxes), 3)), boxes[:, 3:6], np.zeros((len(boxes), 1))], axis=1)
        return np.einsum("nij,nkj->nki", self.rotations, box_corners(still)) + boxes[:, None, :3]


def document_of(entries: Iterable[dict[str, Any]], spec: DatasetSpec | str | None) -> dict[str, Any]:
    """The document of entries (`entry_of`) of scans, ready for `json.dump`.

    `spec` is the dataset whose head found the boxes, its name, or None for boxes of no dataset.
    """
    return {
        "version": PREDICTIONS_VERSION,
        "frame": "input file, z up",
        "units": {"length": "m", "angle": "rad"},
        "dataset": spec.name if isinstance(spec, DatasetSpec) else spec,
        "scans": list(entries),
    }


def in_file(
    name: str, transform: Float[np.ndarray, "4 4"], found: Detections, file: str | None = None
) -> PredictedScan:
    """Lead the boxes of a scan back to the frame and unit of its file, whose path is `file`.

    The transform leads from the frame and unit of the file to that of the boxes found; float64 keeps map coordinates
    exact.

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
    return PredictedScan(name, Detections(boxes, found.scores, found.labels), up, unit, alignment, file)


def entry_of(scan: PredictedScan, classes: Sequence[str], dataset: str | None) -> dict[str, Any]:
    """The entry of a scan in a document, with the names of its boxes' classes by label, and whose head found them."""
    found, (up, unit), alignment, file = scan.detections, (scan.up, scan.unit), scan.alignment, scan.file
    return {
        "name": scan.name,
        **({} if file is None else {"file": file}),
        **({} if dataset is None else {"dataset": dataset}),
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
                "name": classes[label],
            }
            for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
        ],
    }


def read_predicted_scans(document: dict[str, Any]) -> list[PredictedScan]:
    """Read the scans of a document.

    Raises:
        InputError: the document has another version or lacks something.
    """
    version = document.get("version")
    if version != PREDICTIONS_VERSION:
        known = PREDICTIONS_VERSION
        raise InputError(f"The predictions have version {version}, this program reads version {known}: predict again.")
    try:
        return [predicted_scan(entry) for entry in document["scans"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The predictions cannot be read ({type(error).__name__}: {error}): predict again.") from error


def boxes_in_input_frame(
    boxes: Float[np.ndarray, "n 7"], transform: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "n 7"]:
    """Transform boxes from the frame of a scan back to that of its file.

    It leads from the file's frame to the scan's: a rotation about z and a shift, for a file in one of `UNITS`
    whose x, y or z points up or down.

    Returns:
        The boxes with yaw in [-pi, pi), float64, in the unit of the file; sizes along its axes, yaw about the one that
        points up.

    Raises:
        ValueError: the transform scales, mirrors or tilts, as that of an augmented scan may.
    """
    up, unit = _file_frame(transform)
    upright = np.array(UPRIGHT[up], np.float64)
    rotation, angle = _turn(transform, up, unit)
    moved = boxes.astype(np.float64)
    moved[:, :3] = (moved[:, :3] - transform[:3, 3].astype(np.float64)) @ rotation @ upright / UNITS[unit]
    moved[:, 3:6] = moved[:, 3:6] @ np.abs(upright) / UNITS[unit]
    moved[:, 6] = _wrapped(moved[:, 6] - angle)
    return moved


def boxes_in_scan_frame(scan: PredictedScan, transform: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "n 7"]:
    """Transform the boxes of a file to the frame of its scan, the inverse of `in_file`; float64, in metres, z up."""
    moved, metres = scan.detections.boxes.astype(np.float64), UNITS[scan.unit]
    moved[:, :6] *= metres
    if scan.alignment is not None:
        moved[:, :3] = moved[:, :3] @ scan.alignment.T
    else:
        upright = np.array(UPRIGHT[scan.up], np.float64)
        rotation, angle = _turn(transform, scan.up, scan.unit)
        moved[:, :3] = moved[:, :3] @ upright.T @ rotation.T
        moved[:, 3:6] = moved[:, 3:6] @ np.abs(upright).T
        moved[:, 6] = _wrapped(moved[:, 6] + angle)
    moved[:, :3] += transform[:3, 3].astype(np.float64)
    return moved


def _turn(transform: np.ndarray, up: str, unit: str) -> tuple[Float[np.ndarray, "3 3"], float]:
    """The rotation of a transform behind that which turns `up` to z, and its angle about z."""
    turned = transform[:3, :3].astype(np.float64) @ np.array(UPRIGHT[up], np.float64).T / UNITS[unit]
    angle = math.atan2(turned[1, 0], turned[0, 0])
    cos, sin = math.cos(angle), math.sin(angle)
    if np.abs(turned - np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])).max() > _TOLERANCE:
        raise _no_inverse(transform)
    # A tilt too small for a box's yaw is kilometres in the frame of a map: centres take the whole rotation.
    left, _, right = np.linalg.svd(turned)
    return left @ right, angle


def _wrapped(angles: np.ndarray) -> np.ndarray:
    return (angles + math.pi) % (2 * math.pi) - math.pi


def _file_frame(transform: np.ndarray) -> tuple[str, str]:
    """The axis of the file that points up, and the file's unit."""
    metres = float(np.linalg.norm(transform[2, :3]))
    for (unit, size), (up, upright) in itertools.product(UNITS.items(), UPRIGHT.items()):
        if abs(metres / size - 1) < _TOLERANCE and np.abs(transform[2, :3] / size - upright[2]).max() < _TOLERANCE:
            return up, unit
    raise _no_inverse(transform)


def _no_inverse(transform: np.ndarray) -> ValueError:
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
    raise _no_inverse(transform)


def predicted_scan(entry: dict[str, Any]) -> PredictedScan:
    """Read the entry of one scan.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: the entry lacks something or is damaged.
    """
    alignment = entry.get("alignment")
    if alignment is not None:
        alignment = np.array(alignment, np.float64)
        if alignment.shape != (3, 3) or not np.abs(alignment @ alignment.T - np.eye(3)).max() < _TOLERANCE:
            raise ValueError(f"the alignment of {entry['name']} is no rotation")
    up, unit = entry.get("up", "z"), entry.get("unit", "m")
    if up not in UPRIGHT or unit not in UNITS:
        raise ValueError(f"the frame of {entry['name']} is {up} up in {unit}")
    boxes = [[*box["center"], *box["size"], box["yaw"]] for box in entry["boxes"]]
    found = Detections(
        np.array(boxes, np.float64).reshape(-1, 7),
        np.array([box["score"] for box in entry["boxes"]], np.float32),
        np.array([box["label"] for box in entry["boxes"]], np.int32),
    )
    return PredictedScan(entry["name"], found, up, unit, alignment, entry.get("file"))
