"""GradNorm against a transcription in float64, on one device and spread over several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from h2a2_jax.balancers.gradnorm import GradNormState, gradnorm
from h2a2_jax.balancers.ngh import mean_over_datasets

ALL3 = jnp.ones(3, bool)


def random_grads(num_datasets, seed=0):
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.uniform(-1, 1, num_datasets)

    def leaf(*shape):
        draws = generator.normal(size=(num_datasets, *shape)) * scales.reshape(-1, *[1] * len(shape))
        return jnp.asarray(draws, jnp.float32)

    return {"kernel": leaf(2, 3), "bias": leaf(3), "gain": leaf()}


class ByHand:
    """The method in float64, dataset by dataset."""

    def __init__(self, num_datasets, alpha, learning_rate):
        self.weights, self.first = [1.0] * num_datasets, [0.0] * num_datasets
        self.alpha, self.learning_rate = alpha, learning_rate

    def step(self, grads, present, losses):
        """Weighted gradients of one step; the weights of the next are learned."""
        before, leaves = list(self.weights), [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
        datasets = range(len(present))
        norms = [np.sqrt(sum((leaf[k] ** 2).sum() for leaf in leaves)) for k in datasets]
        active = [k for k in datasets if present[k] and norms[k] >= 1e-12 and losses[k] > 0]
        for k in active:
            self.first[k] = self.first[k] or losses[k]
        if len(active) >= 2:
            average = sum(before[k] * norms[k] for k in active) / len(active)
            ratio = {k: losses[k] / self.first[k] for k in active}
            mean_ratio = sum(ratio.values()) / len(active)
            for k in active:
                target = average * (ratio[k] / mean_ratio) ** self.alpha
                slope = np.sign(before[k] * norms[k] - target) * norms[k]
                slope /= sum(norms[j] for j in active) / len(active)
                self.weights[k] = max(before[k] - self.learning_rate * slope, 0.01)
            rest = len(present) - sum(before[k] for k in datasets if k not in active)
            total = sum(self.weights[k] for k in active)
            for k in active:
                self.weights[k] *= rest / total
        factors = np.where(present, before, 0.0)
        return [leaf * factors.reshape(-1, *[1] * (leaf.ndim - 1)) for leaf in leaves]


@pytest.mark.parametrize("num_datasets", [1, 2, 3, 7])
@pytest.mark.parametrize(("alpha", "learning_rate"), [(1.5, 0.025), (0.0, 0.3)])
def test_equals_a_transcription(num_datasets, alpha, learning_rate):
    balancer, by_hand = gradnorm(num_datasets, alpha, learning_rate), ByHand(num_datasets, alpha, learning_rate)
    update, state = jax.jit(balancer.update), balancer.init(None)
    generator, spread = np.random.default_rng(num_datasets), 0.0
    for turn in range(8):
        grads, losses = random_grads(num_datasets, seed=turn), generator.uniform(0.5, 3, num_datasets)
        present = generator.random(num_datasets) > 0.2
        updates, state = update(
            grads, state, present=jnp.asarray(present), losses=jnp.asarray(losses, jnp.float32), other=None
        )
        expected = by_hand.step(grads, present, losses)
        for got, wanted in zip(jax.tree.leaves(updates), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
        np.testing.assert_allclose(state.weights, by_hand.weights, rtol=1e-5)
        np.testing.assert_allclose(state.first_losses, by_hand.first, rtol=1e-6)
        spread = max(spread, float(np.ptp(state.weights)))
    np.testing.assert_allclose(state.weights.sum(), num_datasets, rtol=1e-6)
    assert num_datasets == 1 or spread > 0.05


def step(balancer, norms, losses, state=None, present=ALL3):
    """Gradients (norm, 0) for each dataset."""
    grads = jnp.zeros((len(norms), 2)).at[:, 0].set(jnp.asarray(norms))
    return balancer.update(grads, state or balancer.init(None), present=present, losses=jnp.asarray(losses))


def test_norms_come_together_where_losses_fall_alike():
    balancer, state = gradnorm(3, learning_rate=0.02), None
    for turn in range(200):
        updates, state = step(balancer, [1.0, 2.0, 4.0], [3.0 / (1 + turn), 1.0 / (1 + turn), 5.0 / (1 + turn)], state)
    norms = np.asarray(updates[:, 0])
    np.testing.assert_allclose(norms, norms.mean(), rtol=0.1)


def test_who_lags_behind_gets_the_larger_gradient_the_more_alpha_is():
    final = {}
    for alpha in (0.0, 0.5, 1.5):
        balancer = gradnorm(3, alpha, 0.02)
        _, state = step(balancer, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
        for _ in range(100):
            _, state = step(balancer, [1.0, 1.0, 1.0], [0.9, 0.5, 0.5], state)
        final[alpha] = float(state.weights[0])
    assert abs(final[0.0] - 1) < 0.05
    assert final[0.0] + 0.1 < final[0.5] < final[1.5] - 0.1


def test_a_step_uses_the_weights_from_before_it():
    balancer = gradnorm(3, learning_rate=0.5)
    updates, state = step(balancer, [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(updates[:, 0], [1, 2, 4])
    np.testing.assert_array_equal(state.scales, 1)
    assert state.weights[0] > 1 > state.weights[2]
    updates, after = step(balancer, [1.0, 2.0, 4.0], [1.0, 1.0, 1.0], state)
    np.testing.assert_allclose(updates[:, 0], state.weights * jnp.array([1.0, 2.0, 4.0]), rtol=1e-6)
    np.testing.assert_array_equal(after.scales, state.weights)


@pytest.mark.parametrize(
    ("norm", "loss", "present"),
    [(1.0, 1.0, False), (np.nan, np.nan, False), (0.0, 1.0, True), (1.0, np.nan, True), (np.inf, 1.0, True)],
)
def test_a_dataset_without_a_part_keeps_its_weight(norm, loss, present):
    before = GradNormState(jnp.array([0.5, 1.5, 1.0]), jnp.array([1.0, 0.0, 2.0]), jnp.ones(3))
    present = jnp.array([True, present, True])
    updates, state = step(gradnorm(3), [1.0, norm, 4.0], [0.5, loss, 2.0], before, present)
    assert state.weights[1] == 1.5 and state.first_losses[1] == 0
    assert state.weights[0] > 0.5 and state.weights[2] < 1.0
    np.testing.assert_allclose(state.weights.sum(), 3, rtol=1e-6)
    assert np.isfinite(updates[jnp.array([0, 2])]).all()
    if not present[1]:
        np.testing.assert_array_equal(updates[1], 0)


def test_the_first_loss_is_that_of_the_first_step_with_the_dataset():
    balancer = gradnorm(3)
    _, state = step(balancer, [1.0, 1.0, 1.0], [3.0, 4.0, 5.0], present=jnp.array([True, False, True]))
    np.testing.assert_array_equal(state.first_losses, [3, 0, 5])
    _, state = step(balancer, [1.0, 1.0, 1.0], [1.0, 2.0, 1.0], state)
    np.testing.assert_array_equal(state.first_losses, [3, 2, 5])


@pytest.mark.parametrize("unit", [1e-10, 1e-3, 1e6, 1e18])
def test_weights_do_not_depend_on_the_unit_of_the_gradients(unit):
    _, state = step(gradnorm(3), [unit, 2 * unit, 7 * unit], [1.0, 2.0, 3.0])
    _, expected = step(gradnorm(3), [1.0, 2.0, 7.0], [1.0, 2.0, 3.0])
    np.testing.assert_allclose(state.weights, expected.weights, rtol=1e-6)


def test_weights_stay_above_zero():
    balancer, state = gradnorm(3, learning_rate=2.0), None
    for _ in range(20):
        _, state = step(balancer, [1e-6, 1.0, 1e6], [1.0, 1.0, 1.0], state)
        assert (np.asarray(state.weights) > 0).all()
        np.testing.assert_allclose(state.weights.sum(), 3, rtol=1e-6)


@pytest.mark.parametrize("num_datasets", [3, 6])
def test_devices_do_not_change_the_result(num_datasets):
    mesh = jax.make_mesh((3, 2), ("dataset", "replica"), axis_types=(AxisType.Auto,) * 2)
    each, same = PartitionSpec("dataset"), PartitionSpec()

    def one_step(axis_name, grads, present, losses, state):
        balancer = gradnorm(num_datasets, learning_rate=0.2, axis_name=axis_name)
        updates, state = balancer.update(grads, state, present=present, losses=losses)
        return mean_over_datasets(updates, present, axis_name), updates, state

    spread = jax.shard_map(
        partial(one_step, "dataset"), mesh=mesh, in_specs=(each, each, each, same), out_specs=(same, each, same)
    )
    spread, local = jax.jit(spread), jax.jit(partial(one_step, None))
    state = gradnorm(num_datasets).init(None)
    for present in (jnp.ones(num_datasets, bool), jnp.arange(num_datasets) != 1):
        arguments = random_grads(num_datasets, seed=1), present, 1 + jnp.arange(float(num_datasets)), state
        got, expected = spread(*arguments), local(*arguments)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)
        state = expected[2]
    assert np.ptp(state.weights) > 0.1


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="expected 3 datasets in all"):
        gradnorm(3).update(jnp.ones((2, 4)), gradnorm(3).init(None), present=jnp.ones(2, bool), losses=jnp.ones(2))
    with pytest.raises(ValueError, match="was given none"):
        gradnorm(3).update(jnp.ones((3, 4)), gradnorm(3).init(None), present=ALL3)
