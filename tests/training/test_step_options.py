"""Steps that are skipped, steps of several batches, averages and frozen parameters."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from h2a2_jax.balancers.ngh import plain_mean
from h2a2_jax.checkpoint.parameter_groups import frozen_paths
from h2a2_jax.checkpoint.train_state import TrainState, create_state, place_state
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import OptimConfig, TrainConfig
from h2a2_jax.distributed import stack_batches, train_mesh
from h2a2_jax.loader.batching import Batch, BucketLadder, collate, pad_batch
from h2a2_jax.models import LevelSizes, PlanLayout
from h2a2_jax.optimizer import build_optimizer
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.training.step import make_train_step, tensor_names
from tests.models.scenes import MODEL, SELECTION, room, short_detector, short_plan
from tests.training.configs import joint_config

SPECS_USED = SPECS[:2]
STEM_ONLY = replace(SELECTION, convolutions=("stem",))
SCANS = [[[room(10 * d + i, points=900, boxes=3)] for d in range(2)] for i in range(2)]
"""By batch and dataset."""
DECAY, MOST_SKIPPED = 0.9, 2
FROZEN = "backbone.stages.1."
"""Start of the frozen parameters' names."""


@cache
def batches() -> tuple[Batch, ...]:
    """Two batches in one bucket."""
    hosts = [[collate(scans, MODEL) for scans in batch] for batch in SCANS]
    sizes = [host.tables.sizes for batch in hosts for host in batch]
    capacities = BucketLadder(LevelSizes(*(max(column) for column in zip(*sizes, strict=True)))).capacities(0)
    return tuple(
        stack_batches([[short_plan(pad_batch(host, capacities, 4, PlanLayout("any")))] for host in batch])
        for batch in hosts
    )


def poisoned(batch: Batch, dataset: int) -> Batch:
    """The batch with a colour that is not finite."""
    features = batch.features.copy()
    features[dataset, 0, 0, 0] = np.inf
    return replace(batch, features=features)


@cache
def compiled(several: bool) -> tuple[TrainState, Any]:
    """State and step of one batch, with averages and a frozen stage; or of two batches."""
    model = short_detector(STEM_ONLY, 2, SPECS_USED)
    mesh = train_mesh(2, jax.devices()[:1])
    optimizer = optax.sgd(0.1)
    graph, state = create_state(model, optimizer, plain_mean(), averaged=not several, accumulating=several)
    frozen: frozenset[str] = frozenset()
    if not several:
        frozen = frozen_paths(state.shared, state.exclusive, ("layer2",))
        optimizer = build_optimizer(OptimConfig(weight_decay=0.1), optax.constant_schedule(1e-2), frozen)
        graph, state = create_state(model, optimizer, plain_mean(), averaged=True)
    train = TrainConfig(max_skipped_steps=MOST_SKIPPED)
    config = joint_config(SPECS_USED, train, accumulate_steps=2 if several else 1, ema_decay=DECAY, clip_norm=1e9)
    step = make_train_step(graph, state, config, optimizer, plain_mean(), mesh, frozen, keep_gradients=True)
    return place_state(state, mesh), step


def taken(several: bool, *which: Batch) -> list[tuple[TrainState, Any]]:
    """States and metrics after each of some batches, from the start, on the host."""
    start, step = compiled(several)
    state, after = jax.tree.map(jnp.array, start), []
    for batch in which:
        state, metrics = step(state, batch)
        after.append(jax.device_get((state, metrics)))
    return after


