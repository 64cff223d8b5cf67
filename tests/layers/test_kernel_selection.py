"""SF-KS against a transcription in float64 numpy, scan by scan and offset by offset."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.layers import DatasetContext, ForwardContext, SelectionConfig, SelectiveConv, binarize
from h2a2_jax.layers.kernel_selection import structural_consistency
from tests.sparse.transcription import padded, pairs_of, table_of

C_IN, C_OUT, DATASETS, DATASET = 3, 2, 3, 1
SMALL = {"projection_dim": 4, "embedding_dim": 3, "hidden": 5}
READINGS = {
    "default": SelectionConfig(**SMALL),
    "learned": SelectionConfig(prior="learned", consistency="half_cosine", **SMALL),
    "others": SelectionConfig(
        tau=0.05,
        prior="learned",
        consistency="relu_cosine",
        straight_through="identity",
        exclusive_init="independent",
        **SMALL,
    ),
    "batch of inputs": SelectionConfig(scope="batch", structural_features="input", tau=0.26, **SMALL),
    "pairs": SelectionConfig(pooling="pairs", tau=0.24, **SMALL),
    "batch of pairs": SelectionConfig(pooling="pairs", scope="batch", tau=0.23, **SMALL),
    "kernels": SelectionConfig(prototypes="kernels", agreement_threshold=1.5, agreement_sharpness=2.0, **SMALL),
}
NEAR_TIE = 1e-5
"""Scores nearer to the threshold than this would leave the choice of a kernel to rounding."""


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-12)


class Transcription:
    """The method for the sites of one map; parameters are a dict of float64 arrays."""

    def __init__(self, table, pairs, selection):
        self.selection = selection
        self.scan_in, self.scan_out = table.inputs.scan, table.outputs.scan
        self.num_scans = table.inputs.num_scans
        self.pairs = [np.array(found, int).reshape(-1, 2) for found in pairs]
        shape = (self.num_scans, len(pairs), len(self.scan_in))
        self.pooling = np.array([self.pooled(*index) for index in np.ndindex(shape)]).reshape(shape)

    def pooled(self, b, j, i):
        """Weight of site i in the mean for scan b and offset j."""
        batch = self.selection.scope == "batch"
        if self.selection.pooling == "pairs":
            outputs = self.pairs[j][self.pairs[j][:, 0] == i, 1]
            found = len(outputs) if batch else (self.scan_out[outputs] == b).sum()
            return found / max(len(self.scan_out) if batch else (self.scan_out == b).sum(), 1)
        return (batch or self.scan_in[i] == b) / max(len(self.scan_in) if batch else (self.scan_in == b).sum(), 1)

    def modulated(self, p):
        hidden = np.maximum(p["embedding"] @ p["hidden_kernel"] + p["hidden_bias"], 0)
        out = hidden @ p["out_kernel"] + p["out_bias"]
        return p["x"] * (1 + out[:C_IN]) + out[C_IN:]

    def scores(self, p):
        """alpha * beta, [B, V]."""
        x = self.modulated(p) if self.selection.structural_features == "modulated" else p["x"]
        logit = p["prior"]
        if self.selection.prior == "agreement":
            s = self.selection
            logit = logit + s.agreement_sharpness * np.log(s.agreement_threshold / p["disagreement"])
        alpha = sigmoid(logit)
        self.parted = logit < 0 if self.selection.prior == "agreement" else np.ones(len(logit), bool)
        cosine = self.cosines(p, x)
        match self.selection.consistency:
            case "half_cosine":
                beta = (1 + cosine) / 2
            case "centered_cosine":
                beta = np.clip((1 + cosine - p["center"]) / 2, 0, 1)
            case _:
                beta = np.maximum(cosine, 0)
        return alpha * beta

    def cosines(self, p, x):
        """Mean cosines of the scans' sites with the prototypes of the offsets, [B, V]."""
        by_kernels = self.selection.prototypes == "kernels"
        prototypes = unit(p["shared"].mean(-1) @ p["projection"] if by_kernels else p["prototypes"])
        return np.einsum("bji,ij->bj", self.pooling, unit(x @ p["projection"]) @ prototypes.T)

    def soft(self, scores):
        s = self.selection
        return sigmoid((scores - s.tau) / s.temperature) if s.straight_through == "sigmoid" else scores

    def outputs(self, p, gamma):
        x, y = self.modulated(p), np.zeros((len(self.scan_out), C_OUT))
        for j, found in enumerate(self.pairs):
            own = p["exclusive"][DATASET, j] if self.parted[j] else p["shared"][j]
            share = gamma[:, j, None, None]
            kernels = share * p["shared"][j] + (1 - share) * own  # of the scans
            y[found[:, 1]] += np.einsum("ni,nio->no", x[found[:, 0]], kernels[self.scan_out[found[:, 1]]])
        return y

    def objective(self, weight, p0):
        """The function whose derivative at p0 is the straight-through gradient: gamma moves with its surrogate."""
        at_start = self.scores(p0)
        hard, soft_at_start = (at_start >= self.selection.tau).astype(float), self.soft(at_start)
        moves_gamma = {"x", "prior", "projection", "prototypes", "embedding", "hidden_kernel", "hidden_bias",
                       "out_kernel", "out_bias"}  # fmt: skip

        def value(p, name):
            gamma = hard + (self.soft(self.scores(p)) - soft_at_start if name in moves_gamma else 0)
            return (self.outputs(p, gamma) * weight).sum()

        return value


