"""The reach of scans: points within it survive augmentation and voxelisation, others are refused or counted."""

import dataclasses

import numpy as np
import pytest

from h2a2_jax.loader.augment import augment
from h2a2_jax.loader.batching import collate
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.scan import MAX_REACH, Scan, ScanError, usable_boxes, within_reach
from h2a2_jax.scans.specs import SPECS


def test_points_within_reach_can_be_augmented_and_voxelised():
    angle = np.linspace(0, 2 * np.pi, 64)
    rim = 0.999 * MAX_REACH * np.stack([np.cos(angle), np.sin(angle), np.sign(np.sin(3 * angle))], axis=1)
    points = rim.astype(np.float32)
    assert within_reach("rim", points).all()
    nothing = np.zeros((0, 7), np.float32)
    scan = Scan("rim", points, np.full_like(points, 0.5), nothing, np.zeros(0, np.int32))
    for spec in SPECS:
        largest = dataclasses.replace(spec.augmentation, scale=(spec.augmentation.scale[1],) * 2)
        for seed in range(5):
            moved = augment(scan, largest, np.random.default_rng(seed), has_yaw=spec.has_yaw)
            assert len(collate([moved], DetectorConfig()).features) == len(
                np.unique(np.floor(moved.points / 0.01), axis=0)
            )


def test_few_stray_points_are_left_out_and_many_mean_another_unit():
    points = np.zeros((1000, 3), np.float32)
    points[:10, 2] = -1e30
    assert within_reach("stray", points).tolist() == [False] * 10 + [True] * 990
    points[10, 0] = 251
    with pytest.raises(ScanError, match="Scan stray has 11 of 1000 points beyond 250 m"):
        within_reach("stray", points)


def test_unusable_boxes_are_counted_by_kind():
    boxes = np.tile(np.array([0, 0, 0, 1, 1, 1, 0], np.float32), (6, 1))
    boxes[1, 6], boxes[2, 3], boxes[3, 5], boxes[4, 0], boxes[5, 4] = np.inf, 0, -1, 1e3, 1e3
    usable, notes = usable_boxes(boxes)
    assert usable.tolist() == [True] + [False] * 5
    assert list(notes.values()) == [1, 2, 2]
