"""Mean average precision of detections over a dataset's scans."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.boxes.detections import Detections
from h2a2_jax.evaluation.average_precision import average_precision, precision_recall
from h2a2_jax.evaluation.matching import iou_matrix, match

IOU_THRESHOLDS = (0.25, 0.5)


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """Annotated boxes of one scan.

    Attributes:
        boxes: Boxes, in the frame of the detections.
        labels: Class of each, an index into the dataset's class names.
    """

    boxes: Float[np.ndarray, "n 7"]
    labels: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores per IoU threshold (rows) and class (columns); NaN for classes without ground truth.

    Attributes:
        class_names: Names of the classes.
        iou_thresholds: IoU that a hit must exceed.
        average_precision: Area under the precision-recall curve.
        average_recall: Recall when every detection counts.
        num_ground_truth: Ground-truth boxes of each class.
    """

    class_names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]
    average_precision: Float[np.ndarray, "t c"]
    average_recall: Float[np.ndarray, "t c"]
    num_ground_truth: Int[np.ndarray, " c"]

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
        """Returns a plain text table: a row per class and one of the means, AP and AR in per cent."""
        width = max(len(name) for name in (*self.class_names, "class", "mean"))
        titles = [f"{kind}@{threshold:g}" for threshold in self.iou_thresholds for kind in ("AP", "AR")]
        scores = np.stack([self.average_precision, self.average_recall], axis=1).reshape(len(titles), -1).T
        means = np.stack([self.mean_average_precision, self.mean_average_recall], axis=1).reshape(-1)
        lines = [f"{'class':<{width}}  {'boxes':>6}" + "".join(f"{title:>9}" for title in titles)]
        rows = [*zip(self.class_names, self.num_ground_truth, scores, strict=True)]
        for name, count, values in (*rows, ("mean", self.num_ground_truth.sum(), means)):
            cells = "".join(f"{'-' if np.isnan(value) else f'{100 * value:.2f}':>9}" for value in values)
            lines.append(f"{name:<{width}}  {count:>6}{cells}")
        if self.classes_left_out:
            lines.append(f"Left out of the means, for want of ground truth: {', '.join(self.classes_left_out)}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and lists for JSON, None for NaN."""
        thresholds = [
            {
                "iou": threshold,
                "mAP": _none_if_nan(self.mean_average_precision[row]),
                "mAR": _none_if_nan(self.mean_average_recall[row]),
                "AP": self._by_class(self.average_precision[row]),
                "AR": self._by_class(self.average_recall[row]),
            }
            for row, threshold in enumerate(self.iou_thresholds)
        ]
        counts = [int(count) for count in self.num_ground_truth]
        return {
            "thresholds": thresholds,
            "num_ground_truth": dict(zip(self.class_names, counts, strict=True)),
            "classes_left_out": list(self.classes_left_out),
        }

    def _by_class(self, scores: np.ndarray) -> dict[str, float | None]:
        return {name: _none_if_nan(score) for name, score in zip(self.class_names, scores, strict=True)}


def evaluate_detections(
    detections: Sequence[Detections],
    ground_truth: Sequence[GroundTruth],
    class_names: Sequence[str],
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    *,
    rotated: bool,
) -> Evaluation:
    """Scores detections against ground truth.

    Per class, detections of all scans are taken by descending score. One is a hit if the ground-truth box of its
    class and scan that it overlaps most exceeds the threshold and was not hit before; duplicates are false positives.
    A class with ground truth that is never detected scores 0.

    Args:
        detections: What was found, one entry per scan.
        ground_truth: What is there, one entry per scan, in the same order.
        class_names: Names of the dataset's classes, by label.
        iou_thresholds: Volume IoU that a hit must exceed.
        rotated: Whether yaw counts in the overlap.

    Returns:
        The scores.

    Raises:
        ValueError: The numbers of scans differ, or a label has no class name.
    """
    if len(detections) != len(ground_truth):
        raise ValueError(
            f"{len(detections)} scans have detections and {len(ground_truth)} ground truth; give one entry per scan "
            "to both, empty where there is none."
        )
    num_classes = len(class_names)
    for scan, (found, there) in enumerate(zip(detections, ground_truth, strict=True)):
        for labels in (found.labels, there.labels):
            _check_labels(scan, labels, num_classes)
    counts = np.zeros(num_classes, np.int64)
    for there in ground_truth:
        counts += np.bincount(there.labels, minlength=num_classes)
    precision, recall = (np.full((len(iou_thresholds), num_classes), np.nan) for _ in range(2))
    overlaps = [
        iou_matrix(found.boxes, there.boxes, rotated=rotated)
        for found, there in zip(detections, ground_truth, strict=True)
    ]
    for label in np.flatnonzero(counts).tolist():
        per_scan = list(_class_overlaps(detections, ground_truth, overlaps, label))
        scores = np.concatenate([scores for scores, _ in per_scan])
        order = np.argsort(-scores, kind="stable")
        for row, threshold in enumerate(iou_thresholds):
            # A hit depends on the scan's own detections only, so scans are matched apart and merged by score.
            hits = np.concatenate([match(overlap, threshold) for _, overlap in per_scan])[order]
            curve = precision_recall(hits, int(counts[label]))
            precision[row, label] = average_precision(*curve)
            recall[row, label] = curve[1][-1] if len(hits) else 0.0
    return Evaluation(tuple(class_names), tuple(iou_thresholds), precision, recall, counts)


def _class_overlaps(
    detections: Sequence[Detections], ground_truth: Sequence[GroundTruth], overlaps: Sequence[np.ndarray], label: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores of one class by scan, descending, and the IoU with that class's ground truth."""
    for found, there, overlap in zip(detections, ground_truth, overlaps, strict=True):
        rows = np.flatnonzero(found.labels == label)
        rows = rows[np.argsort(-found.scores[rows], kind="stable")]
        yield found.scores[rows], overlap[np.ix_(rows, np.flatnonzero(there.labels == label))]


def _check_labels(scan: int, labels: np.ndarray, num_classes: int) -> None:
    if len(labels) and not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(
            f"Scan {scan} has labels from {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}, for "
            f"{num_classes} class names."
        )


def _mean_over_classes(scores: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    if not is_counted.any():
        return np.full(len(scores), np.nan)
    return scores[:, is_counted].mean(axis=1)


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
