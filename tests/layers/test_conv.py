import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.layers import ForwardContext, SelectiveConv, SparseConv, SparseConvTranspose
from tests.sparse.transcription import convolve, padded, pairs_by_search, random_sites

FINE = random_sites((50, 0, 40), stride=2)
COARSE = sparse.downsample(FINE, 2)
DOWN = sparse.strided_neighbors(FINE, COARSE, 2)
KMAP, BACK = padded(DOWN), padded(sparse.inverse_neighbors(DOWN))


def on(sites, channels=4, seed=0):
    rows = np.random.default_rng(seed).normal(size=(int(sites.n), channels)).astype(np.float32)
    return sparse.SparseTensor(jnp.asarray(sparse.pad_rows(rows, sites.capacity)), sites)


@pytest.mark.parametrize("size", [(3, 3), (1, 5), 3])
def test_two_dimensional_kernels(size):
    pixels = sparse.site_set(np.random.default_rng(0).integers(0, 9, (60, 3)).astype(np.int32) % [2, 9, 9])
    kmap = padded(sparse.submanifold_neighbors(pixels, size))
    layer, x = SparseConv(4, 5, size, rngs=nnx.Rngs(0)), on(kmap.inputs)
    pairs = pairs_by_search(pixels.coords, pixels.coords, sparse.kernel_offsets(size))
    expected = convolve(np.asarray(x.features, np.float64), np.asarray(layer.kernel)[None], pairs, pixels.scan)
    np.testing.assert_allclose(layer(x, kmap).features[: len(pixels)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [SparseConv, SparseConvTranspose])
def test_an_inverse_map_leads_back_to_the_sites_it_came_from(layer):
    """Inverse convolution with the transposed slices is the adjoint of the strided convolution."""
    down, up = SparseConv(4, 5, 2, rngs=nnx.Rngs(0)), layer(5, 4, 2, rngs=nnx.Rngs(1))
    up.kernel[...] = down.kernel[...].swapaxes(1, 2)
    x, y = on(KMAP.inputs), on(BACK.inputs, 5, seed=1)
    there, back = down(x, KMAP).features, up(y, BACK)
    assert back.sites is BACK.outputs
    n_fine, n_coarse = len(FINE), len(COARSE)
    forward = (there[:n_coarse] * y.features[:n_coarse]).sum()
    np.testing.assert_allclose((x.features[:n_fine] * back.features[:n_fine]).sum(), forward, rtol=1e-4)


def test_a_kernel_of_one_slice_mixes_channels_without_a_map():
    layer, x = SparseConv(4, 3, 1, use_bias=True, rngs=nnx.Rngs(0)), on(KMAP.inputs)
    layer.bias[...] = jnp.arange(3.0)
    y, n = layer(x), int(KMAP.n_in)
    np.testing.assert_allclose(y.features[:n], x.features[:n] @ layer.kernel[0] + np.arange(3), rtol=1e-5, atol=1e-6)
    assert (y.features[n:] == 0).all() and y.sites is x.sites
    mapped = layer(x, padded(sparse.submanifold_neighbors(FINE, 1)))
    np.testing.assert_allclose(y.features, mapped.features, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="8 slices was given no kernel map"):
        SparseConv(4, 3, 2, rngs=nnx.Rngs(0))(x)


def test_a_layer_states_its_compute_type_or_takes_the_contexts():
    x = on(KMAP.inputs)
    plain, half = (SparseConv(4, 3, 2, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (None, jnp.bfloat16))
    expected = plain(x, KMAP, ForwardContext(dtype=jnp.bfloat16)).features
    assert expected.dtype == jnp.float32
    np.testing.assert_array_equal(half(x, KMAP).features, expected)
    assert (expected != plain(x, KMAP).features).any()
    exact = SparseConv(4, 3, 2, algorithm="segment_sum", dtype=jnp.float32, rngs=nnx.Rngs(0))
    jaxpr = str(
        jax.make_jaxpr(lambda x: exact(x, KMAP, ForwardContext(algorithm="tiles", dtype=jnp.bfloat16)).features)(x)
    )
    assert "bf16" not in jaxpr and "while" not in jaxpr
    bare = on(KMAP.inputs).with_features(x.features.astype(jnp.bfloat16))
    assert SparseConv(4, 3, 2, use_bias=True, rngs=nnx.Rngs(0))(bare, KMAP).features.dtype == jnp.bfloat16


def test_inputs_that_do_not_fit_raise():
    x = on(KMAP.inputs)
    for layer in (
        SparseConv(4, 3, 2, rngs=nnx.Rngs(0)),
        SelectiveConv(4, 3, 2, num_datasets=1, name="SparseConv", rngs=nnx.Rngs(0)),
    ):
        context = ForwardContext(embedding=jnp.ones(64))
        with pytest.raises(ValueError, match="SparseConv takes 4 channels, given features of 5"):
            layer(on(KMAP.inputs, 5), KMAP, context)
        with pytest.raises(ValueError, match="kernel of 8 slices, given a map of 27 offsets"):
            layer(x, padded(sparse.submanifold_neighbors(FINE, 3)), context)
        with pytest.raises(ValueError, match="on different sites"):
            layer(x, BACK, context)
    with pytest.raises(ValueError, match="given a 'strided' map, it takes a 'generative' or an 'inverse'"):
        SparseConvTranspose(4, 3, 2, rngs=nnx.Rngs(0))(x, KMAP)
    with pytest.raises(ValueError, match="given no map"):
        SparseConvTranspose(4, 3, 1, rngs=nnx.Rngs(0))(x)


def test_groups_of_channels_without_a_map():
    layer, x = SparseConv(4, 6, 1, groups=2, use_bias=True, rngs=nnx.Rngs(0)), on(KMAP.inputs)
    kernel, n = np.asarray(layer.kernel[0]), int(KMAP.n_in)
    assert kernel.shape == (2, 6)
    expected = np.concatenate([x.features[:n, :2] @ kernel[:, :3], x.features[:n, 2:] @ kernel[:, 3:]], 1)
    np.testing.assert_allclose(layer(x).features[:n], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="SparseConv takes 4 channels, given features of 5"):
        layer(on(KMAP.inputs, 5))
