"""Scores of the detections of a dataset's scans: average precision by class, size and distance, and calibration."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.boxes.matching import IOU_THRESHOLDS, GroundTruth, Pool, best_overlaps, match, pool_detections
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.evaluation.average_precision import (
    DISTANCES,
    RECALL_LEVELS,
    SIZES,
    Bins,
    DistanceFrom,
    OperatingPoint,
    average_precision,
    best_f1,
    calibration,
    check_scores,
    precision_at_levels,
    precision_recall,
)
from h2a2_jax.evaluation.matches import Matches

_TWO_TURNS = 4 * np.pi  # rad; yaws are within one, and whole turns do no harm
EVALUATION_VERSION = 1
"""Version of the schema of `Evaluation.to_dict`."""


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Average precision in bins of boxes; NaN for classes without ground truth in a bin.

    Every box of the ground truth is in one bin, and every detection counts in one: that of the box which it overlaps
    most, if more than the threshold, else that of its own size or place. Boxes in other bins are ignored.

    Attributes:
        bins: Names and bounds of the bins.
        average_precision: AP by threshold, bin and class.
        num_ground_truth: Ground-truth boxes by bin and class.
        measured_from: Origin of the distances; None for sizes.
    """

    bins: Bins
    average_precision: Float[np.ndarray, "t b c"]
    num_ground_truth: Int[np.ndarray, "b c"]
    measured_from: DistanceFrom | None = None

    @property
    def mean_average_precision(self) -> Float[np.ndarray, "t b"]:
        """Mean AP per threshold and bin, over the classes that have ground truth in the bin; NaN if none has."""
        pairs = zip(self.average_precision.swapaxes(0, 1), self.num_ground_truth > 0, strict=True)
        return np.stack([_mean_over_classes(scores, is_counted) for scores, is_counted in pairs], axis=1)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores per IoU threshold (rows) and class (columns); NaN for classes without ground truth.

    Attributes:
        class_names: Names of the classes.
        iou_thresholds: IoU that a hit must exceed.
        average_precision: Area under the precision-recall curve.
        average_recall: Recall when every detection counts.
        num_ground_truth: Ground-truth boxes of each class.
        num_detections: Detections of each class.
        num_scans: Scans evaluated.
        curves: Precision at the levels of recall 0, 0.01, ... 1, the best at that recall or beyond.
        best_f1: Per threshold and class, the score to keep detections from for the greatest F1; None without ground
            truth.
        best_f1_of_all: Per threshold, the same with one score for all classes, every box counted alike.
        calibration: Per threshold the mean score, the share of hits and the number of the detections in tenths of the
            score.
        by_size: AP by volume.
        by_distance: AP by horizontal distance; None where the origin of distances is not known.
        matches: Hits and misses by scan; scans go by their number.
    """

    class_names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]
    average_precision: Float[np.ndarray, "t c"]
    average_recall: Float[np.ndarray, "t c"]
    num_ground_truth: Int[np.ndarray, " c"]
    num_detections: Int[np.ndarray, " c"]
    num_scans: int
    curves: Float[np.ndarray, "t c levels"]
    best_f1: tuple[tuple[OperatingPoint | None, ...], ...]
    best_f1_of_all: tuple[OperatingPoint | None, ...]
    calibration: Float[np.ndarray, "t 3 bins"]
    by_size: Breakdown
    by_distance: Breakdown | None
    matches: Matches

    @property
    def mean_average_precision(self) -> Float[np.ndarray, " t"]:
        """Mean AP per threshold, over the classes that have ground truth; NaN if none has."""
        return _mean_over_classes(self.average_precision, self.num_ground_truth > 0)

    @property
    def mean_average_recall(self) -> Float[np.ndarray, " t"]:
        """Mean recall per threshold, over the classes that have ground truth; NaN if none has."""
        return _mean_over_classes(self.average_recall, self.num_ground_truth > 0)

    @property
    def classes_left_out(self) -> tuple[str, ...]:
        """Names of the classes without ground truth, which no mean counts."""
        return tuple(name for name, count in zip(self.class_names, self.num_ground_truth, strict=True) if count == 0)

    def table(self) -> str:
        """A plain text table: a row per class and one of the means, AP and AR in per cent."""
        width = max(map(len, (*self.class_names, "class", "mean")))
        titles = [f"{kind}@{threshold:g}" for threshold in self.iou_thresholds for kind in ("AP", "AR")]
        scores = np.stack([self.average_precision, self.average_recall], axis=1).reshape(len(titles), -1).T
        means = np.stack([self.mean_average_precision, self.mean_average_recall], axis=1).ravel()
        lines = [f"{'class':<{width}}  {'boxes':>6}" + "".join(f"{title:>9}" for title in titles)]
        rows = [*zip(self.class_names, self.num_ground_truth, scores, strict=True)]
        for name, count, values in (*rows, ("mean", self.num_ground_truth.sum(), means)):
            cells = "".join(f"{'-' if np.isnan(value) else f'{100 * value:.2f}':>9}" for value in values)
            lines.append(f"{name:<{width}}  {count:>6}{cells}")
        if self.classes_left_out:
            lines.append(f"Left out of the means, for want of ground truth: {', '.join(self.classes_left_out)}.")
        return "\n".join(lines)

    def summary(self) -> str:
        """A line on AP by size, one on AP by distance, and one on the score to keep boxes from."""
        lines, levels = [], "/".join(f"{threshold:g}" for threshold in self.iou_thresholds)
        for title, breakdown in (("size", self.by_size), ("distance", self.by_distance)):
            if breakdown is None:
                continue
            measured = f", from the {breakdown.measured_from}" if breakdown.measured_from else ""
            means, counts = breakdown.mean_average_precision.T, breakdown.num_ground_truth.sum(axis=1)
            bins = zip(breakdown.bins.describe(), means, counts, strict=True)
            cells = [f"{name} {'/'.join(map(_per_cent, mean))}, ground truth {count}" for name, mean, count in bins]
            lines.append(f"mAP@{levels} by {title}{measured}: {'; '.join(cells)}.")
        for threshold, point in zip(self.iou_thresholds, self.best_f1_of_all, strict=True):
            if point is not None and not np.isnan(point.score):
                lines.append(
                    f"Best F1 at IoU {threshold:g}: keep scores from {point.score:.2f} (precision "
                    f"{_per_cent(point.precision)}, recall {_per_cent(point.recall)}, F1 {_per_cent(point.f1)})."
                )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for JSON, None for NaN; `h2a2_jax.evaluation.documents` has the schema."""
        thresholds = [
            {
                "iou": threshold,
                "mAP": _none_if_nan(self.mean_average_precision[row]),
                "mAR": _none_if_nan(self.mean_average_recall[row]),
                "AP": self._by_class(self.average_precision[row]),
                "AR": self._by_class(self.average_recall[row]),
                "curves": {
                    name: None if np.isnan(curve[0]) else [round(float(value), 4) for value in curve]
                    for name, curve in zip(self.class_names, self.curves[row], strict=True)
                },
                "best_f1": {n: _point(p) for n, p in zip(self.class_names, self.best_f1[row], strict=True)},
                "best_f1_of_all": _point(self.best_f1_of_all[row]),
                "calibration": [
                    {"score": _none_if_nan(score), "precision": _none_if_nan(right), "detections": int(count)}
                    for score, right, count in self.calibration[row].T
                ],
            }
            for row, threshold in enumerate(self.iou_thresholds)
        ]
        return {
            "version": EVALUATION_VERSION,
            "thresholds": thresholds,
            "num_ground_truth": self._counts(self.num_ground_truth),
            "num_detections": self._counts(self.num_detections),
            "classes_left_out": list(self.classes_left_out),
            "by_size": self._breakdown(self.by_size),
            "by_distance": None if self.by_distance is None else self._breakdown(self.by_distance),
        }

    def _breakdown(self, breakdown: Breakdown) -> dict[str, Any]:
        bins, means, scores = breakdown.bins, breakdown.mean_average_precision, breakdown.average_precision
        entries = [
            {
                "name": name,
                "num_ground_truth": self._counts(breakdown.num_ground_truth[b]),
                "thresholds": [
                    {"iou": iou, "mAP": _none_if_nan(means[t, b]), "AP": self._by_class(scores[t, b])}
                    for t, iou in enumerate(self.iou_thresholds)
                ],
            }
            for b, name in enumerate(bins.names)
        ]
        return {"bounds": list(bins.bounds), "unit": bins.unit, "from": breakdown.measured_from, "bins": entries}

    def _counts(self, counts: np.ndarray) -> dict[str, int]:
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def _by_class(self, scores: np.ndarray) -> dict[str, float | None]:
        return {name: _none_if_nan(score) for name, score in zip(self.class_names, scores, strict=True)}


