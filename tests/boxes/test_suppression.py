import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import expit

from h2a2_jax import boxes as exact
from h2a2_jax.boxes import decode_boxes, detections_from_predictions
from h2a2_jax.boxes.nms import MAX_CANDIDATES
from h2a2_jax.scans.specs import SCANNET, SUNRGBD
from tests.boxes.golden import FIXTURES, load_cases
from tests.boxes.host_nms import kept_by_class, multiclass_nms

NMS = {rotated: jax.jit(partial(exact.multiclass_nms, rotated=rotated)) for rotated in (False, True)}
DETECTIONS = {rotated: jax.jit(partial(detections_from_predictions, rotated=rotated)) for rotated in (False, True)}


def assert_equal_to_host(boxes, scores, rotated, **thresholds):
    rows, labels, count = NMS[rotated](boxes, scores, **thresholds)
    expected_rows, expected_labels = kept_by_class(boxes, scores, rotated=rotated, **thresholds)
    assert int(count) == len(expected_rows)
    np.testing.assert_array_equal(rows[:count], expected_rows)
    np.testing.assert_array_equal(labels[:count], expected_labels)
    np.testing.assert_array_equal(rows[count:], len(boxes))
    np.testing.assert_array_equal(labels[count:], -1)
    return int(count)


def room(rng, count, classes, objects=8):
    """Boxes scattered about objects, and scores that favour an object's class."""
    things = rng.uniform([0, 0, 0, 0.3, 0.3, 0.3, -3], [5, 5, 1, 2, 2, 2, 3], (objects, 7))
    which = rng.integers(0, objects, count)
    boxes = things[which] + rng.normal(0, 0.1, (count, 7))
    boxes[:, 3:6] = np.abs(boxes[:, 3:6]) + 0.05
    scores = rng.uniform(0, 0.02, (count, classes))
    scores[np.arange(count), which % classes] = rng.uniform(0, 0.9, count)
    return boxes.astype(np.float32), scores.astype(np.float32)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("count", "classes"), [(200, 5), (200, 33), (1, 1)])
def test_index_for_index_as_on_the_host(rotated, count, classes):
    boxes, scores = room(np.random.default_rng(count + classes), count, classes)
    assert_equal_to_host(boxes, scores, rotated)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 1.0])
def test_thresholds_of_overlap(rotated, threshold):
    boxes, scores = room(np.random.default_rng(4), 200, 5)
    assert_equal_to_host(boxes, scores, rotated, iou_threshold=threshold, score_threshold=0.3)


@pytest.mark.parametrize("rotated", [False, True])
def test_equal_scores_go_by_row(rotated):
    boxes, scores = room(np.random.default_rng(5), 200, 5)
    assert_equal_to_host(boxes, np.round(scores, 1), rotated)


@pytest.mark.parametrize("rotated", [False, True])
def test_overlaps_equal_to_the_threshold_are_kept(rotated):
    # Squares of a grid and halves of them, so that IoU 1/2 and 1/4 are met exactly.
    rng = np.random.default_rng(6)
    boxes = np.zeros((200, 7), np.float32)
    boxes[:, :2] = rng.integers(0, 4, (200, 2)) * 0.5
    boxes[:, 3:6] = rng.choice([0.5, 1.0], (200, 3))
    scores = rng.uniform(0, 1, (200, 5)).astype(np.float32)
    for threshold in (0.25, 0.5):
        assert_equal_to_host(boxes, scores, rotated, iou_threshold=threshold)


@pytest.mark.parametrize("rotated", [False, True])
def test_chains_identical_boxes_and_no_candidates(rotated):
    rng = np.random.default_rng(7)
    same = np.tile(np.array([1, 2, 0, 1, 1, 1, 0.3], np.float32), (200, 1))
    scores = rng.uniform(0.1, 1, (200, 5)).astype(np.float32)
    assert assert_equal_to_host(same, scores, rotated) == 5
    chain = same.copy()
    chain[:, 0] = np.arange(200) * 0.2
    chain[:, 6] = 0
    descending = np.tile(np.linspace(1, 0.1, 200, dtype=np.float32)[:, None], (1, 5))
    assert assert_equal_to_host(chain, descending, rotated) == 5 * 100
    assert assert_equal_to_host(same, np.zeros_like(scores), rotated) == 0
    assert assert_equal_to_host(same, np.full_like(scores, np.nan), rotated) == 0
    assert assert_equal_to_host(chain, np.where(rng.uniform(size=scores.shape) < 0.3, np.nan, scores), rotated) > 0


def test_maps_over_the_scans_of_a_batch():
    scans = [room(np.random.default_rng(seed), 200, 5, objects=2 + 4 * seed) for seed in range(3)]
    together = jax.jit(jax.vmap(partial(exact.multiclass_nms, rotated=True)))(*map(np.stack, zip(*scans, strict=True)))
    for scan, (boxes, scores) in enumerate(scans):
        for found, expected in zip(together, NMS[True](boxes, scores), strict=True):
            np.testing.assert_array_equal(found[scan], expected)


