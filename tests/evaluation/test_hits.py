"""All scans at once is what scan by scan is; every box and every detection counts in one bin."""

import numpy as np
import pytest

from benchmarks.overlaps import exact_overlaps
from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.matching import GroundTruth, Pool, best_overlaps, match, pool_detections
from h2a2_jax.evaluation import average_precision, evaluate_detections
from h2a2_jax.evaluation.average_precision import (
    DISTANCES,
    SIZES,
    best_f1,
    calibration,
    distance_from,
    precision_at_levels,
    precision_recall,
    scan_origin,
)
from tests.boxes.polygons import random_pairs
from tests.evaluation.overlaps import PAIRED_IOU, hits_of_scan, iou_matrix


def random_scans(scans, *, yaw, classes=3, seed=0):
    """Ground truth, and detections scattered about it, with equal boxes and equal scores among both."""
    rng = np.random.default_rng(seed)
    detections, ground_truth = [], []
    for _ in range(scans):
        count = rng.integers(0, 6)
        boxes = np.concatenate(
            [rng.uniform(0, 3, (count, 3)), rng.uniform(0.2, 2, (count, 3)), rng.uniform(-3, 3, (count, 1)) * yaw], 1
        ).astype(np.float32)
        boxes = np.concatenate([boxes, boxes[:1]])
        labels = np.append(rng.integers(0, classes, count), np.zeros(min(count, 1))).astype(np.int32)
        source = rng.integers(0, max(len(boxes), 1), 12 if len(boxes) else 0)
        found = boxes[source] + (rng.normal(0, 0.1, (len(source), 7)) * [1, 1, 1, 1, 1, 1, yaw]).astype(np.float32)
        found[:, 3:6] = np.abs(found[:, 3:6])
        scores = rng.integers(1, 9, len(source)) / np.float32(10)
        detections.append(Detections(found.astype(np.float32), scores.astype(np.float32), labels[source]))
        ground_truth.append(GroundTruth(boxes, labels))
    return detections, ground_truth


@pytest.mark.parametrize("yaw", [0, 1])
def test_hits_of_all_scans_at_once_are_those_scan_by_scan(yaw):
    detections, ground_truth = random_scans(30, yaw=yaw)
    detected, scores = pool_detections(detections)
    truth = Pool.of(ground_truth)
    overlap, target = best_overlaps(detected, truth, rotated=bool(yaw))
    for threshold in (0.25, 0.5):
        is_hit, is_near = match(overlap, target, threshold)
        assert np.all(is_near[is_hit]) and is_hit.sum() > 20
        for scan, (found, there) in enumerate(zip(detections, ground_truth, strict=True)):
            for label in range(3):
                rows = np.flatnonzero(found.labels == label)
                rows = rows[np.argsort(-found.scores[rows], kind="stable")]
                own = there.boxes[there.labels == label]
                expected = hits_of_scan(iou_matrix(found.boxes[rows], own, rotated=bool(yaw)), threshold)
                pooled = (detected.scans == scan) & (detected.labels == label)
                np.testing.assert_array_equal(scores[pooled], found.scores[rows])
                np.testing.assert_array_equal(is_hit[pooled], expected)


def test_boxes_that_do_not_touch_are_apart_however_float32_rounds():
    first, second = random_pairs(np.random.default_rng(3), 4000)
    apart = exact_overlaps(first, second)[1] == 0
    assert np.any(np.asarray(PAIRED_IOU[True](first, second))[apart] > 0), "float32 no longer rounds here"
    labels, scans = np.zeros(4000, np.int32), np.arange(4000)
    overlap, target = best_overlaps(Pool(first, labels, scans), Pool(second, labels, scans), rotated=True)
    assert np.all(overlap[apart] == 0) and np.all(target[apart] == -1)
    assert np.all(target[overlap > 0] == scans[overlap > 0]) and np.mean(overlap > 0) > 0.3


def test_a_precision_recall_curve_is_given_at_levels_of_recall():
    curve = precision_at_levels(*precision_recall(np.array([True, False, True, False]), 4))
    assert curve[0] == curve[25] == 1 and curve[26] == curve[50] == pytest.approx(2 / 3) and curve[51] == 0
    assert np.all(precision_at_levels(np.zeros(0), np.zeros(0)) == 0)
    # 3 of 10 reach the level 0.3.
    assert precision_at_levels(*precision_recall(np.ones(3, bool), 10))[30] == 1


