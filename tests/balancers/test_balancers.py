"""The balancers of a config: one interface, one record, and what tells them apart."""

import re
from functools import lru_cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from h2a2_jax.balancers import (
    GRAMIAN_METHODS,
    GramianState,
    RecordedState,
    build_balancer,
    dataset_axes,
    recorded,
)
from h2a2_jax.balancers.gradnorm import GradNormState
from h2a2_jax.balancers.ngh import mean_over_datasets, norm_gradient_harmonization, plain_mean
from h2a2_jax.checkpoint.tree import flat_names, reordered_balancer
from h2a2_jax.config import HarmonizeConfig
from tests.balancers.trees import PACKING, PARAMETERS, mesh, random_tree

METHODS = get_args(HarmonizeConfig.__annotations__["method"])
ALL3 = jnp.ones(3, bool)
# Two that conflict, and norms 0.5, 5 and 10.
GRADS = {"a": jnp.array([[0.3, 0.4], [-3.0, -4.2], [0.0, 6.0]]), "b": jnp.array([[0.0], [0.0], [8.0]])}
PARAMS = jax.tree.map(lambda leaf: leaf[0], GRADS)
LOSSES = jnp.array([1.0, 2.0, 3.0])
OPTIONS: dict[str, Any] = {"weight_lr": 0.2, "weights": (1.0, 2.0, 3.0), "dwa_window": 1}


def config_of(method: str, scope: str = "tensor", gramian_scope: str = "global") -> HarmonizeConfig:
    return HarmonizeConfig(method, scope=scope, gramian_scope=gramian_scope, **OPTIONS)


@lru_cache
def compiled(config: HarmonizeConfig, seed: int = 0) -> Any:
    """Compiled update, which the tests share, and the first state."""
    balancer = build_balancer(config, 3, seed=seed)
    return jax.jit(balancer.update), balancer.init(PARAMS)


def three_steps(config: HarmonizeConfig, present: jax.Array = ALL3) -> tuple[Any, Any]:
    """Updates and state of the third step."""
    update, state = compiled(config)
    for losses in (LOSSES, LOSSES * jnp.array([0.5, 1.0, 0.9]), LOSSES * jnp.array([0.4, 1.0, 0.8])):
        updates, state = update(GRADS, state, present=present, losses=losses)
    return updates, state


def test_every_method_has_an_interface_of_its_own_results():
    assert METHODS[:4] == ("ngh", "mean", "pcgrad", "gradnorm") and set(GRAMIAN_METHODS) < set(METHODS)
    means = {}
    for method in METHODS:
        updates, _ = three_steps(config_of(method))
        means[method] = np.concatenate(jax.tree.leaves(mean_over_datasets(updates, ALL3)))
    assert len({tuple(mean) for mean in means.values()}) == len(METHODS) == 18
    np.testing.assert_allclose(means["mean"], np.concatenate([np.mean(leaf, 0) for leaf in jax.tree.leaves(GRADS)]))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ngh", "threshold": 0.0},
        {"method": "ngh", "scope": "global"},
        {"method": "ngh", "cap": 1.5},
        {"method": "gradnorm", "weight_lr": 0.2},
        {"method": "gradnorm", "alpha": 30.0},
        {"method": "uncertainty", "weight_lr": 0.2},
        {"method": "famo", "weight_lr": 0.2},
        {"method": "famo", "famo_decay": 0.5},
        {"method": "dwa", "dwa_window": 1},
        {"method": "cagrad", "cagrad_c": 0.9},
        {"method": "nash_mtl", "nash_max_norm": 0.0},
        {"method": "aligned_mtl", "aligned_scale": "rmse"},
        {"method": "gradvac", "gradvac_beta": 0.9},
        {"method": "mgda", "gramian_scope": "tensor"},
        {"method": "upgrad", "gramian_scope": "group"},
    ],
    ids=str,
)
def test_numbers_of_the_config_arrive(options: dict[str, Any]):
    results = []
    for config in (HarmonizeConfig(**options), HarmonizeConfig(options["method"])):
        updates, _ = three_steps(config)
        results.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)]))
    assert not np.array_equal(*results)


