"""The same six scans on 1, 3 and 6 devices: gradients, statistics and the next state are the same.

In float64, so that a wrong sum shows and rounding does not: layouts differ by some 1e-13 in exclusive gradients, and by
3e-7 in shared ones, whose factors of harmonisation are float32. In float32 the same network's layouts differ by 1e-5 to
4e-5 of each tensor's largest gradient, for each is a program of its own and adds in another order.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from h2a2_jax.balancers.ngh import norm_gradient_harmonization
from h2a2_jax.balancers.packing import unpack
from h2a2_jax.checkpoint.train_state import create_state, merge_model, place_state, split_model
from h2a2_jax.distributed import stack_batches, train_mesh
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import BucketLadder, collate, no_scan, pad_batch
from h2a2_jax.models import PlanLayout
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.training.step import make_train_step
from tests.models.scenes import MODEL, SELECTION, room, tiny_detector
from tests.training.configs import joint_config

DEVICES = (1, 3, 6)
THRESHOLD = 0.8
TOLERANCE = 1e-5
"""Of each tensor's largest gradient."""
FLOOR = 1e-9
"""Of the largest gradient of the group, shared or exclusive: a tensor below counts as this large."""
NEAR_TIE = 1e-5
SEED = 2
"""One for which no score comes near a tie."""

# Large rooms: few sites at the coarsest level would make batch norm magnify rounding.
SCANS = [[room(10 * d + i, points=2500, boxes=8 - 2 * i, classes=5, size=10.0 + d) for i in range(2)] for d in range(3)]
UNEQUAL = [[SCANS[0][0], no_scan()], [no_scan(), SCANS[1][1]], SCANS[2]]
"""One scan of two datasets: on six devices two replicas have none."""
OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-4)


# Replicas hold unequal numbers of boxes, so that means of replicas' losses would show.
assert all(len({len(scan.boxes) for scan in row}) == 2 for row in SCANS)


def batch_for(mesh, scans=None, present=(True, True, True), model=MODEL):
    """Scans [dataset][scan] spread over the mesh."""
    layout = PlanLayout("any", model)  # compiles in less time than that for CPUs, and on all devices alike
    scans, replicas = scans or SCANS, mesh.shape["replica"]
    per = 2 // replicas
    grid = [[collate(row[r * per : (r + 1) * per], model) for r in range(replicas)] for row in scans]
    # One bucket for all layouts, so that only the mesh differs.
    both = [collate(row, model).tables.sizes for row in SCANS]
    capacities = BucketLadder(type(both[0])(*(max(s) for s in zip(*both, strict=True)))).capacities(0)
    batches = [
        [replace(pad_batch(b, capacities, 8, layout), present=np.asarray(here)) for b in row]
        for row, here in zip(grid, present, strict=True)
    ]
    batch = stack_batches(batches)
    return replace(batch, features=batch.features.astype(float), boxes=batch.boxes.astype(float))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def double_detector(**options):
    """A tiny detector, every parameter in float64."""
    model = tiny_detector(seed=SEED, **options)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(model)))
    return model


@cache
def compiled(devices):
    mesh = train_mesh(3, jax.devices()[:devices])
    balancer = norm_gradient_harmonization(3, THRESHOLD, axis_name="dataset")
    graph, state = create_state(double_detector(), OPTIMIZER, balancer, kind=lambda _: "any")
    step = make_train_step(graph, state, joint_config(SPECS), OPTIMIZER, balancer, mesh, keep_gradients=True)
    return mesh, state, step


@cache
def after_a_step(devices, present=(True, True, True), unequal=False):
    mesh, state, step = compiled(devices)
    batch = batch_for(mesh, UNEQUAL if unequal else SCANS, present)
    after = unpack(jax.device_get(step(place_state(state, mesh), batch)))
    assert all(leaf.dtype == float for leaf in jax.tree.leaves(after[1].gradients))
    return after


def exclusive_share(seen):
    """Share of (scan, offset) pairs that took the exclusive kernel, by dataset."""
    return 1 - seen.gamma.mean(-1)


