"""Linen layers equal the NNX layers they are named after, and are what a Linen user expects."""

import inspect
from dataclasses import MISSING, fields

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, nnx

from h2a2_jax import layers, linen, sparse
from h2a2_jax.layers import DatasetContext, ForwardContext, SelectionConfig
from h2a2_jax.layers.kernel_selection import READING_0_1_0
from tests.sparse.transcription import padded, random_sites

FINE = random_sites((30, 0, 25), stride=2)
COARSE = sparse.downsample(FINE, 2)
SAME = padded(sparse.submanifold_neighbors(FINE, 3))
DOWN = padded(sparse.strided_neighbors(FINE, COARSE, 3))
SKIP = sparse.pad_map(sparse.strided_neighbors(FINE, COARSE, 1), DOWN.inputs, DOWN.outputs)
INNER = sparse.pad_map(sparse.submanifold_neighbors(COARSE, 3), DOWN.outputs, DOWN.outputs)
BACK = sparse.pad_map(sparse.inverse_neighbors(sparse.strided_neighbors(FINE, COARSE, 3)), DOWN.outputs, DOWN.inputs)
SMALL = SelectionConfig(
    **READING_0_1_0,
    projection_dim=4,
    embedding_dim=3,
    hidden=5,
    exclusive_init="independent",
)
EMBEDDING = jnp.array([0.3, -1.0, 2.0])


def on(sites, channels=4):
    rows = np.random.default_rng(0).normal(size=(int(sites.n), channels)).astype(np.float32)
    return sparse.SparseTensor(jnp.asarray(sparse.pad_rows(rows, sites.capacity)), sites)


X, Y = on(SAME.inputs), on(DOWN.outputs)
TRAIN = ForwardContext(DatasetContext.one(1, 2), EMBEDDING, training=True)
SELECTED = {"selection": SMALL, "num_datasets": 2}
BLOCK = {"down_map": DOWN, "skip_map": SKIP}
CASES = {
    "SparseConv": ((4, 6), {"use_bias": True}, (X, SAME, TRAIN), {}),
    "SparseConv 1": ((4, 6, 1), {}, (X,), {}),
    "SparseConvTranspose": ((4, 6), {"use_bias": True}, (Y, BACK, TRAIN), {}),
    "AdapterConv": ((4, 6), {"use_bias": True, "num_datasets": 2}, (X, SAME, TRAIN), {}),
    "NeighborAttention": ((4,), {"num_heads": 2}, (X, SAME, TRAIN), {}),
    "SelectiveConv": ((4, 6), SELECTED, (X, SAME, TRAIN), {}),
    "LinearModulation": ((4,), {"embedding_dim": 3, "hidden": 5}, (X, EMBEDDING), {}),
    "ChannelGate": ((4,), {"embedding_dim": 3, "hidden": 5}, (X, EMBEDDING), {}),
    "BatchNorm": ((4,), {"num_datasets": 2}, (X, TRAIN), {}),
    "PromptNorm": ((4,), {"embedding_dim": 3, "num_datasets": 2}, (X, TRAIN), {}),
    "InstanceNorm": ((4,), {}, (X,), {}),
    "LayerNorm": ((4,), {}, (X, TRAIN), {}),
    "ConvNorm": ((4, 6), SELECTED, (X, SAME, TRAIN), {}),
    "ConvNorm up": ((4, 6), {"conv": "SparseConvTranspose", "num_datasets": 2}, (Y, BACK, TRAIN), {}),
    "ResidualBlock": ((4, 6), {"downsample": True, **SELECTED}, (X, INNER, TRAIN), BLOCK),
}


def module_of(case, package):
    args, options, _, _ = CASES[case]
    options = {k: getattr(package, v) if k == "conv" else v for k, v in options.items()}
    return getattr(package, case.split()[0])(*args, **options, **({"rngs": nnx.Rngs(0)} if package is layers else {}))


