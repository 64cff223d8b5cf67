"""Prediction files: schema, round trip, the frame of the input file."""

import json
import math

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.errors import InputError
from h2a2_jax.inference.results import (
    boxes_in_input_frame,
    document_of,
    read_predicted_scans,
)
from h2a2_jax.loader.augment import mirror, rescale, rotate, translate
from h2a2_jax.scans.frame import UPRIGHT
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.scan_folder import _box_entry, _Wrong
from h2a2_jax.scans.specs import SCANNET, SUNRGBD
from tests.inference.entries import scan_entry

BOXES = np.array([[1, 2, 0.5, 0.6, 0.7, 1, 0.3], [-4, 0, 1, 2, 1, 0.5, -3.1]], np.float32)
FOUND = Detections(BOXES, np.array([0.9, 0.25], np.float32), np.array([3, 0], np.int32))
SCAN = Scan("a", np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), BOXES, FOUND.labels)


def test_schema_and_round_trip():
    empty = Detections(np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    entries = (scan_entry(name, SCAN.transform, found, SUNRGBD) for name, found in (("a", FOUND), ("b", empty)))
    document = json.loads(json.dumps(document_of(entries, SUNRGBD)))
    assert {k: v for k, v in document.items() if k != "scans"} == {
        "version": 1,
        "frame": "input file, z up",
        "units": {"length": "m", "angle": "rad"},
        "dataset": "sunrgbd",
    }
    assert document["scans"][0]["boxes"][0] == {
        "center": [1.0, 2.0, 0.5],
        "size": [0.6, 0.7, 1.0],
        "yaw": 0.3,
        "score": 0.9,
        "label": 3,
        "name": "chair",
    }
    one, other = read_predicted_scans(document)
    assert (one.name, other.name) == ("a", "b") and len(other.detections) == 0
    np.testing.assert_allclose(one.detections.boxes, BOXES, atol=1e-6)
    np.testing.assert_allclose(one.detections.scores, FOUND.scores, atol=1e-6)
    assert one.detections.labels.tolist() == [3, 0]


@pytest.mark.parametrize("angle", [0.4, -2.5])
def test_boxes_return_to_the_frame_of_the_file(angle: float):
    moved = translate(rotate(SCAN, angle, has_yaw=True), np.array([5.0, -3, 0.25]))
    back = boxes_in_input_frame(moved.boxes, moved.transform)
    np.testing.assert_allclose(back, BOXES, atol=1e-5)


def test_an_axis_aligned_box_is_turned_in_the_file():
    aligned = rotate(SCAN, 0.4, has_yaw=False)
    box = np.array([[1, 0, 0, 2, 1, 1, 0]], np.float32)
    (back,) = boxes_in_input_frame(box, aligned.transform)
    np.testing.assert_allclose(back, [math.cos(0.4), -math.sin(0.4), 0, 2, 1, 1, -0.4], atol=1e-6)


@pytest.mark.parametrize("moved", [mirror(SCAN, 0), rescale(SCAN, 1.1)])
def test_augmented_scans_are_refused(moved: Scan):
    with pytest.raises(ValueError, match="no rotation about z"):
        scan_entry(moved.name, moved.transform, FOUND, SCANNET)


def moved_file(matrix: np.ndarray) -> np.ndarray:
    """Corners of the scan's boxes in the frame of a file, from the transform that leads from it to the scan."""
    corners = box_corners(BOXES)
    return (corners - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T


def tilt(degrees: float) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


@pytest.mark.parametrize(("degrees", "tilted"), [(0, False), (17, True), (-80, True)])
@pytest.mark.parametrize(("up", "unit"), [("z", 1), ("y", 0.001), ("-x", 0.01)])
def test_corners_of_any_file(degrees: float, tilted: bool, up: str, unit: float):
    matrix = np.eye(4)
    matrix[:3, :3] = tilt(degrees) @ np.array(UPRIGHT[up]) * unit
    matrix[:3, 3] = [-500_000, 3, 1]
    entry = json.loads(json.dumps(scan_entry("a", matrix, FOUND, SUNRGBD, file="a.ply")))
    document = {"version": 1, "scans": [entry]}
    (scan,) = read_predicted_scans(document)
    assert ("alignment" in entry) is tilted and scan.file == "a.ply"
    assert [box.get("upright", True) for box in entry["boxes"]] == [not tilted] * 2
    # A corner may have another number, for sizes go along other axes; the set of corners is the same.
    expected, found = moved_file(matrix) * unit, scan.corners * unit
    for one, other in zip(expected, found, strict=True):
        distances = np.linalg.norm(one[:, None] - other[None], axis=-1)
        assert distances.min(axis=0).max() < 1e-5 and distances.min(axis=1).max() < 1e-5
    if tilted:
        with pytest.raises(_Wrong, match="does not stand upright in its file"):
            _box_entry(entry["boxes"][0], "box 1")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("unit", [1, 0.001])
def test_map_coordinates_are_exact_whatever_the_rounding_of_a_rotation(dtype: type, unit: float):
    # A tilt of 0.04 degrees is none to tell of a box, and is 300 m at the places of a map.
    matrix = np.eye(4)
    matrix[:3, :3] = tilt(0.04 if dtype is np.float64 else 0) * unit
    shift = np.array([-499_968, -5_500_032, -96.0])
    matrix[:3, 3] = matrix[:3, :3] @ shift / unit
    back = boxes_in_input_frame(BOXES, matrix.astype(dtype))
    expected = BOXES[:, :3] @ matrix[:3, :3] / unit - shift
    np.testing.assert_allclose(back[:, :3] * unit, expected, rtol=0, atol=1e-5)


INCOMPLETE = {"version": 1, "scans": [{"name": "a", "boxes": [{}]}]}


@pytest.mark.parametrize("document", [{"version": 2}, {"version": 1}, INCOMPLETE])
def test_other_documents_are_refused(document: dict):
    with pytest.raises(InputError, match="predict again"):
        read_predicted_scans(document)
