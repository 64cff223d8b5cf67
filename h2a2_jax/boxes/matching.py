"""Matching of detections with ground truth, all scans and classes at once."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from h2a2_jax.boxes.iou import axis_aligned_iou
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.boxes.rotated_iou import rotated_iou

IOU_THRESHOLDS = (0.25, 0.5)
"""Volume IoU that a detection must exceed to hit a box, by default."""

_ROUNDING = 1e-6
"""IoU up to which boxes count as apart: float32 gives turned boxes that do not touch as much as 6e-7."""
_SMALLEST_CHUNK = 256
_LARGEST_CHUNK = 1 << 17
"""Pairs whose overlap is computed at once; fewer are padded to a power of two, so that little is compiled."""

_PAIRED_IOU = {False: jax.jit(axis_aligned_iou), True: jax.jit(rotated_iou)}


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """Annotated boxes of one scan.

    Attributes:
        boxes: Boxes, in the frame of the detections.
        labels: Class of each, an index into the dataset's class names.
    """

    boxes: Float[np.ndarray, "n 7"]
    labels: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Pool:
    """Boxes of all scans in one list, each in the frame of its scan, with class and number of the scan of each."""

    boxes: Float[np.ndarray, "n 7"]
    labels: Int[np.ndarray, " n"]
    scans: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, scans: Sequence[Detections] | Sequence[GroundTruth]) -> "Pool":
        """The boxes of scans, in the order of the scans."""
        return cls(
            np.concatenate([np.zeros((0, 7), np.float32), *(scan.boxes for scan in scans)]).astype(np.float32),
            np.concatenate([np.zeros(0, np.int32), *(scan.labels for scan in scans)]).astype(np.int32),
            np.repeat(np.arange(len(scans)), [len(scan.boxes) for scan in scans]).astype(np.int64),
        )


def pool_detections(detections: Sequence[Detections]) -> tuple[Pool, Float[np.ndarray, " n"]]:
    """Detections of all scans by descending score, and the scores; equal scores stay in the order of the scans."""
    pool = Pool.of(detections)
    scores = np.concatenate([np.zeros(0, np.float32), *(found.scores for found in detections)])
    order = np.argsort(-scores, kind="stable")
    return Pool(pool.boxes[order], pool.labels[order], pool.scans[order]), scores[order]


def best_overlaps(
    detected: Pool, ground_truth: Pool, *, rotated: bool
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The ground-truth box of its own class and scan that each detection overlaps most; of equal ones the first.

    Returns:
        Volume IoU with that box, 0 to 1, and its row; 0 and -1 where a detection overlaps none by more than 1e-6, the
        rounding of float32.
    """
    overlap, target = np.zeros(len(detected.labels), np.float32), np.full(len(detected.labels), -1, np.int64)
    first, second = _candidate_pairs(detected, ground_truth)
    iou = _paired_iou(detected.boxes[first], ground_truth.boxes[second], rotated)
    # The last entry written for a detection stays: the greatest overlap, and of equal ones the first box.
    order = np.lexsort((-second, iou))
    order = order[iou[order] > _ROUNDING]
    overlap[first[order]], target[first[order]] = iou[order], second[order]
    return overlap, target


def match(
    overlap: Float[np.ndarray, " n"], target: Int[np.ndarray, " n"], threshold: float
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Tell hits, duplicates and other false positives apart, for `best_overlaps` of detections by descending score.

    A detection hits the box that it overlaps most if that IoU is greater than the threshold and no detection before it
    hit that box; a duplicate is not given to a second-best box.

    Returns:
        True for hits; True for detections that overlap a box enough, hits and duplicates.
    """
    is_near = overlap > threshold
    rows = np.flatnonzero(is_near)
    is_hit = np.zeros(len(overlap), bool)
    _, first = np.unique(target[rows], return_index=True)
    is_hit[rows[first]] = True
    return is_hit, is_near


def _candidate_pairs(detected: Pool, ground_truth: Pool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pairs of one scan and class whose upright bounding cylinders meet; no other pair overlaps."""
    num_classes = 1 + max(detected.labels.max(initial=0), ground_truth.labels.max(initial=0))
    keys = ground_truth.scans * num_classes + ground_truth.labels
    order = np.argsort(keys, kind="stable")
    wanted = detected.scans * num_classes + detected.labels
    start = np.searchsorted(keys[order], wanted, side="left")
    count = np.searchsorted(keys[order], wanted, side="right") - start
    first = np.repeat(np.arange(len(wanted)), count)
    within = np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    second = order[np.repeat(start, count) + within]
    one, other = detected.boxes[first].astype(np.float64), ground_truth.boxes[second].astype(np.float64)
    offset = np.abs(one[:, :3] - other[:, :3])
    reach = np.linalg.norm(one[:, 3:5], axis=1) + np.linalg.norm(other[:, 3:5], axis=1)
    meets = (2 * np.hypot(offset[:, 0], offset[:, 1]) <= reach) & (2 * offset[:, 2] <= one[:, 5] + other[:, 5])
    return first[meets], second[meets]


def _paired_iou(first: np.ndarray, second: np.ndarray, rotated: bool) -> np.ndarray:
    parts = [np.zeros(0, np.float32)]
    for start in range(0, len(first), _LARGEST_CHUNK):
        pair = first[start : start + _LARGEST_CHUNK], second[start : start + _LARGEST_CHUNK]
        count = len(pair[0])
        size = max(_SMALLEST_CHUNK, 1 << (count - 1).bit_length())
        padded = (np.pad(boxes.astype(np.float32), ((0, size - count), (0, 0))) for boxes in pair)
        parts.append(np.asarray(_PAIRED_IOU[rotated](*padded))[:count])
    return np.concatenate(parts)
