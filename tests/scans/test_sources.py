"""Sources from configs, the memory of scans, and the control with permuted boxes."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource
from h2a2_jax.scans.scan_folder import ScanFolder
from h2a2_jax.scans.sources import CachedSource, PermutedBoxes, SourceConfig, build_source, summed_notes
from h2a2_jax.scans.specs import S3DIS


class Numbered:
    """Scan i has i + 1 boxes of size i + 1; counts how often each is loaded; scan 3 of five or more is broken."""

    def __init__(self, size: int):
        self.size, self.loads = size, [0] * size

    @property
    def names(self) -> list[str]:
        return [f"scan{i}" for i in range(self.size)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Scan:
        self.loads[index] += 1
        if self.size >= 5 and index == 3:
            raise ScanError("scan3", "Scan scan3 is cut off.")
        points = np.full((4, 3), index, np.float32)
        boxes = np.full((index + 1, 7), index + 1, np.float32)
        return Scan(self.names[index], points, np.zeros((4, 3), np.float32), boxes, np.full(index + 1, index, np.int32))


def test_no_scan_keeps_its_boxes_and_all_boxes_stay():
    source = Numbered(4)
    permuted = PermutedBoxes(source, seed=1)
    taken = []
    for i in range(4):
        scan = permuted[i]
        assert scan.name == f"scan{i}" and (scan.points == i).all()
        assert len(scan.boxes) == len(scan.labels) != i + 1
        taken.append(len(scan.boxes))
    assert sorted(taken) == [1, 2, 3, 4]
    assert [len(PermutedBoxes(source, seed=1)[i].boxes) for i in range(4)] == taken
    others = [[len(PermutedBoxes(source, seed=s)[i].boxes) for i in range(4)] for s in range(2, 8)]
    assert any(other != taken for other in others)
    assert isinstance(permuted, ScanSource) and permuted.names == source.names


def test_permuting_one_scan_is_the_identity():
    assert len(PermutedBoxes(Numbered(1), 0)[0].boxes) == 1


def test_a_scan_whose_donor_is_broken_is_named_itself():
    permuted = PermutedBoxes(Numbered(5), 0)
    failing = []
    for i in range(5):
        try:
            permuted[i]
        except ScanError as error:
            failing.append(error.scan)
    assert len(failing) == 2 and "scan3" in failing and len(set(failing)) == 2


def test_cached_scans_are_loaded_once_by_any_number_of_threads():
    source = Numbered(4)
    cached = CachedSource(source)
    with ThreadPoolExecutor(8) as pool:
        scans = list(pool.map(cached.__getitem__, [i % 4 for i in range(64)]))
    assert source.loads == [1, 1, 1, 1]
    assert all(scan is cached[i % 4] for i, scan in enumerate(scans))
    assert len(cached) == 4 and cached.names == source.names and isinstance(cached, ScanSource)


def test_cached_source_raises_the_errors_of_its_source():
    cached = CachedSource(Numbered(5))
    for _ in range(2):
        with pytest.raises(ScanError, match="cut off"):
            cached[3]
    with pytest.raises(IndexError):
        cached[5]


def test_synthetic_splits_have_their_sizes():
    config = SourceConfig("sunrgbd", kind="synthetic", train_size=3, val_size=2, scale="demo")
    train, val = build_source(config, "train"), build_source(config, "val")
    assert (len(train), len(val)) == (3, 2) and not set(train.names) & set(val.names)


@pytest.mark.parametrize("present", [(), ("points",), ("points", "scannet_infos_train.pkl")])
def test_missing_data_is_named_with_its_layout(tmp_path: Path, present: tuple[str, ...]):
    root = tmp_path / "scannet"
    if present:
        (root / "points").mkdir(parents=True)
    for name in present[1:]:
        (root / name).write_bytes(b"")
    split = "val" if len(present) == 2 else "train"
    missing = [root, root / "scannet_infos_train.pkl", root / "scannet_infos_val.pkl"][len(present)]
    with pytest.raises(InputError) as error:
        build_source(SourceConfig("scannet", root=str(root)), split)
    message = str(error.value)
    assert "scannet is not there" in message and f"{missing} does not exist" in message
    assert "points/<scan>.bin" in message and "--config=configs/joint.py:demo" in message


def test_folder_with_info_files_of_other_names(tmp_path: Path):
    (tmp_path / "points").mkdir()
    np.zeros((2, 6), "<f4").tofile(tmp_path / "points" / "a.bin")
    info = {"lidar_points": {"lidar_path": "a.bin"}, "instances": []}
    (tmp_path / "mine.pkl").write_bytes(pickle.dumps({"metainfo": {}, "data_list": [info]}))
    source = build_source(SourceConfig("s3dis", root=str(tmp_path), val_infos=("mine.pkl",)), "val")
    assert source.names == ["a"] and len(source[0].points) == 2


def test_unknown_dataset_is_refused():
    with pytest.raises(InputError, match="kitti"):
        build_source(SourceConfig("kitti", kind="synthetic"), "train")


def test_notes_are_summed_in_one_sentence():
    notes = {"a": {"points lost": 3, "boxes lost": 1}, "b": {"points lost": 1000}}
    assert summed_notes(notes) == "In 2 of the scans: 1,003 points lost; 1 boxes lost."
    assert summed_notes({}) is None


def test_the_kind_of_a_root_is_found_by_its_files(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    np.save(own / "a.npy", np.ones((5, 3), np.float32))
    box = {"center": [1, 1, 1], "size": [1, 1, 1], "class": "lamp"}
    (own / "boxes.json").write_text(json.dumps({"version": 1, "scans": [{"file": "a.npy", "boxes": [box]}]}))
    config = SourceConfig("workshop", root=str(own), classes=("vice", "lamp"))
    source = build_source(config, "train")
    assert isinstance(source, ScanFolder) and source[0].labels.tolist() == [1]
    with pytest.raises(InputError, match="is of a class of workshop: there are lamp; expected are drill"):
        build_source(replace(config, classes=("drill",)), "train")
    with pytest.raises(InputError, match="is not there"):
        build_source(replace(config, kind="mmdet3d"), "train")
    with pytest.raises(InputError, match="Unknown dataset 'workshop'"):
        build_source(replace(config, classes=()), "train")


def test_a_dataset_of_ones_own_has_a_spec_of_its_own():
    spec = SourceConfig("workshop", root="x", classes=("vice", "table", "lamp"), has_yaw=True).spec
    assert (spec.num_classes, spec.num_outputs, spec.label_to_level) == (3, 8, (0, 1, 0))
    assert SourceConfig("w", classes=("vice", "table"), large_classes=("vice",)).spec.label_to_level == (1, 0)
    assert SourceConfig("s3dis").spec is S3DIS
    for bad in ({"name": "s3dis"}, {"classes": ("a", "a")}, {"large_classes": ("b",)}):
        with pytest.raises(InputError, match="dataset"):
            _ = SourceConfig(**({"name": "w", "classes": ("a",)} | bad)).spec
