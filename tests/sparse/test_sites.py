import itertools

import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.sparse.sites import MAX_COORDINATE, pack_keys, sorted_unique, unpack_keys
from tests.sparse.transcription import random_sites


def test_negative_coordinates_are_floored():
    points = np.array([[-0.001, 0.0, 0.009], [-0.01, 0.01, 0.02], [-0.011, 0.015, -1.0]], np.float32)
    expected = [[-1, 0, 0], [-1, 1, 2], [-2, 1, -100]]
    np.testing.assert_array_equal(sparse.voxel_coordinates(points, 0.01)[:, [0, 2]], np.array(expected)[:, [0, 2]])
    assert sparse.voxel_coordinates(points, 0.01).dtype == np.int32


def test_division_is_in_float32():
    values = np.random.default_rng(0).integers(-400, 400, 20_000).astype(np.float32) / np.float32(100)
    points = np.stack([values] * 3, 1)
    expected = np.floor(points / np.float32(0.01))
    np.testing.assert_array_equal(sparse.voxel_coordinates(points, 0.01), expected)
    assert (expected != np.floor(points * np.float32(100))).any(), "the points do not tell the two apart"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite_are_named(bad):
    points = np.zeros((5, 3), np.float32)
    points[2, 1] = bad
    with pytest.raises(InputError, match="1 of 5 points are NaN or infinite"):
        sparse.voxel_coordinates(points, 0.01)


def test_the_range_of_a_key_is_checked():
    edge = np.float32((MAX_COORDINATE - 1) * 0.25)
    points = np.array([[edge, -edge, 0]], np.float32)
    np.testing.assert_array_equal(sparse.voxel_coordinates(points, 0.25), [[MAX_COORDINATE - 1, 1 - MAX_COORDINATE, 0]])
    with pytest.raises(InputError, match=r"voxel_size is 0\.0; expected metres above 0"):
        sparse.voxelize([np.zeros((5, 3), np.float32)], 0.0)
    with pytest.raises(InputError, match="centre the scan"):
        sparse.voxel_coordinates(points + np.float32(0.25), 0.25)
    with pytest.raises(InputError, match="check its unit"):
        sparse.voxel_coordinates(np.full((1, 3), 3e38, np.float32), 0.01)
    with pytest.raises(InputError, match="a key holds"):
        sparse.site_set(np.array([[0, MAX_COORDINATE + 1, 0, 0]], np.int32))
    with pytest.raises(InputError, match="scan indices"):
        sparse.site_set(np.array([[-1, 0, 0, 0]], np.int32))
    with pytest.raises(InputError, match="a batch of 2 scans"):
        sparse.site_set(np.array([[2, 0, 0, 0]], np.int32), num_scans=2)


def test_keys_are_ordered_as_their_rows_and_come_back():
    rng = np.random.default_rng(1)
    coords = np.c_[rng.integers(0, 5, 500), rng.integers(-MAX_COORDINATE, MAX_COORDINATE + 1, (500, 3))]
    coords = np.concatenate([coords, np.c_[rng.integers(0, 3, 500), rng.integers(-2, 3, (500, 3))]]).astype(np.int32)
    keys = pack_keys(coords)
    np.testing.assert_array_equal(unpack_keys(keys), coords)
    np.testing.assert_array_equal(unpack_keys(sorted_unique(keys)), sorted({tuple(c) for c in coords.tolist()}))


def test_a_scan_at_the_edge_keeps_its_pyramid():
    edge = MAX_COORDINATE - 1
    sites = sparse.site_set(np.array([[0, edge, -edge, 0], [1, -edge, edge, 0]], np.int32))
    while sites.stride < 64:
        sites = sparse.downsample(sites, 2)
        assert np.abs(sites.coords[:, 1:] - np.array([[edge, -edge, 0], [-edge, edge, 0]])).max() < sites.stride
    children = sparse.generate(sites, 3)
    assert len(children) == 54 and set(children.scan) == {0, 1}
    assert np.abs(children.coords[:27, 1:] - sites.coords[0, 1:]).max() == 32


def test_sites_made_beyond_the_range_are_refused():
    sites = sparse.site_set(np.array([[0, -MAX_COORDINATE, 0, 512]], np.int32), stride=512)
    assert sparse.generate(sites, 3).coords[:, 1].min() == -MAX_COORDINATE - 256
    for make in (
        lambda: sparse.generate(sparse.generate(sites, 3, 1), 3, 1),
        lambda: sparse.downsample(sites, 4),
        lambda: sparse.downsample(sites, 5),
    ):
        with pytest.raises(InputError, match="centre the scan"):
            make()
    assert sparse.downsample(sites, 1).keys == sites.keys


