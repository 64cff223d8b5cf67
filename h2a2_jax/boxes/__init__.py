"""Boxes: decoding, overlap, non-maximum suppression.

A box is 7 float32 numbers: gravity centre x, y, z and sizes dx, dy, dz (m), yaw (rad, counter-clockwise about z).
Axis-aligned boxes carry yaw 0. Nothing here knows of networks or datasets.
"""

from h2a2_jax.boxes.codec import decode_boxes, decode_boxes_padded, decode_faces, decode_faces_padded, face_distances
from h2a2_jax.boxes.iou import axis_aligned_bev_iou, axis_aligned_diou, axis_aligned_iou, pairwise_axis_aligned_bev_iou
from h2a2_jax.boxes.nms import (
    Detections,
    detections_from_centerness,
    detections_from_predictions,
    multiclass_nms,
    overlap_matrix,
    suppress_across_classes,
)
from h2a2_jax.boxes.rotated_iou import (
    bev_intersection_area,
    pairwise_rotated_bev_iou,
    pairwise_rotated_iou,
    rotated_bev_iou,
    rotated_iou,
)
from h2a2_jax.boxes.tolerant_iou import tolerant_bev_iou

__all__ = [
    "Detections",
    "axis_aligned_bev_iou",
    "axis_aligned_diou",
    "axis_aligned_iou",
    "bev_intersection_area",
    "decode_boxes",
    "decode_boxes_padded",
    "decode_faces",
    "decode_faces_padded",
    "detections_from_centerness",
    "detections_from_predictions",
    "face_distances",
    "multiclass_nms",
    "overlap_matrix",
    "pairwise_axis_aligned_bev_iou",
    "pairwise_rotated_bev_iou",
    "pairwise_rotated_iou",
    "rotated_bev_iou",
    "rotated_iou",
    "suppress_across_classes",
    "tolerant_bev_iou",
]
