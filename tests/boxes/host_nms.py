"""Non-maximum suppression on the host, as published detectors do it, to compare the suppression inside jit with."""

import numpy as np

from h2a2_jax import boxes as exact
from h2a2_jax.boxes import Detections
from tests.boxes.tolerant_iou import tolerant_bev_iou


def overlap_matrix(boxes, *, rotated, corner_tolerance=0.0):
    """Footprint IoU [n, n] of every box with every other; rotated ones with a tolerance as in `tolerant_bev_iou`."""
    if not corner_tolerance:
        return exact.overlap_matrix(boxes, rotated=rotated)
    radius = np.linalg.norm(boxes[:, 3:5], axis=1) / 2 + corner_tolerance
    distance = np.linalg.norm(boxes[:, None, :2] - boxes[None, :, :2], axis=-1)
    first, second = np.nonzero(np.triu(distance <= radius[:, None] + radius))
    matrix = np.zeros((len(boxes), len(boxes)), boxes.dtype)
    matrix[first, second] = tolerant_bev_iou(boxes[first], boxes[second], corner_tolerance)
    matrix[second, first] = matrix[first, second]
    return matrix


def greedy_suppression(is_overlapping):
    """Rows kept, ascending: in order, every row that no kept row before it overlaps."""
    is_suppressed = np.zeros(len(is_overlapping), bool)
    kept = []
    for row in range(len(is_overlapping)):
        if not is_suppressed[row]:
            kept.append(row)
            is_suppressed |= is_overlapping[row]
    return np.array(kept, np.int64)


def bev_nms(boxes, scores, iou_threshold, *, rotated, corner_tolerance=0.0):
    """Rows kept by greedy suppression by footprint IoU, by descending score."""
    order = np.argsort(-scores, kind="stable")
    overlaps = overlap_matrix(boxes, rotated=rotated, corner_tolerance=corner_tolerance)
    return order[greedy_suppression(overlaps[np.ix_(order, order)] > iou_threshold)]


def kept_by_class(boxes, scores, *, rotated, score_threshold=0.01, iou_threshold=0.5, corner_tolerance=0.0):
    """Rows and labels of the greedy pass of each class by itself: class by class, in each by descending score."""
    is_overlapping = overlap_matrix(boxes, rotated=rotated, corner_tolerance=corner_tolerance) > iou_threshold
    rows, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for label, column in enumerate(scores.T):
        order = np.argsort(-column, kind="stable")
        order = order[column[order] > score_threshold]
        rows.append(order[greedy_suppression(is_overlapping[np.ix_(order, order)])])
        labels.append(np.full(len(rows[-1]), label, np.int32))
    return np.concatenate(rows), np.concatenate(labels)


def multiclass_nms(boxes, scores, **options):
    """Detections of `kept_by_class`."""
    rows, labels = kept_by_class(boxes, scores, **options)
    return Detections(boxes=boxes[rows], scores=scores[rows, labels], labels=labels)