def test_a_temperature_of_dwa_arrives_where_losses_fall_apart():
    factors = []
    for temperature in (2.0, 0.5):
        _, state = three_steps(HarmonizeConfig("dwa", dwa_window=1, dwa_temperature=temperature))
        factors.append(np.ptp(state.method.scales))
    assert factors[1] > 2 * factors[0] > 0


def test_the_threshold_of_ngh_is_not_that_of_the_mean():
    first, second = (three_steps(HarmonizeConfig("mean", threshold=t))[0] for t in (0.1, 0.8))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "random"])
def test_seed_arrives_at_the_methods_that_draw(method: str):
    # Three that conflict with one another, so that the order matters.
    angles = np.array([0.0, 1.7, 3.6])
    grads = {"a": jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1), jnp.float32), "b": jnp.zeros((3, 1))}
    found = set()
    for seed in range(3):
        update, state = compiled(config_of(method), seed)
        for _ in range(2):
            _, state = update(grads, state, present=ALL3, losses=LOSSES)
        found.add(tuple(np.round(state.method.scales, 5).tolist()))
    assert len(found) > 1


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_records_agreement_and_norms_alike(method: str, scope: str):
    balancer = norm_gradient_harmonization(3, scope=scope)
    _, expected = balancer.update(GRADS, balancer.init(PARAMS), present=ALL3)
    updates, state = three_steps(config_of(method, scope))
    record = recorded(state)
    jax.tree.map(np.testing.assert_array_equal, (record.psi, record.norms), (expected.psi, expected.norms))
    assert jax.tree.structure(record) == jax.tree.structure(expected)
    for name in GRADS:
        factors = np.asarray(record.scales[name] if scope == "tensor" else record.scales)[:, None]
        np.testing.assert_allclose(updates[name], GRADS[name] * factors, rtol=1e-5)
    assert (method == "mean") == all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(record.scales))


def test_factors_by_tensor_are_recorded_by_tensor():
    updates, state = three_steps(config_of("upgrad", "global", "tensor"))
    scales = recorded(state).scales
    assert set(scales) == {"a", "b"} and scales["a"].shape == (3,)
    for name in GRADS:
        np.testing.assert_allclose(updates[name], GRADS[name] * np.asarray(scales[name])[:, None], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_an_absent_dataset_comes_through(method: str):
    update, state = compiled(config_of(method))
    grads = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), GRADS)
    present, losses = jnp.array([True, False, True]), LOSSES.at[1].set(jnp.nan)
    for _ in range(2):
        updates, state = update(grads, state, present=present, losses=losses)
        assert all(np.isfinite(leaf).all() and not leaf[1].any() for leaf in jax.tree.leaves(updates))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert recorded(state).norms["a"][1] == 0


@pytest.mark.parametrize("method", METHODS)
def test_one_dataset_alone_keeps_its_gradient(method: str):
    present = jnp.array([False, True, False])
    updates, state = three_steps(config_of(method), present)
    learned = method in ("uncertainty", "fixed")  # factors of each dataset for itself
    for name, leaf in updates.items():
        factor = state.method.scales[1] if learned else 1
        np.testing.assert_allclose(leaf[1], GRADS[name][1] * factor, rtol=1e-6)
        assert not leaf[0].any() and not leaf[2].any()


@pytest.mark.parametrize("method", METHODS)
def test_no_dataset_present_gives_zero(method: str):
    updates, state = three_steps(config_of(method), jnp.zeros(3, bool))
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("method", METHODS)
def test_the_state_keeps_its_structure_and_types(method: str):
    update, state = compiled(config_of(method))
    forms = []
    for _ in range(3):
        forms.append(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state))
        _, state = update(GRADS, state, present=ALL3, losses=LOSSES)
    assert forms[0] == forms[1] == forms[2]
    assert update._cache_size() == 1


SPREAD = {
    **{method: HarmonizeConfig(method, weights=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), weight_lr=0.2) for method in METHODS},
    "upgrad by group": HarmonizeConfig("upgrad", gramian_scope="group"),
    "gradvac by tensor": HarmonizeConfig("gradvac", gramian_scope="tensor"),
    "ngh by group": HarmonizeConfig("ngh", scope="group"),
}


