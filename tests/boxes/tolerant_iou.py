"""Rotated bird's-eye-view IoU as published detectors compute it in non-maximum suppression, on the host.

Their operator adds a corner to the common polygon when it lies within 1 cm of the other box, not only inside it. For
boxes with edges close to each other that overstates the overlap by up to a few percent, enough to turn the decision
on a pair now and then. `rotated_iou` is exact; this serves to reproduce their results.
"""

import numpy as np
from jaxtyping import Float

PUBLISHED_TOLERANCE = 0.01
"""The operator's tolerance (m)."""

_SMALLEST_AREA = 1e-8


def tolerant_bev_iou(
    first: Float[np.ndarray, "n 7"], second: Float[np.ndarray, "n 7"], tolerance: float = PUBLISHED_TOLERANCE
) -> Float[np.ndarray, " n"]:
    """Footprint IoU of paired boxes, from a polygon that takes in nearby corners.

    The polygon's points are the crossings of the edges and the corners of either box within `tolerance` of the other;
    they are ordered by angle about their mean.

    Args:
        first: Boxes.
        second: Boxes.
        tolerance: How far outside a box a corner still counts (m).

    Returns:
        Overlap in float64. With tolerance 0 the exact IoU, but for boxes whose edges coincide.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    first_corners, second_corners = _corners(first), _corners(second)
    crossings, is_crossing = _crossings(first_corners, second_corners)
    points = np.concatenate([crossings, first_corners, second_corners], axis=1)
    is_point = np.concatenate(
        [is_crossing, _is_near(second, first_corners, tolerance), _is_near(first, second_corners, tolerance)], axis=1
    )
    area = _area_about_mean(points, is_point)
    total = first[:, 3] * first[:, 4] + second[:, 3] * second[:, 4]
    return area / np.maximum(total - area, _SMALLEST_AREA)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Corners [n, 4, 2], counter-clockwise."""
    offsets = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * boxes[:, None, 3:5]
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    turned = [offsets[..., 0] * cos - offsets[..., 1] * sin, offsets[..., 0] * sin + offsets[..., 1] * cos]
    return boxes[:, None, :2] + np.stack(turned, axis=-1)


def _crossings(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crossings [n, 16, 2] of every edge of one polygon with every edge of the other, and whether there is one."""
    start, end = first[:, :, None], np.roll(first, -1, axis=1)[:, :, None]
    other_start, other_end = second[:, None], np.roll(second, -1, axis=1)[:, None]
    side = _cross(other_end - other_start, start - other_start)
    other_side = _cross(other_end - other_start, end - other_start)
    splits = _cross(end - start, other_start - start) * _cross(end - start, other_end - start) < 0
    is_crossing = splits & (side * other_side < 0)
    fraction = np.where(is_crossing, side, 0) / np.where(is_crossing, side - other_side, 1)
    points = start + fraction[..., None] * (end - start)
    return points.reshape(len(first), 16, 2), is_crossing.reshape(len(first), 16)


def _is_near(boxes: np.ndarray, points: np.ndarray, tolerance: float) -> np.ndarray:
    offset = points - boxes[:, None, :2]
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    along = np.abs(offset[..., 0] * cos + offset[..., 1] * sin) < boxes[:, 3, None] / 2 + tolerance
    across = np.abs(offset[..., 1] * cos - offset[..., 0] * sin) < boxes[:, 4, None] / 2 + tolerance
    return along & across


def _area_about_mean(points: np.ndarray, is_point: np.ndarray) -> np.ndarray:
    """Area of the polygon through the valid points [n, p, 2], ordered by angle about their mean."""
    count = np.maximum(is_point.sum(axis=1), 1)
    offsets = points - ((points * is_point[..., None]).sum(axis=1) / count[:, None])[:, None]
    angle = np.where(is_point, np.arctan2(offsets[..., 1], offsets[..., 0]), np.inf)
    order = np.argsort(angle, axis=1, kind="stable")
    offsets = np.take_along_axis(offsets, order[..., None], axis=1)
    # What is no point moves onto the first one, where it spans no area.
    is_valid = np.take_along_axis(is_point, order, axis=1)
    spokes = np.where(is_valid[..., None], offsets - offsets[:, :1], 0)
    return np.abs(_cross(spokes[:, :-1], spokes[:, 1:]).sum(axis=1)) / 2


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
