"""Convolution against a pair-by-pair transcription in float64, in all algorithms."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from h2a2_jax import sparse
from tests.sparse.transcription import TABLES, convolve, gradients, padded, pairs_of, random_sites, table_of

ALGORITHMS = ("segment_sum", "gather", "tiles", "im2col", "pairs", "winograd", "implicit")
NATIVE = ("native",) if sparse.has_native() else ()
WINOGRAD_ROUNDS = 20
"""Times the tolerance of the others: its transforms add numbers larger than the result."""
SELECTIONS = ("one kernel", "gamma")
C_IN, C_OUT = 3, 4


def draw(table, selection, seed=0):
    """Features, kernels, cotangent, gamma in float64; gamma differs from scan to scan."""
    rng = np.random.default_rng(seed)
    volume, scans = len(table.rows), table.inputs.num_scans
    x = rng.normal(size=(len(table.inputs), C_IN))
    kernels = rng.normal(size=(2 if selection == "gamma" else 1, volume, C_IN, C_OUT))
    weight = rng.normal(size=(len(table.outputs), C_OUT))
    gamma = rng.integers(0, 2, (scans, volume)).astype(float) if selection == "gamma" else None
    if gamma is not None and scans > 1 and volume > 1:
        assert (gamma[0] != gamma[-1]).any()
    return x, kernels, weight, gamma


def kind_for(algorithm, kind):
    """The given kind of map, or for "winograd" the one kind with blocks."""
    return "submanifold 3" if algorithm == "winograd" else kind


def pad(rows, capacity, fill=np.nan):
    return np.concatenate([rows, np.full((capacity - len(rows), rows.shape[1]), fill)])


@partial(jax.jit, static_argnames="algorithm")
def both(kmap, x, kernels, gamma, weight, algorithm):
    """Output and gradients of x, kernels and gamma."""
    function = partial(sparse.convolve, kernel_map=kmap, algorithm=algorithm)
    y, pull = jax.vjp(lambda x, w, gamma: function(x, w, gamma=gamma), x, kernels, gamma)
    return y, *pull(weight)


def run(kmap, algorithm, x, kernels, weight, gamma, fill=np.nan):
    """Output and gradients of ours, in the type of the arguments; padding of x and of the cotangent holds `fill`."""
    rows, cotangent = pad(x, kmap.in_capacity, fill), pad(weight, kmap.out_capacity, fill)
    return jax.device_get(both(kmap, rows.astype(x.dtype), kernels, gamma, cotangent.astype(weight.dtype), algorithm))


def check(got, table, kmap, x, kernels, weight, gamma, pairs, tolerance):
    y, dx, dw, dgamma = got
    scan = table.outputs.scan
    n_in, n_out = len(table.inputs), len(table.outputs)
    expected = [convolve(x, kernels, pairs, scan, gamma)]
    expected += gradients(x, kernels, pairs, scan, weight, gamma)
    for name, ours, theirs in zip(
        ("y", "dx", "dw", "dgamma"), (y[:n_out], dx[:n_in], dw, dgamma), expected, strict=True
    ):
        if theirs is None:
            assert ours is None
            continue
        scale = np.abs(theirs).max(initial=1e-3)
        assert ours.dtype == x.dtype or ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=name)
    assert (y[n_out:] == 0).all() and (dx[n_in:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TABLES if kind != "pool"])
def test_every_algorithm_equals_the_transcription(kind):
    table = table_of(kind)
    kmap, pairs = padded(table), pairs_of(kind, table)
    selections = SELECTIONS if kind in ("submanifold 3", "strided 2") else ("gamma",)
    for selection in selections:
        data = draw(table, selection)
        for algorithm in ALGORITHMS:
            if algorithm == "winograd" and kmap.blocks is None:
                continue
            with jax.enable_x64(True):
                got = run(kmap, algorithm, *data)
            check(got, table, kmap, *data, pairs, 1e-12 * (WINOGRAD_ROUNDS if algorithm == "winograd" else 1))
    assert (kmap.blocks is not None) == (kind in ("submanifold 3", "submanifold 3, stride 4"))


def test_one_scan():
    """Kernels of a single scan are selected before the convolution: same result, same gradients."""
    table = table_of("submanifold 3", counts=(50,))
    kmap, pairs = padded(table), pairs_of("submanifold 3", table)
    data = draw(table, "gamma")
    for algorithm in ALGORITHMS:
        with jax.enable_x64(True):
            got = run(kmap, algorithm, *data)
        check(got, table, kmap, *data, pairs, 1e-12 * (WINOGRAD_ROUNDS if algorithm == "winograd" else 1))


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *NATIVE])
def test_float32(algorithm):
    table = table_of("submanifold 3", counts=(200, 90))
    kmap, pairs = padded(table), pairs_of("submanifold 3", table)  # with blocks in use
    data = draw(table, "gamma")
    single = [None if a is None else a.astype(np.float32) if a.dtype == float else a for a in data]
    tolerance = 1e-6 * (WINOGRAD_ROUNDS if algorithm in ("winograd", "native") else 1)
    check(run(kmap, algorithm, *single), table, kmap, *data, pairs, tolerance)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_derivatives_equal_finite_differences(algorithm):
    """Also of gamma, away from 0 and 1 only where the algorithm interpolates: the transcription is linear in it."""
    table = table_of(kind_for(algorithm, "strided 3"))
    kmap = padded(table)
    x, kernels, weight, gamma = draw(table, "gamma")
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        _, dx, dw, dgamma = run(kmap, algorithm, x, kernels, weight, gamma, fill=7.0)

        def value(x, kernels, gamma, how=algorithm):
            y = run(kmap, how, x, kernels, weight, gamma, fill=7.0)[0]
            return float((y[: len(weight)] * weight).sum())

        ways = [rng.normal(size=a.shape) for a in (x, kernels, gamma)]
        h = 1e-3  # the function is linear in each argument
        slopes = {
            "x": (value(x + h * ways[0], kernels, gamma) - value(x - h * ways[0], kernels, gamma)) / (2 * h),
            "kernels": (value(x, kernels + h * ways[1], gamma) - value(x, kernels - h * ways[1], gamma)) / (2 * h),
            "gamma": (
                value(x, kernels, gamma + h * ways[2], "segment_sum")
                - value(x, kernels, gamma - h * ways[2], "segment_sum")
            )
            / (2 * h),
        }
    np.testing.assert_allclose((dx[: len(x)] * ways[0]).sum(), slopes["x"], rtol=1e-8)
    np.testing.assert_allclose((dw * ways[1]).sum(), slopes["kernels"], rtol=1e-8)
    np.testing.assert_allclose((dgamma * ways[2]).sum(), slopes["gamma"], rtol=1e-8)


@pytest.mark.parametrize("kind", ["submanifold 3", "strided 2", "generative"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_sites_give_zeros(kind, algorithm):
    table = table_of(kind_for(algorithm, kind), counts=(0, 0))
    kmap = padded(table)
    y, dx, dw, dgamma = run(kmap, algorithm, *(a for a in draw(table, "gamma")))
    assert y.shape == (kmap.out_capacity, C_OUT)
    for value in (y, dx, dw, dgamma):
        assert (value == 0).all()


def run32(kmap, algorithm, data):
    single = [None if a is None else a.astype(np.float32) if a.dtype == float else a for a in data]
    return run(kmap, algorithm, *single)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scans_may_change_places(algorithm):
    sites = random_sites((30, 0, 41), stride=2)
    order = np.array([2, 0, 1])  # the place of scan 0, 1, 2
    coords = sites.coords
    moved = sparse.site_set(np.c_[order[coords[:, 0]], coords[:, 1:]].astype(np.int32), stride=2, num_scans=3)
    build = TABLES[kind_for(algorithm, "strided 3")][1]
    table, moved_table = build(sites), build(moved)
    x, kernels, weight, gamma = draw(table, "gamma")
    rows_in = moved.lookup(np.c_[order[coords[:, 0]], coords[:, 1:]].astype(np.int32))
    out = table.outputs.coords
    rows_out = moved_table.outputs.lookup(np.c_[order[out[:, 0]], out[:, 1:]].astype(np.int32))
    back_in, back_out, back = np.argsort(rows_in), np.argsort(rows_out), np.argsort(order)
    first = run32(padded(table), algorithm, (x, kernels, weight, gamma))
    second = run32(padded(moved_table), algorithm, (x[back_in], kernels, weight[back_out], gamma[back]))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(second[0][rows_out], first[0][: len(weight)])
    close(second[1][rows_in], first[1][: len(x)])
    close(second[2], first[2])
    close(second[3][order], first[3])


@pytest.mark.parametrize("kind", ["strided 3", "generative", "submanifold 3, stride 4"])
def test_a_shift_by_the_stride_changes_nothing(kind):
    table = table_of(kind)
    step = max(table.inputs.stride, table.outputs.stride)
    shift = np.array([[0, 5 * step, -9 * step, 2 * step]], np.int32)
    moved = sparse.site_set(table.inputs.coords + shift, stride=table.inputs.stride, num_scans=3)
    moved_table = TABLES[kind][1](moved)
    np.testing.assert_array_equal(moved_table.rows, table.rows)
    np.testing.assert_array_equal(moved_table.outputs.coords, table.outputs.coords + shift)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_capacity_changes_nothing(algorithm):
    table = table_of("submanifold 3")
    data = draw(table, "gamma")
    small, large = (run32(padded(table, more, more, 16), algorithm, data) for more in (0, 70))
    n = len(table.inputs)
    for a, b in zip(small, large, strict=True):
        np.testing.assert_allclose(b[: len(a)], a, rtol=1e-5, atol=1e-6)
    assert (large[0][n:] == 0).all() and (large[1][n:] == 0).all()


def stacked_maps():
    """Two maps of unequal batches in one shape, with features, and the results of each by itself."""
    tables = [table_of("submanifold 3", counts=counts, seed=s) for s, counts in enumerate([(40, 25), (0, 33)])]
    capacity = max(len(t.inputs) for t in tables) + 5
    kmaps = [padded(t, capacity - len(t.inputs), 0) for t in tables]
    rng = np.random.default_rng(0)
    x = np.stack([pad(rng.normal(size=(len(t.inputs), C_IN)), capacity, 0.0) for t in tables]).astype(np.float32)
    kernels = rng.normal(size=(2, 27, C_IN, C_OUT)).astype(np.float32)
    gamma = rng.integers(0, 2, (2, 2, 27)).astype(np.float32)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *kmaps), x, kernels, gamma


def objective(algorithm, kmap, x, kernels, gamma):
    return (sparse.convolve(x, kernels, kmap, gamma=gamma, algorithm=algorithm) ** 2).sum()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_under_vmap_and_shard_map(algorithm):
    kmaps, x, kernels, gamma = stacked_maps()
    slope = jax.value_and_grad(partial(objective, algorithm), argnums=(1, 2, 3))
    alone = [jax.jit(slope)(jax.tree.map(lambda a, d=d: a[d], kmaps), x[d], kernels, gamma[d]) for d in range(2)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)

    mapped = jax.jit(jax.vmap(slope, in_axes=(0, 0, None, 0)))(kmaps, x, kernels, gamma)
    jax.tree.map(close, mapped, expected)
    if algorithm == "implicit":  # Pallas's interpreter does not know of varying axes; test_conv_implicit compiles it
        return

    def on_device(kmaps, x, kernels, gamma):
        kmap, x, gamma = jax.tree.map(lambda a: a[0], (kmaps, x, gamma))
        kernels = jax.lax.pcast(kernels, "d", to="varying")
        return jax.tree.map(lambda a: a[None], slope(kmap, x, kernels, gamma))

    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P("d"), P("d"), P(), P("d")), out_specs=P("d"), check_vma=True
    )
    jax.tree.map(close, jax.jit(sharded)(kmaps, x, kernels, gamma), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_products_in_half_precision_are_summed_in_single(algorithm):
    table = table_of("submanifold 3", counts=(60,))
    kmap, pairs = padded(table), pairs_of("submanifold 3", table)
    x, kernels, *_ = draw(table, "one kernel")
    expected = convolve(x, kernels, pairs, table.outputs.scan)
    rows = jnp.asarray(pad(x, kmap.in_capacity, 0.0), jnp.float32)

    @jax.jit
    def of_both_types(rows, kernels):
        function = partial(sparse.convolve, kernel_map=kmap, algorithm=algorithm)
        return function(rows, kernels, dtype=jnp.bfloat16), function(rows.astype(jnp.bfloat16), kernels)

    y, half = of_both_types(rows, jnp.asarray(kernels, jnp.float32))
    assert y.dtype == jnp.float32 and half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y)[: len(expected)] - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 1e-2


@pytest.mark.parametrize("selection", ["one kernel", "gamma"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_factors_of_products_are_rounded(algorithm, selection):
    """From what bfloat16 holds exactly: sums and gradients of kernels and gamma are float32's, features are rounded."""
    table = table_of("submanifold 3", counts=(60,))
    kmap = padded(table)
    x, kernels, weight, gamma = draw(table, selection)
    exact = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, kernels, weight)]
    pairs, scan = pairs_of("submanifold 3", table), table.outputs.scan
    y = convolve(*exact[:2], pairs, scan, gamma)
    dx, dw, dgamma = gradients(exact[0], exact[1], pairs, scan, exact[2], gamma)
    half = jnp.bfloat16
    rows, cotangent = (jnp.asarray(pad(a, n), half) for a, n in ((x, kmap.in_capacity), (weight, kmap.out_capacity)))
    single = jnp.asarray(exact[1], jnp.float32)

    gamma32 = None if gamma is None else jnp.asarray(gamma, jnp.float32)
    got = both(kmap, rows, single, gamma32, cotangent, algorithm)
    assert [a.dtype for a in got[:3]] == [half, half, jnp.float32]
    rounding, sums = 2.0**-8, 1e-2 if algorithm == "segment_sum" else 2e-5
    for ours, expected, error in zip(got, (y, dx, dw, dgamma), (rounding, rounding, sums, sums), strict=True):
        if expected is not None:
            ours = np.asarray(ours, np.float64)[: len(expected)]
            np.testing.assert_allclose(ours, expected, rtol=0, atol=error * np.abs(expected).max())


