"""Overlap and hits of one class in one scan, one pair and one detection after the other."""

import jax
import numpy as np

from h2a2_jax.boxes import axis_aligned_iou, rotated_iou

PAIRED_IOU = {False: jax.jit(axis_aligned_iou), True: jax.jit(rotated_iou)}


def iou_matrix(detected, ground_truth, *, rotated):
    """Volume IoU of every detection with every ground-truth box."""
    shape = (len(detected), len(ground_truth))
    pairs = np.repeat(detected, shape[1], axis=0), np.tile(ground_truth, (shape[0], 1))
    # Padded to a power of two, so that little is compiled.
    count = shape[0] * shape[1]
    bucket = max(256, 1 << max(count - 1, 0).bit_length())
    first, second = (np.pad(boxes.astype(np.float32), ((0, bucket - count), (0, 0))) for boxes in pairs)
    return np.asarray(PAIRED_IOU[rotated](first, second))[:count].reshape(shape)


def hits_of_scan(iou, threshold):
    """True for hits among detections [n, m] by descending score: the first that overlaps a box most and enough."""
    is_hit, taken = np.zeros(len(iou), bool), set()
    for row, overlaps in enumerate(iou):
        if len(overlaps) and overlaps.max() > threshold and overlaps.argmax() not in taken:
            is_hit[row] = True
            taken.add(overlaps.argmax())
    return is_hit
