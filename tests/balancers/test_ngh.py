"""Gradient harmonisation against an independent transcription, at its limits, and on several devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from h2a2_jax.balancers.ngh import (
    clip_by_global_norm_sharded,
    mean_over_datasets,
    norm_gradient_harmonization,
    plain_mean,
)

ALL3 = jnp.ones(3, bool)


def with_norms(norms, size=4, seed=0):
    """Gradients [K, size] of random direction whose norms are those given."""
    directions = np.random.default_rng(seed).normal(size=(len(norms), size))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return (directions * np.array(norms)[:, None]).astype(np.float32)


def random_grads(seed=0, scales=(0.02, 1.0, 7.0)):
    """Three datasets' gradients of a small tree, at different scales."""
    generator = np.random.default_rng(seed)
    scale = np.array(scales, np.float32)

    def leaf(*shape):
        return jnp.asarray(generator.normal(size=(3, *shape)).astype(np.float32) * scale.reshape(3, *[1] * len(shape)))

    return {"layer": {"kernel": leaf(3, 4, 5), "bias": leaf(5)}, "gain": leaf()}


def harmonized_by_hand(grads, present, threshold=0.8, cap=100.0):
    """The method for one tensor [K, ...], in float64 and with loops. Returns gradients, Psi, norms, factors."""
    grads = np.asarray(grads, np.float64)
    norms = [np.sqrt((g**2).sum()) for g in grads]
    active = [k for k in range(len(grads)) if present[k] and norms[k] >= 1e-12]
    factors = np.ones(len(grads))
    psi = 1.0
    if len(active) >= 2:
        terms = [2 * norms[i] * norms[j] / (norms[i] ** 2 + norms[j] ** 2) for i in active for j in active if i != j]
        psi = sum(terms) / len(terms)
        if psi < threshold:
            mean = sum(norms[k] for k in active) / len(active)
            for k in active:
                factors[k] = min(mean / norms[k], cap)
    out = np.stack([g * f if p else np.zeros_like(g) for g, f, p in zip(grads, factors, present, strict=True)])
    return out, psi, np.where(present, norms, 0), factors


@cache
def jitted(num_datasets, **options):
    balancer = norm_gradient_harmonization(num_datasets, **options)
    return balancer.init, jax.jit(balancer.update)


def harmonize(grads, present, **options):
    """One step on all datasets. Returns updates and state."""
    init, update = jitted(len(present), **options)
    return update(grads, init(jax.tree.map(lambda leaf: leaf[0], grads)), present=jnp.asarray(present))


@pytest.mark.parametrize("present", [(True, True, True), (True, False, True), (False, True, True)])
def test_equals_a_transcription_per_tensor(present):
    grads = random_grads()
    updates, state = harmonize(grads, present)
    for path in (("layer", "kernel"), ("layer", "bias"), ("gain",)):
        leaf, update, psi, norms, scales = (
            np.asarray(pick(path, tree)) for tree in (grads, updates, state.psi, state.norms, state.scales)
        )
        expected, expected_psi, expected_norms, expected_scales = harmonized_by_hand(leaf, present)
        assert expected_psi < 0.8
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(psi, expected_psi, rtol=1e-6)
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-6)
        np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)


