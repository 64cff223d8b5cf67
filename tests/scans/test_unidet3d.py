"""Folders of ARKitScenes, MultiScan, 3RScan and ScanNet++ as UniDet3D prepares them: read back, and damaged."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h2a2_jax.check import check
from h2a2_jax.errors import InputError
from h2a2_jax.scans.mmdet3d import default_info_files
from h2a2_jax.scans.sources import ROOTS, SourceConfig, build_source
from h2a2_jax.scans.specs import ALL_SPECS, ARKITSCENES, MULTISCAN, RSCAN, S3DIS, SCANNETPP, DatasetSpec

FOUR = (ARKITSCENES, MULTISCAN, RSCAN, SCANNETPP)
each_dataset = pytest.mark.parametrize("spec", FOUR, ids=lambda spec: spec.name)

# Names and numbers as UniDet3D's scripts write them: more names than classes, in another order, from another number.
_NYU40 = (
    "wall,floor,cabinet,bed,chair,sofa,table,door,window,bookshelf,picture,counter,blinds,desk,shelves,curtain,dresser,"
    "pillow,mirror,floor mat,clothes,ceiling,books,fridge,television,paper,towel,shower curtain,box,whiteboard,person,"
    "night stand,toilet,sink,lamp,bathtub,bag,structure,furniture,prop"
).split(",")
CATEGORIES: dict[str, dict[str, int]] = {
    "arkitscenes": {name: i for i, name in enumerate(ARKITSCENES.classes)},
    "multiscan": {name: i for i, name in enumerate(("floor", "ceiling", "wall", *MULTISCAN.classes))}
    | {"no_target": -1},
    "3rscan": {"unknown": -1} | {name: i for i, name in enumerate(_NYU40, 1)},
    "scannetpp": {name: i for i, name in enumerate(("wall", "ceiling", "floor", *SCANNETPP.classes[::-1], "board"))},
}
STATED = {"arkitscenes": "arkitscenes_offline", "multiscan": "MultiScan", "3rscan": "3RScan", "scannetpp": "scannetpp"}
INFO_FILES = {
    "arkitscenes": "arkitscenes_offline_{}_infos.pkl",
    "multiscan": "multiscan_infos_{}.pkl",
    "3rscan": "3rscan_infos_{}.pkl",
    "scannetpp": "scannetpp_infos_{}.pkl",
}
POINTS = {"arkitscenes": "offline_prepared_data/{}_point.bin"}
# What two boxes are called in the files, and of which classes they are.
NAMES = {
    "arkitscenes": {"sofa": "sofa", "tv_monitor": "tv_monitor"},
    "multiscan": {"trash_can": "trash_can", "toilet": "toilet"},
    "3rscan": {"fridge": "refrigerator", "furniture": "otherfurniture"},
    "scannetpp": {"table lamp": "table lamp", "marker": "marker"},
}
BOXES = ([1.0, 2.0, 0.5, 1.2, 0.6, 1.0], [3.0, 1.0, 0.4, 0.5, 0.5, 0.8])
YAWS = (0.3, -1.2)


def points_of(spec: DatasetSpec, split: str) -> np.ndarray:
    """Points in the boxes, in the shape of rows x, y, z, r, g, b as they are stored."""
    rng = np.random.default_rng([len(spec.name), split == "val"])
    centers = np.repeat([box[:3] for box in BOXES], 20, axis=0)
    xyz = centers + rng.uniform(-0.2, 0.2, (40, 3))
    colors = rng.integers(0, 256, (40, 3)) * spec.color_scale / 255
    return np.concatenate([xyz, colors], axis=1).astype("<f4")


def write_tree(root: Path, spec: DatasetSpec, change: Callable[[dict[str, Any]], object] = lambda infos: None) -> None:
    """Write both splits of one scan each; `change` damages the content of the training info file in place."""
    categories = CATEGORIES[spec.name]
    for split in ("train", "val"):
        path = POINTS.get(spec.name, "points/{}.bin").format(f"scan_{split}")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        points_of(spec, split).tofile(root / path)
        instances = [
            {"bbox_3d": [*box, yaw] if spec.has_yaw else [*box], "bbox_label_3d": categories[name]}
            for box, yaw, name in zip(BOXES, YAWS, NAMES[spec.name], strict=True)
        ]
        if spec.name != "arkitscenes":
            instances.append({"bbox_3d": [2, 2, 1.5, 4, 0.1, 3], "bbox_label_3d": categories["wall"]})
        entry = {"lidar_points": {"num_pts_feats": 6, "lidar_path": Path(path).name}, "instances": instances}
        if spec.name != "arkitscenes":
            entry["axis_align_matrix"] = np.eye(4)
        metainfo = {"categories": dict(categories), "dataset": STATED[spec.name], "info_version": "1.0"}
        infos = {"metainfo": metainfo, "data_list": [entry]}
        if split == "train":
            change(infos)
        (root / INFO_FILES[spec.name].format(split)).write_bytes(pickle.dumps(infos))


@each_dataset
def test_a_tree_is_read_back_to_the_boxes_and_points_that_were_written(tmp_path, spec):
    write_tree(tmp_path, spec)
    for split in ("train", "val"):
        source = build_source(SourceConfig(spec.name, root=str(tmp_path)), split)
        scan, rows = source[0], points_of(spec, split)
        assert source.names == [f"scan_{split}" + "_point" * (spec is ARKITSCENES)]
        assert [spec.classes[label] for label in scan.labels] == list(NAMES[spec.name].values())
        expected = [[*box, yaw * spec.has_yaw] for box, yaw in zip(BOXES, YAWS, strict=True)]
        np.testing.assert_allclose(scan.boxes, expected, atol=1e-6)
        np.testing.assert_array_equal(scan.points, rows[:, :3])
        np.testing.assert_allclose(scan.colors, rows[:, 3:] / spec.color_scale, atol=1e-6)
        kinds = {} if spec is ARKITSCENES else {f"boxes of the class 'wall', which {spec.name} does not have": 1}
        assert scan.notes == kinds


@each_dataset
def test_an_alignment_moves_the_points_to_the_boxes(tmp_path, spec):
    matrix = [[0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]]
    write_tree(tmp_path, spec, lambda infos: infos["data_list"][0].update(axis_align_matrix=np.array(matrix)))
    scan = build_source(SourceConfig(spec.name, root=str(tmp_path)), "train")[0]
    x, y, z = points_of(spec, "train")[:, :3].T
    np.testing.assert_allclose(scan.points, np.stack([5 - y, 6 + x, 7 + z], axis=1), atol=1e-6)


@each_dataset
def test_check_recognises_the_folder_and_names_the_dataset(tmp_path, spec, capsys):
    write_tree(tmp_path / "data", spec)
    report = check(tmp_path / "data", output=tmp_path / "check")
    assert report.document["dataset"] == spec.name and report.ready, report.document["mend"]
    assert report.document["kind"] == "a folder prepared by UniDet3D"
    assert f"compared with the classes of {spec.name}" in capsys.readouterr().out


def test_check_leads_from_the_folder_of_a_dataset_to_its_bins(tmp_path):
    write_tree(tmp_path / "multiscan" / "bins", MULTISCAN)
    with pytest.raises(InputError, match=r"itself holds no scans, but .*bins does"):
        check(tmp_path / "multiscan", output=tmp_path / "check")


def test_the_other_names_of_info_files_are_found(tmp_path):
    write_tree(tmp_path, ARKITSCENES)
    for split in ("train", "val"):
        other = tmp_path / f"arkitscenes_offline_infos_{split}.pkl"
        (tmp_path / f"arkitscenes_offline_{split}_infos.pkl").rename(other)
        assert default_info_files(ARKITSCENES, split, tmp_path) == (other.name,)
    assert len(build_source(SourceConfig("arkitscenes", root=str(tmp_path)), "val")) == 1
    (tmp_path / "s3dis_sp_infos_Area_5.pkl").touch()
    assert default_info_files(S3DIS, "val", tmp_path) == ("s3dis_sp_infos_Area_5.pkl",)
    assert default_info_files(S3DIS, "train", tmp_path)[0] == "s3dis_infos_Area_1.pkl"
    (tmp_path / "s3dis_infos_Area_5.pkl").touch()
    assert default_info_files(S3DIS, "val", tmp_path) == ("s3dis_infos_Area_5.pkl",)


def test_every_dataset_has_a_root_and_missing_data_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(ROOTS) == {spec.name for spec in ALL_SPECS}
    for spec in FOUR:
        with pytest.raises(InputError) as error:
            build_source(SourceConfig(spec.name, root=ROOTS[spec.name]), "train")
        assert f"The data of {spec.name} is not there" in str(error.value)
        assert "folder prepared by UniDet3D" in str(error.value) and INFO_FILES[spec.name][:6] in str(error.value)


def first(infos: dict[str, Any]) -> dict[str, Any]:
    return infos["data_list"][0]


def widen(infos: dict[str, Any]) -> None:
    """Give boxes of six numbers a yaw, or take that of boxes of seven."""
    for instance in first(infos)["instances"]:
        box = list(instance["bbox_3d"])
        instance["bbox_3d"] = box[:6] if len(box) == 7 else [*box, 0.2]


@each_dataset
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda infos: infos["metainfo"].pop("categories"), r"no metainfo\[\"categories\"\], which says what the num"),
        (lambda infos: first(infos)["instances"][0].update(bbox_label_3d=200), "the label 200, which its categories"),
        (lambda infos: first(infos)["instances"][0].update(bbox_label_3d=1.5), "a label that is no whole number"),
        (
            widen,
            r"have (6 numbers, 7 expected: those of \w+ have a|7 numbers, 6 expected: those of \w+ have no) yaw",
        ),
        (lambda infos: first(infos)["instances"][0]["bbox_3d"].append(1), r"boxes of scan scan_train\w* have [678]"),
        (lambda infos: first(infos)["lidar_points"].pop("lidar_path"), "it has no 'lidar_path'"),
        (lambda infos: first(infos).pop("lidar_points"), "it has no 'lidar_points'"),
        (lambda infos: first(infos)["lidar_points"].update(lidar_path="../../secret.bin"), "leaves the folder"),
        (lambda infos: first(infos)["lidar_points"].update(lidar_path="lost.bin"), r"1 of the 1 scans .* \(lost\)"),
        (lambda infos: first(infos)["lidar_points"].update(num_pts_feats=4), "has 4 numbers per point, 6 expected"),
        (lambda infos: infos["data_list"].clear(), "name no scan"),
        (lambda infos: infos["data_list"].append(first(infos)), "name 1 scans more than once"),
        (lambda infos: infos.pop("data_list"), "is no mmdetection3d info file of version 1 or 2"),
        (lambda infos: infos["metainfo"].update(dataset="sunrgbd"), "its metainfo calls its dataset sunrgbd"),
        (lambda infos: infos["metainfo"].update(categories={"car": 0, "bus": 1}), r"its categories lack \d+ of the"),
        (lambda infos: first(infos).update(axis_align_matrix=np.ones((4, 4))), "is no rotation and shift"),
    ],
)
def test_damaged_info_files_are_one_sentence(tmp_path, spec, change, sentence):
    write_tree(tmp_path, spec, change)
    with pytest.raises(InputError, match=sentence) as error:
        build_source(SourceConfig(spec.name, root=str(tmp_path)), "train")
    assert "\n" not in str(error.value)
    assert len(build_source(SourceConfig(spec.name, root=str(tmp_path)), "val")) == 1


@each_dataset
def test_categories_of_another_dataset_are_refused(tmp_path, spec):
    for other in FOUR:
        if other is not spec:
            table = CATEGORIES[other.name]
            write_tree(tmp_path, spec, lambda infos, table=table: infos["metainfo"].update(categories=dict(table)))
            with pytest.raises(InputError, match=f"no info file of {spec.name}: (its categories lack|scan scan_train)"):
                build_source(SourceConfig(spec.name, root=str(tmp_path)), "train")


@each_dataset
def test_files_that_are_no_info_files_of_version_2(tmp_path, spec):
    write_tree(tmp_path, spec)
    file = tmp_path / INFO_FILES[spec.name].format("train")
    whole = file.read_bytes()
    for content, sentence in (
        (whole[: len(whole) // 2], "is not a readable pickle"),
        (pickle.dumps([{"pts_path": "points/a.bin", "annos": {"gt_num": 0}}]), f"of {spec.name} are of version 2"),
        (b"cos\nsystem\n(S'echo'\ntR.", "system"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=sentence) as error:
            build_source(SourceConfig(spec.name, root=str(tmp_path)), "train")
        assert "\n" not in str(error.value)


@each_dataset
def test_boxes_with_nan_are_left_out_and_counted(tmp_path, spec):
    def damage(infos):
        first(infos)["instances"][0]["bbox_3d"][2] = float("nan")

    write_tree(tmp_path, spec, damage)
    scan = build_source(SourceConfig(spec.name, root=str(tmp_path)), "train")[0]
    assert len(scan.boxes) == 1 and scan.notes["boxes with NaN or infinite values"] == 1
