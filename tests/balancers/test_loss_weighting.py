"""Weights of losses: against TorchJD's in float64, and by hand where the publications are open."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.balancer_fixtures import FIXTURES
from h2a2_jax.balancers.dwa import DWAState, dwa, loss_ratios
from h2a2_jax.balancers.famo import FAMOState, famo, famo_weights, update_logits
from h2a2_jax.balancers.fixed import draw_weights, fixed_weights, random_weights
from h2a2_jax.balancers.ngh import mean_over_datasets
from h2a2_jax.balancers.uncertainty import next_log_variances, uncertainty

ONES = jnp.ones((3, 2))
ALL3 = jnp.ones(3, bool)
LOSSES = jnp.array([1.0, 2.0, 4.0])


def factors_of_steps(balancer: Any, losses: np.ndarray) -> np.ndarray:
    """Factors of the gradients in each of the steps, in one program."""
    datasets = losses.shape[1]

    def step(state: Any, row: jax.Array) -> Any:
        updates, state = balancer.update(jnp.ones((datasets, 1)), state, present=jnp.ones(datasets, bool), losses=row)
        return state, updates[:, 0]

    return np.asarray(jax.lax.scan(step, balancer.init(None), jnp.asarray(losses, jnp.float32))[1])


@pytest.mark.parametrize("datasets", [1, 3, 7])
def test_factors_are_the_weights_of_torchjd(datasets: int) -> None:
    """Times K, for a step takes the mean; uncertainty weighting of TorchJD has halves."""
    with np.load(FIXTURES) as stored:
        losses = stored[f"losses.{datasets}"]
        expected = {name: stored[f"{name}.{datasets}"] for name in ("uncertainty", "dwa", "famo")}
    found = factors_of_steps(uncertainty(datasets, 0.1), losses)
    np.testing.assert_allclose(found, 2 * expected["uncertainty"], rtol=1e-5)
    np.testing.assert_allclose(factors_of_steps(dwa(datasets, window=4), losses), expected["dwa"], rtol=1e-5)
    np.testing.assert_allclose(factors_of_steps(famo(datasets), losses), datasets * expected["famo"], rtol=2e-5)


def test_equations_are_those_of_torchjd_in_float64() -> None:
    with jax.enable_x64(True), np.load(FIXTURES) as stored:
        losses, counts = jnp.asarray(stored["losses.7"]), jnp.ones(7, bool)
        zeros = jnp.zeros(7)
        variances, state, weights = zeros, FAMOState(*[zeros] * 6), []
        for row in losses:
            state = update_logits(state, row, counts, learning_rate=0.025, weight_decay=1e-3)._replace(losses=row)
            weights.append((jnp.exp(-variances) / 2, famo_weights(state.logits, row, counts)))
            variances = next_log_variances(variances, row, counts, learning_rate=0.1)
        np.testing.assert_allclose([w[0] for w in weights], stored["uncertainty.7"], rtol=1e-9)
        np.testing.assert_allclose([w[1] for w in weights], stored["famo.7"], rtol=1e-6, atol=1e-9)
        means = [losses[start : start + 4].mean(0) for start in (0, 4)]
        ratios = np.asarray(loss_ratios(means[1], means[0]))
        np.testing.assert_allclose(7 * np.exp(ratios / 2) / np.exp(ratios / 2).sum(), stored["dwa.7"][8], rtol=1e-9)


def test_a_log_variance_does_not_pass_its_minimum() -> None:
    losses, counts = jnp.array([1e6, 1.0, 1.0, jnp.nan]), jnp.array([True, True, False, False])
    moved = next_log_variances(jnp.array([0.0, 2.0, 0.5, 0.5]), losses, counts, learning_rate=0.1)
    down = 2 - 0.1 * (1 - np.exp(-2)) / 2
    np.testing.assert_allclose(moved, [np.log(1e6), down, 0.5, 0.5], rtol=1e-6)


def test_averages_of_dwa_are_over_the_steps_that_a_dataset_took_part_in() -> None:
    balancer, present = dwa(3, window=2), jnp.array([True, True, False])
    state = balancer.init(None)
    for losses in (LOSSES, LOSSES, 3 * LOSSES, LOSSES):
        _, state = balancer.update(ONES, state, present=present, losses=losses)
    np.testing.assert_allclose(state.before, [1, 2, 0])
    np.testing.assert_allclose(state.last, [2, 4, 0])
    updates, state = balancer.update(ONES, state, present=ALL3, losses=LOSSES)
    # The third has no averages and takes the ratio 1 beside twice 2.
    wanted = 3 * np.exp([1, 1, 0.5]) / np.exp([1, 1, 0.5]).sum()
    np.testing.assert_allclose(updates[:, 0], wanted, rtol=1e-6)
    assert state.steps == 1


def test_famo_takes_weight_from_a_dataset_whose_loss_fell_more() -> None:
    balancer = famo(3, learning_rate=0.1, weight_decay=0.0)
    _, state = balancer.update(ONES, balancer.init(None), present=ALL3, losses=LOSSES)
    np.testing.assert_allclose(state.scales, 3 * (1 / LOSSES) / (1 / LOSSES).sum(), rtol=1e-6)
    absent = jnp.array([True, True, False])
    updates, state = balancer.update(ONES, state, present=absent, losses=LOSSES * jnp.array([0.5, 1.0, jnp.nan]))
    assert state.logits[0] < 0 < state.logits[1] and state.logits[2] == 0
    np.testing.assert_allclose(state.losses, [0.5, 2, 4])
    np.testing.assert_allclose(state.updates, [1, 1, 0])
    assert not updates[2].any()
    np.testing.assert_allclose(mean_over_datasets(updates, absent), 1, rtol=1e-6)


@pytest.mark.parametrize("balancer", [uncertainty(3), dwa(3), famo(3)])
def test_a_loss_that_makes_no_sense_leaves_the_gradient(balancer: Any) -> None:
    state = balancer.init(None)
    for losses in (LOSSES, jnp.array([1.0, 0.0, jnp.nan])):
        updates, state = balancer.update(ONES, state, present=ALL3, losses=losses)
    np.testing.assert_array_equal(updates[1:], 1)
    assert all(np.isfinite(leaf).all() for leaf in state)
    with pytest.raises(ValueError, match=r"weighs the datasets' losses and was given none; pass `losses`"):
        balancer.update(ONES, state, present=ALL3)


def test_fixed_weights_have_the_mean_one() -> None:
    balancer = fixed_weights((1.0, 2.0, 5.0))
    updates, state = balancer.update(ONES, balancer.init(None), present=jnp.array([True, False, True]))
    np.testing.assert_allclose(updates[:, 0], [0.375, 0, 1.875])
    np.testing.assert_allclose(state.scales, [0.375, 1, 1.875])
    for wrong in ((), (0.0, 0.0), (1.0, -1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="give one for each dataset, from 0, not all of them 0"):
            fixed_weights(wrong)


def test_random_weights_are_drawn_over_the_datasets_of_the_step() -> None:
    balancer, present = random_weights(3, seed=5), jnp.array([True, True, False])
    state, seen = balancer.init(None), []
    for _ in range(3):
        updates, state = balancer.update(ONES, state, present=present)
        np.testing.assert_allclose(mean_over_datasets(updates, present), 1, rtol=1e-6)
        seen.append(float(updates[0, 0]))
    assert len(set(seen)) == 3 and state.steps == 3
    numbers = np.exp(np.asarray(jax.random.normal(jax.random.key(1), (3,))))
    np.testing.assert_allclose(draw_weights(jax.random.key(1), ALL3), numbers / numbers.sum(), rtol=1e-6)


def test_a_state_without_a_step_is_that_of_the_plain_mean() -> None:
    state = dwa(2).init(None)
    assert isinstance(state, DWAState) and state.scales.tolist() == [1, 1] and state.steps.dtype == jnp.int32
