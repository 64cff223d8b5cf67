from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.layers import BatchNorm, DatasetContext, ForwardContext, SelectionConfig
from h2a2_jax.models import (
    FCAF3D,
    DetectorConfig,
    FCAF3DSizes,
    HeadConfig,
    PlanLayout,
    fcaf3d_sizes,
    fcaf3d_tables,
    fits_fcaf3d,
    pad_fcaf3d,
)
from h2a2_jax.models.head import CenternessHeads
from tests.models.scenes import VOXEL, empty_scan, room

MOST = 100
"""Sites that a scan keeps: union 2 has fewer, unions 1 and 0 have more."""
CONFIG = DetectorConfig(
    kind="fcaf3d", depth=10, stem_channels=4, stage_channels=(4, 5, 6, 7), neck_channels=4, voxel_size=VOXEL,
    prune_threshold=MOST,
)  # fmt: skip
HEADS = (HeadConfig("a", 3, 6), HeadConfig("b", 5, 8))


def voxels_of(scans):
    return sparse.voxelize([scan.points for scan in scans], VOXEL)


def capacities_of(*batches, unions=(1, 1, 1), more=8):
    """What holds each of the batches, the unions at least as given."""
    sizes = [fcaf3d_sizes(voxels_of(scans).sites, MOST) for scans in batches]
    most = [max(size) + more for size in zip(*sizes, strict=True)]
    return FCAF3DSizes(*most[:7], *map(max, most[7:], unions))


def padded(scans, capacities, machine="any"):
    voxels = voxels_of(scans)
    colors = np.concatenate([scan.colors for scan in scans])[voxels.first_point]
    plan = pad_fcaf3d(fcaf3d_tables(voxels.sites, MOST), capacities, PlanLayout(machine, CONFIG))
    return jnp.asarray(sparse.pad_rows(colors, capacities.voxels)), jax.tree.map(jnp.asarray, plan)


@cache
def network():
    """A detector whose scores differ, and its forward pass."""
    model = FCAF3D(CONFIG, HEADS, rngs=nnx.Rngs(0))
    model.heads.class_kernel[...] = 30 * model.heads.class_kernel[...]
    rng = np.random.default_rng(0)
    for _, part in nnx.iter_modules(model):
        if isinstance(part, BatchNorm):
            part.mean[...] = jnp.asarray(rng.normal(0, 0.05, part.mean.shape), jnp.float32)
            part.var[...] = jnp.asarray(rng.uniform(0.2, 0.6, part.var.shape), jnp.float32)
    graph, state = nnx.split(model)

    @jax.jit
    def forward(features, plan):
        return nnx.merge(graph, state)(features, plan, ForwardContext(DatasetContext.one(1, 2)))

    return lambda *batch: jax.device_get(forward(*batch))


def of_scan(out, scan):
    rows = np.flatnonzero(out.scan == scan)
    return [table[rows] for table in (out.locations, out.level, out.boxes, out.logits, out.centerness)]


# ---------------------------------------------------------------- maps


def test_sizes_of_a_batch_are_the_sums_of_those_of_its_scans():
    scans = [room(0), room(1, points=1500), empty_scan()]
    alone = [fcaf3d_sizes(voxels_of([scan]).sites, MOST) for scan in scans]
    together = fcaf3d_sizes(voxels_of(scans).sites, MOST)
    assert together == tuple(map(sum, zip(*alone, strict=True)))
    assert together == fcaf3d_tables(voxels_of(scans).sites, MOST).sizes and min(together) > 0
    assert together.union2 == 8 * together.stage4 <= 2 * MOST
    assert alone[0].union1 == 8 * alone[0].union2 > MOST
    assert alone[0].union0 == 8 * MOST + alone[0].stage1 < 8 * alone[0].union1
    nothing_pruned = fcaf3d_sizes(voxels_of(scans).sites, 10**6)
    assert nothing_pruned[7:] == tuple(together.stage4 * 8**k for k in (1, 2, 3))


