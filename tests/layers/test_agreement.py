"""Agreement of gradients: the averages and F against a transcription in float64, and what training does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.layers import SelectionConfig, SelectiveConv
from h2a2_jax.layers.agreement import FEWEST, Agreement, disagreement, explored_threshold, observe
from h2a2_jax.layers.agreement_tracking import AgreementLayers
from h2a2_jax.layers.context import DatasetContext

D, L, V, C_IN, C_OUT = 3, 2, 5, 3, 2
DECAY = 0.9


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def draws(steps, seed=0, apart=0.0):
    """Gradients [T, D, L, V, C_in, C_out] with noise; offset 0 of layer 1 differs between datasets by `apart`."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(steps, D, L, V, C_IN, C_OUT))
    gradients[:, :, 1, 0] += apart * rng.normal(size=(D, C_IN, C_OUT))
    return gradients, rng.random((steps, D, L, V)) < 0.8


OBSERVE = jax.jit(lambda state, gradients, seen: observe(state, gradients, seen, DECAY))


def observed(gradients, seen):
    state = Agreement(jnp.zeros((D, L, V, C_IN, C_OUT)), jnp.zeros((D, L, V)), jnp.zeros((D, L, V)))
    for g, s in zip(gradients, seen, strict=True):
        state = OBSERVE(state, g, s)
    return state


def transcribed(gradients, seen, batch, scans):
    """F [L, V], number by number, from the definition: weighted means over the batches that were seen."""
    f = np.ones((L, V))
    for layer in range(L):
        for v in range(V):
            means, chances = [], []
            for d in range(D):
                mine = gradients[:, d, layer, v][seen[:, d, layer, v]]
                weights = DECAY ** np.arange(len(mine))[::-1]
                weights = weights / weights.sum()
                mean = np.einsum("t,tio->io", weights, mine)
                spread = np.einsum("t,tio,tio->", weights, mine, mine) - (mean**2).sum()
                reach = 1 / (weights**2).sum()
                of_scan = spread / (1 - 1 / reach) * batch[d] / (1 - batch[d] / scans[d])
                means.append(mean)
                chances.append(of_scan / min(scans[d], batch[d] * reach))
            centre = np.mean(means, axis=0)
            between = sum(((mean - centre) ** 2).sum() for mean in means) / (D - 1)
            f[layer, v] = between / np.mean(chances)
    return f


@pytest.mark.parametrize("scans", [(np.inf,) * 3, (40.0, 7.0, 1000.0)], ids=["endless", "few"])
def test_disagreement_equals_the_transcription(scans):
    gradients, seen = draws(90, apart=0.5)
    batch = (2.0, 4.0, 3.0)
    f, known = disagreement(observed(gradients, seen), jnp.asarray(batch), jnp.asarray(scans), DECAY)
    assert known.all() and f.dtype == jnp.float64
    np.testing.assert_allclose(f, transcribed(gradients, seen, batch, scans), rtol=1e-10)


def test_disagreement_is_near_one_by_chance_and_grows_with_the_difference():
    def of(apart):
        gradients, seen = draws(600, seed=1, apart=apart)
        return disagreement(observed(gradients, seen), jnp.full(D, 2.0), jnp.full(D, jnp.inf), DECAY)[0]

    np.testing.assert_allclose(of(0.0).mean(), 1, atol=0.3)
    small, large = of(0.5)[1, 0], of(2.0)[1, 0]
    assert 3 < small < large and large > 20


def test_what_is_not_seen_or_not_finite_changes_nothing():
    gradients, seen = draws(60)
    state = observed(gradients, seen)
    same = observe(state, jnp.full(gradients.shape[1:], jnp.nan), jnp.zeros(seen.shape[1:], bool), DECAY)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_without_enough_batches_nothing_is_known():
    gradients, _ = draws(FEWEST)
    seen = np.ones((FEWEST, D, L, V), bool)
    seen[0, 1:, :, 3] = False
    f, known = disagreement(observed(gradients, seen), jnp.full(D, 2.0), jnp.full(D, 9.0), DECAY)
    assert (f[:, 3] == 1).all() and not known[:, 3].any() and known[:, :3].all()
    one = Agreement(*(x[:1] for x in observed(gradients, np.ones_like(seen))))
    assert not disagreement(one, jnp.full(1, 2.0), jnp.full(1, 9.0), DECAY)[1].any()


def test_full_batches_explain_any_spread():
    gradients, seen = draws(80, apart=3.0)
    f, known = disagreement(observed(gradients, seen), jnp.full(D, 4.0), jnp.full(D, 4.0), DECAY)
    assert (f == 0).all() and known.all()


