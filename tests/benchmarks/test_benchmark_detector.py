"""The benchmark of the detector runs on a small cloud and says what it measured; no figure is asserted to be fast."""

import json

import numpy as np
import pytest

from benchmarks import detector


@pytest.fixture
def scan(tmp_path):
    points = np.random.default_rng(0).uniform(0, 1, (400, 6)).astype(np.float32)
    points[:, 2] = 0
    points.tofile(tmp_path / "floor.bin")
    return tmp_path / "floor.bin"


@pytest.mark.slow
def test_a_small_scan(scan, capsys):
    arguments = [
        "--scan",
        str(scan),
        "--width",
        "small",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--passes",
        "evaluate",
        "--rematerialize",
        "both",
        "--json",
    ]
    assert detector.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    passes = {"tr3d evaluate", "tr3d again evaluate"}
    assert set(result["ms"]) == set(result["compiled"]) == set(result["over_floor"]) == passes
    assert result["scan"]["points"] == 400 and result["scan"]["batch"] == 2
    assert result["scan"]["sites"]["voxels"] <= 2 * 400
    assert result["forward_gflop"] > 0 and result["floor_ms"]["forward+backward"] == pytest.approx(
        3 * result["floor_ms"]["forward"]
    )
    for key, ms in result["ms"].items():
        assert result["over_floor"][key] == pytest.approx(ms / result["floor_ms"]["forward"])
        assert result["scans_per_second"][key] == pytest.approx(2000 / ms)
        assert result["compiled"][key]["temporaries_mb"] > 0
    assert result["again_over_kept"].keys() == {"tr3d evaluate"}
    assert "GFLOP forward" in detector.table_of(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scan", "nowhere.bin"], "nowhere.bin"),
        (["--scan", "scan.obj"], "give a .bin"),
        (["--batch", "0"], "--batch is 0"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, said, capsys):
    try:
        assert detector.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert said in capsys.readouterr().err
