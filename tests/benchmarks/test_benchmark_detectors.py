"""The benchmark of both detectors runs on a small cloud and says what it measured; no figure is asserted to be fast."""

import json

import numpy as np
import pytest

from benchmarks import detectors


@pytest.mark.slow
def test_a_small_scan(tmp_path, capsys):
    points = np.random.default_rng(0).uniform(0, 1, (400, 6)).astype(np.float32)
    points[:, 2] = 0
    points.tofile(tmp_path / "floor.bin")
    arguments = ["--scan", str(tmp_path / "floor.bin"), "--width", "small", "--kinds", "fcaf3d", "--passes", "predict"]
    assert detectors.main([*arguments, "--other", str(tmp_path / "floor.bin"), "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    entry = result["detectors"]["fcaf3d"]
    assert 0 < entry["seconds"]["network"] < entry["seconds"]["predict"] < entry["first_call_s"]["predict"]
    assert entry["sites"]["voxels"] <= 400 and entry["parameters"] > 10_000
    assert result["second_scan"]["fcaf3d"]["programs_compiled"] == 0
    assert "fcaf3d sites: voxels" in detectors.table_of(result)


def test_a_scan_that_is_not_there_is_a_sentence(capsys):
    assert detectors.main(["--scan", "nowhere.bin"]) == 2
    assert "nowhere.bin" in capsys.readouterr().err
