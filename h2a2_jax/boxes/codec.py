"""Boxes from locations and the regression outputs of a head, and the corners of boxes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from h2a2_jax.typing import AnyArray

AXIS_ALIGNED_CHANNELS = 6
ROTATED_CHANNELS = 8


def decode_boxes(
    locations: Float[AnyArray, "*batch 3"], predictions: Float[AnyArray, "*batch channels"]
) -> Float[Array, "*batch 7"]:
    """Decode the regression outputs of each location into a box.

    Columns 0:3 are the offset from the location to the box's centre (m), columns 3:6 positive extents (m), already
    passed through exp. With 6 columns the extents are the box's sizes and its yaw is 0. With 8 columns the last two
    are (sin 2yaw, cos 2yaw) * ln q, where q is the ratio dy / dx:

        q = exp(|(p6, p7)|)    yaw = atan2(p6, p7) / 2    s = p3 + p4
        dx = s / (1 + q)       dy = s q / (1 + q)         dz = p5 + p4

    That dz takes in p4 is a peculiarity of TR3D's code; trained weights depend on it.

    Args:
        locations: x, y, z (m).
        predictions: 6 or 8 numbers per location.

    Returns:
        Boxes, one per location. The gradient is finite everywhere, also at p6 = p7 = 0.

    Raises:
        ValueError: `predictions` has neither 6 nor 8 columns.

    References:
        TR3D: Towards Real-Time Indoor 3D Object Detection, https://arxiv.org/abs/2302.02858; the rotated form is
        FCAF3D's, https://arxiv.org/abs/2112.00322, section 3.3.
    """
    channels = predictions.shape[-1]
    if channels == AXIS_ALIGNED_CHANNELS:
        return _decode_axis_aligned(locations, predictions)
    if channels == ROTATED_CHANNELS:
        return _decode_rotated(locations, predictions)
    raise ValueError(
        f"predictions have {channels} columns; expected {AXIS_ALIGNED_CHANNELS} (axis-aligned boxes) or "
        f"{ROTATED_CHANNELS} (rotated boxes)."
    )


def decode_boxes_padded(
    locations: Float[AnyArray, "*batch 3"], predictions: Float[AnyArray, "*batch 8"], has_yaw: bool | Bool[AnyArray, ""]
) -> Float[Array, "*batch 7"]:
    """Decode outputs padded to 8 columns, in the 6- or the 8-column form.

    Lets datasets with and without yaw share one compiled step: `has_yaw` may be traced.

    Args:
        locations: x, y, z (m).
        predictions: 8 numbers per location; where `has_yaw` is false, the last two are ignored.
        has_yaw: True for the 8-column form, False for the 6-column form.

    Returns:
        Boxes as of `decode_boxes` on 8 or on the first 6 columns, with finite gradients either way.
    """
    # The form not chosen runs as well, and must not overflow on columns that it ignores.
    angles = jnp.where(has_yaw, predictions[..., AXIS_ALIGNED_CHANNELS:], 0.0)
    rotated = jnp.concatenate([predictions[..., :AXIS_ALIGNED_CHANNELS], angles], axis=-1)
    turned = _decode_rotated(locations, rotated)
    return jnp.where(has_yaw, turned, _decode_axis_aligned(locations, predictions[..., :AXIS_ALIGNED_CHANNELS]))


def _decode_axis_aligned(locations: AnyArray, predictions: AnyArray) -> Array:
    centres = locations + predictions[..., :3]
    return jnp.concatenate([centres, predictions[..., 3:6], jnp.zeros_like(centres[..., :1])], axis=-1)


def _decode_rotated(locations: AnyArray, predictions: AnyArray) -> Array:
    sine, cosine = predictions[..., 6], predictions[..., 7]
    square_norm = sine * sine + cosine * cosine
    is_zero = square_norm == 0
    # Neither the norm nor the angle of (0, 0) has a derivative: take those of (0, 1) and drop the norm afterwards.
    log_ratio = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square_norm)))
    yaw = 0.5 * jnp.arctan2(jnp.where(is_zero, 0.0, sine), jnp.where(is_zero, 1.0, cosine))
    ratio = jnp.exp(log_ratio)
    width = (predictions[..., 3] + predictions[..., 4]) / (1 + ratio)
    sizes = jnp.stack([width, width * ratio, predictions[..., 5] + predictions[..., 4]], axis=-1)
    return jnp.concatenate([locations + predictions[..., :3], sizes, yaw[..., None]], axis=-1)


BOX_EDGES = tuple((i, i | bit) for i in range(8) for bit in (1, 2, 4) if not i & bit)
"""The 12 pairs of corners of `box_corners` that an edge joins."""
CORNER_SIGNS = np.array([[1 if i & bit else -1 for bit in (1, 2, 4)] for i in range(8)])
"""Sides of the corners of `box_corners` along x, y, z."""


def box_corners(boxes: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, "n 8 3"]:
    """Corners of boxes, on the host.

    Args:
        boxes: Centre, sizes (m), yaw (rad).

    Returns:
        Corner i lies at +dx/2 if its bit 1 is set, else at -dx/2; bit 2 does so for y and bit 4 for z, along the
        box's own axes. Float64, in the frame of the boxes.
    """
    boxes = boxes.astype(np.float64)
    offsets = CORNER_SIGNS * boxes[:, None, 3:6] / 2
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    x = offsets[..., 0] * cos - offsets[..., 1] * sin
    y = offsets[..., 0] * sin + offsets[..., 1] * cos
    return np.stack([x, y, offsets[..., 2]], axis=-1) + boxes[:, None, :3]
