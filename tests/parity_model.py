"""`model_*` files: a whole TR3D, stage by stage, its predictions and one training step."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.boxes import Detections, decode_boxes, detections_from_predictions
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.losses import assign, axis_aligned_diou_loss, detection_loss, rotated_diou_loss
from h2a2_jax.models import TR3D, DetectorConfig, DetectorPlan, HeadConfig, Predictions, detector_tables, pad_plan
from h2a2_jax.models.architecture import STAGE_BLOCKS
from h2a2_jax.models.tr3d_weights import tr3d_slots
from h2a2_jax.models.weight_slots import export_slots, load_slots
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD, DatasetSpec
from h2a2_jax.sparse import SparseTensor
from tests.parity_case import CaseResult, guarded
from tests.parity_ops import compare

STAGE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
FLOAT64_TOLERANCE = 1e-6
"""The reference computed in float64 and stored float32."""
FLOAT32_GRADIENT_SITES = 20_000
"""Scans with more voxels have gradients compared in float64 only. Among so many sites some ReLU reads a
number within float32's rounding of zero: which side it falls on, and with it 0.4 % of a norm's gradient, is up to the
order in which a compiler sums."""
MATCHED_SHARE = 0.995
"""Share of predicted boxes that must have a counterpart: scores near a threshold come and go with rounding."""
MATCH_TOLERANCE = 1e-3

Stored = dict[str, np.ndarray]
_DETECTIONS = jax.jit(detections_from_predictions, static_argnames="rotated")


def weights_beside(path: Path) -> Path:
    """The weights file that goes with a model file."""
    parts = re.fullmatch(r"(?:model|(fcaf3d))(?:_batch\d+)?_(.+)", path.stem)
    name = "_".join(["weights", *filter(None, parts.groups())]) + ".npz" if parts else ""
    if not (path.parent / name).is_file():
        raise FileNotFoundError(f"{path} goes with {name or 'a weights_* file'} of the same folder, which is missing.")
    return path.parent / name


def run_model_file(path: Path) -> Iterator[CaseResult]:
    """Run a whole model on the stored scans and compare everything that the file holds."""
    stored, weights = load_arrays(path), load_arrays(weights_beside(path))
    golden = _Golden.build(stored, weights)
    for name, part in (("voxels", _voxels), ("evaluation", _evaluation), ("training", _training)):
        yield from guarded(name, part(golden))
    # A list, so that nothing else runs in float64.
    with jax.enable_x64(True):
        doubles = list(guarded("training", _training(golden.in_float64())))
    for result in doubles:
        yield replace(result, name=f"float64.{result.name}")


def load_arrays(path: Path) -> Stored:
    """Every array of a file."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


@dataclass(frozen=True)
class _Golden:
    stored: Stored
    spec: DatasetSpec
    model: TR3D
    sites: sparse.SiteSet
    rows: np.ndarray  # of our sorted sites, for each stored voxel
    features: jax.Array
    plan: DetectorPlan
    num_scans: int

    @classmethod
    def build(cls, stored: Stored, weights: Stored) -> "_Golden":
        spec = {s.num_classes: s for s in (SCANNET, SUNRGBD, S3DIS)}[weights["bbox_head.conv_cls.bias"].size]
        model = _build_model(weights)
        num_scans = len(np.atleast_1d(stored["num_points"]))
        sites = sparse.site_set(stored["voxel_coords"], num_scans=num_scans)
        rows = sites.lookup(stored["voxel_coords"])
        features = np.zeros_like(stored["voxel_feats"])
        features[rows] = stored["voxel_feats"]
        tables = detector_tables(sites)
        capacities = type(tables.sizes)(*(size + 64 for size in tables.sizes))
        plan = jax.tree.map(jnp.asarray, pad_plan(tables, capacities))
        padded = jnp.asarray(sparse.pad_rows(features, capacities.voxels))
        return cls(stored, spec, model, sites, rows, padded, plan, num_scans)

    def in_float64(self) -> "_Golden":
        """The same with parameters, running statistics and features in float64, inside `jax.enable_x64`."""
        graph, state = nnx.split(self.model)
        model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
        return replace(self, model=model, features=self.features.astype(jnp.float64))

    @property
    def is_float64(self) -> bool:
        return self.features.dtype == jnp.float64


