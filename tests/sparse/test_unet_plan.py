"""Maps of a U-Net in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.layers import ConvNorm, ForwardContext, ResidualBlock, SparseConv, concatenate, relu
from tests.sparse.transcription import random_sites


def room(rng, points):
    """A floor and a wall."""
    at = rng.uniform(0, 2, (points, 3)).astype(np.float32)
    at[: points // 2, 2] = 0
    at[points // 2 :, 0] = 0
    return at


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("axes", "factor"), [(3, 2), (3, (2, 2, 1)), (4, 2)])
def test_a_plan_is_the_padded_tables_of_its_levels(axes, factor):
    voxels = random_sites(axes=axes, reach=9)
    plan = sparse.UNetPlan(voxels, 3, kernel_size=3, factor=factor, layout="tiles")
    middle = sparse.downsample(voxels, factor)
    coarse = sparse.downsample(middle, factor)
    down = [sparse.strided_neighbors(voxels, middle, factor), sparse.strided_neighbors(middle, coarse, factor)]
    tables = {
        "same": [sparse.submanifold_neighbors(s) for s in (voxels, middle, coarse)],
        "down": down,
        "up": [sparse.inverse_neighbors(table) for table in down],
    }
    expected = sparse.pad_tables(tables, plan.capacities, layout="tiles")
    for name, maps in expected.items():
        assert_same(getattr(plan, name), tuple(maps))
    assert plan.same[1].inputs is plan.sites[1] is plan.down[0].outputs is plan.up[0].inputs
    assert [sites.identity for sites in plan.sites] == [middle.identity[:5], middle.identity, coarse.identity]

    def build(coords):
        fine, _ = sparse.sites_from_coords(coords, plan.capacities[0], 3)
        return sparse.UNetPlan.in_jit(fine, plan.capacities[1:], factor=factor)

    got, overflow = jax.tree.map(np.asarray, jax.jit(build)(voxels.coords))
    assert_same(got, sparse.UNetPlan(voxels, 3, factor=factor, capacities=plan.capacities, layout="neighbors"))
    assert overflow == 0


def test_voxels_clouds_and_sets_make_one_plan():
    rng = np.random.default_rng(0)
    clouds = [room(rng, 400), room(rng, 300)]
    voxels = sparse.voxelize(clouds, 0.1)
    plan = sparse.UNetPlan(voxels, 2)
    assert_same(sparse.UNetPlan(voxels.sites, 2), plan)
    assert_same(sparse.UNetPlan(clouds, 2, voxel_size=0.1), plan)
    first, _ = jax.tree_util.tree_leaves_with_path(plan)[0]
    assert jax.tree_util.keystr(first) == ".sites[0].coords"
    for wrong in ((clouds, None), (voxels, 0.1)):
        with pytest.raises(InputError, match="expected voxels alone"):
            sparse.UNetPlan(wrong[0], voxel_size=wrong[1])
    with pytest.raises(ValueError, match="given capacities and a ladder"):
        sparse.UNetPlan(voxels, 2, capacities=(1, 2), ladder=sparse.UNetPlan.ladder([voxels], 2))
    with pytest.raises(InputError, match="2 levels, given are 3 capacities"):
        sparse.UNetPlan(voxels, 2, capacities=(512, 512, 512))
    with pytest.raises(ValueError, match="levels is 0; expected an integer from 1 on"):
        sparse.UNetPlan(voxels, 0)


def test_scans_of_similar_size_share_shapes_without_a_ladder():
    rng = np.random.default_rng(0)
    plans = [sparse.UNetPlan([room(rng, n)], voxel_size=0.1) for n in (1000, 1030, 1060)]
    assert len({jax.tree.structure(plan) for plan in plans}) == len({plan.capacities for plan in plans}) == 1
    finest, *coarser = plans[0].capacities
    sizes = [int(sites.n) for sites in plans[0].sites]
    assert all(n <= c <= max(64, 2 * n + 64) for n, c in zip(sizes[1:], coarser, strict=True))
    assert finest <= max(1024, 1.25 * sizes[0] + 64)


class UNet(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.down = ConvNorm(1, 8, rngs=rngs), ConvNorm(8, 16, 2, rngs=rngs)
        self.middle, self.up = ResidualBlock(16, 16, rngs=rngs), ConvNorm(16, 8, 2, rngs=rngs)
        self.head = SparseConv(16, 2, 1, use_bias=True, rngs=rngs)

    def __call__(self, plan, context=None):
        sites = plan.sites[0]
        x = sparse.SparseTensor(sites.valid[:, None].astype(jnp.float32), sites)
        x = relu(self.stem(x, plan.same[0], context))
        y = self.middle(relu(self.down(x, plan.down[0], context)), plan.same[1], context)
        return self.head(concatenate(x, relu(self.up(y, plan.up[0], context)))).features


def test_a_u_net_is_one_program_for_scans_of_different_size():
    rng = np.random.default_rng(0)
    clouds = [[room(rng, n)] for n in rng.integers(100, 400, 24)]
    ladder = sparse.UNetPlan.ladder(clouds, 2, voxel_size=0.1)
    plans = [sparse.UNetPlan(cloud, 2, voxel_size=0.1, ladder=ladder) for cloud in clouds]
    assert len({int(plan.sites[0].n) for plan in plans}) > 12
    graph, params, rest = nnx.split(UNet(nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def step(params, plan):
        def loss(params):
            logits = nnx.merge(graph, params, rest, copy=True)(plan, ForwardContext(training=True))
            floor = (plan.sites[0].coords[:, 3] == 0).astype(jnp.int32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, floor)
            return jnp.where(plan.sites[0].valid, losses, 0).sum() / plan.sites[0].n

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    losses = []
    for plan in plans:
        params, value = step(params, plan)
        losses.append(float(value))
    assert step._cache_size() == 1
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    stack = jax.tree.map(lambda *arrays: np.stack(arrays), *plans[:2])
    logits = jax.jit(jax.vmap(lambda plan: nnx.merge(graph, params, rest)(plan, ForwardContext(algorithm="gather"))))(
        stack
    )
    single = nnx.merge(graph, params, rest)(plans[1], ForwardContext(algorithm="gather"))
    np.testing.assert_allclose(logits[1], single, atol=1e-5)
