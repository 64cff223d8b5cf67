import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from h2a2_jax import sparse
from h2a2_jax.layers import BatchNorm, DatasetContext, ForwardContext, InstanceNorm, LayerNorm, instance_norm
from h2a2_jax.layers.norm import Statistics, batch_statistics, normalize, update_running

TRAINING = ForwardContext(training=True)


def tensor(rows, capacity=20, fill=np.nan, scans=None):
    """Features on a line of sites; padding holds `fill`."""
    scans = np.zeros(len(rows), int) if scans is None else np.asarray(scans)
    coords = np.c_[scans, np.arange(len(rows)), np.zeros((len(rows), 2), int)].astype(np.int32)
    sites = sparse.pad_sites(sparse.site_set(coords, num_scans=int(scans.max(initial=0)) + 1), capacity)
    features = np.full((capacity, rows.shape[1]), fill, np.float32)
    features[: len(rows)] = rows
    return sparse.SparseTensor(jnp.asarray(features), sites)


def draw(n, channels=3, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, (n, channels)).astype(np.float32)


def test_training_normalises_valid_sites_and_remembers():
    x, norm = draw(11), BatchNorm(3)
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.0, 1.0, 3.0])
    y = norm(tensor(x), TRAINING).features
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * norm.scale[...] + norm.bias[...]
    np.testing.assert_allclose(y[:11], expected, rtol=1e-4, atol=1e-5)
    assert (y[11:] == 0).all()
    np.testing.assert_allclose(norm.mean[0], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[0], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)

    before = norm.mean[...], norm.var[...]
    y = norm(tensor(x)).features
    expected = (x - before[0]) / np.sqrt(before[1] + 1e-5) * norm.scale[...] + norm.bias[...]
    np.testing.assert_allclose(y[:11], expected, rtol=1e-4, atol=1e-5)
    assert (y[11:] == 0).all()
    np.testing.assert_array_equal(norm.mean[...], before[0])
    np.testing.assert_array_equal(norm.var[...], before[1])


