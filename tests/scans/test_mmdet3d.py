import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder, default_info_files
from h2a2_jax.scans.mmdet3d import main as lay_out
from h2a2_jax.scans.scan import ScanError, points_in_box
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD

ALIGNMENT = [[0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]]


def v2_entry(name, instances=(), **more):
    return {
        "lidar_points": {"lidar_path": f"{name}.bin", "num_pts_feats": 6},
        "instances": [{"bbox_3d": list(box), "bbox_label_3d": label} for box, label in instances],
        **more,
    }


def write(root, infos, scans, info_file="infos.pkl"):
    (root / "points").mkdir(parents=True, exist_ok=True)
    (root / info_file).write_bytes(pickle.dumps(infos))
    for name, rows in scans.items():
        np.array(rows, "<f4").tofile(root / "points" / f"{name}.bin")


def write_v2(root, entries, scans, info_file="infos.pkl", **metainfo):
    write(root, {"metainfo": metainfo, "data_list": entries}, scans, info_file)


ROWS = [[1, 2, 3, 0, 51, 255], [4, 5, 6, 255, 0, 0]]


def test_version_2_with_alignment(tmp_path):
    entry = v2_entry("a", [([3, 7, 10, 1, 1, 1], 2)], axis_align_matrix=ALIGNMENT)
    write_v2(tmp_path, [entry], {"a": ROWS})
    source = Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)
    scan = source[0]
    assert source.names == ["a"] and len(source) == 1 and scan.name == "a"
    np.testing.assert_allclose(scan.points, [[3, 7, 10], [0, 10, 13]])
    np.testing.assert_allclose(scan.colors, np.array([[0, 0.2, 1], [1, 0, 0]]), atol=1e-7)
    np.testing.assert_array_equal(scan.boxes, [[3, 7, 10, 1, 1, 1, 0]])
    np.testing.assert_array_equal(scan.transform, ALIGNMENT)
    assert scan.labels.tolist() == [2]


def test_without_alignment_points_stay(tmp_path):
    write_v2(tmp_path, [v2_entry("a")], {"a": ROWS})
    scan = Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)[0]
    np.testing.assert_array_equal(scan.points, np.array(ROWS)[:, :3])
    np.testing.assert_array_equal(scan.transform, np.eye(4))
    assert scan.boxes.shape == (0, 7)


def test_version_1(tmp_path):
    box = [0.5, 1, 2, 1, 2, 3, -0.7]
    annotated = {"gt_num": 1, "class": np.array([4]), "gt_boxes_upright_depth": np.array([box]), "location": "unused"}
    infos = [
        {"point_cloud": {"num_features": 6, "lidar_idx": 7}, "pts_path": "points/000007.bin", "annos": annotated},
        {"point_cloud": {"num_features": 6, "lidar_idx": 8}, "pts_path": "points/000008.bin", "annos": {"gt_num": 0}},
    ]
    rows = [[0, 0, 0, 0.25, 0.5, 1.0]]
    write(tmp_path, infos, {"000007": rows, "000008": rows})
    source = Mmdet3dFolder(tmp_path, "infos.pkl", SUNRGBD)
    np.testing.assert_allclose(source[0].boxes, [box])
    np.testing.assert_allclose(source[0].colors, [[0.25, 0.5, 1.0]])
    assert source[0].labels.tolist() == [4]
    assert len(source[1].boxes) == 0


def test_version_1_alignment(tmp_path):
    annos = {"gt_num": 0, "axis_align_matrix": np.array(ALIGNMENT, float)}
    write(tmp_path, [{"pts_path": "points/a.bin", "annos": annos}], {"a": ROWS})
    np.testing.assert_allclose(Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)[0].points[0], [3, 7, 10])


def test_unusable_objects_are_left_out_and_counted(tmp_path):
    good, flat = [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 1]
    write_v2(tmp_path, [v2_entry("a", [(good, -1), (good, 1), (good, 18), (flat, 1)])], {"a": ROWS})
    source = Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)
    assert source[0].labels.tolist() == [1]
    assert source[0].notes["boxes of no class of the dataset"] == 2
    assert source[0].notes["boxes with a size that is not positive"] == 1


def test_label_numbers_follow_the_names_in_the_file(tmp_path):
    box = [0, 0, 0, 1, 1, 1]
    entry = v2_entry("a", [(box, 0), (box, 1), (box, 2)])
    write_v2(tmp_path, [entry], {"a": ROWS}, categories={"board": 0, "beam": 1, "table": 2})
    assert Mmdet3dFolder(tmp_path, "infos.pkl", S3DIS)[0].labels.tolist() == [4, 0]


def test_several_info_files_follow_one_another(tmp_path):
    for area in (1, 2):
        write_v2(tmp_path, [v2_entry(f"Area_{area}_hall")], {f"Area_{area}_hall": ROWS}, f"area{area}.pkl")
    source = Mmdet3dFolder(tmp_path, ["area2.pkl", "area1.pkl"], S3DIS)
    assert source.names == ["Area_2_hall", "Area_1_hall"]


