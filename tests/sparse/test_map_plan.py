from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from tests.sparse.transcription import random_sites


def unet(voxels):
    coarse = sparse.downsample(voxels, 2)
    down = sparse.strided_neighbors(voxels, coarse, 2)
    return {
        "fine": sparse.submanifold_neighbors(voxels),
        "down": down,
        "coarse": sparse.submanifold_neighbors(coarse),
        "up": sparse.inverse_neighbors(down),
    }


class Level(NamedTuple):
    sites: Any
    maps: Any


@dataclass(frozen=True)
class Net:
    levels: Any
    name: str
    pool: Any = None


def test_a_level_is_a_distinct_set():
    voxels = random_sites()
    coarse = sparse.downsample(voxels, 2)
    assert sparse.level_sizes(unet(voxels)) == (len(voxels), len(coarse))
    assert sparse.level_sizes(unet(voxels)["up"]) == (len(coarse), len(voxels))
    assert sparse.level_sizes([coarse, {"a": (voxels, coarse)}]) == (len(coarse), len(voxels))
    equal_but_another = sparse.downsample(voxels, 2)
    assert sparse.level_sizes((coarse, equal_but_another)) == (len(coarse), len(coarse))
    assert sparse.level_sizes({"nothing": None}) == ()


def test_every_table_becomes_the_map_of_its_padded_sites():
    tables = unet(random_sites())
    plan = sparse.pad_tables(tables, (200, 130), layout="tiles", channels=16)
    assert list(plan) == list(tables)
    fine, coarse = plan["fine"].inputs, plan["coarse"].inputs
    assert (fine.capacity, coarse.capacity) == (200, 130)
    sides = {"fine": (fine, fine), "down": (fine, coarse), "coarse": (coarse, coarse), "up": (coarse, fine)}
    for name, (inputs, outputs) in sides.items():
        assert plan[name].inputs is inputs and plan[name].outputs is outputs
        tile_size = plan[name].tiles.in_rows.shape[1]
        expected = sparse.pad_map(tables[name], inputs, outputs, tile_size=tile_size)
        assert jax.tree.structure(plan[name]) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, plan[name], expected)


def test_any_structure_stays_itself():
    voxels = random_sites()
    coarse = sparse.downsample(voxels, 2)
    levels = [Level(voxels, (sparse.submanifold_neighbors(voxels),)), Level(coarse, [])]
    net = Net(levels, "small", {"pool": sparse.pool_neighbors(voxels, coarse, 2), "factor": 2})
    assert sparse.level_sizes(net) == (len(voxels), len(coarse))
    plan = sparse.pad_tables(net, [128, 128], layout="neighbors")
    assert isinstance(plan, Net) and plan.name == "small" and plan.pool["factor"] == 2
    assert isinstance(plan.levels, list) and isinstance(plan.levels[0], Level) and plan.levels[1].maps == []
    assert isinstance(plan.levels[0].maps, tuple) and plan.levels[0].maps[0].tiles is None
    assert plan.pool["pool"].inputs is plan.levels[0].sites and plan.pool["pool"].outputs is plan.levels[1].sites


def test_lists_of_the_maps_are_chosen_by_the_layout():
    tables = {**unet(random_sites()), "lookup": sparse.submanifold_neighbors(random_sites(), 1)}
    plan = sparse.pad_tables(tables, (128, 128, 128), layout="tiles")
    assert [plan[name].tiles is None for name in plan] == [False, False, False, False, True]
    own = sparse.pad_tables(tables, (128, 128, 128), layout=lambda t, i, o: sparse.pad_map(t, i, o, tile_size=7))
    assert {kmap.tiles.in_rows.shape[1] for kmap in own.values()} == {7}
    with pytest.raises(ValueError, match="neither 'tiles' nor"):
        sparse.pad_tables(tables, (128, 128, 128), layout="rows")


def test_batches_of_one_bucket_are_one_program():
    batches = [unet(random_sites(seed=seed, counts=(30 + 10 * seed, 0, 20))) for seed in range(4)]
    sizes = [sparse.level_sizes(tables) for tables in batches]
    ladder = sparse.BucketLadder.measured(sizes)
    traces = []

    @jax.jit
    def network(x, kernels, plan):
        traces.append(None)
        x = sparse.convolve(x, kernels[:, :8], plan["down"])
        x = sparse.convolve(x, kernels, plan["coarse"])
        return sparse.convolve(sparse.convolve(x, kernels[:, :8], plan["up"]), kernels, plan["fine"])

    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 27, 3, 3)), jnp.float32)
    for tables, size in zip(batches, sizes, strict=True):
        capacities = ladder.fit(size)
        assert capacities == (128, 128)
        x = jnp.asarray(
            sparse.pad_rows(np.random.default_rng(1).normal(size=(size[0], 3)).astype(np.float32), capacities[0])
        )
        out = network(x, kernels, sparse.pad_tables(tables, capacities))
        exact = network.__wrapped__(x[: size[0]], kernels, sparse.pad_tables(tables, size, layout="neighbors"))
        np.testing.assert_allclose(out[: size[0]], exact, atol=1e-3)
        assert not out[size[0] :].any()
    assert len(traces) == 1 + len(batches)


def test_sizes_that_do_not_fit_raise():
    tables = {"net": unet(random_sites())}
    fine, coarse = sparse.level_sizes(tables)
    with pytest.raises(InputError, match=r"level 1 \(stride 2, first met at \['net'\]\['down'\].outputs\) has"):
        sparse.pad_tables(tables, (fine, coarse - 1))
    with pytest.raises(InputError, match=r"level 0 .* take a larger bucket"):
        sparse.pad_tables(tables, (fine - 1, coarse))
    with pytest.raises(InputError, match="2 levels, given are 3 capacities"):
        sparse.pad_tables(tables, (fine, coarse, 64))
