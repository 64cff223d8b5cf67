"""Overlap of boxes turned about the vertical axis, exact and differentiable.

The footprints' common area is an integral over the first box's x axis, taken in that box's own frame: there the box
is |x| <= a, |y| <= b, and the other footprint lies between its lower and its upper edges, so

    area = integral over |x| <= a of clamp(upper(x), -b, b) - clamp(lower(x), -b, b).

Each of the four edges contributes a closed form, and its direction gives the sign. Nothing is sorted, no vertex is
searched, and identical, touching or nested boxes are no special case. Functions of paired boxes broadcast their
leading dimensions; gradients are finite everywhere.

The four edges are written out one by one: as one array with an axis of corners, XLA on a CPU takes some thirty times as
long for many pairs, since it computes the cosines anew for every corner. A loss takes few pairs and loops over the
edges (`few`): XLA then compiles one edge in place of four, and the whole loss in two thirds of the time.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from h2a2_jax.boxes.iou import SMALLEST, ratio_of_overlap
from h2a2_jax.typing import AnyArray

# Signs of the corners' coordinates, counter-clockwise.
_CORNER_SIGNS = ((1, 1), (-1, 1), (-1, -1), (1, -1))


def bev_intersection_area(
    first: Float[AnyArray, "*#batch 7"], second: Float[AnyArray, "*#batch 7"], *, few: bool = False
) -> Float[Array, "*batch"]:
    """Common area (m^2) of the footprints of paired boxes, in the x, y plane.

    Args:
        first: boxes.
        second: their partners.
        few: True for some thousand pairs at most: the edges are then a loop, which compiles sooner.
    """
    half_x, half_y = first[..., 3] / 2, first[..., 4] / 2
    corners = _corners_in_frame_of(first, second)
    # Counter-clockwise, so the upper edges run towards -x and count positively.
    if few:
        starts = tuple(jnp.stack(list(axis)) for axis in zip(*corners, strict=True))
        ends = tuple(jnp.roll(axis, -1, axis=0) for axis in starts)
        area = -lax.map(lambda edge: _integral_under_edge(edge[0], edge[1], half_x, half_y), (starts, ends)).sum(0)
    else:
        edges = zip(corners, corners[1:] + corners[:1], strict=True)
        area = -sum(_integral_under_edge(start, end, half_x, half_y) for start, end in edges)
    return jnp.maximum(area, 0)


def rotated_bev_iou(
    first: Float[AnyArray, "*#batch 7"], second: Float[AnyArray, "*#batch 7"]
) -> Float[Array, "*batch"]:
    """Bird's-eye-view (x, y) IoU of paired boxes: intersection over union of the footprints, 0 to 1."""
    total = first[..., 3] * first[..., 4] + second[..., 3] * second[..., 4]
    return ratio_of_overlap(bev_intersection_area(first, second), total)


def rotated_iou(
    first: Float[AnyArray, "*#batch 7"], second: Float[AnyArray, "*#batch 7"], *, few: bool = False
) -> Float[Array, "*batch"]:
    """Volume IoU of paired boxes, 0 to 1; `few` as for `bev_intersection_area`."""
    offset = first[..., 2] - second[..., 2]
    first_half, second_half = first[..., 5] / 2, second[..., 5] / 2
    height = jnp.minimum(offset + first_half, second_half) - jnp.maximum(offset - first_half, -second_half)
    intersection = bev_intersection_area(first, second, few=few) * jnp.maximum(height, 0)
    total = jnp.prod(first[..., 3:6], axis=-1) + jnp.prod(second[..., 3:6], axis=-1)
    return ratio_of_overlap(intersection, total)


def pairwise_rotated_iou(first: Float[AnyArray, "n 7"], second: Float[AnyArray, "m 7"]) -> Float[Array, "n m"]:
    """Volume IoU of every first box with every second one, 0 to 1."""
    return rotated_iou(first[:, None], second[None])


