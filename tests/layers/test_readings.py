"""Each choice that the paper leaves open does what it says, and something else than the default."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.layers import BatchNorm, ConvNorm, DatasetContext, ForwardContext, SelectionConfig, SparseConv
from h2a2_jax.layers.kernel_selection import READING_0_1_0, SelectiveConv, structural_consistency
from h2a2_jax.layers.modulation import modulate
from tests.sparse.transcription import padded, table_of

CHANNELS, DATASETS = 6, 2
PLAIN = SelectionConfig(
    **READING_0_1_0,
    projection_dim=4,
    embedding_dim=3,
    hidden=5,
    embedding_start="random",
    exclusive_init="independent",
)
"""Random last layers, so that modulation and gate say something."""


def scene(seed=0, counts=(20, 0, 17)):
    table = table_of("submanifold 3", counts=counts)
    kmap, rng = padded(table), np.random.default_rng(seed)
    scans = 2 * rng.normal(size=(len(counts), CHANNELS))
    rows = rng.normal(size=(len(table.inputs), CHANNELS)) + scans[table.inputs.scan]
    return kmap, sparse.SparseTensor(jnp.asarray(sparse.pad_rows(rows, kmap.in_capacity), jnp.float32), kmap.inputs)


def run(layer, kmap, x, dataset=0, embedding=None, **options):
    """Output features and what reached the tap."""
    taps = {}
    if embedding is None:
        embedding = jnp.arange(1.0, 4.0)
    context = ForwardContext(DatasetContext.one(dataset, DATASETS), embedding, tap=taps.__setitem__, **options)
    return layer(x, kmap, context).features, taps


def conv(seed=0, **choices):
    selection = replace(PLAIN, **choices)
    return SelectiveConv(CHANNELS, 5, num_datasets=DATASETS, selection=selection, name="c", rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("place", ["before_norm", "after_norm"])
def test_a_gate_before_the_norm_has_no_effect_in_training(place):
    kmap, x = scene()
    # eps 0: with it the cancellation is exact but for rounding.
    layer = ConvNorm(
        CHANNELS, 5, norm=lambda channels, **k: BatchNorm(channels, eps=0.0, **k), selection=replace(PLAIN, gate=place),
        num_datasets=DATASETS, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graph, gate, rest = nnx.split(layer, lambda path, _: path[0] == "gate", ...)
    weight = jax.random.normal(jax.random.key(1), (kmap.out_capacity, 5))

    @jax.jit
    def features_and_gradient(gate):
        def weighted(gate):
            features = run(nnx.merge(graph, gate, rest, copy=True), kmap, x, training=True)[0]
            return (features * weight).sum(), features

        gradient, features = jax.grad(weighted, has_aux=True)(gate)
        return features, gradient

    features, gradient = features_and_gradient(gate)
    moved = jnp.abs(features - features_and_gradient(jax.tree.map(lambda leaf: leaf + 0.7, gate))[0]).max()
    slope = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    if place == "before_norm":
        assert moved < 1e-5 and slope < 1e-4
    else:
        assert moved > 0.1 and slope > 0.1


@pytest.mark.parametrize("kernels", ["shared", "exclusive"])
def test_without_selection_all_offsets_take_one_kernel_behind_modulation(kernels):
    kmap, x = scene()
    layer, selecting = conv(kernels=kernels), conv()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(layer), nnx.state(selecting)))
    stack = layer.shared[...] if kernels == "shared" else layer.exclusive[1]
    modulated = layer.modulation(x, jnp.arange(1.0, 4.0))
    assert not np.allclose(modulated.features, x.features)
    y, taps = run(layer, kmap, x, dataset=1)
    np.testing.assert_array_equal(y, sparse.convolve(modulated.features, stack[None], kmap))
    assert taps == {}
    assert not np.allclose(y, run(selecting, kmap, x, dataset=1)[0])


def test_a_scope_of_the_batch_makes_one_choice_for_all_its_scans():
    kmap, x = scene()
    _, by_scan = run(conv(), kmap, x)
    _, by_batch = run(conv(scope="batch"), kmap, x)
    assert not np.allclose(by_scan["c.beta"][0], by_scan["c.beta"][2])
    np.testing.assert_array_equal(by_batch["c.beta"], np.tile(by_batch["c.beta"][:1], (3, 1)))
    sizes = np.array([20, 0, 17])
    np.testing.assert_allclose(by_batch["c.beta"][0], sizes @ by_scan["c.beta"] / sizes.sum(), rtol=1e-5)


def test_structure_is_read_behind_or_in_front_of_modulation():
    kmap, x = scene()
    layer = conv()
    modulated = modulate(x, *layer.modulation.factors(jnp.arange(1.0, 4.0)))
    for choice, seen in (("modulated", modulated), ("input", x)):
        _, taps = run(conv(structural_features=choice), kmap, x)
        beta = structural_consistency(seen, layer.projection[...], layer.prototypes[...])
        np.testing.assert_allclose(taps["c.beta"], beta, rtol=1e-5)
    assert not np.allclose(structural_consistency(x, layer.projection[...], layer.prototypes[...]), taps["c.beta"] + 1)
    assert np.abs(run(conv(), kmap, x)[1]["c.beta"] - taps["c.beta"]).max() > 0.01


def test_structure_parameters_of_each_dataset():
    kmap, x = scene()
    shared, own = conv(), conv(structure_parameters="exclusive")
    for name in ("prior", "projection", "prototypes"):
        variable = getattr(own, name)
        assert variable.shape == (DATASETS, *getattr(shared, name).shape)
        assert variable.get_metadata()["dataset_axis"] == 0
        assert "dataset_axis" not in getattr(shared, name).get_metadata()
    own.prior[...] = jnp.stack([jnp.full(27, -5.0), jnp.full(27, 5.0)])

    def slopes(layer):
        """Gradient of a layer's summed output and what reached the tap, of each dataset."""
        graph, state = nnx.split(layer)

        def total(state, dataset):
            y, taps = run(nnx.merge(graph, state), kmap, x, dataset)
            return y.sum(), taps

        slope = jax.jit(jax.grad(total, has_aux=True))
        return [slope(state, jnp.asarray(dataset)) for dataset in range(DATASETS)]

    (_, first), (slope, second) = slopes(own)
    assert first["c.gamma"].mean() == 0 and second["c.gamma"].mean() > 0.5
    np.testing.assert_array_equal(*(taps["c.beta"] for _, taps in slopes(shared)))
    for name in ("prior", "projection", "prototypes"):
        gradient = np.asarray(getattr(slope, name)[...])
        assert (gradient[0] == 0).all() and np.abs(gradient[1]).max() > 0


