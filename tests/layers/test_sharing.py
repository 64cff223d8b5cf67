"""Prompt-driven norms, residual adapters, and blocks with kernels of each dataset."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.layers import (
    AdapterConv,
    BatchNorm,
    DatasetContext,
    ForwardContext,
    PromptNorm,
    ResidualBlock,
    SelectionConfig,
    SparseConv,
)
from tests.layers.test_residual import EMBEDDING, KMAP, features, randomise
from tests.sparse.transcription import padded, table_of

FIRST, SECOND = (ForwardContext(DatasetContext.one(d, 2), EMBEDDING) for d in range(2))
VALID = int(KMAP.n_in)


def prompt_norm(**options):
    return PromptNorm(4, embedding_dim=3, num_datasets=2, **options)


@pytest.mark.parametrize("training", [False, True])
def test_a_prompt_norm_starts_as_a_batch_norm_bit_for_bit(training):
    x, context = features(KMAP), replace(SECOND, training=training)
    norm, plain = prompt_norm(), BatchNorm(4, num_datasets=2)
    for each in (norm, plain):
        each.scale[...], each.bias[...] = jnp.arange(1.0, 5), jnp.arange(4.0)
    np.testing.assert_array_equal(norm(x, context).features, plain(x, context).features)
    np.testing.assert_array_equal(norm.mean[...], plain.mean[...])
    assert (norm.mean[1] != 0).any() == training and not norm.mean[0].any()


@pytest.mark.parametrize("training", [False, True])
def test_the_prompt_scales_and_shifts_what_the_norm_returns(training):
    x, context = features(KMAP), replace(SECOND, training=training)
    norm, plain = randomise(prompt_norm()), BatchNorm(4, num_datasets=2)
    plain.scale[...], plain.bias[...] = norm.scale[...], norm.bias[...]
    e = np.asarray(EMBEDDING)
    s, t = np.split((e / (1 + np.exp(-e))) @ norm.prompt.kernel[...] + norm.prompt.bias[...], 2)
    y = norm(x, context).features
    expected = plain(x, context).features[:VALID] * (1 + s) + t
    np.testing.assert_allclose(y[:VALID], expected, rtol=1e-4, atol=1e-5)
    assert (y[VALID:] == 0).all() and np.abs(s).min() > 0.01


def test_prompts_may_differ_by_scan():
    x, norm = features(KMAP), randomise(prompt_norm())
    embeddings = jnp.stack([EMBEDDING, -EMBEDDING, 2 * EMBEDDING])
    together = norm(x, replace(SECOND, embedding=embeddings)).features
    for scan, embedding in enumerate(embeddings):
        rows = np.asarray(KMAP.inputs.scan) == scan
        alone = norm(x, replace(SECOND, embedding=embedding)).features
        np.testing.assert_allclose(together[rows], alone[rows], rtol=1e-5, atol=1e-5)
    assert (together[VALID:] == 0).all()


def test_the_map_is_shared_and_only_its_prompt_tells_datasets_apart():
    norm = prompt_norm()
    for variable in (norm.scale, norm.bias, norm.prompt.kernel, norm.prompt.bias):
        assert "dataset_axis" not in variable.get_metadata()
    randomise(norm)
    x, other = features(KMAP), replace(FIRST, embedding=EMBEDDING + 1)
    np.testing.assert_array_equal(norm(x, FIRST).features, norm(x, SECOND).features)  # statistics of the start
    assert np.abs(norm(x, FIRST).features - norm(x, other).features).max() > 0.1


def test_a_prompt_norm_without_an_embedding_is_refused():
    for context in (None, ForwardContext(training=True)):
        with pytest.raises(ValueError, match=r"^PromptNorm needs context.embedding, the embedding \[d\] of the data"):
            prompt_norm()(features(KMAP), context)
    with pytest.raises(ValueError, match=r"^PromptNorm takes embeddings of 64 numbers, given 3: build it with embedd"):
        PromptNorm(4, num_datasets=2)(features(KMAP), FIRST)


@pytest.mark.parametrize("size", [3, (3, 1, 5), 1])
def test_an_adapter_adds_its_product_with_the_features_of_the_site(size):
    kmap = padded(sparse.submanifold_neighbors(table_of("submanifold 3").inputs, size))
    layer = randomise(AdapterConv(4, 6, size, num_datasets=2, use_bias=True, rngs=nnx.Rngs(0)))
    plain = SparseConv(4, 6, size, use_bias=True, rngs=nnx.Rngs(0))
    plain.kernel[...], plain.bias[...] = layer.kernel[...], layer.bias[...]
    x = features(kmap)
    for d, context in enumerate((FIRST, SECOND)):
        expected = plain(x, kmap).features + x.features @ layer.adapter[d]
        np.testing.assert_allclose(layer(x, kmap, context).features, expected, rtol=1e-4, atol=1e-4)
    if size == 1:
        np.testing.assert_allclose(layer(x, None, SECOND).features, expected, rtol=1e-4, atol=1e-4)


def test_adapters_start_as_the_plain_convolution_bit_for_bit_and_are_exclusive():
    layer, plain = AdapterConv(4, 6, num_datasets=2, rngs=nnx.Rngs(5)), SparseConv(4, 6, rngs=nnx.Rngs(5))
    x = features(KMAP)
    np.testing.assert_array_equal(layer(x, KMAP, SECOND).features, plain(x, KMAP).features)
    assert layer.adapter.shape == (2, 4, 6) and layer.adapter.get_metadata()["dataset_axis"] == 0
    assert "dataset_axis" not in layer.kernel.get_metadata()


def test_the_gradient_reaches_the_adapter_of_the_dataset_alone():
    graph, params = nnx.split(AdapterConv(4, 6, num_datasets=2, rngs=nnx.Rngs(0)))
    x, weight = features(KMAP), np.random.default_rng(1).normal(size=(KMAP.out_capacity, 6)).astype(np.float32)
    slope = jax.grad(lambda p: (nnx.merge(graph, p)(x, KMAP, SECOND).features * weight).sum())(params)
    np.testing.assert_allclose(slope.adapter[1], x.features[:VALID].T @ weight[:VALID], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(slope.adapter[1], slope.kernel[13])
    assert not slope.adapter[0].any()


def test_the_mean_of_datasets_takes_the_mean_adapter_and_shared_kernels_none():
    layer, x = randomise(AdapterConv(4, 6, num_datasets=2, rngs=nnx.Rngs(0))), features(KMAP)
    kernels = {
        "mean": layer.kernel_of(ForwardContext()),
        "shared": layer.kernel_of(ForwardContext(DatasetContext.mean(2, "shared"))),
    }
    np.testing.assert_allclose(kernels["mean"][13], layer.kernel[13] + layer.adapter[...].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(kernels["mean"][:13], layer.kernel[:13])
    np.testing.assert_array_equal(kernels["shared"], layer.kernel[...])
    with pytest.raises(ValueError, match="a layer of 2 datasets trains on one at a time"):
        layer(x, KMAP, ForwardContext(training=True))


def test_adapters_where_a_site_is_not_its_own_neighbour_are_refused():
    down = padded(table_of("strided 3"))
    layer = AdapterConv(4, 6, num_datasets=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^AdapterConv was given a 'strided' map, it takes a 'submanifold' one"):
        layer(features(down), down, FIRST)
    with pytest.raises(ValueError, match=r"^AdapterConv was given a kernel of size \(3, 3, 2\), which has no centre"):
        AdapterConv(4, 6, (3, 3, 2), rngs=nnx.Rngs(0))


def test_half_precision_stays():
    x = features(KMAP)
    half = x.with_features(x.features.astype(jnp.bfloat16))
    context = replace(SECOND, dtype=jnp.bfloat16, training=True)
    layer, norm = randomise(AdapterConv(4, 4, num_datasets=2, rngs=nnx.Rngs(0))), randomise(prompt_norm())
    y = norm(layer(half, KMAP, context), context)
    wide = norm(layer(x, KMAP, replace(context, dtype=None)), replace(context, dtype=None))
    assert y.features.dtype == jnp.bfloat16 and norm.mean.dtype == jnp.float32
    np.testing.assert_allclose(y.features.astype(jnp.float32), wide.features, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("kernels", ["shared", "adapted", "exclusive"])
def test_which_convolutions_of_a_block_are_a_datasets_own(kernels, downsample):
    block = nnx.eval_shape(
        lambda: ResidualBlock(4, 6, downsample=downsample, kernels=kernels, num_datasets=2, rngs=nnx.Rngs(0))
    )
    parts = {"first": block.first.conv, "second": block.second.conv, "skip": block.skip.conv}
    adapted = {name for name, conv in parts.items() if isinstance(conv, AdapterConv)}
    assert adapted == (({"second"} if downsample else {"first", "second"}) if kernels == "adapted" else set())
    assert {conv.exclusive_to for conv in parts.values()} == ({2} if kernels == "exclusive" else {None})


def test_a_block_with_a_kernel_of_each_dataset_in_two_ways_is_refused():
    for kernels in ("adapted", "exclusive"):
        with pytest.raises(ValueError, match=rf"^block was given selection and kernels='{kernels}': selection has a k"):
            ResidualBlock(4, 4, kernels=kernels, selection=SelectionConfig(), rngs=nnx.Rngs(0))
