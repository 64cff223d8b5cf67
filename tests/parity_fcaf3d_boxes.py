"""Decoding, assignment, losses and predictions of FCAF3D against reference numbers.

Unit cases of `ops_fcaf3d_*` by a pattern of their names (`RUNNERS`), and what follows in a `fcaf3d_*` file from the
outputs of the head: decoded boxes, predictions, targets, losses.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from h2a2_jax.boxes import (
    decode_faces,
    detections_from_centerness,
    face_distances,
)
from h2a2_jax.losses import DetectionLoss, assign_by_centerness, centerness, centerness_loss
from h2a2_jax.losses.assignment import Assignment
from h2a2_jax.losses.centerness import loss_of_assignment
from h2a2_jax.models import Predictions
from tests.parity_case import CaseResult
from tests.parity_model import matched_share
from tests.parity_ops import compare

FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-6
"""The reference computed in float64 and stored float32."""

Stored = Mapping[str, np.ndarray]


def in_float64(case: Stored) -> dict[str, np.ndarray]:
    """The case with its numbers in float64, to be run inside `jax.enable_x64`."""
    return {key: value.astype(np.float64) if value.dtype == np.float32 else value for key, value in case.items()}


def run_case(name: str, case: Stored) -> Iterator[CaseResult] | None:
    """Every comparison of a unit case in float32 and in float64; None for a case that is not of this file."""
    runner = next((runner for pattern, runner in RUNNERS.items() if re.fullmatch(pattern, name)), None)
    return None if runner is None else _in_both_types(runner, name, case)


def _in_both_types(runner: Callable[..., Iterator[CaseResult]], name: str, case: Stored) -> Iterator[CaseResult]:
    yield from runner(name, case, FLOAT32_TOLERANCE)
    with jax.enable_x64(True):
        doubles = list(runner(f"float64.{name}", in_float64(case), FLOAT64_TOLERANCE))
    yield from doubles


def _padded(table: np.ndarray, width: int) -> np.ndarray:
    return np.pad(table, ((0, 0), (0, width - table.shape[1])))


def _faces(name: str, case: Stored, tolerance: float) -> Iterator[CaseResult]:
    distances = jax.jit(face_distances)(case["points"][:, None], case["boxes"][None])
    central = jax.jit(centerness)(distances)
    yield compare(f"{name}.distances", distances, case["distances"], tolerance)
    yield compare(f"{name}.inside", np.asarray(central) >= 0, case["inside"], 0.0)
    yield compare(f"{name}.centerness", central, case["centerness"], tolerance)


def _decode(name: str, case: Stored, tolerance: float) -> Iterator[CaseResult]:
    width = case["bbox"].shape[1]

    @jax.jit
    def decode(outputs: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        boxes, pull = jax.vjp(lambda outputs: decode_faces(case["points"], outputs)[:, :width], outputs)
        return boxes, pull(weight)[0]

    boxes, gradient = decode(case["bbox_pred"], case["loss_weight"])
    yield compare(f"{name}.bbox", boxes, case["bbox"], tolerance)
    yield compare(f"{name}.grad_bbox_pred", gradient, case["grad_bbox_pred"], tolerance)


def _assign(name: str, case: Stored, tolerance: float) -> Iterator[CaseResult]:
    levels = [case[f"points_level{i}"] for i in range(4)]
    level = np.repeat(np.arange(4, dtype=np.int32), [len(points) for points in levels])
    points, boxes = np.concatenate(levels), _padded(case["gt_boxes"], 7)
    found = _assigned(
        points, np.zeros_like(level), level, boxes[None], case["gt_labels"][None],
        int(case["pts_assign_threshold"]), int(case["pts_center_threshold"]),
    )  # fmt: skip
    yield from _targets(name, found, slice(None), 0, case, case["gt_boxes"], tolerance, prefix="")


def _assigned(
    points: np.ndarray, scan: np.ndarray, level: np.ndarray, boxes: np.ndarray, labels: np.ndarray, *thresholds: int
) -> Assignment:
    """Targets after `jax.jit`, on the host."""
    assign_threshold, center_threshold = thresholds
    assign = partial(assign_by_centerness, assign_threshold=assign_threshold, center_threshold=center_threshold)
    return jax.device_get(jax.jit(assign)(points, scan, level, boxes, labels.astype(np.int32)))


def _targets(
    name: str,
    found: Assignment,
    rows: np.ndarray | slice,
    scan: int,
    stored: Stored,
    boxes: np.ndarray,
    tolerance: float,
    *,
    prefix: str,
) -> Iterator[CaseResult]:
    """Targets of one scan; `rows` are those of the scan, in the order of the file."""
    labels, box = found.labels[rows], found.box[rows]
    positive = np.flatnonzero(labels >= 0).astype(np.int32)
    yield compare(f"{name}.cls_targets", labels, stored["cls_targets"], 0.0)
    yield compare(f"{name}.pos", positive, stored["pos"], 0.0)
    yield compare(f"{name}.bbox_targets", boxes[box[positive]], stored[f"{prefix}bbox_targets"], tolerance)
    central = np.full(len(found.labels), -1.0)
    got = found.positive[scan]
    central[found.candidates[scan][got]] = found.centerness[scan][got]
    yield compare(f"{name}.center_targets", central[rows][positive], stored[f"{prefix}center_targets"], tolerance)


def _loss(name: str, case: Stored, tolerance: float) -> Iterator[CaseResult]:
    """One scan whose targets are given: each positive stands for a box of its own."""
    outputs, count = case["bbox_pred"].shape[1], len(case["points"])
    positive = np.flatnonzero(case["cls_targets"] >= 0)
    rows = np.append(positive, count).astype(np.int32)[None, :, None]
    dtype = case["points"].dtype
    assignment = Assignment(
        labels=case["cls_targets"].astype(np.int32),
        box=np.full(count, -1, np.int32),
        candidates=rows,
        positive=rows < count,
        centerness=np.append(case["center_targets"][positive], -1).astype(dtype)[None, :, None],
    )
    boxes = np.concatenate([_padded(case["bbox_targets"], 7)[positive], np.zeros((1, 7), dtype)])[None]

    def loss(center: jax.Array, box: jax.Array, classes: jax.Array) -> tuple[jax.Array, DetectionLoss]:
        terms = loss_of_assignment(
            case["points"], np.zeros(count, np.int32), jnp.pad(box, ((0, 0), (0, 8 - outputs))), classes, center[:, 0],
            boxes, assignment, np.ones(classes.shape[1], bool), jnp.asarray(outputs == 8), np.ones(1, bool),
        )  # fmt: skip
        return terms.total, terms

    keys = ("center_pred", "bbox_pred", "cls_pred")
    gradients, terms = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*(case[key] for key in keys))
    yield from _terms(name, terms, case, tolerance)
    for key, gradient in zip(keys, gradients, strict=True):
        yield compare(f"{name}.grad_{key}", gradient, case[f"grad_{key}"], tolerance)


def _terms(name: str, terms: DetectionLoss, stored: Stored, tolerance: float) -> Iterator[CaseResult]:
    for key, value in (("center", terms.centerness), ("bbox", terms.box), ("cls", terms.classification)):
        yield compare(f"{name}.{key}_loss", value, stored[f"{key}_loss"], tolerance)


RUNNERS: dict[str, Callable[[str, Stored, float], Iterator[CaseResult]]] = {
    "faces": _faces,
    "decode_.*": _decode,
    "assign_.*": _assign,
    "loss_.*": _loss,
}
"""What runs a unit case, by a pattern of its name."""


def under(stored: Stored, prefix: str) -> dict[str, np.ndarray]:
    """Entries whose keys start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}


