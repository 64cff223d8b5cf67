"""Box functions, losses, assignment, suppression and evaluation against a file of reference numbers.

The file says which cases there are, how large and of how many classes; what a case is follows from its name's start.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from h2a2_jax.boxes import Detections, axis_aligned_diou, axis_aligned_iou, decode_boxes, rotated_iou
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation import evaluate_detections
from h2a2_jax.losses import assign, rotated_diou_loss, sigmoid_focal_loss
from tests.boxes.golden import boxes_of_corners, load_cases, relative_error
from tests.boxes.host_nms import bev_nms, multiclass_nms, overlap_matrix
from tests.boxes.tolerant_iou import PUBLISHED_TOLERANCE
from tests.evaluation.overlaps import iou_matrix
from tests.parity_case import CaseResult, guarded

Case = dict[str, np.ndarray]
Runner = Callable[[str, Case], Iterator[CaseResult]]

FUNCTION_TOLERANCE = 1e-5
"""Of the largest magnitude: values and gradients in float32."""

AXIS_ALIGNED_KINDS = ("scannet", "s3dis")
"""Datasets without yaw."""

AVERAGE_PRECISION_TOLERANCE = 1e-6


def run_boxes_file(path: str | Path) -> Iterator[CaseResult]:
    """Runs every case of a file; one that no runner knows fails as "<case> (not run)"."""
    for name, case in load_cases(path).items():
        runner = next((runner for pattern, runner in RUNNERS.items() if re.fullmatch(pattern, name)), None)
        if runner is None:
            yield CaseResult(f"{name} (not run)", float("nan"), 0.0, False)
        else:
            yield from guarded(name, runner(name, case))


def _function(name: str, actual, expected, tolerance: float = FUNCTION_TOLERANCE) -> CaseResult:
    return CaseResult.compare(name, relative_error(actual, expected), tolerance)


def _exact(name: str, actual, expected) -> CaseResult:
    """Error: entries that differ; all of them where the shapes do."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    same_shape = actual.shape == expected.shape
    return CaseResult.compare(name, np.sum(actual != expected) if same_shape else max(actual.size, expected.size), 0.0)


def _value_and_gradient(function, argument, weight):
    """Values, and the gradient of their weighted sum."""

    def weighted(x):
        values = function(x)
        return jnp.sum(values * weight), values

    gradient, values = jax.jit(jax.grad(weighted, has_aux=True))(argument)
    return values, gradient


def _seven_columns(boxes: np.ndarray) -> np.ndarray:
    return np.pad(boxes, ((0, 0), (0, 7 - boxes.shape[1])))


def _loss(name: str, case: Case, losses: dict[str, Callable]) -> Iterator[CaseResult]:
    for key, loss in losses.items():
        values, gradient = _value_and_gradient(loss, case["pred"], case["loss_weight"])
        yield _function(f"{name}.{key}_loss", values, case[f"{key}_loss"])
        yield _function(f"{name}.{key}_grad_pred", gradient, case[f"{key}_grad_pred"])


def _axis_aligned_loss(name: str, case: Case) -> Iterator[CaseResult]:
    target = boxes_of_corners(case["target"])
    yield from _loss(
        name,
        case,
        {
            "iou": lambda predicted: 1 - axis_aligned_iou(boxes_of_corners(predicted), target),
            "diou": lambda predicted: 1 - axis_aligned_diou(boxes_of_corners(predicted), target),
        },
    )


def _rotated_loss(name: str, case: Case) -> Iterator[CaseResult]:
    yield from _loss(
        name,
        case,
        {
            "iou": lambda predicted: 1 - rotated_iou(predicted, case["target"]),
            "diou": lambda predicted: rotated_diou_loss(predicted, case["target"], center_distance="published"),
        },
    )
    yield _function(f"{name}.exact_iou", jax.jit(rotated_iou)(case["pred"], case["target"]), case["exact_iou"])