@pytest.mark.parametrize("score", [0.04, 0.1, 0.25, 0.4])
def test_a_score_passes_in_its_share_of_the_steps_and_never_in_fewer_than_the_least(score):
    steps = np.arange(2000)
    thresholds = np.asarray(jax.vmap(lambda s: explored_threshold(0.25, s, V, "layer", 0.125))(steps))
    share = (score >= thresholds).mean(0)
    np.testing.assert_allclose(share, max(score / 0.5, 0.125), atol=0.003)
    # Offsets take turns: one that is always seen last would be confounded with the order of scans.
    assert len(np.unique(thresholds[0])) > 1
    other = np.asarray(jax.vmap(lambda s: explored_threshold(0.25, s, V, "other", 0.125))(steps[:50]))
    assert not np.array_equal(other, thresholds[:50])


def test_thresholds_of_late_steps_are_as_even_as_those_of_early_ones():
    steps = jnp.arange(10**8, 10**8 + 1000, dtype=jnp.int32)
    late = jax.vmap(lambda s: explored_threshold(0.25, s, V, "a", 0.0))(steps)
    assert np.abs((np.asarray(late) <= 0.25).mean(0) - 0.5).max() < 0.01


class Two(nnx.Module):
    """Two selective convolutions of one shape and one of another."""

    def __init__(self, num_datasets, **choices):
        selection = SelectionConfig(projection_dim=2, embedding_dim=2, hidden=2, **choices)
        options = {"num_datasets": num_datasets, "selection": selection, "rngs": nnx.Rngs(0)}
        self.b = SelectiveConv(C_IN, C_OUT, name="first", **options)
        self.a = SelectiveConv(C_IN, C_OUT, name="second", **options)
        self.c = SelectiveConv(C_OUT, C_OUT, name="third", **options)


def split(model):
    def is_exclusive(_, variable):
        return isinstance(variable, nnx.Variable) and variable.get_metadata().get("dataset_axis") == 0

    return nnx.split(model, nnx.All(nnx.Param, is_exclusive), nnx.Param, nnx.BatchStat)


def test_groups_hold_layers_of_one_shape_and_models_without_datasets_or_prior_have_none():
    groups = AgreementLayers.of(Two(3))
    assert groups is not None and {len(layers) for layers in groups.layers.values()} == {1, 2}
    assert {layer.name for layer in groups.layers["27x3x2"]} == {"first", "second"}
    assert groups.empty()["27x3x2"].mean.shape == (3, 2, 27, 3, 2)
    assert AgreementLayers.of(Two(1)) is None and AgreementLayers.of(Two(3, prior="learned")) is None


def test_a_batch_moves_the_averages_of_offsets_that_all_scans_shared_and_f_reaches_every_dataset():
    model = Two(3)
    groups = AgreementLayers.of(model)
    _, _, shared, stats = split(model)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(3, *leaf.shape))), shared)
    state = jax.tree.map(lambda leaf: leaf + (0.7 if leaf.ndim == 3 else 0.0), groups.empty())
    gamma = {name: jnp.ones((3, 27)).at[1, 4].set(0.5) for name in ("first", "second", "third")}
    counts = jnp.array([True, True, False])
    after, stats = groups.measure(state, stats, gradients, gamma, counts, jnp.full(3, 2.0), jnp.full(3, 9.0))
    moved = np.asarray((after["27x3x2"].mean != state["27x3x2"].mean).any((-2, -1)))
    assert moved[0].all() and not moved[2].any() and not moved[1, :, 4].any() and moved[1, :, :4].all()
    f = stats["a"]["disagreement"][...]
    row = [layer.name for layer in groups.layers["27x3x2"]].index("second")
    expected, _ = disagreement(after["27x3x2"], jnp.full(3, 2.0), jnp.full(3, 9.0), 0.98)
    np.testing.assert_array_equal(f, np.tile(expected[row], (3, 1)))
    assert (f != 1).any() and (stats["a"]["center"][...] == 0).all()


@pytest.mark.parametrize("structure", ["shared", "exclusive"])
def test_exclusive_kernels_follow_the_shared_one_where_alpha_prefers_it(structure):
    model = Two(2, exclusive_init="independent", structure_parameters=structure)
    f = jnp.ones(27).at[:9].set(1.9).at[9:].set(2.1)
    model.a.disagreement.set_value(jnp.tile(f, (2, 1)))
    prior = jnp.zeros(27).at[12].set(1.0)
    model.a.prior.set_value(prior if structure == "shared" else jnp.stack([prior, 0 * prior]))
    _, exclusive, shared, stats = split(model)
    after = AgreementLayers.of(model).follow_shared(shared, exclusive, stats)["a"]["exclusive"][...]
    own, common = model.a.exclusive[...], model.a.shared[...]
    alphas = [model.a.structure(DatasetContext.one(d, 2)).alpha for d in range(2)]
    for d in range(2):
        follows = np.asarray(alphas[d]) >= 0.5
        assert follows.sum() == (10 if structure == "shared" or d == 0 else 9)
        np.testing.assert_array_equal(after[d], np.where(follows[:, None, None], common, own[d]))
    held = AgreementLayers.of(model).follow_shared(shared, exclusive, stats, {"a.exclusive"})
    np.testing.assert_array_equal(held["a"]["exclusive"][...], own)
