import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial import cKDTree

from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import points_in_box, validate_scan
from h2a2_jax.scans.specs import S3DIS, SCANNET, SPECS, SUNRGBD, Augmentation, DatasetSpec
from h2a2_jax.scans.synthetic import SyntheticSource

each_dataset = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


@pytest.fixture(scope="module")
def demo():
    """Twelve demo scans per dataset."""
    sources = {spec.name: SyntheticSource(spec, "train", 12, scale="demo") for spec in SPECS}
    return {name: [source[index] for index in range(12)] for name, source in sources.items()}


@each_dataset
def test_the_same_index_gives_the_same_scan(spec, demo):
    again = SyntheticSource(spec, "train", 500, scale="demo")
    for index in (3, 0):
        for field in ("points", "colors", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(again[index], field), getattr(demo[spec.name][index], field))
    assert again.names[12] == f"synthetic_{spec.name}/train/000012" and len(again) == 500


@each_dataset
def test_indices_splits_and_seeds_share_no_scan(spec, demo):
    scans = demo[spec.name][:4] + [
        SyntheticSource(spec, split, 2, seed=seed, scale="demo")[index]
        for split, seed in (("val", 0), ("train", 1))
        for index in range(2)
    ]
    sizes = {tuple(np.ptp(scan.points, axis=0).tolist()) for scan in scans}
    assert len(sizes) == len(scans)
    assert not {scan.name for scan in scans[4:6]} & {scan.name for scan in scans[:4]}


@each_dataset
def test_scans_are_valid(spec, demo):
    for scan in demo[spec.name]:
        assert validate_scan(scan, spec.num_classes) == []
        assert 5_000 <= len(scan.points) <= 15_000
        assert 1 <= len(scan.boxes) <= 8
        assert (scan.labels >= 0).all()
        np.testing.assert_array_equal(scan.transform, np.eye(4))


@each_dataset
def test_every_box_holds_points(spec, demo):
    for scan in demo[spec.name]:
        for box in scan.boxes:
            assert points_in_box(scan.points, box).sum() >= 29  # the extreme point may round out of its own box


@each_dataset
def test_several_classes_occur(spec, demo):
    assert len({label for scan in demo[spec.name] for label in scan.labels.tolist()}) >= 4


@pytest.mark.parametrize("spec", [SCANNET, S3DIS], ids=lambda spec: spec.name)
def test_axis_aligned_boxes_have_points_at_all_faces(spec, demo):
    for scan in demo[spec.name]:
        assert (scan.boxes[:, 6] == 0).all()
        for box in scan.boxes:
            grown = box.copy()
            grown[3:6] += 1e-4
            held = scan.points[points_in_box(scan.points, grown)]
            np.testing.assert_allclose(held.min(axis=0), box[:3] - box[3:6] / 2, atol=1e-4)
            np.testing.assert_allclose(held.max(axis=0), box[:3] + box[3:6] / 2, atol=1e-4)


def test_scannet_frame(demo):
    for scan in demo["scannet"]:
        assert abs(np.quantile(scan.points[:, 2], 0.02)) < 0.03  # the floor is z = 0
        low, high = scan.points.min(axis=0), scan.points.max(axis=0)
        assert (low[:2] < 0.1).all() and (high[:2] > -0.1).all()  # the origin lies in the room
        assert (high - low <= np.array([4.6, 4.6, 3.1])).all()
    assert len({tuple(np.round(scan.points.min(axis=0)[:2], 2)) for scan in demo["scannet"]}) > 6
    # No ceiling: walls reach higher than the points of any horizontal surface.
    top = [np.mean(scan.points[:, 2] > scan.points[:, 2].max() - 0.02) for scan in demo["scannet"]]
    assert max(top) < 0.03


def test_sunrgbd_frame(demo):
    for scan in demo["sunrgbd"]:
        x, y, z = scan.points.T
        assert y.min() > 0.3 and y.max() < 8.1
        assert (np.abs(np.arctan2(x, y)) < np.radians(45)).all()  # in the field of view, seen from the origin
        standing = scan.boxes[:, 2] - scan.boxes[:, 5] / 2
        np.testing.assert_allclose(standing, standing[0], atol=1e-4)  # every class stands on the floor
        assert -1.5 - 1e-4 < standing[0] < -0.9 + 1e-4
        assert z.min() > standing[0] - 0.3  # nothing is measured far below it
    yaws = np.concatenate([scan.boxes[:, 6] for scan in demo["sunrgbd"]])
    assert (np.abs(yaws) <= np.pi + 1e-6).all() and np.unique(np.round(np.degrees(yaws) / 20)).size > 8


def test_s3dis_frame(demo):
    for scan in demo["s3dis"]:
        np.testing.assert_array_equal(scan.points.min(axis=0), 0)
        height = scan.points[:, 2].max()
        assert 2.65 < height < 3.25
        assert np.mean(scan.points[:, 2] > height - 0.03) > 0.05  # the ceiling
        red, _, blue = scan.colors.mean(axis=0)
        assert red > blue + 0.02  # warm light


def test_sunrgbd_boxes_are_whole_objects(demo):
    """Points inside stop short of the far faces that the camera cannot see."""
    fills = []
    for scan in demo["sunrgbd"]:
        for box in scan.boxes:
            held = scan.points[points_in_box(scan.points, box)]
            fills.append(held[:, 2].min() - (box[2] - box[5] / 2))
    assert np.median(fills) >= 0 and max(fills) > 0.1


