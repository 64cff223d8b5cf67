import dataclasses

import numpy as np
import pytest

from h2a2_jax.loader.augment import augment, mirror, rescale, rotate, sample_points, translate
from h2a2_jax.scans.scan import Scan, points_in_box
from h2a2_jax.scans.specs import SCANNET, SPECS, SUNRGBD, Augmentation, CountSampling, FractionSampling


def make_scan(has_yaw, seed=0, count=4000):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        [rng.uniform(-1.5, 1.5, (5, 3)), rng.uniform(0.5, 2, (5, 3)), rng.uniform(-3, 3, (5, 1)) * has_yaw], axis=1
    )
    return Scan(
        "room",
        rng.uniform(-2, 2, (count, 3)).astype(np.float32),
        rng.random((count, 3)).astype(np.float32),
        boxes.astype(np.float32),
        np.arange(5, dtype=np.int32),
    )


def with_box(*box):
    return dataclasses.replace(make_scan(True), boxes=np.array([box], np.float32), labels=np.zeros(1, np.int32))


def inside(scan, slack=0.0):
    grown = scan.boxes.copy()
    grown[:, 3:6] += slack
    return np.stack([points_in_box(scan.points, box) for box in grown])


MOTIONS = {
    "mirror x": lambda scan, has_yaw: mirror(scan, 0),
    "mirror y": lambda scan, has_yaw: mirror(scan, 1),
    "rotate": lambda scan, has_yaw: rotate(scan, 0.7, has_yaw=has_yaw),
    "scale": lambda scan, has_yaw: rescale(scan, 1.3),
    "translate": lambda scan, has_yaw: translate(scan, np.array([1.0, -2.0, 0.5])),
    "all": lambda scan, has_yaw: augment(scan, SUNRGBD.augmentation, np.random.default_rng(3), has_yaw=has_yaw),
}


@pytest.mark.parametrize("motion", MOTIONS.values(), ids=MOTIONS)
def test_a_box_with_yaw_keeps_exactly_its_points(motion):
    scan = make_scan(has_yaw=True)
    moved = motion(scan, True)
    before, after = inside(scan), inside(moved)
    assert before.sum() > 500
    assert (before != after).sum() <= 2  # points within rounding of a face
    np.testing.assert_array_equal(moved.labels, scan.labels)


@pytest.mark.parametrize("motion", MOTIONS.values(), ids=MOTIONS)
def test_an_axis_aligned_box_keeps_at_least_its_points(motion):
    scan = make_scan(has_yaw=False)
    moved = motion(scan, False)
    assert (moved.boxes[:, 6] == 0).all()
    assert inside(moved, slack=1e-5)[inside(scan)].all()


def test_a_rotated_axis_aligned_box_is_the_tightest_that_encloses():
    scan = with_box(1, 0, 0, 2, 1, 1, 0)
    box = rotate(scan, np.pi / 6, has_yaw=False).boxes[0]
    half = np.array([2 * np.cos(np.pi / 6) + np.sin(np.pi / 6), 2 * np.sin(np.pi / 6) + np.cos(np.pi / 6)])
    np.testing.assert_allclose(box, [np.cos(np.pi / 6), np.sin(np.pi / 6), 0, *half, 1, 0], atol=1e-6)


