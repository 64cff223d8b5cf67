"""Transfer: trainings without a dataset, prediction of its scans, trainings that start from them, and the tables."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.joint import demo
from h2a2_jax.boxes import Detections
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.cross import CommonClasses, common_classes
from h2a2_jax.evaluation.matches import read_matches
from h2a2_jax.scans.sources import build_source
from h2a2_jax.scans.specs import S3DIS, DatasetSpec, dataset_spec
from h2a2_jax.sweeps import transfer
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, locate, naive_joint
from h2a2_jax.sweeps.tables import class_tables, markdown
from h2a2_jax.sweeps.transfer import (
    evaluate_zero_shot,
    pretraining_rows,
    read_zero_shot,
    run_transfer,
    transfer_results,
    tuning_rows,
    without_zero_shot,
)
from tests.evaluation.test_evaluate import KNOWING
from tests.inference.tiny import random_detector
from tests.sweeps.finished import write_run


def write_all(folders: Mapping[SweepRun, Path], scores: Mapping[str, tuple[float, float]]) -> None:
    """Write the files of finished runs, with scores by the name of the run."""
    for run, folder in folders.items():
        names = run.config.dataset_names
        write_run(folder, run.config, {name: scores.get(run.name, (0.5, 0.25)) for name in names})


def test_what_is_trained_without_a_dataset_and_what_starts_with_it(tmp_path: Path):
    base = demo()
    rows = pretraining_rows(base, "s3dis", (0, 1))
    assert [row.label for row in rows] == ["TR3D on scannet", "TR3D on sunrgbd", "naive joint", "H2A2"]
    configs = {row.label: row.runs[1].config for row in rows}
    others = replace(base, datasets=base.datasets[:2], train=replace(base.train, seed=1))
    assert configs["H2A2"] == others and configs["naive joint"] == naive_joint(others)
    assert configs["TR3D on sunrgbd"] == naive_joint(replace(others, datasets=base.datasets[1:2]))

    folders = locate(rows, tmp_path)
    tuned = tuning_rows(base, "s3dis", (0, 1), rows, folders)
    assert [row.label for row in tuned] == [
        "from scratch",
        "from scratch, SF-KS",
        "from TR3D on scannet",
        "from TR3D on sunrgbd",
        "from naive joint",
        "from H2A2",
    ]
    for row in tuned:
        assert [run.seed for run in row.runs] == [run.config.train.seed for run in row.runs] == [0, 1]
        for run in row.runs:
            config = run.config
            assert config.dataset_names == ("s3dis",) and config.train.steps == 100
            assert config.optim.decay_epochs == (3, 4)  # 6 and 8 of 200 steps, with epochs as long
            assert (config.model.selection is not None) == (row.label in ("from scratch, SF-KS", tuned[-1].label))
            start = folders.get(run.after)
            assert config.train.init_from == ("" if start is None else str(start))
            assert run.after is None or run.after.seed == run.seed
    assert tuning_rows(base, "s3dis", (0,), (), {}, 7)[0].runs[0].config.train.steps == 7


def test_what_was_tuned_is_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, workdir = demo(), tmp_path / "sweep"

    def located(workdir: Path) -> dict[SweepRun, Path]:
        rows = pretraining_rows(base, "s3dis", (0,))
        return locate(tuning_rows(base, "s3dis", (0,), rows, locate(rows, workdir)), workdir)

    for run, folder in located(workdir).items():
        write_run(folder, run.config, {"s3dis": (0.5, 0.2)})
    monkeypatch.chdir(tmp_path)
    assert [*located(Path("sweep")).values()] == [folder.relative_to(tmp_path) for folder in located(workdir).values()]
    workdir.rename(tmp_path / "moved")
    assert all((folder / "evaluation.json").exists() for folder in located(tmp_path / "moved").values())
    # A start of the user's own is not known by its name alone.
    (run,) = (run for run in located(Path("moved")) if run.name == "s3dis_from_scratch")
    other = replace(run, config=replace(run.config, train=replace(run.config.train, init_from="somewhere")))
    with pytest.raises(InputError, match=r"another experiment \(train.init_from is  there and somewhere here"):
        locate([Row("other", (other,))], Path("moved"))


@pytest.mark.parametrize(
    ("base", "held_out", "sentence"),
    [
        (demo(), "kitti", "--held_out is 'kitti'; expected one of scannet, sunrgbd, s3dis"),
        (replace(demo(), datasets=demo().datasets[:2]), "scannet", "has only scannet and sunrgbd: give 3+"),
        (naive_joint(demo()), "s3dis", "give a config that has model.selection"),
    ],
)
def test_what_makes_no_sense_is_refused(base: ExperimentConfig, held_out: str, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        pretraining_rows(base, held_out, (0,))


def test_no_steps_of_tuning_are_refused():
    with pytest.raises(InputError, match="--tuning_steps is 0; expected 1 or more"):
        tuning_rows(demo(), "s3dis", (0,), (), {}, 0)


class Choosy:
    """Finds what `KNOWING` does, but as the head of one dataset, in one way, the chairs only."""

    def __init__(self, is_choosy: bool):
        self.is_choosy = is_choosy

    def predict(self, scans, dataset):
        found = KNOWING.predict(scans, dataset)
        if self.is_choosy and dataset == "scannet":
            chair = dataset_spec(dataset).classes.index("chair")
            chosen = [(each, each.labels == chair) for each in found]
            found = [Detections(each.boxes[kept], each.scores[kept], each.labels[kept]) for each, kept in chosen]
        return found


@pytest.mark.parametrize("row", range(4))
def test_as_it_is_a_detector_is_asked_in_every_way_that_it_has(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = pretraining_rows(demo(), "s3dis", (0,))[row].runs[0].config
    source = replace(demo().datasets[2], val_size=4)
    asked, choosy = [], ("mean", "selected")

    def build_predictor(model, specs, way):
        asked.append((way.conditioning, way.kernels))
        return Choosy(asked[-1] == choosy)

    monkeypatch.setattr(transfer, "restore_checkpoint", lambda folder: (random_detector(), config))
    monkeypatch.setattr(transfer, "build_predictor", build_predictor)
    evaluate_zero_shot(tmp_path, source)
    ways = [("own", "selected"), ("mean", "selected"), ("mean", "shared")][: (1, 1, 2, 3)[row]]
    assert asked == ways
    found = read_zero_shot(tmp_path, source)
    assert found is not None
    assert [(e["conditioning"], e["kernels"], e["head"]) for e in found] == [
        (*way, head) for way in ways for head in config.dataset_names
    ]
    held = [build_source(source, "val")[i] for i in range(4)]
    there = {S3DIS.classes[label] for scan in held for label in scan.labels}
    assert {"chair", "table", "bookcase"} < there
    for entry in found:
        assert entry["classes"] == ["table", "chair", "sofa", "bookcase"]
        common = there & {*entry["classes"]}
        # The predictor finds all boxes of a class by the same name; a bookshelf would be a bookcase.
        is_choosy = entry["head"] == "scannet" and (entry["conditioning"], entry["kernels"]) == choosy
        expected = (1 if is_choosy else len(common) - 1) / len(common)
        assert entry["mAP"] == pytest.approx([expected] * 2)
        assert [*entry["AP"][0]] == entry["classes"] and entry["AP"][1]["chair"] == 1
    matches = read_matches(tmp_path / "zero_shot_s3dis.npz")
    assert list(matches) == ["/".join((e["head"], e["conditioning"], e["kernels"])) for e in found]
    for entry, own in zip(found, matches.values(), strict=True):
        assert own.mean_average_precision(np.ones((1, 4), np.int64))[0] == pytest.approx(entry["mAP"])
    # What is of other scans, or of another version, does not count.
    assert read_zero_shot(tmp_path, replace(source, val_size=3)) is None
    assert read_zero_shot(tmp_path, demo().datasets[0]) is None
    path = tmp_path / "zero_shot_s3dis.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    assert read_zero_shot(tmp_path, source) is None


def test_a_head_without_common_classes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = pretraining_rows(demo(), "s3dis", (0,))[2].runs[0].config
    source = replace(demo().datasets[2], val_size=1)

    def without_sunrgbd(head: DatasetSpec, data: DatasetSpec) -> CommonClasses:
        return CommonClasses(head, data, ()) if head.name == "sunrgbd" else common_classes(head, data)

    monkeypatch.setattr(transfer, "restore_checkpoint", lambda folder: (random_detector(), config))
    monkeypatch.setattr(transfer, "build_predictor", lambda *given: KNOWING)
    monkeypatch.setattr(transfer, "common_classes", without_sunrgbd)
    evaluate_zero_shot(tmp_path, source)
    assert capsys.readouterr().out == "sunrgbd and s3dis have no class in common.\n"
    assert [entry["head"] for entry in read_zero_shot(tmp_path, source) or ()] == ["scannet", "scannet"]


class FinishedTransfer:
    """A transfer to S3DIS with two seeds whose detectors without it are trained and have predicted its scans.

    Fine-tuning is finished from scratch, and from every detector with the first seed.
    """

    def __init__(self, workdir: Path):
        self.base, self.workdir = demo(), workdir
        self.source = self.base.datasets[2]
        self.rows = pretraining_rows(self.base, "s3dis", (0, 1))
        self.folders = locate(self.rows, workdir)
        write_all(self.folders, {})
        for run, folder in self.folders.items():
            entries = [
                {
                    "head": head,
                    "conditioning": "own",
                    "kernels": "selected",
                    "classes": ["table", "chair"],
                    "mAP": [0.1 + 0.2 * run.seed, None],
                    "AP": [{"table": 0.1 + 0.2 * run.seed, "chair": None}, {"table": None, "chair": None}],
                }
                for head in run.config.dataset_names
            ]
            document = {"version": 1, "source": asdict(self.source), "entries": entries}
            (folder / "zero_shot_s3dis.json").write_text(json.dumps(document))
        self.tuned = tuning_rows(self.base, "s3dis", (0, 1), self.rows, self.folders)
        self.tuned_folders = locate(self.tuned, workdir)
        first = {run: folder for run, folder in self.tuned_folders.items() if run.seed == 0 or run.after is None}
        write_all(first, {"s3dis_from_scratch": (0.3, 0.1)})

    def finish(self) -> None:
        """Write the trainings that are left."""
        write_all({run: folder for run, folder in self.tuned_folders.items() if not folder.exists()}, {})

    def forget_predictions(self) -> None:
        """Remove the predictions of all detectors."""
        for folder in self.folders.values():
            (folder / "zero_shot_s3dis.json").unlink()

    def results(self) -> list[dict[str, Any]]:
        return transfer_results(self.base, "s3dis", self.rows, self.tuned, {**self.folders, **self.tuned_folders})

    def run(self, **options: Any) -> int:
        return run_transfer(self.base, self.workdir, "s3dis", (0, 1), jobs=1, **options)


@pytest.fixture
def finished_transfer(tmp_path: Path) -> FinishedTransfer:
    return FinishedTransfer(tmp_path)


def test_detectors_predict_when_they_are_trained_and_only_once(finished_transfer: FinishedTransfer, tmp_path: Path):
    rows, folders, source = (getattr(finished_transfer, name) for name in ("rows", "folders", "source"))
    assert without_zero_shot(rows, folders, source) == []
    finished_transfer.forget_predictions()
    assert without_zero_shot(rows, folders, source) == [*folders.values()]
    assert without_zero_shot(rows, locate(rows, tmp_path / "untrained"), source) == []


def test_the_tables_have_means_over_the_finished_seeds(finished_transfer: FinishedTransfer):
    results = finished_transfer.results()
    text = "".join(markdown(result).partition("\n\n")[0] + "\n" for result in results)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert lines[0][-3:] == ["mAP@0.25 of these", "mAP@0.5 of these", "seeds"]
    assert lines[2] == ["TR3D on scannet", "scannet", "own", "selected", "2", "20.0 ± 14.1", "-", "2"]
    assert [line[:2] for line in lines[4:8]] == [
        [label, head] for label in ("naive joint", "H2A2") for head in ("scannet", "sunrgbd")
    ]
    by_start = {line[0]: line[1:] for line in lines[10:]}
    assert by_start["from scratch"] == ["30.0 ± 0.0", "10.0 ± 0.0", "2"]
    assert by_start["from H2A2"] == ["50.0", "25.0", "1"]
    differences = [[(one["row"], one["against"]) for one in result["differences"]] for result in results]
    assert differences[0] == [
        (f"{label}, {head}, own, selected", f"TR3D on {head}, {head}, own, selected")
        for head in ("scannet", "sunrgbd")
        for label in ("naive joint", "H2A2")
    ]
    assert differences[1][-1] == ("from H2A2", "from scratch")
    tuned = results[1]["differences"][-1]
    assert tuned["seeds"] == [0] and tuned["values"]["s3dis"]["mAP@0.25"]["difference"] == pytest.approx(20)
    assert results[0]["rows"][0]["class_scores"]["s3dis"]["AP@0.25"]["table"]["mean"] == pytest.approx(20)
    (at_once,) = class_tables(results[0])  # at 0.5 no class has an AP
    assert at_once.rows[0] == "TR3D on scannet, scannet, own, selected" and [*at_once.classes] == ["table"]
    assert "without it for 200 steps of 4 scans a dataset" in results[0]["note"]
    assert "on it for 100 steps" in results[1]["note"]
    assert all("say nothing about the benchmarks" in result["note"] for result in results)


def test_the_command_prints_and_stores_both_tables(
    finished_transfer: FinishedTransfer, capsys: pytest.CaptureFixture[str]
):
    finished_transfer.finish()
    assert finished_transfer.run() == 0
    assert "| from H2A2" in capsys.readouterr().out
    assert "## Transfer to s3dis" in (finished_transfer.workdir / "table.md").read_text()
    stored = json.loads((finished_transfer.workdir / "results.json").read_text())["results"]
    assert stored == finished_transfer.results()
    assert [result["kind"] for result in stored] == ["transfer_to_s3dis", "tuning_to_s3dis"]
    assert stored[1]["rows"][-1]["seeds"] == [0, 1]


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_others_predict(
    finished_transfer: FinishedTransfer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    finished_transfer.finish()
    finished_transfer.forget_predictions()
    broken, *others = finished_transfer.folders.values()
    predicted = []

    def evaluate(folder, source):
        if folder == broken:
            raise InputError("its checkpoint is gone")
        predicted.append(folder)

    monkeypatch.setattr(transfer, "evaluate_zero_shot", evaluate)
    assert finished_transfer.run() == 1
    printed = capsys.readouterr()
    assert f"{broken.name} did not predict s3dis: its checkpoint is gone" in printed.err and predicted == others
    assert "| TR3D on scannet" not in printed.out and "| from H2A2" in printed.out


def test_a_used_budget_leaves_predictions_to_the_next_call(
    finished_transfer: FinishedTransfer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    finished_transfer.finish()
    finished_transfer.forget_predictions()
    predicted = []
    monkeypatch.setattr(transfer, "evaluate_zero_shot", lambda *given: predicted.append(given))
    assert finished_transfer.run(budget_minutes=1e-9) == 0
    assert f"{len(finished_transfer.folders)} predictions of s3dis are left" in capsys.readouterr().out
    assert predicted == []
