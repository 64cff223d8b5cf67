"""From what a head says at every location to the boxes of a scan."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import expit

from h2a2_jax.boxes.codec import decode_boxes
from h2a2_jax.boxes.detections import Detections
from h2a2_jax.boxes.nms import multiclass_nms
from h2a2_jax.inputs.specs import DatasetSpec

MAX_CANDIDATES = 1000
"""Locations of a scan that are decoded, those of the highest class score (TR3D)."""

_decode = jax.jit(decode_boxes)


def postprocess(
    locations: Float[np.ndarray, "n 3"],
    boxes: Float[np.ndarray, "n outputs"],
    logits: Float[np.ndarray, "n classes"],
    spec: DatasetSpec,
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.5,
) -> Detections:
    """Boxes of one scan: the best locations, decoded, suppressed class by class.

    Args:
        locations: metres, of the scan's locations alone.
        boxes: head outputs there, columns 3:6 exp()-ed; columns past the dataset's own outputs are not read.
        logits: class logits; columns past the dataset's own classes are not read.
        spec: of the dataset.
        score_threshold: lowest score kept.
        iou_threshold: bird's-eye-view IoU above which the lower score of a class is suppressed.
    """
    scores = expit(logits[:, : spec.num_classes].astype(np.float32))
    best = np.arange(len(scores))
    if len(scores) > MAX_CANDIDATES:
        best = np.argsort(-scores.max(1), kind="stable")[:MAX_CANDIDATES]
    # One shape for every scan, so that nothing is compiled anew.
    padded = [np.zeros((MAX_CANDIDATES, width), np.float32) for width in (3, spec.num_outputs)]
    padded[0][: len(best)], padded[1][: len(best)] = locations[best], boxes[best, : spec.num_outputs]
    decoded = np.asarray(_decode(jnp.asarray(padded[0]), jnp.asarray(padded[1])))[: len(best)]
    return multiclass_nms(
        decoded, scores[best], score_threshold=score_threshold, iou_threshold=iou_threshold, rotated=spec.has_yaw
    )
