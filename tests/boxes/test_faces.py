import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.boxes import decode_faces, decode_faces_padded, face_distances


def test_faces_of_an_axis_aligned_box_decode_to_it():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.normal(size=(20, 3)), rng.uniform(1, 2, (20, 3)), np.zeros((20, 1))], 1)
    locations = boxes[:, :3] + rng.uniform(-0.4, 0.4, (20, 3))
    distances = face_distances(locations.astype(np.float32), boxes.astype(np.float32))
    assert np.all(np.asarray(distances) > 0)
    np.testing.assert_allclose(decode_faces(locations.astype(np.float32), distances), boxes, atol=1e-6)


def test_distances_run_along_the_axes_of_the_box():
    box = np.array([1, 2, 3, 4, 2, 6, np.pi / 2], np.float32)
    location = np.array([0.5, 2, 1], np.float32)
    # A quarter turn: the box's x axis is the scan's y, its y axis the scan's -x.
    np.testing.assert_allclose(face_distances(location, box), [2, 2, 1.5, 0.5, 1, 5], atol=1e-6)
    np.testing.assert_array_equal(face_distances(location + np.float32([0, 9, 0]), box) < 0, [0, 1, 0, 0, 0, 0])


def test_boxes_with_yaw():
    # log ratio ln 3 at 2 yaw = 90 degrees; the centre moves along the axes of the scan.
    outputs = jnp.array([1, 2, 0.5, 0.5, 1, 4, jnp.log(3.0), 0])
    expected = [0.5, 0, 1.5, 1, 3, 5, np.pi / 4]
    for found in (decode_faces(jnp.zeros(3), outputs), decode_faces_padded(jnp.zeros(3), outputs, True)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@jax.jit
def padded_and_gradient(locations, outputs, has_yaw):
    boxes, pull = jax.vjp(lambda outputs: decode_faces_padded(locations, outputs, has_yaw), outputs)
    return boxes, pull(jnp.ones_like(boxes))[0]


@pytest.mark.parametrize("has_yaw", [False, True])
def test_padded_form_equals_the_plain_one_with_a_traced_choice(has_yaw):
    rng = np.random.default_rng(1)
    outputs = np.concatenate([rng.uniform(0.1, 2, (50, 6)), rng.normal(size=(50, 2))], 1).astype(np.float32)
    # Neither the norm nor the angle of these has a derivative at the first, and hardly one at the others.
    outputs[:3, 6:] = [(0, 0), (1e-30, 0), (0, -1)]
    locations = rng.normal(size=(50, 3)).astype(np.float32)
    expected = decode_faces(locations, outputs if has_yaw else outputs[:, :6])
    if not has_yaw:
        outputs[3:, 6:] = 1e4
    found, gradient = padded_and_gradient(locations, outputs, has_yaw)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(gradient)) and has_yaw == bool(np.any(gradient[:, 6:]))


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="7 columns"):
        decode_faces(jnp.zeros((1, 3)), jnp.zeros((1, 7)))
