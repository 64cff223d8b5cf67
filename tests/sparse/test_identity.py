"""Tensors on different sites are never joined in silence, and the identity of sites compiles nothing anew."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

from h2a2_jax import sparse
from h2a2_jax.layers import SparseConv, add, concatenate, max_pool
from tests.sparse.transcription import random_sites

CAPACITY = 128


def tensor(sites, seed=0):
    valid = np.arange(CAPACITY) < sites.n
    features = np.random.default_rng(seed).normal(size=(CAPACITY, 2)) * valid[:, None]
    return sparse.SparseTensor(jnp.asarray(features, jnp.float32), sites)


def two_tensors(name="target"):
    """On different sites with one stride, capacity and number of scans."""
    sets = random_sites((40, 30)), random_sites((30, 40), seed=1)
    renamed = sparse.site_set(sets[1].coords, num_scans=2, name=name)
    return [tensor(sparse.pad_sites(sites, CAPACITY)) for sites in (sets[0], renamed)]


def users(kmap):
    """Functions of two tensors that expect both, or the first and the map of the second, on the same sites."""
    conv = SparseConv(2, 3, rngs=nnx.Rngs(0))
    return {
        "add": lambda a, b: add(a, b),
        "concatenate": lambda a, b: concatenate(a, b),
        "convolution": lambda a, b: conv(a, kmap),
        "pooling": lambda a, b: max_pool(a, kmap),
    }


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("user", ["add", "concatenate", "convolution", "pooling"])
def test_other_sites_of_equal_capacity_are_refused(user, traced):
    a, b = two_tensors()
    table = sparse.submanifold_neighbors(sparse.site_set(b.sites.coords[: int(b.sites.n)], num_scans=2, name="target"))
    function = users(sparse.pad_map(table, b.sites, b.sites))[user]
    with pytest.raises(ValueError, match="on different sites: 'sites'"):
        (jax.jit(function) if traced else function)(a, b)
    function(b, b)


def test_outside_jit_coordinates_decide():
    """Equal sites of another name pass, other sites of one name do not."""
    a, b = two_tensors("sites")
    with pytest.raises(ValueError, match="hold other coordinates"):
        add(a, b)
    renamed = sparse.SparseTensor(a.features, sparse.pad_sites(random_sites((40, 30)), CAPACITY, identity="copy"))
    np.testing.assert_array_equal(add(a, renamed).features, 2 * a.features)


def test_the_skip_of_a_completion_net_is_united_and_not_summed_by_row():
    a, _ = two_tensors()

    @partial(jax.jit, static_argnums=1)
    def complete(x, unite):
        pruned, _ = sparse.prune(x, x.features[:, 0] > 0)
        return add(pruned, x, unite=unite)

    with pytest.raises(ValueError, match=r"'prune\(sites\)' and 'sites'"):
        complete(a, False)
    joined = complete(a, True)
    n = int(a.sites.n)
    kept = (a.features > 0)[:, :1]
    rows = sparse.find_rows(joined.sites, a.sites.coords[:n])
    assert int(joined.sites.n) == n and 0 < kept.sum() < n
    np.testing.assert_array_equal(joined.features[rows], (a.features * (1 + kept))[:n])


def test_values_are_compared_inside_jit_where_asked_for():
    a, b = two_tensors("sites")
    joined = jax.jit(lambda a, b: add(a, b).features)
    joined(a, b)  # one name: a program cannot tell them apart
    with sparse.check_values(True):
        error, _ = checkify.checkify(jax.jit(lambda a, b: add(a, b).features))(a, b)
        fine, _ = checkify.checkify(jax.jit(lambda a, b: add(a, b).features))(a, a)
    assert fine.get() is None
    with pytest.raises(checkify.JaxRuntimeError, match="other coordinates"):
        error.throw()


def test_clouds_of_one_plan_are_told_apart_and_scans_of_one_place_are_not():
    def plan(seed):
        given, target = (
            sparse.voxelize([np.random.default_rng(s).random((50, 3))], 0.1).sites for s in (seed, seed + 9)
        )
        return sparse.pad_tables({"given": given, "half": sparse.downsample(given, 2), "target": target}, (64, 64, 64))

    names = [{key: sites.identity for key, sites in plan(seed).items()} for seed in range(3)]
    assert names[0] == {"given": "voxels", "half": "voxels/2", "target": "voxels#1"}
    assert names[0] == names[1] == names[2]


def test_scans_share_a_program_that_makes_and_prunes_sites():
    @jax.jit
    def network(points):
        fine, _, _ = sparse.voxelize_points(points, jnp.zeros(40, jnp.int32), 40, 0.2, 64, 1)
        other, _, _ = sparse.voxelize_points(points + 0.5, jnp.zeros(40, jnp.int32), 40, 0.2, 64, 1)
        x = sparse.SparseTensor(fine.valid[:, None].astype(jnp.float32), fine)
        a, _ = sparse.prune(x, fine.coords[:, 1] > 1)
        b, _ = sparse.prune(x, fine.coords[:, 2] > 1)
        assert [s.identity for s in (fine, other)] == ["voxels", "voxels#1"]
        assert [s.sites.identity for s in (a, b)] == ["prune(voxels)", "prune(voxels)#1"]
        return add(a, b, unite=True)

    outputs = [network(np.random.default_rng(seed).random((40, 3)).astype(np.float32)) for seed in range(3)]
    assert network._cache_size() == 1
    assert len({jax.tree.structure(out) for out in outputs}) == 1


def test_a_program_of_points_is_exported_for_every_number_of_points():
    def network(points, scan, kernels):
        fine, _, lost = sparse.voxelize_points(points, scan, jnp.ones_like(scan).sum(), 0.2, 64, 2)
        x = fine.valid[:, None].astype(jnp.float32)
        y = sparse.convolve(x, kernels, sparse.submanifold_map(fine))
        return sparse.global_pool(sparse.SparseTensor(y, fine), "sum"), lost

    (m,) = jax.export.symbolic_shape("m")
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 27, 1, 4)), jnp.float32)
    shapes = jax.ShapeDtypeStruct((m, 3), jnp.float32), jax.ShapeDtypeStruct((m,), jnp.int32)
    exported = jax.export.export(jax.jit(network), platforms=["cpu", "cuda", "tpu"])(*shapes, kernels)
    for count in (30, 41):
        points = np.random.default_rng(count).random((count, 3)).astype(np.float32)
        args = points, np.arange(count, dtype=np.int32) % 2, kernels
        for ours, direct in zip(exported.call(*args), jax.jit(network)(*args), strict=True):
            np.testing.assert_allclose(ours, direct, rtol=1e-4, atol=1e-4)
