import numpy as np
import pytest

from h2a2_jax import boxes as exact
from h2a2_jax.boxes import nms, rotated_bev_iou
from tests.boxes.golden import FIXTURES, load_cases
from tests.boxes.host_nms import bev_nms, multiclass_nms, overlap_matrix
from tests.boxes.polygons import random_pairs
from tests.boxes.tolerant_iou import PUBLISHED_TOLERANCE, tolerant_bev_iou

CASES = load_cases(FIXTURES / "boxes_seed0.npz")
KINDS = {"nms_scannet": 0.0, "nms_sunrgbd": PUBLISHED_TOLERANCE}


@pytest.mark.parametrize(("case", "tolerance"), KINDS.items())
def test_overlaps_and_kept_boxes_equal_the_reference(case, tolerance):
    data, rotated = CASES[case], tolerance > 0
    overlaps = overlap_matrix(data["boxes"], rotated=rotated, corner_tolerance=tolerance)
    np.testing.assert_allclose(overlaps, data["bev_iou_matrix"], atol=1e-5)
    for threshold, name in ((0.25, "keep_0p25"), (0.5, "keep_0p5")):
        kept = bev_nms(data["boxes"], data["scores"], threshold, rotated=rotated, corner_tolerance=tolerance)
        np.testing.assert_array_equal(kept, data[name])


def test_exact_overlaps_are_within_the_tolerance_of_the_reference():
    data = CASES["nms_sunrgbd"]
    np.testing.assert_allclose(overlap_matrix(data["boxes"], rotated=True), data["bev_iou_matrix"], atol=2e-2)


@pytest.mark.parametrize(("kind", "tolerance"), [("scannet", 0.0), ("sunrgbd", 0.0), ("sunrgbd", PUBLISHED_TOLERANCE)])
def test_multiclass_equals_the_reference(kind, tolerance):
    data = CASES[f"multiclass_nms_{kind}"]
    columns = data["boxes"].shape[1]
    boxes = np.zeros((len(data["boxes"]), 7), np.float32)
    boxes[:, :columns] = data["boxes"]
    found = multiclass_nms(
        boxes,
        data["scores"],
        score_threshold=float(data["score_thr"]),
        iou_threshold=float(data["iou_thr"]),
        rotated=columns == 7,
        corner_tolerance=tolerance,
    )
    np.testing.assert_array_equal(found.boxes[:, :columns], data["out_boxes"])
    np.testing.assert_array_equal(found.scores, data["out_scores"])
    np.testing.assert_array_equal(found.labels, data["out_labels"])


def test_tolerance_zero_is_exact_and_tolerance_only_adds():
    first, second = random_pairs(np.random.default_rng(3), 1000)
    exact = np.asarray(rotated_bev_iou(first, second))
    np.testing.assert_allclose(tolerant_bev_iou(first, second, 0.0), exact, atol=1e-5)
    # Ordered by angle, the added corners can also dent the polygon a little.
    assert np.max(np.abs(tolerant_bev_iou(first, second) - exact)) < 0.25
    assert np.mean(tolerant_bev_iou(first, second) - exact) > 0


@pytest.mark.parametrize("count", [0, 1, 64, 65])
def test_any_number_of_boxes(count):
    rng = np.random.default_rng(count)
    boxes = rng.uniform(0.5, 1, (count, 7)).astype(np.float32)
    scores = rng.uniform(0, 1, count).astype(np.float32)
    kept = bev_nms(boxes, scores, 0.5, rotated=True)
    overlaps = overlap_matrix(boxes, rotated=True)
    assert overlaps.shape == (count, count)
    assert np.all(np.diff(scores[kept]) <= 0)
    # Kept boxes do not overlap, dropped ones overlap a better one that is kept.
    assert np.sum(overlaps[np.ix_(kept, kept)] > 0.5) == len(kept)
    for row in set(range(count)) - set(kept):
        assert np.any((overlaps[row, kept] > 0.5) & (scores[kept] >= scores[row]))
    assert len(multiclass_nms(boxes, scores[:, None], rotated=True)) == len(kept)


def test_nothing_scores():
    found = multiclass_nms(np.ones((3, 7), np.float32), np.zeros((3, 2), np.float32), rotated=False)
    assert len(found) == 0 and found.boxes.shape == (0, 7)


@pytest.mark.parametrize("rotated", [False, True])
def test_volumes_tell_boxes_apart_that_stand_above_one_another(rotated):
    boxes = np.array([[0, 0, 0, 1, 1, 1, 0], [0, 0, 3, 1, 1, 1, 0], [0, 0, 0.1, 1, 1, 1, 0]], np.float32)
    scores = np.array([[0.9], [0.8], [0.7]], np.float32)
    for iou, kept in (("bev", [0]), ("3d", [0, 1])):
        rows, _, count = exact.multiclass_nms(boxes, scores, rotated=rotated, iou=iou)
        assert rows[:count].tolist() == kept


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("together", [1, 40, 10_000])
def test_one_pass_over_all_classes_is_the_greedy_one(rotated, together, monkeypatch):
    rng = np.random.default_rng(2)
    boxes = np.concatenate(
        [rng.uniform(0, [8, 8, 1], (200, 3)), rng.uniform(0.5, 2, (200, 3)), rng.uniform(-3, 3, (200, 1))], 1
    )
    boxes = boxes.astype(np.float32)
    found = exact.Detections(
        boxes, rng.random(200).astype(np.float32).round(1), rng.integers(0, 3, 200).astype(np.int32)
    )
    monkeypatch.setattr(nms, "_TOGETHER", together)
    for threshold in (0.1, 0.5):
        overlaps, kept = overlap_matrix(boxes, rotated=rotated), []
        for row in np.argsort(-found.scores, kind="stable"):
            if not (overlaps[row, kept] > threshold).any():
                kept.append(row)
        rows = exact.suppress_across_classes(found, threshold, rotated=rotated)
        np.testing.assert_array_equal(rows, np.sort(kept))
        assert 20 < len(rows) < 200
    # On a map, where a float32 has steps of half a metre.
    away = exact.Detections(boxes + np.float64([5e6, 5e6, 0, 0, 0, 0, 0]), found.scores, found.labels)
    np.testing.assert_array_equal(exact.suppress_across_classes(away, 0.5, rotated=rotated), rows)
    assert (
        len(
            exact.suppress_across_classes(
                exact.Detections(boxes[:0], found.scores[:0], found.labels[:0]), rotated=rotated
            )
        )
        == 0
    )
