"""Detections of a scan, and non-maximum suppression inside jit.

No step of the suppression leaves the device, and it maps over the scans of a batch. It keeps what the usual greedy pass
keeps, index for index. That pass is a chain of as many steps as there are candidates. Here all candidates of all
classes are decided at once, again and again:

    a candidate is kept as soon as every better one that overlaps it is suppressed,
    and suppressed as soon as one of them is kept.

Each round decides at least the best candidate still open, so that the end is that of the greedy pass; the rounds are
as many as links in the longest chain of candidates that overlap one another in turn (in rooms, five to ten). A round
is one AND and one OR over an n x n table that holds a bit for each class: all classes cost what one does.

Of 1000 candidates in 18 classes, on two CPU cores, the overlaps take 10 to 20 ms, the table 4 ms and a round 0.5 ms.
The other form measured, a loop over the ranks that decides one candidate of every class at a time, needs no table and
is 3 ms faster there, but it is a thousand steps in sequence, which on an accelerator wait for one another.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from h2a2_jax.boxes.codec import decode_boxes, decode_faces
from h2a2_jax.boxes.iou import axis_aligned_iou, pairwise_axis_aligned_bev_iou
from h2a2_jax.boxes.rotated_iou import pairwise_rotated_bev_iou, pairwise_rotated_iou, rotated_bev_iou
from h2a2_jax.boxes.tolerant_iou import PUBLISHED_TOLERANCE, add_overlaps_of_nearby_corners
from h2a2_jax.typing import AnyArray

MAX_CANDIDATES = 1000
"""Locations that are decoded, those of the highest score: of a scan (TR3D), of each level of a scan (FCAF3D)."""

_WORD = 32  # classes whose bits share a word of the table
_SMALLEST_BUCKET = 64
_TOGETHER = 1024  # boxes whose overlaps are computed at once, on the host
_AXIS_ALIGNED_BEV_IOU = jax.jit(pairwise_axis_aligned_bev_iou)
_ROTATED_BEV_IOU = jax.jit(rotated_bev_iou)


@dataclasses.dataclass(frozen=True)
class Detections:
    """Boxes found in one scan.

    Attributes:
        boxes: Boxes, in the scan's frame.
        scores: Confidence of each, 0 to 1.
        labels: Class of each, an index into the dataset's class names.
    """

    boxes: Float[np.ndarray, "n 7"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.scores)

    def of_score(self, lowest: float) -> "Detections":
        """The detections of at least this score."""
        kept = self.scores >= np.float32(lowest)
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept])


def overlap_matrix(boxes: Float[AnyArray, "n 7"], *, rotated: bool) -> Float[np.ndarray, "n n"]:
    """Bird's-eye-view IoU of every box with every other, on the host.

    Compiles once per power of two: boxes, or rotated pairs close enough to meet, are padded up to it. With `rotated`
    yaw counts.
    """
    boxes = np.asarray(boxes)
    if not rotated:
        padded = _pad(boxes)
        return np.asarray(_AXIS_ALIGNED_BEV_IOU(padded, padded))[: len(boxes), : len(boxes)]
    # Most pairs are too far apart to meet, as the circles around their footprints show; each other one costs a polygon.
    radius = np.linalg.norm(boxes[:, 3:5], axis=1) / 2
    offset = boxes[:, None, :2] - boxes[None, :, :2]
    limit = radius[:, None] + radius
    first, second = np.nonzero(np.triu((offset * offset).sum(axis=-1) <= limit * limit))
    matrix = np.zeros((len(boxes), len(boxes)), boxes.dtype)
    matrix[first, second] = matrix[second, first] = overlaps_of_pairs(boxes[first], boxes[second])
    return matrix


def overlaps_of_pairs(boxes: Float[np.ndarray, "n 7"], others: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, " n"]:
    """Bird's-eye-view IoU of boxes with others, pair by pair, on the host; compiles once per power of two."""
    return np.asarray(_ROTATED_BEV_IOU(_pad(boxes), _pad(others)))[: len(boxes)]


