"""Info files of mmdetection3d: classes go by their names, turned boxes are enclosed, paths of Windows are read."""

import pickle

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder, default_info_files, lay_out
from h2a2_jax.scans.scan import ENCLOSED
from h2a2_jax.scans.sources import SourceConfig, build_source
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD

ROWS = np.array([[1, 2, 3, 0, 64, 255], [4, 5, 6, 255, 0, 0]], "<f4")
BOX = [2.1, 1.6, 0.37, 1.2, 0.4, 0.74]
ALIGNED = np.eye(4)
OTHER_NUMBER = "boxes whose class has another number in the dataset, taken by its name"


def foreign(name, dataset="scannet"):
    return f"boxes of the class {name!r}, which {dataset} does not have"


def opened(root, infos, spec=SCANNET, name="a"):
    (root / "points").mkdir(exist_ok=True)
    (root / "infos.pkl").write_bytes(pickle.dumps(infos))
    (ROWS * np.repeat(np.float32([1, spec.color_scale / 255]), 3)).tofile(root / "points" / f"{name}.bin")
    return Mmdet3dFolder(root, "infos.pkl", spec)


def v1(boxes=(BOX,), path="points/a.bin", **annos):
    """A file of one scan; without names and numbers its boxes are tables."""
    annos = {"class": np.full(len(boxes), 4)} | annos
    boxes = np.array(boxes, np.float32)
    common = {"gt_num": len(boxes), "gt_boxes_upright_depth": boxes, "axis_align_matrix": ALIGNED}
    return [{"pts_path": path, "annos": common | annos}]


def v2(boxes=(BOX,), labels=None, path="a.bin", instances=None, **metainfo):
    labels = [4] * len(boxes) if labels is None else labels
    instances = [{}] * len(boxes) if instances is None else instances
    described = [
        {"bbox_3d": list(box), "bbox_label_3d": label, **more}
        for box, label, more in zip(boxes, labels, instances, strict=True)
    ]
    entry = {"lidar_points": {"lidar_path": path}, "instances": described, "axis_align_matrix": ALIGNED.tolist()}
    return {"metainfo": metainfo, "data_list": [entry]}


TWO = (BOX, [1, 1, 0.3, 0.5, 0.5, 0.6])


@pytest.mark.parametrize(
    ("infos", "classes", "notes"),
    [
        (
            v1(TWO, name=np.array(["monitor", "desk"]), **{"class": np.array([0, 1])}),
            ["desk"],
            {foreign("monitor"): 1, OTHER_NUMBER: 1},
        ),
        (v1(TWO, name=np.array(["chair", "table"], object), **{"class": np.array([2, 4])}), ["chair", "table"], {}),
        (
            v1(TWO, name=np.array([b"Night Stand", b"bathtub"])),
            ["bathtub"],
            {foreign("Night Stand"): 1, OTHER_NUMBER: 1},
        ),
        (
            v1(TWO, gt_names=["shower curtain", "Garbage-Bin"], **{"class": [13, 17]}),
            ["showercurtrain", "garbagebin"],
            {},
        ),
        (v2(TWO, [0, 1], categories={"monitor": 0, "desk": 1}), ["desk"], {foreign("monitor"): 1}),
        (v2(TWO, [1, 0], classes=("desk", "monitor")), ["desk"], {foreign("monitor"): 1}),
        (v2(TWO, [0, 1], CLASSES=["Toilet", "SOFA"]), ["toilet", "sofa"], {}),
        (v2(TWO, [7, 3], categories=[{"id": 3, "name": "bed"}, {"id": 7, "name": "door"}]), ["door", "bed"], {}),
        (v2(TWO, [1, 0], categories={0: "bed", 1: "lamp"}), ["bed"], {foreign("lamp"): 1}),
        (v2(TWO, [0, 9], categories={"bed": 0}), ["bed"], {"boxes of no class of the dataset": 1}),
        (v2(TWO, [0, 0], instances=[{"name": "sink"}, {"category": "vice"}]), ["sink"], {foreign("vice"): 1}),
    ],
)
def test_classes_go_by_their_names(tmp_path, infos, classes, notes):
    source = opened(tmp_path, infos)
    scan = source[0]
    assert [SCANNET.classes[label] for label in scan.labels] == classes
    assert scan.notes == notes and source.warnings == []