def _build_model(weights: Stored) -> TR3D:
    blocks = tuple(
        1 + max(int(k.split(".")[2]) for k in weights if k.startswith(f"backbone.layer{s}.")) for s in (1, 2, 3, 4)
    )
    depth = {b: d for d, b in STAGE_BLOCKS.items()}[blocks]
    config = DetectorConfig(
        depth=depth,
        in_channels=weights["backbone.conv1.kernel"].shape[1],
        stem_channels=weights["backbone.conv1.kernel"].shape[2],
        stage_channels=tuple(weights[f"backbone.layer{s}.0.conv1.kernel"].shape[2] for s in (1, 2, 3, 4)),  # type: ignore[arg-type]
        neck_channels=weights["neck.out_block_0.0.kernel"].shape[2],
    )
    head = HeadConfig("golden", weights["bbox_head.conv_cls.bias"].size, weights["bbox_head.conv_reg.bias"].size)
    model = TR3D(config, [head], rngs=nnx.Rngs(0))
    load_slots(tr3d_slots(model), weights)
    stored = {name for name in weights if not name.endswith("num_batches_tracked")}
    if unmatched := stored ^ set(tr3d_slots(model)):
        raise ValueError(f"weights do not fit: left over or missing are {sorted(unmatched)}.")
    return model


def _voxels(golden: _Golden) -> Iterator[CaseResult]:
    stored = golden.stored
    if "points" in stored:
        clouds = np.split(stored["points"], np.cumsum(stored["num_points"])[:-1])
        voxels = sparse.voxelize([cloud[:, :3] for cloud in clouds], golden.model.config.voxel_size)
        yield compare("voxel_coords", voxels.sites.coords, golden.sites.coords, 0.0)
        yield compare("first_point_index", voxels.first_point[golden.rows], stored["first_point_index"], 0.0)


def _evaluation(golden: _Golden) -> Iterator[CaseResult]:
    graph, state = nnx.split(golden.model)

    @jax.jit
    def forward(state: Any, features: jax.Array, plan: DetectorPlan) -> tuple[Predictions, dict[str, Any]]:
        taps: dict[str, Any] = {}
        context = replace(ForwardContext(DatasetContext.one(0, 1)), tap=taps.__setitem__)
        return nnx.merge(graph, state)(features, plan, context), taps

    predictions, taps = jax.device_get(forward(state, golden.features, golden.plan))
    stages = [key.split(".")[0] for key in golden.stored if re.fullmatch(r"[^.]+\.stride", key)]
    for stage in stages:
        yield from compare_stage(golden.stored, stage, taps.get(stage))
    for level in sorted({m.group(1) for m in map(re.compile(r"head\.level(\d+)\.").match, golden.stored) if m}):
        for scan in range(golden.num_scans):
            yield from _head(golden, predictions, int(level), scan)
    for scan in range(golden.num_scans):
        if f"pred.scene{scan}.boxes" in golden.stored:
            yield from _predictions(golden, predictions, scan)


def compare_stage(
    stored: Stored, stage: str, value: SparseTensor | None, tolerance: float = STAGE_TOLERANCE
) -> Iterator[CaseResult]:
    """Sites of a stage and, where the file has them, all of its features or some rows and a summary of each channel."""
    if value is None:
        yield CaseResult(f"{stage} (not run)", float("inf"), 0.0, False)
        return
    n = int(value.sites.n)
    features, coords = np.asarray(value.features)[:n], np.asarray(value.sites.coords)[:n]
    like = stored.get(f"{stage}.coords_same_as")
    expected = stored[f"{stage if like is None else like}.coords"].astype(np.int32)
    yield compare(f"{stage}.coords", coords, expected, 0.0)
    yield compare(f"{stage}.stride", np.asarray(value.sites.stride), stored[f"{stage}.stride"], 0.0)
    if len(coords) != len(expected):
        return
    rows = stored.get(f"{stage}.rows", np.arange(n))
    yield compare(f"{stage}.feats", features[rows], stored[f"{stage}.feats"], tolerance)
    summaries = {"mean": features.mean(0), "std": features.std(0), "absmax": np.abs(features).max(0)}
    for name, summary in summaries.items():
        # Relative to the stage's largest value: a channel's mean may be a cancelled sum.
        expected_summary = stored[f"{stage}.channel_{name}"]
        scale = max(float(stored[f"{stage}.channel_absmax"].max()), 1e-30)
        error = float(np.abs(summary - expected_summary).max()) / scale
        yield CaseResult.compare(f"{stage}.channel_{name}", error, tolerance)


def _head(golden: _Golden, predictions: Predictions, level: int, scan: int) -> Iterator[CaseResult]:
    name = f"head.level{level}.scene{scan}"
    if f"{name}.points" not in golden.stored:
        return
    mine = (predictions.scan == scan) & (predictions.level == level)
    yield compare(f"{name}.num_points", np.asarray(mine.sum()), golden.stored[f"{name}.num_points"], 0.0)
    rows = golden.stored.get(f"{name}.rows", np.arange(mine.sum()))
    outputs = golden.spec.num_outputs
    values = {
        "points": predictions.locations[mine][rows],
        "bbox_pred": predictions.boxes[mine][rows, :outputs],
        "cls_pred": predictions.logits[mine][rows],
    }
    for key, value in values.items():
        yield compare(f"{name}.{key}", value, golden.stored[f"{name}.{key}"], STAGE_TOLERANCE)


