import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from h2a2_jax import sparse
from h2a2_jax.layers import ForwardContext, NeighborAttention
from tests.sparse.transcription import padded, random_sites
from tests.test_linen import shaken

FINE = random_sites((30, 0, 25), stride=2)
SAME = padded(sparse.submanifold_neighbors(FINE, 3))
DOWN = padded(
    sparse.strided_neighbors(FINE, sparse.downsample(FINE, 2), (3, 1, 2))
)  # some coarse sites have no neighbour


def on(sites, channels=8, seed=0, fill=np.nan):
    rows = np.random.default_rng(seed).normal(size=(int(sites.n), channels)).astype(np.float32)
    padding = np.full((sites.capacity - len(rows), channels), fill, np.float32)
    return sparse.SparseTensor(jnp.asarray(np.concatenate([rows, padding])), sites)


def layer_of(kernel_size=3, **options):
    layer = NeighborAttention(8, 2, kernel_size, rngs=nnx.Rngs(0), **options)
    params = shaken(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    nnx.update(layer, jax.tree.map(lambda p: 0.5 * p, params))
    return layer


def dense(layer, x, kernel_map, queries):
    """The formula, site by site in float64."""

    def project(projection, rows):
        bias = 0 if projection.bias is None else np.asarray(projection.bias[...], np.float64)
        return rows.astype(np.float64) @ np.asarray(projection.kernel[0], np.float64) + bias

    n_in, n_out = int(kernel_map.n_in), int(kernel_map.n_out)
    rows, asking = np.asarray(x.features)[:n_in], np.asarray(queries.features)[:n_out]
    q, k, v = (project(p, r).reshape(len(r), layer.num_heads, -1) for p, r in (
        (layer.query, asking), (layer.key, rows), (layer.value, rows)))  # fmt: skip
    out = np.zeros((kernel_map.out_capacity, 8))
    for o in range(n_out):
        offsets = [j for j in range(kernel_map.kernel_volume) if kernel_map.neighbors[j, o] < n_in]
        if not offsets:
            continue
        near = kernel_map.neighbors[offsets, o]
        scores = (q[o] * k[near]).sum(-1) / q.shape[-1] ** 0.5 + np.asarray(layer.position[...], np.float64)[offsets]
        weights = np.exp(scores - scores.max(0))
        heads = ((weights / weights.sum(0))[:, :, None] * v[near]).sum(0)
        out[o] = project(layer.out, heads.reshape(1, -1))[0]
    return out


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("kernel_map", "kernel_size"), [(SAME, 3), (DOWN, (3, 1, 2))], ids=["same", "down"])
def test_attention_is_its_formula(kernel_map, kernel_size, use_bias):
    layer, x = layer_of(kernel_size, use_bias=use_bias), on(kernel_map.inputs)
    queries = on(kernel_map.outputs, seed=1) if kernel_map is DOWN else None
    y = jax.jit(lambda x, queries: layer(x, kernel_map, queries=queries))(x, queries)
    expected = dense(layer, x, kernel_map, queries or x)
    np.testing.assert_allclose(y.features, expected, rtol=1e-4, atol=1e-4)
    assert (y.features[int(kernel_map.n_out) :] == 0).all()
    assert (expected.any(1).sum() < int(kernel_map.n_out)) == (kernel_map is DOWN)


def test_derivatives_in_both_directions_equal_finite_differences():
    graph, params = nnx.split(layer_of())
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(SAME.out_capacity, 8)))
    with jax.enable_x64(True):
        x, params = on(SAME.inputs, fill=0.0), jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        rows = x.features.astype(jnp.float64)
        value = jax.jit(lambda p, r: (nnx.merge(graph, p)(x.with_features(r), SAME).features * weight).sum())
        at = (params, rows)
        along = shaken(at, seed=2)
        gradient = jax.grad(value, (0, 1))

        @jax.jit
        def derivatives(at, along):
            return gradient(*at), jax.jvp(value, at, along)[1], jax.jvp(gradient, at, along)[1]

        slopes, forward, hessian = derivatives(at, along)
        back = sum((s * d).sum() for s, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(along), strict=True))
        ahead, behind = (value(*jax.tree.map(lambda a, d, e=e: a + e * d, at, along)) for e in (1e-6, -1e-6))
        np.testing.assert_allclose(forward, (ahead - behind) / 2e-6, rtol=1e-6)
        np.testing.assert_allclose(back, forward, rtol=1e-10)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(hessian))


def test_padding_and_lonely_sites_have_no_gradient():
    layer, x, queries = layer_of((3, 1, 2)), on(DOWN.inputs), on(DOWN.outputs, seed=1)

    def total(rows, asking):
        y = layer(x.with_features(rows), DOWN, queries=queries.with_features(asking))
        return 1e3 * y.features.sum()

    slope, slope_of_queries = jax.jit(jax.grad(total, (0, 1)))(x.features, queries.features)
    assert np.isfinite(slope).all() and (slope[int(DOWN.n_in) :] == 0).all()
    lonely = (DOWN.neighbors == DOWN.in_capacity).all(0)
    assert np.isfinite(slope_of_queries).all() and (slope_of_queries[lonely] == 0).all()
    assert lonely[: int(DOWN.n_out)].any()


def test_no_array_of_all_neighbours_is_kept():
    sites = random_sites((3000,), reach=9)
    room = sparse.pad_sites(sites, 3000)
    kernel_map = sparse.pad_map(sparse.submanifold_neighbors(sites, 3), room, room)
    graph, params = nnx.split(NeighborAttention(64, 2, rngs=nnx.Rngs(0)))

    def loss(params, rows):
        return (nnx.merge(graph, params)(sparse.SparseTensor(rows, room), kernel_map).features ** 2).sum()

    program = jax.jit(jax.grad(loss, (0, 1))).lower(params, jnp.zeros((3000, 64))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.6 * 27 * 3000 * 64 * 4


def test_half_precision_and_mapped_axes():
    layer, x = layer_of(), on(SAME.inputs, fill=0.0)

    @jax.jit
    def exact_and_half(x):
        half = x.with_features(x.features.astype(jnp.bfloat16))
        return layer(x, SAME).features, layer(half, SAME, ForwardContext(dtype=jnp.bfloat16)).features

    exact, half = exact_and_half(x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.05 * float(abs(exact).max()))

    def run(rows, kernel_map):
        return jax.vmap(lambda rows: layer(x.with_features(rows), kernel_map).features)(rows)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))
    np.testing.assert_allclose(sharded(jnp.stack([x.features] * 4), SAME)[3], exact, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    x = on(SAME.inputs)
    with pytest.raises(ValueError, match="num_heads=3 does not divide 8 channels"):
        NeighborAttention(8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kernel of 27 slices, given a map of 6 offsets"):
        layer_of()(x, DOWN)
    down = layer_of((3, 1, 2))
    with pytest.raises(ValueError, match="given no queries, and a map on different sites"):
        down(on(DOWN.inputs), DOWN)
    with pytest.raises(ValueError, match="given queries and a map on different sites"):
        down(on(DOWN.inputs), DOWN, queries=on(DOWN.inputs))
