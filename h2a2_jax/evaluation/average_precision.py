"""Area under the precision-recall curve."""

import numpy as np
from jaxtyping import Bool, Float


def precision_recall(
    is_hit: Bool[np.ndarray, " n"], num_ground_truth: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Precision and recall after each detection.

    Args:
        is_hit: Hits among all detections of a class, by descending score.
        num_ground_truth: Number of ground-truth boxes of that class, at least 1.

    Returns:
        Precision and recall, float64.

    Raises:
        ValueError: There is no ground truth, so recall is not defined.
    """
    if num_ground_truth < 1:
        raise ValueError(f"num_ground_truth is {num_ground_truth}; recall needs at least one ground-truth box.")
    hits = np.cumsum(is_hit, dtype=np.float64)
    return hits / np.arange(1, len(is_hit) + 1), hits / num_ground_truth


RECALL_LEVELS = np.linspace(0, 1, 101)
"""Where precision-recall curves are given."""


def precision_at_levels(
    precision: Float[np.ndarray, " n"], recall: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " levels"]:
    """Best precision at each of `RECALL_LEVELS` or beyond; 0 at a recall that is not reached.

    Args:
        precision: Precision after each detection.
        recall: Recall after each detection, not falling.
    """
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # A recall of 3 / 10 is to reach the level 0.3, however either is rounded.
    return envelope[np.searchsorted(recall, RECALL_LEVELS - 1e-9)]


def average_precision(precision: Float[np.ndarray, " n"], recall: Float[np.ndarray, " n"]) -> float:
    """Area under the curve, precision taken as the best at that recall or beyond.

    Args:
        precision: Precision after each detection.
        recall: Recall after each detection, not falling.

    Returns:
        Area, 0 to 1; 0 without detections.

    References:
        The PASCAL Visual Object Classes Challenge, from 2010 on (all points rather than eleven).
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
