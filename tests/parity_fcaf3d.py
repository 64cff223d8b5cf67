"""`fcaf3d_*` files: a whole FCAF3D, stage by stage, with what it prunes; and the cases of `ops_fcaf3d_*` for sites."""

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
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.losses import centerness_loss
from h2a2_jax.models import (
    FCAF3D,
    DetectorConfig,
    FCAF3DPlan,
    HeadConfig,
    PlanLayout,
    Predictions,
    fcaf3d_tables,
    pad_fcaf3d,
)
from h2a2_jax.models.fcaf3d_maps import ChildMaps
from h2a2_jax.models.fcaf3d_neck import UpBlock
from h2a2_jax.models.fcaf3d_weights import fcaf3d_of_weights, fcaf3d_slots
from h2a2_jax.models.weight_slots import conv_norm_slots, export_slots, load_slots
from h2a2_jax.sparse import SparseTensor
from tests.parity_case import CaseResult, guarded
from tests.parity_fcaf3d_boxes import compare_evaluation, compare_training, ground_truth, run_case, under
from tests.parity_model import compare_stage, load_arrays, weights_beside
from tests.parity_ops import compare

TOLERANCES = {"eval": 2e-5, "train": 2e-4}
"""Largest error allowed in float32 by mode, as a fraction of the largest value: what FORMAT_FCAF3D.txt suggests."""
GRADIENT_TOLERANCE = 1e-3
FLOAT64_TOLERANCE = 1e-6
"""The reference computed in float64 and stored float32."""

Stored = dict[str, np.ndarray]


def run_fcaf3d_file(path: Path) -> Iterator[CaseResult]:
    """Run a whole model on the stored scans, in both modes and types, and compare everything that the file holds."""
    golden = Golden.load(path)
    yield from guarded("voxels", _voxels(golden))
    yield from guarded("eval", evaluation(golden))
    yield from guarded("train", training(golden))
    # A list, so that nothing else runs in float64.
    with jax.enable_x64(True):
        wide = golden.in_float64()
        doubles = [*guarded("eval", evaluation(wide)), *guarded("train", training(wide))]
    for result in doubles:
        yield replace(result, name=f"float64.{result.name}")


@dataclass(frozen=True)
class Golden:
    """A stored batch, and the detector with the stored weights.

    Attributes:
        stored: arrays of the file.
        model: the detector.
        sites: voxels of the batch.
        rows: for each stored voxel the row of `sites`.
        features: padded rows of the voxels.
        plans: plan by mode: in evaluation every level may be pruned, so that the maps of the finer ones are made inside
            jit; in training capacities are tight, and the host makes what it can.
    """

    stored: Stored
    model: FCAF3D
    sites: sparse.SiteSet
    rows: np.ndarray
    features: jax.Array
    plans: dict[str, FCAF3DPlan]

    @classmethod
    def load(cls, path: Path) -> "Golden":
        """Read a file and the weights beside it, and make the maps of the batch."""
        stored = load_arrays(path)
        model = _build_model(stored, load_arrays(weights_beside(path)))
        num_scans = len(stored["num_points"])
        sites = sparse.site_set(stored["voxel_coords"], num_scans=num_scans)
        rows = sites.lookup(stored["voxel_coords"])
        features = np.zeros_like(stored["voxel_feats"])
        features[rows] = stored["voxel_feats"]
        most = model.config.prune_threshold
        tables, layout = fcaf3d_tables(sites, most), PlanLayout("any", model.config)
        sizes = tables.sizes
        least = {"eval": most + 1, "train": 0}
        plans = {
            mode: pad_fcaf3d(tables, type(sizes)(sizes.voxels, *(max(s + 32, few) for s in sizes[1:])), layout)
            for mode, few in least.items()
        }
        return cls(stored, model, sites, rows, jnp.asarray(features), jax.tree.map(jnp.asarray, plans))

    def in_float64(self) -> "Golden":
        """The same with parameters, running statistics and features in float64, inside `jax.enable_x64`."""
        graph, state = nnx.split(self.model)
        model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
        return replace(self, model=model, features=self.features.astype(jnp.float64))

    @property
    def is_float64(self) -> bool:
        """True after `in_float64`."""
        return self.features.dtype == jnp.float64

    def tolerance(self, mode: str) -> float:
        """Largest error allowed in a mode, as a fraction of the largest value."""
        return FLOAT64_TOLERANCE if self.is_float64 else TOLERANCES[mode]


