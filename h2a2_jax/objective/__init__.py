"""What training minimises: assignment of locations to boxes, focal loss and DIoU loss."""

from h2a2_jax.objective.assign import Assignment, assign
from h2a2_jax.objective.detection_loss import DetectionLoss, detection_loss
from h2a2_jax.objective.losses import (
    CENTER_DISTANCES,
    axis_aligned_diou_loss,
    rotated_diou_loss,
    sigmoid_focal_loss,
)

__all__ = [
    "CENTER_DISTANCES",
    "Assignment",
    "DetectionLoss",
    "assign",
    "axis_aligned_diou_loss",
    "detection_loss",
    "rotated_diou_loss",
    "sigmoid_focal_loss",
]
