"""Test-time augmentation: boxes of a view return to their places, and the views of one box are fused."""

import dataclasses
import math

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.rotated_iou import rotated_iou
from h2a2_jax.errors import InputError
from h2a2_jax.inference.augmentation import TestTimeAugmented, View, fuse, views
from h2a2_jax.loader.augment import mirror, rescale, rotate
from h2a2_jax.scans.scan import Scan, points_in_box
from h2a2_jax.scans.specs import SCANNET, SUNRGBD

ALL = views(("flip_x", "flip_y", "scales", "turns"))


def scan(boxes: np.ndarray) -> Scan:
    points = np.random.default_rng(0).normal(0, 2, (500, 3)).astype(np.float32)
    return Scan("room", points, np.zeros_like(points), boxes.astype(np.float32), np.zeros(len(boxes), np.int32))


def random_boxes(*, has_yaw: bool) -> np.ndarray:
    rng = np.random.default_rng(1)
    yaw = rng.uniform(-math.pi, math.pi, (20, 1)) * has_yaw
    return np.concatenate([rng.normal(0, 2, (20, 3)), rng.uniform(0.2, 3, (20, 3)), yaw], 1).astype(np.float32)


def found(boxes: np.ndarray, scores: list[float], labels: list[int] | None = None) -> Detections:
    labels = [0] * len(boxes) if labels is None else labels
    return Detections(boxes.astype(np.float32), np.array(scores, np.float32), np.array(labels, np.int32))


def test_the_views_of_a_choice():
    assert views(()) == (View(),)
    assert {(v.flip_x, v.flip_y) for v in views(("flip_x", "flip_y"))} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert [v.scale for v in views(("scales",))] == [1.0, 0.95, 1.05]
    assert [v.quarter_turns for v in views(("turns",))] == [0, 1, 2, 3]
    assert len(ALL) == len({v.matrix.tobytes() for v in ALL}) == 8  # both mirrors are half a turn: seen once
    names = ("flip_x", "flip_y", "turns")
    assert len(views(names, SCANNET.augmentation)) == 6 and views(names, SUNRGBD.augmentation) == views(("flip_x",))
    with pytest.raises(InputError, match="no test-time augmentation 'flip_z': use flip_x, flip_y, scales, turns"):
        views(("flip_z",))


@pytest.mark.parametrize("has_yaw", [False, True])
@pytest.mark.parametrize("view", [*ALL, View(True, True, 3, 0.95), View(True, False, 1, 1.05)], ids=str)
def test_boxes_moved_with_the_scan_return(view: View, has_yaw: bool):
    # Moved by the augmentation of training, which is another implementation.
    there = random_boxes(has_yaw=has_yaw)
    moved = scan(there)
    for axis, flip in enumerate((view.flip_x, view.flip_y)):
        moved = mirror(moved, axis) if flip else moved
    moved = rescale(rotate(moved, view.quarter_turns * math.pi / 2, has_yaw=has_yaw), view.scale)
    np.testing.assert_allclose(view.transform_scan(scan(there)).points, moved.points, atol=2e-6)
    back = view.restore_boxes(moved.boxes, has_yaw=has_yaw)
    np.testing.assert_allclose(back[:, :6], there[:, :6], atol=2e-6)
    turn = (back[:, 6] - there[:, 6] + math.pi / 2) % math.pi - math.pi / 2  # a box turned by pi is the same
    np.testing.assert_allclose(turn, 0, atol=2e-6)
    assert np.all(np.abs(back[:, 6]) <= math.pi + 1e-6) and (has_yaw or not back[:, 6].any())


