"""Every figure of an evaluation is that of its definition, in rational numbers and with overlaps of shapely."""

import numpy as np
import pytest

from benchmarks.independent import SCORE_TOLERANCE, Case, compare_scores, overlaps_of, score_by_definition
from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.matching import GroundTruth


def test_random_evaluations_score_as_by_definition():
    largest, skipped = compare_scores(60, seed=20261130)
    assert set(largest) >= {"ap", "ar", "map", "curves", "f1", "calibration", "by size", "by distance", "draws"}
    assert max(largest.values()) <= SCORE_TOLERANCE, largest
    assert skipped < 40


def test_the_definition_gives_the_figures_of_a_case_worked_by_hand():
    # Two boxes; the first is hit, found again, the second is hit by half of itself.
    boxes = np.array([[0, 0, 0, 1, 1, 1, 0], [5, 0, 0, 1, 1, 1, 0]], np.float32)
    found = boxes[[0, 0, 1]]
    found[2, 5] = 0.5
    case = Case(
        [Detections(found, np.array([0.9, 0.8, 0.7], np.float32), np.zeros(3, np.int32))],
        [GroundTruth(boxes, np.zeros(2, np.int32))],
        num_classes=2,
        thresholds=(0.25, 0.5),
        rotated=False,
        origins=np.zeros((1, 2)),
        measured_from="centre",
        draws=np.array([[2], [0]]),
    )
    figures = score_by_definition(case, overlaps_of(case))
    np.testing.assert_array_equal(figures["ap"], [[5 / 6, np.nan], [0.5, np.nan]])
    np.testing.assert_array_equal(figures["ar"], [[1, np.nan], [0.5, np.nan]])
    np.testing.assert_array_equal(figures["draws"], [[5 / 6, np.nan], [0.5, np.nan]])
    np.testing.assert_array_equal(figures["by distance"][0, 0], [1, np.nan, 1])
    assert figures["f1"][0, 0].tolist() == pytest.approx([0.7, 2 / 3, 1, 0.8])
