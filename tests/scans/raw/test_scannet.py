import pickle

import numpy as np
import pytest

from h2a2_jax.scans.raw import PUBLISHED, RawDataset
from h2a2_jax.scans.raw.scannet import ScanNet
from h2a2_jax.scans.scan import validate_scan
from h2a2_jax.scans.specs import SCANNET
from tests.scans.raw.miniature import SCANNET_NYU40, SCANNET_SCENES, SCANNET_SPLITS, write_ply, write_scannet

CLASS_OF_NYU40 = {
    3: "cabinet", 4: "bed", 5: "chair", 6: "sofa", 7: "table", 8: "door", 9: "window", 10: "bookshelf", 11: "picture",
    12: "counter", 14: "desk", 16: "curtain", 24: "refrigerator", 28: "showercurtrain", 33: "toilet", 34: "sink",
    36: "bathtub", 39: "garbagebin",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scannet")
    write_scannet(folder)
    return folder


def aligned(scene):
    """Vertices in the aligned frame, one by one."""
    matrix = np.eye(4) if scene["alignment"] is None else np.array(scene["alignment"])
    return np.array([(matrix @ [*vertex, 1])[:3] for vertex in scene["vertices"].astype(float)])


def expected_objects(scene):
    """Boxes and class names by object id, vertex by vertex: the last object to claim a vertex has it."""
    points, owner = aligned(scene), {}
    for number, _, segments in scene["groups"]:
        for vertex, segment in enumerate(scene["segments"]):
            if segment in segments:
                owner[vertex] = number
    boxes, classes = [], []
    for number, label, _ in sorted(scene["groups"]):
        own = np.array([points[vertex] for vertex in owner if owner[vertex] == number])
        if SCANNET_NYU40[label] in CLASS_OF_NYU40 and len(own):
            boxes.append([*(own.max(0) + own.min(0)) / 2, *(own.max(0) - own.min(0)), 0])
            classes.append(CLASS_OF_NYU40[SCANNET_NYU40[label]])
    return np.array(boxes).reshape(-1, 7), classes


def test_it_is_a_raw_dataset(root):
    dataset = ScanNet(root)
    assert isinstance(dataset, RawDataset)
    assert dataset.spec is SCANNET and dataset.splits == SCANNET_SPLITS and dataset.notes == {}
    assert PUBLISHED["scannet"] == {"train": 1201, "val": 312}


@pytest.mark.parametrize("name", SCANNET_SCENES)
def test_points_and_boxes_equal_those_computed_by_hand(root, name):
    scene, scan = SCANNET_SCENES[name], ScanNet(root).load(name)
    boxes, classes = expected_objects(scene)
    np.testing.assert_allclose(scan.points, aligned(scene), atol=1e-6)
    np.testing.assert_allclose(scan.colors, scene["colors"] / 255.0, atol=1e-7)
    np.testing.assert_allclose(scan.boxes, boxes, atol=1e-6)
    assert [SCANNET.classes[label] for label in scan.labels] == classes
    assert validate_scan(scan, SCANNET.num_classes) == []


def test_a_shared_segment_belongs_to_the_last_object_in_the_file(root):
    scene, scan = SCANNET_SCENES["scene0000_00"], ScanNet(root).load("scene0000_00")
    points = aligned(scene)
    table, chair = scan.boxes[0], scan.boxes[1]
    # Segments 20 and 30 are vertices 20 to 39; the chair keeps segment 10.
    np.testing.assert_allclose(table[3:6], np.ptp(points[20:40], axis=0), atol=1e-6)
    np.testing.assert_allclose(chair[3:6], np.ptp(points[10:20], axis=0), atol=1e-6)


def test_alignment_moves_points_before_boxes_are_taken(root):
    scene, scan = SCANNET_SCENES["scene0000_00"], ScanNet(root).load("scene0000_00")
    np.testing.assert_allclose(scan.transform, scene["alignment"])
    x, y, z = scene["vertices"].T
    np.testing.assert_allclose(scan.points, np.stack([5.5 - y, x - 2.25, z + 0.125], axis=1), atol=1e-6)


def test_left_out_points_and_objects_are_counted(root):
    dataset = ScanNet(root)
    assert dataset.load("scene0000_00").notes == {"objects of no class of the dataset": 1, "objects without points": 1}
    assert dataset.load("scene0002_00").notes == {"alignment missing, identity taken": 1}
    np.testing.assert_array_equal(dataset.load("scene0002_00").transform, np.eye(4))
    assert dataset.load("scene0002_00").boxes.shape == (0, 7)


def test_a_copy_in_another_process_is_the_same(root):
    dataset = ScanNet(root)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.splits == dataset.splits
    np.testing.assert_array_equal(copy.load("scene0001_00").boxes, dataset.load("scene0001_00").boxes)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("faces", [[(0, 1, 2)], [(0, 1, 2), (0, 1, 2, 3)], []])
def test_every_form_of_ply(tmp_path, form, faces):
    write_scannet(tmp_path)
    scene = SCANNET_SCENES["scene0003_01"]
    path = tmp_path / "scans/scene0003_01/scene0003_01_vh_clean_2.ply"
    write_ply(path, scene["vertices"], scene["colors"], faces, form)
    scan = ScanNet(tmp_path).load("scene0003_01")
    np.testing.assert_allclose(scan.points, scene["vertices"], atol=1e-6)
    np.testing.assert_allclose(scan.colors, scene["colors"] / 255.0, atol=1e-7)


@pytest.mark.parametrize("place", ["meta_data", "Tasks/Benchmark"])
def test_lists_may_lie_where_others_keep_them(tmp_path, place):
    write_scannet(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"scannetv2_{split}.txt").rename(tmp_path / place / f"scannetv2_{split}.txt")
    assert ScanNet(tmp_path).splits == SCANNET_SPLITS