def pick(path, tree):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("scales", [(0.02, 1.0, 7.0), (0.9, 1.0, 1.1)])
def test_equals_a_transcription_over_the_whole_tree(scales):
    grads = random_grads(scales=scales)
    leaves = jax.tree.leaves(grads)
    flat = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in leaves], axis=1)
    expected, psi, norms, factors = harmonized_by_hand(flat, (True, True, True))
    updates, state = harmonize(grads, (True, True, True), scope="global")
    got = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(updates)], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(state.psi, psi, rtol=1e-6)
    np.testing.assert_allclose(state.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(state.scales, factors, rtol=1e-6)


def test_norms_at_ratio_two_agree_just_enough():
    grads = np.array([[3, 4, 0, 12], [0, 24, 6, 8]], np.float32)
    updates, state = harmonize(jnp.asarray(grads), (True, True))
    assert state.psi == np.float32(0.8)
    np.testing.assert_array_equal(updates, grads)


def test_the_threshold_lies_between_ratios_below_and_above_two():
    close = with_norms([1.0, 1.9])
    updates, state = harmonize(jnp.asarray(close), (True, True))
    assert 0.8 < state.psi < 0.83
    np.testing.assert_array_equal(updates, close)

    far = with_norms([1.0, 2.1])
    updates, state = harmonize(jnp.asarray(far), (True, True))
    assert 0.77 < state.psi < 0.8
    np.testing.assert_allclose(np.linalg.norm(updates, axis=1), [1.55, 1.55], rtol=1e-6)


@pytest.mark.parametrize("norm", [1e-11, 1e-7, 1.0, 1e19, 1e30])
def test_agreement_does_not_depend_on_the_unit_of_the_gradients(norm):
    grads = with_norms([norm] * 3, size=300)
    _, state = harmonize(jnp.asarray(grads), (True, True, True))
    np.testing.assert_allclose(state.psi, 1, rtol=1e-6)
    np.testing.assert_allclose(state.norms, [norm] * 3, rtol=1e-5)
    updates, state = harmonize(jnp.asarray(grads * np.float32([[1], [1], [30]])), (True, True, True))
    np.testing.assert_allclose(state.scales, [32 / 3, 32 / 3, 32 / 90], rtol=1e-5)
    assert np.isfinite(updates).all()


def test_directions_are_kept():
    grads = with_norms([0.1, 1.0, 5.0])
    updates, _ = harmonize(jnp.asarray(grads), (True, True, True))
    cosines = (grads * updates).sum(1) / np.linalg.norm(grads, axis=1) / np.linalg.norm(updates, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)
    assert not np.allclose(updates, grads, rtol=0.5)


def test_an_absent_dataset_has_no_part_even_if_its_gradient_is_not_a_number():
    grads = with_norms([1.0, 4.0, 4.0])
    grads[1] = np.nan
    updates, state = harmonize(jnp.asarray(grads), (True, False, True))
    np.testing.assert_array_equal(updates[1], 0)
    np.testing.assert_allclose(state.norms, [1, 0, 4], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(updates, axis=1), [2.5, 0, 2.5], rtol=1e-6)
    mean = mean_over_datasets(updates, jnp.array([True, False, True]))
    np.testing.assert_allclose(mean, (updates[0] + updates[2]) / 2, rtol=1e-6)


@pytest.mark.parametrize("norms", [(0.0, 0.0, 5.0), (0.0, 1e-13, 5.0), (0.0, 0.0, 0.0)])
def test_fewer_than_two_active_datasets_change_nothing(norms):
    grads = with_norms(norms)
    updates, state = harmonize(jnp.asarray(grads), (True, True, True))
    np.testing.assert_array_equal(updates, grads)
    assert state.psi == 1
    np.testing.assert_array_equal(state.scales, 1)


def test_a_single_dataset_changes_nothing():
    grads = with_norms([5.0])
    updates, state = harmonize(jnp.asarray(grads), (True,))
    np.testing.assert_array_equal(updates, grads)
    assert state.psi == 1


def test_a_zero_gradient_is_not_active_but_counts_in_the_mean():
    grads = with_norms([0.0, 1.0, 9.0])
    updates, state = harmonize(jnp.asarray(grads), (True, True, True))
    np.testing.assert_allclose(np.linalg.norm(updates, axis=1), [0, 5, 5], rtol=1e-6)
    np.testing.assert_allclose(state.psi, 2 * 9 / 82, rtol=1e-6)
    np.testing.assert_allclose(mean_over_datasets(updates, ALL3), updates.sum(0) / 3, rtol=1e-6)


def test_no_dataset_present_gives_zero():
    grads = jnp.asarray(with_norms([1.0, 2.0, 9.0]))
    updates, _ = harmonize(grads, (False, False, False))
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(mean_over_datasets(grads, jnp.zeros(3, bool)), 0)


def test_a_gradient_that_is_not_finite_goes_through_alone():
    grads = with_norms([1.0, 9.0, 1.0])
    grads[2, 0] = np.inf
    updates, state = harmonize(jnp.asarray(grads), (True, True, True))
    np.testing.assert_allclose(np.linalg.norm(updates[:2], axis=1), [5, 5], rtol=1e-6)
    np.testing.assert_array_equal(updates[2], grads[2])
    assert np.isfinite(state.psi)


def test_factors_stop_at_the_cap_and_are_counted():
    grads = {"a": jnp.asarray(with_norms([1e-6, 1.0, 1.0])), "b": jnp.asarray(with_norms([0.01, 0.01, 1.0]))}
    _, state = harmonize(grads, (True, True, True))
    np.testing.assert_allclose(state.scales["a"][0], 100, rtol=1e-6)
    assert state.cap_hits == 1
    _, state = harmonize(grads, (True, True, True), cap=20.0)
    np.testing.assert_allclose(state.scales["b"], [20, 20, 0.34], rtol=1e-5)
    assert state.cap_hits == 3


def test_a_threshold_of_zero_only_records():
    grads = random_grads()
    updates, state = harmonize(grads, (True, True, True), threshold=0.0)
    expected, _ = plain_mean().update(grads, optax.EmptyState(), present=ALL3)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert max(jax.tree.leaves(state.psi)) < 0.8


def test_the_state_keeps_its_structure_and_types():
    params = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    for scope in ("tensor", "global"):
        balancer = norm_gradient_harmonization(3, scope=scope)
        before = balancer.init(params)
        grads = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 9 * leaf]), params)
        step = jax.jit(balancer.update)
        updates, state = step(grads, before, present=ALL3)
        _, state = step(grads, state, present=ALL3)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(state) == jax.tree.structure(before)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, before)
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, before)
        assert step._cache_size() == 1