def test_boxes_stay_with_their_names(tmp_path):
    scan = opened(tmp_path, v1(TWO, name=np.array(["monitor", "desk"])))[0]
    np.testing.assert_allclose(scan.boxes, [[*TWO[1], 0]])


def test_numbers_without_names_are_taken_in_the_order_of_the_dataset_and_it_is_said(tmp_path):
    for infos in (v1(), v2()):
        source = opened(tmp_path, infos)
        assert source[0].labels.tolist() == [4] and source.classes == ()
        assert source.warnings == [
            "The info files do not name the classes of all boxes: numbers are taken in the order of scannet (0 "
            "cabinet, 1 bed, ...)."
        ]
    assert opened(tmp_path, v2((), categories={"bed": 0})).warnings == []


def test_two_tables_of_classes_must_agree(tmp_path):
    table = {name: i for i, name in enumerate(SCANNET.classes)}
    assert opened(tmp_path, v2(categories=table, classes=SCANNET.classes))[0].labels.tolist() == [4]
    with pytest.raises(InputError, match="its categories and its classes number the classes differently"):
        opened(tmp_path, v2(categories=table, classes=SCANNET.classes[::-1]))


def test_an_alignment_beside_the_boxes_is_read_and_absent_boxes_are_none(tmp_path):
    (entry,) = v1()
    entry["axis_align_matrix"] = np.array([[0, -1, 0, 5], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    del entry["annos"]["axis_align_matrix"]
    scan = opened(tmp_path, [entry])[0]
    assert scan.points[0].tolist() == [3, 1, 3] and not scan.notes
    empty = v2(())
    empty["data_list"][0]["instances"] = None
    assert len(opened(tmp_path, empty)[0].boxes) == 0
    assert len(opened(tmp_path, [{**entry, "annos": None}])[0].boxes) == 0


def test_names_in_place_of_numbers_are_names(tmp_path):
    source = opened(tmp_path, v1(TWO, **{"class": np.array(["Desk", "monitor"])}))
    assert source[0].labels.tolist() == [SCANNET.classes.index("desk")] and source[0].notes == {foreign("monitor"): 1}
    assert not source.warnings


def test_unlike_boxes_and_yaws_apart_are_refused(tmp_path):
    with pytest.raises(InputError, match="boxes of scan a have 6 and 7 numbers"):
        opened(tmp_path, v2((BOX, [*BOX, 0.3])))
    with pytest.raises(InputError, match="boxes of scan a have six numbers, and yaws apart as rotation_y: give seven"):
        opened(tmp_path, v1(rotation_y=np.array([0.3])), SUNRGBD)
    assert len(opened(tmp_path, v1(rotation_y=np.zeros(1)), SUNRGBD)[0].boxes) == 1


def test_nothing_but_foreign_classes_is_refused_in_training(tmp_path):
    infos = v1(TWO, name=np.array(["monitor", "keyboard"]))
    opened(tmp_path, infos)
    for file in ("scannet_infos_train.pkl", "scannet_infos_val.pkl"):
        (tmp_path / file).write_bytes(pickle.dumps(infos))
    config = SourceConfig("scannet", root=str(tmp_path))
    with pytest.raises(
        InputError, match=r"is of a class of scannet: there are keyboard, monitor; expected are cabinet"
    ):
        build_source(config, "train")
    assert len(build_source(config, "val")[0].boxes) == 0


@pytest.mark.parametrize(
    ("infos", "sentence"),
    [
        (v1(TWO, name=np.array(["chair"])), "scan a has 2 boxes but 1 names"),
        (v1(TWO, name=np.array([3, 4])), "scan a has names of boxes that are no text"),
        (v1(TWO, gt_num=3), "scan a says gt_num 3, but has 2 boxes"),
        ([{"pts_path": "a.bin", "annos": {"gt_boxes": np.ones((1, 7))}}], "it has no 'gt_boxes_upright_depth'"),
        (v2(categories={"bed": "first"}), "no mmdetection3d info file"),
        (v2(classes="chair"), "its classes are 'chair', expected is a list"),
        (v2([[1] * 9]), "boxes of scan a have 9 numbers, 6 or 7 expected: centre, sizes and, if turned, yaw"),
        (v1([[1] * 8]), "boxes of scan a have 8 numbers, 6 or 7 expected"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(tmp_path, infos, sentence):
    with pytest.raises(InputError, match=sentence):
        opened(tmp_path, infos)


def test_a_yaw_that_the_file_does_not_have_is_said(tmp_path):
    scan = opened(tmp_path, v1(TWO, name=["chair", "table"]), SUNRGBD)[0]
    assert scan.boxes[:, 6].tolist() == [0, 0] and scan.notes == {
        "boxes of six numbers, yaw 0 taken": 2,
        OTHER_NUMBER: 2,
    }


def test_boxes_without_their_number_are_read(tmp_path):
    infos = v1()
    del infos[0]["annos"]["gt_num"]
    assert len(opened(tmp_path, infos)[0].boxes) == 1


@pytest.mark.parametrize("form", [v1, v2])
@pytest.mark.parametrize(
    ("yaw", "size", "notes"),
    [
        (np.pi / 2, [0.4, 1.2, 0.74], {ENCLOSED: 1}),
        (np.pi / 4, [1.6 / 2**0.5, 1.6 / 2**0.5, 0.74], {ENCLOSED: 1}),
        (-0.3, [1.2 * np.cos(0.3) + 0.4 * np.sin(0.3), 1.2 * np.sin(0.3) + 0.4 * np.cos(0.3), 0.74], {ENCLOSED: 1}),
        (np.pi, [1.2, 0.4, 0.74], {}),
        (0, [1.2, 0.4, 0.74], {}),
    ],
)
def test_turned_boxes_of_an_axis_aligned_dataset_are_enclosed_and_counted(tmp_path, form, yaw, size, notes):
    for spec in (SCANNET, S3DIS):
        scan = opened(tmp_path, form([[*BOX, yaw]]), spec)[0]
        np.testing.assert_allclose(scan.boxes, [[*BOX[:3], *size, 0]], atol=1e-6)
        assert scan.notes == notes
    np.testing.assert_allclose(opened(tmp_path, form([[*BOX, yaw]]), SUNRGBD)[0].boxes[0, 6], yaw, atol=1e-6)


@pytest.mark.parametrize("spec", [SCANNET, SUNRGBD], ids=lambda spec: spec.name)
@pytest.mark.parametrize("form", [v1, v2])
def test_degrees_are_noticed(tmp_path, form, spec):
    boxes = [[*BOX, 90], [*BOX, -270], [*BOX, 0.5]]
    with pytest.raises(
        InputError, match=r"infos.pkl: 2 boxes have a yaw of more than a full turn, up to 270: give rad"
    ):
        opened(tmp_path, form(boxes, labels=[4] * 3) if form is v2 else form(boxes), spec)
    assert len(opened(tmp_path, form([[*BOX, 6.28]]), spec)[0].boxes) == 1


@pytest.mark.parametrize(
    "path", ["points\\a.bin", "C:\\data\\scannet\\points\\a.bin", "D:/scans\\a.bin", "..\\a.bin", "./points/a.bin"]
)
@pytest.mark.parametrize("form", [v1, v2])
def test_paths_of_windows(tmp_path, form, path):
    if path.startswith(".."):
        with pytest.raises(InputError, match="leaves the folder"):
            opened(tmp_path, form(path=path))
        return
    source = opened(tmp_path, form(path=path))
    assert source.names == ["a"]
    np.testing.assert_array_equal(source[0].points, ROWS[:, :3])


def test_a_folder_laid_out_from_paths_of_windows(tmp_path):
    (tmp_path / "infos.pkl").write_bytes(pickle.dumps(v2(path="C:\\scans\\room_1.bin")))
    ROWS.tofile(tmp_path / "room_1.bin")
    lay_out([tmp_path / "room_1.bin"], tmp_path / "infos.pkl", SCANNET, tmp_path / "out")
    assert Mmdet3dFolder(tmp_path / "out", default_info_files(SCANNET, "val"), SCANNET).names == ["room_1"]