def test_the_best_f1_keeps_equal_scores_together():
    scores, is_hit = np.array([0.9, 0.8, 0.5, 0.5, 0.2]), np.array([True, True, False, True, False])
    point = best_f1(scores, is_hit, 4)
    assert (point.score, point.precision, point.recall) == (0.5, 0.75, 0.75) and point.f1 == pytest.approx(0.75)
    assert best_f1(scores, is_hit, 0) is None
    nothing = best_f1(scores, np.zeros(5, bool), 2)
    assert np.isnan(nothing.score) and nothing.f1 == 0


def test_calibration_counts_every_detection_in_the_tenth_of_its_score():
    score, right, count = calibration(np.array([1.0, 0.95, 0.31, 0.0]), np.array([True, False, True, False]))
    assert count.tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert (right[9], right[3], right[0]) == (0.5, 1, 0) and score[9] == pytest.approx(0.975) and np.isnan(right[1])


def cube(x, side):
    return [x, 0, 0, side, side, side, 0]


def test_bins_ignore_what_belongs_to_others():
    # A small box found twice, a large box missed, and a false large box of low score.
    boxes = np.array([cube(0, 0.3), cube(5, 1.0)], np.float32)
    found = np.array([cube(0, 0.3), cube(0, 0.31), cube(9, 1.0)], np.float32)
    result = evaluate_detections(
        [Detections(found, np.array([0.9, 0.8, 0.7], np.float32), np.zeros(3, np.int32))],
        [GroundTruth(boxes, np.zeros(2, np.int32))],
        ["box"],
        (0.5,),
        rotated=False,
        origins=np.zeros((1, 2)),
    )
    assert SIZES.names == ("small", "medium", "large")
    assert result.by_size.num_ground_truth[:, 0].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(result.by_size.average_precision[0, :, 0], [1, np.nan, 0])
    np.testing.assert_array_equal(result.by_size.mean_average_precision[0], [1, np.nan, 0])
    assert result.by_distance is not None
    assert result.by_distance.num_ground_truth[:, 0].tolist() == [1, 0, 1]
    assert result.num_detections.tolist() == [3] and result.num_scans == 1
    assert "small (below 0.1 m3) 100.0, ground truth 1" in result.summary()
    assert "keep scores from 0.90 (precision 100.0, recall 50.0" in result.summary()


def test_one_bin_that_holds_all_boxes_scores_as_the_whole():
    detections, ground_truth = random_scans(20, yaw=0)
    shrunk = [GroundTruth(t.boxes * np.array([1, 1, 1, 0.1, 0.1, 0.1, 1], np.float32), t.labels) for t in ground_truth]
    found = [
        Detections(d.boxes * np.array([1, 1, 1, 0.1, 0.1, 0.1, 1], np.float32), d.scores, d.labels) for d in detections
    ]
    result = evaluate_detections(found, shrunk, ["a", "b", "c"], rotated=False)
    assert result.mean_average_precision[0] > 0.01
    np.testing.assert_allclose(result.by_size.average_precision[:, 0], result.average_precision)


def test_distances_are_from_the_sensor_or_the_middle_of_the_scan():
    points = np.array([[0, 0, 0], [4, 2, 1], [100, 3, 0]], np.float32)
    np.testing.assert_array_equal(scan_origin(points, distance_from("sunrgbd")), [0, 0])
    np.testing.assert_array_equal(scan_origin(points, distance_from("scannet")), [4, 2])
    np.testing.assert_array_equal(scan_origin(points[:0], "centre"), [0, 0])
    assert DISTANCES["sensor"].of(np.array([1.9, 2.0, 5.0])).tolist() == [0, 1, 2]


def test_area_is_that_of_the_curve():
    detections, ground_truth = random_scans(30, yaw=0, seed=1)
    result = evaluate_detections(detections, ground_truth, ["a", "b", "c"], rotated=False)
    # The mean over levels of recall differs from the exact area by less than a level.
    np.testing.assert_allclose(result.curves.mean(axis=2), result.average_precision, atol=0.012)
    assert average_precision(np.ones(1), np.ones(1)) == 1
