"""Small scans and small detectors for tests of whole networks."""

from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from h2a2_jax.layers import AdapterConv, BatchNorm, EmbeddingMLP, PromptNorm, SelectionConfig, SelectiveConv
from h2a2_jax.layers.kernel_selection import READING_0_1_0
from h2a2_jax.loader.batching import collate, pad_batch
from h2a2_jax.models import DetectorConfig, HeadConfig, PlanLayout, build_network
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import SPECS

VOXEL = 0.05
MODEL = DetectorConfig(voxel_size=VOXEL)
"""Coarse, so that few points cover all levels."""
FCAF3D_MODEL = DetectorConfig(
    depth=10, stem_channels=4, stage_channels=(4, 4, 4, 4), neck_channels=4, voxel_size=VOXEL, kind="fcaf3d",
    prune_threshold=400, assign_threshold=9, center_threshold=6,
)  # fmt: skip
"""FCAF3D as small, pruned on all levels but the coarsest."""
SELECTION = SelectionConfig(
    **READING_0_1_0,
    projection_dim=4,
    embedding_dim=5,
    hidden=6,
    exclusive_init="independent",
)
"""A reading by which both kernels are used from the start."""


def room(seed, points=700, boxes=3, classes=5, size=4.0):
    """Points on a floor, two walls (some at negative coordinates) and boxes."""
    rng = np.random.default_rng(seed)
    where = rng.uniform(-size / 2, size / 2, (points, 3))
    flat = rng.integers(0, 3, points)
    where[np.arange(points), 2 - flat] = np.array([0.01, -1.9, -1.7])[flat] + rng.normal(0, 0.02, points)
    where[:, 2] = np.abs(where[:, 2])
    extent = rng.uniform(0.4, 1.2, (boxes, 3))
    centre = np.c_[rng.uniform(-size / 3, size / 3, (boxes, 2)), extent[:, 2] / 2]
    inside = centre[:, None] + rng.uniform(-0.5, 0.5, (boxes, 150, 3)) * extent[:, None]
    where = np.concatenate([where, inside.reshape(-1, 3)]).astype(np.float32)
    colors = rng.uniform(0, 1, (len(where), 3)).astype(np.float32)
    return Scan(
        f"room{seed}",
        where,
        colors,
        np.c_[centre, extent, np.zeros(boxes)].astype(np.float32),
        rng.integers(0, classes, boxes).astype(np.int32),
    )


def empty_scan():
    """Neither points nor boxes."""
    return Scan(
        "empty", np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), np.zeros((0, 7), np.float32),
        np.zeros(0, np.int32),
    )  # fmt: skip


def tiny_config(selection=SELECTION, width=4):
    """The smallest detector."""
    return DetectorConfig(
        depth=10, stem_channels=width, stage_channels=(width, width, width, width), neck_channels=width,
        voxel_size=VOXEL, selection=selection,
    )  # fmt: skip


def tiny_detector(selection=SELECTION, seed=0, specs=SPECS, width=4, **options):
    """A detector of the given datasets; running statistics and silent layers drawn at random."""
    heads = [HeadConfig(s.name, s.num_classes, s.num_outputs) for s in specs]
    model = build_network(replace(tiny_config(selection, width), **options), heads, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, EmbeddingMLP):
            _add_noise(rng, module.out.kernel)
        if isinstance(module, BatchNorm):
            _add_noise(rng, module.mean)
            _add_noise(rng, module.var)
        if isinstance(module, PromptNorm):
            _add_noise(rng, module.prompt.kernel)
        if isinstance(module, AdapterConv):
            _add_noise(rng, module.adapter)
    return model


class StagesAsNeck(nnx.Module):
    """Leaves the features of the stages as they are."""

    def __call__(self, stages, plan, context):
        return stages


def short_detector(*arguments, **options):
    """A tiny detector cut off behind its second stage; its heads read both stages. It compiles in half the time."""
    model = tiny_detector(*arguments, **options)
    model.backbone.stages, model.neck = nnx.List(model.backbone.stages[:2]), StagesAsNeck()
    return model


def short_plan(batch):
    """The batch with the maps that a short detector takes."""
    return replace(batch, plan=replace(batch.plan, stages=batch.plan.stages[:2], ups=()))


def _add_noise(rng, variable):
    variable.set_value(variable[...] + rng.uniform(0, 0.2, variable.shape).astype(np.float32))


def batch_of(scans, capacities=None, max_boxes=4, model=MODEL):
    """A padded batch of scans of one dataset for a detector, on the device."""
    host = collate(scans, model)
    if capacities is None:
        capacities = type(host.tables.sizes)(*(size + 32 for size in host.tables.sizes))
    return jax.tree.map(jax.numpy.asarray, pad_batch(host, capacities, max_boxes, PlanLayout(model=model)))


def alive(model, seed=0):
    """Running statistics in the range of the small features, so that ReLUs leave something in evaluation.

    Where the prior is measured, datasets disagree at half of the offsets.
    """
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.mean.set_value(jax.numpy.asarray(rng.normal(0, 0.01, module.mean.shape), np.float32))
            module.var.set_value(jax.numpy.asarray(rng.uniform(0.2, 0.6, module.var.shape), np.float32))
        if isinstance(module, SelectiveConv) and module.disagreement is not None:
            f, center = 2 * np.exp(rng.normal(0, 0.5, 27)), rng.normal(0, 0.1, module.disagreement.shape)
            module.disagreement.set_value(jax.numpy.asarray(np.tile(f, (len(center), 1)), np.float32))
            module.center.set_value(jax.numpy.asarray(center, np.float32))
    model.heads.box_kernel.set_value(0.01 * model.heads.box_kernel[...])  # large features would make boxes infinite
    return model
