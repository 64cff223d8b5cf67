"""Evaluations of the checkpoints of a run, and the best of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.documents import (
    best_step,
    chosen_step,
    evaluation_csv,
    evaluation_folder,
    mean_score,
    score_metrics,
    score_text,
)


def documents(*scores: float | None) -> dict[str, Any]:
    """Of datasets a, b, ..., of mAP at .25; half of it at .5."""
    return {
        name: {"thresholds": [{"iou": 0.25, "mAP": s}, {"iou": 0.5, "mAP": None if s is None else s / 2}]}
        for name, s in zip("abc", scores, strict=False)
    }


def written(workdir: Path, step: int, *scores: float | None) -> None:
    folder = evaluation_folder(workdir, step)
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(documents(*scores)))


def test_a_spreadsheet_runs_no_name_of_a_class_as_a_formula():
    name, counts = "=HYPERLINK(1)", {"=HYPERLINK(1)": 1}
    level = {"iou": 0.5, "mAP": 0.1, "mAR": 0.2, "AP": {name: 0.1}, "AR": {name: 0.2}}
    level |= {"best_f1": {name: None}, "best_f1_of_all": None}
    document = {"num_ground_truth": counts, "num_detections": counts, "by_size": None, "by_distance": None}
    text = evaluation_csv({"-d": document | {"thresholds": [level]}})
    assert [line.split(",")[:3] for line in text.splitlines()[1:]] == [
        ["'-d", "0.5", "'=HYPERLINK(1)"],
        ["'-d", "0.5", "(mean)"],
    ]


def test_the_best_step_has_the_highest_mean_over_datasets_and_is_the_later_of_equal_ones(tmp_path: Path):
    assert best_step(tmp_path) is None
    written(tmp_path, 8, 0.5, 0.3)
    written(tmp_path, 100, 0.5, 0.3)
    written(tmp_path, 9, 0.7, None)  # what is not defined does not count
    written(tmp_path, 10, None, None)
    assert best_step(tmp_path) == 9
    (evaluation_folder(tmp_path, 9) / "evaluation.json").write_text('{"a": ')  # cut short by a kill
    assert best_step(tmp_path) == 100


def test_a_step_is_chosen_by_number_or_word(tmp_path: Path):
    assert chosen_step(tmp_path, None) is chosen_step(tmp_path, "last") is None
    assert chosen_step(tmp_path, "12") == 12
    with pytest.raises(InputError, match="none is known as the best"):
        chosen_step(tmp_path, "best")
    written(tmp_path, 8, 0.5)
    assert chosen_step(tmp_path, "best") == 8
    with pytest.raises(InputError, match="--step is 'first'; expected a number, best or last"):
        chosen_step(tmp_path, "first")


def test_scores_as_text_and_metrics():
    found = documents(0.5, None)
    assert score_text(found) == "mAP@0.25/0.5 a 50.0/25.0, b -/-"
    assert score_metrics(found) == {"mAP@0.25/a": 0.5, "mAP@0.5/a": 0.25, "mAP@0.25/b": None, "mAP@0.5/b": None}
    assert mean_score(found) == 0.5