def _build_model(stored: Stored, weights: Stored) -> FCAF3D:
    config = replace(
        fcaf3d_of_weights(weights),
        voxel_size=float(stored["config.voxel_size"]),
        prune_threshold=int(stored["config.pts_prune_threshold"]),
        assign_threshold=int(stored["config.pts_assign_threshold"]),
        center_threshold=int(stored["config.pts_center_threshold"]),
    )
    head = HeadConfig("golden", int(stored["config.num_classes"]), int(stored["config.num_reg_outs"]))
    model = FCAF3D(config, [head], rngs=nnx.Rngs(0))
    load_slots(fcaf3d_slots(model), weights)
    if unmatched := {name for name in weights if not name.endswith("num_batches_tracked")} ^ set(fcaf3d_slots(model)):
        raise ValueError(f"weights do not fit: left over or missing are {sorted(unmatched)}.")
    return model


def _voxels(golden: Golden) -> Iterator[CaseResult]:
    stored = golden.stored
    clouds = np.split(stored["points"], np.cumsum(stored["num_points"])[:-1])
    voxels = sparse.voxelize([cloud[:, :3] for cloud in clouds], golden.model.config.voxel_size)
    yield compare("voxel_coords", voxels.sites.coords, golden.sites.coords, 0.0)
    yield compare("first_point_index", voxels.first_point[golden.rows], stored["first_point_index"], 0.0)


def evaluation(golden: Golden) -> Iterator[CaseResult]:
    """A forward pass with the running statistics; the boxes that follow are compared in float64, which flips none."""
    graph, state = nnx.split(golden.model)

    @jax.jit
    def forward(state: nnx.State, features: jax.Array) -> tuple[Predictions, dict[str, Any]]:
        taps: dict[str, Any] = {}
        context = ForwardContext(DatasetContext.one(0, 1), tap=taps.__setitem__)
        return nnx.merge(graph, state)(features, golden.plans["eval"], context), taps

    predictions, taps = jax.device_get(forward(state, golden.features))
    yield from _pass(golden, "eval", predictions, taps)
    if golden.is_float64:
        yield from compare_evaluation(golden.stored, predictions, FLOAT64_TOLERANCE)


def training(golden: Golden) -> Iterator[CaseResult]:
    """One step: the pass with the statistics of the batch, targets, losses, gradients, and the running statistics."""
    stored, tolerance = golden.stored, golden.tolerance("train")
    graph, params, stats = nnx.split(golden.model, nnx.Param, nnx.BatchStat)
    config, (boxes, labels) = golden.model.config, ground_truth(stored)
    head = golden.model.heads_config[0]

    def loss(params: nnx.State, features: jax.Array) -> tuple[jax.Array, tuple]:
        taps: dict[str, Any] = {}
        model = nnx.merge(graph, params, stats, copy=True)
        context = ForwardContext(DatasetContext.one(0, 1), training=True, tap=taps.__setitem__)
        out = model(features, golden.plans["train"], context)
        terms = centerness_loss(
            out.locations, out.scan, out.level, out.boxes, out.logits, out.centerness, boxes, labels,
            jnp.ones(head.num_classes, bool), jnp.asarray(head.num_outputs == 8), jnp.ones(len(boxes), bool),
            assign_threshold=config.assign_threshold, center_threshold=config.center_threshold,
        )  # fmt: skip
        return terms.total, (out, taps, nnx.state(model, nnx.BatchStat))

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, grad_input), (predictions, taps, after) = jax.device_get(step(params, golden.features))
    yield from _pass(golden, "train", predictions, taps)
    yield from compare_training(stored, predictions, tolerance)
    exported = export_slots(fcaf3d_slots(nnx.merge(graph, grads, stats)))
    bound = FLOAT64_TOLERANCE if golden.is_float64 else GRADIENT_TOLERANCE
    norms = np.array([np.linalg.norm(exported[str(name)].astype(np.float64)) for name in stored["train.grad_names"]])
    yield compare("train.total_grad_norm", np.linalg.norm(norms), stored["train.total_grad_norm"], bound)
    for name, norm, expected in zip(stored["train.grad_names"], norms, stored["train.grad_norms"], strict=True):
        yield compare(f"train.grad_norm.{name}", norm, expected, bound)
    for key in (key for key in stored if key.startswith("train.grad.")):
        yield compare(key, exported[key.removeprefix("train.grad.")], stored[key], bound)
    yield compare("train.grad_input", grad_input[golden.rows], stored["train.grad_input"], bound)
    exported = export_slots(fcaf3d_slots(nnx.merge(graph, params, after)))
    for key in (key for key in stored if key.startswith("train.after.") and not key.endswith("tracked")):
        yield compare(key, exported[key.removeprefix("train.after.")], stored[key], tolerance)


