"""What a run says about its scans."""

import json

import numpy as np
import pytest

from h2a2_jax.inputs.sources import SourceConfig, build_source
from h2a2_jax.inputs.specs import S3DIS, SCANNET
from h2a2_jax.training.loop import say_notes, say_warnings


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
