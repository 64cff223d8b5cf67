"""Promises of the algorithms for accelerators beyond correct numbers, which `test_conv` checks for all algorithms."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from h2a2_jax import sparse
from h2a2_jax.sparse import conv, conv_accelerator
from h2a2_jax.sparse.conv_parts import ConvOptions
from tests.sparse.test_conv import check, draw, objective, pad, run, stacked_maps
from tests.sparse.transcription import padded, pairs_by_search, pairs_of, random_sites, table_of

ALGORITHMS = ("im2col", "pairs", "implicit")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few rows and of a tile or two, which do not divide the arrays."""
    monkeypatch.setattr(conv_accelerator, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(conv_accelerator, "SCAN_ROWS", 16)


def maps_beyond_test_conv():
    """Name, table and pairs of kinds of maps that `TABLES` lacks."""
    sites = random_sites(stride=2)
    down = sparse.strided_neighbors(sites, sparse.downsample(sites, 2), 3)
    back = [[(o, i) for i, o in found] for found in pairs_of("strided 3", down)]
    yield "inverse", sparse.inverse_neighbors(down), back
    for size in (1, (5, 3, 1)):
        table = sparse.submanifold_neighbors(sites, size)
        yield f"submanifold {size}", table, pairs_by_search(sites.coords, sites.coords, 2 * sparse.kernel_offsets(size))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inverse_maps_and_other_kernels(algorithm):
    for _, table, pairs in maps_beyond_test_conv():
        for selection in ("one kernel", "gamma"):
            kmap, data = padded(table), draw(table, selection)
            with jax.enable_x64(True):
                got = run(kmap, algorithm, *data)
            check(got, table, kmap, *data, pairs, 1e-12)


@pytest.mark.parametrize("kind", ["submanifold 3", "strided 3", "generative"])
@pytest.mark.parametrize("algorithm", ["im2col", "pairs"])
def test_chunks_change_nothing(algorithm, kind, small_chunks):
    for counts in ((40, 0, 55), (70,)):  # one scan takes a shorter way
        table = table_of(kind, counts=counts)
        for selection in ("one kernel", "gamma"):
            kmap, data = padded(table), draw(table, selection)
            with jax.enable_x64(True):
                got = run(kmap, algorithm, *data)
            check(got, table, kmap, *data, pairs_of(kind, table), 1e-12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_of_one_scan_equal_finite_differences(algorithm):
    table = table_of("submanifold 3", counts=(70,))
    kmap, data = padded(table), draw(table, "gamma")
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        _, dx, dw, dgamma = run(kmap, algorithm, *data)
        x, kernels, weight, gamma = data
        plus, minus = [], []
        ways = [rng.normal(size=a.shape) for a in (x, kernels, gamma)]
        for argument, way in enumerate(ways):
            # Linear in each argument; in gamma where kernels are interpolated, which is how its gradient is defined.
            how = "segment_sum" if argument == 2 else algorithm
            for sign, values in ((1, plus), (-1, minus)):
                moved = [a + sign * 1e-3 * way if i == argument else a for i, a in enumerate((x, kernels, gamma))]
                y = run(kmap, how, moved[0], moved[1], weight, moved[2])[0]
                values.append((y[: len(weight)] * weight).sum())
    slopes = (np.array(plus) - np.array(minus)) / 2e-3
    ours = [(d * way).sum() for d, way in zip((dx[: len(x)], dw, dgamma), ways, strict=True)]
    np.testing.assert_allclose(ours, slopes, rtol=1e-8)


@pytest.mark.parametrize("algorithm", ["im2col", "pairs"])
def test_chunks_under_shard_map(algorithm, small_chunks):
    kmaps, x, kernels, gamma = stacked_maps()
    slope = jax.value_and_grad(partial(objective, algorithm), argnums=(1, 2, 3))
    whole = jax.jit(jax.value_and_grad(partial(objective, "segment_sum"), argnums=(1, 2, 3)))
    alone = [whole(jax.tree.map(lambda a, d=d: a[d], kmaps), x[d], kernels, gamma[d]) for d in range(2)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)

    def on_device(kmaps, x, kernels, gamma):
        kmap, x, gamma = jax.tree.map(lambda a: a[0], (kmaps, x, gamma))
        kernels = jax.lax.pcast(kernels, "d", to="varying")
        return jax.tree.map(lambda a: a[None], slope(kmap, x, kernels, gamma))

    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P("d"), P("d"), P(), P("d")), out_specs=P("d"), check_vma=True
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
        jax.jit(sharded)(kmaps, x, kernels, gamma),
        expected,
    )