@pytest.mark.parametrize("view", [v for v in ALL if v.scale == 1], ids=str)
def test_mirrors_and_turns_round_nothing(view: View):
    there = random_boxes(has_yaw=False)
    boxes = there.copy()
    boxes[:, :3] = np.einsum("nj,ij->ni", boxes[:, :3], view.matrix.astype(np.float32))
    if view.quarter_turns % 2:
        boxes[:, [3, 4]] = boxes[:, [4, 3]]
    np.testing.assert_array_equal(view.restore_boxes(boxes, has_yaw=False), there)
    before, seen = scan(there), view.transform_scan(scan(there))
    inside = [points_in_box(before.points, box).sum() for box in there]
    assert inside == [points_in_box(seen.points, box).sum() for box in boxes] and sum(inside) > 100
    np.testing.assert_array_equal(seen.transform[:3, :3], view.matrix.astype(np.float32))


class Boxed:
    """Finds the box around all points, with a score that rises from view to view."""

    def __init__(self) -> None:
        self.passes = 0

    def predict(self, scans, dataset):
        self.passes += 1
        boxes = []
        for one in scans:
            low, high = one.points.min(axis=0), one.points.max(axis=0)
            boxes.append(np.array([[*(low + high) / 2, *(high - low), 0]]))
        return [found(box, [0.2 * self.passes]) for box in boxes]


def test_every_view_is_predicted_and_its_boxes_are_fused():
    inner = Boxed()
    outer = TestTimeAugmented(inner, ("flip_x", "scales"), (SCANNET, SUNRGBD))
    one, other = scan(random_boxes(has_yaw=False)), scan(random_boxes(has_yaw=False))
    other = dataclasses.replace(other, points=other.points + np.float32(3))
    results = outer.predict([one, other], "scannet")
    assert inner.passes == 4 and [len(result) for result in results] == [1, 1]
    for result, room in zip(results, (one, other), strict=True):
        low, high = room.points.min(axis=0), room.points.max(axis=0)
        np.testing.assert_allclose(result.boxes[0], [*(low + high) / 2, *(high - low), 0], atol=1e-5)
        assert result.scores[0] == pytest.approx((0.2 + 0.4 + 0.6 + 0.8) / 4)


A = np.array([[0, 0, 0, 2, 1, 1, 0.0]])
NEAR_A = np.array([[0.1, 0, 0, 2, 1, 1, 0.0]])
FAR = np.array([[9, 0, 0, 2, 1, 1, 0.0]])


def test_fused_boxes_are_means_weighted_by_score_and_one_that_a_view_misses_counts_less():
    result = fuse([found(A, [0.9]), found(np.concatenate([NEAR_A, FAR]), [0.3, 0.8])], rotated=False)
    np.testing.assert_allclose(result.boxes, np.concatenate([0.75 * A + 0.25 * NEAR_A, FAR]), atol=1e-6)
    np.testing.assert_allclose(result.scores, [0.6, 0.4])


def test_boxes_of_another_class_and_a_second_box_of_a_view_are_not_fused():
    result = fuse([found(np.concatenate([A, NEAR_A]), [0.9, 0.5]), found(NEAR_A, [0.3], [1])], rotated=False)
    np.testing.assert_allclose(result.boxes, np.concatenate([A, NEAR_A]), atol=1e-6)
    np.testing.assert_allclose(result.scores, [0.45, 0.15])
    assert result.labels.tolist() == [0, 1]


def test_views_without_boxes_fuse_to_none():
    assert len(fuse([found(A[:0], []), found(A[:0], [])], rotated=True)) == 0


def test_a_box_turned_by_a_right_angle_or_by_pi_is_fused_as_the_same():
    a = np.array([[0, 0, 0, 2, 1, 1, 0.3]])
    right = np.array([[0, 0, 0, 1, 2, 1, 0.3 - math.pi / 2]])
    half = np.array([[0, 0, 0, 2, 1, 1, 0.4 + math.pi]])
    result = fuse([found(a, [0.5]), found(right, [0.5]), found(half, [0.5])], rotated=True)
    assert len(result) == 1 and result.boxes[0, 6] == pytest.approx(0.3 + 0.1 / 3, abs=1e-6)
    assert rotated_iou(result.boxes, a.astype(np.float32))[0] > 0.95
