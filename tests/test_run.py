"""The command line as a user meets it, and a whole small run."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs.joint import get_config, tiny
from h2a2_jax.checkpoint.integrity import ITEMS
from h2a2_jax.checkpoint.store import CheckpointStore, restore_checkpoint
from h2a2_jax.cli import train_command
from h2a2_jax.config import ExperimentConfig, TrainConfig, experiment_config, from_json, to_json
from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.evaluation.documents import best_step, read_evaluation
from h2a2_jax.evaluation.evaluate import EvalRequest, evaluate_checkpoint
from h2a2_jax.inference.results import read_predicted_scans
from h2a2_jax.inference.validation_scans import predict_validation_scans
from h2a2_jax.models import DetectorConfig
from h2a2_jax.training.loop import train
from h2a2_jax.training.metrics import MetricsWriter, read_metrics
from tests.training.test_wandb import installed

ROOT = Path(__file__).parent.parent


def test_run_py_ends_with_one_sentence_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "--mode=eval", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("run.py: There is no folder") and len(done.stderr.strip().splitlines()) == 1


def small() -> ExperimentConfig:
    """The tiny run with fewer scans and steps; what it compiles is what takes the time."""
    config = tiny()
    return replace(
        config,
        datasets=tuple(replace(d, train_size=3) for d in config.datasets),
        train=replace(config.train, batch_size=1, steps=4, log_every=1, checkpoint_every=3, evaluate_every=2),
    )


@dataclass(frozen=True)
class WholeRun:
    """A run of `small` on three devices that nothing happened to: its folder, results and output."""

    workdir: Path
    results: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    workdir = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = train(small(), workdir, jax.devices()[:3])
    return WholeRun(workdir, results, printed.getvalue())


@pytest.mark.slow
def test_trained_on_three_devices_evaluated_on_one(whole: WholeRun) -> None:
    config, workdir = small(), whole.workdir
    assert "3 cpu device(s), 3 x 1" in whole.printed
    assert "layer1_0.conv1" in whole.printed and "Embeddings E moved by" in whole.printed
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    shares = ("exclusive_share/sunrgbd", "exclusive_offsets")
    for key in ("loss/scannet", "loss/s3dis", "learning_rate", "psi/mean", *shares, "mAP@0.25/s3dis"):
        assert np.isfinite(lines[-1][key])
    assert lines[-1]["exclusive_offsets"] == 0  # alpha is as at the start: nothing is measured in four steps
    assert {"dropped_points", "scans_per_second"} <= lines[-1].keys()

    before = (workdir / "evaluation.json").read_text()
    (workdir / "evaluation.json").unlink()
    evaluate_checkpoint(workdir, EvalRequest(), config)
    assert (workdir / "evaluation.json").read_text() == before
    assert read_evaluation(workdir / "evaluation.json") == json.loads(json.dumps(whole.results))

    predict_validation_scans(workdir, None, config)
    document = json.loads((workdir / "predictions" / "sunrgbd.json").read_text())
    assert len(read_predicted_scans(document)) == 2

    with pytest.raises(InputError, match="stem_channels"):
        restore_checkpoint(workdir, expected=replace(config, model=replace(config.model, stem_channels=8)))
    with pytest.raises(InputError, match="datasets"):
        restore_checkpoint(workdir, expected=replace(config, datasets=config.datasets[:2]))


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_end(
    whole: WholeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, devices, wandb = tmp_path / "stopped", jax.devices()[:3], installed(monkeypatch)
    config = replace(small(), train=replace(small().train, loggers=("tensorboard", "wandb")))

    write = MetricsWriter.write

    def write_and_signal(self: MetricsWriter, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsWriter, "write", write_and_signal)
        capsys.readouterr()
        with pytest.raises(Stopped) as end:
            train(config, stopped, devices)
    assert end.value.status == 0
    assert f"step 4 is saved in {stopped}, and the same command goes on" in capsys.readouterr().out
    assert not (stopped / "summary.md").exists()
    shutil.rmtree(stopped / "checkpoints" / "4")  # as if it had been killed before

    assert train(config, stopped, devices) == whole.results
    assert f"Resuming {stopped} after step 3 of 4." in capsys.readouterr().out
    folders = (whole.workdir, stopped)
    stores = [CheckpointStore(folder / "checkpoints") for folder in folders]
    assert stores[0].steps() == stores[1].steps() == sorted({3, 4, best_step(stopped)})  # the latest two, and the best
    ours, theirs = (jax.tree.leaves(store.read_items(4, ITEMS)) for store in stores)
    assert ours and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for store in stores:
        store.close()
    for name in ("metrics.jsonl", "selection.jsonl"):
        told = [[json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in folders]
        for lines in told:
            for line in lines:
                line.pop("scans_per_second", None), line.pop("compilations", None)
        assert told[0] == told[1]
    evaluations = [(folder / "evaluations" / "2" / "evaluation.json").read_text() for folder in folders]
    assert evaluations[0] == evaluations[1]
    scores = {line["step"]: line.get("mAP@0.25/scannet") for line in read_metrics(stopped)}
    assert list(scores) == [1, 2, 3, 4] and [step for step, score in scores.items() if score is not None] == [2, 4]
    ((_, run),) = wandb.runs.items()
    given = [(row["step"], name) for row in run.rows for name in row if name != "step"]
    assert len(given) == len({*given}) and {step for step, _ in given} == {1, 2, 3, 4} and run.finished == 2
    lines = {line["step"]: line for line in read_metrics(stopped)}
    assert all(row[name] == lines[row["step"]][name] for row in run.rows for name in row if name.startswith("loss"))
    assert {(step, name) for step, name in given if name.startswith("mAP@0.25/s3dis")} == {
        (step, "mAP@0.25/s3dis") for step in (2, 4)
    }
    assert run.summary["evaluation/mAP@0.25/s3dis"] == whole.results["s3dis"]["thresholds"][0]["mAP"]
    assert "last" in (stopped / "summary.md").read_text() and "best" in (stopped / "summary.md").read_text()
    event_files = [*(whole.workdir / "tensorboard").iterdir()]
    assert len(event_files) == 1 and not [*stopped.rglob("*.part*"), *stopped.rglob("*tmp*")]

    with pytest.raises(InputError, match=r"begun with another config: optim.lr was 0.001 and is 0.5"):
        other = replace(config, train=replace(config.train, keep_checkpoints=1))
        train(replace(other, optim=replace(config.optim, lr=0.5)), stopped, devices)
    with CheckpointStore(stopped / "checkpoints") as store:
        assert store.steps() == sorted({3, 4, best_step(stopped)})


def test_a_missing_validation_split_is_noticed_before_training(tmp_path: Path) -> None:
    config = small()
    missing = replace(config.datasets[0], kind="mmdet3d", root=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="The data of scannet is not there"):
        train_command(replace(config, datasets=(missing, *config.datasets[1:])), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_config_files_give_the_settings_of_the_paper() -> None:
    config = experiment_config(get_config())
    assert config.dataset_names == ("scannet", "sunrgbd", "s3dis")
    assert (config.model.depth, config.model.stage_channels) == (34, (64, 128, 128, 128))
    assert config.model.selection is not None and config.harmonize.method == "ngh"
    assert (config.train.batch_size, config.train.epochs, config.optim.lr) == (16, 12, 1e-3)
    assert experiment_config(get_config("no_sfks")).model.selection is None
    assert experiment_config(get_config("synthetic,no_sfks")).datasets[2].root == "data/synthetic_s3dis"
    assert DetectorConfig().voxel_size == 0.01 and TrainConfig().seed == 0


def test_a_run_stores_a_config_that_reads_back() -> None:
    assert from_json(to_json(small())) == small()