def test_half_precision_rounds_features_only():
    """Statistics, sums and gradients of scale and bias of bfloat16 features are those of the same values in float32."""
    x, weight = (tensor(draw(300, seed=s), 310, fill=0.0).features.astype(jnp.bfloat16) for s in (0, 1))
    sites = tensor(draw(300), 310).sites

    def slopes(dtype):
        graph, params, stats = nnx.split(BatchNorm(3), nnx.Param, ...)

        def loss(params, x):
            norm = nnx.merge(graph, params, stats, copy=True)
            y = norm(sparse.SparseTensor(x, sites), TRAINING).features
            return (y * weight.astype(dtype)).astype(jnp.float32).sum(), (y, norm.mean[...], norm.var[...])

        (_, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x.astype(dtype))
        return aux, grads

    ((y, *stats), (params, dx)), ((y32, *stats32), (params32, dx32)) = slopes(jnp.bfloat16), slopes(jnp.float32)
    assert y.dtype == dx.dtype == jnp.bfloat16
    for ours, theirs in zip(jax.tree.leaves((stats, params)), jax.tree.leaves((stats32, params32)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for ours, theirs in ((y, y32), (dx, dx32)):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2.0**-8, atol=1e-6)


def test_no_site_gives_zeros_and_leaves_the_statistics():
    norm = BatchNorm(3)
    norm.mean[...] = jnp.full((1, 3), 5.0)
    y = norm(tensor(draw(0)), TRAINING).features
    assert (y == 0).all()
    np.testing.assert_array_equal(norm.mean[0], 5)
    np.testing.assert_array_equal(norm.var[0], 1)


def test_one_site_counts_with_its_biased_variance():
    norm, x = BatchNorm(3), draw(1)
    y = norm(tensor(x), TRAINING).features
    assert (y == 0).all()
    np.testing.assert_allclose(norm.mean[0], 0.1 * x[0], rtol=1e-6)
    np.testing.assert_allclose(norm.var[0], 0.9, rtol=1e-6)


def test_statistics_of_datasets_never_mix():
    norm = BatchNorm(2, num_datasets=3)
    batches = [draw(9, 2, seed) + 10 * seed for seed in range(3)]
    for dataset in (0, 2):
        norm(tensor(batches[dataset]), ForwardContext(DatasetContext.one(dataset, 3), training=True))
    for dataset, rate in ((0, 0.1), (1, 0.0), (2, 0.1)):
        x = batches[dataset]
        np.testing.assert_allclose(norm.mean[dataset], rate * x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(norm.var[dataset], 1 - rate + rate * x.var(0, ddof=1), rtol=1e-5)
    y = norm(tensor(batches[2]), ForwardContext(DatasetContext.one(2, 3))).features[:9]
    np.testing.assert_allclose(y, (batches[2] - norm.mean[2]) / np.sqrt(norm.var[2] + 1e-5), rtol=1e-4, atol=1e-5)
    y = norm(tensor(batches[2]), ForwardContext(DatasetContext.mean(3))).features[:9]
    mean, var = norm.mean[...].mean(0), norm.var[...].mean(0)
    np.testing.assert_allclose(y, (batches[2] - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)


def test_several_datasets_train_only_with_one_named():
    norm = BatchNorm(3, num_datasets=2)
    with pytest.raises(ValueError, match="2 datasets trains on one at a time"):
        norm(tensor(draw(4)), TRAINING)
    norm.train()
    with pytest.raises(ValueError, match="2 datasets trains on one at a time"):
        norm(tensor(draw(4)))


@pytest.mark.parametrize("x64", [False, True])
def test_momentum_is_flaxs_and_its_default_torchs_to_the_last_bit(x64):
    with jax.enable_x64(x64):
        kind = jnp.zeros(()).dtype
        x, (norm, slow) = tensor(draw(11)), (BatchNorm(3, momentum=m, param_dtype=kind) for m in (0.9, 0.99))
        assert BatchNorm(3).momentum == 0.9
        for layer in (norm, slow):
            layer(x, TRAINING)
        batch = batch_statistics(x.features, x.sites.valid)
        for layer, rate in ((norm, 0.1), (slow, 0.01)):
            new = update_running(Statistics(jnp.zeros(3, kind), jnp.ones(3, kind)), batch, rate)
            np.testing.assert_array_equal([layer.mean[0], layer.var[0]], new)
    flax = nnx.BatchNorm(3, momentum=0.99, rngs=nnx.Rngs(0))
    flax(x.features[:11])
    np.testing.assert_allclose(slow.mean[0], flax.mean[...], rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.5])
def test_torchs_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match=rf"given momentum={momentum}, expected .* for Torch's momentum m give 1 - m"):
        BatchNorm(3, momentum=momentum)


def test_train_and_eval_set_the_layers_and_a_context_overrides():
    x, model = tensor(draw(9)), nnx.List([BatchNorm(3), nnx.Dropout(0.5, deterministic=True)])
    before, trained = BatchNorm(3)(x).features, BatchNorm(3)(x, TRAINING).features

    def run(model, context=None):
        copy = nnx.merge(*nnx.split(model), copy=True)  # the setting is part of the graph
        y = copy[0](x, context).features
        return y, bool((copy[0].mean[...] != 0).any())

    for setting, own in ((model.eval, before), (model.train, trained)):
        setting()
        for context, expected in (
            (None, own), (ForwardContext(), own), (TRAINING, trained), (ForwardContext(training=False), before)
        ):  # fmt: skip
            y, changed = run(model, context)
            np.testing.assert_array_equal(y, expected)
            assert changed == (expected is trained)
    assert not model[1].deterministic and not model[0].use_running_average


@pytest.mark.parametrize("layer", [InstanceNorm, LayerNorm])
def test_norms_without_statistics(layer):
    rows, scans = draw(12), np.r_[np.zeros(5, int), np.full(7, 2)]
    norm, x = layer(3), tensor(rows, scans=scans)
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.0, 1.0, 3.0])
    parts = [rows[scans == b] for b in (0, 2)] if layer is InstanceNorm else list(rows[:, :, None])
    normed = [(p - p.mean(0)) / np.sqrt(p.var(0) + norm.eps) for p in parts]
    expected = np.concatenate(normed).reshape(12, 3) * norm.scale[...] + norm.bias[...]
    y = norm(x).features
    np.testing.assert_allclose(y[:12], expected, rtol=1e-4, atol=1e-5)
    assert (y[12:] == 0).all()
    half = norm(x.with_features(x.features.astype(jnp.bfloat16))).features
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm, LayerNorm])
def test_other_channels_are_refused(layer):
    with pytest.raises(ValueError, match=f"{layer.__name__} takes 2 channels, given features of 3"):
        layer(2)(tensor(draw(4)))


