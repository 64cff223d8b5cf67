import jax
import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.models import LevelSizes, PlanLayout, detector_tables, pad_plan, pyramid_sizes
from tests.boxes.golden import FIXTURES
from tests.models.scenes import VOXEL, empty_scan, room


def voxels_of(*scans):
    return sparse.voxelize([scan.points for scan in scans], VOXEL).sites


SCANS = {
    "rooms": lambda: voxels_of(room(0), room(1)),
    "with an empty one": lambda: voxels_of(room(0), empty_scan()),
    "nothing": lambda: voxels_of(empty_scan()),
    "a point": lambda: sparse.site_set(np.array([[0, -1, 5, -70]], np.int32)),
}


@pytest.mark.parametrize("scans", SCANS)
def test_sizes_are_those_of_the_tables(scans):
    voxels = SCANS[scans]()
    tables = detector_tables(voxels)
    assert pyramid_sizes(voxels) == tables.sizes
    strides = [tables.stem.outputs.stride, tables.pool.outputs.stride]
    strides += [residual.outputs.stride for *_, residual in tables.stages]
    strides += [up.lateral.outputs.stride for up in tables.ups]
    assert strides == [2, 4, 8, 16, 32, 64, 32, 16]


@pytest.mark.parametrize("scans", SCANS)
def test_union_equals_the_generated_sites(scans):
    """Every site of a stage lies in the voxel of its parent, all of whose children are generated."""
    for up in detector_tables(SCANS[scans]()).ups:
        np.testing.assert_array_equal(up.generate.outputs.keys, up.lateral.outputs.keys)
        assert (up.generate.outputs.lookup(up.stage.coords) >= 0).all()


def test_the_sites_of_a_real_forward_pass():
    with np.load(FIXTURES / "model_batch2_scannet_seed7.npz") as stored:
        voxels = sparse.site_set(stored["voxel_coords"].astype(np.int32), num_scans=2)
        expected = {
            name: stored[f"{stored.get(f'{name}.coords_same_as', name)}.coords"]
            for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "union_1", "union_0")
        }
    tables = detector_tables(voxels)
    sets = [tables.stem.outputs, tables.pool.outputs, *(residual.outputs for *_, residual in tables.stages)]
    sets += [up.lateral.outputs for up in tables.ups]
    for (name, coords), sites in zip(expected.items(), sets, strict=True):
        np.testing.assert_array_equal(sites.coords, coords, err_msg=name)


def test_a_plan_has_the_shapes_of_its_bucket():
    tables = detector_tables(SCANS["rooms"]())
    capacities = LevelSizes(*(size + 7 * i for i, size in enumerate(tables.sizes)))
    plan = pad_plan(tables, capacities)
    other = pad_plan(detector_tables(voxels_of(room(0), empty_scan())), capacities)
    assert jax.tree.map(np.shape, plan) == jax.tree.map(np.shape, other)
    assert jax.tree.structure(plan) == jax.tree.structure(other)
    maps = [plan.stem, plan.pool, *(m for s in plan.stages for m in (s.down, s.skip, s.residual))]
    maps += [m for up in plan.ups for m in (up.generate, up.lateral)]
    for kmap in maps:
        assert (kmap.neighbors[:, int(kmap.n_out) :] == kmap.in_capacity).all()
        real = kmap.neighbors[kmap.neighbors < kmap.in_capacity]
        assert real.max() < kmap.n_in
    assert pad_plan(tables, capacities, PlanLayout("any")).stages[0].residual.tiles is None


@pytest.mark.parametrize("level", LevelSizes._fields)
def test_levels_that_do_not_fit_raise(level):
    tables = detector_tables(SCANS["rooms"]())
    small = tables.sizes._replace(**{level: getattr(tables.sizes, level) - 1})
    assert tables.sizes.fits(tables.sizes) and not tables.sizes.fits(small)
    with pytest.raises(InputError, match="take a larger bucket"):
        pad_plan(tables, small)
