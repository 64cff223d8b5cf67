"""Training losses of TR3D and FCAF3D: assignment of locations to boxes, focal, centerness and overlap loss."""

from h2a2_jax.losses.assignment import Assignment, assign
from h2a2_jax.losses.centerness import assign_by_centerness, centerness, centerness_loss
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
    "assign_by_centerness",
    "axis_aligned_diou_loss",
    "centerness",
    "centerness_loss",
    "detection_loss",
    "rotated_diou_loss",
    "sigmoid_focal_loss",
]
