"""Evaluations of the checkpoints of a run, and the best of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.documents import (
    best_step,
    chosen_step,
    damaged_evaluations,
    evaluation_csv,
    evaluation_folder,
    evaluation_json,
    lasting_steps,
    mean_score,
    read_evaluation,
    read_evaluations,
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
    assert best_step(tmp_path, among=(8, 10)) == 8
    (evaluation_folder(tmp_path, 9) / "evaluation.json").write_text('{"a": ')  # cut short by a kill
    assert best_step(tmp_path) == 100


def test_the_lowest_threshold_chooses_the_best_in_any_order():
    low, high = ({"thresholds": [{"iou": iou, "mAP": score} for iou, score in zip((0.5, 0.25), scores, strict=True)]}
                 for scores in ((0.9, 0.1), (0.2, 0.3)))  # fmt: skip
    assert mean_score({"a": low}) == 0.1 and mean_score({"a": high}) == 0.3


NOT_AN_EVALUATION = {
    "cut in half": b'{"a": {"thresholds": [{"iou": 0.25, "mA',
    "empty": b"",
    "no UTF-8": b'{"a": {"thresholds": [{"iou": 0.25, "mAP": 0.5}], "b": "\xff"}}',
    "a list": b"[]",
    "of no dataset": b"{}",
    "documents of another form": b'{"a": [1]}',
    "no thresholds": b'{"a": {"version": 1}}',
    "thresholds of another form": b'{"a": {"thresholds": {"0.25": 0.5}}}',
    "a score that is a text": b'{"a": {"thresholds": [{"iou": 0.25, "mAP": "0.5"}]}}',
    "a score that is not finite": b'{"a": {"thresholds": [{"iou": 0.25, "mAP": NaN}]}}',
    "a score beyond 1": b'{"a": {"thresholds": [{"iou": 0.25, "mAP": 50}]}}',
    "a later version": b'{"a": {"version": 2, "thresholds": [{"iou": 0.25, "mAP": 0.5}]}}',
    "deeply nested": b"[" * 100_000,
    "a number of many digits": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", NOT_AN_EVALUATION.values(), ids=NOT_AN_EVALUATION.keys())
def test_a_damaged_evaluation_costs_no_checkpoint(tmp_path: Path, content: bytes):
    for step, score in ((8, 0.9), (16, 0.5), (24, 0.6)):
        written(tmp_path, step, score)
    file = evaluation_folder(tmp_path, 8) / "evaluation.json"
    file.write_bytes(content)
    assert list(read_evaluations(tmp_path)) == [16, 24] and best_step(tmp_path) == 24
    assert lasting_steps(tmp_path, [8, 16, 24, 32]) == {8, 24}, "8 may be the best"
    assert [*damaged_evaluations(tmp_path)] == [8]
    with pytest.raises(InputError, match=re.escape(str(file))) as raised:
        read_evaluation(file)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(file))
    for saved, advice in (((), "Or start"), ((16, 24), "Or give --step=24, the best of the others, or start")):
        for step in saved:
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        with pytest.raises(InputError, match=f"{advice} the training again"):
            chosen_step(tmp_path, "best")


def test_an_evaluation_that_is_missing_or_a_folder_or_foreign_is_told(tmp_path: Path):
    names = ("a", "b")
    for step in (8, 16, 24):
        write_evaluation_of(tmp_path, step, 0.5, 0.25)
    write_evaluation_of(tmp_path, 32, 0.5)
    (evaluation_folder(tmp_path, 16) / "evaluation.json").unlink()
    (evaluation_folder(tmp_path, 16) / "evaluation.json").mkdir()
    write_evaluation_of(tmp_path, 40, 0.5, 0.25)
    elsewhere, there = (evaluation_folder(tmp_path, step) / "evaluation.json" for step in (40, 8))
    elsewhere.write_bytes(there.read_bytes())
    lines = {step: score_metrics(documents(0.5, 0.25)) for step in (8, 32)} | {24: {"mAP@0.25/a": 0.125}}
    found = damaged_evaluations(tmp_path, names, lines)
    assert "cannot be read (Is a directory)" in found[16]
    assert "has other scores than the line of step 24 in metrics.jsonl" in found[24]
    assert "is of the datasets a; those of this run are a, b" in found[32]
    assert "is not what was written, its checksum differs" in found[40], "it is that of step 8"
    assert [*found] == [16, 24, 32, 40]


def write_evaluation_of(workdir: Path, step: int, *scores: float) -> None:
    folder = evaluation_folder(workdir, step)
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(evaluation_json(documents(*scores), str(step)))


def test_no_bit_of_an_evaluation_changes_a_score_unseen(tmp_path: Path):
    folder, file = evaluation_folder(tmp_path, 8), evaluation_folder(tmp_path, 8) / "evaluation.json"
    write_evaluation_of(tmp_path, 8, 0.5, 0.3125)
    assert folder.is_dir()
    text, seen = file.read_bytes(), 0
    flips = range(0, 8 * len(text), 5)
    for flip in flips:
        place, bit = divmod(flip, 8)
        file.write_bytes(text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :])
        try:
            found = read_evaluation(file)
        except InputError:
            seen += 1
        else:
            assert {name: found[name]["thresholds"] for name in found} == {
                name: document["thresholds"] for name, document in documents(0.5, 0.3125).items()
            }
    assert seen > len(flips) / 2


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
