import json

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.matching import GroundTruth, match
from h2a2_jax.evaluation import average_precision, evaluate_detections, precision_recall
from tests.boxes.golden import FIXTURES, load_cases
from tests.boxes.polygons import iou_3d
from tests.evaluation.overlaps import iou_matrix

CASES = {case: data for case, data in load_cases(FIXTURES / "boxes_seed0.npz").items() if case.startswith("eval_")}


def scans_of(data):
    detections, ground_truth = [], []
    for scan in range(int(data["num_scenes"])):
        rows, there = data["det_scene"] == scan, data["gt_scene"] == scan
        detections.append(Detections(data["det_boxes"][rows], data["det_scores"][rows], data["det_labels"][rows]))
        ground_truth.append(GroundTruth(data["gt_boxes"][there], data["gt_labels"][there]))
    return detections, ground_truth


def evaluate(detections, ground_truth, num_classes=5, **options):
    names = [f"class {label}" for label in range(num_classes)]
    return evaluate_detections(detections, ground_truth, names, **{"rotated": True, **options})


def cubes(*centers):
    return np.array([[x, 0, 0, 1, 1, 1, 0] for x in centers], np.float32).reshape(-1, 7)


def found(centers, scores, labels=None):
    labels = np.zeros(len(centers)) if labels is None else labels
    return Detections(cubes(*centers), np.array(scores, np.float32), np.array(labels, np.int32))


def there(centers, labels=None):
    labels = np.zeros(len(centers)) if labels is None else labels
    return GroundTruth(cubes(*centers), np.array(labels, np.int32))


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_reference(case):
    data = CASES[case]
    result = evaluate(*scans_of(data), num_classes=int(data["num_classes"]), rotated="sunrgbd" in case)
    np.testing.assert_allclose(result.average_precision, data["AP"], atol=1e-6)
    np.testing.assert_allclose(result.average_recall, data["recall"], atol=1e-6)
    np.testing.assert_allclose(result.mean_average_precision, data["mAP"], atol=1e-6)
    np.testing.assert_allclose(result.mean_average_recall, data["mAR"], atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_overlaps_equal_the_reference_and_the_polygons(case):
    detections, ground_truth = scans_of(CASES[case])
    detected, true = detections[2].boxes, ground_truth[2].boxes
    overlaps = iou_matrix(detected, true, rotated="sunrgbd" in case)
    np.testing.assert_allclose(overlaps, CASES[case]["iou_scene2"], atol=1e-5)
    np.testing.assert_allclose(overlaps, [[iou_3d(a, b) for b in true] for a in detected], atol=1e-6)


def test_order_of_scans_and_detections_changes_nothing():
    detections, ground_truth = scans_of(CASES["eval_sunrgbd_0"])
    rng = np.random.default_rng(0)
    expected = evaluate(detections, ground_truth)
    orders = [rng.permutation(len(scan)) for scan in detections]
    shuffled = [
        Detections(scan.boxes[order], scan.scores[order], scan.labels[order])
        for scan, order in zip(detections, orders, strict=True)
    ]
    result = evaluate(shuffled[::-1], ground_truth[::-1])
    np.testing.assert_allclose(result.average_precision, expected.average_precision, atol=1e-12)


def hits(overlaps, threshold):
    """Hits among detections of one scan and class, from their overlaps [n, m] with its boxes."""
    overlaps = np.asarray(overlaps)
    return list(match(overlaps.max(axis=1), overlaps.argmax(axis=1), threshold)[0])


def test_duplicates_are_false_positives_and_a_second_best_box_is_not_given():
    overlaps = [[0.9, 0.6], [0.8, 0.7], [0.1, 0.7]]
    assert hits(overlaps, 0.5) == [True, False, True]
    assert hits(overlaps, 0.7) == [True, False, False]


def test_without_boxes_or_detections_there_is_no_hit():
    assert evaluate([found([0, 1], [0.9, 0.8])], [there([])]).num_detections[0] == 2
    assert list(match(np.zeros(2, np.float32), np.full(2, -1), 0.5)[0]) == [False, False]
    assert match(np.zeros(0, np.float32), np.zeros(0, np.int64), 0.5)[0].shape == (0,)


def test_overlap_must_exceed_the_threshold():
    assert hits([[0.25]], 0.25) == [False]
    assert hits([[0.2501]], 0.25) == [True]


def test_area_under_the_envelope():
    precision, recall = precision_recall(np.array([True, False, True, False]), 4)
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3, 1 / 2])
    np.testing.assert_allclose(recall, [0.25, 0.25, 0.5, 0.5])
    assert average_precision(precision, recall) == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert average_precision(np.zeros(0), np.zeros(0)) == 0
    with pytest.raises(ValueError, match="at least one"):
        precision_recall(np.zeros(1, bool), 0)


