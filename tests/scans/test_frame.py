"""Floors are found and brought to the dataset's height; views are turned as the dataset's; what was done is said."""

import math

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.point_cloud import PointCloud
from h2a2_jax.scans.frame import camera_direction, checked_floor, place_as_dataset, place_cloud
from h2a2_jax.scans.specs import S3DIS, SCANNET, SPECS, SUNRGBD
from h2a2_jax.scans.surfaces import find_floor
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

SCANS = {spec.name: SyntheticSource(spec, "val", 2, scale="demo", seed=3)[1] for spec in (SCANNET, SUNRGBD, S3DIS)}


def placed(points, spec=SCANNET):
    cloud = PointCloud(np.asarray(points, np.float64), None)
    return place_as_dataset(place_cloud("room", cloud, np.eye(4)), spec)


@pytest.mark.parametrize("spec", [SCANNET, SUNRGBD, S3DIS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("scale", ["demo", "full"])
def test_the_floor_of_a_room_is_found_to_a_centimetre(spec, scale):
    source = SyntheticSource(spec, "val", 6, scale=scale, seed=11)
    found = 0
    for i in range(6):
        scan, room, capture = source.acquire(i)
        floor = np.median(capture.boxes[:, 2] - room.boxes[:, 2])
        heights = find_floor(scan.points), find_floor(scan.points + np.array([5, 7, -3.21]))
        if None not in heights:
            assert heights == pytest.approx((floor, floor - 3.21), abs=0.01)
            found += 1
    assert found >= (4 if spec is SUNRGBD else 6)  # a view may show next to nothing of it


def test_reflections_below_a_floor_do_not_hide_it_and_a_cellar_does():
    points, rng = SCANS["scannet"].points, np.random.default_rng(0)
    few, many = (rng.uniform([0, 0, -2], [4, 4, 0], (len(points) // part, 3)) for part in (150, 2))
    assert find_floor(np.concatenate([points, few])) == pytest.approx(0, abs=0.02)
    assert find_floor(np.concatenate([points, many])) is None


def test_no_floor_is_found_where_there_is_none():
    points = SCANS["s3dis"].points
    above = points[points[:, 2] > 0.4]
    tilt = np.array([[1, 0, 0], [0, math.cos(0.3), -math.sin(0.3)], [0, math.sin(0.3), math.cos(0.3)]])
    rng = np.random.default_rng(0)
    wall = rng.uniform([0, 0, 0], [4, 0.01, 3], (9000, 3))
    for none in (above, points @ tilt.T, wall, rng.normal(size=(9000, 3)), points[:9], np.zeros((0, 3))):
        assert find_floor(none) is None


@pytest.mark.parametrize("height", [-1.35, 0.1, 0.48, 110.0])
def test_a_floor_is_brought_to_the_height_of_the_dataset(height):
    points = SCANS["scannet"].points + np.array([0, 0, height])
    found, remarks = placed(points)
    assert find_floor(found.scan.points) == pytest.approx(0, abs=1e-3)
    (remark,) = remarks
    said = float(remark.split("its floor at ")[1].split()[0])
    assert said == pytest.approx(height, abs=0.01) and "brought to 0 m" in remark
    back = (found.scan.points - found.matrix[:3, 3]) @ np.linalg.inv(found.matrix[:3, :3]).T
    np.testing.assert_allclose(back, points, atol=1e-4)


def test_the_flag_of_a_floor_settles_it():
    points = SCANS["scannet"].points + np.array([0, 0, 0.48])
    room = place_cloud("room", PointCloud(points, None), np.eye(4))
    found, (remark,) = place_as_dataset(room, SCANNET, "auto", "--floor={}")
    assert remark.endswith("; --floor=keep leaves it")
    height = float(remark.split("its floor at ")[1].split()[0])
    again, nothing = place_as_dataset(room, SCANNET, height, "--floor={}")
    assert nothing == [] and again.matrix[2, 3] == pytest.approx(found.matrix[2, 3], abs=0.01)
    kept, nothing = place_as_dataset(room, SCANNET, "keep", "--floor={}")
    assert nothing == [] and kept is room
    # Heights are those of the file, also where the scan was shifted near the origin.
    high = place_cloud("room", PointCloud(points + np.array([0, 0, 500.0]), None), np.eye(4))
    assert find_floor(place_as_dataset(high, SCANNET, 500.46)[0].scan.points) == pytest.approx(0, abs=0.03)
    bare = place_cloud("room", PointCloud(np.random.default_rng(0).normal(size=(9000, 3)), None), np.eye(4))
    assert place_as_dataset(bare, SCANNET, "auto", "--floor={}")[1][0].endswith("; else say --floor=HEIGHT")


def test_what_is_no_floor_is_refused():
    assert [checked_floor(given, "floor") for given in ("-1.5", "keep", 2.0)] == [-1.5, "keep", 2.0]
    for wrong in ("low", "nan", "1,5"):
        with pytest.raises(InputError, match=f"--floor is '{wrong}'; expected is auto, keep or the height"):
            checked_floor(wrong, "--floor")


@pytest.mark.parametrize("height", [-0.04, 0.0, 0.04])
def test_a_floor_at_the_height_of_the_dataset_stays(height):
    points = SCANS["scannet"].points + np.float32([0, 0, height])
    found, remarks = placed(points)
    np.testing.assert_array_equal(found.scan.points, points.astype(np.float32))
    assert remarks == []


def test_a_scan_without_floor_is_left_and_said_so():
    points = np.random.default_rng(0).normal(size=(9000, 3))
    found, (remark,) = placed(points)
    np.testing.assert_array_equal(found.scan.points, points.astype(np.float32))
    assert "no clear floor" in remark and "0 m" in remark


@pytest.mark.parametrize("degrees", [90, 180, -90, 100])
def test_a_view_is_turned_to_where_the_dataset_looks(degrees):
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    points = SCANS["sunrgbd"].points
    found, remarks = placed(points @ turn.T, SUNRGBD)
    middle = np.median(found.scan.points[:, :2] / np.linalg.norm(found.scan.points[:, :2], axis=1)[:, None], axis=0)
    assert math.degrees(math.atan2(middle[0], middle[1])) == pytest.approx(0, abs=20)
    assert "is a view from its origin" in remarks[0] and "views of sunrgbd are along y" in remarks[0]
    back = (found.scan.points - found.matrix[:3, 3]) @ np.linalg.inv(found.matrix[:3, :3]).T
    np.testing.assert_allclose(back, points @ turn.T, atol=1e-4)


def test_other_scans_are_not_turned():
    for points, spec in (
        (SCANS["sunrgbd"].points, SUNRGBD),  # along y as it is
        (SCANS["sunrgbd"].points @ np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]).T, SCANNET),
        (SCANS["s3dis"].points - SCANS["s3dis"].points.mean(axis=0), SUNRGBD),  # the origin in the middle
        (SCANS["sunrgbd"].points + np.float32([38, 28, 0]), SUNRGBD),  # the origin far away
        (SCANS["s3dis"].points, SUNRGBD),  # the origin in a corner
    ):
        found, _ = placed(points, spec)
        np.testing.assert_allclose(found.matrix[:3, :3], np.eye(3), atol=1e-12)


def test_a_view_of_a_camera_is_told_from_a_room():
    for spec in SPECS:
        for scale in ("demo", "full"):
            scan = SyntheticSource(spec, "val", 1, seed=5, scale=scale)[0]
            direction = camera_direction(scan.points)
            assert (direction is not None) == spec.faces_y
            assert direction is None or abs(direction - np.pi / 2) < 0.3
            # Moved away from the camera, or to the corner of the room, a scan is a room.
            assert camera_direction(scan.points - scan.points.min(axis=0)) is None