def differing(a: Any, b: Any) -> list[str]:
    """Names of the arrays that differ in a bit."""
    pairs = zip(flat_names(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [name for name, x, y in pairs if not np.array_equal(x, y)]


def learnt(state: TrainState) -> Any:
    """What skipped steps must not change."""
    return replace(state, step=0, skipped=0, skipped_in_row=0)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_says_where():
    good, _ = batches()
    (before, metrics), (after, bad), (again, _) = taken(False, good, poisoned(good, 1), good)
    assert not metrics.nonfinite.any() and metrics.gradient_norm > 0
    assert differing(learnt(before), learnt(after)) == []
    assert (after.step, after.skipped, after.skipped_in_row) == (2, 1, 1) and bad.gradient_norm == 0
    names = [*tensor_names(before)]
    assert not bad.nonfinite[0].any(), "the other dataset is as it should be"
    told = {name for name, is_bad in zip(names, bad.nonfinite[1], strict=True) if is_bad}
    assert {"loss", "statistics", "backbone.stem.conv.shared"} <= told
    assert not any(name.startswith(FROZEN) for name in told), "what is frozen has no gradient"
    assert (again.step, again.skipped, again.skipped_in_row) == (3, 1, 0)
    assert differing(after.shared, again.shared)
    # As if the skipped step had not been.
    assert differing(learnt(again), learnt(taken(False, good, good)[1][0])) == []


@pytest.mark.slow
def test_after_many_skipped_steps_in_a_row_the_state_stays_for_good():
    good, _ = batches()
    states = [state for state, _ in taken(False, good, poisoned(good, 0), poisoned(good, 0), good, good)]
    assert [int(state.step) for state in states] == [1, 2, 3, 3, 3]
    assert [int(state.skipped_in_row) for state in states] == [0, 1, 2, 2, 2]
    assert differing(learnt(states[0]), learnt(states[-1])) == []


@pytest.mark.slow
def test_frozen_parameters_stay_and_others_move():
    start, _ = compiled(False)
    (after, metrics), *_ = taken(False, batches()[0])
    moved = {*differing(start.shared, after.shared), *differing(start.exclusive, after.exclusive)}
    names = {*flat_names(start.shared), *flat_names(start.exclusive)}
    held = {name for name in names if name.startswith(FROZEN)}
    assert held and not moved & held and {"backbone.stem.conv.shared", "heads.class_kernel"} <= moved
    gradients = dict(zip(flat_names(start.shared), jax.tree.leaves(metrics.gradients[0]), strict=True))
    assert all((gradients[name] == 0).all() for name in held)


@pytest.mark.slow
def test_averages_follow_the_parameters():
    start, _ = compiled(False)
    states = [start, *(state for state, _ in taken(False, *batches()))]
    for part in ("shared", "exclusive", "stats"):
        average = jax.device_get(getattr(states[0].averages, part))
        for updates, state in enumerate(states[1:], 1):
            decay = min(DECAY, (1 + updates) / (10 + updates))
            average = jax.tree.map(lambda a, new, d=decay: d * a + (1 - d) * new, average, getattr(state, part))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            average,
            getattr(states[-1].averages, part),
        )
    assert differing(states[-1].averages.shared, states[-1].shared)


@pytest.mark.slow
def test_a_step_of_two_batches_takes_the_mean_of_their_gradients():
    first, second = batches()
    # Two datasets, of which the second takes part in the first batch only.
    without = replace(second, present=np.array([[True], [False]]))
    (between, _), (after, metrics) = taken(True, first, without)
    start, _ = compiled(True)
    assert differing(start.shared, between.shared) == [] and differing(start.exclusive, between.exclusive) == []
    assert (between.step, after.step) == (0, 1)
    assert not any(leaf.any() for leaf in jax.tree.leaves(after.accumulated))

    own = [taken(True, batch, batch)[1][1].gradients for batch in (first, replace(second, present=without.present))]
    # Shared: the mean over datasets of each one's mean over its batches. A batch twice has the batch's own gradient,
    # and that of the second batch is halved by the dataset that is absent there.
    only = taken(True, *(replace(first, present=np.array([[False], [True]])),) * 2)[1][1].gradients
    names = flat_names(start.shared)
    leaves = [jax.tree.leaves(tree) for tree in (metrics.gradients[0], own[0][0], own[1][0], only[0])]
    for name, both, a, b, second_alone in zip(names, *leaves, strict=True):
        a_first = 2 * a - second_alone  # of the first dataset in the first batch
        expected = ((a_first + b) / 2 + second_alone) / 2
        np.testing.assert_allclose(both, expected, rtol=0, atol=2e-5 * np.abs(expected).max(initial=1e-6), err_msg=name)
    exclusive = [jax.tree.leaves(tree) for tree in (metrics.gradients[1], own[0][1], own[1][1])]
    for both, a, b in zip(*exclusive, strict=True):
        scale = 2e-5 * max(np.abs(a).max(initial=0), 1e-6)
        np.testing.assert_allclose(both[0], (a[0] + b[0]) / 2, rtol=0, atol=scale)
        np.testing.assert_allclose(both[1], a[1], rtol=0, atol=scale)


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_left_out_of_its_step():
    first, second = batches()
    _, (after, metrics) = taken(True, first, poisoned(second, 0))
    _, (twice, _) = taken(True, first, first)
    assert metrics.nonfinite[0].any() and after.skipped == 0
    close = zip(jax.tree.leaves(after.shared), jax.tree.leaves(twice.shared), strict=True)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in close)
    _, (skipped, metrics) = taken(True, poisoned(first, 0), poisoned(second, 1))
    assert (skipped.step, skipped.skipped) == (1, 1) and metrics.gradient_norm == 0
    assert differing(compiled(True)[0].shared, skipped.shared) == []