def suppress_across_classes(found: Detections, iou_threshold: float = 0.5, *, rotated: bool) -> Int[np.ndarray, " k"]:
    """Suppress boxes of whatever class that overlap a better one, on the host ("agnostic" suppression).

    Of boxes that stand in one place under several classes the best stays. Greedy by descending score, of equal scores
    by row, as `multiclass_nms` within a class; heights are ignored.

    Args:
        found: Detections of a scan, in any order.
        iou_threshold: A box is dropped if its bird's-eye-view IoU with a better one that is kept is greater than this.
        rotated: True if yaw counts.

    Returns:
        Rows that are kept, ascending.
    """
    from scipy.sparse import coo_array  # here, for training loads this module and needs none of it
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    if not len(found):
        return np.zeros(0, np.int64)
    # Boxes of a building overlap within their room only: groups that cannot meet are compared by themselves.
    boxes = found.boxes.astype(np.float64)
    reach = np.linalg.norm(boxes[:, 3:5], axis=1) / 2
    pairs = cKDTree(boxes[:, :2]).query_pairs(2 * reach.max() + 1e-6, output_type="ndarray")
    distances = np.linalg.norm(boxes[pairs[:, 0], :2] - boxes[pairs[:, 1], :2], axis=1)
    first, second = pairs[distances <= reach[pairs].sum(axis=1) + 1e-6].T
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(found), len(found)))
    _, group = connected_components(graph, directed=False)
    by_group = np.argsort(group, kind="stable")
    ends = (np.flatnonzero(np.diff(group[by_group], append=-1)) + 1).tolist()
    kept, start = np.zeros(len(found), bool), 0
    for end, following in zip(ends, [*ends[1:], np.inf], strict=True):
        if following - start > _TOGETHER:
            rows = by_group[start:end]
            kept[rows] = _suppress_on_host(found.boxes[rows], found.scores[rows], iou_threshold, rotated)
            start = end
    return np.flatnonzero(kept)


def _suppress_on_host(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, rotated: bool) -> np.ndarray:
    """Mask of the boxes that the greedy pass keeps."""
    # Centred, for float32 has too few digits at the places of a map.
    near = boxes.astype(np.float64)
    near[:, :2] -= near[:, :2].mean(axis=0).round()
    overlapping = overlap_matrix(near.astype(np.float32), rotated=rotated) > iou_threshold
    kept, is_open = np.zeros(len(boxes), bool), np.ones(len(boxes), bool)
    for row in np.argsort(-scores, kind="stable"):
        if is_open[row]:
            kept[row] = True
            is_open &= ~overlapping[row]
    return kept


def _pad(boxes: np.ndarray) -> np.ndarray:
    """Zero boxes appended, up to the next power of two."""
    bucket = max(_SMALLEST_BUCKET, 1 << max(len(boxes) - 1, 0).bit_length())
    return np.pad(boxes, ((0, bucket - len(boxes)), (0, 0)))


def multiclass_nms(
    boxes: Float[AnyArray, "n 7"],
    scores: Float[AnyArray, "n c"],
    *,
    score_threshold: float | Float[AnyArray, ""] = 0.01,
    iou_threshold: float | Float[AnyArray, ""] = 0.5,
    rotated: bool,
    iou: Literal["bev", "3d"] = "bev",
    corner_tolerance: float = 0.0,
) -> tuple[Int32[Array, " n*c"], Int32[Array, " n*c"], Int32[Array, ""]]:
    """Suppress every class by itself, by bird's-eye-view IoU; heights are ignored.

    Args:
        boxes: Centre, sizes (m), yaw (rad).
        scores: Confidence of each box in each class; NaN scores nothing.
        score_threshold: A box must score more than this in a class to be detected as that class.
        iou_threshold: A box is dropped if its IoU with a better one that is kept is greater than this.
        rotated: True if yaw counts; static.
        iou: "bev" compares footprints (TR3D), "3d" volumes; static.
        corner_tolerance: How far outside a rotated footprint a corner of another counts as inside (m), see
            `h2a2_jax.boxes.tolerant_iou`; 0 for exact overlap, as always of axis-aligned boxes and volumes; static.

    Returns:
        rows: Row of the box of each detection: class by class, in each by descending score, of equal scores by row.
            Past the detections n.
        labels: Class of each; past them -1.
        count: Number of detections.
    """
    n, c = scores.shape
    # NaN compares greater than nothing.
    is_candidate = scores > score_threshold
    order = jnp.argsort(jnp.where(is_candidate, -scores, jnp.inf), axis=0, stable=True)
    ranks = jnp.zeros((n, c), jnp.int32).at[order, jnp.arange(c)].set(jnp.arange(n, dtype=jnp.int32)[:, None])
    wanted = jnp.any(is_candidate, axis=1)
    is_overlapping = _is_overlapping(boxes, iou_threshold, rotated, iou, wanted, corner_tolerance)
    is_kept = _suppress(is_overlapping, ranks, is_candidate)
    by_rank = jnp.take_along_axis(is_kept, order, axis=0).T
    labels, places = jnp.nonzero(by_rank, size=n * c, fill_value=-1)
    rows = jnp.where(labels < 0, n, order[places, labels])
    return rows.astype(jnp.int32), labels.astype(jnp.int32), jnp.sum(is_kept, dtype=jnp.int32)


