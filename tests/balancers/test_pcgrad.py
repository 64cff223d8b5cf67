"""PCGrad against a transcription of the published loops in float64, on one device and spread over several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from h2a2_jax.balancers.gramian import GramianState
from h2a2_jax.balancers.ngh import mean_over_datasets, plain_mean
from h2a2_jax.balancers.pcgrad import pcgrad, random_orders


def random_grads(num_datasets, seed=0, size=3):
    """Gradients of a small tree at scales from 0.1 to 10, many of them in conflict."""
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.uniform(-1, 1, num_datasets)

    def leaf(*shape):
        draws = generator.normal(size=(num_datasets, *shape)) * scales.reshape(-1, *[1] * len(shape))
        return jnp.asarray(draws, jnp.float32)

    return {"kernel": leaf(2, size), "bias": leaf(size), "gain": leaf()}


def vectors(grads):
    """Every dataset's gradient as one vector, float64 [K, n]."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(grads)], 1)


def projected_by_hand(grads, orders):
    """The published loops on vectors [K, n]: the mean, and how many projections there were."""
    total, projections = np.zeros(grads.shape[1]), 0
    for i in range(len(grads)):
        own = grads[i].copy()
        for j in orders[i]:
            if j != i and (dot := own @ grads[j]) < 0:
                own -= dot / (grads[j] @ grads[j]) * grads[j]
                projections += 1
        total += own
    return total / len(grads), projections


def orders_of_step(num_datasets, seed, step):
    return np.asarray(random_orders(jax.random.fold_in(jax.random.key(seed), step), num_datasets))


@partial(jax.jit, static_argnames="seed")
def mean_and_state(grads, present, seed=0, state=None):
    balancer = pcgrad(len(present), seed)
    updates, state = balancer.update(grads, state or balancer.init(None), present=present)
    return mean_over_datasets(updates, present), state


@pytest.mark.parametrize("num_datasets", [1, 2, 3, 7])
def test_equals_a_transcription(num_datasets):
    state, projections = None, 0
    for turn in range(5):
        grads = random_grads(num_datasets, seed=turn)
        mean, state = mean_and_state(grads, jnp.ones(num_datasets, bool), state=state)
        expected, count = projected_by_hand(vectors(grads), orders_of_step(num_datasets, 0, turn))
        projections += count
        got = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(mean)])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert state.steps == 5
    assert projections >= 2 or num_datasets == 1


def test_equals_a_transcription_in_float64():
    with jax.enable_x64(True):
        grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_grads(7, seed=3))
        mean, state = mean_and_state(grads, jnp.ones(7, bool))
        expected, projections = projected_by_hand(vectors(grads), orders_of_step(7, 0, 0))
        got = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(mean)])
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        assert projections > 5 and state.scales.dtype == jnp.float32


def test_what_one_has_against_the_other_is_gone():
    grads = jnp.array([[1.0, 0.0], [-3.0, 4.0]])
    updates, state = pcgrad(2).update(grads, pcgrad(2).init(None), present=jnp.ones(2, bool))
    # (1, 0) without its part along (-0.6, 0.8), and (-3, 4) without its part along (1, 0)
    np.testing.assert_allclose(updates.sum(0), [0.64 + 0.0, 0.48 + 4.0], rtol=1e-6)
    np.testing.assert_allclose(state.scales, [4.0, 1 + 3 / 25], rtol=1e-6)


def test_gradients_without_conflict_stay_as_they_are():
    grads = jnp.array([[1.0, 0.0, 2.0], [0.0, 5.0, 0.0], [0.1, 0.2, 0.3]])
    updates, state = pcgrad(3).update(grads, pcgrad(3).init(None), present=jnp.ones(3, bool))
    np.testing.assert_array_equal(updates, grads)
    np.testing.assert_array_equal(state.scales, 1)


def test_conflicts_are_those_of_the_whole_parameter_vector():
    grads = {"a": jnp.array([[1.0], [-1.0]]), "b": jnp.array([[3.0], [3.0]])}
    updates, _ = pcgrad(2).update(grads, pcgrad(2).init(None), present=jnp.ones(2, bool))
    jax.tree.map(np.testing.assert_array_equal, updates, grads)