def test_half_precision_gradients_keep_their_type():
    grads = jnp.asarray(with_norms([1.0, 1.0, 256.0]), jnp.bfloat16)
    updates, state = harmonize(grads, (True, True, True))
    assert updates.dtype == jnp.bfloat16 and state.norms.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(updates.astype(np.float32), axis=1), [86, 86, 86], rtol=0.02)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="scope is 'layer'"):
        norm_gradient_harmonization(3, scope="layer")
    balancer = norm_gradient_harmonization(3)
    with pytest.raises(ValueError, match="expected 3 datasets in all"):
        balancer.update(jnp.ones((2, 4)), balancer.init(jnp.ones(4)), present=jnp.ones(2, bool))


def test_clipping_takes_one_norm_over_shared_and_exclusive():
    shared, exclusive = {"w": jnp.full((2, 2), 3.0)}, {"e": jnp.full((4, 2), 4.0)}
    norm = np.sqrt(4 * 9 + 8 * 16)
    clip = jax.jit(clip_by_global_norm_sharded)
    for max_norm, scale in ((10.0, 10 / norm), (1.0, 1 / norm), (13.0, 1.0)):
        clipped, clipped_exclusive, got = clip(shared, exclusive, max_norm)
        np.testing.assert_allclose(got, norm, rtol=1e-6)
        np.testing.assert_allclose(clipped["w"], 3 * scale, rtol=1e-6)
        np.testing.assert_allclose(clipped_exclusive["e"], 4 * scale, rtol=1e-6)
    reference, _ = optax.clip_by_global_norm(10.0).update((shared, exclusive), optax.EmptyState())
    clipped, clipped_exclusive, _ = clip(shared, exclusive, 10.0)
    np.testing.assert_allclose(clipped["w"], reference[0]["w"], rtol=1e-6)
    np.testing.assert_allclose(clipped_exclusive["e"], reference[1]["e"], rtol=1e-6)


def test_clipping_holds_for_zeros_huge_gradients_and_no_exclusive_ones():
    zeros, _, norm = clip_by_global_norm_sharded(jnp.zeros(3), {}, 10.0)
    assert norm == 0 and not zeros.any()
    clipped, _, norm = clip_by_global_norm_sharded(jnp.full(4, 1e30), {}, 10.0)
    np.testing.assert_allclose(norm, 2e30, rtol=1e-6)
    np.testing.assert_allclose(clipped, 5, rtol=1e-6)


