"""Overlap of axis-aligned boxes.

An IoU is a ratio from 0 to 1, of volumes or, from a bird's-eye view, of footprints in the x, y plane. Functions of
paired boxes broadcast their leading dimensions. Gradients are finite everywhere: for identical, touching, nested,
disjoint and zero-size boxes; where a minimum or maximum ties, both sides get half.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from h2a2_jax.typing import AnyArray

SMALLEST = 1e-12
"""Floor of the denominators: a volume in m^3, an area or squared length in m^2. A cube of 0.1 mm has that volume."""


def axis_aligned_iou(
    first: Float[AnyArray, "*#batch 7"], second: Float[AnyArray, "*#batch 7"], *, smallest: float = SMALLEST
) -> Float[Array, "*batch"]:
    """Volume IoU of paired boxes, their yaw ignored; `smallest` is the floor of the union (m^3)."""
    # From centres and sizes rather than from corners, so that far from the origin no digit is lost.
    overlap = _axis_overlap(first, second)
    total = _product(first, 3, 6) + _product(second, 3, 6)
    return ratio_of_overlap(jnp.prod(overlap, axis=-1), total, smallest=smallest)


def axis_aligned_bev_iou(
    first: Float[AnyArray, "*#batch 7"], second: Float[AnyArray, "*#batch 7"]
) -> Float[Array, "*batch"]:
    """Bird's-eye-view (x, y) IoU of paired boxes, their yaw ignored."""
    overlap = _axis_overlap(first, second)[..., :2]
    return ratio_of_overlap(jnp.prod(overlap, axis=-1), _product(first, 3, 5) + _product(second, 3, 5))


def axis_aligned_diou(
    first: Float[AnyArray, "*#batch 7"], second: Float[AnyArray, "*#batch 7"]
) -> Float[Array, "*batch"]:
    """Volume DIoU of paired boxes, their yaw ignored: IoU - d^2 / c^2.

    d is the distance between the centres, c the diagonal of the smallest axis-aligned box around both. The result lies
    between -1 and 1.

    References:
        Distance-IoU Loss, https://arxiv.org/abs/1911.08287.
    """
    offset = first[..., :3] - second[..., :3]
    square_diagonal = enclosing_square_diagonal(*relative_extents(offset, first[..., 3:6] / 2, second[..., 3:6] / 2))
    return axis_aligned_iou(first, second) - jnp.sum(offset * offset, -1) / jnp.maximum(square_diagonal, SMALLEST)


def pairwise_axis_aligned_bev_iou(first: Float[AnyArray, "n 7"], second: Float[AnyArray, "m 7"]) -> Float[Array, "n m"]:
    """Bird's-eye-view IoU of every box with every other, their yaw ignored."""
    return axis_aligned_bev_iou(first[:, None], second[None])


def enclosing_square_diagonal(
    first: Float[AnyArray, "*#batch 6"], second: Float[AnyArray, "*#batch 6"]
) -> Float[Array, "*batch"]:
    """Squared diagonal (m^2) of the smallest axis-aligned box around two, given by lower and upper corners (m)."""
    diagonal = jnp.maximum(first[..., 3:], second[..., 3:]) - jnp.minimum(first[..., :3], second[..., :3])
    return jnp.sum(diagonal * diagonal, axis=-1)


def relative_extents(
    offset: Float[AnyArray, "*#batch 3"],
    first_half: Float[AnyArray, "*#batch 3"],
    second_half: Float[AnyArray, "*#batch 3"],
) -> tuple[Float[Array, "*#batch 6"], Float[Array, "*#batch 6"]]:
    """Corner forms of two boxes in a frame centred on the second, which keeps float32 accurate far from the origin.

    The offset is the centre of the first minus that of the second; it and the half sizes are in metres. Returned are
    lower and upper corners of the first, and of the second.
    """
    first = jnp.concatenate([offset - first_half, offset + first_half], axis=-1)
    return first, jnp.concatenate([-second_half, second_half], axis=-1)


def ratio_of_overlap(
    intersection: Float[AnyArray, "*#batch"], total: Float[AnyArray, "*#batch"], *, smallest: float = SMALLEST
) -> Float[Array, "*batch"]:
    """IoU from the common volume (or area) and the sum of both; 0 where the union is empty, floored by `smallest`."""
    return jnp.divide(intersection, jnp.maximum(total - intersection, smallest))


def _axis_overlap(first: AnyArray, second: AnyArray) -> Array:
    offset = first[..., :3] - second[..., :3]
    first_half, second_half = first[..., 3:6] / 2, second[..., 3:6] / 2
    overlap = jnp.minimum(offset + first_half, second_half) - jnp.maximum(offset - first_half, -second_half)
    return jnp.maximum(overlap, 0)


def _product(boxes: AnyArray, start: int, stop: int) -> Array:
    return jnp.prod(boxes[..., start:stop], axis=-1)
