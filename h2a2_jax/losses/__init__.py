"""Training loss: assignment of locations to boxes, focal loss and DIoU loss."""

from h2a2_jax.losses.assignment import Assignment, assign
from h2a2_jax.losses.detection import (
    CENTER_DISTANCES,
    DetectionLoss,
    axis_aligned_diou_loss,
    detection_loss,
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