def stored_predictions(stored: Stored, mode: str, padding: int = 5) -> Predictions:
    """Head outputs of a file as `Predictions`: levels from the finest, each with rows of padding behind it."""
    num_scans = len(stored["num_points"])
    parts = []
    for level in range(4):
        head = under(stored, f"{mode}.head_{level}.")
        scan = stored[_coordinates(stored, f"{mode}.head_{level}")][:, 0].astype(np.int32)
        part = Predictions(
            head["points"], scan, np.full(len(scan), level, np.int32), _padded(head["bbox"], 8), head["cls"],
            head["center"][:, 0],
        )  # fmt: skip
        fill = Predictions(0, num_scans, level, 1, 7, 7)
        parts.append(
            [
                np.pad(table, [(0, padding), *[(0, 0)] * (table.ndim - 1)], constant_values=value)
                for table, value in zip(part[:6], fill[:6], strict=True)
            ]
        )
    return Predictions(*(np.concatenate(tables) for tables in zip(*parts, strict=True)))


def _coordinates(stored: Stored, stage: str) -> str:
    like = f"{stage}.coords_same_as"
    return _coordinates(stored, str(stored[like])) if like in stored else f"{stage}.coords"


def ground_truth(stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [B, G, 7] and labels [B, G] of the scans of a file, padded with label -1."""
    scans = [under(stored, f"gt.scene{i}.") for i in range(len(stored["num_points"]))]
    most = 2 + max(len(scan["labels"]) for scan in scans)
    boxes = [np.pad(_padded(scan["boxes"], 7), ((0, most - len(scan["boxes"])), (0, 0))) for scan in scans]
    labels = [np.pad(scan["labels"], (0, most - len(scan["labels"])), constant_values=-1) for scan in scans]
    return np.stack(boxes), np.stack(labels).astype(np.int32)


def compare_training(stored: Stored, predictions: Predictions, tolerance: float) -> Iterator[CaseResult]:
    """Targets and losses that follow from head outputs in training mode, against those of a file."""
    thresholds = {f"{key}_threshold": int(stored[f"config.pts_{key}_threshold"]) for key in ("assign", "center")}
    boxes, labels = ground_truth(stored)
    has_yaw = int(stored["config.num_reg_outs"]) == 8
    at = (predictions.locations, predictions.scan, predictions.level)
    outputs = (predictions.boxes, predictions.logits, predictions.centerness)
    rest = (np.ones(predictions.logits.shape[1], bool), np.asarray(has_yaw))
    num_scans = len(boxes)
    found = _assigned(*at, boxes, labels, *thresholds.values())
    for scan in range(num_scans):
        name = f"train.scene{scan}"
        expected, rows = under(stored, f"{name}."), np.flatnonzero(np.asarray(predictions.scan) == scan)
        width = expected["pos_bbox_targets"].shape[1]
        yield from _targets(name, found, rows, scan, expected, boxes[scan, :, :width], tolerance, prefix="pos_")
        rows = rows[expected["pos"]]
        decoded = decode_faces(predictions.locations[rows], predictions.boxes[rows, : 8 if has_yaw else 6])
        yield compare(f"{name}.pos_decoded", decoded[:, :width], expected["pos_decoded"], tolerance)
    loss = jax.jit(partial(centerness_loss, **thresholds))
    each = {f"train.scene{scan}": np.arange(num_scans) == scan for scan in range(num_scans)}
    for name, is_scan in {"train": np.ones(num_scans, bool), **each}.items():
        terms = loss(*at, *outputs, boxes, labels, *rest, is_scan)
        yield from _terms(name, terms, under(stored, f"{name}."), tolerance)


def compare_evaluation(
    stored: Stored, predictions: Predictions, tolerance: float, flips: int = 0
) -> Iterator[CaseResult]:
    """Decoded boxes and predictions that follow from head outputs in evaluation mode, against those of a file.

    Number, order and labels of the predictions must be equal. With `flips`, for head outputs in float32, whose rounding
    swaps neighbours and moves boxes over a threshold, all but that many must have a counterpart (`matched_share`).
    """
    rotated = int(stored["config.num_reg_outs"]) == 8
    outputs, width = predictions.boxes[:, : 8 if rotated else 6], 7 if rotated else 6
    scan, level = np.asarray(predictions.scan), np.asarray(predictions.level)
    decoded = np.asarray(jax.jit(decode_faces)(predictions.locations, outputs))[:, :width]
    num_scans = len(stored["num_points"])
    for i in range(4):
        mine = (level == i) & (scan < num_scans)
        yield compare(f"eval.head_{i}.boxes", decoded[mine], stored[f"eval.head_{i}.boxes"], tolerance)
    for most in (100, 1000):
        detect = jax.jit(partial(detections_from_centerness, rotated=rotated, max_candidates=most))
        for i in range(num_scans):
            *found, count = detect(
                predictions.locations, scan == i, level, outputs, predictions.logits, predictions.centerness,
                score_threshold=stored["config.score_thr"], iou_threshold=stored["config.iou_thr"],
            )  # fmt: skip
            boxes, scores, labels = (np.asarray(table)[: int(count)] for table in found)
            found = {"boxes": boxes[:, :width], "scores": scores, "labels": labels}
            name = f"pred{most}.scene{i}"
            yield from _detections(name, found, under(stored, f"{name}."), tolerance, flips)


def _detections(name: str, found: Stored, expected: Stored, tolerance: float, flips: int) -> Iterator[CaseResult]:
    if flips:
        ours, theirs = ([table[key] for key in ("boxes", "scores", "labels")] for table in (found, expected))
        missed = [(1 - matched_share(*a, *b)) * len(a[2]) for a, b in ((ours, theirs), (theirs, ours))]
        yield CaseResult.compare(f"{name} (boxes without a counterpart)", round(max(missed)), flips)
        return
    yield compare(f"{name}.labels", found["labels"], expected["labels"], 0.0)
    yield compare(f"{name}.scores", found["scores"], expected["scores"], tolerance)
    yield compare(f"{name}.boxes", found["boxes"], expected["boxes"], tolerance)