def take_steps(axis: str | None, grads: Any, losses: jax.Array, present: jax.Array, states: Any) -> Any:
    """A step of every balancer, in one program, with six datasets: updates and states."""
    updates, after = {}, {}
    for name, config in SPREAD.items():
        balancer = build_balancer(config, 6, axis, seed=1)
        updates[name], after[name] = balancer.update(grads, states[name], present=present, losses=losses)
    return updates, after


def arguments_of_steps() -> list[tuple[Any, jax.Array, jax.Array]]:
    """Packed gradients, losses and presence of two steps, the second without a dataset."""
    return [
        (PACKING.pack(random_tree(6, seed)), jnp.arange(1.0, 7.0) * (1 + seed), jnp.arange(6) != absent)
        for seed, absent in enumerate((-1, 1))
    ]


@lru_cache
def on_one_device() -> list[tuple[Any, Any]]:
    """States before each of the steps, and results."""
    states = {name: build_balancer(config, 6).init(PACKING.pack(PARAMETERS)) for name, config in SPREAD.items()}
    local, found = jax.jit(partial(take_steps, None)), []
    for arguments in arguments_of_steps():
        results = local(*arguments, states)
        found.append((states, results))
        states = results[1]
    return found


@pytest.mark.parametrize("devices", [3, 6])
def test_devices_do_not_change_the_result(devices: int) -> None:
    each, same = PartitionSpec("dataset"), PartitionSpec()
    spread = jax.jit(
        jax.shard_map(
            partial(take_steps, "dataset"),
            mesh=mesh(devices),
            in_specs=(each, each, each, same),
            out_specs=(each, same),
        )
    )
    for arguments, (states, expected) in zip(arguments_of_steps(), on_one_device(), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), spread(*arguments, states), expected)


@pytest.mark.parametrize("method", METHODS)
def test_datasets_in_another_order_are_rows_in_another_order(method: str):
    _, like = three_steps(config_of(method))
    stored = dict(zip(flat_names(like), map(np.asarray, jax.tree.leaves(like)), strict=True))
    order, rows = ("s3dis", "scannet", "sunrgbd"), [2, 0, 1]
    moved = reordered_balancer(stored, like, ("scannet", "sunrgbd", "s3dis"), order)
    assert moved.keys() == stored.keys()
    for name, array in moved.items():
        # Every field of K numbers is one of the datasets, and every field of K x K one of their pairs.
        before = {0: stored[name], 1: stored[name][rows] if array.shape else None}.get(array.ndim)
        np.testing.assert_array_equal(array, stored[name][np.ix_(rows, rows)] if array.ndim == 2 else before)
    assert ("method.memory" in stored) == (method == "gradvac")


def test_a_parameter_called_as_a_field_is_not_taken_for_one():
    balancer = build_balancer(HarmonizeConfig("pcgrad"), 3)
    state = balancer.init({"norms": jnp.ones(3), "scales": jnp.ones(2)})
    marked = dataset_axes(state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert marked.record.psi == {"norms": 0, "scales": 0}
    assert marked.record.norms == {"norms": 1, "scales": 1}
    assert marked.method == GramianState(0, 1)


def test_states_of_other_balancers():
    assert recorded(optax.EmptyState()) is None
    assert dataset_axes(plain_mean().init(PARAMS)) is None
    assert dataset_axes(RecordedState(norm_gradient_harmonization(3).init(PARAMS), optax.EmptyState())) is None
    state = RecordedState(norm_gradient_harmonization(3).init(PARAMS), GradNormState(*[jnp.ones(3)] * 3))
    assert recorded(state) is state.record
    assert re.search("record.psi.a", " ".join(flat_names(state)))


def test_weights_are_one_for_each_dataset():
    with pytest.raises(ValueError, match=r"there are 2 weights for 3 datasets; give one for each"):
        build_balancer(HarmonizeConfig("fixed", weights=(1.0, 2.0)), 3)