def evaluate_detections(
    detections: Sequence[Detections],
    ground_truth: Sequence[GroundTruth],
    class_names: Sequence[str],
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    *,
    rotated: bool,
    origins: Float[np.ndarray, "s 2"] | None = None,
    measured_from: DistanceFrom = "centre",
) -> Evaluation:
    """Score detections against ground truth.

    Per class, detections of all scans are taken by descending score. One is a hit if the ground-truth box of its
    class and scan that it overlaps most exceeds the threshold and was not hit before; duplicates are false positives.
    A class with ground truth that is never detected scores 0.

    Args:
        detections: Boxes found, one entry per scan.
        ground_truth: Boxes annotated, one entry per scan, in the same order.
        class_names: Names of the dataset's classes, by label.
        iou_thresholds: Volume IoU that a hit must exceed.
        rotated: True if yaw counts in the overlap.
        origins: x, y of each scan (m) that distances are measured from; None: no scores by distance.
        measured_from: The kind of origin, which sets the bounds of the bins.

    Returns:
        The scores.

    Raises:
        ValueError: The numbers of scans differ, a box, score or label is no such thing or out of range, or a label has
            no class name.
    """
    if isinstance(class_names, str) or not hasattr(class_names, "__len__"):
        raise ValueError(f"class_names is {class_names!r}; expected is a sequence of names, one a class.")
    num_classes = len(class_names)
    _check_arguments(detections, ground_truth, num_classes, iou_thresholds, origins, measured_from)
    detected, scores = pool_detections(detections)
    truth = Pool.of(ground_truth)
    overlap, target = best_overlaps(detected, truth, rotated=rotated)
    found_at = [match(overlap, target, threshold) for threshold in iou_thresholds]
    counts = np.bincount(truth.labels, minlength=num_classes)
    boxes_of_scans = np.zeros((len(detections), num_classes), np.int64)
    np.add.at(boxes_of_scans, (truth.scans, truth.labels), 1)
    rows_of = [np.flatnonzero(detected.labels == label) for label in range(num_classes)]

    shape = (len(iou_thresholds), num_classes)
    precision, recall = np.full(shape, np.nan), np.full(shape, np.nan)
    curves = np.full((*shape, len(RECALL_LEVELS)), np.nan)
    points = []
    for t, (is_hit, _) in enumerate(found_at):
        for label in np.flatnonzero(counts).tolist():
            own = precision_recall(is_hit[rows_of[label]], int(counts[label]))
            precision[t, label] = average_precision(*own)
            recall[t, label] = own[1][-1] if len(own[1]) else 0.0
            curves[t, label] = precision_at_levels(*own)
        points.append(tuple(best_f1(scores[r], is_hit[r], int(c)) for r, c in zip(rows_of, counts, strict=True)))

    def breakdown(bins: Bins, values: Sequence[np.ndarray], measured_from: DistanceFrom | None = None) -> Breakdown:
        """Scores in bins, from the values of the detections and of the ground truth."""
        bin_of_detection, bin_of_truth = (bins.of(value) for value in values)
        boxes_in = np.zeros((len(bins.names), num_classes), np.int64)
        np.add.at(boxes_in, (bin_of_truth, truth.labels), 1)
        binned = np.full((len(found_at), *boxes_in.shape), np.nan)
        for t, (is_hit, is_near) in enumerate(found_at):
            bin_of = bin_of_detection.copy()
            bin_of[is_near] = bin_of_truth[target[is_near]]
            for b, label in np.argwhere(boxes_in > 0).tolist():
                rows = rows_of[label]
                curve = precision_recall(is_hit[rows[bin_of[rows] == b]], int(boxes_in[b, label]))
                binned[t, b, label] = average_precision(*curve)
        return Breakdown(bins, binned, boxes_in, measured_from)

    volumes = [pool.boxes[:, 3:6].astype(np.float64).prod(axis=1) for pool in (detected, truth)]
    by_distance = None
    if origins is not None:
        centres = [(pool.boxes[:, :2].astype(np.float64), origins[pool.scans]) for pool in (detected, truth)]
        distances = [np.linalg.norm(centre - origin, axis=1) for centre, origin in centres]
        by_distance = breakdown(DISTANCES[measured_from], distances, measured_from)
    return Evaluation(
        class_names=tuple(class_names),
        iou_thresholds=tuple(iou_thresholds),
        average_precision=precision,
        average_recall=recall,
        num_ground_truth=counts,
        num_detections=np.bincount(detected.labels, minlength=num_classes),
        num_scans=len(detections),
        curves=curves,
        best_f1=tuple(points),
        best_f1_of_all=tuple(best_f1(scores, is_hit, len(truth.labels)) for is_hit, _ in found_at),
        calibration=np.array([calibration(scores, is_hit) for is_hit, _ in found_at]),
        by_size=breakdown(SIZES, volumes),
        by_distance=by_distance,
        matches=Matches(
            names=tuple(map(str, range(len(detections)))),
            iou_thresholds=tuple(iou_thresholds),
            scores=scores,
            labels=detected.labels,
            scans=detected.scans,
            is_hit=np.array([is_hit for is_hit, _ in found_at]).reshape(len(found_at), len(scores)),
            ground_truth=boxes_of_scans,
        ),
    )


