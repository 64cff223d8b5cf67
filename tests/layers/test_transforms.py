"""Layers under the transformations of Flax, with maps as they come: numpy leaves, no leaves, static fields."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import linen
from h2a2_jax.layers import ForwardContext, ResidualBlock, tabulate
from tests.test_linen import SAME, X

BARE = replace(SAME, tiles=None, blocks=None)
EVALUATE, TRAIN = (ForwardContext(training=t, algorithm="gather") for t in (False, True))  # quick to compile


WAYS = pytest.mark.parametrize(
    ("map_as", "kernel_map"),
    [("argument", SAME), ("argument", BARE), ("closure", SAME)],
    ids=["argument", "argument without lists", "closure"],
)


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def stack_of_blocks(rngs):
    return ResidualBlock(4, 4, rngs=rngs)


def in_turn(blocks, x, kernel_map, context):
    """Output and statistics of the blocks of a stack, one after the other."""
    graph, state = nnx.split(blocks)
    states = []
    for i in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state), copy=True)
        x = block(x, kernel_map, context)
        states.append(nnx.state(block, nnx.BatchStat))
    return x.features, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@pytest.mark.parametrize("context", [EVALUATE, TRAIN], ids=["evaluation", "training"])
@WAYS
def test_scan_over_blocks(map_as, kernel_map, context):
    blocks = stack_of_blocks(nnx.Rngs(0))
    expected, stats = in_turn(blocks, X, kernel_map, context)
    if map_as == "argument":

        @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        def run(block, x, kernel_map):
            return block(x, kernel_map, context)

        y = run(blocks, X, kernel_map)
    else:

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x, kernel_map, context)

        y = run(blocks, X)
    np.testing.assert_allclose(y.features, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), nnx.state(blocks, nnx.BatchStat), stats
    )
    assert (jax.tree.leaves(stats)[0] != 0).any() == (context is TRAIN)


def test_remat_of_a_scan_keeps_the_gradient():
    blocks = stack_of_blocks(nnx.Rngs(0))

    def gradient(wrap):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @wrap
        def run(block, x):
            return block(x, SAME, EVALUATE)

        return nnx.jit(nnx.grad(lambda blocks: (run(blocks, X).features ** 2).sum()))(blocks)

    ours, plain = gradient(nnx.remat), gradient(lambda f: f)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, plain)


class Stack(nn.Module):
    block: type[nn.Module]
    map_as: str

    @nn.compact
    def __call__(self, x, kernel_map, context=None):
        def body(block, x, given):
            return block(x, kernel_map if self.map_as == "closure" else given, context), None

        run = nn.scan(
            body, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3,
            in_axes=nn.broadcast,
        )  # fmt: skip
        return run(self.block(4, 4, name="blocks"), x, None if self.map_as == "closure" else kernel_map)[0]


@WAYS
def test_linen_scan_and_remat_over_blocks(map_as, kernel_map):
    plain, again = Stack(linen.ResidualBlock, map_as), Stack(nn.remat(linen.ResidualBlock), map_as)
    variables = plain.init(jax.random.key(0), X, kernel_map)
    x = X
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], {c: v["blocks"] for c, v in variables.items()})
        x = linen.ResidualBlock(4, 4).apply(one, x, kernel_map, EVALUATE)
    np.testing.assert_allclose(
        plain.apply(variables, X, kernel_map, EVALUATE).features, x.features, rtol=1e-4, atol=1e-5
    )

    def gradient(model):
        def loss(params):
            y, changed = model.apply({**variables, "params": params}, X, kernel_map, TRAIN, mutable=["batch_stats"])
            return (y.features**2).sum(), changed

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()) + 1e-4),
        gradient(again), gradient(plain),
    )  # fmt: skip


def test_a_table_of_the_layers():
    block = ResidualBlock(4, 6, rngs=nnx.Rngs(0))
    text = tabulate(block, X, SAME, TRAIN, console_kwargs={"width": 200, "force_terminal": False})
    shape = len(X.features)
    for part in ("first/conv", "skip/norm", f"float32[{shape},6] at stride 2", "submanifold, 27 offsets, stride 2 to 2",
                 "kernel: float32[27,4,6]", "ForwardContext", "1,680"):  # fmt: skip
        assert part in text
    assert "normalize" not in text
    assert f"float32[27,{shape}]" not in text
    np.testing.assert_array_equal(block(X, SAME).features, ResidualBlock(4, 6, rngs=nnx.Rngs(0))(X, SAME).features)
    with pytest.raises(ValueError, match="takes 4 channels, given features of 6"):
        tabulate(block, X.with_features(jnp.zeros((shape, 6))), SAME)
    assert block(X, SAME).features.shape == (shape, 6)
    assert "float32[27,4,6]" in linen.ResidualBlock(4, 6).tabulate(
        jax.random.key(0), X, SAME, console_kwargs={"width": 200, "force_terminal": False}
    )
