"""A run folder of version 0.1.0 (`configs/joint.py:tiny`) gives the same evaluation and the same boxes."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h2a2_jax.cli import main
from h2a2_jax.scans.specs import dataset_spec
from h2a2_jax.scans.synthetic import SyntheticSource

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "run_0.1.0.tar.gz"


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old_run") / "run"
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(*flags: str) -> str:
    done = subprocess.run([sys.executable, "run.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(box: dict[str, Any]) -> list[float]:
    """A box as a row of numbers, in which different labels are far apart."""
    return [*box["center"], *box["size"], box["yaw"], 10 * box["label"], box["score"]]


@pytest.mark.slow
def test_the_evaluation_is_the_same(old_run: Path, tmp_path: Path) -> None:
    run("--mode=eval", f"--workdir={old_run}", f"--output={tmp_path}")
    now, then = (json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in (tmp_path, old_run))
    assert now.keys() == then.keys() and then.keys() == {"scannet", "sunrgbd", "s3dis"}
    for name in then:
        assert now[name]["num_ground_truth"] == then[name]["num_ground_truth"]
        for a, b in zip(now[name]["thresholds"], then[name]["thresholds"], strict=True):
            assert a["mAP"] == pytest.approx(b["mAP"], abs=1e-3)


@pytest.mark.slow
def test_the_boxes_are_the_same(old_run: Path, tmp_path: Path) -> None:
    run("--mode=predict", f"--workdir={old_run}", "--dataset=scannet", f"--output={tmp_path}")
    now, then = (
        json.loads((folder / "scannet.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, old_run / "predictions")
    )
    assert all(now[key] == then[key] for key in ("version", "frame", "units", "dataset"))
    for a, b in zip(now["scans"], then["scans"], strict=True):
        assert a["name"] == b["name"] and len(b["boxes"]) > 1000
        rows, expected = (np.array([row(box) for box in scan["boxes"]]) for scan in (a, b))
        # Rounding differs by processor: a box at the border of suppression or of the lowest score may come or go.
        nearest = np.abs(rows[:, None] - expected[None]).max(-1).min(0)
        assert abs(len(rows) - len(expected)) <= 5 and (nearest < 1e-3).mean() > 0.99


@pytest.mark.slow
def test_files_of_points_are_predicted_into_its_folder(
    old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = SyntheticSource(dataset_spec("scannet"), "val", 1, scale="demo")[0]
    np.savetxt(tmp_path / "room.txt", np.hstack([scan.points, np.rint(255 * scan.colors)]), fmt="%.4f")
    (tmp_path / "view.jpg").touch()
    assert main(["predict", str(tmp_path), f"--workdir={old_run}", "--dataset=scannet", "--score=0.01"]) == 0
    said = capsys.readouterr().out
    assert "procedural scans only" in said and "Not read, as no point clouds: 1 file .jpg (view.jpg)." in said
    written = {path.name for path in (old_run / "boxes").iterdir()}
    assert {"room.html", "room.json", "room_points.ply", "room_boxes.ply", "boxes.csv", "predictions.json"} <= written
    assert len((old_run / "boxes" / "boxes.csv").read_text().splitlines()) > 100


def test_weights_with_kernel_selection_are_not_exported(
    old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(old_run), "--reverse", f"--output={tmp_path / 'tr3d.pth'}"]) == 2
    assert "which TR3D cannot express" in capsys.readouterr().err and not (tmp_path / "tr3d.pth").exists()
