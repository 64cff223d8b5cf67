import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.boxes import decode_boxes, decode_boxes_padded
from tests.boxes.golden import FIXTURES, load_cases, relative_error

CASES = load_cases(FIXTURES / "boxes_seed0.npz")


@pytest.mark.parametrize("case", ["decode_scannet", "decode_sunrgbd"])
def test_boxes_and_gradients_equal_the_reference(case):
    data = CASES[case]
    columns = data["bbox"].shape[1]
    boxes, pull = jax.vjp(lambda outputs: decode_boxes(data["points"], outputs), jnp.asarray(data["bbox_pred"]))
    weight = np.zeros(boxes.shape, np.float32)
    weight[:, :columns] = data["loss_weight"]
    assert relative_error(boxes[:, :columns], data["bbox"]) <= 1e-6
    assert not np.any(boxes[:, columns:])
    assert relative_error(pull(jnp.asarray(weight))[0], data["grad_bbox_pred"]) <= 1e-6


@pytest.mark.parametrize("case", ["decode_scannet", "decode_sunrgbd"])
def test_padded_form_equals_the_plain_one_with_a_traced_choice(case):
    data = CASES[case]
    has_yaw = data["bbox_pred"].shape[1] == 8
    padded = np.zeros((len(data["points"]), 8), np.float32)
    padded[:, : data["bbox_pred"].shape[1]] = data["bbox_pred"]
    boxes = jax.jit(decode_boxes_padded)(data["points"], padded, jnp.asarray(has_yaw))
    np.testing.assert_allclose(boxes, decode_boxes(data["points"], data["bbox_pred"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_yaw", [False, True])
@pytest.mark.parametrize("angles", [(0.0, 0.0), (1e-30, 0.0), (0.0, -1.0)])
def test_gradient_is_finite_where_norm_and_angle_have_none(has_yaw, angles):
    outputs = jnp.array([[0.1, 0.2, 0.3, 1, 2, 3, *angles]], jnp.float32)
    location = jnp.zeros((1, 3))
    gradient = jax.jacobian(lambda p: decode_boxes_padded(location, p, jnp.asarray(has_yaw)))(outputs)
    assert np.all(np.isfinite(gradient))


def test_ignored_angle_columns_change_nothing():
    outputs = jnp.array([0.1, 0.2, 0.3, 1, 2, 3, 1e4, -1e4], jnp.float32)
    location = jnp.ones(3)
    boxes, pull = jax.vjp(lambda p: decode_boxes_padded(location, p, jnp.asarray(False)), outputs)
    np.testing.assert_allclose(boxes, [1.1, 1.2, 1.3, 1, 2, 3, 0], rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.ones(7))[0], [1, 1, 1, 1, 1, 1, 0, 0])


def test_square_without_angle():
    boxes = decode_boxes(jnp.zeros((2, 2, 3)), jnp.tile(jnp.array([0.0, 0, 0, 1, 1, 0.5, 0, 0]), (2, 2, 1)))
    np.testing.assert_allclose(boxes, np.tile([0, 0, 0, 1, 1, 1.5, 0], (2, 2, 1)), atol=1e-7)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="7 columns"):
        decode_boxes(jnp.zeros((1, 3)), jnp.zeros((1, 7)))
