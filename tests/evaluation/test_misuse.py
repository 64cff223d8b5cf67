"""Wrong boxes, scores and labels end in one sentence, and never in a score.

The cases run in a process of their own, as a user's program does: in the tests wrong types already end at the
annotations.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation import average_precision, best_f1, calibration, evaluate_detections, precision_at_levels
from tests.outcomes import print_outcomes

ROOT = Path(__file__).parents[2]
BOXES = np.array([[0, 0, 0, 1, 1, 1, 0], [3, 0, 0, 1, 1, 1, 0]], np.float32)


def changed(row, column, value):
    boxes = BOXES.copy()
    boxes[row, column] = value
    return boxes


def make_cases():
    """Calls by name, each with a part of its error message, and results that look like misuse and are right."""
    zeros, hits = np.zeros(2, np.int32), np.array([True, False])

    def score(boxes=BOXES, scores=(0.9, 0.5), labels=zeros, truth=BOXES, true_labels=zeros, **options):
        found = Detections(boxes, np.asarray(scores), np.asarray(labels))
        there = GroundTruth(truth, np.asarray(true_labels))
        return evaluate_detections([found], [there], ["chair", "table"], **{"rotated": False, **options})

    outside = "are NaN, infinite or outside 0 to 1, such as"
    refused = {
        "a score of NaN": (lambda: score(scores=[0.9, np.nan]), f"1 of 2 scores of scan 0 {outside} nan"),
        "an infinite score": (lambda: score(scores=[np.inf, 0.9]), f"{outside} inf"),
        "a negative score": (lambda: score(scores=[0.9, -0.1]), f"{outside} -0.1: leave those detections out"),
        "scores in per cent": (lambda: score(scores=[90.0, 50.0]), f"2 of 2 scores of scan 0 {outside} 90"),
        "scores in a column": (
            lambda: score(scores=[[0.9], [0.5]]),
            "2 detections with scores [2, 1]; expected is one",
        ),
        "scores of other boxes": (lambda: score(scores=[0.9]), "2 detections with scores [1]; expected is one each"),
        "boxes of six": (
            lambda: score(BOXES[:, :6]),
            "detections with boxes float32[2, 6]; expected are numbers [n, 7]",
        ),
        "true boxes of six": (lambda: score(truth=BOXES[:, :6]), "ground truth with boxes float32[2, 6]; expected"),
        "one box": (lambda: score(BOXES[0]), "detections with boxes float32[7]; expected are numbers [n, 7]"),
        "boxes of words": (lambda: score(BOXES.astype(str)), "expected are numbers [n, 7]"),
        "a box of NaN": (
            lambda: score(changed(1, 3, np.nan)),
            "detections with 1 of 2 boxes with NaN or infinite numbe",
        ),
        "an infinite true box": (lambda: score(truth=changed(0, 0, np.inf)), "ground truth with 1 of 2 boxes with NaN"),
        "a box without size": (
            lambda: score(changed(1, 5, 0)),
            "detections with 1 of 2 boxes without size, the first in row 1",
        ),
        "a true box of negative size": (
            lambda: score(truth=changed(0, 4, -1)),
            "ground truth with 1 of 2 boxes without",
        ),
        "a label too high": (
            lambda: score(labels=[0, 2]),
            "labels from 0 to 2; expected 0 to 1, for 2 class names, in its det",
        ),
        "a true label below 0": (
            lambda: score(true_labels=[0, -1]),
            "labels from -1 to 0; expected 0 to 1, for 2 class na",
        ),
        "labels of other boxes": (
            lambda: score(labels=[0]),
            "detections of 2 boxes with labels int64[1]; expected is an int",
        ),
        "labels of floats": (
            lambda: score(labels=[0.0, 1.0]),
            "detections of 2 boxes with labels float64[2]; expected is",
        ),
        "pairs": (
            lambda: evaluate_detections([(BOXES, 1)], [BOXES], ["a"], rotated=False),
            "a tuple and a ndarray; expected",
        ),
        "one scan": (
            lambda: evaluate_detections(score, [], ["a"], rotated=False),
            "A function was given; expected is a",
        ),
        "one scan's boxes": (
            lambda: evaluate_detections(Detections(BOXES, hits, zeros), [], ["a"], rotated=False),
            "A Detections was given; expected is a list with one entry per scan",
        ),
        "classes in a word": (
            lambda: evaluate_detections([], [], "chair", rotated=False),
            "class_names is 'chair'; expected is a sequence of names",
        ),
        "yaws in degrees": (
            lambda: score(changed(1, 6, 45.0)),
            "1 of 2 boxes with a yaw of more than two turns, the first in row 1: give radians, not degrees",
        ),
        "thresholds in per cent": (
            lambda: score(iou_thresholds=(25, 50)),
            "iou_thresholds are (25, 50); expected are num",
        ),
        "another origin": (
            lambda: score(measured_from="door"),
            "measured_from is 'door'; expected is one of sensor, cen",
        ),
        "origins of three": (lambda: score(origins=np.zeros((1, 3))), "origins have the shape [1, 3] for 1 scans"),
        "calibration of NaN": (lambda: calibration(np.array([np.nan, 0.1]), hits), f"1 of 2 scores {outside} nan"),
        "calibration of others": (lambda: calibration(np.array([0.1]), hits), "scores [1], is_hit [2] were given"),
        "F1 of rising scores": (lambda: best_f1(np.array([0.1, 0.9]), hits, 2), "not in descending order: sort them"),
        "F1 of negative scores": (lambda: best_f1(np.array([-0.1, -0.9]), hits, 2), f"2 of 2 scores {outside} -0.1"),
        "unlike curves": (lambda: average_precision(np.ones(3), np.ones(2)), "precision [3], recall [2] were given"),
        "levels of unlike curves": (
            lambda: precision_at_levels(np.ones(3), np.ones(2)),
            "expected is one number a det",
        ),
    }
    right = {
        "no boxes": (lambda: score(BOXES[:0], [], zeros[:0]).average_precision[0, 0].item(), 0.0),
        "boxes of integers": (lambda: score(BOXES.astype(int)).average_precision[1, 0].item(), 1.0),
        "scores of 1 and of rounding": (lambda: score(scores=[1.000001, 0.0]).average_precision[1, 0].item(), 1.0),
        "one score for all": (lambda: calibration(np.array([1.0, 1.0]), hits)[1][-1].item(), 0.5),
    }
    return refused, right


def main():
    """Print what becomes of every case."""
    print_outcomes(make_cases())


REFUSED, RIGHT = make_cases()


@pytest.fixture(scope="module")
def outcomes():
    command = [sys.executable, "-W", "error", "-c", "from tests.evaluation.test_misuse import main; main()"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_ends_in_a_sentence(name, outcomes):
    kind, _, sentence = outcomes[0][name].partition(": ")
    assert kind == "ValueError" and REFUSED[name][1] in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("name", RIGHT)
def test_what_looks_like_misuse_is_right(name, outcomes):
    assert outcomes[1][name] == RIGHT[name][1]
