"""How good detections are: matching with ground truth, average precision, and by what it varies."""

from h2a2_jax.boxes.matching import IOU_THRESHOLDS, GroundTruth, iou_matrix, match
from h2a2_jax.evaluation.average_precision import (
    OperatingPoint,
    average_precision,
    best_f1,
    calibration,
    precision_at_levels,
    precision_recall,
)
from h2a2_jax.evaluation.breakdown import distance_from, scan_origin
from h2a2_jax.evaluation.scores import Breakdown, Evaluation, evaluate_detections

__all__ = [
    "IOU_THRESHOLDS",
    "Breakdown",
    "Evaluation",
    "GroundTruth",
    "OperatingPoint",
    "average_precision",
    "best_f1",
    "calibration",
    "distance_from",
    "evaluate_detections",
    "iou_matrix",
    "match",
    "precision_at_levels",
    "precision_recall",
    "scan_origin",
]