@pytest.mark.parametrize(("stride", "factor"), [(1, 2), (4, 2), (1, 3), (2, 3), (1, 5), (1, 8)])
def test_coarse_sites_are_floors(stride, factor):
    sites = random_sites(stride=stride, reach=9)
    coarse = sparse.downsample(sites, factor)
    step = stride * factor
    expected = {(b, *(v // step * step for v in c)) for b, *c in sites.coords.tolist()}
    np.testing.assert_array_equal(coarse.coords, sorted(expected))
    assert coarse.stride == step and coarse.num_scans == sites.num_scans


@pytest.mark.parametrize("size", [2, 3])
def test_every_child_is_generated(size):
    sites = random_sites(stride=4)
    children = sparse.generate(sites, size)
    reach = range(-1, 2) if size == 3 else range(2)
    expected = {
        (b, x + 2 * i, y + 2 * j, z + 2 * k)
        for b, x, y, z in sites.coords.tolist()
        for i, j, k in itertools.product(reach, repeat=3)
    }
    np.testing.assert_array_equal(children.coords, sorted(expected))
    assert children.stride == 2
    with pytest.raises(ValueError, match="no finer grid"):
        sparse.generate(random_sites(stride=1), 3)


def test_unions():
    a, b = random_sites(seed=0), random_sites(seed=1, counts=(30, 20, 0))
    both = {tuple(c) for c in a.coords.tolist()} | {tuple(c) for c in b.coords.tolist()}
    np.testing.assert_array_equal(sparse.unite(a, b).coords, sorted(both))
    with pytest.raises(ValueError, match="one stride"):
        sparse.unite(a, random_sites(stride=2))


@pytest.mark.parametrize("reach", [0.0, 300.0], ids=["near", "too far for one word"])
def test_the_first_point_of_a_voxel_represents_it(reach):
    rng = np.random.default_rng(2)
    clouds = [rng.uniform(-0.05, 0.05, (n, 3)).astype(np.float32) for n in (300, 0, 200, 30_000)]
    clouds[2][0], clouds[2][1] = -reach, reach
    voxels = sparse.voxelize(clouds, 0.01)
    first = {}
    rows = np.concatenate([np.c_[np.full(len(c), b), np.floor(c / np.float32(0.01))] for b, c in enumerate(clouds)])
    for row, key in enumerate(map(tuple, rows.astype(int).tolist())):
        first.setdefault(key, row)
    np.testing.assert_array_equal(voxels.sites.coords, sorted(first))
    np.testing.assert_array_equal(voxels.first_point, [first[key] for key in sorted(first)])
    assert voxels.sites.num_scans == 4


@pytest.mark.parametrize("clouds", [[], [np.zeros((0, 3), np.float32)] * 2])
def test_no_points_make_no_sites(clouds):
    voxels = sparse.voxelize(clouds, 0.01)
    assert len(voxels.sites) == len(voxels.first_point) == 0
    assert len(sparse.downsample(voxels.sites, 2)) == 0
    assert len(sparse.generate(sparse.downsample(voxels.sites, 2), 3)) == 0
    assert len(sparse.site_set(np.zeros((0, 4), np.int32))) == 0


def test_lookup_finds_rows_in_any_order():
    sites = random_sites()
    order = np.random.default_rng(3).permutation(len(sites))
    np.testing.assert_array_equal(sites.lookup(sites.coords[order]), order)
    assert sites.lookup(np.array([[1, 0, 0, 0], [2, 99, 0, 0]], np.int32)).tolist() == [-1, -1]


def test_slices_run_x_fastest():
    offsets = sparse.kernel_offsets((3, 2, 1)).tolist()
    assert offsets == [[x, y, 0] for y in (0, 1) for x in (-1, 0, 1)]
    assert sparse.kernel_offsets(3, dilation=2).tolist()[0] == [-2, -2, -2]


def test_padded_sites():
    sites = random_sites()
    rows = sparse.pad_sites(sites, len(sites) + 3)
    np.testing.assert_array_equal(rows.coords[:-3], sites.coords)
    np.testing.assert_array_equal(rows.scan[-3:], sites.num_scans)
    assert rows.valid.sum() == rows.n == len(sites)
    with pytest.raises(InputError, match="take a larger bucket"):
        sparse.pad_sites(sites, len(sites) - 1)