def detections_from_predictions(
    locations: Float[AnyArray, "n 3"],
    valid: Bool[AnyArray, " n"],
    outputs: Float[AnyArray, "n channels"],
    logits: Float[AnyArray, "n c"],
    *,
    rotated: bool,
    score_threshold: float | Float[AnyArray, ""] = 0.01,
    iou_threshold: float | Float[AnyArray, ""] = 0.5,
    max_candidates: int = MAX_CANDIDATES,
) -> tuple[Float[Array, "k 7"], Float[Array, " k"], Int32[Array, " k"], Int32[Array, ""]]:
    """Boxes of one scan from the outputs of a head: the best locations, decoded, suppressed class by class.

    Args:
        locations: x, y, z (m).
        valid: True for the rows of the scan; the other rows are not read.
        outputs: Head outputs, 6 or 8 columns, see `decode_boxes`.
        logits: Class logits.
        rotated: True if yaw counts; static.
        score_threshold: A box must score more than this in a class to be detected as that class.
        iou_threshold: Footprint IoU above which the lower score of a class is dropped.
        max_candidates: Locations that are decoded, those of the highest class score; static.

    Returns:
        boxes, scores, labels: Detections class by class, in each by descending score; of k = min(n, max_candidates)
            x c rows the first `count`, then zeros and label -1.
        count: Number of detections.
    """
    scores = jnp.where(valid[:, None], jax.nn.sigmoid(logits), jnp.nan)
    best = _best_rows(scores, valid, max_candidates)
    return _detections(
        decode_boxes(locations[best], outputs[best]),
        scores[best],
        rotated=rotated,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
    )


def detections_from_centerness(
    locations: Float[AnyArray, "n 3"],
    valid: Bool[AnyArray, " n"],
    level: Int[AnyArray, " n"],
    outputs: Float[AnyArray, "n channels"],
    logits: Float[AnyArray, "n c"],
    center_logits: Float[AnyArray, " n"],
    *,
    rotated: bool,
    score_threshold: float | Float[AnyArray, ""] = 0.01,
    iou_threshold: float | Float[AnyArray, ""] = 0.5,
    max_candidates: int = MAX_CANDIDATES,
    num_levels: int = 4,
    corner_tolerance: float = PUBLISHED_TOLERANCE,
) -> tuple[Float[Array, "k 7"], Float[Array, " k"], Int32[Array, " k"], Int32[Array, ""]]:
    """Boxes of one scan from the outputs of FCAF3D's head: the best locations of each level, decoded, suppressed.

    A location scores sigmoid(class) sigmoid(centerness). With m = num_levels * min(n, max_candidates) candidates, the
    suppression holds a few tables of m^2 words: map over the scans of a batch by `jax.lax.map`.

    Args:
        locations: x, y, z (m).
        valid: True for the rows of the scan; the other rows are not read.
        level: Level of each location, 0 to num_levels - 1.
        outputs: Head outputs, 6 or 8 columns, see `decode_faces`.
        logits: Class logits.
        center_logits: Centerness before the sigmoid.
        rotated: True if yaw counts; static.
        score_threshold: A box must score more than this in a class to be detected as that class.
        iou_threshold: Footprint IoU above which the lower score of a class is dropped.
        max_candidates: Locations of a level that are decoded, those of the highest score of a class; static.
        num_levels: Number of levels; static.
        corner_tolerance: How far outside a rotated footprint a corner of another counts as inside (m), see
            `h2a2_jax.boxes.tolerant_iou`; static.

    Returns:
        boxes, scores, labels: Detections class by class, in each by descending score; of k = m x c rows the first
            `count`, then zeros and label -1.
        count: Number of detections.

    References:
        FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, https://arxiv.org/abs/2112.00322, section 3.3.
    """
    scores = jax.nn.sigmoid(logits) * jax.nn.sigmoid(center_logits)[:, None]
    scores = jnp.where(valid[:, None], scores, jnp.nan)
    best, is_best = _best_rows_of_levels(scores, valid, level, max_candidates, num_levels)
    return _detections(
        decode_faces(jnp.asarray(locations)[best], jnp.asarray(outputs)[best]),
        jnp.where(is_best[:, None], scores[best], jnp.nan),
        rotated=rotated,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        corner_tolerance=corner_tolerance,
    )


def _detections(boxes: Array, scores: Array, **options: Any) -> tuple[Array, Array, Array, Array]:
    """Boxes, scores, labels and number of what `multiclass_nms` keeps; zeros and label -1 behind it."""
    rows, labels, count = multiclass_nms(boxes, scores, **options)
    is_found = jnp.arange(len(rows)) < count
    boxes, scores = jnp.where(is_found[:, None], boxes[rows], 0), jnp.where(is_found, scores[rows, labels], 0)
    return boxes, scores, labels, count


def _best_rows(scores: Array, valid: AnyArray, max_candidates: int) -> Array:
    """Rows of the highest class scores, descending, if there are more than enough; else the valid rows as they are."""
    descending = jnp.where(jnp.sum(valid) > max_candidates, _descending(scores), 0)
    return lax.sort((~jnp.asarray(valid), descending, jnp.arange(len(scores))), num_keys=3)[-1][:max_candidates]


