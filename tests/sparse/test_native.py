"""Compiled kernels against XLA's algorithms, in every instruction set that this machine runs."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.sparse.native_call import choose_native_form, library
from tests.sparse.transcription import TABLES, convolve, gradients, pairs_of, random_sites, table_of

needs_native = pytest.mark.skipif(not sparse.has_native(), reason="the compiled kernels were not built")
KINDS = [kind for kind in TABLES if kind not in ("pool", "submanifold 3 dilated")]


def forms():
    usable = [name for name in ("avx512", "avx2", "portable") if library().h2a2_choose_form(name.encode())]
    choose_native_form(usable[0])
    return usable


@pytest.fixture(params=forms() if sparse.has_native() else ["none"])
def form(request):
    choose_native_form(request.param)
    yield request.param
    choose_native_form(forms()[0])


def rows_of(rng, capacity, count, channels):
    rows = rng.normal(size=(capacity, channels)).astype(np.float32)
    rows[count:] = np.nan  # nobody may read padding
    return rows


def problem(kind, channels, gamma=True, counts=(90, 0, 40), blocks=None):
    table = table_of(kind, counts=counts)
    inputs = sparse.pad_sites(table.inputs, len(table.inputs) + 5)
    outputs = inputs if table.outputs is table.inputs else sparse.pad_sites(table.outputs, len(table.outputs) + 3)
    kmap = sparse.pad_map(table, inputs, outputs, blocks=blocks)
    rng = np.random.default_rng(channels[0])
    x = rows_of(rng, inputs.capacity, len(table.inputs), channels[0])
    weight = rows_of(rng, outputs.capacity, len(table.outputs), channels[1])
    w = rng.normal(size=(2 if gamma else 1, kmap.kernel_volume, *channels)).astype(np.float32)
    chosen = rng.integers(0, 2, (kmap.num_scans, kmap.kernel_volume)).astype(np.float32) if gamma else None
    return table, kmap, x, w, chosen, weight


@partial(jax.jit, static_argnames="algorithm")
def both(x, w, gamma, weight, kmap, algorithm="native"):
    """Output and gradients."""
    y, pull = jax.vjp(lambda x, w, g: sparse.convolve(x, w, kmap, gamma=g, algorithm=algorithm), x, w, gamma)
    return y, *pull(weight)


def check(got, expected, tolerance):
    for name, ours, theirs in zip(("y", "dx", "dw", "dgamma"), got, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        n = min(len(ours), len(theirs))
        scale = np.abs(np.asarray(theirs, float)).max(initial=1e-3)
        np.testing.assert_allclose(ours[:n], theirs[:n], rtol=0, atol=tolerance * scale, err_msg=name)
        np.testing.assert_array_equal(ours[n:], 0)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_map_equals_the_transcription(kind, form):
    """Output and the gradients of features, kernels and gamma; scans choose kernels of their own, one has no sites."""
    table, kmap, x, w, gamma, weight = problem(kind, (5, 19))
    got = both(x, w, gamma, weight, kmap)
    pairs, scan = pairs_of(kind, table), table.outputs.scan
    exact = [a.astype(float) for a in (x[: len(table.inputs)], w, weight[: len(table.outputs)])]
    expected = [convolve(*exact[:2], pairs, scan, gamma), *gradients(*exact[:2], pairs, scan, exact[2], gamma)]
    check(got, expected, 1e-6)


@needs_native
@pytest.mark.parametrize("channels", [(1, 1), (3, 64), (16, 16), (33, 31), (128, 96), (257, 2)], ids=str)
def test_any_number_of_channels(channels, form):
    _, kmap, x, w, _, weight = problem("submanifold 3", channels, gamma=False)
    check(both(x, w, None, weight, kmap), both(x, w, None, weight, kmap, algorithm="gather"), 2e-6)


@needs_native
@pytest.mark.parametrize("gamma", [False, True], ids=["one kernel", "gamma"])
@pytest.mark.parametrize("channels", [(5, 7), (48, 40)], ids=str)
def test_blocks(channels, gamma, form):
    """Winograd's products, of several chunks and with kernels of each scan."""
    _, kmap, x, w, chosen, weight = problem("submanifold 3", channels, gamma, (900, 0, 300, 500), blocks="always")
    assert kmap.blocks is not None and int(kmap.blocks.count) > 2
    plain = problem("submanifold 3", channels, gamma, (900, 0, 300, 500))[1]
    check(both(x, w, chosen, weight, kmap), both(x, w, chosen, weight, plain, algorithm="gather"), 2e-5)


