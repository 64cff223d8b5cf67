from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import boxes
from tests.boxes.golden import FIXTURES, boxes_of_corners, load_cases, relative_error
from tests.boxes.polygons import intersection_area, iou_3d, random_pairs, special_pairs

CASES = load_cases(FIXTURES / "boxes_seed0.npz")
axis_aligned_bev_iou, axis_aligned_diou, axis_aligned_iou = map(
    jax.jit, (boxes.axis_aligned_bev_iou, boxes.axis_aligned_diou, boxes.axis_aligned_iou)
)
bev_intersection_area, rotated_bev_iou, rotated_iou = map(
    jax.jit, (boxes.bev_intersection_area, boxes.rotated_bev_iou, boxes.rotated_iou)
)
PAIRED = [
    axis_aligned_bev_iou,
    axis_aligned_diou,
    axis_aligned_iou,
    bev_intersection_area,
    rotated_bev_iou,
    rotated_iou,
]


def gradients(function, first, second, weight=1.0):
    return jax.jit(jax.grad(lambda a, b: jnp.sum(function(a, b) * weight), argnums=(0, 1)))(first, second)


@pytest.mark.parametrize(("name", "function"), [("iou", axis_aligned_iou), ("diou", axis_aligned_diou)])
def test_axis_aligned_iou_equals_the_reference(name, function):
    def of_corners(first, second):
        return function(boxes_of_corners(first), boxes_of_corners(second))

    data = CASES["axis_aligned_loss"]
    assert relative_error(1 - of_corners(data["pred"], data["target"]), data[f"{name}_loss"]) <= 1e-6
    gradient = -gradients(of_corners, data["pred"], data["target"], data["loss_weight"])[0]
    assert relative_error(gradient, data[f"{name}_grad_pred"]) <= 1e-6


@pytest.mark.parametrize("few", [False, True])
def test_rotated_iou_equals_the_reference(few):
    function = jax.jit(partial(boxes.rotated_iou, few=few))
    data = CASES["rotated_loss"]
    assert relative_error(function(data["pred"], data["target"]), data["exact_iou"]) <= 1e-6
    gradient = -gradients(function, data["pred"], data["target"], data["loss_weight"])[0]
    assert relative_error(gradient, data["iou_grad_pred"]) <= 2e-6


def test_rotated_iou_of_boxes_with_common_edges_equals_the_polygons():
    data = CASES["rotated_degenerate"]
    np.testing.assert_allclose(rotated_iou(data["pred"], data["target"]), data["exact_iou"], atol=1e-6)


@pytest.mark.parametrize("origin", [0.0, 30.0])
def test_random_pairs_equal_clipped_polygons(origin):
    first, second = random_pairs(np.random.default_rng(5), 3000)
    first[:, :2] += np.float32(origin)
    second[:, :2] += np.float32(origin)
    area = [intersection_area(a, b) for a, b in zip(first, second, strict=True)]
    iou = [iou_3d(a, b) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(bev_intersection_area(first, second), area, atol=1e-5)
    np.testing.assert_allclose(rotated_iou(first, second), iou, atol=1e-5)
    assert np.mean(np.array(area) > 0) > 0.5


def test_special_pairs_equal_clipped_polygons():
    first, second = special_pairs()
    expected = [iou_3d(a, b) for a, b in zip(first, second, strict=True)]
    is_tiny = np.minimum(first[:, 3:6].max(1), second[:, 3:6].max(1)) < 1e-4
    np.testing.assert_allclose(rotated_iou(first, second)[~is_tiny], np.array(expected)[~is_tiny], atol=1e-5)
    np.testing.assert_array_equal(rotated_iou(first, second)[is_tiny] <= 1, True)


@pytest.mark.parametrize("function", PAIRED)
def test_special_pairs_have_finite_values_and_gradients(function):
    first, second = special_pairs()
    assert np.all(np.isfinite(function(first, second)))
    for gradient in gradients(function, first, second):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("function", PAIRED)
def test_gradients_equal_finite_differences(function):
    with jax.enable_x64(True):
        first, second = random_pairs(np.random.default_rng(6), 60).astype(np.float64)
        step = 1e-6
        for side, gradient in enumerate(gradients(function, first, second)):
            for column in range(7):
                delta = np.zeros(7)
                delta[column] = step
                up, down = (
                    function(*((pair + sign * delta) if i == side else pair for i, pair in enumerate((first, second))))
                    for sign in (1, -1)
                )
                np.testing.assert_allclose(gradient[:, column], (up - down) / (2 * step), atol=2e-6)


def test_symmetric_and_blind_to_half_turns():
    first, second = random_pairs(np.random.default_rng(7), 500)
    forward = rotated_iou(first, second)
    np.testing.assert_allclose(forward, rotated_iou(second, first), atol=2e-6)
    turned = first + np.array([0, 0, 0, 0, 0, 0, np.pi], np.float32)
    np.testing.assert_allclose(forward, rotated_iou(turned, second), atol=2e-6)
    swapped = first[:, [0, 1, 2, 4, 3, 5, 6]] + np.array([0, 0, 0, 0, 0, 0, np.pi / 2], np.float32)
    np.testing.assert_allclose(forward, rotated_iou(swapped, second), atol=2e-6)


def test_without_yaw_rotated_and_axis_aligned_agree():
    first, second = random_pairs(np.random.default_rng(8), 500)
    first[:, 6] = second[:, 6] = 0
    expected = axis_aligned_iou(first, second)
    np.testing.assert_allclose(rotated_iou(first, second), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("pairwise", "paired"),
    [
        (boxes.pairwise_axis_aligned_bev_iou, axis_aligned_bev_iou),
        (boxes.pairwise_rotated_iou, rotated_iou),
        (boxes.pairwise_rotated_bev_iou, rotated_bev_iou),
    ],
)
def test_pairwise_is_every_pair(pairwise, paired):
    first, second = random_pairs(np.random.default_rng(9), 12)
    second = second[:7]
    expected = np.reshape(paired(np.repeat(first, 7, axis=0), np.tile(second, (12, 1))), (12, 7))
    np.testing.assert_allclose(pairwise(first, second), expected, atol=1e-6)
    assert pairwise(first[:0], second).shape == (0, 7)
