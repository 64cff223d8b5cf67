"""Gramians of plain and packed trees on several devices, against numpy; what devices exchange for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from benchmarks.balancers import collectives, sent
from h2a2_jax.balancers import gramian_balancer
from h2a2_jax.balancers.gramian import Situation, beginning_of, group_tensors, relative_gramians
from h2a2_jax.balancers.imtl_g import imtl_g
from h2a2_jax.balancers.ngh import mean_over_datasets, norm_gradient_harmonization
from h2a2_jax.balancers.packing import LARGEST, Packing, name_tensors, unpack
from tests.balancers.trees import PACKING, PARAMETERS, mesh, random_tree

GROUPS = ["backbone.stages.0", "backbone.stages.0", "backbone.stages.1", *["backbone.stem"] * 3, "head"]


def expected_gramians(grads: Any, present: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Relative Gramians by numpy in float64."""
    leaves = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(unpack(grads))]
    found = np.zeros((groups.max() + 1, len(present), len(present)))
    for leaf, group in zip(leaves, groups, strict=True):
        leaf = np.where(present[:, None], leaf, 0)
        found[group] += leaf @ leaf.T
    return found / found.max((1, 2), keepdims=True)


def test_parameters_are_grouped_by_the_beginning_of_their_path() -> None:
    assert name_tensors(PARAMETERS)[0] == "backbone.stages.0.conv.kernel"
    assert [beginning_of(name) for name in name_tensors(PARAMETERS)] == GROUPS
    assert beginning_of("weight") == "weight" and beginning_of("embedding.scan.weight") == "embedding.scan"
    np.testing.assert_array_equal(group_tensors(PARAMETERS, "group"), [0, 0, 1, 2, 2, 2, 3])
    np.testing.assert_array_equal(group_tensors(PACKING.pack(PARAMETERS), "group"), [0, 0, 1, 2, 2, 2, 3])
    np.testing.assert_array_equal(group_tensors(PARAMETERS, "group", lambda name: name[0]), [*[0] * 6, 1])
    np.testing.assert_array_equal(group_tensors(PARAMETERS, "global"), [0] * 7)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("devices", [0, 3])
def test_gramians_are_those_of_numpy(devices: int, scope: str) -> None:
    """Of plain and of packed trees, in one program."""
    grads, present = random_tree(6), np.array([True, True, False, True, True, True])
    groups = group_tensors(PARAMETERS, scope)
    axis = "dataset" if devices else None

    def both(plain: Any, packed: Any, present: jax.Array) -> Any:
        return [relative_gramians(tree, present, groups, 6, axis) for tree in (plain, packed)]

    each, same = PartitionSpec("dataset"), PartitionSpec()
    if devices:
        both = jax.shard_map(both, mesh=mesh(devices), in_specs=(each, each, each), out_specs=same)
    absent = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), grads)
    for gramians, active, unit in jax.jit(both)(absent, PACKING.pack(absent), jnp.asarray(present)):
        np.testing.assert_allclose(gramians, expected_gramians(grads, present, groups), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(active, np.tile(present, (groups.max() + 1, 1)))
        assert unit.shape == (groups.max() + 1,) and (unit > 0).all()


@pytest.mark.parametrize("unit", [1e-11, 1e-4, 1e15, 1e25])
def test_gramians_do_not_depend_on_the_unit(unit: float) -> None:
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300)) * [[unit], [3 * unit]], jnp.float32)
    gramians, active, found = relative_gramians(grads, jnp.ones(2, bool), np.zeros(1, np.int32), 2)
    wanted = np.asarray(grads, np.float64) / unit
    np.testing.assert_allclose(gramians[0], wanted @ wanted.T / (wanted[1] @ wanted[1]), rtol=1e-5)
    assert active.all()
    np.testing.assert_allclose(found, unit * np.linalg.norm(wanted[1]), rtol=1e-5)


