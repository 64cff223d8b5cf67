"""Focal loss of a location and DIoU loss of a pair of boxes; the caller sums and normalises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.boxes.iou import SMALLEST, axis_aligned_diou, enclosing_square_diagonal, relative_extents
from h2a2_jax.boxes.rotated_iou import rotated_iou
from h2a2_jax.typing import AnyArray

CENTER_DISTANCES = ("xyz", "published")
"""Distances of centres that `rotated_diou_loss` knows."""


def sigmoid_focal_loss(
    logits: Float[AnyArray, "*batch c"],
    labels: Int[AnyArray, "*batch"],
    class_mask: Bool[AnyArray, " c"] | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> Float[Array, "*batch c"]:
    """Focal loss of independent sigmoids, one number per location and class.

    Args:
        logits: class scores before the sigmoid.
        labels: class index, -1 = background.
        class_mask: False for columns that only pad the class axis; their loss and gradient are 0.
        gamma: exponent that lowers the loss of locations that are classified well.
        alpha: weight of the true class; 1 - alpha for all others.

    Returns:
        Losses, not summed.

    References:
        Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002.
    """
    is_true = labels[..., None] == jnp.arange(logits.shape[-1])
    # The logit of the wrong answer: sigmoid of it is 1 - p_t, softplus of it is -log p_t.
    wrong = jnp.where(is_true, -logits, logits)
    weight = jnp.where(is_true, alpha, 1 - alpha)
    if class_mask is not None:
        wrong = jnp.where(class_mask, wrong, 0.0)
        weight = jnp.where(class_mask, weight, 0.0)
    return weight * jax.nn.sigmoid(wrong) ** gamma * jax.nn.softplus(wrong)


def axis_aligned_diou_loss(
    predicted: Float[AnyArray, "*#batch 7"], target: Float[AnyArray, "*#batch 7"]
) -> Float[Array, "*batch"]:
    """1 - DIoU of paired boxes, their yaw ignored.

    Args:
        predicted: predicted boxes: centre and size in metres, yaw.
        target: target boxes of the same form.

    Returns:
        Losses between 0 and 2.

    References:
        Distance-IoU Loss, https://arxiv.org/abs/1911.08287.
    """
    return 1 - axis_aligned_diou(predicted, target)


def rotated_diou_loss(
    predicted: Float[AnyArray, "*#batch 7"],
    target: Float[AnyArray, "*#batch 7"],
    *,
    center_distance: str = "xyz",
) -> Float[Array, "*batch"]:
    """1 - DIoU of paired boxes with yaw: 1 - IoU + d^2 / c^2.

    c is the diagonal of the smallest axis-aligned box around both, d the distance of the centres. TR3D's code takes d
    over (x, y, dx), a slip for (x, y, z); `center_distance="published"` reproduces it.

    Args:
        predicted: predicted boxes: centre and size in metres, yaw in radians.
        target: target boxes of the same form.
        center_distance: "xyz", or "published" for (x, y, dx).

    Returns:
        Losses, 0 for equal boxes.

    Raises:
        ValueError: `center_distance` is neither of the two.

    References:
        Distance-IoU Loss, https://arxiv.org/abs/1911.08287.
    """
    if center_distance not in CENTER_DISTANCES:
        raise ValueError(f"center_distance is {center_distance!r}; expected 'xyz' or 'published'.")
    offset = predicted[..., :3] - target[..., :3]
    square_diagonal = enclosing_square_diagonal(
        *relative_extents(offset, _half_spans(predicted), _half_spans(target)),
    )
    distance = offset
    if center_distance == "published":
        distance = (predicted - target)[..., jnp.array([0, 1, 3])]
    square_distance = jnp.sum(distance * distance, axis=-1)
    return 1 - rotated_iou(predicted, target) + square_distance / jnp.maximum(square_diagonal, SMALLEST)


def _half_spans(boxes: AnyArray) -> Array:
    """Half sizes (x, y, z) of the axis-aligned box around a box with yaw."""
    cos, sin = jnp.abs(jnp.cos(boxes[..., 6])), jnp.abs(jnp.sin(boxes[..., 6]))
    half_x, half_y, half_z = (boxes[..., i] / 2 for i in (3, 4, 5))
    return jnp.stack([half_x * cos + half_y * sin, half_x * sin + half_y * cos, half_z], axis=-1)