def test_yaw_conventions():
    scan = with_box(1, 2, 3, 4, 5, 6, 0.3)
    np.testing.assert_allclose(mirror(scan, 0).boxes[0], [-1, 2, 3, 4, 5, 6, np.pi - 0.3], rtol=1e-6)
    np.testing.assert_allclose(mirror(scan, 1).boxes[0], [1, -2, 3, 4, 5, 6, -0.3], rtol=1e-6)
    np.testing.assert_allclose(rotate(scan, 0.2, has_yaw=True).boxes[0, 6], 0.5, rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_transform_includes_the_motion(spec):
    start = make_scan(spec.has_yaw)
    scan = dataclasses.replace(start, transform=np.diag([2, 2, 2, 1]).astype(np.float32), points=start.points * 2)
    moved = augment(scan, spec.augmentation, np.random.default_rng(1), has_yaw=spec.has_yaw)
    np.testing.assert_allclose(
        start.points @ moved.transform[:3, :3].T + moved.transform[:3, 3], moved.points, atol=1e-5
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_motion_is_mirror_rotation_scale_and_shift_in_this_order(spec):
    scan, recipe, flips = make_scan(spec.has_yaw), spec.augmentation, set()
    for seed in range(24):
        moved = augment(scan, recipe, np.random.default_rng(seed), has_yaw=spec.has_yaw)
        rng = np.random.default_rng(seed)
        flip_x, flip_y = rng.random(2) < (recipe.flip_x, recipe.flip_y)
        angle, factor = rng.uniform(-recipe.rotation, recipe.rotation), rng.uniform(*recipe.scale)
        expected = mirror(scan, 0) if flip_x else scan
        expected = rotate(mirror(expected, 1) if flip_y else expected, angle, has_yaw=spec.has_yaw)
        expected = translate(rescale(expected, factor), rng.normal(0.0, recipe.translation_std, 3))
        np.testing.assert_allclose(moved.points, expected.points, atol=1e-6)
        np.testing.assert_array_equal(moved.boxes, expected.boxes)
        np.testing.assert_array_equal(moved.colors, scan.colors)
        flips.add((bool(flip_x), bool(flip_y)))
    assert len(flips) == (2 if recipe.flip_y == 0 else 4)


def test_the_same_generator_state_gives_the_same_scan():
    scan = make_scan(True)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return augment(sample_points(scan, FractionSampling(0.33, 1.0), rng), SUNRGBD.augmentation, rng, has_yaw=True)

    for name in ("points", "colors", "boxes", "transform"):
        np.testing.assert_array_equal(getattr(draw(5), name), getattr(draw(5), name))
    assert draw(5).points.shape != draw(6).points.shape


def test_statistics_of_many_draws():
    scan = make_scan(True, count=1)
    rng = np.random.default_rng(0)
    recipe = Augmentation(flip_x=0.25, flip_y=0.0, rotation=0.5, scale=(0.8, 1.2), translation_std=0.1)
    matrices = np.stack([augment(scan, recipe, rng, has_yaw=True).transform for _ in range(2000)])
    scales = matrices[:, 2, 2]
    assert 0.8 <= scales.min() < 0.81 and 1.19 < scales.max() <= 1.2
    flipped = np.linalg.det(matrices[:, :2, :2]) < 0
    assert abs(flipped.mean() - 0.25) < 0.04
    angles = np.arctan2(matrices[~flipped, 1, 0], matrices[~flipped, 0, 0])
    assert -0.5 <= angles.min() < -0.48 and 0.48 < angles.max() <= 0.5 and abs(angles.mean()) < 0.03
    np.testing.assert_allclose(matrices[:, :3, 3].std(axis=0), 0.1, rtol=0.08)
    np.testing.assert_allclose(np.corrcoef(matrices[:, :3, 3].T), np.eye(3), atol=0.08)


def test_no_augmentation_leaves_the_scan():
    scan = make_scan(True)
    still = Augmentation(flip_x=0.0, flip_y=0.0, rotation=0.0, scale=(1.0, 1.0), translation_std=0.0)
    moved = augment(scan, still, np.random.default_rng(0), has_yaw=True)
    np.testing.assert_array_equal(moved.points, scan.points)
    np.testing.assert_array_equal(moved.boxes, scan.boxes)


def test_fraction_sampling():
    scan, rng = make_scan(True), np.random.default_rng(0)
    sizes = [len(sample_points(scan, SCANNET.train_sampling, rng).points) for _ in range(200)]
    assert 0.33 * 4000 - 1 <= min(sizes) < 0.36 * 4000 and 0.97 * 4000 < max(sizes) < 4000
    sampled = sample_points(scan, FractionSampling(0.5, 0.5), rng)
    assert len(np.unique(sampled.points, axis=0)) == len(sampled.points) == 2000
    assert len(sample_points(make_scan(True, count=1), FractionSampling(0.33, 1.0), rng).points) == 1


@pytest.mark.parametrize(("count", "distinct"), [(1000, 1000), (4000, 4000)])
def test_count_sampling_repeats_no_point_if_it_need_not(count, distinct):
    sampled = sample_points(make_scan(True), CountSampling(count), np.random.default_rng(0))
    assert len(sampled.points) == count and len(np.unique(sampled.points, axis=0)) == distinct


def test_count_sampling_of_a_small_scan_repeats_points():
    sampled = sample_points(make_scan(True, count=50), CountSampling(1000), np.random.default_rng(0))
    assert len(sampled.points) == 1000 and len(np.unique(sampled.points, axis=0)) == 50


def test_colours_go_with_their_points():
    scan = make_scan(True)
    scan = dataclasses.replace(scan, colors=scan.points / 4 + 0.5)
    sampled = sample_points(scan, CountSampling(500), np.random.default_rng(0))
    np.testing.assert_array_equal(sampled.colors, sampled.points / 4 + 0.5)


def test_no_sampling_keeps_all_points_in_order():
    scan = make_scan(True)
    assert sample_points(scan, SCANNET.test_sampling, np.random.default_rng(0)) is scan
