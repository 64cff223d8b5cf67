"""Content of a picture: points, boxes, matches and limits."""

import numpy as np
import pytest

from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation import evaluate_detections
from h2a2_jax.viewer.content import find_hits, make_content, point_spacing, view_limits
from tests.viewer.scenes import BOXES, NAMES, found, room, scan_of


def test_too_many_points_are_thinned_evenly_with_a_note():
    points = np.stack([np.arange(1000), np.zeros(1000), np.zeros(1000)], axis=1)
    shown = make_content(scan_of(points), None, NAMES, None, 100)
    assert shown.num_points == 1000 and shown.notes == ("100 of 1,000 points are shown, thinned evenly.",)
    np.testing.assert_array_equal(shown.scan.points[:, 0] // 10, np.arange(100))  # one of every ten


def test_points_and_boxes_that_are_not_finite_are_left_out_with_a_note():
    scan = room(10)
    scan.points[3, 1] = np.nan
    boxes = BOXES.copy()
    boxes[1, 6] = np.inf
    shown = make_content(scan, found(boxes), NAMES, GroundTruth(boxes, np.zeros(3, np.int32)), 100)
    assert len(shown.scan.points) == 9 and len(shown.detections) == 2 and len(shown.truth.labels) == 2
    assert shown.notes == (
        "1 points with NaN or infinite values are not shown.",
        "2 boxes with NaN or infinite numbers are not shown.",
    )


def test_detections_are_shown_by_descending_score_and_ignored_truth_is_not():
    truth = GroundTruth(BOXES, np.array([0, -1, 2], np.int32))
    shown = make_content(room(), found(scores=(0.2, 0.9, 0.5)), NAMES, truth, 100)
    assert shown.detections.labels.tolist() == [1, 2, 0] and shown.truth.labels.tolist() == [0, 2]


@pytest.mark.parametrize("labels", [(0, 1, 3), (-1, 0, 0)])
def test_a_label_without_a_name_is_refused(labels):
    with pytest.raises(ValueError, match="expected 0 to 2, for 3 class names"):
        make_content(room(), found(labels=labels), NAMES, None, 100)


def test_hits_are_those_of_evaluation():
    rng = np.random.default_rng(1)
    truth = GroundTruth(BOXES, np.array([0, 1, 1], np.int32))
    rows = rng.integers(0, 3, 40)
    boxes = BOXES[rows] + rng.normal(0, 0.08, (40, 7)).astype(np.float32) * [1, 1, 1, 1, 1, 1, 0]
    detections = found(boxes, rng.uniform(0, 1, 40), truth.labels[rows])
    shown = make_content(room(), detections, NAMES, truth, 100)
    hit = find_hits(shown)
    evaluation = evaluate_detections([detections], [truth], NAMES, rotated=True)
    for row in range(2):
        recall = [len(set(hit.truth[row, shown.detections.labels == c]) - {-1}) for c in (0, 1)] / np.array([1, 2])
        np.testing.assert_allclose(recall, evaluation.average_recall[row, :2])
        there = hit.truth[row][hit.truth[row] >= 0]
        assert len(set(there)) == len(there)  # each is hit once
    assert (hit.iou[hit.truth[1] >= 0] > 0.5).all()


def test_a_hit_does_not_depend_on_lower_scores():
    truth = GroundTruth(BOXES[:1], np.zeros(1, np.int32))
    boxes = np.repeat(BOXES[:1], 3, axis=0)
    all_hits = find_hits(make_content(room(), found(boxes, (0.3, 0.2, 0.1), (0, 0, 0)), NAMES, truth, 100))
    assert all_hits.truth.tolist() == [[0, -1, -1]] * 2


def test_the_frame_holds_the_boxes_but_not_strays():
    scan = room(4000)
    scan.points[7] = [90, 90, 30]
    low, high = view_limits(make_content(scan, found(), NAMES, None, 10_000))
    assert (high < 6).all() and (low > -1).all()
    assert (box_corners(BOXES).reshape(-1, 3) <= high + 1e-6).all()


def test_the_frame_of_nothing_and_of_one_point_has_a_size():
    for scan in (scan_of([]), scan_of([5, 6, 7])):
        low, high = view_limits(make_content(scan, None, NAMES, None, 10))
        assert (high - low >= 0.5).all()


def test_spacing_of_a_grid():
    x, y = np.meshgrid(np.arange(40) * 0.1, np.arange(40) * 0.1)
    points = np.stack([x.ravel(), y.ravel(), np.zeros(1600)], axis=1).astype(np.float32)
    assert point_spacing(points) == pytest.approx(0.1, rel=0.05)
    assert point_spacing(points[:1]) > 0