def _predictions(golden: _Golden, predictions: Predictions, scan: int) -> Iterator[CaseResult]:
    stored, name = golden.stored, f"pred.scene{scan}"
    mine = predictions.scan == scan
    spec, width = golden.spec, stored[f"{name}.boxes"].shape[1]
    outputs, logits = predictions.boxes[:, : spec.num_outputs], predictions.logits[:, : spec.num_classes]
    *arrays, count = _DETECTIONS(predictions.locations, mine, outputs, logits, rotated=spec.has_yaw)
    found = Detections(*(np.asarray(array)[: int(count)] for array in arrays))
    share = min(
        matched_share(stored[f"{name}.boxes"], stored[f"{name}.scores"], stored[f"{name}.labels"],
                 found.boxes[:, :width], found.scores, found.labels),
        matched_share(found.boxes[:, :width], found.scores, found.labels,
                 stored[f"{name}.boxes"], stored[f"{name}.scores"], stored[f"{name}.labels"]),
    )  # fmt: skip
    missed = 1 - share
    yield CaseResult(f"{name} (share of boxes unmatched)", missed, 1 - MATCHED_SHARE, missed <= 1 - MATCHED_SHARE)


def matched_share(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, *other: np.ndarray) -> float:
    """Share of boxes that have one of the same label, score and box among the others, each used once."""
    other_boxes, other_scores, other_labels = other
    free = np.ones(len(other_boxes), bool)
    matched = 0
    for box, score, label in zip(boxes, scores, labels, strict=True):
        near = np.flatnonzero(free & (other_labels == label) & (np.abs(other_scores - score) <= MATCH_TOLERANCE))
        error = np.abs(_turns(other_boxes[near], box)).max(1) if len(near) else np.zeros(0)
        if len(near) and error.min() <= MATCH_TOLERANCE:
            free[near[error.argmin()]] = False
            matched += 1
    return matched / max(len(boxes), 1)


