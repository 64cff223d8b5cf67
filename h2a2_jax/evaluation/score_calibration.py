"""Scores that mean what they say: of the boxes with a score of .5, half are right.

A logistic curve per class (Platt) maps scores to the share of hits among validation detections. It is a line in the
logits, and the logits are linear in the head's kernel and bias: the line goes into them, and nothing is left to do when
the detector predicts.

References:
    Platt, Probabilistic outputs for support vector machines, 1999.
    Guo et al., On calibration of modern neural networks, https://arxiv.org/abs/1706.04599.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float

from h2a2_jax.checkpoint.store import StoredDetector
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.matches import Matches

_PRIOR = 10.0  # detections that a slope of 1 and an offset of 0 are worth
_STEEP = (0.2, 5.0)
_KERNEL, _BIAS = "heads.class_kernel", "heads.class_bias"


def calibrated(detector: StoredDetector, matches: Mapping[str, Matches], iou: float = 0.25) -> StoredDetector:
    """Return a detector whose scores are the share of hits, class by class; the order within a class stays.

    Args:
        detector: a TR3D with a head of each dataset.
        matches: detections of scans that the detector was not trained on, by dataset. A class without detections
            keeps its scores.
        iou: IoU of a hit; one of the thresholds of the matches.

    Raises:
        InputError: the detector has other heads, a dataset lacks matches, or the matches lack the threshold.
    """
    exclusive, shared, statistics = detector.parts
    if (
        detector.config.model.kind != "tr3d"
        or detector.config.model.label_space != "separate"
        or _KERNEL not in exclusive
    ):
        raise InputError(f"{detector.place} has no class head of its own for each dataset: calibrate a TR3D that has.")
    kernel, bias = np.array(exclusive[_KERNEL]), np.array(exclusive[_BIAS])
    for row, spec in enumerate(detector.specs):
        own = matches.get(spec.name)
        if own is None or iou not in own.iou_thresholds:
            raise InputError(
                f"The evaluation has no matches of {spec.name} at an IoU of {iou:g}: evaluate it with --mode=eval."
            )
        hits = own.is_hit[own.iou_thresholds.index(iou)]
        for label in range(spec.num_classes):
            of_class = own.labels == label
            slope, offset = fit_scores(own.scores[of_class], hits[of_class])
            kernel[row, :, label] *= slope
            bias[row, label] = slope * bias[row, label] + offset
    return replace(detector, parts=({**exclusive, _KERNEL: kernel, _BIAS: bias}, shared, statistics))


def fit_scores(scores: Float[np.ndarray, " n"], hits: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """Fit slope and offset of the logit of a score, so that its sigmoid is the share of hits.

    Few detections move little: ten are added in effect that are right as their scores say. The slope stays within
    0.2 and 5, so that the order stays.
    """
    shares = np.clip(scores.astype(np.float64), 1e-6, 1 - 1e-6)
    logits = np.log(shares / (1 - shares))
    design = np.stack([logits, np.ones_like(logits)], axis=1)
    line = np.array([1.0, 0.0])
    for _ in range(50):  # Newton's method on a convex function, damped by its prior
        fitted = 1 / (1 + np.exp(-np.clip(design @ line, -30, 30)))
        slope = design.T @ (fitted - hits) + _PRIOR * (line - (1.0, 0.0))
        curvature = (design * (fitted * (1 - fitted))[:, None]).T @ design + _PRIOR * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        line = line - np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    return float(np.clip(line[0], *_STEEP)), float(line[1])