def golden_files():
    folder = Path(os.environ.get("H2A2_GOLDEN_DIR") or FIXTURES)
    return sorted({FIXTURES / "boxes_seed0.npz", *folder.glob("boxes_seed*.npz")})


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("kind", ["scannet", "sunrgbd"])
def test_golden_boxes_are_kept_as_on_the_host(path, kind):
    cases = load_cases(path)
    rotated = kind == "sunrgbd"
    data = cases[f"nms_{kind}"]
    for threshold in (0.25, 0.5):
        assert_equal_to_host(
            data["boxes"], data["scores"][:, None], rotated, iou_threshold=threshold, score_threshold=-1.0
        )
    data = cases[f"multiclass_nms_{kind}"]
    boxes = np.pad(data["boxes"], ((0, 0), (0, 7 - data["boxes"].shape[1])))
    thresholds = {"score_threshold": float(data["score_thr"]), "iou_threshold": float(data["iou_thr"])}
    count = assert_equal_to_host(boxes, data["scores"], rotated, **thresholds)
    rows, labels, _ = NMS[rotated](boxes, data["scores"], **thresholds)
    assert count == len(data["out_scores"])
    np.testing.assert_array_equal(data["scores"][rows[:count], labels[:count]], data["out_scores"])
    np.testing.assert_array_equal(labels[:count], data["out_labels"])
    np.testing.assert_array_equal(boxes[rows[:count], : data["out_boxes"].shape[1]], data["out_boxes"])


def scan_outputs(rng, count, spec):
    """Locations, head outputs and logits of a made-up scan."""
    locations = rng.uniform(0, 4, (count, 3)).astype(np.float32)
    outputs = np.concatenate([rng.normal(0, 0.2, (count, 3)), rng.uniform(0.2, 1, (count, 3))], axis=1)
    if spec.has_yaw:
        outputs = np.concatenate([outputs, rng.normal(0, 1, (count, 2))], axis=1)
    # Quarters, so that scores tie.
    logits = np.round(rng.normal(-5, 2, (count, spec.num_classes)) * 4) / 4
    return locations, outputs.astype(np.float32), logits.astype(np.float32)


def detections_on_host(locations, outputs, logits, spec):
    """The best locations, decoded, suppressed class by class."""
    scores = expit(logits)
    best = np.arange(len(scores))
    if len(scores) > MAX_CANDIDATES:
        best = np.argsort(-scores.max(1), kind="stable")[:MAX_CANDIDATES]
    decoded = np.asarray(jax.jit(decode_boxes)(locations[best], outputs[best]))
    return multiclass_nms(decoded, scores[best], rotated=spec.has_yaw)


def assert_equal_to_host_detections(locations, outputs, logits, spec, padding=37):
    expected = detections_on_host(locations, outputs, logits, spec)
    valid = np.random.default_rng(0).permutation(len(locations) + padding) < len(locations)
    padded = [np.full((len(valid), table.shape[1]), np.nan, np.float32) for table in (locations, outputs, logits)]
    for table, values in zip(padded, (locations, outputs, logits), strict=True):
        table[valid] = values
    boxes, scores, labels, count = DETECTIONS[spec.has_yaw](padded[0], valid, padded[1], padded[2])
    assert int(count) == len(expected)
    np.testing.assert_array_equal(labels[:count], expected.labels)
    np.testing.assert_allclose(boxes[:count], expected.boxes, atol=1e-6)
    np.testing.assert_allclose(scores[:count], expected.scores, rtol=1e-6)
    assert not np.any(boxes[count:]) and not np.any(scores[count:])
    np.testing.assert_array_equal(labels[count:], -1)
    return int(count)


@pytest.mark.parametrize("spec", [SCANNET, SUNRGBD], ids=lambda spec: spec.name)
def test_detections_of_a_scan_are_those_of_the_host(spec):
    rng = np.random.default_rng(8)
    scan = scan_outputs(rng, MAX_CANDIDATES + 500, spec)
    assert assert_equal_to_host_detections(*scan, spec) > 100
    few = [table[:300] for table in scan]
    assert assert_equal_to_host_detections(*few, spec, padding=MAX_CANDIDATES + 237) > 100
    few[2] = np.full_like(few[2], -20)
    assert assert_equal_to_host_detections(*few, spec, padding=MAX_CANDIDATES + 237) == 0
    damaged = scan[2].copy()
    damaged[rng.uniform(size=damaged.shape) < 0.1] = np.nan
    assert assert_equal_to_host_detections(scan[0], scan[1], damaged, spec) > 100
    assert assert_equal_to_host_detections(*(np.repeat(table[:1], len(table), axis=0) for table in scan), spec) <= 18


def test_no_location_at_all():
    scan = [table[:0] for table in scan_outputs(np.random.default_rng(9), 5, SUNRGBD)]
    assert assert_equal_to_host_detections(*scan, SUNRGBD, padding=MAX_CANDIDATES + 537) == 0