def _turns(others: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Differences of boxes, yaw modulo a turn."""
    difference = others - box
    if difference.shape[1] == 7:
        difference[:, 6] = (difference[:, 6] + np.pi) % (2 * np.pi) - np.pi
    return difference


def _training(golden: _Golden) -> Iterator[CaseResult]:
    """One step; in float64 within its tolerance, else within that of stages and gradients."""
    stored, spec = golden.stored, golden.spec
    tolerance = FLOAT64_TOLERANCE if golden.is_float64 else STAGE_TOLERANCE
    gradient_tolerance = FLOAT64_TOLERANCE if golden.is_float64 else GRADIENT_TOLERANCE
    if "train.bbox_loss" not in stored:
        return
    graph, params, stats = nnx.split(golden.model, nnx.Param, nnx.BatchStat)
    boxes, labels = _ground_truth(golden)
    context = ForwardContext(DatasetContext.one(0, 1), training=True)

    def loss(params: Any, features: jax.Array) -> tuple[jax.Array, tuple]:
        model = nnx.merge(graph, params, stats, copy=True)
        predictions = model(features, golden.plan, context)
        published = detection_loss(
            locations=predictions.locations,
            scan=predictions.scan,
            level=predictions.level,
            regression=predictions.boxes,
            logits=predictions.logits,
            boxes=boxes,
            box_labels=labels,
            label_to_level=jnp.asarray(spec.label_to_level, jnp.int32),
            class_mask=jnp.ones(spec.num_classes, bool),
            has_yaw=jnp.asarray(spec.has_yaw),
            center_distance="published",
        )
        return published.total, (published, predictions, nnx.state(model, nnx.BatchStat))

    with_gradients = golden.is_float64 or len(golden.sites) <= FLOAT32_GRADIENT_SITES
    if with_gradients:
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (losses, predictions, new_stats)), (grads, grad_input) = step(params, golden.features)
        exported = export_slots(tr3d_slots(nnx.merge(graph, grads, stats)))
        yield from _gradients(stored, exported, np.asarray(grad_input)[golden.rows], gradient_tolerance)
    else:
        losses, predictions, new_stats = jax.jit(loss)(params, golden.features)[1]
    yield compare("train.bbox_loss", losses.box, stored["train.bbox_loss"], tolerance)
    yield compare("train.cls_loss", losses.classification, stored["train.cls_loss"], tolerance)
    yield compare("train.num_pos", np.asarray(losses.num_positives, np.int32), stored["train.num_pos"], 0.0)
    yield from _positives(golden, jax.device_get(predictions), boxes, labels, tolerance)
    after = export_slots(tr3d_slots(nnx.merge(graph, params, new_stats)))
    for key in stored:
        if key.startswith("train.after."):
            yield compare(key, after[key.removeprefix("train.after.")], stored[key], tolerance)


def _ground_truth(golden: _Golden) -> tuple[jax.Array, jax.Array]:
    per_scan = [golden.stored[f"gt.scene{i}.boxes"] for i in range(golden.num_scans)]
    most = max(1, *(len(b) for b in per_scan))
    boxes = np.zeros((golden.num_scans, most, 7), np.float32)
    labels = np.full((golden.num_scans, most), -1, np.int32)
    for i, scan_boxes in enumerate(per_scan):
        boxes[i, : len(scan_boxes), : scan_boxes.shape[1]] = scan_boxes
        labels[i, : len(scan_boxes)] = golden.stored[f"gt.scene{i}.labels"]
    return jnp.asarray(boxes), jnp.asarray(labels)


def _positives(
    golden: _Golden, predictions: Predictions, boxes: jax.Array, box_labels: jax.Array, tolerance: float
) -> Iterator[CaseResult]:
    levels = jnp.asarray(golden.spec.label_to_level, jnp.int32)
    at = (jnp.asarray(predictions.locations), jnp.asarray(predictions.scan), jnp.asarray(predictions.level))
    assignment = jax.jit(assign)(*at, boxes, box_labels, levels)
    assigned_labels, assigned_box = np.asarray(assignment.labels), np.asarray(assignment.box)
    outputs = golden.spec.num_outputs
    found = np.flatnonzero((predictions.scan < golden.num_scans) & (assigned_labels >= 0))  # all scans at once
    decoded, targets, losses = (np.zeros((len(assigned_labels), *shape), predictions.boxes.dtype)
                                for shape in ((7,), (7,), ()))  # fmt: skip
    targets[found] = np.asarray(boxes)[predictions.scan[found], assigned_box[found]]
    decoded[found], losses[found] = jax.jit(partial(_decode_and_compare, golden.spec))(
        predictions.locations[found], predictions.boxes[found, :outputs], targets[found]
    )
    for scan in range(golden.num_scans):
        name = f"train.scene{scan}"
        mine = np.flatnonzero(predictions.scan == scan)
        positive = np.flatnonzero(assigned_labels[mine] >= 0)
        yield compare(f"{name}.pos_index", positive, golden.stored[f"{name}.pos_index"], 0.0)
        if len(positive) != len(golden.stored[f"{name}.pos_index"]):
            continue
        rows = mine[positive]
        values = {
            "points_pos": predictions.locations[rows],
            "pos_cls_targets": assigned_labels[rows],
            "pos_bbox_targets": targets[rows],
            "pos_bbox_pred": predictions.boxes[rows, :outputs],
            "pos_cls_pred": predictions.logits[rows],
            "pos_decoded": decoded[rows],
            "pos_bbox_loss": losses[rows],
        }
        for key, value in values.items():
            expected = golden.stored[f"{name}.{key}"]
            value = value[:, : expected.shape[1]] if expected.ndim == 2 else value
            yield compare(f"{name}.{key}", value, expected, tolerance)


def _decode_and_compare(
    spec: DatasetSpec, locations: jax.Array, outputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    decoded = decode_boxes(locations, outputs)
    if spec.has_yaw:
        return decoded, rotated_diou_loss(decoded, targets, center_distance="published")
    return decoded, axis_aligned_diou_loss(decoded, targets)


def _gradients(stored: Stored, grads: Stored, grad_voxels: np.ndarray, tolerance: float) -> Iterator[CaseResult]:
    total = np.sqrt(sum(np.square(grads[str(name)], dtype=np.float64).sum() for name in stored["train.grad_names"]))
    yield compare("train.total_grad_norm", total, stored["train.total_grad_norm"], tolerance)
    for name, expected in zip(stored["train.grad_names"], stored["train.grad_norms"], strict=True):
        norm = np.linalg.norm(grads[str(name)])
        yield compare(f"train.grad_norm.{name}", norm, expected, tolerance)
        if f"train.grad.{name}" in stored:
            full = stored[f"train.grad.{name}"]
            yield compare(f"train.grad.{name}", grads[str(name)], full, tolerance)
    norm = np.linalg.norm(grad_voxels)
    yield compare("train.grad_input_norm", norm, stored["train.grad_input_norm"], tolerance)
    first = stored["train.grad_input_first2000"]
    yield compare("train.grad_input_first2000", grad_voxels[: len(first)], first, tolerance)