def test_arguments_that_do_not_fit_the_map_raise():
    kmap = padded(table_of("submanifold 3"), tile_size=None)
    x, w = jnp.zeros((kmap.in_capacity, 3)), jnp.zeros((1, 27, 3, 4))
    with pytest.raises(ValueError, match="the kernel map expects"):
        sparse.convolve(x[1:], w, kmap)
    with pytest.raises(ValueError, match=r"expected \[S, V, Cin, Cout\]"):
        sparse.convolve(x, w[:, 1:], kmap)
    with pytest.raises(ValueError, match="scans x offsets"):
        sparse.convolve(x, jnp.zeros((2, 27, 3, 4)), kmap, gamma=jnp.ones((2, 27)))
    with pytest.raises(ValueError, match=r"kernels \(2, 27, 3, 4\) were given without gamma"):
        sparse.convolve(x, jnp.zeros((2, 27, 3, 4)), kmap)
    with pytest.raises(ValueError, match=r"kernels \(1, 27, 3, 4\) were given with gamma"):
        sparse.convolve(x, w, kmap, gamma=jnp.ones((3, 27)))
    with pytest.raises(ValueError, match="needs a map with tiles"):
        sparse.convolve(x, w, kmap, algorithm="tiles")
    with pytest.raises(ValueError, match="needs a map with blocks"):
        sparse.convolve(x, w, replace(kmap, blocks=None), algorithm="winograd")


def test_float16_which_the_compiled_kernels_do_not_know_is_convolved_by_another_algorithm():
    table = table_of("submanifold 3")
    x, kernels, weight, _ = draw(table, "one kernel")
    kmap = padded(table)
    half, cotangent = (pad(a, n, 0).astype(np.float16) for a, n in ((x, kmap.in_capacity), (weight, kmap.out_capacity)))

    @jax.jit
    def slope(features, cotangent):
        single = jnp.asarray(kernels, jnp.float32)
        y, pull = jax.vjp(lambda features: sparse.convolve(features, single, kmap), features)
        return y, *pull(cotangent)

    found, expected = slope(jnp.asarray(half), cotangent), slope(jnp.asarray(half, jnp.float32), cotangent.astype("f4"))
    for ours, single in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(ours, np.float32), single, atol=4e-3 * float(np.abs(single).max()))
