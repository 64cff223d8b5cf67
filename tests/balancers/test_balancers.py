"""The four balancers of a config: one interface, one record, and what tells them apart."""

import re
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from h2a2_jax.balancers import RecordedState, build_balancer, has_dataset_axis, recorded
from h2a2_jax.balancers.gradnorm import GradNormState
from h2a2_jax.balancers.ngh import mean_over_datasets, norm_gradient_harmonization, plain_mean
from h2a2_jax.balancers.pcgrad import PCGradState
from h2a2_jax.checkpoint.tree import flat_names, reordered_balancer
from h2a2_jax.config import HarmonizeConfig

METHODS = get_args(HarmonizeConfig.__annotations__["method"])
ALL3 = jnp.ones(3, bool)
# Two that conflict, and norms 0.5, 5 and 10.
GRADS = {"a": jnp.array([[0.3, 0.4], [-3.0, -4.0], [0.0, 6.0]]), "b": jnp.array([[0.0], [0.0], [8.0]])}
PARAMS = jax.tree.map(lambda leaf: leaf[0], GRADS)
LOSSES = jnp.array([1.0, 2.0, 3.0])


def one_step(config: HarmonizeConfig, state: Any = None, axis_name: str | None = None, present=ALL3) -> tuple:
    """Mean, updates and state after one step."""
    balancer = build_balancer(config, 3, axis_name)
    state = balancer.init(PARAMS) if state is None else state
    updates, state = balancer.update(GRADS, state, PARAMS, present=present, losses=LOSSES)
    return mean_over_datasets(updates, present), updates, state


def test_every_method_has_an_interface_of_its_own_results():
    assert METHODS == ("ngh", "mean", "pcgrad", "gradnorm")
    means = {}
    for method in METHODS:
        config = HarmonizeConfig(method, weight_lr=0.2)
        _, _, state = one_step(config)
        mean, _, after = one_step(config, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        means[method] = np.concatenate(jax.tree.leaves(mean))
    assert len({tuple(mean) for mean in means.values()}) == 4
    np.testing.assert_allclose(means["mean"], np.concatenate([np.mean(leaf, 0) for leaf in jax.tree.leaves(GRADS)]))


def test_numbers_of_the_config_arrive():
    def changed(**options: Any) -> bool:
        results = []
        for config in (HarmonizeConfig(**options), HarmonizeConfig(options["method"])):
            _, _, state = one_step(config)
            # the second loss ratio differs, so that alpha counts
            balancer = build_balancer(config, 3)
            _, state = balancer.update(GRADS, state, present=ALL3, losses=jnp.array([0.5, 2.0, 2.9]))
            updates, _ = balancer.update(GRADS, state, present=ALL3, losses=LOSSES)
            results.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)]))
        return not np.array_equal(*results)

    assert changed(method="ngh", threshold=0.0)
    assert changed(method="ngh", scope="global")
    assert changed(method="ngh", cap=1.5)
    assert changed(method="gradnorm", weight_lr=0.2)
    assert changed(method="gradnorm", alpha=30.0)
    assert not changed(method="mean", threshold=0.1)


def test_seed_arrives_at_the_method_that_draws():
    orders = set()
    for seed in range(6):
        balancer = build_balancer(HarmonizeConfig("pcgrad"), 7, seed=seed)
        grads = jnp.asarray(np.random.default_rng(3).normal(size=(7, 4)), jnp.float32)
        updates, _ = balancer.update(grads, balancer.init(grads[0]), present=jnp.ones(7, bool), losses=jnp.ones(7))
        orders.add(float(updates.sum()))
    assert len(orders) > 1


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_records_agreement_and_norms_alike(method: str, scope: str):
    config = HarmonizeConfig(method, scope=scope)
    balancer = norm_gradient_harmonization(3, scope=scope)
    _, expected = balancer.update(GRADS, balancer.init(PARAMS), present=ALL3)
    _, _, state = one_step(config)
    record = recorded(state)
    jax.tree.map(np.testing.assert_array_equal, (record.psi, record.norms), (expected.psi, expected.norms))
    assert jax.tree.structure(record) == jax.tree.structure(expected)


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_recorded_factors_are_those_that_the_gradients_were_multiplied_by(method: str, scope: str):
    config = HarmonizeConfig(method, scope=scope, weight_lr=0.2)
    _, _, state = one_step(config)
    _, updates, state = one_step(config, state)
    scales = recorded(state).scales
    for name in GRADS:
        factors = np.asarray(scales[name] if scope == "tensor" else scales)[:, None]
        np.testing.assert_allclose(updates[name], GRADS[name] * factors, rtol=1e-6)
    assert (method == "mean") == all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(scales))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_an_absent_dataset_comes_through(method: str):
    balancer = build_balancer(HarmonizeConfig(method), 3)
    grads = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), GRADS)
    present, losses = jnp.array([True, False, True]), LOSSES.at[1].set(jnp.nan)
    updates, state = balancer.update(grads, balancer.init(PARAMS), present=present, losses=losses)
    assert all(np.isfinite(leaf).all() and not leaf[1].any() for leaf in jax.tree.leaves(updates))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert recorded(state).norms["a"][1] == 0


