"""How good detections are: matching with ground truth, average precision."""

from h2a2_jax.evaluation.average_precision import average_precision, precision_recall
from h2a2_jax.evaluation.evaluator import IOU_THRESHOLDS, Evaluation, GroundTruth, evaluate_detections
from h2a2_jax.evaluation.matching import iou_matrix, match

__all__ = [
    "IOU_THRESHOLDS",
    "Evaluation",
    "GroundTruth",
    "average_precision",
    "evaluate_detections",
    "iou_matrix",
    "match",
    "precision_recall",
]
