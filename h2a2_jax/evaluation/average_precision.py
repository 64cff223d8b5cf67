"""Average precision, the best operating point of a detector, and bins of boxes by size and by distance.

Size is the volume, in bounds that are the same for all datasets: small is below 0.1 m^3 (a bin, a picture), large
from 0.5 m^3 on (a desk, a bed), so that figures of datasets and of splits compare. Distance is horizontal, from the
sensor for a dataset of single views (its frame begins there), else from the middle of the scan: the median of its
points' x and y.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

DistanceFrom = Literal["sensor", "centre"]

RECALL_LEVELS = np.linspace(0, 1, 101)
"""Levels of recall at which precision-recall curves are given."""

_ROUNDING = 1e-5  # by which a score may exceed 1

CALIBRATION_BINS = 10
"""Bins of equal width, of scores from 0 to 1."""


def check_scores(scores: np.ndarray, where: str = "") -> None:
    """Check that scores can be ranked and counted in tenths; `where` ends the subject of the sentence.

    Raises:
        ValueError: a score is not finite, or lies outside 0 to 1.
    """
    values = np.asarray(scores)
    if values.dtype.kind not in "fiu" or values.ndim != 1:
        raise ValueError(f"The scores{where} are {values.dtype}{list(values.shape)}; expected are numbers [n], 0 to 1.")
    if not ((values >= 0) & (values <= 1 + _ROUNDING)).all():  # nor is NaN
        wrong = values[~((values >= 0) & (values <= 1 + _ROUNDING))]
        raise ValueError(
            f"{len(wrong)} of {len(values)} scores{where} are NaN, infinite or outside 0 to 1, such as {wrong[0]:g}: "
            "leave those detections out, or give probabilities."
        )


def _check_lengths(**arrays: np.ndarray) -> None:
    if len({np.shape(array) for array in arrays.values()}) > 1 or any(np.ndim(array) != 1 for array in arrays.values()):
        shapes = ", ".join(f"{name} {list(np.shape(array))}" for name, array in arrays.items())
        raise ValueError(f"{shapes} were given; expected is one number a detection in each.")


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


def precision_at_levels(
    precision: Float[np.ndarray, " n"], recall: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " levels"]:
    """Best precision at each of `RECALL_LEVELS` or beyond; 0 at a recall that is not reached.

    Args:
        precision: Precision after each detection.
        recall: Recall after each detection, not falling.

    Raises:
        ValueError: The lengths differ.
    """
    _check_lengths(precision=precision, recall=recall)
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

    Raises:
        ValueError: The lengths differ.

    References:
        The PASCAL Visual Object Classes Challenge, from 2010 on (all points rather than eleven).
    """
    _check_lengths(precision=precision, recall=recall)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def average_precision_of_draws(
    is_hit: Bool[np.ndarray, " n"],
    scans: Int[np.ndarray, " n"],
    ground_truth: Int[np.ndarray, " s"],
    counts: Int[np.ndarray, "draws s"],
) -> Float[np.ndarray, " draws"]:
    """`average_precision` of one class on drawings of the scans, in which a scan may be missing or repeated.

    Args:
        is_hit: Hits among all detections of the class, by descending score.
        scans: Scan of each detection.
        ground_truth: Boxes of the class in each scan.
        counts: Times that a drawing has each scan.

    Returns:
        Areas, 0 to 1; NaN for a drawing without ground truth.
    """
    hits = np.flatnonzero(is_hit)
    # Only at hits recall rises. Of the points between them, and of those between copies of a scan, none is above the
    # curve through the hits, the copies of each taken together.
    before = np.zeros((len(ground_truth), len(hits) + 1))
    np.add.at(before, (scans, np.searchsorted(hits, np.arange(len(scans)))), 1)
    weights, boxes = counts.astype(np.float64), (counts @ ground_truth).astype(np.float64)
    kept = weights @ before[:, :-1].cumsum(1)
    found = weights[:, scans[hits]]
    precision = found.cumsum(1) / np.maximum(kept, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return np.where(boxes > 0, (found * envelope).sum(1) / np.maximum(boxes, 1), np.nan)


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """Precision and recall of a detector whose detections below a score are dropped.

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
        scores: Scores of the detections, descending.
        is_hit: True for detections that are hits.
        num_ground_truth: Number of ground-truth boxes.

    Returns:
        The point; None without ground truth; all 0 and the score NaN where nothing is hit.

    Raises:
        ValueError: A score is not finite or outside 0 to 1, they rise, or the lengths differ.
    """
    check_scores(scores)
    _check_lengths(scores=scores, is_hit=is_hit)
    if (np.diff(scores) > 0).any():
        raise ValueError("The scores are not in descending order: sort them, and is_hit with them.")
    if num_ground_truth < 1:
        return None
    if not is_hit.any():
        return OperatingPoint(float("nan"), 0.0, 0.0, 0.0)
    # Detections of equal score are kept or dropped as one.
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
    found = np.cumsum(is_hit)[ends]
    f1 = 2 * found / (ends + 1 + num_ground_truth)
    best = int(f1.argmax())
    precision, recall = found[best] / (ends[best] + 1), found[best] / num_ground_truth
    return OperatingPoint(float(scores[ends[best]]), float(precision), float(recall), float(f1[best]))


def calibration(
    scores: Float[np.ndarray, " n"], is_hit: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Mean score, share of hits and number of the detections in each bin of scores; NaN where there is none.

    Raises:
        ValueError: A score is not finite or outside 0 to 1, or the lengths differ.
    """
    check_scores(scores)
    _check_lengths(scores=scores, is_hit=is_hit)
    bins = np.minimum((scores * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    counts, total, right = (
        np.bincount(bins, weights, CALIBRATION_BINS).astype(np.float64)
        for weights in (None, scores.astype(np.float64), is_hit.astype(np.float64))
    )
    some = np.where(counts > 0, counts, np.nan)
    return total / some, right / some, counts


@dataclasses.dataclass(frozen=True)
class Bins:
    """Ranges of a quantity of boxes, rising; a value on one of the bounds between two bins is in the upper one."""

    names: tuple[str, ...]
    bounds: tuple[float, ...]
    unit: str

    def of(self, values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Number of the bin of each value."""
        return np.digitize(values, self.bounds)

    def describe(self) -> tuple[str, ...]:
        """Name and range of each, as in "medium (0.1 to 0.5 m3)"."""
        low, unit = self.bounds, self.unit
        ranges = [f"below {low[0]:g} {unit}", *(f"{a:g} to {b:g} {unit}" for a, b in itertools.pairwise(low))]
        ranges.append(f"from {low[-1]:g} {unit}")
        return tuple(f"{name} ({values})" for name, values in zip(self.names, ranges, strict=True))


SIZES = Bins(("small", "medium", "large"), (0.1, 0.5), "m3")
"""Bins of volumes."""

DISTANCES = {
    "sensor": Bins(("near", "middle", "far"), (2.0, 4.0), "m"),
    "centre": Bins(("near", "middle", "far"), (1.5, 3.0), "m"),
}
"""Bins of horizontal distances, by their origin."""


def distance_from(dataset: str) -> DistanceFrom:
    """The origin of distances in scans of a dataset: SUN RGB-D's frames have their camera at the origin."""
    return "sensor" if dataset == "sunrgbd" else "centre"


def scan_origin(points: Float[np.ndarray, "m 3"], measured_from: DistanceFrom) -> Float[np.ndarray, " 2"]:
    """The x, y that distances in a scan are measured from; 0, 0 for a scan without points."""
    if measured_from == "sensor" or not len(points):
        return np.zeros(2)
    return np.median(points[:, :2], axis=0).astype(np.float64)