def named(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_close(ours, theirs, tolerance=TOLERANCE):
    ours, theirs = named(ours), named(theirs)
    assert ours.keys() == theirs.keys() and ours
    top = max(np.abs(value).max(initial=0) for value in theirs.values())
    errors = {
        name: np.abs(ours[name] - value).max(initial=0) / max(np.abs(value).max(initial=0), FLOOR * top)
        for name, value in theirs.items()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, (worst, errors[worst])


def test_meshes():
    shapes = [tuple(train_mesh(3, jax.devices()[:n]).shape.values()) for n in (1, 2, 3, 4, 6)]
    assert shapes == [(1, 1), (1, 2), (3, 1), (1, 4), (3, 2)]


def test_no_kernel_is_chosen_by_rounding():
    graph, exclusive, shared, stats = split_model(double_detector())

    @jax.jit
    def scores(features, plan, dataset):
        seen = {}
        context = ForwardContext(DatasetContext(dataset), training=True, tap=seen.__setitem__)
        merge_model(graph, exclusive, shared, stats)(features, plan, context)
        return [seen[n.replace("beta", "alpha")] * seen[n] for n in seen if n.endswith(".beta")]

    for scans in (SCANS, UNEQUAL):
        batch = batch_for(train_mesh(3, jax.devices()[:1]), scans)
        for d in range(3):
            own = jax.tree.map(lambda leaf, d=d, batch=batch: leaf[d, 0], batch)
            real = np.array([len(scan.points) > 0 for scan in scans[d]])
            margins = [abs(s[real] - SELECTION.tau).min() for s in scores(own.features, own.plan, jnp.eye(3)[d])]
            assert len(margins) == 8 and min(margins) > NEAR_TIE


@pytest.mark.slow
@pytest.mark.parametrize("devices", DEVICES[1:])
def test_gradients_after_one_step(devices):
    (state, metrics), (one_state, one) = after_a_step(devices), after_a_step(1)
    psi = np.array([float(v) for v in jax.tree.leaves(one_state.balancer.psi)])
    assert (psi < THRESHOLD).any() and (psi >= THRESHOLD).any(), "Psi is to be on both sides of the threshold"
    assert np.abs(psi - THRESHOLD).min() > 1e-5
    assert (metrics.num_positives == one.num_positives).all() and (one.num_positives > 0).all()
    for ours, theirs in zip(metrics.gradients, one.gradients, strict=True):
        assert_close(ours, theirs)
    np.testing.assert_allclose(metrics.box_loss, one.box_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.class_loss, one.class_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, one.gradient_norm, rtol=1e-5)
    assert_close(state.stats, one_state.stats)
    assert_close(state.balancer.psi, one_state.balancer.psi)
    for layer, seen in one.selection.items():
        np.testing.assert_allclose(exclusive_share(metrics.selection[layer]), exclusive_share(seen), rtol=1e-6)
    shares = [exclusive_share(seen) for seen in one.selection.values()]
    assert len(shares) == 8 and 0.05 < np.mean(shares) < 0.95
    assert state.step == one_state.step == 1


@pytest.mark.parametrize("devices", DEVICES)
def test_an_absent_dataset_has_no_part(devices):
    present = (True, False, True)
    state, metrics = after_a_step(devices, present=present)
    one_state, one = after_a_step(1, present=present)
    before = unpack(jax.device_get(compiled(devices)[1]))
    for ours, theirs in zip(metrics.gradients, one.gradients, strict=True):
        assert_close(ours, theirs)
    for name, value in named(metrics.gradients[1]).items():
        assert (value[1] == 0).all(), name
    for name, value in named(state.stats).items():
        np.testing.assert_array_equal(value[1], named(before.stats)[name][1])
        assert (value[0] != named(before.stats)[name][0]).any()
    full = named(after_a_step(1)[1].gradients[1])
    for name, value in named(one.gradients[1]).items():
        np.testing.assert_allclose(value[[0, 2]], full[name][[0, 2]], rtol=1e-6, atol=1e-9)
    assert all((norms[1] == 0).all() for norms in jax.tree.leaves(one_state.balancer.norms))


@pytest.mark.parametrize("devices", DEVICES)
def test_scans_that_fill_a_batch_change_nothing(devices):
    state, metrics = after_a_step(devices, unequal=True)
    one_state, one = after_a_step(1, unequal=True)
    for ours, theirs in zip(metrics.gradients, one.gradients, strict=True):
        assert_close(ours, theirs)
    assert_close(state.stats, one_state.stats)
    assert_close(state.balancer.norms, one_state.balancer.norms)
    full = after_a_step(1)[1]
    assert (metrics.num_positives == one.num_positives).all()
    assert (one.num_positives < full.num_positives).tolist() == [True, True, False]
    np.testing.assert_allclose(one.box_loss[2] + one.class_loss[2], full.box_loss[2] + full.class_loss[2], rtol=1e-9)
    for layer, seen in one.selection.items():
        ours = metrics.selection[layer]
        for part in ("alpha", "beta", "gamma", "lowest_score", "highest_score"):
            np.testing.assert_allclose(getattr(ours, part), getattr(seen, part), rtol=1e-6)
        # One scan: a mean with the other, which has no sites, would halve what it selects.
        assert set(np.unique(np.asarray(seen.gamma)[:2].round(9))) <= {0.0, 1.0}


@pytest.mark.parametrize("devices", DEVICES)
def test_one_dataset_alone_is_left_as_it_is(devices):
    state, metrics = after_a_step(devices, present=(False, True, False))
    one_state, one = after_a_step(1, present=(False, True, False))
    for ours, theirs in zip(metrics.gradients, one.gradients, strict=True):
        assert_close(ours, theirs)
    assert all(psi == 1 for psi in jax.tree.leaves((state.balancer.psi, one_state.balancer.psi)))
    norms = named(one_state.balancer.norms)
    for name, gradient in named(one.gradients[0]).items():
        np.testing.assert_allclose(np.linalg.norm(gradient), norms[name][1], rtol=1e-5, err_msg=name)
    assert metrics.present.tolist() == [False, True, False]


def test_shared_gradient_is_the_mean_of_what_harmonisation_leaves():
    """By the formula, from the gradients that the datasets have alone."""
    alone = [named(after_a_step(1, present=tuple(np.arange(3) == d))[1].gradients[0]) for d in range(3)]
    for name, joint in named(after_a_step(1)[1].gradients[0]).items():
        grads = np.stack([own[name] for own in alone])
        norms = np.sqrt((grads**2).reshape(3, -1).sum(1))
        active = np.flatnonzero(norms >= 1e-12)
        n, scale = norms[active], np.ones(3)
        i, j = np.triu_indices(len(n), 1)
        if len(n) > 1 and np.mean(2 * n[i] * n[j] / (n[i] ** 2 + n[j] ** 2)) < THRESHOLD:
            scale[active] = np.minimum(n.mean() / n, 100)
        expected = (grads.T * scale).T.mean(0)
        # Factors are float32.
        np.testing.assert_allclose(joint, expected, rtol=0, atol=1e-6 * np.abs(expected).max(initial=0), err_msg=name)


def test_parameters_are_split_by_what_owns_them():
    _, exclusive, shared, stats = split_model(tiny_detector())
    own = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(exclusive)}
    assert len(own) == 8 + 1 + 4
    assert all(name == "embedding" or name.startswith("heads.") or name.endswith(".exclusive") for name in own)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves((exclusive, stats)))
    assert not any("heads" in str(path) or "exclusive" in str(path) for path, _ in nnx.to_flat_state(shared))


def test_a_second_step_needs_no_second_program():
    mesh, state, step = compiled(1)
    batch = batch_for(mesh)
    state, first = step(place_state(state, mesh), batch)
    programs = step._cache_size()
    losses = [first.box_loss + first.class_loss]
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(metrics.box_loss + metrics.class_loss)
    assert step._cache_size() == programs == 1
    assert state.step == 6 and np.isfinite(losses).all()
    assert losses[-1].sum() < losses[0].sum()
