"""Boxes from locations and the regression outputs of a head, distances to the faces of boxes, and their corners."""

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
    decode = _decode_rotated if _has_rotated_form(predictions) else _decode_axis_aligned
    return decode(locations, predictions)


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
    turned = _decode_rotated(locations, _without_ignored_angles(predictions, has_yaw))
    return jnp.where(has_yaw, turned, _decode_axis_aligned(locations, predictions[..., :AXIS_ALIGNED_CHANNELS]))


def decode_faces(
    locations: Float[AnyArray, "*batch 3"], predictions: Float[AnyArray, "*batch channels"]
) -> Float[Array, "*batch 7"]:
    """Decode FCAF3D's regression outputs of each location into a box.

    Columns 0:6 are the distances (m) from the location to the faces of the box at -x, +x, -y, +y, -z, +z, positive,
    already passed through exp:

        centre = location + ((p1 - p0) / 2, (p3 - p2) / 2, (p5 - p4) / 2)    sizes = (p0 + p1, p2 + p3, p4 + p5)

    With 6 columns the yaw is 0. With 8 columns the last two are (sin 2yaw, cos 2yaw) * ln q as of `decode_boxes`:

        s = p0 + p1 + p2 + p3    dx = s / (1 + q)    dy = s q / (1 + q)    yaw = atan2(p6, p7) / 2

    The centre moves along the axes of the scan then too, a peculiarity of FCAF3D's code that trained weights depend on.

    Args:
        locations: x, y, z (m).
        predictions: 6 or 8 numbers per location.

    Returns:
        Boxes, one per location; yaw from -pi/2 to pi/2. The gradient is finite everywhere, also at p6 = p7 = 0.

    Raises:
        ValueError: `predictions` has neither 6 nor 8 columns.

    References:
        FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, https://arxiv.org/abs/2112.00322, section 3.3.
    """
    decode = _decode_rotated_faces if _has_rotated_form(predictions) else _decode_axis_aligned_faces
    return decode(locations, predictions)


def decode_faces_padded(
    locations: Float[AnyArray, "*batch 3"], predictions: Float[AnyArray, "*batch 8"], has_yaw: bool | Bool[AnyArray, ""]
) -> Float[Array, "*batch 7"]:
    """Decode FCAF3D's outputs padded to 8 columns, in the 6- or the 8-column form.

    Args:
        locations: x, y, z (m).
        predictions: 8 numbers per location; where `has_yaw` is false, the last two are ignored.
        has_yaw: True for the 8-column form, False for the 6-column form; may be traced.

    Returns:
        Boxes as of `decode_faces` on 8 or on the first 6 columns, with finite gradients either way.
    """
    turned = _decode_rotated_faces(locations, _without_ignored_angles(predictions, has_yaw))
    return jnp.where(has_yaw, turned, _decode_axis_aligned_faces(locations, predictions))


def face_distances(
    locations: Float[AnyArray, "*#batch 3"], boxes: Float[AnyArray, "*#batch 7"]
) -> Float[Array, "*batch 6"]:
    """Distances of locations to the faces of boxes, along the boxes' own axes.

    Args:
        locations: x, y, z (m).
        boxes: centre, sizes (m), yaw (rad).

    Returns:
        Distances (m) to the faces at -x, +x, -y, +y, -z, +z of the box; negative beyond a face.
    """
    x, y, z = (locations[..., axis] - boxes[..., axis] for axis in range(3))
    cos, sin = jnp.cos(boxes[..., 6]), jnp.sin(boxes[..., 6])
    offsets = (x * cos + y * sin, y * cos - x * sin, z)
    halves = (boxes[..., axis] / 2 for axis in (3, 4, 5))
    pairs = ((half + offset, half - offset) for half, offset in zip(halves, offsets, strict=True))
    return jnp.stack([distance for pair in pairs for distance in pair], axis=-1)


def _has_rotated_form(predictions: AnyArray) -> bool:
    channels = predictions.shape[-1]
    if channels not in (AXIS_ALIGNED_CHANNELS, ROTATED_CHANNELS):
        raise ValueError(
            f"predictions have {channels} columns; expected {AXIS_ALIGNED_CHANNELS} (axis-aligned boxes) or "
            f"{ROTATED_CHANNELS} (rotated boxes)."
        )
    return channels == ROTATED_CHANNELS


def _without_ignored_angles(predictions: AnyArray, has_yaw: bool | AnyArray) -> Array:
    """Padded outputs, zero in the last two columns without yaw."""
    # The form not chosen runs as well, and must not overflow on columns that it ignores.
    angles = jnp.where(has_yaw, predictions[..., AXIS_ALIGNED_CHANNELS:], 0.0)
    return jnp.concatenate([predictions[..., :AXIS_ALIGNED_CHANNELS], angles], axis=-1)


def _decode_axis_aligned(locations: AnyArray, predictions: AnyArray) -> Array:
    centres = locations + predictions[..., :3]
    return jnp.concatenate([centres, predictions[..., 3:6], jnp.zeros_like(centres[..., :1])], axis=-1)


def _decode_rotated(locations: AnyArray, predictions: AnyArray) -> Array:
    ratio, yaw = _ratio_and_yaw(predictions)
    width = (predictions[..., 3] + predictions[..., 4]) / (1 + ratio)
    sizes = jnp.stack([width, width * ratio, predictions[..., 5] + predictions[..., 4]], axis=-1)
    return jnp.concatenate([locations + predictions[..., :3], sizes, yaw[..., None]], axis=-1)


def _decode_axis_aligned_faces(locations: AnyArray, predictions: AnyArray) -> Array:
    low, high = predictions[..., 0:AXIS_ALIGNED_CHANNELS:2], predictions[..., 1:AXIS_ALIGNED_CHANNELS:2]
    centres = locations + (high - low) / 2
    return jnp.concatenate([centres, low + high, jnp.zeros_like(centres[..., :1])], axis=-1)


def _decode_rotated_faces(locations: AnyArray, predictions: AnyArray) -> Array:
    aligned = _decode_axis_aligned_faces(locations, predictions)
    ratio, yaw = _ratio_and_yaw(predictions)
    width = (aligned[..., 3] + aligned[..., 4]) / (1 + ratio)
    sizes = jnp.stack([width, width * ratio, aligned[..., 5]], axis=-1)
    return jnp.concatenate([aligned[..., :3], sizes, yaw[..., None]], axis=-1)


def _ratio_and_yaw(predictions: AnyArray) -> tuple[Array, Array]:
    """Ratio dy / dx and yaw (rad) from columns 6 and 7: (sin 2yaw, cos 2yaw) * ln ratio."""
    sine, cosine = predictions[..., 6], predictions[..., 7]
    square_norm = sine * sine + cosine * cosine
    is_zero = square_norm == 0
    # Neither the norm nor the angle of (0, 0) has a derivative: take those of (0, 1) and drop the norm afterwards.
    log_ratio = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square_norm)))
    yaw = 0.5 * jnp.arctan2(jnp.where(is_zero, 0.0, sine), jnp.where(is_zero, 1.0, cosine))
    return jnp.exp(log_ratio), yaw


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
