import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.losses import axis_aligned_diou_loss, rotated_diou_loss, sigmoid_focal_loss
from tests.boxes.golden import FIXTURES, load_cases, relative_error
from tests.boxes.polygons import random_pairs, special_pairs

CASES = load_cases(FIXTURES / "boxes_seed0.npz")


def summed_gradient(loss, *arguments):
    return jax.jit(jax.grad(lambda *a: jnp.sum(loss(*a))))(*arguments)


def test_focal_loss_equals_the_reference():
    data = CASES["focal_loss"]
    labels = np.where(data["target"] == data["logits"].shape[1], -1, data["target"])
    gradient = summed_gradient(lambda logits: sigmoid_focal_loss(logits, labels) * data["loss_weight"], data["logits"])
    assert relative_error(sigmoid_focal_loss(data["logits"], labels), data["loss"]) <= 1e-6
    assert relative_error(gradient, data["grad_logits"]) <= 1e-6


def test_focal_loss_of_padded_classes_is_zero_whatever_they_hold():
    data = CASES["focal_loss"]
    labels = np.where(data["target"] == data["logits"].shape[1], -1, data["target"])
    logits = np.concatenate([data["logits"], np.full((300, 3), 50, np.float32)], axis=1)
    mask = np.arange(logits.shape[1]) < 18
    np.testing.assert_allclose(sigmoid_focal_loss(logits, labels, mask)[:, :18], data["loss"], atol=1e-6)
    gradient = summed_gradient(lambda x: sigmoid_focal_loss(x, labels, mask), logits)
    assert not np.any(sigmoid_focal_loss(logits, labels, mask)[:, 18:])
    assert not np.any(gradient[:, 18:])


def test_focal_loss_is_finite_for_extreme_logits():
    logits = jnp.array([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    for label in range(-1, 5):
        labels = jnp.array([label])
        assert np.all(np.isfinite(sigmoid_focal_loss(logits, labels)))
        assert np.all(np.isfinite(summed_gradient(lambda x, y=labels: sigmoid_focal_loss(x, y), logits)))


def test_published_rotated_loss_equals_the_reference():
    data = CASES["rotated_loss"]

    def loss(predicted):
        return rotated_diou_loss(predicted, data["target"], center_distance="published")

    assert relative_error(jax.jit(loss)(data["pred"]), data["diou_loss"]) <= 1e-6
    gradient = summed_gradient(lambda p: loss(p) * data["loss_weight"], data["pred"])
    assert relative_error(gradient, data["diou_grad_pred"]) <= 2e-6
    degenerate = CASES["rotated_degenerate"]
    losses = rotated_diou_loss(degenerate["pred"], degenerate["target"], center_distance="published")
    # The reference computed these in float32 on coinciding edges and is itself off the exact overlap by 7e-7.
    assert relative_error(losses, degenerate["diou_loss"]) <= 5e-6


def test_center_distance_is_over_z_unless_published():
    target = jnp.array([0.0, 0, 0, 1, 1, 1, 0])
    raised, widened = jnp.array([0.0, 0, 2, 1, 1, 1, 0]), jnp.array([0.0, 0, 0, 2, 1, 1, 0])
    diagonal_raised, diagonal_widened = 1 + 1 + 9, 4 + 1 + 1
    np.testing.assert_allclose(rotated_diou_loss(raised, target), 1 + 4 / diagonal_raised, rtol=1e-6)
    np.testing.assert_allclose(rotated_diou_loss(widened, target), 0.5, rtol=1e-6)
    published = rotated_diou_loss(raised, target, center_distance="published")
    np.testing.assert_allclose(published, 1, rtol=1e-6)
    published = rotated_diou_loss(widened, target, center_distance="published")
    np.testing.assert_allclose(published, 0.5 + 1 / diagonal_widened, rtol=1e-6)
    with pytest.raises(ValueError, match="center_distance is 'xyy'"):
        rotated_diou_loss(raised, target, center_distance="xyy")


def test_without_yaw_both_losses_agree():
    first, second = random_pairs(np.random.default_rng(0), 300)
    first[:, 6] = second[:, 6] = 0
    np.testing.assert_allclose(rotated_diou_loss(first, second), axis_aligned_diou_loss(first, second), atol=2e-6)
    gradient = summed_gradient(rotated_diou_loss, first, second)
    expected = summed_gradient(axis_aligned_diou_loss, first, second)
    # Gradients grow with 1 / size; a column's scale is its largest.
    np.testing.assert_allclose(gradient[:, :6], expected[:, :6], atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("loss", [axis_aligned_diou_loss, rotated_diou_loss])
def test_gradients_equal_finite_differences(loss):
    with jax.enable_x64(True):
        first, second = random_pairs(np.random.default_rng(1), 50).astype(np.float64)
        gradient, value, step = summed_gradient(loss, first, second), jax.jit(loss), 1e-6
        for column in range(7):
            delta = step * np.eye(7)[column]
            slope = (value(first + delta, second) - value(first - delta, second)) / (2 * step)
            np.testing.assert_allclose(gradient[:, column], slope, atol=2e-6)


@pytest.mark.parametrize("loss", [axis_aligned_diou_loss, rotated_diou_loss])
def test_special_pairs_have_finite_gradients(loss):
    first, second = special_pairs()
    assert np.all(np.isfinite(loss(first, second)))
    assert np.all(np.isfinite(summed_gradient(loss, first, second)))