def test_no_gradient_is_gathered_and_half_an_all_reduce_is_sent() -> None:
    datasets, large = 3, LARGEST + 5
    shapes = {"large": (large,), "a": (100, 30), "b": (40,)}
    packing = Packing.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, lambda name: "kernel")
    grads = {name: jnp.ones((datasets, *shape)) for name, shape in shapes.items()}
    each, same = PartitionSpec("dataset"), PartitionSpec()

    def step(grads: Any, present: jax.Array, state: Any) -> Any:
        return imtl_g(datasets, axis_name="dataset").update(grads, state, present=present)

    spread = jax.shard_map(step, mesh=mesh(3), in_specs=(each, each, same), out_specs=(each, same))
    state = imtl_g(datasets).init(None)
    program = jax.jit(spread).lower(packing.pack(grads), jnp.ones(3, bool), state).compile().as_text()
    found = collectives(program)
    # Rows of 128: 24 of the larger packed array and one of the smaller; each array is padded to three equal shares.
    numbers = sum(3 * -(-size // 3) for size in (large, 25 * 128))
    assert found["all-to-all"][1] == 4 * numbers
    # What is left are the largest numbers and the Gramian of K x K.
    assert found["all-reduce"][1] == 4 * (datasets + datasets**2)
    assert set(found) == {"all-to-all", "all-reduce"}
    assert sent(found, 3) == (4 * numbers + 2 * 4 * 12) * 2 // 3


def test_scopes_weigh_each_part_for_itself() -> None:
    """By tensor and by group a method does to each part what it does globally to that part alone."""
    grads, present = random_tree(3), jnp.ones(3, bool)
    leaves = jax.tree.leaves(grads)
    scopes: dict[Any, list[list[int]]] = {
        "tensor": [[i] for i in range(7)],
        "group": [[0, 1], [2], [3, 4, 5], [6]],
    }

    def step(part: Any, scope: Any, like: Any) -> Any:
        balancer = imtl_g(3, scope=scope)
        return balancer.update(part, balancer.init(like), present=present)

    def every(grads: Any) -> Any:
        whole = {scope: step(grads, scope, PARAMETERS) for scope in scopes}
        parts = {scope: [step([leaves[i] for i in p], "global", None) for p in own] for scope, own in scopes.items()}
        return whole, parts

    whole, parts = jax.jit(every)(grads)
    for scope, own in scopes.items():
        updates, state = whole[scope]
        assert state.scales.shape == (3, 7)
        for part, (alone, record) in zip(own, parts[scope], strict=True):
            for i, leaf in zip(part, alone, strict=True):
                np.testing.assert_allclose(jax.tree.leaves(updates)[i], leaf, rtol=2e-4, atol=1e-6)
                np.testing.assert_allclose(state.scales[:, i], record.scales, rtol=2e-4, atol=1e-6)


def test_norms_by_group_are_harmonised_together() -> None:
    grads, parts = random_tree(3), [[0, 1], [2], [3, 4, 5], [6]]
    leaves = jax.tree.leaves(grads)

    def step(part: Any, scope: str, like: Any) -> Any:
        balancer = norm_gradient_harmonization(3, scope=scope)
        return balancer.update(part, balancer.init(like), present=jnp.ones(3, bool))

    @jax.jit
    def every(grads: Any) -> Any:
        return step(grads, "group", PARAMETERS), [step([leaves[i] for i in p], "global", PARAMETERS) for p in parts]

    (updates, state), alone = every(grads)
    for part, (own, record) in zip(parts, alone, strict=True):
        for i, leaf in zip(part, own, strict=True):
            np.testing.assert_allclose(jax.tree.leaves(updates)[i], leaf, rtol=1e-5)
            np.testing.assert_allclose(jax.tree.leaves(state.psi)[i], record.psi, rtol=1e-5)
            np.testing.assert_allclose(jax.tree.leaves(state.scales)[i], record.scales, rtol=1e-5)
            norms = np.linalg.norm(np.asarray(leaves[i]).reshape(3, -1), axis=1)
            np.testing.assert_allclose(jax.tree.leaves(state.norms)[i], norms, rtol=1e-5)
    assert min(jax.tree.leaves(state.psi)) < 0.8


def test_inactive_datasets_keep_their_gradients_and_are_not_weighed() -> None:
    """Zero counts in the mean; what is not finite comes through to the check of the step."""
    grads = jnp.array([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0], [jnp.inf, 1.0]])
    updates, state = jax.jit(imtl_g(4).update)(grads, imtl_g(4).init(None), present=jnp.ones(4, bool))
    # Of two orthogonal gradients of lengths 3 and 1 the weights are 1/4 and 3/4, times two datasets.
    np.testing.assert_allclose(state.scales, [0.5, 1, 1.5, 1], rtol=1e-5)
    np.testing.assert_allclose(mean_over_datasets(updates[:3], jnp.ones(3, bool)), [0.5, 0.5], rtol=1e-5)
    np.testing.assert_array_equal(updates[3], grads[3])


def test_a_weight_that_is_not_finite_leaves_its_group_alone() -> None:
    def weigh(situation: Situation) -> jax.Array:
        return jnp.where(situation.unit > 2, jnp.nan, 0.25) * jnp.ones(2)

    grads, present = {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[3.0], [4.0]])}, jnp.ones(2, bool)
    balancer = gramian_balancer(weigh, 2, scope="tensor")
    start = balancer.init(jax.tree.map(lambda leaf: leaf[0], grads))
    updates, state = jax.jit(balancer.update)(grads, start, present=present)
    np.testing.assert_array_equal(updates["b"], grads["b"])
    np.testing.assert_allclose(updates["a"], 0.5 * grads["a"])
    np.testing.assert_allclose(state.scales, [[0.5, 1], [0.5, 1]])


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope is 'layer'; choose \"tensor\""):
        norm_gradient_harmonization(3, scope="layer")