def parameters(selection, table, seed=0):
    """Everything drawn at random, so that nothing starts silent."""
    rng = np.random.default_rng(seed)
    volume, s = len(table.rows), selection
    return {
        # Scans of different character, so that they choose different kernels.
        "x": rng.normal(size=(len(table.inputs), C_IN)) + 2 * rng.normal(size=(9, C_IN))[table.inputs.scan],
        "embedding": rng.normal(size=s.embedding_dim),
        "shared": rng.normal(size=(volume, C_IN, C_OUT)),
        "exclusive": rng.normal(size=(DATASETS, volume, C_IN, C_OUT)),
        "prior": rng.normal(size=volume) * (0.3 if s.prior == "learned" else 0.1),
        "projection": rng.normal(size=(C_IN, s.projection_dim)),
        "prototypes": rng.normal(size=(volume, s.projection_dim)),
        "disagreement": np.exp(rng.normal(size=volume) * 0.03) * s.agreement_threshold,
        "center": rng.uniform(-0.2, 0.2, size=volume),
        "hidden_kernel": rng.normal(size=(s.embedding_dim, s.hidden)),
        "hidden_bias": rng.normal(size=s.hidden),
        "out_kernel": rng.normal(size=(s.hidden, 2 * C_IN)) * 0.3,
        "out_bias": rng.normal(size=2 * C_IN) * 0.3,
    }


def build(selection, volume):
    size = {27: 3, 8: 2}[volume]
    return SelectiveConv(C_IN, C_OUT, size, num_datasets=DATASETS, selection=selection, name="conv", rngs=nnx.Rngs(0))


def variables(layer):
    mlp = layer.modulation.mlp
    return {
        "shared": layer.shared, "exclusive": layer.exclusive, "prior": layer.prior, "projection": layer.projection,
        "hidden_kernel": mlp.hidden.kernel, "hidden_bias": mlp.hidden.bias,
        "out_kernel": mlp.out.kernel, "out_bias": mlp.out.bias,
        **({} if layer.prototypes is None else {"prototypes": layer.prototypes}),
    }  # fmt: skip


def set_statistics(layer, p):
    """The running statistics of a layer, the same for all datasets."""
    for name in ("disagreement", "center"):
        if (statistic := getattr(layer, name)) is not None:
            statistic.set_value(jnp.tile(p[name], (DATASETS, 1)))


def forward(graph, kmap, algorithm, p, kernels="selected"):
    """Ours with the parameters p; padding of x holds NaN. Returns features and gamma."""
    layer = nnx.merge(graph, p["state"], copy=True)
    for name, variable in variables(layer).items():
        variable.set_value(p[name])
    set_statistics(layer, p)
    rows = jnp.full((kmap.in_capacity, C_IN), jnp.nan, p["x"].dtype).at[: len(p["x"])].set(p["x"])
    taps = {}
    dataset = DatasetContext(jax.nn.one_hot(DATASET, DATASETS, dtype=p["x"].dtype), kernels)
    context = ForwardContext(dataset, p["embedding"], algorithm=algorithm, tap=taps.__setitem__)
    y = layer(sparse.SparseTensor(rows, kmap.inputs), kmap, context)
    return y.features, taps


