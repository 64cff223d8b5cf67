from functools import partial

import jax
import numpy as np
import pytest
from scipy.special import expit

from h2a2_jax import boxes as library
from h2a2_jax.boxes import decode_faces, detections_from_centerness, tolerant_bev_iou
from tests.boxes.host_nms import kept_by_class, multiclass_nms
from tests.boxes.polygons import random_pairs, special_pairs
from tests.boxes.test_suppression import room
from tests.boxes.tolerant_iou import PUBLISHED_TOLERANCE
from tests.boxes.tolerant_iou import tolerant_bev_iou as on_host

TOLERANT_NMS = jax.jit(partial(library.multiclass_nms, rotated=True, corner_tolerance=PUBLISHED_TOLERANCE))
OVERLAP = jax.jit(tolerant_bev_iou, static_argnums=2)
LEVELS, MOST = 4, 60


@pytest.mark.parametrize("tolerance", [0.0, PUBLISHED_TOLERANCE])
def test_overlap_equals_that_on_the_host(tolerance):
    first, second = random_pairs(np.random.default_rng(0), 3000)
    np.testing.assert_allclose(OVERLAP(first, second, tolerance), on_host(first, second, tolerance), atol=2e-5)


def test_nearby_corners_count_even_of_coinciding_and_vanishing_boxes():
    square = np.array([0, 0, 0, 1, 1, 1, 0], np.float32)
    beside = square + np.array([1.005, 0, 0, 0, 0, 0, 0], np.float32)
    first, second = (
        np.concatenate([boxes, [extra]]) for boxes, extra in zip(special_pairs(), (square, beside), strict=True)
    )
    found = OVERLAP(first, second, PUBLISHED_TOLERANCE)
    np.testing.assert_allclose(found, on_host(first, second), atol=1e-4)
    np.testing.assert_allclose(found[-1], 0.005 / (2 - 0.005), rtol=1e-3)


@pytest.mark.parametrize("threshold", [0.15, 0.5])
@pytest.mark.parametrize("size", [0.06, 0.03])
def test_suppression_with_nearby_corners_is_that_of_the_host(threshold, size):
    # Boxes of a few centimetres, of which the polygons decide thousands of pairs, in several rounds.
    boxes, scores = room(np.random.default_rng(1), 200, 5)
    boxes[:, :6] *= size
    rows, labels, count = TOLERANT_NMS(boxes, scores, iou_threshold=threshold)
    expected, expected_labels = kept_by_class(
        boxes, scores, rotated=True, iou_threshold=threshold, corner_tolerance=PUBLISHED_TOLERANCE
    )
    exact, _ = kept_by_class(boxes, scores, rotated=True, iou_threshold=threshold)
    np.testing.assert_array_equal(rows[:count], expected)
    np.testing.assert_array_equal(labels[:count], expected_labels)
    assert len(exact) > len(expected) > 5


def test_no_box_at_all():
    rows, _, count = TOLERANT_NMS(np.zeros((0, 7), np.float32), np.zeros((0, 5), np.float32))
    assert len(rows) == count == 0


def scan_outputs(rng, counts, channels):
    """Locations, level, head outputs, logits and centerness of a made-up scan."""
    n = sum(counts)
    outputs = rng.uniform(0.1, 0.6, (n, channels))
    outputs[:, 6:] = rng.normal(size=(n, channels - 6))
    # Quarters, so that scores tie.
    logits, center = (np.round(rng.normal(-2, 2, shape) * 4) / 4 for shape in ((n, 5), n))
    tables = (rng.uniform(0, 4, (n, 3)), outputs, logits, center)
    locations, outputs, logits, center = (table.astype(np.float32) for table in tables)
    return locations, np.repeat(np.arange(LEVELS, dtype=np.int32), counts), outputs, logits, center


def on_the_host(locations, level, outputs, logits, center):
    scores = expit(logits) * expit(center)[:, None]
    best = []
    for number in range(LEVELS):
        rows = np.flatnonzero(level == number)
        best.append(rows[np.argsort(-scores[rows].max(1), kind="stable")[:MOST]] if len(rows) > MOST else rows)
    best, rotated = np.concatenate(best), outputs.shape[1] == 8
    decoded = np.asarray(decode_faces(locations[best], outputs[best]))
    return multiclass_nms(decoded, scores[best], rotated=rotated, corner_tolerance=PUBLISHED_TOLERANCE * rotated)


@pytest.mark.parametrize("channels", [6, 8])
def test_detections_of_a_scan_are_those_of_the_host(channels):
    rng = np.random.default_rng(2)
    detect = jax.jit(partial(detections_from_centerness, rotated=channels == 8, max_candidates=MOST))
    for counts in ((150, 80, 60, 10), (0, 0, 300, 0), (0, 0, 0, 0)):
        scan = scan_outputs(rng, counts, channels)
        # Rows of other scans, and of padding, stand between those of the scan.
        valid = rng.permutation(330) < sum(counts)
        tables = [
            np.full((330, *table.shape[1:]), 0 if table.dtype == np.int32 else np.nan, table.dtype) for table in scan
        ]
        for table, values in zip(tables, scan, strict=True):
            table[valid] = values
        locations, level, outputs, logits, center = tables
        boxes, scores, labels, count = detect(locations, valid, level, outputs, logits, center)
        expected = on_the_host(*scan)
        assert int(count) == len(expected) and (len(expected) > 100 or sum(counts) == 0)
        np.testing.assert_array_equal(labels[:count], expected.labels)
        np.testing.assert_allclose(boxes[:count], expected.boxes, atol=1e-6)
        np.testing.assert_allclose(scores[:count], expected.scores, rtol=1e-6)
        assert not np.any(boxes[count:]) and not np.any(scores[count:]) and np.all(labels[count:] == -1)
