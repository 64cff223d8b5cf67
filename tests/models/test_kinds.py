"""Every kind of detector answers the protocol, and has the properties that its callers rely on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.inference.folding import fold
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import collate
from h2a2_jax.models import KINDS, DetectorKind, DetectorNetwork, PlanLayout, kind_of, selective_layers
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.training.gradients import detector_loss, targets_of
from tests.models.scenes import FCAF3D_MODEL, alive, batch_of, empty_scan, room, tiny_config, tiny_detector

MODELS = {"tr3d": tiny_config(), "fcaf3d": FCAF3D_MODEL}
ROOMS = [room(0), room(1, points=1200)]
every_kind = pytest.mark.parametrize("kind", KINDS)
kinds_but_tr3d = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tr3d"])
"""TR3D has tests of the same in test_tr3d.py."""


def detector_of(kind, **options):
    names = ("kind", "prune_threshold", "assign_threshold", "center_threshold")
    return alive(tiny_detector(**{name: getattr(MODELS[kind], name) for name in names}, **options))


def test_every_word_of_the_config_is_a_kind():
    assert set(MODELS) == set(KINDS)
    for name, kind in KINDS.items():
        assert isinstance(kind, DetectorKind) and kind_of(MODELS[name]) is kind
        assert kind.least.fits(kind.levels(*kind.least)) and min(kind.least) > 0


@every_kind
def test_sizes_are_those_of_the_tables_and_add_up(kind):
    model = MODELS[kind]
    each = [sparse.voxelize([scan.points], model.voxel_size).sites for scan in [*ROOMS, empty_scan()]]
    sizes = [KINDS[kind].sizes(voxels, model) for voxels in each]
    assert sizes == [KINDS[kind].tables(voxels, model).sizes for voxels in each]
    assert collate([*ROOMS, empty_scan()], model).tables.sizes == tuple(map(sum, zip(*sizes, strict=True)))
    assert sizes[2] == KINDS[kind].levels(*[0] * len(sizes[2]))


@every_kind
def test_plans_of_one_bucket_have_one_structure(kind):
    model = MODELS[kind]
    tables = [collate(scans, model).tables for scans in ([ROOMS[0], ROOMS[1]], [ROOMS[0], empty_scan()])]
    layout = PlanLayout.of(model)
    capacities = sparse.BucketLadder(tables[0].sizes).capacities(0)
    plans = [KINDS[kind].pad(table, capacities, layout) for table in tables]
    forms = [jax.tree.map(lambda leaf: (np.shape(leaf), np.result_type(leaf)), plan) for plan in plans]
    assert forms[0] == forms[1]
    assert plans[0].voxels.capacity == capacities.voxels


@kinds_but_tr3d
def test_folding_changes_no_box(kind):
    detector, dataset = detector_of(kind), DatasetContext.one(1, 3)
    batch = batch_of(ROOMS, model=MODELS[kind])

    def boxes(network, context):
        out = jax.jit(lambda batch: network(batch.features, batch.plan, ForwardContext(context, training=False)))(batch)
        assert out.overflow is None or int(out.overflow) == 0
        found = KINDS[kind].detect(
            out._replace(logits=out.logits[:, : SPECS[1].num_classes]), len(ROOMS),
            rotated=True, score_threshold=jnp.float32(0.005), iou_threshold=jnp.float32(0.5),
        )  # fmt: skip
        return [np.asarray(part) for part in found]

    expected = boxes(detector, dataset)
    assert isinstance(detector, DetectorNetwork) and expected[3].min() > 5
    for ours, theirs in zip(boxes(fold(detector, dataset, 1), DatasetContext(jnp.ones(1))), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


@kinds_but_tr3d
def test_the_loss_is_finite_without_boxes_and_counts_a_scan_without_points_as_none(kind):
    model, detector = MODELS[kind], detector_of(kind)
    targets = jax.tree.map(lambda leaf: leaf[0], targets_of(SPECS, model))
    graph, state = nnx.split(detector)

    @jax.jit
    def value_and_grad(state, batch):
        context = ForwardContext(DatasetContext.one(0, 3), training=True)

        def loss(state):
            return detector_loss(nnx.merge(graph, state, copy=True), batch, targets, context).losses.total

        return jax.value_and_grad(loss, allow_int=True)(state)

    sizes = collate(ROOMS, model).tables.sizes
    capacities = type(sizes)(*(size + 32 for size in sizes))
    bare = replace(ROOMS[1], boxes=ROOMS[1].boxes[:0], labels=ROOMS[1].labels[:0])
    pairs = [[ROOMS[0], empty_scan()], [empty_scan(), ROOMS[0]], [bare, empty_scan()]]
    values, gradients = zip(
        *(value_and_grad(state, batch_of(scans, capacities, model=model)) for scans in pairs), strict=True
    )
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    assert values[2] > 0
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all()


@every_kind
def test_layers_with_kernel_selection_are_known_with_their_support(kind):
    detector = detector_of(kind)
    tables = collate([ROOMS[0]], MODELS[kind]).tables
    layers = selective_layers(detector)
    assert list(layers)[:2] == ["layer1_0.conv1", "layer1_0.conv2"] and len(layers) == 8
    for name in layers:
        share = KINDS[kind].support(tables, name)
        assert share.shape == (27,) and (0 <= share).all() and (share <= 1).all()
        assert share[13] == 1 or name.endswith("conv1")
