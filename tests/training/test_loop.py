"""What a run says about its scans."""

import json
import pickle

import jax
import numpy as np
import pytest

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.evaluation.evaluate import say_notes, say_warnings
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder
from h2a2_jax.scans.sources import CachedSource, SourceConfig, build_source
from h2a2_jax.scans.specs import S3DIS, SCANNET
from h2a2_jax.training.build import build_stream


def test_training_scans_that_validate_are_said(tmp_path, capsys: pytest.CaptureFixture[str]):
    np.save(tmp_path / "a.npy", np.ones((5, 3), np.float32))
    (tmp_path / "boxes.json").write_text(json.dumps({"version": 1, "scans": [{"file": "a.npy"}]}))
    config = SourceConfig("scannet", root=str(tmp_path))
    say_warnings({"scannet": build_source(config, "train")})
    assert capsys.readouterr().out == ""
    say_warnings({"scannet": build_source(config, "val")})
    assert capsys.readouterr().out.startswith("scannet: No scan of")


def test_what_was_left_out_is_said_by_dataset(capsys: pytest.CaptureFixture[str]):
    notes = {"scannet/a": {"points lost": 2}, "scannet/b": {"points lost": 1}, "s3dis/a": {"boxes lost": 5}}
    say_notes(notes, [SCANNET, S3DIS])
    assert capsys.readouterr().out.splitlines() == [
        "scannet: In 2 of the scans: 3 points lost.",
        "s3dis: In 1 of the scans: 5 boxes lost.",
    ]


def test_scans_that_are_quick_to_read_are_not_kept_in_memory(tmp_path):
    (tmp_path / "points").mkdir()
    rows = np.random.default_rng(0).uniform(0, 1, (200, 6)).astype("<f4")
    rows.tofile(tmp_path / "points" / "a.bin")
    entry = {"lidar_points": {"lidar_path": "a.bin"}, "instances": []}
    (tmp_path / "mine.pkl").write_bytes(pickle.dumps({"metainfo": {}, "data_list": [entry]}))
    datasets = (
        SourceConfig("s3dis", root=str(tmp_path), train_infos=("mine.pkl",)),
        SourceConfig("scannet", kind="synthetic", train_size=1, scale="demo"),
    )
    process_layout = MeshLayout(train_mesh(2, jax.devices()[:1]), 2)
    stream = build_stream(ExperimentConfig(datasets=datasets), process_layout)
    assert [type(source) for source in stream.sources] == [Mmdet3dFolder, CachedSource]
