"""Triton kernels of the algorithm "implicit", beyond what `test_conv` checks in the interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from h2a2_jax import sparse
from h2a2_jax.sparse import conv_implicit
from h2a2_jax.sparse.row_ranges import ranges_of_scans
from tests.sparse.test_conv import check, draw, objective, run, stacked_maps
from tests.sparse.transcription import padded, pairs_of, table_of


def kernels_on_gpus(function, *arguments):
    """Number of Triton kernels of a program that is lowered for NVIDIA GPUs; none is needed for that."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("gpu.triton")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("selection", ["one kernel", "gamma"])
def test_output_and_gradients_are_three_kernels_on_gpus(selection, dtype):
    table = table_of("submanifold 3")
    kmap = padded(table)
    x, kernels, _, gamma = draw(table, selection)
    rows = jnp.zeros((kmap.in_capacity, x.shape[1]), dtype)
    kernels, gamma = (None if a is None else jnp.asarray(a, jnp.float32) for a in (kernels, gamma))

    def loss(x, kernels, gamma, algorithm):
        return sparse.convolve(x, kernels, kmap, gamma=gamma, algorithm=algorithm).astype(jnp.float32).sum()

    slope = jax.grad(loss, argnums=(0, 1) if gamma is None else (0, 1, 2))
    # The output itself is not needed for the gradients of a sum: two kernels, and three with the value.
    assert kernels_on_gpus(partial(slope, algorithm="implicit"), rows, kernels, gamma) == 2
    both = jax.value_and_grad(partial(loss, algorithm="implicit"))
    assert kernels_on_gpus(both, rows, kernels, gamma) == 3
    assert kernels_on_gpus(partial(slope, algorithm="auto"), rows, kernels, gamma) == 0


def test_lowers_under_shard_map():
    kmaps, x, kernels, gamma = stacked_maps()
    slope = jax.value_and_grad(partial(objective, "implicit"), argnums=(1, 2, 3))

    def on_device(kmaps, x, kernels, gamma):
        kmap, x, gamma = jax.tree.map(lambda a: a[0], (kmaps, x, gamma))
        kernels = jax.lax.pcast(kernels, "d", to="varying")
        return jax.tree.map(lambda a: a[None], slope(kmap, x, kernels, gamma))

    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=(P("d"), P("d"), P(), P("d")), out_specs=P("d"))
    assert kernels_on_gpus(sharded, kmaps, x, kernels, gamma) == 3


def test_more_channels_than_a_block_and_rows_than_a_tile(monkeypatch):
    monkeypatch.setattr(conv_implicit, "TILE_CHANNELS", 16)
    monkeypatch.setattr(conv_implicit, "TILE_ROWS", 16)
    table = table_of("strided 3", counts=(40, 0, 55))
    kmap = padded(table)
    x, kernels, weight, gamma = draw(table, "gamma")
    data = np.tile(x, (1, 6)), np.tile(kernels, (1, 1, 6, 5)) / 6, np.tile(weight, (1, 5)), gamma
    assert data[0].shape[1] > 16 and data[2].shape[1] > 16
    with jax.enable_x64(True):
        got = run(kmap, "implicit", *data)
    check(got, table, kmap, *data, pairs_of("strided 3", table), 1e-12)


def test_ranges_cover_every_row_once():
    scan = jnp.repeat(jnp.array([0, 1, 3, 4], jnp.int32), jnp.array([5, 9, 1, 3]))  # scan 2 is empty; padding is scan 4
    ranges = ranges_of_scans(scan, 4, 4)
    covered = [(row, int(b)) for s, e, b in zip(*ranges, strict=True) for row in range(int(s), int(e))]
    assert covered == [(row, int(b)) for row, b in enumerate(scan)]