@needs_native
@pytest.mark.parametrize("blocks", [None, "always"])
def test_bfloat16_rows_with_sums_in_float32(blocks, form):
    """Both round the same factors, so that they differ in the order of sums alone."""
    _, kmap, x, w, gamma, weight = problem("submanifold 3", (24, 40), blocks=blocks)
    plain = problem("submanifold 3", (24, 40))[1]
    x, weight = (jnp.asarray(a, jnp.bfloat16) for a in (x, weight))
    got, expected = both(x, w, gamma, weight, kmap), both(x, w, gamma, weight, plain, algorithm="gather")
    assert got[0].dtype == got[1].dtype == jnp.bfloat16 and got[2].dtype == jnp.float32
    check([np.asarray(a, np.float32) for a in got], [np.asarray(a, np.float32) for a in expected], 1e-2)


@needs_native
def test_results_do_not_depend_on_the_run():
    _, kmap, x, w, gamma, weight = problem("strided 3", (40, 24))
    first = both(x, w, gamma, weight, kmap)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, both(x, w, gamma, weight, kmap), first)


@needs_native
def test_no_sites_no_channels_and_one_site():
    for counts, channels in (((0,), (3, 4)), ((1,), (3, 4)), ((7,), (3, 0)), ((7,), (0, 4))):
        sites = random_sites(counts)
        padded = sparse.pad_sites(sites, max(1, len(sites)))
        kmap = sparse.pad_map(sparse.submanifold_neighbors(sites), padded, padded)
        x, w = jnp.ones((kmap.in_capacity, channels[0])), jnp.ones((1, 27, *channels))
        y, pull = jax.vjp(lambda x, w, kmap=kmap: sparse.convolve(x, w, kmap, algorithm="native"), x, w)
        expected = sparse.convolve(x, w, kmap, algorithm="gather")
        np.testing.assert_array_equal(y, expected)
        dx, dw = pull(y)
        assert np.isfinite(dx).all() and np.isfinite(dw).all() and dx.shape == x.shape and dw.shape == w.shape


@needs_native
def test_derivatives_of_derivatives_and_batches():
    _, kmap, x, w, gamma, _ = problem("strided 3", (3, 4), counts=(30, 12))
    x, w, gamma = np.nan_to_num(x), jnp.asarray(w), jnp.asarray(gamma)

    def loss(x, w, how):
        return (sparse.convolve(x, w, kmap, gamma=gamma, algorithm=how) ** 2).sum()

    def along(how):
        gradient = jax.grad(loss)
        return jax.jit(lambda x, w: jax.jvp(lambda x: gradient(x, w, how), (x,), (jnp.ones_like(x),))[1])(x, w)

    np.testing.assert_allclose(along("native"), along("gather"), rtol=1e-4, atol=1e-4)
    xs = np.stack([x, 2 * x])
    stacked = jax.vmap(partial(sparse.convolve, algorithm="native"), (0, None, None))(xs, w[:1], kmap)
    expected = jax.vmap(partial(sparse.convolve, algorithm="gather"), (0, None, None))(xs, w[:1], kmap)
    np.testing.assert_allclose(stacked, expected, atol=1e-4)