@pytest.mark.parametrize("counts", [(4, 9), (0, 9), (0, 0)], ids=str)
def test_replicas_of_unequal_size_equal_the_whole_batch(counts):
    parts = [draw(n, seed=seed) for seed, n in enumerate(counts)]
    weights = [draw(n, seed=10 + seed) for seed, n in enumerate(counts)]
    tensors = [tensor(part, fill=0.0) for part in parts]
    rows, valid = (jnp.stack([getattr(t, a) if a == "features" else t.sites.valid for t in tensors])
                   for a in ("features", "valid"))  # fmt: skip
    stacked_weights = jnp.stack([tensor(w, fill=0.0).features for w in weights])

    def local(x, valid, weight, axis_name):
        def loss(x, scale):
            batch = batch_statistics(x, valid, axis_name)
            y = normalize(x, valid, batch.statistics, scale, jnp.zeros(3), 1e-5)
            return (y * weight).sum(), (y, batch)

        (_, (y, batch)), (dx, dscale) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, jnp.ones(3))
        return y, dx, batch, dscale

    def on_device(x, valid, weight):
        y, dx, batch, dscale = local(x[0], valid[0], weight[0], "r")
        return y[None], dx[None], batch, dscale

    mesh = jax.make_mesh((2,), ("r",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=P("r"), out_specs=(P("r"), P("r"), P(), P()), check_vma=True)
    y, dx, batch, dscale = jax.jit(sharded)(rows, valid, stacked_weights)
    one = local(rows.reshape(-1, 3), valid.reshape(-1), stacked_weights.reshape(-1, 3), None)
    for ours, whole in zip((y.reshape(-1, 3), dx.reshape(-1, 3), batch, dscale), one, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, whole)
    assert batch.num_sites == sum(counts)


@pytest.mark.parametrize("n", [0, 1, 2, 20])
@pytest.mark.parametrize("value", ["constant", "random", "zero"])
def test_gradients_are_finite_and_padding_has_none(n, value):
    x = {"constant": np.full((n, 3), 7.0, np.float32), "random": draw(n), "zero": np.zeros((n, 3), np.float32)}[value]
    for norm in (
        lambda t: BatchNorm(3)(t, TRAINING),
        lambda t: LayerNorm(3)(t),
        lambda t: instance_norm(t, jnp.ones(3), jnp.zeros(3)),
    ):
        t = tensor(x, fill=0.0)
        y, pull = jax.vjp(lambda rows, t=t, norm=norm: norm(t.with_features(rows)).features, t.features)
        (dx,) = pull(jnp.ones_like(y) * jnp.arange(20.0)[:, None])
        assert np.isfinite(y).all() and np.isfinite(dx).all()
        assert (dx[n:] == 0).all()


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm, LayerNorm])
def test_padding_may_hold_anything(layer):
    x = draw(7)

    def slopes(fill):
        t = tensor(x, fill=fill)
        return jax.value_and_grad(lambda rows: (layer(3)(t.with_features(rows), TRAINING).features ** 3).sum())(
            t.features
        )

    clean, garbage = slopes(0.0), slopes(np.nan)
    jax.tree.map(np.testing.assert_array_equal, clean, garbage)


def test_derivatives_equal_finite_differences():
    x, weight = draw(8).astype(np.float64), draw(8, seed=1).astype(np.float64)
    with jax.enable_x64(True):
        valid = jnp.arange(10) < 8
        pad = lambda rows: jnp.asarray(np.concatenate([rows, np.zeros((2, 3))]))  # noqa: E731

        def value(rows):
            batch = batch_statistics(rows, valid)
            y = normalize(rows, valid, batch.statistics, jnp.ones(3), jnp.zeros(3), 1e-5)
            return (y * pad(weight)).sum()

        slope = jax.grad(value)(pad(x))
        for entry in [(0, 0), (3, 1), (7, 2)]:
            moved = np.zeros_like(x)
            moved[entry] = 1e-5
            numeric = (value(pad(x + moved)) - value(pad(x - moved))) / 2e-5
            np.testing.assert_allclose(slope[entry], numeric, rtol=1e-6, atol=1e-9)
