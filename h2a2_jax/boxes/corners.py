"""Corners and edges of boxes, for drawing and writing them."""

import numpy as np
from jaxtyping import Float

BOX_EDGES = tuple((i, i | bit) for i in range(8) for bit in (1, 2, 4) if not i & bit)
"""The 12 pairs of corners of `box_corners` that an edge joins."""


def box_corners(boxes: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, "n 8 3"]:
    """Corners of boxes, on the host.

    Args:
        boxes: Centre, sizes (m), yaw (rad).

    Returns:
        Corner i lies at +dx/2 if its bit 1 is set, else at -dx/2; likewise bit 2 for y and bit 4 for z, along the
        box's own axes. Float64, in the frame of the boxes.
    """
    boxes = boxes.astype(np.float64)
    signs = np.array([[1 if i & bit else -1 for bit in (1, 2, 4)] for i in range(8)])
    offsets = signs * boxes[:, None, 3:6] / 2
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    x = offsets[..., 0] * cos - offsets[..., 1] * sin
    y = offsets[..., 0] * sin + offsets[..., 1] * cos
    return np.stack([x, y, offsets[..., 2]], axis=-1) + boxes[:, None, :3]
