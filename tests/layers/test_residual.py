import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.layers import (
    ChannelGate,
    ConvNorm,
    DatasetContext,
    ForwardContext,
    LinearModulation,
    ResidualBlock,
    SelectionConfig,
    SparseConv,
    SparseConvTranspose,
)
from h2a2_jax.layers.sparse_conv import kaiming_fan_out, uniform_fan_out
from tests.sparse.transcription import padded, table_of

SELECTION = SelectionConfig(projection_dim=4, embedding_dim=3, hidden=5, exclusive_init="independent")


def features(kmap, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(int(kmap.n_in), channels)).astype(np.float32)
    return sparse.SparseTensor(jnp.asarray(sparse.pad_rows(rows, kmap.in_capacity)), kmap.inputs)


def randomise(module, seed=0):
    """Every parameter drawn anew, so that nothing starts silent."""
    _, params, _ = nnx.split(module, nnx.Param, ...)
    rng = np.random.default_rng(seed)
    nnx.update(module, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params))
    return module


KMAP = padded(table_of("submanifold 3"))
EMBEDDING = jnp.array([0.3, -1.0, 2.0])


def test_modulation_starts_as_the_identity():
    x = features(KMAP)
    y = LinearModulation(4, embedding_dim=3, hidden=5, rngs=nnx.Rngs(0))(x, EMBEDDING)
    np.testing.assert_array_equal(y.features, x.features)


def test_modulation_is_affine_by_channel_on_valid_sites():
    x = features(KMAP)
    layer = randomise(LinearModulation(4, embedding_dim=3, hidden=5, rngs=nnx.Rngs(0)))
    y, n = layer(x, EMBEDDING).features, int(KMAP.n_in)
    mlp = layer.mlp
    hidden = np.maximum(EMBEDDING @ mlp.hidden.kernel[...] + mlp.hidden.bias[...], 0)
    out = hidden @ mlp.out.kernel[...] + mlp.out.bias[...]
    np.testing.assert_allclose(y[:n], x.features[:n] * (1 + out[:4]) + out[4:], rtol=1e-5, atol=1e-5)
    assert (y[n:] == 0).all() and (out[4:] != 0).all()


def test_the_gate_starts_at_one_and_a_half():
    x = features(KMAP)
    layer = ChannelGate(4, embedding_dim=3, hidden=5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, EMBEDDING).features, 1.5 * x.features)
    ratio = randomise(layer)(x, EMBEDDING).features[0] / x.features[0]
    assert ((ratio > 1) & (ratio < 2)).all()


def test_layers_keep_half_precision():
    x = features(KMAP)
    half = x.with_features(x.features.astype(jnp.bfloat16))
    for layer in (LinearModulation, ChannelGate):
        assert layer(4, embedding_dim=3, hidden=5, rngs=nnx.Rngs(0))(half, EMBEDDING).features.dtype == jnp.bfloat16


@pytest.mark.parametrize("training", [False, True])
def test_the_gate_follows_the_norm(training):
    x = features(KMAP)
    layer = ConvNorm(4, 6, selection=SELECTION, num_datasets=2, name="c", rngs=nnx.Rngs(0))
    randomise(layer.gate)
    context = ForwardContext(DatasetContext.one(1, 2), EMBEDDING, training=training)
    y = layer(x, KMAP, context)
    convolved = layer.conv(x, KMAP, context)
    again = ConvNorm(4, 6, num_datasets=2, rngs=nnx.Rngs(0)).norm  # the other's statistics have moved
    normed = again(convolved, context)
    np.testing.assert_allclose(y.features, layer.gate(normed, EMBEDDING).features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selection", [None, SELECTION], ids=["plain", "selection"])
def test_a_residual_block_is_its_formula(selection):
    table, coarse = table_of("strided 3"), None
    down = padded(table)
    coarse = table.outputs
    inner = sparse.pad_map(sparse.submanifold_neighbors(coarse, 3), down.outputs, down.outputs, tile_size=16)
    skip_table = sparse.strided_neighbors(table.inputs, coarse, 1)
    skip = sparse.pad_map(skip_table, down.inputs, down.outputs)
    block = ResidualBlock(4, 6, downsample=True, selection=selection, num_datasets=2, rngs=nnx.Rngs(0))
    context = ForwardContext(DatasetContext.one(0, 2), EMBEDDING)
    x = features(down)
    y = block(x, inner, context, down_map=down, skip_map=skip).features
    first = jax.nn.relu(block.first(x, down, context).features)
    second = block.second(sparse.SparseTensor(first, down.outputs), inner, context).features
    np.testing.assert_array_equal(y, jax.nn.relu(second + block.skip(x, skip, context).features))
    assert (y[int(down.n_out) :] == 0).all() and y.max() > 0
    with pytest.raises(ValueError, match="needs down_map and skip_map"):
        block(x, inner, context)

    plain = ResidualBlock(6, 6, selection=selection, num_datasets=2, rngs=nnx.Rngs(0))
    z = sparse.SparseTensor(y, down.outputs)
    first = jax.nn.relu(plain.first(z, inner, context).features)
    second = plain.second(z.with_features(first), inner, context).features
    np.testing.assert_array_equal(plain(z, inner, context).features, jax.nn.relu(second + y))


def test_a_block_may_change_its_width_alone_and_go_without_a_context():
    block, x = ResidualBlock(4, 6, rngs=nnx.Rngs(0)), features(KMAP)
    first = jax.nn.relu(block.first(x, KMAP).features)
    second = block.second(x.with_features(first), KMAP).features
    y = block(x, KMAP)
    np.testing.assert_array_equal(y.features, jax.nn.relu(second + block.skip(x).features))
    assert y.features.shape == (KMAP.out_capacity, 6) and block.first.norm.mean[0].max() == 0


def test_convolutions_add_their_bias_to_sites_only():
    layer = SparseConv(4, 5, use_bias=True, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(5.0)
    x, n = features(KMAP), int(KMAP.n_out)
    y = layer(x, KMAP).features
    bare = sparse.convolve(x.features, layer.kernel[...][None], KMAP)
    np.testing.assert_allclose(y[:n], bare[:n] + np.arange(5), rtol=1e-6, atol=1e-6)
    assert (y[n:] == 0).all()


def test_kernels_start_as_stated():
    key = jax.random.key(0)
    kernel = kaiming_fan_out(key, (27, 40, 50))
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, (2 / (27 * 50)) ** 0.5], rtol=0.02, atol=1e-3)
    kernel, bound = uniform_fan_out(key, (27, 40, 50)), (27 * 50) ** -0.5
    assert 0.99 * bound < abs(kernel).max() <= bound and abs(kernel.mean()) < 0.01 * bound
    layer = SparseConvTranspose(40, 50, rngs=nnx.Rngs(0))
    assert abs(layer.kernel[...]).max() <= bound and SparseConv(40, 50, rngs=nnx.Rngs(0)).kernel[...].max() > bound
