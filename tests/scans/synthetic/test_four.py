"""Procedural stand-ins of ARKitScenes, MultiScan, 3RScan and ScanNet++."""

from dataclasses import replace

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import points_in_box, validate_scan
from h2a2_jax.scans.sources import SourceConfig
from h2a2_jax.scans.specs import ALL_SPECS, ARKITSCENES, MULTISCAN, RSCAN, SCANNETPP
from h2a2_jax.scans.synthetic import SyntheticSource
from h2a2_jax.scans.synthetic.rooms import KINDS, furnish_room, label_of, overlap, programme, rearranged

FOUR = (ARKITSCENES, MULTISCAN, RSCAN, SCANNETPP)
each_dataset = pytest.mark.parametrize("spec", FOUR, ids=lambda spec: spec.name)


@pytest.fixture(scope="module")
def demo():
    """Four demo scans per dataset, with what they show."""
    sources = {spec.name: SyntheticSource(spec, "train", 4, scale="demo") for spec in FOUR}
    return {name: [source.acquire(index) for index in range(4)] for name, source in sources.items()}


@each_dataset
def test_demo_scans_are_valid_and_their_boxes_hold_points(spec, demo):
    labels = set()
    for scan, _, _ in demo[spec.name]:
        assert validate_scan(scan, spec.num_classes) == []
        assert 5_000 <= len(scan.points) <= 15_000 and 1 <= len(scan.boxes) <= 8
        assert all(points_in_box(scan.points, box).sum() >= 20 for box in scan.boxes)
        assert spec.has_yaw or (scan.boxes[:, 6] == 0).all()
        labels |= set(scan.labels.tolist())
    assert len(labels) >= 4


@each_dataset
def test_the_same_index_gives_the_same_scan_and_splits_share_none(spec, demo):
    again = SyntheticSource(spec, "train", 9, scale="demo")[3]
    scan = demo[spec.name][3][0]
    np.testing.assert_array_equal(again.points, scan.points)
    np.testing.assert_array_equal(again.boxes, scan.boxes)
    assert again.name == scan.name == f"synthetic_{spec.name}/train/000003"
    other = SyntheticSource(spec, "val", 1, scale="demo")[0]
    assert not np.array_equal(other.points[:10], demo[spec.name][0][0].points[:10])


@each_dataset
def test_a_full_scan_has_its_size(spec):
    least, most, fewest, greatest = {
        "arkitscenes": (30_000, 150_000, 3, 12),
        "multiscan": (50_000, 150_000, 6, 16),
        "3rscan": (30_000, 150_000, 6, 16),
        "scannetpp": (200_000, 1_000_000, 10, 28),
    }[spec.name]
    scan = SyntheticSource(spec, "val", 1)[0]
    assert validate_scan(scan, spec.num_classes) == []
    assert least <= len(scan.points) <= most and fewest <= len(scan.boxes) <= greatest


@each_dataset
@pytest.mark.parametrize("scale", ["demo", "full"])
def test_rooms_have_furniture_of_the_classes(spec, scale):
    names = {name for room in programme(spec, scale).rooms for name in room}
    assert names <= set(KINDS)
    if scale == "full":
        drawn = {label_of(name, spec) for name in names} - {-1}
        assert len(drawn) == (35 if spec is SCANNETPP else spec.num_classes)


def test_classes_that_a_dataset_calls_otherwise():
    found = [(spec.classes[label_of(kind, spec)]) for kind, spec in (
        ("bookshelf", ARKITSCENES), ("screen", ARKITSCENES), ("garbagebin", MULTISCAN), ("stool", RSCAN),
        ("garbagebin", SCANNETPP), ("carton", SCANNETPP))]  # fmt: skip
    assert found == ["shelf", "tv_monitor", "trash_can", "otherfurniture", "trash can", "box"]


def test_a_tablet_begins_above_the_floor_and_looks_anywhere(demo):
    yaws = []
    for scan, room, capture in demo["arkitscenes"]:
        floor = np.quantile(scan.points[:, 2], 0.02)
        assert -1.7 < floor < -1.1
        standing = room.boxes[:, 2] - room.boxes[:, 5] / 2 < 1e-3
        np.testing.assert_allclose((capture.boxes[:, 2] - capture.boxes[:, 5] / 2)[standing], floor, atol=0.06)
        turn = (capture.boxes[:, 6] - room.boxes[:, 6]) % (2 * np.pi)
        np.testing.assert_allclose(np.cos(turn - turn[0]), 1, atol=1e-5)  # one turn for the whole room
        yaws.append(turn[0])
        # Whole objects: sizes are those of the room.
        np.testing.assert_array_equal(capture.boxes[:, 3:6], room.boxes[:, 3:6])
    assert np.ptp(yaws) > 0.5


def test_a_rescan_shows_the_room_with_some_furniture_moved(demo):
    (_, before, _), (_, after, _) = demo["3rscan"][:2]
    np.testing.assert_array_equal(before.size, after.size)
    np.testing.assert_array_equal(before.labels, after.labels)
    np.testing.assert_array_equal(before.boxes[:, 3:6], after.boxes[:, 3:6])
    moved = (before.boxes != after.boxes).any(axis=1)
    assert 0 < moved.sum() < len(moved) or len(moved) < 3
    assert not np.array_equal(demo["3rscan"][2][1].size, before.size)


def test_what_is_rearranged_stays_in_the_room_and_apart():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        room = furnish_room(programme(RSCAN, "full"), RSCAN, rng)
        later = rearranged(room, rng)
        boxes = [tuple(box) for box in later.boxes.tolist()]
        assert not any(overlap(a, b, 0.0) for i, a in enumerate(boxes) for b in boxes[:i])
        moved = (room.boxes != later.boxes).any(axis=1)
        assert moved.any() and not moved[room.boxes[:, 2] - room.boxes[:, 5] / 2 > 0.01].any()
        for owner in np.flatnonzero(moved):
            own = later.solids.owners == owner
            # The parts turn and move with the box.
            before = room.solids.centers[own] - room.boxes[owner, :3]
            after = later.solids.centers[own] - later.boxes[owner, :3]
            np.testing.assert_allclose(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1), atol=1e-5)
            np.testing.assert_allclose(before[:, 2], after[:, 2], atol=1e-5)


def test_small_things_stand_on_furniture():
    found = 0
    for seed in range(12):
        room = furnish_room(programme(SCANNETPP, "full"), SCANNETPP, np.random.default_rng(seed))
        bottom, top = room.boxes[:, 2] - room.boxes[:, 5] / 2, room.boxes[:, 2] + room.boxes[:, 5] / 2
        for label, box, low in zip(room.labels, room.boxes, bottom, strict=True):
            if label >= 0 and SCANNETPP.classes[label] in ("monitor", "laptop", "keyboard", "bottle", "printer"):
                below = np.abs(top - low) < 1e-4
                centered = [points_in_box(np.array([[*box[:2], b[2]]]), b)[0] for b in room.boxes[below]]
                assert any(centered)
                found += 1
    assert found > 5


def test_only_the_three_of_h2a2_have_a_gap():
    assert SourceConfig("3rscan", kind="synthetic").spec is RSCAN
    for gap in (0.0, 2.0):
        with pytest.raises(InputError, match=rf"gap of the procedural 3rscan is {gap:g}; only scannet, sunrgbd, s3dis"):
            _ = SourceConfig("3rscan", kind="synthetic", gap=gap).spec
    with pytest.raises(InputError, match=r"no synthetic kitti: use one of scannet, .*scannetpp"):
        SyntheticSource(replace(ALL_SPECS[0], name="kitti"), "train", 1)
