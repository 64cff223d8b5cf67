"""Derivatives of convolution in every mode and order, against JAX's own of a convolution written in plain arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from h2a2_jax import sparse
from tests.sparse.test_conv import ALGORITHMS, draw, kind_for
from tests.sparse.transcription import padded, random_sites, table_of

NATIVE = ("native",) if sparse.has_native() else ()

TOLERANCE = 1e-9
"""Relative, in float64; Winograd's transforms round some 20 times as much as the rest."""


def plain(kmap, groups, x, kernels, gamma):
    """The definition in gathers and one product, which JAX differentiates in any mode."""
    neighbors = jnp.asarray(kmap.neighbors)
    rows = x.at[neighbors].get(mode="fill", fill_value=0)  # [V, N, Cin]
    rows = rows.reshape(*rows.shape[:2], groups, -1)
    parts = kernels.reshape(*kernels.shape[:3], groups, -1)
    y = jnp.einsum("vngi,svigo->svngo", rows, parts).reshape(len(kernels), *neighbors.shape, -1)
    if gamma is None:
        return y[0].sum(0)
    shared = gamma.at[jnp.asarray(kmap.out_scan)].get(mode="fill", fill_value=0).T[..., None]
    return (shared * y[0] + (1 - shared) * y[1]).sum(0)


MODES = ("output", "jvp", "grad", "forward over reverse", "reverse over forward", "reverse over reverse")


def modes(function, args, ways, weight, names):
    """Results of a function in several modes of differentiation."""

    def loss(args):
        y = function(*args)
        return (jnp.sin(y) * weight).sum()  # curved, so that second derivatives mix all arguments

    def slope(args):
        return jax.jvp(loss, (args,), (ways,))[1]

    def along(args):
        gradients = jax.grad(loss)(args)
        return sum((g * w).sum() for g, w in zip(gradients, ways, strict=True))

    ways_of = {
        "output": lambda: function(*args),
        "jvp": lambda: slope(args),
        "grad": lambda: jax.grad(loss)(args),
        "forward over reverse": lambda: jax.jvp(jax.grad(loss), (args,), (ways,))[1],
        "reverse over forward": lambda: jax.grad(slope)(args),
        "reverse over reverse": lambda: jax.grad(along)(args),
    }
    return {name: ways_of[name]() for name in names}


def assert_equal_modes(function, reference, args, ways, weight, tolerance=TOLERANCE, names=MODES):
    got, expected = (jax.jit(partial(modes, f, names=names))(args, ways, weight) for f in (function, reference))
    for mode, theirs in expected.items():
        for i, (a, b) in enumerate(zip(jax.tree.leaves(got[mode]), jax.tree.leaves(theirs), strict=True)):
            scale = np.abs(b).max(initial=1e-3)
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=f"{mode}, {i}")


def problem(kind, selection, seed=0, groups=1, **draws):
    table = table_of(kind, **draws)
    kmap = padded(table)
    x, kernels, weight, gamma = draw(table, selection, seed)
    rows = np.zeros((kmap.in_capacity, x.shape[1]))
    rows[: len(x)] = x
    cotangent = np.zeros((kmap.out_capacity, weight.shape[1]))
    cotangent[: len(weight)] = weight
    args = (rows, kernels) if gamma is None else (rows, kernels, gamma)
    rng = np.random.default_rng(seed + 1)
    ways = tuple(rng.normal(size=a.shape) for a in args)
    return kmap, args, ways, cotangent


