"""A block that is computed a second time for its backward pass: the same results, and less memory.

The same to the last bit in a program for one device; under shard_map XLA fuses the second computation in another way,
and gradients differ by rounding (measured: 3e-6 of a tensor's largest).
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from h2a2_jax import sparse
from h2a2_jax.layers import DatasetContext, ForwardContext, ResidualBlock
from h2a2_jax.layers.context import call_block
from h2a2_jax.sparse.xla_cpu import recompute
from tests.layers.test_residual import KMAP, SELECTION, features, randomise
from tests.sparse.transcription import random_sites
from tests.xla_flags import EMITTERS_IN_USE

CONTEXT = ForwardContext(DatasetContext.one(1, 2), training=True)


@cache
def block():
    return randomise(ResidualBlock(4, 6, selection=SELECTION, num_datasets=2, name="b", rngs=nnx.Rngs(0)))


def slopes(params, stats, embedding, rows, weight, axis_name=None, **options):
    """Loss, output, statistics and everything recorded, and the gradients of parameters, embedding and features."""
    graph = nnx.graphdef(block())

    def loss(params, embedding, rows):
        own, seen = nnx.merge(graph, params, stats, copy=True), []
        context = replace(
            CONTEXT, embedding=embedding, axis_name=axis_name, tap=lambda *item: seen.append(item), **options
        )
        y = call_block(own, context, sparse.SparseTensor(rows, KMAP.inputs), KMAP)
        names.append([name for name, _ in seen])
        used = (y.features * weight).sum() + (seen[-1][1] ** 2).sum()  # what is recorded may enter a loss
        return used.astype(jnp.float32), (y, nnx.state(own, nnx.BatchStat), [value for _, value in seen])

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, embedding, rows)


names: list[list[str]] = []


def inputs(dtype=jnp.float32):
    _, params, stats = nnx.split(block(), nnx.Param, ...)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(KMAP.out_capacity, 6)), dtype)
    return params, stats, jnp.array([0.3, -1.0, 2.0]), features(KMAP).features.astype(dtype), weight


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def assert_close(ours, theirs, tolerance=1e-5):
    """Up to a part of each array's largest number."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        atol = tolerance * np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_changes(dtype):
    plain, again = (
        jax.jit(lambda *args, r=r: slopes(*args, dtype=dtype, rematerialize=r), compiler_options=EMITTERS_IN_USE)(
            *inputs(dtype)
        )
        for r in (False, True)
    )
    assert_equal(again[0], plain[0])
    # Computed twice the same values go through other programs, whose last bit is the compiler's choice.
    assert_close(again[1], plain[1], 1e-6 if dtype == jnp.float32 else 1e-2)
    assert names[-1] == names[-2]
    assert names[-1][:2] == ["b_downsample", "b.conv1.alpha"] and len(names[-1]) == 7
    (_, (_, stats, _)), (params, *_) = again
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(inputs()[1]), strict=True))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(params["first"]["conv"]["shared"]))


def test_devices_sum_their_statistics_and_stacked_datasets_take_turns():
    """As in a train step: under shard_map, a mapped axis of datasets on each device, batch norm over the replicas."""
    params, stats, embedding, rows, weight = inputs()
    mesh = jax.make_mesh((2,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    stacked = jnp.stack([jnp.stack([rows, 2 * rows]), jnp.stack([rows[::-1], rows * 0])])
    stacked = jnp.where(KMAP.inputs.valid[:, None], stacked, 0)

    def on_device(params, rows, rematerialize):
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "replica", to="varying"), params)

        def one(rows):
            (loss, (y, stats_, seen)), gradients = slopes(
                params, stats, embedding, rows, weight, axis_name="replica", rematerialize=rematerialize
            )
            return loss, y.features, gradients[0], gradients[2], seen, jax.lax.pmean(stats_, "replica")

        out = jax.lax.map(one, rows[0])
        return jax.tree.map(lambda leaf: leaf[None], out)

    both = []
    for rematerialize in (False, True):
        sharded = jax.shard_map(
            lambda p, r, again=rematerialize: on_device(p, r, again),
            mesh=mesh, in_specs=(P(), P("replica")), out_specs=P("replica"), check_vma=True,
        )  # fmt: skip
        both.append(jax.jit(sharded)(params, stacked))
    assert_close(both[1], both[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_keeps_the_inputs_alone(dtype):
    """Of five blocks in a row the memory of a program falls by a third and more, sums and kernels included."""
    sites = sparse.pad_sites(random_sites((3000,), reach=9), 3000)
    kmap = sparse.pad_map(sparse.submanifold_neighbors(random_sites((3000,), reach=9)), sites, sites)
    blocks = nnx.List([ResidualBlock(16, 16, rngs=nnx.Rngs(i)) for i in range(5)])
    graph, params, stats = nnx.split(blocks, nnx.Param, ...)
    context = ForwardContext(training=True, algorithm="gather")
    rows = jnp.zeros((3000, 16), dtype)

    def temporary(rematerialize):
        def loss(params, stats, rows, kmap):
            x = sparse.SparseTensor(rows, sites)
            for own in nnx.merge(graph, params, stats, copy=True):
                x = call_block(own, replace(context, rematerialize=rematerialize), x, kmap)
            return x.features.astype(jnp.float32).sum()

        program = jax.jit(jax.grad(loss)).lower(params, stats, rows, kmap).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.67 * temporary(False)


def test_evaluation_is_not_recomputed():
    own = nnx.merge(*nnx.split(block()))
    context = replace(CONTEXT, training=False, embedding=jnp.ones(3), rematerialize=True)
    x = features(KMAP)
    assert_equal(call_block(own, context, x, KMAP), own(x, KMAP, context))
    assert_equal(nnx.state(own, nnx.BatchStat), nnx.state(block(), nnx.BatchStat))
    assert call_block(ResidualBlock(4, 4, rngs=nnx.Rngs(0)), None, x, KMAP).features.shape == x.features.shape


def test_a_block_that_is_set_to_train_is_recomputed_too():
    own, x = ResidualBlock(4, 4, rngs=nnx.Rngs(0)), features(KMAP)

    def program(train, training):
        def run(rows):
            copy = nnx.merge(*nnx.split(own), copy=True)
            if train:
                copy.train()
            context = ForwardContext(rematerialize=True, algorithm="gather", training=training)
            return call_block(copy, context, x.with_features(rows), KMAP).features

        return str(jax.make_jaxpr(run)(x.features))

    assert program(True, None) == program(False, True) != program(False, None) == program(True, False)


def test_integers_pass_and_have_no_gradient():
    def function(x, index):
        return {"rows": x["a"][index] * x["b"], "index": index + 1}

    x = {"a": jnp.arange(4.0), "b": jnp.float32(3)}
    out = recompute(function, x, np.array([2, 0], np.int32))
    np.testing.assert_array_equal(out["index"], [3, 1])
    slope = jax.grad(lambda x: recompute(function, x, np.array([2, 0], np.int32))["rows"].sum())(x)
    np.testing.assert_array_equal(slope["a"], [3, 0, 3, 0])
    assert slope["b"] == 2
    assert (jax.grad(lambda x: recompute(function, x, np.zeros(0, np.int32))["rows"].sum())(x)["a"] == 0).all()
