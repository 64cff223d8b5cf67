"""Evaluation: matching with ground truth, average precision, and its breakdown by size and distance."""

from h2a2_jax.boxes.matching import IOU_THRESHOLDS, GroundTruth
from h2a2_jax.evaluation.average_precision import (
    OperatingPoint,
    average_precision,
    best_f1,
    calibration,
    distance_from,
    precision_at_levels,
    precision_recall,
    scan_origin,
)
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
    "precision_at_levels",
    "precision_recall",
    "scan_origin",
]