def ours(selection, kmap, algorithms, p, weight, dtype):
    """Features, what was tapped and gradients of each algorithm, all compiled as one program."""
    graph, state = nnx.split(build(selection, kmap.kernel_volume))
    p = {name: jnp.asarray(value, dtype) for name, value in p.items()}
    weight = jnp.full((kmap.out_capacity, C_OUT), jnp.nan, dtype).at[: len(weight)].set(jnp.asarray(weight, dtype))
    valid = jnp.arange(kmap.out_capacity)[:, None] < kmap.n_out

    @jax.jit
    def slopes(p):
        def objective(p, algorithm):
            y, taps = forward(graph, kmap, algorithm, p | {"state": state})
            return jnp.where(valid, y * weight, 0).sum(), (y, taps)

        by_algorithm = [jax.value_and_grad(objective, has_aux=True)(p, algorithm) for algorithm in algorithms]
        return [(y, taps, gradient) for (_, (y, taps)), gradient in by_algorithm]

    return jax.device_get(slopes(p))


def central_differences(value, p, name, rng, h=1e-6, most=40):
    """Entries and their slopes: all of a small tensor, `most` drawn from a larger one."""
    entries = rng.permutation(p[name].size)[:most]
    slopes = []
    for entry in entries:
        at = []
        for sign in (1, -1):
            moved = p[name].copy()
            moved.flat[entry] += sign * h
            at.append(value(p | {name: moved}, name))
        slopes.append((at[0] - at[1]) / (2 * h))
    return entries, np.array(slopes)


def linear_gradients(method, p, gamma, weight):
    """Of the kernels, written out: whole tensors."""
    x = method.modulated(p)
    shared, exclusive = np.zeros_like(p["shared"]), np.zeros_like(p["exclusive"])
    for j, found in enumerate(method.pairs):
        for i, o in found:
            outer, share = np.outer(x[i], weight[o]), gamma[method.scan_out[o], j] if method.parted[j] else 1
            shared[j] += share * outer
            exclusive[DATASET, j] += (1 - share) * outer
    return {"shared": shared, "exclusive": exclusive}