@needs_native
def test_auto_takes_the_kernels_but_not_where_they_cannot_serve():
    _, kmap, x, w, _, _ = problem("submanifold 3", (4, 4), gamma=False)

    def text(*args, **options):
        return jax.jit(partial(sparse.convolve, **options)).lower(*args).as_text()

    assert "h2a2_convolve" in text(x, w, kmap)
    assert "h2a2_convolve" not in text(x, w[:, :, :1], kmap, groups=4)
    assert "h2a2_convolve" not in text(x, w, kmap, algorithm="gather")
    with jax.enable_x64(True):
        assert "h2a2_convolve" not in text(x.astype(float), w.astype(float), kmap)
    exported = jax.export.export(jax.jit(sparse.convolve))(*jax.tree.map(jnp.asarray, (x, w, kmap)))
    assert "h2a2_convolve" not in exported.mlir_module()


@needs_native
@pytest.mark.parametrize("channels", [1, 16, 37])
def test_pooling(channels, form, monkeypatch):
    """Maxima, first of equal ones, NaN, and the gradient; windows overlap."""
    table, kmap, x, _, _, weight = problem("strided 3", (channels, channels), gamma=False)
    x = np.round(x, 0)  # with ties
    x[3, 0] = np.nan
    weight = np.nan_to_num(weight)

    def pooled(x):
        y, pull = jax.vjp(lambda x: sparse.max_pool(x, kmap), x)
        return sparse.max_pool(x, kmap), y, *pull(weight)

    assert "h2a2_max_pool" in jax.jit(pooled).lower(x).as_text()
    got = jax.jit(pooled)(x)
    monkeypatch.setattr("h2a2_jax.sparse.pool.has_native", lambda: False)
    expected = jax.jit(lambda x: pooled(x))(x)
    assert np.isnan(got[0]).any()
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours[: len(table.outputs)], theirs[: len(table.outputs)], rtol=1e-6)


def python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return result.stdout.strip(), result.stderr


def test_an_environment_variable_turns_the_kernels_off():
    code = (
        "import jax.numpy as jnp\n"
        "from h2a2_jax import sparse\n"
        "print(sparse.has_native(), sparse.native_form())\n"
        "sites = sparse.voxelize([[[0., 0, 0], [1, 0, 0]]], 1.0).sites\n"
        "padded = sparse.pad_sites(sites, 2)\n"
        "kmap = sparse.pad_map(sparse.submanifold_neighbors(sites), padded, padded)\n"
        "print(sparse.convolve(jnp.ones((2, 1)), jnp.ones((1, 27, 1, 1)), kmap).tolist())\n"
        "try:\n    sparse.convolve(jnp.ones((2, 1)), jnp.ones((1, 27, 1, 1)), kmap, algorithm='native')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    out, errors = python(code, H2A2_NATIVE="0")
    first, second, third = out.splitlines()
    assert (first, second) == ("False None", "[[2.0], [2.0]]")
    assert "H2A2_NATIVE=0" in third and "XLA alone" not in errors  # asked for: nothing to say


def test_missing_kernels_are_said_once(tmp_path):
    """As on a machine where no compiler was found at installation."""
    code = (
        "from h2a2_jax.sparse import native_call as call, native_maps\n"
        f"native_maps.__file__ = {str(tmp_path / 'native_maps.py')!r}\n"
        "print(call.has_native(), call.has_native())\n"
    )
    out, errors = python(code)
    assert out == "False False"
    assert errors.count("convolutions run on XLA alone") == 1 and "C++ compiler" in errors


def test_kernels_of_another_version_are_refused_by_name(tmp_path):
    (tmp_path / "_native.so").write_bytes(b"no library")
    code = (
        "from h2a2_jax.sparse import native_call as call, native_maps\n"
        f"native_maps.__file__ = {str(tmp_path / 'native_maps.py')!r}\n"
        "print(call.has_native())\n"
    )
    out, errors = python(code)
    assert out == "False" and "_native.so cannot be used here" in errors
