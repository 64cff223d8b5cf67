"""The optimiser: learning rates by hand, what decays, frozen parameters bit for bit, and one layout of the state."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from h2a2_jax.balancers.packing import Packing, unpack
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import OptimConfig, ParameterGroup
from h2a2_jax.distributed import DATASET, REPLICA, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.models import DetectorConfig
from h2a2_jax.optimizer import build_optimizer, grouped_paths, is_weight, learning_rate, packing_kind
from tests.checkpoint.test_store import NAMES, PLAIN, TINY, assert_equal, experiment, make_state, state_shapes

FULL = DetectorConfig(
    depth=10,
    norm_affine="exclusive",
    selection=SelectionConfig(
        convolutions=("stem", "residual", "neck"),
        structure_parameters="exclusive",
        scan_embedding=True,
        exclusive_init="independent",
    ),
)
EVERYTHING = OptimConfig(weight_decay=0.5)
WEIGHTS_ALONE = OptimConfig(weight_decay=0.5, decay_norms_and_biases=False)
FROZEN = frozenset({"backbone.stem.conv.kernel", "backbone.stem.norm.bias", "heads.box_kernel"})


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_steps_equal_the_piecewise_formula_bit_for_bit(warmup: int):
    optim = OptimConfig(1e-3, decay_epochs=(8, 11), decay_factor=0.1, warmup_steps=warmup)
    rate = learning_rate(optim, steps_per_epoch=10, total_steps=120)
    steps = optax.piecewise_constant_schedule(1e-3, {80: 0.1, 110: 0.1})
    for count in map(jnp.int32, (0, 1, 5, 6, 7, 79, 80, 81, 109, 110, 119)):
        expected = steps(count) * jnp.minimum(1.0, (count + 1) / warmup) if warmup else steps(count)
        assert rate(count) == expected


def test_a_cosine_falls_from_the_end_of_warm_up_to_the_last_step():
    optim = OptimConfig(2.0, schedule="cosine", final_lr=0.1, warmup_steps=10)
    rate = learning_rate(optim, steps_per_epoch=1, total_steps=110)
    np.testing.assert_allclose([rate(c) for c in (0, 4, 9, 10)], [0.2, 1.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([rate(c) for c in (35, 60, 110, 200)], [1.736396, 1.1, 0.2, 0.2], rtol=1e-6)
    falling = [float(rate(c)) for c in range(10, 111)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate(OptimConfig(2.0, schedule="cosine"), steps_per_epoch=1, total_steps=4)(4) == 0
    short = learning_rate(OptimConfig(2.0, schedule="cosine", warmup_steps=8), steps_per_epoch=1, total_steps=4)
    np.testing.assert_allclose([short(c) for c in range(4)], [0.25, 0.5, 0.75, 1.0])


def test_a_constant_rate_has_warm_up_too():
    rate = learning_rate(OptimConfig(3.0, schedule="constant", warmup_steps=3), steps_per_epoch=1, total_steps=9)
    assert [float(rate(c)) for c in (0, 1, 2, 3, 8)] == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("model", [PLAIN, TINY, FULL, dataclasses.replace(PLAIN, kind="fcaf3d")])
def test_weights_are_what_has_two_axes_but_tables_of_vectors(model: DetectorConfig):
    state = state_shapes(NAMES, model, False)
    for tree, own_axes in ((state.shared, 0), (state.exclusive, 1)):
        chosen = dict(zip(flat_names(tree), jax.tree.leaves(is_weight(tree)), strict=True))
        axes = {name: leaf.ndim - own_axes for name, leaf in zip(flat_names(tree), jax.tree.leaves(tree), strict=True)}
        tables = {name for name in axes if name.endswith(("embedding", "prototypes"))}
        assert {name for name, value in chosen.items() if value} == {n for n, a in axes.items() if a >= 2} - tables


def step(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def arrays(tree: Any) -> dict[str, jax.Array]:
    return dict(zip(flat_names(tree), jax.tree.leaves(tree), strict=True))


def test_weight_decay_alone_moves_weights_alone():
    params = make_state(1).exclusive
    nothing = jax.tree.map(jnp.zeros_like, params)
    optimizer = build_optimizer(WEIGHTS_ALONE, optax.constant_schedule(0.1))
    moved, _ = step(optimizer, params, nothing)
    weights = arrays(is_weight(params))
    for name, after in arrays(moved).items():
        before = arrays(params)[name]
        np.testing.assert_allclose(after, before * 0.95**2 if weights[name] else before, rtol=1e-6)


def test_by_default_it_is_adamw():
    state = make_state(1, model=PLAIN)
    params, gradients = state.exclusive, make_state(2, model=PLAIN).exclusive
    schedule = optax.constant_schedule(0.1)
    assert_equal(
        step(build_optimizer(EVERYTHING, schedule), params, gradients),
        step(optax.adamw(schedule, weight_decay=0.5), params, gradients),
    )


@pytest.mark.parametrize("devices", [1, 3])
def test_frozen_parameters_stay_bit_for_bit_on_any_devices(devices: int):
    start, gradients = make_state(1, model=PLAIN), make_state(2, model=PLAIN)
    gradients = dataclasses.replace(gradients, shared=jax.tree.map(lambda g: g * jnp.nan, gradients.shared))
    optimizer = build_optimizer(WEIGHTS_ALONE, optax.constant_schedule(0.1), FROZEN)
    mesh = train_mesh(3, jax.devices()[:devices])
    state = jax.eval_shape(optimizer.init, start.exclusive)
    placed = jax.tree.map(lambda leaf: P(DATASET) if leaf.ndim else P(), state)

    def both(params: Any, gradients: Any) -> Any:
        own = step(optimizer, params[1], gradients[1])
        return step(optimizer, params[0], gradients[0])[0], own

    layout = (P(), P(DATASET))
    run = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(layout, layout), out_specs=(P(), (P(DATASET), placed))))
    shared, (exclusive, state) = run((start.shared, start.exclusive), (gradients.shared, gradients.exclusive))
    assert mesh.shape[REPLICA] == 1
    for before, after in ((start.shared, shared), (start.exclusive, exclusive)):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for name, value in arrays(after).items():
            assert np.array_equal(value, arrays(before)[name]) == (name in FROZEN)
    moments = {name: value for name, value in arrays(state).items() if name.endswith("heads.box_kernel")}
    assert len(moments) == 2 and not any(np.any(value) for value in moments.values())


def test_choices_do_not_move_the_arrays_of_the_state():
    state, schedule = state_shapes(NAMES, TINY, False), optax.constant_schedule(0.1)
    for tree in (state.shared, state.exclusive):
        today = jax.eval_shape(optax.adamw(schedule, weight_decay=0.5).init, tree)
        for optimizer in (
            build_optimizer(EVERYTHING, schedule),
            build_optimizer(
                EVERYTHING, learning_rate(OptimConfig(1.0, schedule="cosine"), steps_per_epoch=1, total_steps=9)
            ),
            build_optimizer(WEIGHTS_ALONE, schedule, FROZEN),
        ):
            chosen = jax.eval_shape(optimizer.init, tree)
            assert flat_names(chosen) == flat_names(today)
            assert jax.tree.leaves(chosen) == jax.tree.leaves(today)


def test_a_checkpoint_is_restored_under_other_choices(tmp_path: Path):
    def with_optimizer(seed: int, optimizer: optax.GradientTransformation) -> Any:
        state = make_state(seed, model=PLAIN)
        start = optimizer.init(state.shared), optimizer.init(state.exclusive)
        shared, exclusive = jax.tree.map(lambda leaf: leaf + seed, start)
        return dataclasses.replace(state, shared_optimizer=shared, exclusive_optimizer=exclusive)

    schedule = optax.constant_schedule(0.1)
    stored = with_optimizer(1, optax.adamw(schedule, weight_decay=0.5))
    like = with_optimizer(2, build_optimizer(WEIGHTS_ALONE, schedule, FROZEN))
    for ours, theirs in ((stored, like), (like, stored)):
        with CheckpointStore(tmp_path / str(ours is like)) as store:
            store.save(1, ours, experiment(model=PLAIN), NAMES)
            restored = store.restore_state(1, theirs, NAMES)
        assert jax.tree.structure(restored) == jax.tree.structure(theirs)
        for name, value in arrays(restored.exclusive_optimizer).items():
            padded = "heads" in name  # what is padded in a head is not stored
            assert padded or np.array_equal(value, arrays(ours.exclusive_optimizer)[name])


GROUPED = dataclasses.replace(
    WEIGHTS_ALONE,
    warmup_steps=4,
    groups=(
        ParameterGroup(("selection",), 30.0, warmup_steps=10),
        ParameterGroup(("*.norm.bias", "selection"), 0.5),
        ParameterGroup(("exclusive_kernels",), 2.0, warmup_steps=0),
    ),
)


@pytest.mark.parametrize("packed", [False, True])
def test_groups_have_learning_rates_and_warm_up_of_their_own(packed: bool):
    start, gradients = make_state(1), make_state(2)
    grouped = grouped_paths(start.shared, start.exclusive, GROUPED)
    schedule = learning_rate(GROUPED, steps_per_epoch=1, total_steps=100)
    optimizers = build_optimizer(GROUPED, schedule, FROZEN, grouped), build_optimizer(GROUPED, schedule, FROZEN)
    kind = partial(packing_kind, frozen=FROZEN, grouped=grouped)

    def moves(optimizer: optax.GradientTransformation, name: str, axes: int) -> list[dict[str, jax.Array]]:
        params, slopes = getattr(start, name), getattr(gradients, name)
        if packed:
            params, slopes = (Packing.of(params, kind, axes).pack(tree) for tree in (params, slopes))
        state, found = optimizer.init(params), []
        for _ in range(3):
            updates, state = optimizer.update(slopes, state, params)
            found.append(arrays(unpack(updates)))
        return found

    factors = {0: (30 * 4 / 10, 30 * 4 / 10, 30 * 4 / 10), 1: (0.5, 0.5, 0.5), 2: (8.0, 4.0, 8 / 3)}
    assert {grouped.get(name) for name in arrays(start.shared)} == {None, 0, 1}
    assert {grouped.get(name) for name in arrays(start.exclusive)} == {None, 2}
    for name, axes in (("shared", 0), ("exclusive", 1)):
        ours, plain = (moves(optimizer, name, axes) for optimizer in optimizers)
        for number, (now, before) in enumerate(zip(ours, plain, strict=True)):
            for path, value in now.items():
                group = grouped.get(path)
                factor = 1.0 if group is None else factors[group][number]
                np.testing.assert_allclose(value, before[path] * factor, rtol=1e-5, atol=1e-12, err_msg=path)


def test_a_group_of_nothing_is_refused_by_its_key():
    start = make_state(1, model=PLAIN)
    optim = OptimConfig(groups=(ParameterGroup(("norms",)), ParameterGroup(("*.priors",))))
    with pytest.raises(InputError, match=r"optim\.groups\.1\.parameters has '\*\.priors', which names no parameter"):
        grouped_paths(start.shared, start.exclusive, optim)