def test_no_choice_of_sites_exceeds_the_sizes():
    voxels = voxels_of([room(0), room(1)]).sites
    backbone, sizes = fcaf3d_tables(voxels, MOST).stage_sites, fcaf3d_sizes(voxels, MOST)
    rng = np.random.default_rng(0)
    for _ in range(5):
        level = sparse.generate(backbone[3], 2)
        assert len(sparse.unite(level, backbone[2])) == len(level) == sizes.union2
        for stage, size in ((backbone[1], sizes.union1), (backbone[0], sizes.union0)):
            rows = [rng.permutation(np.flatnonzero(level.scan == b))[:MOST] for b in (0, 1)]
            kept = sparse.site_set(level.coords[np.sort(np.concatenate(rows))], stride=level.stride, num_scans=2)
            level = sparse.unite(sparse.generate(kept, 2), stage)
            assert len(level) <= size


def test_maps_that_no_score_decides_about_are_made_on_the_host():
    scans = [room(0), room(1)]
    tight, tables = capacities_of(scans), fcaf3d_tables(voxels_of(scans).sites, MOST)
    few, many = tight._replace(union2=MOST), tight._replace(union2=2 * MOST)
    assert tables.sizes.union2 <= MOST
    for capacities, made in ((few, 2), (many, 1)):
        plan = pad_fcaf3d(tables, capacities)
        assert len(plan.children) == made and plan.unions == capacities.unions
        assert [plan.prunes(level) for level in (2, 1, 0)] == [made == 1, True, True]
        assert plan.kept(1) == 2 * MOST and plan.kept(2) == min(2 * MOST, capacities.union2)
        # The stage's sites are all among the children.
        rows = plan.children[0].stage_rows
        assert (rows < capacities.stage3).sum() == tables.sizes.stage3
    for machine in ("cpu", "native", "accelerator", "any"):
        layout = PlanLayout(machine, CONFIG)
        others = fcaf3d_tables(voxels_of([room(2), empty_scan()]).sites, MOST)
        if fits_fcaf3d(tables, few, layout) and fits_fcaf3d(others, few, layout):
            plans = [pad_fcaf3d(each, few, layout) for each in (tables, others)]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *plans)
            assert jax.tree.structure(stacked) == jax.tree.structure(plans[0])
    assert fits_fcaf3d(tables, few, PlanLayout("any", CONFIG))
    with pytest.raises(InputError, match="take a larger bucket"):
        pad_fcaf3d(tables, few._replace(union2=8))


@pytest.mark.parametrize(("machine", "has_tiles"), [("cpu", True), ("native", False), ("accelerator", False)])
def test_maps_made_inside_jit_have_the_lists_of_their_machine(machine, has_tiles):
    voxels = voxels_of([room(0)]).sites
    capacities = capacities_of([room(0)], unions=(MOST + 1, 1, 1))
    plan = pad_fcaf3d(fcaf3d_tables(voxels, MOST), capacities, PlanLayout(machine, CONFIG))
    coarse = plan.children[0].conv.inputs
    maps, _ = jax.eval_shape(lambda sites: plan.child_maps(1, sites, 4), coarse)
    assert maps.stage_rows is None and maps.generate.out_capacity == capacities.union1
    assert [each.tiles is not None for each in (maps.generate, maps.conv)] == [has_tiles, has_tiles]


# ---------------------------------------------------------------- network