def shaken(tree, seed=0):
    """Values drawn anew, so that nothing starts silent."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape) * rng.choice([-1, 1], a.shape), a.dtype), tree
    )


@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_its_nnx_namesake_and_every_parameter_trains(case):
    module, (_, _, inputs, options) = module_of(case, linen), CASES[case]
    variables = module.init(jax.random.key(0), *inputs, **options)
    namesake = module_of(case, layers)
    assert set(variables) == {"params"} | ({"batch_stats"} if nnx.state(namesake, nnx.BatchStat) else set())
    params, stats = shaken(variables["params"]), variables.get("batch_stats", {})
    nnx.update(namesake, params)
    expected = namesake(*inputs, **options)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=expected.features.shape), jnp.float32)

    @jax.jit
    def step(params):
        def loss(params):
            y, updates = module.apply(
                {"params": params, "batch_stats": stats}, *inputs, **options, mutable=["batch_stats"]
            )
            return (y.features * weight).sum(), (y, updates)

        grads, (y, updates) = jax.grad(loss, has_aux=True)(params)
        changes, _ = optax.sgd(1.0).update(grads, optax.sgd(1.0).init(params))
        return y, updates.get("batch_stats", {}), optax.apply_updates(params, changes)

    y, updates, moved = step(params)
    np.testing.assert_allclose(y.features, expected.features, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        updates,
        nnx.to_pure_dict(nnx.state(namesake, nnx.BatchStat)),
    )
    assert jax.tree.all(jax.tree.map(lambda old, new: (old != new).any(), params, moved)), case


@pytest.mark.parametrize("case", CASES)
def test_a_layer_has_the_arguments_of_its_namesake(case):
    wanted = {
        name: p.default if p.default is not inspect.Parameter.empty else MISSING
        for name, p in inspect.signature(type(module_of(case, layers)).__init__).parameters.items()
        if name not in ("self", "rngs", "name")
    }
    own = {f.name: f.default for f in fields(type(module_of(case, linen))) if f.name not in ("parent", "name")}
    assert own | {"conv": None} == wanted | {"conv": None} and list(own) == list(wanted)


def test_everything_without_parameters_is_here_too():
    assert set(layers.__all__) - set(linen.__all__) == {
        "AgreementLayers", "EmbeddingMLP", "binarize", "instance_norm", "layer_norm", "structural_consistency",
        "tabulate", "weights",
    }  # fmt: skip


class Compact(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, same, down, context=None):
        x = linen.relu(linen.ConvNorm(4, self.width)(x, same, context))
        x = linen.SparseConv(self.width, self.width, name="down")(x, down, context)
        return nn.Dense(2)(linen.global_pool(linen.relu(x)))


class Setup(nn.Module):
    width: int

    def setup(self):
        self.first = linen.ConvNorm(4, self.width)
        self.second = linen.SparseConv(self.width, self.width)
        self.head = nn.Dense(2)

    def __call__(self, x, same, down, context=None):
        x = linen.relu(self.first(x, same, context))
        return self.head(linen.global_pool(linen.relu(self.second(x, down, context))))


@pytest.mark.parametrize("model", [Compact(6), Setup(6)], ids=["compact", "setup"])
def test_layers_work_inside_linen_modules(model):
    inputs, train = (X, SAME, DOWN), ForwardContext(training=True)
    variables = model.init(jax.random.key(0), *inputs)
    first = next(iter(variables["batch_stats"]))
    assert variables["params"][first]["conv"]["kernel"].shape == (27, 4, 6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    assert (variables["batch_stats"][first]["norm"]["mean"] == 0).all()
    y, updates = jax.jit(lambda v: model.apply(v, *inputs, train, mutable=["batch_stats"]))(variables)
    assert y.shape == (3, 2) and (updates["batch_stats"][first]["norm"]["mean"] != 0).any()
    later = {**variables, **updates}
    assert (model.apply(later, *inputs) != model.apply(variables, *inputs)).any()
    with pytest.raises(errors.ModifyScopeVariableError):
        model.apply(variables, *inputs, train)
    kernels = [v["params"][first]["conv"]["kernel"] for v in (variables, model.init(jax.random.key(1), *inputs))]
    assert (kernels[0] != kernels[1]).all()


def test_parameters_are_mapped_over():
    conv = linen.SparseConv(4, 6)
    stacked = jax.vmap(lambda key: conv.init(key, X, SAME))(jax.random.split(jax.random.key(0), 3))
    mapped = jax.vmap(lambda v: conv.apply(v, X, SAME).features)(stacked)
    for i in range(3):
        one = conv.apply(jax.tree.map(lambda a, i=i: a[i], stacked), X, SAME).features
        np.testing.assert_allclose(mapped[i], one, rtol=1e-4, atol=1e-5)
    lifted = nn.vmap(
        linen.SparseConv, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(None, None), axis_size=3
    )(4, 6)
    variables = lifted.init(jax.random.key(0), X, SAME)
    assert variables["params"]["kernel"].shape == (3, 27, 4, 6)
    expected = jax.vmap(lambda v: conv.apply(v, X, SAME).features)(variables)
    np.testing.assert_allclose(lifted.apply(variables, X, SAME).features, expected, rtol=1e-4, atol=1e-5)


def test_layers_may_be_rematerialised():
    block, plain = nn.remat(linen.ConvNorm)(4, 6), linen.ConvNorm(4, 6)
    variables = plain.init(jax.random.key(0), X, SAME)
    train = ForwardContext(training=True)

    def gradient(module):
        return jax.grad(
            lambda p: (
                module.apply({**variables, "params": p}, X, SAME, train, mutable=["batch_stats"])[0].features ** 2
            ).sum()
        )(variables["params"])

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, gradient(block), gradient(plain))


def test_algorithm_and_compute_type_are_arguments():
    variables = linen.SparseConv(4, 6).init(jax.random.key(0), X, SAME)
    apply = lambda **options: linen.SparseConv(4, 6, **options).apply(variables, X, SAME).features  # noqa: E731
    expected = apply(algorithm="segment_sum")
    for algorithm in ("gather", "tiles", "im2col"):
        np.testing.assert_allclose(apply(algorithm=algorithm), expected, rtol=1e-4, atol=1e-5)
    half = apply(dtype=jnp.bfloat16)
    np.testing.assert_allclose(half, expected, atol=0.1)
    assert (half != expected).any() and half.dtype == jnp.float32


def test_variables_that_do_not_fit_raise():
    variables = linen.SparseConv(4, 6).init(jax.random.key(0), X, SAME)
    with pytest.raises(errors.ScopeParamShapeError, match="kernel"):
        linen.SparseConv(4, 7).apply(variables, X, SAME)
    with pytest.raises(errors.ScopeParamNotFoundError, match="bias"):
        linen.SparseConv(4, 6, use_bias=True).apply(variables, X, SAME)
    with pytest.raises(ValueError, match="on different sites"):
        linen.SparseConv(4, 6).apply(variables, Y, SAME)
    with pytest.raises(ValueError, match=r"needs context\.embedding"):
        linen.SelectiveConv(4, 6).init(jax.random.key(0), X, SAME)
