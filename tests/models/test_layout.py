"""Layouts of a plan: what its maps carry for which machine, with the same predictions."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.models import DetectorConfig, PlanLayout, detector_tables, fits_layout, pad_plan
from tests.models.scenes import VOXEL, room


@pytest.fixture(scope="module")
def tables():
    return detector_tables(sparse.voxelize([room(0).points, room(1).points], VOXEL).sites)


def maps_of(plan):
    stages = [kmap for stage in plan.stages for kmap in (stage.down, stage.residual)]
    return [plan.stem, *stages, *(kmap for up in plan.ups for kmap in (up.generate, up.lateral))]


def test_cpus_get_tiles_everywhere_and_blocks_in_the_neck(tables):
    plan = pad_plan(tables, tables.sizes, PlanLayout("cpu"))
    assert all(kmap.tiles is not None for kmap in maps_of(plan))
    assert [kmap.blocks is not None for kmap in maps_of(plan)] == [False] * 9 + [False, True] * 2


def test_accelerators_get_tiles_on_sparse_maps(tables):
    capacities = type(tables.sizes)(*(3 * size for size in tables.sizes))
    layout = PlanLayout("accelerator")
    assert fits_layout(tables, capacities, layout)
    plan = pad_plan(tables, capacities, layout)
    sparse_maps = [plan.stem, *(u.generate for u in plan.ups)]
    for kmap in maps_of(plan):
        assert (kmap.tiles is not None) == any(kmap is one for one in sparse_maps)
        assert kmap.blocks is None
    for kmap in sparse_maps:
        assert int(kmap.tiles.count) <= len(kmap.tiles.offset)


def test_accelerators_get_neighbours_in_16_bits(tables):
    plans = [pad_plan(tables, tables.sizes, PlanLayout(machine)) for machine in ("gpu", "any")]
    for packed, plain in zip(*map(maps_of, plans), strict=True):
        assert packed.tiles is None and packed.neighbors.steps.dtype == np.uint16
        np.testing.assert_array_equal(jnp.asarray(packed.neighbors), plain.neighbors)


def test_a_fuller_scan_takes_the_layout_without_places():
    """A map fuller than an accelerator has places for: said beforehand, and refused, never cut."""
    cells = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sites = sparse.site_set(np.c_[np.zeros(len(cells), int), cells].astype(np.int32))
    table, layout = sparse.submanifold_neighbors(sites), PlanLayout("accelerator")
    rows = sparse.pad_sites(sites, len(sites))
    assert not layout.fits(table, "stem", len(sites))
    assert layout.fits(table, "stem", 7 * len(sites)) and layout.fits(table, "lateral", len(sites))
    with pytest.raises(ValueError, match="tiles are in use"):
        layout.pad_map(table, rows, rows, "stem")
    assert replace(layout, machine="any").pad_map(table, rows, rows, "stem").tiles is None


def test_tiles_follow_the_widths(tables):
    narrow, wide = (
        pad_plan(tables, tables.sizes, PlanLayout.of(DetectorConfig(stage_channels=(c,) * 4, neck_channels=c), "cpu"))
        for c in (16, 256)
    )
    sizes = [[kmap.tiles.in_rows.shape[1] for kmap in maps_of(plan)] for plan in (narrow, wide)]
    assert all(a >= b for a, b in zip(*sizes, strict=True))
    assert sparse.choose_tile_size(1e4, 16) == 2048 and sparse.choose_tile_size(1e4, 256) == 512
    assert sparse.choose_tile_size(7e2, 128) == 512 and sparse.choose_tile_size(0.0, 128) == 64
    assert np.all(np.diff([sparse.choose_tile_size(n, 64) for n in (1e1, 1e2, 1e3, 1e4)]) >= 0)