@pytest.mark.slow
def test_other_scans_larger_buckets_and_maps_made_inside_jit_change_nothing():
    forward, pair = network(), [room(0), room(1, points=1500)]
    few, many = capacities_of(pair, unions=(MOST, 1, 1)), capacities_of(pair, unions=(3 * MOST, 9000, 9000), more=500)
    assert few.union2 == MOST
    alone = forward(*padded([room(0), empty_scan()], few))
    expected = of_scan(alone, 0)
    level = expected[1]
    assert alone.overflow == 0 and [(level == i).sum() for i in (0, 1)] == [MOST, MOST] and 8 < (level == 2).sum()
    assert np.ptp(expected[3][level == 1]) > 1e-2 and (expected[2][:, :6] > 0).all()
    company = {
        "beside another": (pair, 0, few),
        "after another": (pair[::-1], 1, few),
        "a larger bucket, all maps inside jit": (pair, 0, many),
    }
    for name, (scans, scan, capacities) in company.items():
        out = forward(*padded(scans, capacities))
        there = of_scan(out, scan)
        assert out.overflow == 0
        np.testing.assert_array_equal(there[0], expected[0], err_msg=name)
        np.testing.assert_array_equal(there[1], expected[1], err_msg=name)
        for ours, theirs in zip(there[2:], expected[2:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_sites_without_a_place_are_counted():
    scans = [room(0), room(1)]
    capacities = capacities_of(scans)
    out = network()(*padded(scans, capacities._replace(union0=700)))
    assert out.overflow > 0 and (np.asarray(out.level) == 0).sum() == 2 * MOST


def test_the_channels_of_outputs_and_the_start_of_parameters():
    model = FCAF3D(CONFIG, HEADS, rngs=nnx.Rngs(0))
    for up, (wide, narrow) in zip(model.neck.ups, ((5, 4), (6, 5), (7, 6)), strict=True):
        assert up.generate.conv.kernel.shape == (8, wide, narrow) and up.conv.conv.kernel.shape == (27, narrow, narrow)
        bounds = {up.generate.conv: (8 * narrow) ** -0.5, up.conv.conv: (27 * narrow) ** -0.5}
        for conv, bound in bounds.items():
            assert 0.9 * bound < jnp.abs(conv.kernel[...]).max() <= bound
    for out, width in zip(model.neck.outs, (4, 5, 6, 7), strict=True):
        assert out.conv.kernel.shape == (27, width, 4)
        assert 0.9 < jnp.abs(out.conv.kernel[...]).max() * (27 * width) ** 0.5 <= 1
    assert not isinstance(model.backbone.stem.norm, BatchNorm) and model.embedding is None
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    exclusive = [path for path, value in params if value.get_metadata().get("dataset_axis") == 0]
    assert {path[0] for path in exclusive} == {"heads"} and len(exclusive) == 5


def test_heads_scale_distances_by_level_and_score_by_the_classes_of_the_dataset():
    heads = CenternessHeads(4, (3, 5), (6, 8), rngs=nnx.Rngs(0))
    heads.scales[...] = jnp.asarray([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    features = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    first, other = (heads(features, DatasetContext.one(d, 2), 1) for d in (0, 1))
    raw = features @ heads.box_kernel[...]
    np.testing.assert_allclose(first.boxes[:, :6], np.exp(2 * raw[0, :, :6]), rtol=1e-5)
    np.testing.assert_array_equal(first.boxes[:, 6:], np.zeros((6, 2)))
    np.testing.assert_allclose(other.boxes[:, :6], np.exp(3 * raw[1, :, :6]), rtol=1e-5)
    np.testing.assert_allclose(other.boxes[:, 6:], raw[1, :, 6:], rtol=1e-5)
    np.testing.assert_allclose(first.centerness, features @ heads.center_kernel[0, :, 0], rtol=1e-5)
    # The padded logits are 0, above all others, and no scores.
    np.testing.assert_array_equal(first.logits[:, 3:], np.zeros((6, 2)))
    np.testing.assert_array_equal(first.best, first.logits[:, :3].max(1))
    np.testing.assert_array_equal(other.best, other.logits.max(1))
    narrow = heads(features.astype(jnp.bfloat16), DatasetContext.one(1, 2), 1)
    assert {value.dtype for value in narrow} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"kind": "tr3d"}, 'model.kind is "tr3d"'),
        ({"label_space": "union"}, "a head for each dataset"),
        ({"selection": SelectionConfig(convolutions=("residual", "neck"))}, 'has "neck"'),
        ({"exclusive_stages": (0, 1)}, "the stem, which FCAF3D shares"),
    ],
    ids=["kind", "label space", "selection", "stem"],
)
def test_what_fcaf3d_does_not_have_is_refused(option, message):
    with pytest.raises(InputError, match=message):
        FCAF3D(DetectorConfig(**{"kind": "fcaf3d"} | option), HEADS, rngs=nnx.Rngs(0))


def test_columns_of_a_union_are_refused():
    model = FCAF3D(CONFIG, HEADS, rngs=nnx.Rngs(0))
    batch = padded([room(0)], capacities_of([room(0)]))
    with pytest.raises(ValueError, match="give a DatasetContext"):
        model(*batch, ForwardContext(DatasetContext.one(0, 2)), np.arange(3, dtype=np.int32))