def test_points_that_are_not_finite_are_dropped_and_counted(tmp_path):
    write_v2(tmp_path, [v2_entry("a")], {"a": [*ROWS, [np.nan, 0, 0, 0, 0, 0], [0, np.inf, 0, 0, 0, 0]]})
    source = Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)
    assert len(source[0].points) == 2
    assert source[0].notes["points with NaN or infinite values"] == 2


def test_scans_that_cannot_be_used(tmp_path):
    nothing = [[np.nan] * 6]
    write_v2(
        tmp_path, [v2_entry(n) for n in ("cut", "empty", "nan", "bright")], {"nan": nothing, "bright": [[300.0] * 6]}
    )
    (tmp_path / "points" / "cut.bin").write_bytes(b"\0" * 49)
    (tmp_path / "points" / "empty.bin").write_bytes(b"")
    source = Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)
    for index, words in enumerate(("cut.bin has 49 bytes", "no usable point", "no usable point", "colours from 300")):
        with pytest.raises(ScanError, match=words) as caught:
            source[index]
        assert caught.value.scan == source.names[index]


def test_a_scan_that_vanishes_is_a_scan_error(tmp_path):
    write_v2(tmp_path, [v2_entry("a")], {"a": ROWS})
    source = Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)
    (tmp_path / "points" / "a.bin").unlink()
    with pytest.raises(ScanError, match="cannot be read"):
        source[0]


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*points: a prepared scannet folder holds infos.pkl and points/"):
        Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)
    (tmp_path / "points").mkdir()
    with pytest.raises(InputError, match=r"no file .*infos.pkl"):
        Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)
    write_v2(tmp_path, [v2_entry(name) for name in "abcde"], {"a": ROWS})
    with pytest.raises(InputError, match=r"4 of the 5 scans .*\(b, c, d, \.\.\.\)"):
        Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)


@pytest.mark.parametrize("infos", [{"scans": []}, "text", [{"annos": {}}], {"data_list": [{"instances": []}]}])
def test_other_pickles_are_no_info_files(tmp_path, infos):
    write(tmp_path, infos, {})
    with pytest.raises(InputError, match="no mmdetection3d info file"):
        Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)


def test_an_info_file_without_scans(tmp_path):
    write_v2(tmp_path, [], {})
    with pytest.raises(InputError, match="name no scan"):
        Mmdet3dFolder(tmp_path, "infos.pkl", SCANNET)


@pytest.mark.parametrize("spec", [SCANNET, S3DIS], ids=lambda spec: spec.name)
def test_laid_out_folder_serves_both_splits(tmp_path, spec, capsys):
    np.array(ROWS, "<f4").tofile(tmp_path / "room.bin")
    infos = {"metainfo": {}, "data_list": [v2_entry("other"), v2_entry("room", [([0, 0, 0, 1, 1, 1], 0)])]}
    (tmp_path / "infos.pkl").write_bytes(pickle.dumps(infos))
    arguments = f"--infos {tmp_path}/infos.pkl --dataset {spec.name} --output {tmp_path}/out".split()
    assert lay_out(["--scan", f"{tmp_path}/room.bin", *arguments]) == 0
    for split in ("train", "val"):
        source = Mmdet3dFolder(tmp_path / "out", default_info_files(spec, split), spec)
        assert source.names == ["room"] and source[0].labels.tolist() == [0]
    (tmp_path / "stray.bin").touch()
    assert lay_out(["--scan", f"{tmp_path}/stray.bin", *arguments]) == 2
    assert "does not annotate stray" in capsys.readouterr().err


@pytest.mark.skipif("H2A2_SCANS_DIR" not in os.environ, reason="H2A2_SCANS_DIR names no folder of example scans")
@pytest.mark.parametrize(
    ("spec", "scan", "infos"),
    [(SCANNET, "scene0000_00.bin", "scannet_infos.pkl"), (SUNRGBD, "000017.bin", "sunrgbd_000017_infos.pkl")],
    ids=["scannet", "sunrgbd"],
)
def test_boxes_of_real_scans_hold_their_points(tmp_path, spec, scan, infos):
    folder = Path(os.environ["H2A2_SCANS_DIR"])
    lay_out(
        [
            "--scan",
            str(folder / scan),
            "--infos",
            str(folder / infos),
            "--dataset",
            spec.name,
            "--output",
            str(tmp_path),
        ]
    )
    loaded = Mmdet3dFolder(tmp_path, default_info_files(spec, "train"), spec)[0]
    counts = [int(points_in_box(loaded.points, box).sum()) for box in loaded.boxes]
    if spec is SUNRGBD:
        assert dict(zip(loaded.labels.tolist(), counts, strict=True))[spec.classes.index("bed")] == 18_117
    else:
        assert len(counts) == 27 and min(counts) > 100
        assert abs(loaded.points[:, 2].min()) < 0.1  # the floor