def mesh_of(**axes):
    sizes = tuple(axes.values())
    devices = jax.devices()[: np.prod(sizes)]
    return jax.make_mesh(sizes, tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def balancer_of(scope, axis_name):
    return norm_gradient_harmonization(3, scope=scope, axis_name=axis_name) if scope else plain_mean()


@cache
def step_on_one_device(scope):
    return jax.jit(partial(one_step, balancer_of(scope, None), 1.0, None))


def one_step(balancer, max_norm, axis_name, grads, exclusive, present, state):
    updates, state = balancer.update(grads, state, present=present)
    mean = mean_over_datasets(updates, present, axis_name)
    return *clip_by_global_norm_sharded(mean, exclusive, max_norm, axis_name), updates, state


@pytest.mark.parametrize("scope", ["tensor", "global", None])
@pytest.mark.parametrize(("devices", "replicas"), [(3, 2), (1, 1)])
def test_devices_do_not_change_the_result(devices, replicas, scope):
    each, same = PartitionSpec("dataset"), PartitionSpec()
    sharded = jax.shard_map(
        partial(one_step, balancer_of(scope, "dataset"), 1.0, "dataset"),
        mesh=mesh_of(dataset=devices, replica=replicas),
        in_specs=(each, each, each, same),
        out_specs=(same, each, same, each, same),
        check_vma=True,
    )
    sharded, local = jax.jit(sharded), step_on_one_device(scope)

    exclusive = {"e": jnp.asarray(with_norms([1.0, 2.0, 3.0]))}
    for scales in ((0.02, 1.0, 7.0), (0.9, 1.0, 1.1)):
        grads = random_grads(scales=scales)
        state = balancer_of(scope, None).init(jax.tree.map(lambda leaf: leaf[0], grads))
        for present in (ALL3, jnp.array([True, False, True])):
            arguments = grads, exclusive, present, state
            close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
            jax.tree.map(close, sharded(*arguments), local(*arguments))


def test_several_datasets_on_each_of_several_devices():
    grads = jnp.asarray(with_norms([0.1, 1.0, 2.0, 3.0, 5.0, 8.0]))
    present = jnp.array([True, True, False, True, True, True])
    expected, expected_state = harmonize(grads, present)
    balancer = norm_gradient_harmonization(6, axis_name="dataset")
    each, same = PartitionSpec("dataset"), PartitionSpec()
    mesh = mesh_of(dataset=3)
    step = jax.shard_map(
        lambda grads, state, present: balancer.update(grads, state, present=present),
        mesh=mesh,
        in_specs=(each, same, each),
        out_specs=(each, same),
    )
    updates, state = jax.jit(step)(grads, balancer.init(grads[0]), present)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state, expected_state)


@cache
def jitted_float64(num_datasets, threshold):
    balancer = norm_gradient_harmonization(num_datasets, threshold)
    return jax.jit(lambda grads, present: balancer.update(grads, balancer.init(grads[0]), present=present))


@pytest.mark.parametrize("num_datasets", [1, 2, 3, 7])
def test_equals_the_formula_in_float64_over_twelve_orders_of_magnitude(num_datasets):
    """Random gradients, some zero, some absent: always finite, direction kept, identity where norms agree."""
    generator = np.random.default_rng(num_datasets)
    seen = set()
    for turn in range(100):
        size = int(generator.choice([1, 5, 64]))
        span = generator.choice([0.2, 1.0, 12.0])
        threshold = float(generator.choice([0.3, 0.8]))
        norms = 10.0 ** (generator.uniform(-6, 6) if span < 12 else 0) * 10.0 ** generator.uniform(
            -span / 2, span / 2, num_datasets
        )
        norms[generator.random(num_datasets) < 0.15] = 0
        present = generator.random(num_datasets) > 0.15
        directions = generator.normal(size=(num_datasets, size))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        grads = directions * norms[:, None]
        expected, psi, expected_norms, factors = harmonized_by_hand(grads, present, threshold)
        with jax.enable_x64(True):
            updates, state = jitted_float64(num_datasets, threshold)(jnp.asarray(grads), jnp.asarray(present))
        updates = np.asarray(updates)
        assert updates.dtype == np.float64 and np.isfinite(updates).all()
        if abs(psi - threshold) < 1e-9:
            continue
        np.testing.assert_allclose(updates, expected, rtol=1e-11, err_msg=f"turn {turn}")
        np.testing.assert_allclose(state.psi, psi, rtol=1e-6)
        np.testing.assert_allclose(state.norms, expected_norms, rtol=1e-6)
        np.testing.assert_allclose(state.scales, factors, rtol=1e-6)
        lengths = np.linalg.norm(updates, axis=1)
        kept = present & (norms > 0)
        np.testing.assert_allclose(updates[kept] / lengths[kept, None], directions[kept], rtol=1e-9, atol=1e-15)
        if psi >= threshold:
            np.testing.assert_array_equal(updates, np.where(present[:, None], grads, 0))
        seen |= {"harmonized" if psi < threshold else "unchanged", "capped" if (factors == 100).any() else "free"}
        # In float32, whatever the norms, finite too.
        small, _ = harmonize(jnp.asarray(grads, jnp.float32), tuple(map(bool, present)), threshold=threshold)
        assert np.isfinite(small).all()
        np.testing.assert_allclose(small, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    if num_datasets == 1:
        assert seen == {"unchanged", "free"}
    else:
        assert seen == {"harmonized", "unchanged", "capped", "free"}