@pytest.mark.parametrize("selection", ["one kernel", "gamma"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_mode_of_every_algorithm(algorithm, selection):
    kmap, args, ways, weight = problem(kind_for(algorithm, "strided 3"), selection)

    def function(x, kernels, gamma=None):
        return sparse.convolve(x, kernels, kmap, gamma=gamma, algorithm=algorithm)

    def reference(x, kernels, gamma=None):
        return plain(kmap, 1, x, kernels, gamma)

    with jax.enable_x64(True):
        assert_equal_modes(function, reference, args, ways, weight, TOLERANCE * (20 if algorithm == "winograd" else 1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("groups", [2, 4], ids=["two groups", "depthwise"])
def test_groups(algorithm, groups):
    kmap, *_ = problem("submanifold 3", "one kernel")
    rng = np.random.default_rng(0)
    shapes = (kmap.in_capacity, 4), (1, kmap.kernel_volume, 4 // groups, 8)
    args, ways = (tuple(rng.normal(size=shape) for shape in shapes) for _ in range(2))
    args[0][int(kmap.n_in) :] = 0
    weight = rng.normal(size=(kmap.out_capacity, 8)) * (np.arange(kmap.out_capacity) < int(kmap.n_out))[:, None]
    with jax.enable_x64(True):
        assert_equal_modes(
            lambda x, w: sparse.convolve(x, w, kmap, groups=groups, algorithm=algorithm),
            lambda x, w: plain(kmap, groups, x, w, None),
            args, ways, weight, TOLERANCE * (20 if algorithm == "winograd" else 1),
            names=("output", "grad", "forward over reverse"),
        )  # fmt: skip


@pytest.mark.parametrize("algorithm", ["gather", "tiles", "pairs"])
def test_derivatives_under_vmap(algorithm):
    """Batches of features, of kernels or of gammas alone: shared arguments get the sum of the gradients."""
    kmap, (x, kernels, gamma), _, weight = problem("strided 3", "gamma")
    rng = np.random.default_rng(3)
    stacks = tuple(np.stack([a, rng.permutation(a.reshape(-1)).reshape(a.shape)]) for a in (x, kernels, gamma))

    def ours(x, kernels, gamma):
        return sparse.convolve(x, kernels, kmap, gamma=gamma, algorithm=algorithm)

    def derivatives(how, axes, args, ways):
        def loss(*args):
            return (jnp.sin(jax.vmap(how, in_axes=axes)(*args)) * weight).sum()

        gradients = jax.grad(loss, (0, 1, 2))
        return gradients(*args), jax.jvp(gradients, args, ways)[1]

    with jax.enable_x64(True):
        for axes in ((0, None, None), (None, 0, None), (0, 0, 0)):
            args = tuple(jnp.asarray(s if a == 0 else s[0]) for s, a in zip(stacks, axes, strict=True))
            ways = tuple(rng.normal(size=a.shape) for a in args)
            got, expected = (
                jax.jit(derivatives, static_argnums=(0, 1))(how, axes, args, ways)
                for how in (ours, partial(plain, kmap, 1))
            )
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


def test_jacobians_of_both_modes_are_equal():
    """The forward one is a vmap of tangents over fixed arguments."""
    kmap, (x, kernels), _, _ = problem("strided 2", "one kernel", counts=(6, 3), reach=2)
    function = partial(sparse.convolve, kernel_map=kmap, algorithm="tiles")
    with jax.enable_x64(True):
        for i in (0, 1):
            forward, reverse = (
                jac(function, i)(jnp.asarray(x), jnp.asarray(kernels)) for jac in (jax.jacfwd, jax.jacrev)
            )
            np.testing.assert_allclose(forward, reverse, atol=1e-12)
            assert np.abs(forward).max() > 0


def test_maps_may_be_arguments_of_a_transformed_function():
    kmap, (x, kernels), ways, weight = problem("submanifold 3", "one kernel")

    def loss(x, kernels, kmap):
        return (sparse.convolve(jnp.asarray(x), jnp.asarray(kernels), kmap) ** 2 * weight).sum()

    with jax.enable_x64(True):
        product = jax.jit(lambda kmap: jax.jvp(jax.grad(lambda w: loss(x, w, kmap)), (kernels,), (ways[1],))[1])(kmap)
        fixed = jax.jvp(jax.grad(lambda w: loss(jnp.asarray(x), w, kmap)), (jnp.asarray(kernels),), (ways[1],))[1]
    np.testing.assert_allclose(product, fixed, atol=1e-12 * np.abs(fixed).max())


def test_half_precision_in_forward_mode():
    kmap, (x, kernels), ways, _ = problem("submanifold 3", "one kernel")
    for algorithm in (*ALGORITHMS, *NATIVE):
        function = partial(sparse.convolve, kernel_map=kmap, algorithm=algorithm)
        args, dots = (tuple(jnp.asarray(a, jnp.bfloat16) for a in values) for values in ((x, kernels), ways))
        y, dy = jax.jvp(function, args, dots)
        exact = jax.jvp(partial(plain, kmap, 1, gamma=None), (x, kernels), ways)
        for got, expected in zip((y, dy), exact, strict=True):
            assert got.dtype == jnp.bfloat16
            np.testing.assert_allclose(np.asarray(got, float), expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [(a, AxisType.Auto) for a in ("gather", "tiles", "im2col", "pairs", "winograd", *NATIVE)]
    + [(a, AxisType.Explicit) for a in ("gather", "tiles", *NATIVE)],
    ids=str,
)
def test_replicated_kernels_under_shard_map(algorithm, kind):
    """No cast by the caller: the gradient of kernels on every device is the sum over the devices."""
    kmap, (x, kernels), _, weight = problem("submanifold 3", "one kernel")
    xs = jnp.asarray(np.stack([x, x[::-1]]), jnp.float32)
    kernels, weight = jnp.asarray(kernels, jnp.float32), jnp.asarray(weight, jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])

    def loss(kernels, x):
        return (sparse.convolve(x, kernels, kmap, algorithm=algorithm) * weight).sum()

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def sharded(kernels, xs):
        return jax.grad(loss)(kernels, xs[0])

    expected = sum(jax.grad(loss)(kernels, x) for x in xs)
    kernels, xs = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((kernels, P()), (xs, P("data"))))
    np.testing.assert_allclose(sharded(kernels, xs), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("algorithm", ["gather", *NATIVE])
def test_explicit_sharding_of_a_batch(algorithm):
    """A stack of scans over a mesh with explicit axes, kernels replicated."""
    kmap, (x, kernels), _, weight = problem("submanifold 3", "one kernel")
    xs = jnp.asarray(np.stack([x, x[::-1]]), jnp.float32)
    kernels, weight = jnp.asarray(kernels, jnp.float32), jnp.asarray(weight, jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])

    def loss(kernels, xs):
        return (jax.vmap(lambda x: sparse.convolve(x, kernels, kmap, algorithm=algorithm))(xs) * weight).sum()

    expected = jax.grad(loss)(kernels, xs)
    with jax.set_mesh(mesh):
        spread = jax.device_put(xs, P("data"))
        got = jax.jit(jax.grad(loss))(jax.device_put(kernels, P()), spread)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("algorithm", ["auto", "gather", *NATIVE])
def test_export_carries_the_form_of_each_platform(algorithm):
    kmap, (x, kernels), _, _ = problem("submanifold 3", "one kernel", counts=(9,))
    exported = jax.export.export(
        jax.jit(partial(sparse.convolve, algorithm=algorithm)), platforms=["cpu", "cuda", "tpu"]
    )(jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.ShapeDtypeStruct(kernels.shape, jnp.float32), kmap)
    x, kernels = jnp.asarray(x, jnp.float32), jnp.asarray(kernels, jnp.float32)
    np.testing.assert_allclose(exported.call(x, kernels, kmap), sparse.convolve(x, kernels, kmap), atol=1e-5)


def test_programs_for_other_platforms_take_their_own_algorithm():
    """Lowered on a CPU: tiles are a loop of a dynamic length, im2col is none and has one product."""
    kmap, (x, kernels), _, _ = problem("submanifold 3", "one kernel", counts=(9,))
    args = jnp.asarray(x, jnp.float32), jnp.asarray(kernels, jnp.float32), kmap

    def text(platform, algorithm):
        traced = jax.jit(partial(sparse.convolve, algorithm=algorithm)).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert text("cuda", "auto") == text("cuda", "im2col")
    assert text("cpu", "auto") != text("cuda", "auto")


def test_one_row_and_none():
    for counts in ((0,), (1,), (0, 0, 1)):
        sites = random_sites(counts)
        kmap = sparse.pad_map(sparse.submanifold_neighbors(sites), *[sparse.pad_sites(sites, max(1, len(sites)))] * 2)
        x, w = jnp.ones((kmap.in_capacity, 1)), jnp.ones((1, 27, 1, 257))
        y, dy = jax.jvp(lambda x, w, kmap=kmap: sparse.convolve(x, w, kmap), (x, w), (x, w))
        np.testing.assert_array_equal(y[:, 0], np.arange(kmap.in_capacity) < len(sites))
        np.testing.assert_array_equal(dy, 2 * y)