def _pass(golden: Golden, mode: str, predictions: Predictions, taps: dict[str, Any]) -> Iterator[CaseResult]:
    """Stages, scores, kept rows and outputs of a forward pass."""
    stored = golden.stored
    yield compare(f"{mode}.overflow", predictions.overflow, np.int32(0), 0.0)
    for stage in (match.group(1) for match in map(re.compile(rf"{mode}\.([^.]+)\.stride").fullmatch, stored) if match):
        yield from compare_stage(stored, f"{mode}.{stage}", taps.get(stage), golden.tolerance(mode))
    for level in (2, 1, 0):
        yield from _pruning(golden, mode, level, taps)
    for level in (3, 2, 1, 0):
        yield from _head(golden, mode, level, predictions)


def _pruning(golden: Golden, mode: str, level: int, taps: dict[str, Any]) -> Iterator[CaseResult]:
    """Scores and kept rows of a level; nothing is scored where the plan knows that every scan keeps all."""
    name, union = f"{mode}.union_{level}", taps[f"union_{level}"].sites
    n = int(union.n)
    keep = taps.get(f"kept_{level}", np.arange(union.capacity) < n)
    yield compare(f"{name}.keep", keep[:n], golden.stored[f"{name}.keep"], 0.0)
    if golden.plans[mode].prunes(level):
        scores, expected = taps[f"scores_{level}"][:n], golden.stored[f"{name}.interpolated_score"]
        yield compare(f"{name}.interpolated_score", scores, expected, golden.tolerance(mode))


def _head(golden: Golden, mode: str, level: int, predictions: Predictions) -> Iterator[CaseResult]:
    name, mine = f"{mode}.head_{level}", predictions.level == level
    mine &= predictions.scan < len(golden.stored["num_points"])
    assert predictions.centerness is not None
    values = {
        "points": predictions.locations[mine],
        "center": predictions.centerness[mine][:, None],
        "bbox": predictions.boxes[mine, : int(golden.stored["config.num_reg_outs"])],
        "cls": predictions.logits[mine],
    }
    for key, value in values.items():
        yield compare(f"{name}.{key}", value, golden.stored[f"{name}.{key}"], golden.tolerance(mode))


# ---------------------------------------------------------------- cases of the ops file


def run_fcaf3d_ops_file(path: Path) -> Iterator[CaseResult]:
    """Every case of an ops file; one of an unknown name is reported as not run."""
    stored = load_arrays(path)
    for name in dict.fromkeys(key.split(".")[0] for key in stored):
        if name in ("interp", "up_block"):
            yield from guarded(name, (_interpolation if name == "interp" else _up_block)(stored))
        elif not name.startswith("prune_T"):  # beside "interp", whose sites it prunes
            results = run_case(name, under(stored, f"{name}."))
            yield from [CaseResult.failed(name, "(not run)")] if results is None else guarded(name, results)


def _tensor(coords: np.ndarray, features: np.ndarray, stride: int) -> tuple[SparseTensor, sparse.SiteSet]:
    """Features of stored sites, in the order of our sites."""
    sites = sparse.site_set(coords, stride=stride)
    rows = np.zeros_like(features)
    rows[sites.lookup(coords)] = features
    padded = sparse.pad_sites(sites, len(sites) + 7)
    return SparseTensor(jnp.asarray(sparse.pad_rows(rows, padded.capacity)), padded), sites