@pytest.fixture(scope="module")
def full():
    """Two scans of full scale per dataset, with what they show."""
    sources = {spec.name: SyntheticSource(spec, "val", 2) for spec in SPECS}
    return {name: [source.acquire(index) for index in range(2)] for name, source in sources.items()}


@each_dataset
def test_full_scans_are_of_real_size(spec, full):
    least, most = {"scannet": (50_000, 150_000), "sunrgbd": (50_000, 50_000), "s3dis": (200_000, 1_000_000)}[spec.name]
    fewest, greatest = {"scannet": (8, 16), "sunrgbd": (2, 6), "s3dis": (6, 14)}[spec.name]
    for scan, _, _ in full[spec.name]:
        assert validate_scan(scan, spec.num_classes) == []
        assert least <= len(scan.points) <= most
        assert fewest <= len(scan.boxes) <= greatest
        for box in scan.boxes:
            assert points_in_box(scan.points, box).sum() >= 29


def test_full_scannet(full):
    for scan, room, capture in full["scannet"]:
        extent = np.ptp(scan.points, axis=0)
        assert (extent < room.size + 0.1).all() and (extent[:2] > room.size[:2] - 0.1).all()
        assert extent[2] > room.size[2] - 0.3
        spacing = np.median(cKDTree(scan.points).query(scan.points[::20], k=2)[0][:, 1])
        assert 0.02 <= spacing <= 0.03
        assert 0.1 <= capture.losses["holes"] <= 0.25
        floor = scan.points[(capture.owners < 0) & (np.abs(scan.points[:, 2]) < 0.03), 2]
        assert abs(np.median(floor)) < 0.003 and 0.0045 < 1.4826 * np.median(np.abs(floor)) < 0.0085
        assert not (scan.points[:, 2] > room.size[2] + 0.05).any()
        assert (scan.boxes[:, 6] == 0).all()


def test_full_sunrgbd(full):
    for scan, _, capture in full["sunrgbd"]:
        x, y, _ = scan.points.T
        assert 0.6 < np.linalg.norm(scan.points, axis=1).min() and y.max() < 8.2
        standing = capture.boxes[:, 2] - capture.boxes[:, 5] / 2
        assert -1.5 - 1e-4 < standing.min() < -0.9 + 1e-4
        assert (np.abs(x) < 0.75 * y).all()  # 28.5 degrees on either side of a camera that looks down a little
        assert 0.04 < capture.losses["dropout"] < 0.16
        # Boxes are whole objects: those of the room, moved.
        for box in scan.boxes:
            assert (np.abs(capture.boxes - box).max(axis=1) < 1e-5).any()


def test_full_s3dis(full):
    for scan, room, capture in full["s3dis"]:
        np.testing.assert_array_equal(scan.points.min(axis=0), 0)
        np.testing.assert_allclose(scan.points.max(axis=0), room.size, atol=0.05)
        floor = scan.points[(capture.owners < 0) & (scan.points[:, 2] < 0.03), 2]
        assert 0.0015 < 1.4826 * np.median(np.abs(floor - np.median(floor))) < 0.0025
        assert 0.02 <= capture.losses["holes"] <= 0.05
        assert np.mean(scan.points[:, 2] > room.size[2] - 0.03) > 0.05  # the ceiling
        warmth = scan.colors.mean(axis=0)
        assert warmth[0] > warmth[2]


@each_dataset
def test_annotated_objects_show_themselves(spec, full):
    for scan, room, capture in full[spec.name]:
        counts = np.bincount(capture.owners[capture.owners >= 0], minlength=len(room.labels))
        shown = (capture.visible >= 0.15) & (counts >= 30) & (room.labels >= 0)
        np.testing.assert_array_equal(scan.labels, room.labels[shown])
        assert shown.sum() >= (0.5 if spec.name != "sunrgbd" else 0.1) * (room.labels >= 0).sum()


_HASHES = """
import hashlib
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.scans.synthetic import SyntheticSource
for spec in SPECS:
    for scale, index in (("demo", 2), ("full", 1)):
        scan = SyntheticSource(spec, "val", 3, scale=scale)[index]
        parts = (scan.points, scan.colors, scan.boxes, scan.labels)
        print(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
"""


def test_another_process_makes_the_same_scans(full):
    command = [sys.executable, "-c", _HASHES]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
    ours = []
    for spec in SPECS:
        for scan in (SyntheticSource(spec, "val", 3, scale="demo")[2], full[spec.name][1][0]):
            parts = (scan.points, scan.colors, scan.boxes, scan.labels)
            ours.append(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
    assert theirs == ours


@each_dataset
def test_a_source_can_be_pickled(spec):
    source = SyntheticSource(spec, "val", 4, seed=3, scale="demo")
    again = pickle.loads(pickle.dumps(source))
    assert again.names == source.names
    np.testing.assert_array_equal(again[1].points, source[1].points)


def test_bad_requests_are_refused():
    other = DatasetSpec("kitti", ("car",), True, (0,), 1.0, 1, Augmentation(0.0, 0.0, 0.0, (1.0, 1.0), 0.0), None, None)
    with pytest.raises(InputError, match="no synthetic kitti"):
        SyntheticSource(other, "train", 1)
    with pytest.raises(InputError, match="give at least 1"):
        SyntheticSource(SUNRGBD, "train", 0)
    with pytest.raises(InputError, match="seed -1 was asked for: give 0 or more"):
        SyntheticSource(SUNRGBD, "train", 1, seed=-1)
    with pytest.raises(IndexError):
        SyntheticSource(SUNRGBD, "train", 3, scale="demo")[3]