def _check_arguments(
    detections: Sequence[Detections],
    ground_truth: Sequence[GroundTruth],
    num_classes: int,
    iou_thresholds: Sequence[float],
    origins: np.ndarray | None,
    measured_from: str,
) -> None:
    for scans in (detections, ground_truth):
        if isinstance(scans, Detections | GroundTruth) or not hasattr(scans, "__len__"):
            raise ValueError(f"A {type(scans).__name__} was given; expected is a list with one entry per scan.")
    if len(detections) != len(ground_truth):
        raise ValueError(
            f"{len(detections)} scans have detections and {len(ground_truth)} ground truth; give one entry per scan "
            "to both, empty where there is none."
        )
    for scan, (found, there) in enumerate(zip(detections, ground_truth, strict=True)):
        if not isinstance(found, Detections) or not isinstance(there, GroundTruth):
            raise ValueError(
                f"Scan {scan} has a {type(found).__name__} and a {type(there).__name__}; expected are Detections and "
                "GroundTruth, one of each for a scan."
            )
        _check_boxes(f"Scan {scan} has", "detections", found.boxes, found.labels, num_classes)
        _check_boxes(f"Scan {scan} has", "ground truth", there.boxes, there.labels, num_classes)
        if np.shape(found.scores) != (len(found.boxes),):
            raise ValueError(
                f"Scan {scan} has {len(found.boxes)} detections with scores {list(np.shape(found.scores))}; expected "
                "is one each."
            )
        check_scores(found.scores, f" of scan {scan}")
    if not all(0 <= threshold < 1 for threshold in iou_thresholds):
        raise ValueError(f"iou_thresholds are {tuple(iou_thresholds)}; expected are numbers from 0 on, below 1.")
    if measured_from not in DISTANCES:
        raise ValueError(f"measured_from is {measured_from!r}; expected is one of {', '.join(DISTANCES)}.")
    if origins is not None and (np.shape(origins) != (len(detections), 2) or not np.isfinite(origins).all()):
        raise ValueError(
            f"origins have the shape {list(np.shape(origins))} for {len(detections)} scans, or are not finite; "
            "expected is one x, y for each."
        )