@pytest.mark.parametrize("selection", ["one kernel", "gamma"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_forward_and_backward(algorithm, selection):
    """bfloat16 keeps 8 bits: 1 % of the largest value, sums being float32."""
    table = table_of("submanifold 3", counts=(60, 50))
    kmap, data = padded(table), draw(table, selection)
    x, kernels, weight, gamma = data
    rows, cotangent = pad(x, kmap.in_capacity), pad(weight, kmap.out_capacity)

    def forward(x, kernels, gamma):
        return sparse.convolve(x, kernels, kmap, gamma=gamma, algorithm=algorithm, dtype=jnp.bfloat16)

    single = [None if a is None else jnp.asarray(a, jnp.float32) for a in (rows, kernels, gamma)]
    y, pull = jax.vjp(jax.jit(forward), *single)
    got = jax.device_get((y, *pull(jnp.asarray(cotangent, jnp.float32))))
    check(got, table, kmap, *data, pairs_of("submanifold 3", table), 1e-2)


def equations(jaxpr):
    """Every equation of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def program(kind, algorithm, selection="gamma", **options):
    """Equations of output and gradients."""
    table = table_of(kind)
    kmap = padded(table)
    x, kernels, weight, gamma = draw(table, selection)
    rows, cotangent = (
        jnp.asarray(pad(a, n), jnp.float32) for a, n in ((x, kmap.in_capacity), (weight, kmap.out_capacity))
    )

    options = ConvOptions(jnp.float32, kernel_type=jnp.float32, algorithm=algorithm, **{"precision": None, **options})

    def both(x, kernels, gamma):
        y = conv._forward(x, kernels, gamma, kmap, options, "accelerator")
        return y, conv._backward(x, kernels, gamma, kmap, options, cotangent, "accelerator")

    single = [None if a is None else jnp.asarray(a, jnp.float32) for a in (rows, kernels, gamma)]
    return list(equations(jax.make_jaxpr(both)(*single).jaxpr))


def scatters(found):
    return {e.primitive.name for e in found if "scatter" in e.primitive.name and e.outvars[0].aval.dtype != jnp.int32}


@pytest.mark.parametrize("selection", ["one kernel", "gamma"])
@pytest.mark.parametrize("kind", ["submanifold 3", "strided 3", "lookup"])
@pytest.mark.parametrize("algorithm", ["im2col", "pairs"])
def test_no_features_are_scattered_and_trip_counts_are_static(algorithm, kind, selection):
    found = program(kind, algorithm, selection)
    assert scatters(found) == set()
    assert "while" not in {e.primitive.name for e in found}
    # The walk does see them where they are.
    other = program(kind, "tiles", selection)
    assert "scatter-add" in scatters(other) and "while" in {e.primitive.name for e in other}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_products_take_the_precision_asked_for(algorithm):
    def precisions(**options):
        return [
            e.params["precision"] for e in program("submanifold 3", algorithm, **options) if "dot" in str(e.primitive)
        ]

    asked = precisions(precision="highest")
    assert len(asked) >= 4
    assert set(asked) == {(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
    fast = (jax.lax.Precision.HIGH, jax.lax.Precision.HIGH)  # TF32, which is the default of XLA
    assert (fast if algorithm == "implicit" else None) in precisions()


def test_a_map_with_fewer_tiles_computes_the_same():
    table = table_of("submanifold 3")
    kmap, data = padded(table), draw(table, "gamma")
    used = int(kmap.tiles.count)
    assert used < len(kmap.tiles.offset)
    for capacity in (used, used + 3, len(kmap.tiles.offset) + 5):
        limited = sparse.limit_tiles(kmap, capacity)
        assert limited.tiles.in_rows.shape == limited.tiles.out_rows.shape == (capacity, 16)
        for algorithm in ("pairs", "tiles"):
            with jax.enable_x64(True):
                got = run(limited, algorithm, *data)
            check(got, table, limited, *data, pairs_of("submanifold 3", table), 1e-12)
    with pytest.raises(ValueError, match=f"{used} tiles are in use"):
        sparse.limit_tiles(kmap, used - 1)
    with pytest.raises(ValueError, match="has no tiles"):
        sparse.limit_tiles(replace(kmap, tiles=None), used)


def test_accelerators_choose_by_the_work_of_the_tiles():
    choose = partial(conv._choose, options=ConvOptions(jnp.float32, None, jnp.float32), platform="accelerator")
    kmap = padded(table_of("submanifold 3", counts=(400,), reach=12))
    full, used = len(kmap.tiles.offset), int(kmap.tiles.count)
    assert conv_accelerator.pair_work(kmap) >= 1  # made for any sites
    assert choose(kmap) == "im2col"
    assert choose(sparse.limit_tiles(kmap, used)) == "pairs"
    assert choose(sparse.limit_tiles(kmap, full // 2 + 2)) == "im2col"
    assert choose(replace(kmap, tiles=None)) == "im2col"