def test_order_is_drawn_anew_in_every_step_and_matters():
    grads = random_grads(7, seed=3)
    seen = set()
    for done in range(6):
        state = GramianState(jnp.int32(done), jnp.ones(7))
        mean, _ = mean_and_state(grads, jnp.ones(7, bool), state=state)
        seen.add(float(mean["gain"]))
        again, _ = mean_and_state(grads, jnp.ones(7, bool), state=state)
        jax.tree.map(np.testing.assert_array_equal, again, mean)
    assert len(seen) > 1
    other_seed, _ = mean_and_state(grads, jnp.ones(7, bool), seed=1)
    assert not np.array_equal(orders_of_step(7, 0, 0), orders_of_step(7, 1, 0))
    assert float(other_seed["gain"]) != float(mean_and_state(grads, jnp.ones(7, bool))[0]["gain"])


def test_orders_differ_by_dataset():
    orders = orders_of_step(7, 0, 0)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(7), (7, 1)))
    assert len({tuple(row) for row in orders}) > 1


@pytest.mark.parametrize("missing", ["absent", "absent and not a number", "zero"])
def test_a_dataset_without_a_gradient_conflicts_with_none(missing):
    grads = np.array([[1.0, 0.0], [-3.0, 4.0], [-1.0, -1.0]], np.float32)
    grads[2] = {"absent": grads[2], "absent and not a number": np.nan, "zero": 0}[missing]
    present = jnp.array([True, True, missing == "zero"])
    updates, state = pcgrad(3).update(jnp.asarray(grads), pcgrad(3).init(None), present=present)
    np.testing.assert_allclose(updates.sum(0), [0.64, 4.48], rtol=1e-6)
    np.testing.assert_array_equal(updates[2], 0)
    assert state.scales[2] == 1


def test_a_gradient_that_is_not_finite_goes_through_alone():
    grads = np.array([[1.0, 0.0], [-3.0, 4.0], [np.inf, -1.0]], np.float32)
    updates, _ = pcgrad(3).update(jnp.asarray(grads), pcgrad(3).init(None), present=jnp.ones(3, bool))
    np.testing.assert_allclose(updates[:2].sum(0), [0.64, 4.48], rtol=1e-6)
    np.testing.assert_array_equal(updates[2], grads[2])


@pytest.mark.parametrize("unit", [1e-10, 1e-4, 1e15, 1e25])
def test_result_does_not_depend_on_the_unit_of_the_gradients(unit):
    grads = np.array([[1.0, 0.0], [-3.0, 4.0]], np.float32) * np.float32(unit)
    updates, state = pcgrad(2).update(jnp.asarray(grads), pcgrad(2).init(None), present=jnp.ones(2, bool))
    np.testing.assert_allclose(updates.sum(0) / np.float32(unit), [0.64, 4.48], rtol=1e-5)
    np.testing.assert_allclose(state.scales, [4.0, 1.12], rtol=1e-5)


@pytest.mark.parametrize("num_datasets", [3, 6])
def test_devices_do_not_change_the_result(num_datasets):
    mesh = jax.make_mesh((3, 2), ("dataset", "replica"), axis_types=(AxisType.Auto,) * 2)
    each, same = PartitionSpec("dataset"), PartitionSpec()

    def one_step(axis_name, grads, present, state):
        updates, state = pcgrad(num_datasets, 0, axis_name).update(grads, state, present=present)
        return mean_over_datasets(updates, present, axis_name), updates, state

    spread = jax.shard_map(
        partial(one_step, "dataset"), mesh=mesh, in_specs=(each, each, same), out_specs=(same, each, same)
    )
    spread, local = jax.jit(spread), jax.jit(partial(one_step, None))
    state, grads = pcgrad(num_datasets).init(None), random_grads(num_datasets, seed=1)
    unbalanced, _ = plain_mean().update(grads, plain_mean().init(None), present=jnp.ones(num_datasets, bool))
    for present in (jnp.ones(num_datasets, bool), jnp.arange(num_datasets) != 1):
        got, expected = spread(grads, present, state), local(grads, present, state)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)
        assert not np.allclose(expected[1]["gain"], unbalanced["gain"])
        state = expected[2]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="expected 3 datasets in all"):
        pcgrad(3).update(jnp.ones((2, 4)), pcgrad(3).init(None), present=jnp.ones(2, bool))
