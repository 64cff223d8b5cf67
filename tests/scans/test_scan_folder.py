"""A user's own scans: frames, units, colours, boxes and splits come out as boxes.json says."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.scans.frame import UPRIGHT
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource, points_in_box, validate_scan
from h2a2_jax.scans.scan_folder import ScanFolder, folder_classes, is_scan_folder, point_cloud_files
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD
from tests.inference.entries import scan_entry

TURNED = dataclasses.replace(SUNRGBD, floor=0.0, faces_y=False)  # its classes and yaw, rooms as they lie
CHAIR = {"center": [1, 2, 0.5], "size": [0.6, 0.4, 1], "yaw": 0.3, "class": "chair"}


def write(root, scans=None, points=None, **keys):
    """A folder; without points every file named holds some."""
    scans = [{"file": "a.npy", "boxes": [CHAIR]}] if scans is None else scans
    (root / "boxes.json").write_text(json.dumps({"version": 1, "scans": scans, **keys}))
    rows = room(np.random.default_rng(0), 200) if points is None else points
    for scan in scans:
        (root / scan["file"]).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / scan["file"], rows)
    return root


def room(rng, count=4000):
    points = rng.uniform([0, 0, 0], [4, 3, 2.5], (count, 3))
    return np.concatenate([points, rng.uniform(0, 1, (count, 3))], axis=1)


def test_a_folder_in_metres_with_z_up(tmp_path):
    rows = room(np.random.default_rng(0))
    source = ScanFolder(write(tmp_path, points=rows), "train", TURNED)
    scan = source[0]
    assert isinstance(source, ScanSource) and source.names == ["a"] and len(source) == 1
    np.testing.assert_allclose(scan.points, rows[:, :3], atol=1e-6)
    np.testing.assert_allclose(scan.colors, rows[:, 3:], atol=1e-6)
    np.testing.assert_allclose(scan.boxes, [[1, 2, 0.5, 0.6, 0.4, 1, 0.3]], atol=1e-6)
    assert scan.labels.tolist() == [3] and scan.notes == {} and validate_scan(scan, 10) == []
    np.testing.assert_array_equal(scan.transform, np.eye(4))


def test_columns_of_the_files(tmp_path):
    rows = room(np.random.default_rng(0))
    source = ScanFolder(write(tmp_path, points=rows[:, [3, 4, 5, 0, 1, 2]], columns="r,g,b,x,y,z"), "train", SUNRGBD)
    np.testing.assert_allclose(source[0].points, rows[:, :3], atol=1e-6)
    np.testing.assert_allclose(source[0].colors, rows[:, 3:], atol=1e-6)
    with pytest.raises(InputError, match=r'its "columns" are wrong: --columns has the name'):
        ScanFolder(write(tmp_path, points=rows, columns="x,y,z,rgb"), "train", SUNRGBD)


@pytest.mark.parametrize(("up", "unit"), list(itertools.product(UPRIGHT, ["m", "cm", "mm"])))
def test_a_box_holds_the_same_points_after_conversion(tmp_path, up, unit):
    rng = np.random.default_rng(1)
    # In the files: metres times 1, 100, 1000, in a frame whose up axis is another. The rotation is made here from what
    # it must do: proper, and the up axis to z.
    axis = "xyz".index(up[-1])
    sign = -1 if up[0] == "-" else 1
    rotation = np.array(UPRIGHT[up])
    np.testing.assert_array_equal(rotation @ (sign * np.eye(3)[axis]), [0, 0, 1])
    assert round(np.linalg.det(rotation)) == 1
    scale = {"m": 1, "cm": 100, "mm": 1000}[unit]
    rows = room(rng)
    upright = np.array([2, 1.5, 1.2, 1.6, 0.9, 0.7, 0.4])
    inside = points_in_box(rows[:, :3], upright)
    in_file = rows.copy()
    in_file[:, :3] = scale * rows[:, :3] @ rotation  # the inverse of p -> rotation @ p
    box = {
        "center": (scale * upright[:3] @ rotation).tolist(),
        "size": (scale * upright[3:6] @ np.abs(rotation)).tolist(),
        "yaw": 0.4,
        "class": "bed",
    }
    source = ScanFolder(
        write(tmp_path, [{"file": "a.npy", "boxes": [box]}], in_file, up=up, unit=unit), "train", TURNED
    )
    scan = source[0]
    np.testing.assert_allclose(scan.boxes[0], upright, atol=1e-5)
    np.testing.assert_array_equal(points_in_box(scan.points, scan.boxes[0]), inside)
    assert inside.sum() > 50
    mapped = in_file[:, :3] @ scan.transform[:3, :3].T + scan.transform[:3, 3]
    np.testing.assert_allclose(mapped, scan.points, atol=1e-4)


def test_map_coordinates_keep_their_digits(tmp_path):
    offset = np.array([500_000.25, 4_649_000.5, 312.125, 0, 0, 0])
    rows = room(np.random.default_rng(2))
    chair = {**CHAIR, "center": (np.array(CHAIR["center"]) + offset[:3]).tolist()}
    scan = ScanFolder(write(tmp_path, [{"file": "a.npy", "boxes": [chair]}], rows + offset), "train", TURNED)[0]
    assert np.abs(scan.points).max() < 53 and (scan.transform[:3, 3] % 96 == 0).all()
    np.testing.assert_allclose(scan.points - scan.transform[:3, 3].astype(float), rows[:, :3] + offset[:3], atol=1e-5)
    np.testing.assert_allclose(scan.boxes[0, :3] - scan.points[0], CHAIR["center"] - rows[0, :3], atol=1e-5)


def test_axis_aligned_datasets_take_the_enclosing_box(tmp_path):
    quarter = {**CHAIR, "yaw": np.pi / 2}
    scan = ScanFolder(write(tmp_path, [{"file": "a.npy", "boxes": [CHAIR, quarter]}]), "train", S3DIS)[0]
    cos, sin = np.cos(0.3), np.sin(0.3)
    expected = [[0.6 * cos + 0.4 * sin, 0.6 * sin + 0.4 * cos, 1, 0], [0.4, 0.6, 1, 0]]
    np.testing.assert_allclose(scan.boxes[:, 3:], expected, atol=1e-6)
    assert scan.notes == {"boxes with yaw, replaced by the axis-aligned ones that enclose them": 1}


def test_unusable_parts_are_counted_by_name(tmp_path):
    boxes = [
        CHAIR,
        {**CHAIR, "class": "lamp"},
        {**CHAIR, "class": "lamp"},
        {**CHAIR, "class": "Night stand"},
        {**CHAIR, "size": [1, 0, 1]},
        {**CHAIR, "center": [float("nan"), 0, 0]},
        {**CHAIR, "center": [1e6, 0, 0]},
    ]
    scan = ScanFolder(write(tmp_path, [{"file": "a.npy", "boxes": boxes}]), "train", TURNED)[0]
    assert scan.labels.tolist() == [3, SUNRGBD.classes.index("night_stand")]
    assert scan.notes == {
        "boxes of the class 'lamp', which sunrgbd does not have": 2,
        "boxes with a size that is not positive": 1,
        "boxes with NaN or infinite values": 1,
        "boxes beyond 250 m": 1,
    }
    assert folder_classes(tmp_path) == ("Night stand", "chair", "lamp")


def test_colours(tmp_path):
    scans = [{"file": "a.npy"}]
    bright = np.full((5, 6), 51.0)
    np.testing.assert_allclose(ScanFolder(write(tmp_path, scans, bright), "train", SCANNET)[0].colors, 0.2)
    for keys, points in (({"colors": "none"}, bright), ({}, bright[:, :3])):
        scan = ScanFolder(write(tmp_path, scans, points, **keys), "train", SCANNET)[0]
        assert (scan.colors == 0.5).all() and scan.notes == {"scans without colours, made grey": 1}
    with pytest.raises(ScanError, match=r"Scan a: its colours reach .* to 51, but 0 to 1 .*\"colors\" in boxes.json"):
        ScanFolder(write(tmp_path, scans, bright, colors="0-1"), "train", SCANNET)[0]


def test_splits(tmp_path):
    scans = [{"file": "a.npy", "split": "val"}, {"file": "below/b.npy"}, {"file": "c.npy", "split": "train"}]
    write(tmp_path, scans)
    train, val = (ScanFolder(tmp_path, split, SCANNET) for split in ("train", "val"))
    assert (train.names, val.names) == (["below/b", "c"], ["a"]) and not train.warnings + val.warnings
    assert is_scan_folder(tmp_path) and not is_scan_folder(tmp_path / "below")
    (tmp_path / "__MACOSX").mkdir()
    for name in ("__MACOSX/a.npy", "._a.npy"):
        (tmp_path / name).write_bytes(b"")
    assert point_cloud_files(tmp_path) == ["a.npy", "below/b.npy", "c.npy"]
    write(tmp_path, scans[1:])
    val = ScanFolder(tmp_path, "val", SCANNET)
    assert val.names == ["below/b", "c"] and "learnt by heart" in val.warnings[0]
    write(tmp_path, scans[:1])
    with pytest.raises(InputError, match="is in the split train"):
        ScanFolder(tmp_path, "train", SCANNET)


def test_a_source_travels_to_other_processes(tmp_path):
    source = ScanFolder(write(tmp_path), "train", TURNED)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[0].points, source[0].points)
    assert copy.names == source.names


@pytest.mark.parametrize(("up", "unit"), list(itertools.product(UPRIGHT, ["m", "cm", "mm"])))
def test_predictions_for_a_folder_are_annotations_of_it(tmp_path, up, unit):
    rows = room(np.random.default_rng(3), 50)
    rows[:, :3] += 7e3 if unit == "mm" else 0
    scan = ScanFolder(write(tmp_path, points=rows, up=up, unit=unit), "train", TURNED)[0]
    boxes = np.array([[1, 2, 0.5, 0.6, 0.4, 1, 0.3], [2, 1, 0.25, 1, 2, 1, -3]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.5], np.float32), np.array([3, 0], np.int32))
    predicted = scan_entry(scan.name, scan.transform, found, TURNED)
    assert (predicted.get("up", "z"), predicted.get("unit", "m")) == (up, unit)
    write(tmp_path, [{"file": "a.npy", "boxes": predicted["boxes"]}], rows, up=up, unit=unit)
    np.testing.assert_allclose(ScanFolder(tmp_path, "train", TURNED)[0].boxes, boxes, atol=1e-5)


def test_boxes_as_predictions_write_them_are_annotations(tmp_path):
    boxes = np.array([[1, 2, 0.5, 0.6, 0.4, 1, 0.3], [2, 1, 0.5, 1, 2, 1, -3]], np.float32)
    scan = Scan("a", np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), boxes, np.array([3, 0], np.int32))
    found = Detections(boxes, np.array([0.9, 0.5], np.float32), scan.labels)
    predicted = scan_entry(scan.name, scan.transform, found, TURNED)["boxes"]
    read = ScanFolder(write(tmp_path, [{"file": "a.npy", "boxes": predicted}]), "train", TURNED)[0]
    np.testing.assert_allclose(read.boxes, boxes, atol=1e-5)
    assert read.labels.tolist() == [3, 0]