def test_modulation_and_gate_start_silent_or_at_random():
    _, x = scene()
    zero, random = (SelectiveConv(CHANNELS, 5, selection=replace(PLAIN, embedding_start=start), rngs=nnx.Rngs(0))
                    for start in ("zero", "random"))  # fmt: skip
    embedding = jnp.arange(1.0, 4.0)
    np.testing.assert_array_equal(zero.modulation(x, embedding).features, x.features)
    assert np.abs(random.modulation(x, embedding).features - x.features).max() > 0.1
    block = ConvNorm(CHANNELS, 5, selection=replace(PLAIN, embedding_start="zero"), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(block.gate.factor(embedding), 1.5)


def test_embeddings_may_differ_by_scan():
    kmap, x = scene()
    layer = ConvNorm(CHANNELS, 5, selection=PLAIN, num_datasets=DATASETS, rngs=nnx.Rngs(0))
    embeddings = jax.random.normal(jax.random.key(0), (3, 3))
    together, _ = run(layer, kmap, x, embedding=embeddings)
    for b in range(3):
        alone, _ = run(layer, kmap, x, embedding=embeddings[b])
        rows = np.asarray(kmap.out_scan) == b
        np.testing.assert_allclose(together[rows], alone[rows], rtol=1e-5, atol=1e-5)
    assert np.abs(together - run(layer, kmap, x, embedding=embeddings[0])[0]).max() > 0.1
    rows = np.asarray(kmap.out_scan) == 3
    assert rows.any() and (np.asarray(together)[rows] == 0).all()


@pytest.mark.parametrize("force", ["context", "threshold"])
def test_with_every_gamma_one_it_is_the_plain_convolution_with_modulation_and_gate(force):
    kmap, x = scene()
    selection = replace(PLAIN, tau=0.0 if force == "threshold" else 0.25)
    layer = ConvNorm(CHANNELS, 5, selection=selection, num_datasets=DATASETS, rngs=nnx.Rngs(0))
    embedding = jnp.arange(1.0, 4.0)
    kernels = "shared" if force == "context" else "selected"
    context = ForwardContext(replace(DatasetContext.one(1, DATASETS), kernels=kernels), embedding)
    graph, state = nnx.split(layer)
    weight = jax.random.normal(jax.random.key(1), (kmap.out_capacity, 5))

    def selective(state):
        return (nnx.merge(graph, state)(x, kmap, context).features * weight).sum()

    def plain(state):
        layer = nnx.merge(graph, state)
        y = modulate(x, *layer.conv.modulation.factors(embedding))
        y = sparse.convolve(y.features, layer.conv.shared[...][None], kmap)
        y = layer.norm(sparse.SparseTensor(y, kmap.outputs), ForwardContext(context.dataset))
        return (y.features * layer.gate.factor(embedding) * weight).sum()

    (ours, slope), (theirs, expected) = (jax.jit(jax.value_and_grad(way))(state) for way in (selective, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(slope.conv.shared[...], expected.conv.shared[...], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slope.gate.mlp.out.kernel[...], expected.gate.mlp.out.kernel[...], rtol=1e-4, atol=1e-4)
    assert (slope.conv.exclusive[...] == 0).all()


def test_scale_and_bias_of_each_dataset():
    _, x = scene()
    norm = BatchNorm(CHANNELS, num_datasets=DATASETS, exclusive_affine=True)
    norm.scale[...] = jnp.stack([jnp.ones(CHANNELS), jnp.full(CHANNELS, 3.0)])
    first, second = (norm(x, ForwardContext(DatasetContext.one(d, DATASETS))).features for d in range(DATASETS))
    np.testing.assert_allclose(second, 3 * first, rtol=1e-6)
    assert norm.bias.get_metadata()["dataset_axis"] == 0 and norm.bias.shape == (DATASETS, CHANNELS)
    assert BatchNorm(CHANNELS, num_datasets=DATASETS).scale.shape == (CHANNELS,)


@pytest.mark.parametrize("shared", [False, True])
def test_running_statistics_of_each_dataset_or_of_all(shared):
    _, x = scene()
    norm = BatchNorm(CHANNELS, num_datasets=DATASETS, shared_statistics=shared)
    norm(x, ForwardContext(DatasetContext.one(1, DATASETS), training=True))
    assert np.abs(norm.mean[1]).max() > 0
    np.testing.assert_array_equal(norm.mean[0], norm.mean[1] if shared else np.zeros(CHANNELS))
    np.testing.assert_array_equal(norm.var[0], norm.var[1] if shared else np.ones(CHANNELS))


def test_kernels_of_each_dataset():
    kmap, x = scene()
    layer = SparseConv(CHANNELS, 5, exclusive_to=DATASETS, use_bias=True, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.array([[0.0] * 5, [1.0] * 5])
    assert layer.kernel.get_metadata()["dataset_axis"] == layer.bias.get_metadata()["dataset_axis"] == 0
    valid = np.asarray(kmap.outputs.valid)[:, None]
    for d in range(DATASETS):
        y = layer(x, kmap, ForwardContext(DatasetContext.one(d, DATASETS))).features
        expected = sparse.convolve(x.features, layer.kernel[d][None], kmap) + d * valid
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(layer.kernel[0], layer.kernel[1])