def test_a_class_never_found_scores_zero_and_one_never_there_is_left_out():
    result = evaluate([found([0, 5], [0.9, 0.8], [0, 2])], [there([0, 3], [0, 1])], num_classes=3)
    np.testing.assert_array_equal(result.average_precision, [[1, 0, np.nan]] * 2)
    np.testing.assert_array_equal(result.average_recall, [[1, 0, np.nan]] * 2)
    np.testing.assert_array_equal(result.mean_average_precision, [0.5, 0.5])
    assert result.classes_left_out == ("class 2",)


def test_a_class_counts_only_in_its_own_scan():
    result = evaluate([found([0], [0.9]), found([], [])], [there([]), there([0])], num_classes=1)
    np.testing.assert_array_equal(result.average_precision, [[0], [0]])


def test_nothing_at_all():
    result = evaluate([found([], [])], [there([])], num_classes=2)
    assert np.all(np.isnan(result.mean_average_precision))
    assert result.to_dict()["thresholds"][0]["mAP"] is None
    assert "class 0, class 1" in result.table()


def test_table_and_json_hold_the_numbers():
    result = evaluate([found([0, 5], [0.9, 0.8])], [there([0, 3], [0, 1])], num_classes=3)
    lines = result.table().splitlines()
    assert lines[0].split() == ["class", "boxes", "AP@0.25", "AR@0.25", "AP@0.5", "AR@0.5"]
    assert lines[1].split() == ["class", "0", "1", "100.00", "100.00", "100.00", "100.00"]
    assert lines[3].split() == ["class", "2", "0", "-", "-", "-", "-"]
    assert lines[4].split() == ["mean", "2", "50.00", "50.00", "50.00", "50.00"]
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    level = plain["thresholds"][1]
    assert {key: level[key] for key in ("iou", "mAP", "mAR", "AP", "AR")} == {
        "iou": 0.5,
        "mAP": 0.5,
        "mAR": 0.5,
        "AP": {"class 0": 1.0, "class 1": 0.0, "class 2": None},
        "AR": {"class 0": 1.0, "class 1": 0.0, "class 2": None},
    }
    assert level["curves"] == {"class 0": [1.0] * 101, "class 1": [0.0] * 101, "class 2": None}
    assert level["best_f1"]["class 2"] is None and level["best_f1"]["class 0"]["f1"] == 1
    assert level["best_f1_of_all"] == {"score": pytest.approx(0.9), "precision": 1.0, "recall": 0.5, "f1": 2 / 3}
    assert plain["by_size"]["bins"][2]["thresholds"][1]["mAP"] == 0.5 and plain["by_distance"] is None
    assert plain["num_detections"] == {"class 0": 2, "class 1": 0, "class 2": 0}
    assert plain["num_ground_truth"] == {"class 0": 1, "class 1": 1, "class 2": 0}
    assert plain["classes_left_out"] == ["class 2"]


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="1 scans have detections and 2 ground truth"):
        evaluate([found([], [])], [there([])] * 2)
    with pytest.raises(ValueError, match="Scan 1 has labels from 5 to 5; expected 0 to 4"):
        evaluate([found([], []), found([0], [1], [5])], [there([])] * 2)
