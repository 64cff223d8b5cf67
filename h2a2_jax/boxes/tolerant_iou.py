"""Overlap of turned footprints as the suppression kernels of published detectors compute it, inside jit.

They take the area of a polygon about its mean. Its points are the crossings of the edges and the corners of either box
within 1 cm of the other, not only inside it. Such corners add area: a few percent where edges lie close to each other,
enough to drop a box now and then that the exact overlap keeps. `rotated_bev_iou` is exact and much cheaper, so the
polygon is computed for the pairs alone whose decision it may change.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from h2a2_jax.boxes.iou import ratio_of_overlap
from h2a2_jax.typing import AnyArray

PUBLISHED_TOLERANCE = 0.01
"""How far outside a box a corner still counts (m)."""

_SEGMENT = 64  # columns of a table that are searched together
_PAIRS = 2048  # pairs whose polygons are computed at once
_CORNER_SIGNS = ((-1, -1), (1, -1), (1, 1), (-1, 1))  # counter-clockwise


def tolerant_bev_iou(
    first: Float[AnyArray, "*batch 7"], second: Float[AnyArray, "*batch 7"], tolerance: float = PUBLISHED_TOLERANCE
) -> Float[Array, "*batch"]:
    """Bird's-eye-view (x, y) IoU of paired boxes, from a polygon that takes in nearby corners.

    Args:
        first: boxes: centre, sizes (m), yaw (rad).
        second: their partners.
        tolerance: how far outside a box a corner still counts (m).

    Returns:
        Ratios, at least the exact IoU up to rounding; above 1 for boxes of some centimetres. Not made to be
        differentiated.
    """
    first, second = jnp.asarray(first), jnp.asarray(second)
    # In a frame centred on the first box, so that far from the origin no digit is lost.
    offset = second[..., :2] - first[..., :2]
    first_corners, second_corners = _corners(first, jnp.zeros_like(offset)), _corners(second, offset)
    crossings, is_crossing = _crossings(first_corners, second_corners)
    points = jnp.concatenate([crossings, first_corners, second_corners], axis=-2)
    near_second = _is_near(second, first_corners - offset[..., None, :], tolerance)
    near_first = _is_near(first, second_corners, tolerance)
    area = _area_about_mean(points, jnp.concatenate([is_crossing, near_second, near_first], axis=-1))
    total = first[..., 3] * first[..., 4] + second[..., 3] * second[..., 4]
    return ratio_of_overlap(area, total, smallest=1e-8)


def add_overlaps_of_nearby_corners(
    overlaps: Float[AnyArray, "n n"],
    boxes: Float[AnyArray, "n 7"],
    wanted: Bool[AnyArray, " n"],
    iou_threshold: float | Float[AnyArray, ""],
    tolerance: float,
) -> Bool[Array, "n n"]:
    """Pairs whose `tolerant_bev_iou` is greater than a threshold, for exact overlaps that are known.

    Time grows with the number of pairs that only the polygon decides: exact overlap up to the threshold, and beyond it
    if strips of the tolerance around both boxes counted in full.

    Args:
        overlaps: exact IoU of every box with every other.
        boxes: centre, sizes (m), yaw (rad).
        wanted: False for boxes whose pairs are not asked for; they keep the exact decision.
        iou_threshold: ratio that a pair must exceed.
        tolerance: how far outside a box a corner still counts (m); static.

    Returns:
        True for the pairs, symmetric where `overlaps` is.
    """
    is_overlapping = jnp.asarray(overlaps > iou_threshold)
    boxes, n = jnp.asarray(boxes), len(boxes)
    if n == 0:
        return is_overlapping
    undecided = ~is_overlapping & _may_exceed(overlaps, boxes, iou_threshold, tolerance)
    row = jnp.arange(n)
    undecided &= (row[:, None] < row) & wanted[:, None] & wanted
    segments = jnp.pad(undecided, ((0, 0), (0, -n % _SEGMENT))).reshape(-1, _SEGMENT)
    counts = jnp.sum(segments, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(counts)
    in_row = len(segments) // n

    def decide(state: tuple[Array, Array]) -> tuple[Array, Array]:
        start, decided = state
        pair = start + jnp.arange(_PAIRS)
        segment = jnp.minimum(jnp.searchsorted(ends, pair, side="right"), len(segments) - 1)
        rank = pair - (ends - counts)[segment]
        column = jnp.argmax(jnp.cumsum(segments[segment], axis=1) > rank[:, None], axis=1)
        first, second = segment // in_row, segment % in_row * _SEGMENT + column
        exceeds = tolerant_bev_iou(boxes[first], boxes[second], tolerance) > iou_threshold
        exceeds &= pair < ends[-1]
        first, second = jnp.where(exceeds, first, n), jnp.where(exceeds, second, n)
        decided = decided.at[first, second].set(True, mode="drop").at[second, first].set(True, mode="drop")
        return start + _PAIRS, decided

    return lax.while_loop(lambda state: state[0] < ends[-1], decide, (jnp.int32(0), is_overlapping))[1]


def _may_exceed(overlaps: AnyArray, boxes: Array, iou_threshold: float | AnyArray, tolerance: float) -> Array:
    """Pairs [n, n] whose overlap would exceed the threshold if strips of the tolerance around both boxes counted."""
    length, width = boxes[:, 3], boxes[:, 4]
    area, grown = length * width, (length + 2 * tolerance) * (width + 2 * tolerance)
    total = area[:, None] + area
    common = overlaps * total / (1 + overlaps) + (grown - area)[:, None] + (grown - area)
    common = jnp.minimum(common, jnp.minimum(grown[:, None], grown))
    radius = jnp.hypot(length, width) / 2 + 1.5 * tolerance
    offset_x, offset_y = (boxes[:, None, axis] - boxes[None, :, axis] for axis in (0, 1))
    limit = radius[:, None] + radius
    # The share of the union, without a quotient that may be negative.
    is_enough = common * (1 + iou_threshold) > iou_threshold * total
    return is_enough & (offset_x * offset_x + offset_y * offset_y <= limit * limit)


def _corners(boxes: Array, centres: Array) -> Array:
    """Corners [..., 4, 2] of footprints about given centres, counter-clockwise."""
    cos, sin = jnp.cos(boxes[..., 6]), jnp.sin(boxes[..., 6])
    half_x, half_y = boxes[..., 3] / 2, boxes[..., 4] / 2
    corners = [
        jnp.stack([x * half_x * cos - y * half_y * sin, x * half_x * sin + y * half_y * cos], axis=-1)
        for x, y in _CORNER_SIGNS
    ]
    return centres[..., None, :] + jnp.stack(corners, axis=-2)


def _crossings(first: Array, second: Array) -> tuple[Array, Array]:
    """Crossings [..., 16, 2] of every edge of one polygon with every edge of the other, and if there is one."""
    start, end = first[..., :, None, :], jnp.roll(first, -1, axis=-2)[..., :, None, :]
    other_start, other_end = second[..., None, :, :], jnp.roll(second, -1, axis=-2)[..., None, :, :]
    side = _cross(other_end - other_start, start - other_start)
    other_side = _cross(other_end - other_start, end - other_start)
    splits = _cross(end - start, other_start - start) * _cross(end - start, other_end - start) < 0
    is_crossing = splits & (side * other_side < 0)
    fraction = jnp.where(is_crossing, side, 0) / jnp.where(is_crossing, side - other_side, 1)
    points = start + fraction[..., None] * (end - start)
    return points.reshape(*first.shape[:-2], 16, 2), is_crossing.reshape(*first.shape[:-2], 16)


def _is_near(boxes: Array, points: Array, tolerance: float) -> Array:
    """True for points [..., p, 2], given from the boxes' centres, in a box or up to the tolerance beyond its edges."""
    cos, sin = jnp.cos(boxes[..., 6, None]), jnp.sin(boxes[..., 6, None])
    along = jnp.abs(points[..., 0] * cos + points[..., 1] * sin) < boxes[..., 3, None] / 2 + tolerance
    across = jnp.abs(points[..., 1] * cos - points[..., 0] * sin) < boxes[..., 4, None] / 2 + tolerance
    return along & across


def _area_about_mean(points: Array, is_point: Array) -> Array:
    """Area of the polygon through the valid points [..., p, 2], ordered by angle about their mean."""
    count = jnp.maximum(jnp.sum(is_point, axis=-1), 1)
    mean = jnp.sum(jnp.where(is_point[..., None], points, 0), axis=-2) / count[..., None]
    x, y = points[..., 0] - mean[..., :1], points[..., 1] - mean[..., 1:]
    angle = jnp.where(is_point, jnp.arctan2(y, x), jnp.inf)
    # Not `jnp.argsort`: gathering by it costs more than to sort along.
    angle, x, y = lax.sort((angle, x, y), num_keys=1)
    # Rows that are no points come last and move onto the first point, where they span no area.
    is_valid = jnp.isfinite(angle)
    spokes = jnp.stack([jnp.where(is_valid, axis - axis[..., :1], 0) for axis in (x, y)], axis=-1)
    return jnp.abs(jnp.sum(_cross(spokes[..., :-1, :], spokes[..., 1:, :]), axis=-1)) / 2


def _cross(first: Array, second: Array) -> Array:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