@pytest.mark.parametrize("method", METHODS)
def test_one_dataset_alone_keeps_its_gradient(method: str):
    balancer = build_balancer(HarmonizeConfig(method), 1)
    grads = jax.tree.map(lambda leaf: leaf[1:2], GRADS)
    state = balancer.init(PARAMS)
    for _ in range(2):
        updates, state = balancer.update(grads, state, present=jnp.ones(1, bool), losses=jnp.ones(1))
        jax.tree.map(np.testing.assert_array_equal, updates, grads)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_keeps_its_structure_and_types(method: str):
    balancer = build_balancer(HarmonizeConfig(method), 3)
    step, state = jax.jit(balancer.update), balancer.init(PARAMS)
    forms = []
    for _ in range(3):
        forms.append(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state))
        _, state = step(GRADS, state, present=ALL3, losses=LOSSES)
    assert forms[0] == forms[1] == forms[2]
    assert step._cache_size() == 1


@pytest.mark.parametrize("method", METHODS)
def test_devices_do_not_change_the_result(method: str):
    mesh = jax.make_mesh((3,), ("dataset",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    each, same = PartitionSpec("dataset"), PartitionSpec()
    config = HarmonizeConfig(method, weight_lr=0.2)

    def step(axis_name: str | None, grads: Any, losses: Any, present: Any, state: Any) -> Any:
        return build_balancer(config, 3, axis_name).update(grads, state, present=present, losses=losses)

    spread = jax.shard_map(
        partial(step, "dataset"), mesh=mesh, in_specs=(each, each, each, same), out_specs=(each, same)
    )
    arguments = GRADS, LOSSES, jnp.array([True, True, False]), build_balancer(config, 3).init(PARAMS)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, jax.jit(spread)(*arguments), jax.jit(partial(step, None))(*arguments))


def stored_and_like(method: str) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays of a state after a step by their names, and the state itself."""
    _, _, state = one_step(HarmonizeConfig(method, weight_lr=0.2), present=jnp.array([True, True, False]))
    return dict(zip(flat_names(state), map(np.asarray, jax.tree.leaves(state)), strict=True)), state


@pytest.mark.parametrize("method", METHODS)
def test_datasets_in_another_order_are_rows_in_another_order(method: str):
    stored, like = stored_and_like(method)
    order, rows = ("s3dis", "scannet", "sunrgbd"), [2, 0, 1]
    moved = reordered_balancer(stored, like, ("scannet", "sunrgbd", "s3dis"), order)
    assert moved.keys() == stored.keys()
    by_dataset = {name for name, array in stored.items() if array.shape == (3,)}
    assert {name.split(".")[-1 if name.startswith("method") else -2] for name in by_dataset} == {
        "ngh": {"norms", "scales"},
        "mean": {"norms", "scales"},
        "pcgrad": {"norms", "scales"},
        "gradnorm": {"norms", "scales", "weights", "first_losses"},
    }[method]
    for name, array in moved.items():
        np.testing.assert_array_equal(array, stored[name][rows] if name in by_dataset else stored[name])


def test_a_parameter_called_as_a_field_is_not_taken_for_one():
    balancer = build_balancer(HarmonizeConfig("pcgrad"), 3)
    state = balancer.init({"norms": jnp.ones(3), "scales": jnp.ones(2)})
    marked = has_dataset_axis(state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert marked.record.psi == {"norms": False, "scales": False}
    assert marked.record.norms == {"norms": True, "scales": True}
    assert marked.method == PCGradState(False, True)


def test_states_of_other_balancers():
    assert recorded(optax.EmptyState()) is None
    assert has_dataset_axis(plain_mean().init(PARAMS)) is None
    assert has_dataset_axis(RecordedState(norm_gradient_harmonization(3).init(PARAMS), optax.EmptyState())) is None
    state = RecordedState(norm_gradient_harmonization(3).init(PARAMS), GradNormState(*[jnp.ones(3)] * 3))
    assert recorded(state) is state.record
    assert re.search("record.psi.a", " ".join(flat_names(state)))
