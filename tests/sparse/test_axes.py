"""Strides per axis, four axes and padded strides, on the host and inside jit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from tests.sparse.transcription import pairs_by_search, random_sites

GRIDS = {
    "3-D": (3, (1, 4, 2), (2, 1, 3), (3, 2, 1)),
    "4-D": (4, 1, 2, (3, 3, 2, 3)),
    "4-D, per axis": (4, (1, 2, 1, 4), (2, 1, 3, 2), 2),
}
"""Axes, stride, factor of the coarser grid, kernel size."""


def pairs_of(table):
    return [[(int(rows[o]), int(o)) for o in np.flatnonzero(rows >= 0)] for rows in table.rows]


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("grid", GRIDS)
def test_tables_hold_the_pairs_that_a_search_finds(grid):
    axes, stride, factor, size = GRIDS[grid]
    sites = random_sites(stride=stride, axes=axes, reach=3)
    coarse, steps = sparse.downsample(sites, factor), np.array(sites.strides)
    expected = np.unique(np.c_[sites.scan, sites.coords[:, 1:] // coarse.strides * coarse.strides], axis=0)
    np.testing.assert_array_equal(coarse.coords, expected)
    for dilation in (1, (2, 1, 3, 1)[:axes]):
        offsets = sparse.kernel_offsets(size, dilation, axes) * steps
        table = sparse.submanifold_neighbors(sites, size, dilation)
        assert pairs_of(table) == pairs_by_search(sites.coords, sites.coords, offsets)
        table = sparse.strided_neighbors(sites, coarse, size, dilation)
        assert pairs_of(table) == pairs_by_search(sites.coords, coarse.coords, offsets)
        assert table.kernel_size == sparse.inverse_neighbors(table).kernel_size
    table = sparse.strided_neighbors(sites, coarse, size, padding=1)
    slices = itertools.product(*(range(n) for n in reversed(table.kernel_size)))
    offsets = [(np.array(slot[::-1]) - 1) * steps for slot in slices]
    np.testing.assert_array_equal(table.offsets, offsets)
    assert pairs_of(table) == pairs_by_search(sites.coords, coarse.coords, offsets)
    children = sparse.generate(coarse, size, factor)
    assert children.strides == sites.strides
    table = sparse.generative_neighbors(coarse, children, size)
    offsets = -sparse.kernel_offsets(size, 1, axes) * steps
    assert pairs_of(table) == pairs_by_search(coarse.coords, children.coords, offsets)
    assert sum(map(len, pairs_of(table))) == len(coarse) * len(offsets)


@pytest.mark.parametrize("grid", GRIDS)
def test_sites_and_maps_inside_jit_are_those_of_the_host(grid):
    axes, stride, factor, size = GRIDS[grid]
    sites = random_sites(stride=stride, axes=axes, reach=3)
    coarse = sparse.downsample(sites, factor)
    covered = sparse.cover(sites, size, factor, padding=1)
    children, whole = sparse.generate(coarse, size, factor), sparse.unite(sites, sparse.generate(coarse, 1, factor))
    capacity = 9 + max(map(len, (sites, coarse, covered, children, whole)))

    def build(coords):
        fine, lost = sparse.sites_from_coords(coords, capacity, 3, stride=stride)
        below, more = sparse.downsample_sites(fine, factor, capacity)
        under, most = sparse.cover_sites(fine, size, factor, capacity, padding=1)
        made, over = sparse.generate_sites(below, size, capacity, factor)
        both, last = sparse.unite_sites(fine, sparse.generate_sites(below, 1, capacity, factor)[0], capacity)
        maps = (
            sparse.submanifold_map(fine, size, 2, tile_size=8),
            sparse.strided_map(fine, below, size, tile_size=8),
            sparse.strided_map(fine, under, size, padding=1),
            sparse.inverse_map(sparse.strided_map(fine, below, size)),
            sparse.pool_map(fine, below, size),
            sparse.generative_map(below, made, size),
        )
        return maps, both, lost + more + most + over + last, sparse.find_rows(fine, coords)

    order = np.random.default_rng(0).permutation(len(sites))
    maps, both, overflow, rows = jax.tree.map(np.asarray, jax.jit(build)(sites.coords[order]))
    down = sparse.strided_neighbors(sites, coarse, size)
    tables = (
        sparse.submanifold_neighbors(sites, size, 2),
        down,
        sparse.strided_neighbors(sites, covered, size, padding=1),
        sparse.inverse_neighbors(down),
        sparse.pool_neighbors(sites, coarse, size),
        sparse.generative_neighbors(coarse, children, size),
    )
    for got, table, tile in zip(maps, tables, (8, 8, None, None, None, None), strict=True):
        inputs, outputs = (sparse.pad_sites(s, capacity) for s in (table.inputs, table.outputs))
        assert_same(got, sparse.pad_map(table, inputs, outputs, tile_size=tile))
    assert_same(both, sparse.pad_sites(whole, capacity))
    assert overflow == 0
    np.testing.assert_array_equal(rows, order)


def test_points_in_two_and_four_dimensions_and_flat_voxels():
    rng = np.random.default_rng(0)
    for axes, columns, size in ((3, 2, 0.1), (3, 3, (0.1, 0.2, 0.05)), (4, 4, (0.1, 0.1, 0.1, 1.0))):
        clouds = [rng.uniform(-0.4, 0.4, (n, columns)).astype(np.float32) for n in (60, 0, 30)]
        host = sparse.voxelize(clouds, size, axes=axes, inverse=True)
        place = np.floor(np.concatenate(clouds) / np.array(size, np.float32)).astype(int)
        scan = np.repeat([0, 1, 2], [60, 0, 30]).astype(np.int32)
        rows = np.c_[scan, place, np.zeros((90, axes - columns), int)]
        np.testing.assert_array_equal(host.sites.coords, np.unique(rows, axis=0))
        np.testing.assert_array_equal(host.sites.coords[host.site_of_point], rows)
        sites, first, overflow = jax.jit(
            lambda p, s, size=size: sparse.voxelize_points(p, s, 90, size, 100, 3)
        )(np.concatenate(clouds), scan)  # fmt: skip
        assert_same(jax.tree.map(np.asarray, sites), sparse.pad_sites(host.sites, 100))
        np.testing.assert_array_equal(first[: len(host.sites)], host.first_point)
        assert overflow == 0


def test_the_range_in_four_dimensions():
    edge = 1983
    ends = np.array(list(itertools.product((-edge, edge), repeat=4)))
    coords = np.concatenate([np.c_[np.full(16, b), ends] for b in (0, 1, (1 << 14) - 1)])
    sites = sparse.site_set(coords)
    np.testing.assert_array_equal(sites.coords, coords[np.lexsort(coords.T[::-1])])
    assert sparse.submanifold_neighbors(sites, 3, 63).pairs_per_offset.sum() == len(sites)
    rows = sparse.pad_sites(sites, 50)
    assert ((jax.jit(lambda r: sparse.submanifold_map(r, 3, 63))(rows)).neighbors < 50).sum() == len(sites)
    with pytest.raises(InputError, match="a map holds at most 63"):
        sparse.submanifold_neighbors(sites, 3, 64)
    with pytest.raises(InputError, match=r"reach 1985, a key holds \+-1984"):
        sparse.site_set(np.array([[0, 0, 0, 0, 1985]]))
    got, overflow = sparse.sites_from_coords(np.array([[0, 0, 0, 0, 1985], [0, 0, 0, 0, -1984]]), 4, 1)
    assert overflow == 1 and got.n == 1
    points = np.array([[0, 0, 0, 198.45], [0, 0, 0, -198.25]], np.float32)
    assert sparse.voxelize_points(points, np.zeros(2, np.int32), 2, 0.1, 4, 1)[2] == 1
    with pytest.raises(InputError, match=r"198\.4 m from the origin"):
        sparse.voxelize([points], 0.1, axes=4)


WINDOWS = [
    (3, 2, 1, 1),
    (2, 2, 0, 1),
    (3, 1, 1, 1),
    (3, 2, 0, 2),
    (3, 3, 2, 2),
    (1, 2, 0, 1),
    ((3, 2), (2, 1), (1, 0), 1),
]


@pytest.mark.parametrize(("size", "stride", "padding", "dilation"), WINDOWS, ids=str)
def test_covered_sites_and_their_table_are_a_dense_zero_padded_convolution(size, stride, padding, dilation):
    rng = np.random.default_rng(0)
    shape = (9, 8)
    dense = rng.normal(size=(2, *shape)) * (rng.random((2, *shape)) < 0.15)
    weights = rng.normal(size=tuple(np.broadcast_to(size, 2)))
    both = [tuple(int(n) for n in np.broadcast_to(v, 2)) for v in (size, stride, padding, dilation)]
    with jax.enable_x64(True):
        expected, support = (
            np.asarray(
                jax.lax.conv_general_dilated(
                    jnp.asarray(image, jnp.float64)[:, None], jnp.asarray(w, jnp.float64)[None, None], both[1],
                    [(p, p) for p in both[2]], rhs_dilation=both[3],
                )
            )[:, 0]
            for image, w in ((dense, weights), (dense != 0, np.ones_like(weights)))
        )  # fmt: skip
    pixels = sparse.site_set(np.argwhere(dense), num_scans=2)
    options = {"padding": both[2], "dilation": both[3]}
    covered = sparse.cover(pixels, both[0], both[1], **options, shape=shape)
    scale = np.array([1, *both[1]])
    np.testing.assert_array_equal(covered.coords[:, :3], np.argwhere(support) * scale)
    table = sparse.strided_neighbors(pixels, covered, both[0], both[3], padding=both[2])
    x = dense[tuple(pixels.coords[:, :3].T)]
    slices = weights.T.ravel()  # x fastest
    y = sum(np.where(rows >= 0, x[rows], 0) * w for rows, w in zip(table.rows, slices, strict=True))
    np.testing.assert_allclose(y, expected[support > 0], rtol=0, atol=1e-12)
    free = sparse.cover(pixels, both[0], both[1], **options)
    inside = ((free.coords[:, 1:3] >= 0) & (free.coords[:, 1:3] < np.array(support.shape[1:]) * both[1])).all(1)
    np.testing.assert_array_equal(free.coords[inside], covered.coords)
    rows = sparse.pad_sites(pixels, 60)
    got, overflow = sparse.cover_sites(rows, both[0], both[1], 400, **options, shape=shape)
    assert_same(got, sparse.pad_sites(covered, 400))
    assert overflow == 0


def test_sites_outside_of_the_grid_are_refused_or_counted():
    sites = sparse.site_set(np.array([[0, 4, 0, 0], [0, 8, 0, 0], [0, 0, -4, 0]]), stride=4)
    with pytest.raises(InputError, match=r"site \[0, 0, -4, 0\] lies outside of a grid of shape 2 and stride 4"):
        sparse.cover(sites, 3, 2, padding=1, shape=2)
    got, overflow = sparse.cover_sites(sparse.pad_sites(sites, 4), 3, 2, 9, padding=1, shape=2)
    assert overflow == 2 and got.coords[: got.n].tolist() == [[0, 0, 0, 0]] and got.stride == 8
    assert got.identity == "cover(sites, 3, 2, 1, 1, 2)"
    with pytest.raises(ValueError, match="larger than a grid of shape 2 with padding 0"):
        sparse.cover(sites, 4, 2, shape=2)