def _rotated_degenerate(name: str, case: Case) -> Iterator[CaseResult]:
    # The reference's own float32 overlap of coinciding edges may be off; the polygons are what must be met. How far it
    # is off is granted to the loss that contains it.
    overlap = jax.jit(rotated_iou)(case["pred"], case["target"])
    yield _function(f"{name}.exact_iou", overlap, case["exact_iou"])
    slack = float(np.abs(case["iou"] - case["exact_iou"]).max())
    loss = jax.jit(partial(rotated_diou_loss, center_distance="published"))(case["pred"], case["target"])
    yield _function(f"{name}.diou_loss", loss, case["diou_loss"], FUNCTION_TOLERANCE + slack)


def _focal_loss(name: str, case: Case) -> Iterator[CaseResult]:
    num_classes = case["logits"].shape[1]
    labels = np.where(case["target"] == num_classes, -1, case["target"])

    def loss(logits):
        return sigmoid_focal_loss(logits, labels, gamma=float(case["gamma"]), alpha=float(case["alpha"]))

    values, gradient = _value_and_gradient(loss, case["logits"], case["loss_weight"])
    yield _function(f"{name}.loss", values, case["loss"])
    yield _function(f"{name}.grad_logits", gradient, case["grad_logits"])


def _decode(name: str, case: Case) -> Iterator[CaseResult]:
    columns = case["bbox"].shape[1]

    def decode(outputs):
        return decode_boxes(case["points"], outputs)[:, :columns]

    decoded, gradient = _value_and_gradient(decode, case["bbox_pred"], case["loss_weight"])
    yield _function(f"{name}.bbox", decoded, case["bbox"])
    yield _function(f"{name}.grad_bbox_pred", gradient, case["grad_bbox_pred"])


def _assign(name: str, case: Case) -> Iterator[CaseResult]:
    levels = sorted(key for key in case if key.startswith("points_level"))
    locations = np.concatenate([case[key] for key in levels])
    level = np.repeat(np.arange(len(levels), dtype=np.int32), [len(case[key]) for key in levels])
    top_k = int(case["pts_center_threshold"])
    result = jax.jit(assign, static_argnames="top_k")(
        locations,
        np.zeros_like(level),
        level,
        _seven_columns(case["gt_boxes"])[None],
        case["gt_labels"].astype(np.int32)[None],
        case["label2level"],
        top_k=top_k,
    )
    is_target = case["cls_targets"] < case["num_classes"]
    yield _exact(f"{name}.cls_targets", result.labels, np.where(is_target, case["cls_targets"], -1))
    box = np.asarray(result.box)
    if is_target.any() and len(case["gt_boxes"]):
        found = np.where((box >= 0)[:, None], case["gt_boxes"][box], np.nan)
        yield _exact(f"{name}.bbox_targets", found[is_target], case["bbox_targets"][is_target])
    rows = np.asarray(result.candidates)[np.asarray(result.positive)]
    yield _exact(f"{name}.positive", np.sort(rows), np.flatnonzero(is_target))


def _is_rotated(boxes: np.ndarray) -> bool:
    return boxes.shape[1] == 7 and bool(np.any(boxes[:, 6]))


def _nms(name: str, case: Case) -> Iterator[CaseResult]:
    # Boxes of axis-aligned datasets have a yaw here too, which is to be ignored: only the name tells.
    rotated = not name.endswith(AXIS_ALIGNED_KINDS)
    tolerance = PUBLISHED_TOLERANCE if rotated else 0.0
    overlaps = overlap_matrix(case["boxes"], rotated=rotated, corner_tolerance=tolerance)
    error = np.abs(overlaps - case["bev_iou_matrix"]).max(initial=0)
    yield CaseResult.compare(f"{name}.bev_iou_matrix", error, FUNCTION_TOLERANCE)
    for key in sorted(key for key in case if key.startswith("keep_")):
        threshold = float(key.removeprefix("keep_").replace("p", "."))
        kept = bev_nms(case["boxes"], case["scores"], threshold, rotated=rotated, corner_tolerance=tolerance)
        yield _exact(f"{name}.{key}", kept, case[key])


