import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.scan import points_in_box, validate_scan
from h2a2_jax.inputs.specs import S3DIS, SCANNET, SPECS, SUNRGBD, Augmentation, DatasetSpec
from h2a2_jax.inputs.synthetic import SyntheticSource

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


@each_dataset
def test_full_scans_are_of_real_size(spec):
    scan = SyntheticSource(spec, "val", 1)[0]
    low, high = {"scannet": (50_000, 150_000), "sunrgbd": (25_000, 50_000), "s3dis": (150_000, 1_000_000)}[spec.name]
    assert low <= len(scan.points) <= high
    assert validate_scan(scan, spec.num_classes) == []


def test_bad_requests_are_refused():
    other = DatasetSpec("kitti", ("car",), True, (0,), 1.0, 1, Augmentation(0.0, 0.0, 0.0, (1.0, 1.0), 0.0), None, None)
    with pytest.raises(InputError, match="no synthetic kitti"):
        SyntheticSource(other, "train", 1)
    with pytest.raises(InputError, match="give at least 1"):
        SyntheticSource(SUNRGBD, "train", 0)
    with pytest.raises(IndexError):
        SyntheticSource(SUNRGBD, "train", 3, scale="demo")[3]