@pytest.mark.parametrize("kind", ["submanifold 3", "strided 2"])
@pytest.mark.parametrize("reading", READINGS)
def test_outputs_and_all_gradients_equal_the_transcription(kind, reading):
    selection = READINGS[reading]
    table = table_of(kind, counts=(14, 0, 11, 1))
    kmap, method = padded(table), Transcription(table, pairs_of(kind, table), selection)
    p = parameters(selection, table)
    weight = np.random.default_rng(9).normal(size=(len(table.outputs), C_OUT))
    scores = method.scores(p)
    gamma = (scores >= selection.tau).astype(float)
    assert np.abs(scores - selection.tau).min() > NEAR_TIE
    assert (gamma[0] != gamma[2]).any() == (selection.scope == "scan") and 0.1 < gamma.mean() < 0.9
    expected = method.outputs(p, gamma)
    value, rng = method.objective(weight, p), np.random.default_rng(1)
    still = {"shared", "exclusive", "disagreement", "center"} | (
        {"prototypes"} if selection.prototypes == "kernels" else set()
    )
    slopes = {name: central_differences(value, p, name, rng) for name in p if name not in still}
    kernels = linear_gradients(method, p, gamma, weight)

    algorithms = ("segment_sum", "gather", "tiles")
    with jax.enable_x64(True):
        results = ours(selection, kmap, algorithms, p, weight, jnp.float64)
    for algorithm, (y, taps, gradient) in zip(algorithms, results, strict=True):
        np.testing.assert_allclose(y[: len(expected)], expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(taps["conv.alpha"] * taps["conv.beta"], scores, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(taps["conv.gamma"], gamma)
        for name, slope in kernels.items():
            np.testing.assert_allclose(gradient[name], slope, rtol=1e-10, atol=1e-10, err_msg=name)
        for name, (entries, slope) in slopes.items():
            scale = np.abs(slope).max()
            assert scale > 1e-3, name
            got = gradient[name].flat[entries]
            np.testing.assert_allclose(got, slope, rtol=0, atol=1e-6 * scale, err_msg=f"{name} {algorithm}")
        others = np.delete(gradient["exclusive"], DATASET, 0)
        assert (others == 0).all()

    ((y, taps, gradient),) = ours(selection, kmap, ["auto"], p, weight, jnp.float32)
    np.testing.assert_array_equal(taps["conv.gamma"], gamma)
    np.testing.assert_allclose(y[: len(expected)], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for name, slope in kernels.items():
        np.testing.assert_allclose(gradient[name], slope, rtol=0, atol=1e-5 * np.abs(slope).max(), err_msg=name)
    for name, (entries, slope) in slopes.items():
        got = gradient[name].flat[entries]
        np.testing.assert_allclose(got, slope, rtol=0, atol=2e-5 * np.abs(slope).max(), err_msg=name)


def test_shared_kernels_everywhere_are_the_plain_convolution_of_modulated_features():
    selection = READINGS["default"]
    table = table_of("submanifold 3")
    kmap, p = padded(table), parameters(selection, table)
    graph, state = nnx.split(build(selection, 27))
    single = {name: jnp.asarray(value, jnp.float32) for name, value in p.items()} | {"state": state}
    y, taps = forward(graph, kmap, "auto", single, kernels="shared")
    x = Transcription(table, pairs_of("submanifold 3", table), selection).modulated(p).astype(np.float32)
    expected = sparse.convolve(jnp.asarray(sparse.pad_rows(x, kmap.in_capacity)), single["shared"][None], kmap)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert (taps["conv.gamma"] == 1).all()


def test_an_unseen_dataset_takes_the_mean_of_the_exclusive_kernels():
    # alpha * beta <= 1: all offsets are exclusive
    selection = SelectionConfig(tau=2.0, prior="learned", exclusive_init="independent", **SMALL)
    table = table_of("submanifold 3")
    kmap, layer = padded(table), build(selection, 27)
    x = jnp.asarray(sparse.pad_rows(parameters(selection, table)["x"].astype(np.float32), kmap.in_capacity))
    context = ForwardContext(DatasetContext.mean(DATASETS), jnp.zeros(selection.embedding_dim))
    y = layer(sparse.SparseTensor(x, kmap.inputs), kmap, context)
    expected = sparse.convolve(x, layer.exclusive[...].mean(0, keepdims=True), kmap)
    np.testing.assert_allclose(y.features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("straight_through", ["sigmoid", "identity"])
def test_binarisation_is_exact_and_its_gradient_that_of_the_surrogate(straight_through):
    score = jnp.asarray(np.r_[np.random.default_rng(0).uniform(0, 1, 5000), 0.25], jnp.float32)
    gamma, pull = jax.vjp(lambda s: binarize(s, 0.25, straight_through, 0.1), score)
    np.testing.assert_array_equal(gamma, np.asarray(score) >= 0.25)
    assert gamma[-1] == 1
    soft = sigmoid((np.asarray(score, np.float64) - 0.25) / 0.1)
    expected = soft * (1 - soft) / 0.1 if straight_through == "sigmoid" else np.ones_like(soft)
    np.testing.assert_allclose(pull(jnp.ones_like(score))[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda s: binarize(s, 0.25, straight_through, 0.1))(score), gamma)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_consistency_lies_in_0_to_1_in_single_precision_at_least(dtype):
    sites = sparse.pad_sites(table_of("submanifold 3").inputs, 120)
    rng = np.random.default_rng(0)
    x = jnp.asarray(sparse.pad_rows(rng.normal(size=(int(sites.n), C_IN)), 120), dtype)
    for kind in ("half_cosine", "relu_cosine"):
        beta = structural_consistency(
            sparse.SparseTensor(x, sites), jnp.asarray(rng.normal(size=(C_IN, 4)), jnp.float32),
            jnp.asarray(rng.normal(size=(9, 4)), jnp.float32), kind,
        )  # fmt: skip
        assert beta.dtype == jnp.float32 and beta.shape == (3, 9)
        assert (beta >= 0).all() and (beta <= 1).all()
        np.testing.assert_array_equal(beta[1], 0.5 if kind == "half_cosine" else 0)


@pytest.mark.parametrize("counts", [(0, 0), (5, 0), (20, 7)], ids=str)
@pytest.mark.parametrize("value", ["zeros", "ones"])
def test_gradients_are_finite_on_zero_and_empty_input(counts, value):
    selection = READINGS["default"]
    table = table_of("submanifold 3", counts=counts)
    p = parameters(selection, table)
    p["x"] = np.full_like(p["x"], value == "ones")
    p["out_bias"][:], p["out_kernel"][:] = 0, 0
    if value == "zeros":
        p["prototypes"][:] = 0
    ((y, _, gradient),) = ours(selection, padded(table), ["auto"], p, np.ones((len(table.outputs), C_OUT)), jnp.float32)
    assert np.isfinite(y).all()
    for name, slope in gradient.items():
        assert np.isfinite(slope).all(), name


@pytest.mark.parametrize(("prior", "least", "most"), [("agreement", 1.0, 1.0), ("learned", 0.2, 0.8)])
def test_offsets_start_shared_until_datasets_disagree_and_near_half_without_that_prior(prior, least, most):
    table = table_of("submanifold 3", counts=(150, 150))
    kmap, taps = padded(table), {}
    layer = SelectiveConv(16, 8, num_datasets=2, selection=SelectionConfig(prior=prior), rngs=nnx.Rngs(1))
    x = np.abs(np.random.default_rng(0).normal(size=(len(table.inputs), 16))).astype(np.float32)
    context = ForwardContext(DatasetContext.one(0, 2), jnp.ones(64), tap=taps.__setitem__)
    layer(sparse.SparseTensor(jnp.asarray(sparse.pad_rows(x, kmap.in_capacity)), kmap.inputs), kmap, context)
    assert least <= taps["selective_conv.gamma"].mean() <= most


def test_parameters_start_as_stated():
    independent = SelectionConfig(exclusive_init="independent")
    layer = SelectiveConv(32, 48, num_datasets=2, selection=independent, rngs=nnx.Rngs(0))
    for kernel in (layer.shared[...], *layer.exclusive[...]):
        np.testing.assert_allclose(kernel.std(), math.sqrt(2 / (27 * 48)), rtol=0.02)
    np.testing.assert_allclose(layer.projection[...].std(), 32**-0.5, rtol=0.1)
    assert (layer.prior[...] == 0).all() and layer.exclusive.get_metadata()["dataset_axis"] == 0
    assert not np.allclose(layer.shared[...], layer.exclusive[0])
    copied = SelectiveConv(2, 3, num_datasets=2, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(copied.exclusive[...], np.stack([copied.shared[...]] * 2))


def test_a_layer_is_built_without_memory():
    shapes = nnx.eval_shape(lambda: SelectiveConv(4, 5, num_datasets=2, rngs=nnx.Rngs(0)))
    assert shapes.exclusive.shape == (2, 27, 4, 5)


def test_an_embedding_is_needed():
    kmap = padded(table_of("submanifold 3"))
    x = sparse.SparseTensor(jnp.zeros((kmap.in_capacity, C_IN)), kmap.inputs)
    with pytest.raises(ValueError, match="embedding"):
        build(READINGS["default"], 27)(x, kmap, ForwardContext(DatasetContext.one(0, DATASETS)))


def test_the_kernels_of_a_scan_do_not_depend_on_its_company():
    selection = READINGS["default"]
    table = table_of("submanifold 3", counts=(20, 13))
    p, graph_state = parameters(selection, table), nnx.split(build(selection, 27))
    alone = sparse.site_set(table.inputs.coords[table.inputs.scan == 0])
    alone_table = sparse.submanifold_neighbors(alone, 3)
    run = partial(forward, graph_state[0], algorithm="gather")
    single = {name: jnp.asarray(value, jnp.float32) for name, value in p.items()} | {"state": graph_state[1]}
    together, taps = run(padded(table), p=single)
    by_itself, own_taps = run(padded(alone_table, more_in=40), p=single | {"x": single["x"][: len(alone)]})
    np.testing.assert_array_equal(taps["conv.gamma"][0], own_taps["conv.gamma"][0])
    np.testing.assert_allclose(together[: len(alone)], by_itself[: len(alone)], rtol=1e-4, atol=1e-5)
