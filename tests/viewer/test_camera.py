"""Pixels of points in a picture."""

import numpy as np
import pytest

from h2a2_jax.viewer.render import VIEWS, camera_for

LOW, HIGH = np.array([100.0, -50, 2]), np.array([105.0, -47, 4.5])
UP = np.array([0.0, 0, 1])


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("size", [(800, 500), (300, 700)])
def test_the_box_fills_the_picture(view, size):
    camera = camera_for(LOW, HIGH, view, *size)
    corners = np.array([[x, y, z] for x in (100, 105) for y in (-50, -47) for z in (2, 4.5)], float)
    pixels, depth = camera.project(corners)
    assert (pixels >= 0).all() and (pixels <= size).all() and (camera.parallel or (depth > 0).all())
    assert (np.ptp(pixels, axis=0) / size).max() > 0.85
    np.testing.assert_allclose(camera.axes @ camera.axes.T, np.eye(3), atol=1e-12)


def test_from_above_y_points_up_and_lengths_are_to_scale():
    camera = camera_for(LOW, HIGH, "top", 600, 600)
    (start, right, up, high), _ = camera.project(
        np.array([[101.0, -49, 2], [102, -49, 2], [101, -48, 2], [101, -49, 4]])
    )
    np.testing.assert_allclose(right - start, [camera.pixels_per_metre, 0], atol=1e-9)
    np.testing.assert_allclose(up - start, [0, -camera.pixels_per_metre], atol=1e-9)
    np.testing.assert_allclose(high, start, atol=1e-9)


def test_obliquely_high_places_are_high_in_the_picture_and_far_ones_small():
    camera = camera_for(LOW, HIGH, "oblique", 600, 600)
    near, far = np.array([102.0, -50, 2]), np.array([102.0, -47, 2])
    right = camera.axes[0]
    pixels, depth = camera.project(np.stack([near, near + UP, near + right, far, far + right]))
    assert pixels[1, 1] < pixels[0, 1] and depth[0] < depth[3]
    lengths = pixels[[2, 4], 0] - pixels[[0, 3], 0]
    np.testing.assert_allclose(lengths[0] / lengths[1], depth[3] / depth[0])
