"""Which detections hit a ground-truth box."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from h2a2_jax.boxes.iou import axis_aligned_iou
from h2a2_jax.boxes.rotated_iou import rotated_iou

_SMALLEST_BUCKET = 256

_PAIRED_IOU = {False: jax.jit(axis_aligned_iou), True: jax.jit(rotated_iou)}


def iou_matrix(
    detected: Float[np.ndarray, "n 7"], ground_truth: Float[np.ndarray, "m 7"], *, rotated: bool
) -> Float[np.ndarray, "n m"]:
    """Volume IoU of every detection with every ground-truth box.

    Args:
        detected: Boxes.
        ground_truth: Boxes.
        rotated: Whether yaw counts.

    Returns:
        IoU, 0 to 1.
    """
    shape = (len(detected), len(ground_truth))
    pairs = np.repeat(detected, shape[1], axis=0), np.tile(ground_truth, (shape[0], 1))
    # Scans differ in both counts; padding the list of pairs to a power of two keeps the number of compilations small.
    count = shape[0] * shape[1]
    bucket = max(_SMALLEST_BUCKET, 1 << max(count - 1, 0).bit_length())
    first, second = (np.pad(boxes.astype(np.float32), ((0, bucket - count), (0, 0))) for boxes in pairs)
    return np.asarray(_PAIRED_IOU[rotated](first, second))[:count].reshape(shape)


def match(iou: Float[np.ndarray, "n m"], threshold: float) -> Bool[np.ndarray, " n"]:
    """Tells hits from false positives, for one class in one scan.

    A detection hits the ground-truth box it overlaps most if that IoU is greater than the threshold and no detection
    before it hit that box; it is not given to a second-best box.

    Args:
        iou: IoU of each detection, by descending score, with each ground-truth box.
        threshold: IoU to exceed.

    Returns:
        True for a hit.
    """
    if iou.shape[1] == 0:
        return np.zeros(len(iou), bool)
    best = iou.argmax(axis=1)
    overlaps = np.flatnonzero(iou.max(axis=1) > threshold)
    is_hit = np.zeros(len(iou), bool)
    _, first = np.unique(best[overlaps], return_index=True)
    is_hit[overlaps[first]] = True
    return is_hit


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """Annotated boxes of one scan.

    Attributes:
        boxes: Boxes, in the frame of the detections.
        labels: Class of each, an index into the dataset's class names.
    """

    boxes: Float[np.ndarray, "n 7"]
    labels: Int[np.ndarray, " n"]


IOU_THRESHOLDS = (0.25, 0.5)