def _interpolation(stored: Stored) -> Iterator[CaseResult]:
    """Interpolated scores, and what they keep; tied sites in the numbers that the reference keeps of them."""
    scores = stored["interp.coarse_score"][:, None]
    x, _ = _tensor(stored["interp.coarse_coords"], scores, int(stored["interp.coarse_stride"]))
    fine = stored["interp.fine_coords"]
    sites = sparse.site_set(fine, stride=int(stored["interp.fine_stride"]))
    rows, padded = sites.lookup(fine), sparse.pad_sites(sites, len(sites) + 5)
    values = jax.jit(sparse.interpolate_sites)(x, padded)[:, 0]
    yield compare("interp.value", values[rows], stored["interp.value"])
    for name in (key.split(".")[0] for key in stored if re.fullmatch(r"prune_T\d+\.tied", key)):
        sure, tied = stored[f"{name}.kept_for_sure"], stored[f"{name}.tied"]
        keep = np.asarray(sparse.keep_highest(values, padded, int(name.removeprefix("prune_T"))))[rows]
        yield CaseResult.compare(f"{name}.kept", float((sure & ~keep).sum() + (keep & ~sure & ~tied).sum()), 0.0)
        from_tied = np.array([(keep & tied & (fine[:, 0] == b)).sum() for b in (0, 1)])
        yield compare(f"{name}.from_tied", from_tied, stored[f"{name}.from_tied"], 0.0)


def _up_block(stored: Stored) -> Iterator[CaseResult]:
    """The up-block in training, its gradients and running statistics."""
    case = under(stored, "up_block.")
    x, sites = _tensor(case["in_coords"], case["in_feats"], int(case["in_stride"]))
    children = sparse.generate(sites, 2)
    padded = sparse.pad_sites(children, len(children) + 9)
    generate = sparse.pad_map(sparse.generative_neighbors(sites, children, 2), x.sites, padded)
    conv = sparse.pad_map(sparse.submanifold_neighbors(children, 3), padded, padded)
    block = UpBlock(*case["0.kernel"].shape[1:], 0, DetectorConfig(kind="fcaf3d"), 1, rngs=nnx.Rngs(0))
    slots = conv_norm_slots("0", "1", block.generate, 0) | conv_norm_slots("3", "4", block.conv, 0)
    zeros = {name: np.full(slot.shape, name.endswith("var"), np.float32) for name, slot in slots.items()}
    load_slots(slots, zeros | {name: case[name] for name in slots if name in case})
    graph, params, stats = nnx.split(block, nnx.Param, nnx.BatchStat)
    weight = sparse.pad_rows(case["loss_weight"], padded.capacity)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def slopes(params: nnx.State, features: jax.Array) -> tuple[jax.Array, tuple]:
        taps: dict[str, Any] = {}
        again = nnx.merge(graph, params, stats, copy=True)
        context = ForwardContext(training=True, tap=taps.__setitem__)
        y = again(x.with_features(features), ChildMaps(generate, None, conv), context)
        return (y.features * weight).sum(), (taps, nnx.state(again, nnx.BatchStat))

    (grads, grad_in), (taps, after) = slopes(params, x.features)
    n, tolerance = len(children), TOLERANCES["train"]
    yield compare("up_block.out_coords", children.coords, case["out_coords"], 0.0)
    transposed, out = (np.asarray(taps[f"up_block_1{suffix}"].features)[:n] for suffix in ("_transposed", ""))
    yield compare("up_block.transposed_feats", transposed, case["transposed_feats"], tolerance)
    yield compare("up_block.out_feats", out, case["out_feats"], tolerance)
    rows = sites.lookup(case["in_coords"])
    yield compare("up_block.grad_in", np.asarray(grad_in)[rows], case["grad_in"], GRADIENT_TOLERANCE)
    for stage, values, start, bound in (
        ("grad", grads, params, GRADIENT_TOLERANCE),
        ("after", after, stats, tolerance),
    ):
        nnx.update(block, values)
        exported = export_slots(slots)
        nnx.update(block, start)
        for key in (key for key in case if key.startswith(f"{stage}.") and not key.endswith("tracked")):
            yield compare(f"up_block.{key}", exported[key.removeprefix(f"{stage}.")], case[key], bound)