def _best_rows_of_levels(
    scores: Array, valid: AnyArray, level: AnyArray, max_candidates: int, num_levels: int
) -> tuple[Array, Array]:
    """Rows as of `_best_rows` of each level, level by level, and False for rows that stand in where a level has fewer.

    Each level has a fixed number of places.
    """
    n, level = len(scores), jnp.where(valid, level, num_levels)
    count = jnp.zeros(num_levels, jnp.int32).at[level].add(1, mode="drop")
    is_crowded = (count > max_candidates).at[level].get(mode="fill", fill_value=False)
    descending = jnp.where(is_crowded, _descending(scores), 0)
    order = lax.sort((level, descending, jnp.arange(n)), num_keys=3)[-1]
    place = jnp.arange(min(n, max_candidates))
    start = jnp.cumsum(count) - count
    rows = order.at[start[:, None] + place].get(mode="clip")
    return rows.reshape(-1), (place < count[:, None]).reshape(-1)


def _descending(scores: Array) -> Array:
    """Keys that sort rows by descending highest score of a class."""
    # Rows with NaN among their classes go behind every score, as in numpy. The maximum cannot be relied on here: XLA's
    # on a CPU passes NaN over in tables of some widths.
    has_nan = jnp.any(jnp.isnan(scores), axis=1)
    return jnp.where(has_nan, jnp.inf, -jnp.max(scores, axis=1))


def _is_overlapping(
    boxes: AnyArray,
    iou_threshold: float | AnyArray,
    rotated: bool,
    iou: str,
    wanted: Array,
    corner_tolerance: float,
) -> Array:
    """Pairs [n, n] in which the box of the row, if kept, suppresses that of the column."""
    if iou == "3d":
        overlaps = pairwise_rotated_iou(boxes, boxes) if rotated else axis_aligned_iou(boxes[:, None], boxes[None])
        return overlaps > iou_threshold
    if not rotated:
        return pairwise_axis_aligned_bev_iou(boxes, boxes) > iou_threshold
    # As in `overlap_matrix`: of a pair the box of the lower row comes first, and a pair whose footprints' circles lie
    # apart does not overlap, even if rounding says so. Both orders are computed: mirroring one half costs a CPU more.
    row = jnp.arange(len(boxes))
    overlaps = jnp.where(
        row[:, None] <= row, pairwise_rotated_bev_iou(boxes, boxes), rotated_bev_iou(boxes[None], boxes[:, None])
    )
    radius = jnp.linalg.norm(boxes[:, 3:5], axis=1) / 2
    offset_x, offset_y = (boxes[:, None, axis] - boxes[None, :, axis] for axis in (0, 1))
    limit = radius[:, None] + radius
    may_meet = offset_x * offset_x + offset_y * offset_y <= limit * limit
    if not corner_tolerance:
        return may_meet & (overlaps > iou_threshold)
    overlaps = jnp.where(may_meet, overlaps, 0)
    return add_overlaps_of_nearby_corners(overlaps, boxes, wanted, iou_threshold, corner_tolerance)


def _suppress(is_overlapping: Array, ranks: Array, is_candidate: AnyArray) -> Array:
    """Candidates [n, c] that the greedy pass keeps, where `ranks` [n, c] orders the boxes of a class."""
    n, c = ranks.shape
    words = -(-c // _WORD)
    # Bit k of [w, i, j]: j comes before i in class 32 w + k, and overlaps it.
    table = []
    for classes in (range(first, min(first + _WORD, c)) for first in range(0, c, _WORD)):
        word = jnp.zeros((n, n), jnp.uint32)
        for bit, label in enumerate(classes):
            word |= jnp.where(ranks[None, :, label] < ranks[:, None, label], jnp.uint32(1 << bit), 0)
        table.append(word)
    better = jnp.where(is_overlapping.T, jnp.stack(table), 0)

    def decide(state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, is_open = state
        blocked = lax.reduce_or(better & (kept | is_open)[:, None], axes=(2,))
        suppressed = lax.reduce_or(better & kept[:, None], axes=(2,))
        return kept | (is_open & ~blocked), is_open & blocked & ~suppressed

    bits = jnp.arange(_WORD, dtype=jnp.uint32)
    padded = jnp.pad(is_candidate, ((0, 0), (0, words * _WORD - c))).reshape(n, words, _WORD)
    candidates = jnp.sum(jnp.where(padded, jnp.uint32(1) << bits, 0), axis=-1, dtype=jnp.uint32).T
    kept, _ = lax.while_loop(lambda state: jnp.any(state[1] != 0), decide, (jnp.zeros_like(candidates), candidates))
    return (kept.T[..., None] >> bits & 1).astype(bool).reshape(n, words * _WORD)[:, :c]
