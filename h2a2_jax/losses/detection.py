"""TR3D's training loss of the scans of one dataset: focal loss of all locations, DIoU loss of the assigned ones."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.boxes.codec import decode_boxes_padded
from h2a2_jax.boxes.iou import SMALLEST, axis_aligned_diou, enclosing_square_diagonal, relative_extents
from h2a2_jax.boxes.rotated_iou import rotated_iou
from h2a2_jax.losses.assignment import TOP_K, Assignment, assign
from h2a2_jax.typing import AnyArray, Leaf

CENTER_DISTANCES = ("xyz", "published")
"""Distances of centres that `rotated_diou_loss` knows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DetectionLoss:
    """The terms of the training loss; the loss is their sum.

    Attributes:
        box: float [], overlap loss of this replica's positives: of TR3D the DIoU loss divided by the number of
            positives, of FCAF3D the mean of 1 - IoU weighted by centerness.
        classification: float [], focal loss of this replica's locations, divided by the number of positives.
        num_positives: int32 [], number of positives; with an `axis_name`, on all replicas.
        centerness: float [], FCAF3D: cross-entropy of the centerness of this replica's positives, divided by their
            number; None for TR3D.
    """

    box: Leaf
    classification: Leaf
    num_positives: Leaf
    centerness: Leaf = None

    @property
    def total(self) -> Float[Array, ""]:
        """The loss to minimise."""
        total = self.box + self.classification
        return total if self.centerness is None else total + self.centerness


def detection_loss(
    locations: Float[AnyArray, "n 3"],
    scan: Int[AnyArray, " n"],
    level: Int[AnyArray, " n"],
    regression: Float[AnyArray, "n 8"],
    logits: Float[AnyArray, "n c"],
    boxes: Float[AnyArray, "b g 7"],
    box_labels: Int[AnyArray, "b g"],
    label_to_level: Int[AnyArray, " c"],
    class_mask: Bool[AnyArray, " c"],
    has_yaw: bool | Bool[AnyArray, ""],
    *,
    axis_name: str | tuple[str, ...] | None = None,
    center_distance: str = "xyz",
    top_k: int = TOP_K,
) -> DetectionLoss:
    """TR3D's loss: focal loss of all locations and DIoU loss of the assigned ones.

    Both are divided by the number of positives of the dataset's batch, at least 1. With `axis_name` that number is
    summed over the replicas, the loss is not: the caller sums the gradients of the replicas. Datasets of different
    class counts and box forms share one compiled function: classes and outputs are padded, `class_mask` and
    `has_yaw` may be traced. Padding rows, boxes and classes contribute neither loss nor gradient, for any values short
    of NaN or infinity in `regression` and `logits`.

    Args:
        locations: x, y, z (m) of the locations of all levels and scans.
        scan: scan of each location; b or more for padding rows.
        level: level of each location.
        regression: box outputs, columns 3:6 already passed through exp; without yaw the last two columns are unused.
        logits: class scores before the sigmoid.
        boxes: ground-truth boxes, padded to g per scan.
        box_labels: class of each box, -1 for padding.
        label_to_level: level on which boxes of each class ask for locations.
        class_mask: False for columns of `logits` that only pad.
        has_yaw: True for rotated boxes (8 outputs, rotated DIoU), False for axis-aligned ones (6 outputs, axis-aligned
            DIoU).
        axis_name: mesh axis or axes over which one dataset's scans are spread.
        center_distance: distance of centres in `rotated_diou_loss`.
        top_k: largest number of locations that a box may take.

    Returns:
        The loss. Without a positive, its box term is 0 and all gradients are finite.
    """
    assignment = assign(locations, scan, level, boxes, box_labels, label_to_level, top_k=top_k)
    num_positives = jnp.sum(assignment.positive, dtype=jnp.int32)
    if axis_name is not None:
        num_positives = jax.lax.psum(num_positives, axis_name)
    normaliser = jnp.maximum(num_positives, 1).astype(logits.dtype)

    is_location = (scan >= 0) & (scan < boxes.shape[0])
    # Padding rows are zeroed before the loss, so that their values reach no gradient.
    focal = sigmoid_focal_loss(jnp.where(is_location[:, None], logits, 0.0), assignment.labels, class_mask)
    focal = jnp.where(is_location[:, None], focal, 0.0)

    pair_loss = losses_of_candidates(
        locations,
        regression,
        boxes,
        assignment,
        has_yaw,
        decode=decode_boxes_padded,
        rotated_loss=partial(rotated_diou_loss, center_distance=center_distance),
        axis_aligned_loss=axis_aligned_diou_loss,
    )
    return DetectionLoss(
        box=jnp.sum(pair_loss) / normaliser, classification=jnp.sum(focal) / normaliser, num_positives=num_positives
    )


def losses_of_candidates(
    locations: Float[AnyArray, "n 3"],
    regression: Float[AnyArray, "n 8"],
    boxes: Float[AnyArray, "b g 7"],
    assignment: Assignment,
    has_yaw: bool | Bool[AnyArray, ""],
    *,
    decode: Callable[[AnyArray, AnyArray, bool | AnyArray], Array],
    rotated_loss: Callable[[AnyArray, AnyArray], Array],
    axis_aligned_loss: Callable[[AnyArray, AnyArray], Array],
) -> Float[Array, "b g k"]:
    """Loss of each candidate's decoded box against the box that asks for it.

    Only candidates can be positive: decoding those few spares the loss of every other location.

    Args:
        locations: x, y, z (m).
        regression: box outputs, see `decode`.
        boxes: ground-truth boxes.
        assignment: candidates and positives of the boxes.
        has_yaw: True for `rotated_loss`, False for `axis_aligned_loss`.
        decode: boxes from (locations, regression, has_yaw).
        rotated_loss: loss of (predicted, target) boxes with yaw.
        axis_aligned_loss: loss of (predicted, target) boxes, their yaw ignored.

    Returns:
        Losses; 0, with no gradient, where a candidate is not positive.
    """
    locations = jnp.asarray(locations).at[assignment.candidates].get(mode="fill", fill_value=0)
    regression = jnp.asarray(regression).at[assignment.candidates].get(mode="fill", fill_value=0)
    targets = jnp.asarray(boxes)[:, :, None]
    # Boxes of unit size stand in: the losses of candidates that are not positive are computed too and must be finite.
    unit_outputs = jnp.array([0, 0, 0, 1, 1, 1, 0, 0], regression.dtype)
    unit_box = jnp.array([0, 0, 0, 1, 1, 1, 0], targets.dtype)
    is_positive = assignment.positive[..., None]
    predicted = decode(
        jnp.where(is_positive, locations, 0.0), jnp.where(is_positive, regression, unit_outputs), has_yaw
    )
    targets = jnp.where(is_positive, targets, unit_box)
    losses = jnp.where(has_yaw, rotated_loss(predicted, targets), axis_aligned_loss(predicted, targets))
    return jnp.where(assignment.positive, losses, 0.0)


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
    return 1 - rotated_iou(predicted, target, few=True) + square_distance / jnp.maximum(square_diagonal, SMALLEST)


def _half_spans(boxes: AnyArray) -> Array:
    """Half sizes (x, y, z) of the axis-aligned box around a box with yaw."""
    cos, sin = jnp.abs(jnp.cos(boxes[..., 6])), jnp.abs(jnp.sin(boxes[..., 6]))
    half_x, half_y, half_z = (boxes[..., i] / 2 for i in (3, 4, 5))
    return jnp.stack([half_x * cos + half_y * sin, half_x * sin + half_y * cos, half_z], axis=-1)
