"""What a score means: the threshold that serves best, and how often detections of a score are right."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

CALIBRATION_BINS = 10
"""Of equal width, scores from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """What is found when detections below a score are dropped.

    Attributes:
        score: Lowest score kept; NaN without detections.
        precision: Share of hits among the detections kept.
        recall: Share of the ground truth that is hit.
        f1: Harmonic mean of both.
    """

    score: float
    precision: float
    recall: float
    f1: float


def best_f1(
    scores: Float[np.ndarray, " n"], is_hit: Bool[np.ndarray, " n"], num_ground_truth: int
) -> OperatingPoint | None:
    """The score to keep detections from for the greatest F1; of equal ones the highest score.

    Args:
        scores: Descending.
        is_hit: Of the same detections.
        num_ground_truth: Ground-truth boxes.

    Returns:
        The point; None without ground truth; all 0 and the score NaN where nothing is hit.
    """
    if num_ground_truth < 1:
        return None
    if not is_hit.any():
        return OperatingPoint(float("nan"), 0.0, 0.0, 0.0)
    # Detections of equal score are kept or dropped together.
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
    found = np.cumsum(is_hit)[ends]
    f1 = 2 * found / (ends + 1 + num_ground_truth)
    best = int(f1.argmax())
    return OperatingPoint(
        float(scores[ends[best]]),
        float(found[best] / (ends[best] + 1)),
        float(found[best] / num_ground_truth),
        float(f1[best]),
    )


def calibration(
    scores: Float[np.ndarray, " n"], is_hit: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Mean score, share of hits and number of the detections in each bin of scores; NaN where there is none."""
    bins = np.minimum((scores * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    counts, total, right = (
        np.bincount(bins, weights, CALIBRATION_BINS).astype(np.float64)
        for weights in (None, scores.astype(np.float64), is_hit.astype(np.float64))
    )
    some = np.where(counts > 0, counts, np.nan)
    return total / some, right / some, counts