def pairwise_rotated_bev_iou(first: Float[AnyArray, "n 7"], second: Float[AnyArray, "m 7"]) -> Float[Array, "n m"]:
    """Bird's-eye-view (x, y) IoU of every first box with every second one, 0 to 1."""
    return rotated_bev_iou(first[:, None], second[None])


def _corners_in_frame_of(first: AnyArray, second: AnyArray) -> list[tuple[Array, Array]]:
    """Corners (x, y) of the second footprint in the first box's frame, counter-clockwise."""
    cos_first, sin_first = jnp.cos(first[..., 6]), jnp.sin(first[..., 6])
    offset_x, offset_y = second[..., 0] - first[..., 0], second[..., 1] - first[..., 1]
    centre_x = cos_first * offset_x + sin_first * offset_y
    centre_y = cos_first * offset_y - sin_first * offset_x
    cos_turn, sin_turn = _cos_sin_of_difference(second[..., 6], first[..., 6])
    half_x, half_y = second[..., 3] / 2, second[..., 4] / 2
    return [
        (
            centre_x + (sign_x * half_x * cos_turn - sign_y * half_y * sin_turn),
            centre_y + (sign_x * half_x * sin_turn + sign_y * half_y * cos_turn),
        )
        for sign_x, sign_y in _CORNER_SIGNS
    ]


def _cos_sin_of_difference(angle: AnyArray, other: AnyArray) -> tuple[Array, Array]:
    """Cosine and sine of angle - other, without the rounding of that difference.

    Two boxes with one edge in common, given by yaws a quarter turn apart, would else be askew by half a digit of the
    yaw, which over 10 m is a share of 5e-6 of a box 25 cm wide.
    """
    turn = angle - other
    # Knuth's exact error of a sum; its derivative is zero.
    recovered = turn - angle
    rest = lax.stop_gradient((angle - (turn - recovered)) - (other + recovered))
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    return cos - rest * sin, sin + rest * cos


def _integral_under_edge(
    start: tuple[Array, Array], end: tuple[Array, Array], half_x: AnyArray, half_y: AnyArray
) -> Array:
    """Integral of clamp(y, -half_y, half_y) dx along the part of an edge with |x| <= half_x."""
    run, rise = end[0] - start[0], end[1] - start[1]
    x_start, x_end = (jnp.clip(x, -half_x, half_x) for x in (start[0], end[0]))
    # Fractions of the edge cut off at either end. Edges wholly outside give any number here, hence the second clip;
    # they integrate over nothing.
    cut_start = jnp.clip(_safe_ratio(x_start - start[0], run), 0, 1)
    cut_end = jnp.clip(_safe_ratio(end[0] - x_end, run), 0, 1)
    y_start, y_end = start[1] + cut_start * rise, end[1] - cut_end * rise
    return (x_end - x_start) * _mean_of_clamped_line(y_start, y_end, half_y)


def _mean_of_clamped_line(start: AnyArray, end: AnyArray, bound: AnyArray) -> Array:
    """Mean of clamp(y, -bound, bound) for y running linearly from start to end.

    A trapezoid between the clamped ends, moved towards the end that lies outside for longer. In this form nothing
    cancels: on a line wholly inside or wholly beyond one bound the correction and its gradient are exactly zero.
    """
    clamped_start, clamped_end = jnp.clip(start, -bound, bound), jnp.clip(end, -bound, bound)
    # Fraction outside at the start minus fraction outside at the end.
    lead = _safe_ratio((clamped_start - start) + (clamped_end - end), end - start)
    return (clamped_start + clamped_end) / 2 + (clamped_start - clamped_end) / 2 * lead


def _safe_ratio(numerator: AnyArray, denominator: AnyArray) -> Array:
    is_small = jnp.abs(denominator) < SMALLEST
    return jnp.where(is_small, 0.0, numerator / jnp.where(is_small, 1.0, denominator))
