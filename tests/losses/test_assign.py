import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import losses
from tests.boxes.golden import FIXTURES, load_cases

CASES = load_cases(FIXTURES / "boxes_seed0.npz")
assign = jax.jit(losses.assign, static_argnames="top_k")


def brute_force(locations, scan, level, boxes, box_labels, label_to_level, top_k=6):
    """The rule of the paper, one location and one box at a time."""
    labels, chosen = np.full(len(locations), -1), np.full(len(locations), -1)
    nearest = np.full(len(locations), np.inf, np.float32)
    for s in range(len(boxes)):
        for j, (box, label) in enumerate(zip(boxes[s], box_labels[s], strict=True)):
            rows = np.flatnonzero((scan == s) & (level == label_to_level[label])) if label >= 0 else []
            offset = box[:3] - locations[rows] if len(rows) else np.zeros((0, 3), np.float32)
            squares = offset * offset
            distance = squares[:, 0] + squares[:, 1] + squares[:, 2]
            limit = np.sort(distance)[top_k] if len(distance) > top_k else np.inf
            for row, value in zip(rows, distance, strict=True):
                if value < limit and value < nearest[row]:
                    nearest[row], labels[row], chosen[row] = value, label, j
    return labels, chosen


def random_batch(rng, locations=900, scans=3, boxes=7, classes=5, grid=0.16):
    return {
        "locations": (rng.integers(-6, 6, (locations, 3)) * grid).astype(np.float32),
        "scan": rng.integers(0, scans + 1, locations).astype(np.int32),
        "level": rng.integers(0, 2, locations).astype(np.int32),
        # Centres on a grid too: distances tie.
        "boxes": np.concatenate([rng.integers(-6, 6, (scans, boxes, 3)) * grid, np.ones((scans, boxes, 4))], -1).astype(
            np.float32
        ),
        "box_labels": rng.integers(-1, classes, (scans, boxes)).astype(np.int32),
        "label_to_level": np.array([0, 1, 0, 1, 1], np.int32),
    }


def check_consistency(result, num_locations):
    """The targets seen from the boxes are those seen from the locations."""
    scan, box, slot = np.nonzero(result.positive)
    rows = np.asarray(result.candidates)[scan, box, slot]
    assert sorted(rows) == list(np.flatnonzero(result.labels >= 0)) == list(np.flatnonzero(result.box >= 0))
    np.testing.assert_array_equal(np.asarray(result.box)[rows], box)
    assert np.all((result.candidates >= 0) & (result.candidates <= num_locations))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("assign_")])
def test_equals_the_reference(case):
    data = CASES[case]
    sizes = [len(data["points_level0"]), len(data["points_level1"])]
    locations = np.concatenate([data["points_level0"], data["points_level1"]])
    boxes = np.zeros((1, len(data["gt_boxes"]), 7), np.float32)
    boxes[0, :, : data["gt_boxes"].shape[1]] = data["gt_boxes"]
    level = np.repeat(np.arange(2, dtype=np.int32), sizes)
    result = assign(
        locations, np.zeros_like(level), level, boxes, data["gt_labels"].astype(np.int32)[None], data["label2level"]
    )
    labels = np.where(data["cls_targets"] == data["num_classes"], -1, data["cls_targets"])
    np.testing.assert_array_equal(result.labels, labels)
    if len(data["gt_boxes"]):
        found = labels >= 0
        np.testing.assert_array_equal(data["gt_boxes"][np.asarray(result.box)[found]], data["bbox_targets"][found])
    check_consistency(result, len(locations))


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_rule_with_ties_padding_and_several_scans(seed):
    batch = random_batch(np.random.default_rng(seed))
    result = assign(**batch)
    labels, box = brute_force(**batch)
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_array_equal(result.box, box)
    check_consistency(result, len(labels))


def test_padding_and_order_of_locations_change_nothing():
    rng = np.random.default_rng(9)
    batch = random_batch(rng)
    expected = assign(**batch)
    order = rng.permutation(900)
    shuffled = assign(**{**batch, **{name: batch[name][order] for name in ("locations", "scan", "level")}})
    np.testing.assert_array_equal(shuffled.labels, np.asarray(expected.labels)[order])
    np.testing.assert_array_equal(shuffled.box, np.asarray(expected.box)[order])
    padded = {
        **batch,
        "locations": np.pad(batch["locations"], ((0, 400), (0, 0))),
        "scan": np.pad(batch["scan"], (0, 400), constant_values=3),
        "level": np.pad(batch["level"], (0, 400)),
        "boxes": np.pad(batch["boxes"], ((0, 0), (0, 5), (0, 0))),
        "box_labels": np.pad(batch["box_labels"], ((0, 0), (0, 5)), constant_values=-1),
    }
    longer = assign(**padded)
    np.testing.assert_array_equal(longer.labels, np.pad(expected.labels, (0, 400), constant_values=-1))
    np.testing.assert_array_equal(longer.box, np.pad(expected.box, (0, 400), constant_values=-1))
    np.testing.assert_array_equal(longer.positive, np.pad(expected.positive, ((0, 0), (0, 5), (0, 0))))


@pytest.mark.parametrize("count", [1, 5, 6, 7, 8])
def test_few_locations(count):
    locations = np.zeros((count, 3), np.float32)
    locations[:, 0] = np.arange(count)
    zeros = np.zeros(count, np.int32)
    box = np.array([[[0, 0, 0, 1, 1, 1, 0]]], np.float32)
    result = assign(locations, zeros, zeros, box, np.array([[0]], np.int32), np.array([0], np.int32))
    np.testing.assert_array_equal(result.labels, np.where(np.arange(count) < 6, 0, -1))
    elsewhere = assign(locations, zeros, zeros, box, np.array([[0]], np.int32), np.array([1], np.int32))
    assert np.all(np.asarray(elsewhere.labels) == -1)
    fewer = assign(locations, zeros, zeros, box, np.array([[0]], np.int32), np.array([0], np.int32), top_k=2)
    np.testing.assert_array_equal(fewer.labels, np.where(np.arange(count) < 2, 0, -1))


def test_a_tie_at_the_limit_takes_neither():
    locations = np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 3, 0]], np.float32)
    zeros = np.zeros(4, np.int32)
    box = np.array([[[0, 0, 0, 1, 1, 1, 0]]], np.float32)
    result = assign(locations, zeros, zeros, box, np.array([[0]], np.int32), np.array([0], np.int32), top_k=2)
    assert list(np.asarray(result.labels)) == [0, -1, -1, -1]


@pytest.mark.parametrize(("locations", "scans", "boxes"), [(0, 2, 3), (5, 2, 0), (5, 0, 0)])
def test_empty_input(locations, scans, boxes):
    result = assign(
        np.zeros((locations, 3), np.float32),
        np.zeros(locations, np.int32),
        np.zeros(locations, np.int32),
        np.zeros((scans, boxes, 7), np.float32),
        np.zeros((scans, boxes), np.int32),
        np.zeros(5, np.int32),
    )
    assert np.all(np.asarray(result.labels) == -1) and not np.any(result.positive)
    assert result.candidates.shape == (scans, boxes, 6)


def test_scan_without_boxes_and_box_without_locations():
    batch = random_batch(np.random.default_rng(3))
    batch["box_labels"][1] = -1
    batch["scan"][batch["scan"] == 2] = 3
    result = assign(**batch)
    assert np.all(np.asarray(result.labels)[batch["scan"] != 0] == -1)
    assert np.any(np.asarray(result.labels)[batch["scan"] == 0] >= 0)
    assert jnp.all(result.candidates[1] == 900) and jnp.all(result.candidates[2] == 900)