def _multiclass_nms(name: str, case: Case) -> Iterator[CaseResult]:
    columns = case["boxes"].shape[1]
    rotated = columns == 7
    found = multiclass_nms(
        _seven_columns(case["boxes"]),
        case["scores"],
        score_threshold=float(case["score_thr"]),
        iou_threshold=float(case["iou_thr"]),
        rotated=rotated,
        corner_tolerance=PUBLISHED_TOLERANCE if rotated else 0.0,
    )
    yield _exact(f"{name}.out_boxes", found.boxes[:, :columns], case["out_boxes"])
    yield _exact(f"{name}.out_scores", found.scores, case["out_scores"])
    yield _exact(f"{name}.out_labels", found.labels, case["out_labels"])


MEAN_OF = {"mAP": "AP", "mAR": "recall"}


def _mean_over_classes(scores: np.ndarray) -> np.ndarray:
    is_counted = ~np.isnan(scores)
    return np.where(is_counted, scores, 0).sum(axis=1) / np.maximum(is_counted.sum(axis=1), 1)


def _eval(name: str, case: Case) -> Iterator[CaseResult]:
    rotated = _is_rotated(case["gt_boxes"]) or _is_rotated(case["det_boxes"])
    scans = range(int(case["num_scenes"]))
    found_in, there_in = ([case[key] == scan for scan in scans] for key in ("det_scene", "gt_scene"))
    detections = [
        Detections(case["det_boxes"][rows], case["det_scores"][rows], case["det_labels"][rows]) for rows in found_in
    ]
    ground_truth = [GroundTruth(case["gt_boxes"][rows], case["gt_labels"][rows]) for rows in there_in]
    thresholds = [float(value) for value in case["iou_thresholds"]]
    names = [f"class {label}" for label in range(int(case["num_classes"]))]
    scores = evaluate_detections(detections, ground_truth, names, thresholds, rotated=rotated)
    for key, actual in (
        ("AP", scores.average_precision),
        ("recall", scores.average_recall),
        ("mAP", scores.mean_average_precision),
        ("mAR", scores.mean_average_recall),
    ):
        expected = case[key]
        if key in ("mAP", "mAR"):
            # A class predicted but never there turns the reference's mean into NaN; here it is left out.
            expected = np.where(np.isnan(expected), _mean_over_classes(case[MEAN_OF[key]]), expected)
        # A class without ground truth is NaN on both sides; a NaN on one side only fails.
        same = np.isnan(actual) == np.isnan(expected)
        error = np.nan_to_num(np.abs(actual - expected)).max() if same.all() else np.inf
        yield CaseResult.compare(f"{name}.{key}", error, AVERAGE_PRECISION_TOLERANCE)
    for key in sorted(key for key in case if re.fullmatch(r"iou_scene\d+_exact", key)):
        scan = int(re.findall(r"\d+", key)[0])
        overlaps = iou_matrix(detections[scan].boxes, ground_truth[scan].boxes, rotated=rotated)
        yield CaseResult.compare(f"{name}.{key}", np.abs(overlaps - case[key]).max(initial=0), FUNCTION_TOLERANCE)


RUNNERS: dict[str, Runner] = {
    "axis_aligned_loss": _axis_aligned_loss,
    "rotated_loss": _rotated_loss,
    "rotated_degenerate": _rotated_degenerate,
    "focal_loss": _focal_loss,
    "decode_.*": _decode,
    "assign_.*": _assign,
    "nms_.*": _nms,
    "multiclass_nms_.*": _multiclass_nms,
    "eval_.*": _eval,
}
"""What runs a case, by a pattern of its name."""