def _check_boxes(scan: str, kind: str, boxes: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Refuse boxes and labels of one scan that would be scored as something else."""
    boxes, labels = np.asarray(boxes), np.asarray(labels)
    if boxes.ndim != 2 or boxes.shape[1] != 7 or boxes.dtype.kind not in "fiu":
        raise ValueError(
            f"{scan} {kind} with boxes {boxes.dtype}{list(boxes.shape)}; expected are numbers [n, 7]: centre, sizes "
            "and yaw, 0 for axis-aligned boxes."
        )
    if labels.shape != (len(boxes),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{scan} {kind} of {len(boxes)} boxes with labels {labels.dtype}{list(labels.shape)}; expected is an "
            "integer each."
        )
    if not len(boxes):
        return
    finite = np.isfinite(boxes).all(axis=1)
    for wrong, words, remedy in (
        (~finite, "with NaN or infinite numbers", "leave them out"),
        ((boxes[:, 3:6] <= 0).any(axis=1), "without size", "leave them out"),
        (np.abs(boxes[:, 6]) > _TWO_TURNS, "with a yaw of more than two turns", "give radians, not degrees"),
    ):
        if wrong.any():
            raise ValueError(
                f"{scan} {kind} with {int(wrong.sum())} of {len(boxes)} boxes {words}, the first in row "
                f"{int(wrong.argmax())}: {remedy}."
            )
    if not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(
            f"{scan} labels from {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}, for {num_classes} "
            f"class names, in its {kind}."
        )


def _mean_over_classes(scores: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    return scores[:, is_counted].mean(axis=1) if is_counted.any() else np.full(len(scores), np.nan)


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _per_cent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _point(point: OperatingPoint | None) -> dict[str, float | None] | None:
    if point is None:
        return None
    return {name: _none_if_nan(value) for name, value in dataclasses.asdict(point).items()}
