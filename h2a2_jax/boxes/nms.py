"""Non-maximum suppression, on the host; the overlaps are computed on the device."""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from h2a2_jax.boxes.detections import Detections
from h2a2_jax.boxes.iou import pairwise_axis_aligned_bev_iou, pairwise_axis_aligned_iou
from h2a2_jax.boxes.rotated_iou import rotated_bev_iou, rotated_iou
from h2a2_jax.boxes.tolerant_iou import tolerant_bev_iou
from h2a2_jax.typing import AnyArray

_SMALLEST_BUCKET = 64

_AXIS_ALIGNED = {"bev": jax.jit(pairwise_axis_aligned_bev_iou), "3d": jax.jit(pairwise_axis_aligned_iou)}
_ROTATED = {"bev": jax.jit(rotated_bev_iou), "3d": jax.jit(rotated_iou)}


def overlap_matrix(
    boxes: Float[AnyArray, "n 7"], *, rotated: bool, iou: str = "bev", corner_tolerance: float = 0.0
) -> Float[np.ndarray, "n n"]:
    """IoU of every box with every other.

    Compiles once per power of two: boxes, or rotated pairs close enough to meet, are padded up to it.

    Args:
        boxes: Boxes.
        rotated: Whether yaw counts.
        iou: "bev" for footprints, "3d" for volumes.
        corner_tolerance: If positive, rotated footprints overlap as in `tolerant_bev_iou`.

    Returns:
        IoU, 0 to 1.

    Raises:
        ValueError: `iou` is neither of the two, or a tolerance is given for other than rotated footprints.
    """
    if iou not in ("bev", "3d"):
        raise ValueError(f"iou is {iou!r}; expected 'bev' (footprints) or '3d' (volumes).")
    if corner_tolerance and (iou != "bev" or not rotated):
        raise ValueError(f"corner_tolerance={corner_tolerance} needs rotated footprints: rotated=True and iou='bev'.")
    boxes = np.asarray(boxes)
    if not rotated:
        padded = _pad(boxes)
        return np.asarray(_AXIS_ALIGNED[iou](padded, padded))[: len(boxes), : len(boxes)]
    # Most pairs are too far apart to meet; the others are few, and each costs a polygon.
    first, second = _neighbours(boxes, reach=2 * corner_tolerance)
    if corner_tolerance:
        overlaps = tolerant_bev_iou(boxes[first], boxes[second], corner_tolerance)
    else:
        overlaps = np.asarray(_ROTATED[iou](_pad(boxes[first]), _pad(boxes[second])))[: len(first)]
    matrix = np.zeros((len(boxes), len(boxes)), boxes.dtype)
    matrix[first, second] = matrix[second, first] = overlaps
    return matrix


def greedy_suppression(is_overlapping: Bool[np.ndarray, "n n"]) -> Int[np.ndarray, " m"]:
    """Keeps, in order, every row that no kept row before it overlaps.

    Args:
        is_overlapping: Which pairs overlap too much; rows and columns by descending score.

    Returns:
        Rows kept, ascending.
    """
    is_suppressed = np.zeros(len(is_overlapping), bool)
    kept = []
    for row in range(len(is_overlapping)):
        if not is_suppressed[row]:
            kept.append(row)
            is_suppressed |= is_overlapping[row]
    return np.array(kept, np.int64)


def bev_nms(
    boxes: Float[AnyArray, "n 7"],
    scores: Float[AnyArray, " n"],
    iou_threshold: float,
    *,
    rotated: bool,
    corner_tolerance: float = 0.0,
) -> Int[np.ndarray, " m"]:
    """Greedy suppression by bird's-eye-view IoU; heights are ignored.

    Args:
        boxes: Boxes.
        scores: Their confidence.
        iou_threshold: A box is dropped whose IoU with a better one that is kept is greater than this.
        rotated: Whether yaw counts.
        corner_tolerance: See `overlap_matrix`.

    Returns:
        Rows kept, by descending score.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    overlaps = overlap_matrix(boxes, rotated=rotated, corner_tolerance=corner_tolerance)
    return order[greedy_suppression(overlaps[np.ix_(order, order)] > iou_threshold)]


def multiclass_nms(
    boxes: Float[AnyArray, "n 7"],
    scores: Float[AnyArray, "n c"],
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.5,
    rotated: bool,
    iou: str = "bev",
    corner_tolerance: float = 0.0,
) -> Detections:
    """Suppresses every class by itself; a box may be detected as several classes.

    The published detectors suppress by bird's-eye-view IoU, which drops one of two objects that stand on each other;
    `iou="3d"` keeps both.

    Args:
        boxes: Boxes.
        scores: Confidence of each box in each class.
        score_threshold: What does not score more than this is dropped.
        iou_threshold: See `bev_nms`.
        rotated: Whether yaw counts.
        iou: "bev" for footprints, "3d" for volumes.
        corner_tolerance: See `overlap_matrix`.

    Returns:
        Detections class by class, in each by descending score.
    """
    boxes, scores = np.asarray(boxes), np.asarray(scores)
    candidates = np.flatnonzero((scores > score_threshold).any(axis=1))
    boxes, scores = boxes[candidates], scores[candidates]
    overlaps = overlap_matrix(boxes, rotated=rotated, iou=iou, corner_tolerance=corner_tolerance)
    is_overlapping = overlaps > iou_threshold
    rows, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for label, column in enumerate(scores.T):
        order = np.argsort(-column, kind="stable")
        order = order[column[order] > score_threshold]
        kept = order[greedy_suppression(is_overlapping[np.ix_(order, order)])]
        rows.append(kept)
        labels.append(np.full(len(kept), label))
    row, kept_labels = np.concatenate(rows), np.concatenate(labels)
    return Detections(boxes=boxes[row], scores=scores[row, kept_labels], labels=kept_labels.astype(np.int32))


def _neighbours(boxes: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pairs, each once and with itself, whose footprints' circles come within `reach` of each other."""
    radius = np.linalg.norm(boxes[:, 3:5], axis=1) / 2
    offset = boxes[:, None, :2] - boxes[None, :, :2]
    limit = radius[:, None] + radius + reach
    first, second = np.nonzero(np.triu((offset * offset).sum(axis=-1) <= limit * limit))
    return first, second


def _pad(boxes: np.ndarray) -> np.ndarray:
    """Zero boxes appended, up to the next power of two."""
    bucket = max(_SMALLEST_BUCKET, 1 << max(len(boxes) - 1, 0).bit_length())
    return np.pad(boxes, ((0, bucket - len(boxes)), (0, 0)))
