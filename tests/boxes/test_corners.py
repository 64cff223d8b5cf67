"""Corners of boxes."""

import numpy as np

from h2a2_jax.boxes.codec import BOX_EDGES, box_corners
from h2a2_jax.scans.scan import points_in_box

BOX = np.array([1, 2, 0.5, 2, 1, 1, 0.6], np.float32)


def test_corners_are_those_of_the_box_that_holds_points():
    corners = box_corners(BOX[None])[0]
    inner = (BOX[:3] + 0.999 * (corners - BOX[:3])).astype(np.float32)
    outer = (BOX[:3] + 1.001 * (corners - BOX[:3])).astype(np.float32)
    assert points_in_box(inner, BOX).all() and not points_in_box(outer, BOX).any()


def test_edges_are_four_of_each_size():
    corners = box_corners(BOX[None])[0]
    lengths = sorted(np.linalg.norm(corners[a] - corners[b]) for a, b in BOX_EDGES)
    np.testing.assert_allclose(lengths, [1] * 8 + [2] * 4, atol=1e-6)


def test_no_boxes_have_no_corners():
    assert box_corners(np.zeros((0, 7), np.float32)).shape == (0, 8, 3)
