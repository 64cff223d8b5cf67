import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.sparse.sites import MAX_COORDINATE, MAX_REACH
from tests.sparse.transcription import TABLES, padded, pairs_by_search, pairs_of, random_sites, table_of


def pairs_of_tiles(kmap, volume):
    """Pairs by offset, as the tiles hold them, mirrored ones and those of the centre written out."""
    tiles, found = kmap.tiles, [[] for _ in range(volume)]
    for t in range(int(tiles.count)):
        k, scan = int(tiles.offset[t]), tiles.scan[t]
        if tiles.mirrored and k == volume // 2:
            for i in (*tiles.in_rows[t], *tiles.out_rows[t]):
                if i < kmap.in_capacity:
                    assert kmap.in_scan[i] == scan
                    found[k].append((int(i), int(i)))
            continue
        for i, o in zip(tiles.in_rows[t], tiles.out_rows[t], strict=True):
            assert (i < kmap.in_capacity) == (o < kmap.out_capacity)
            if i < kmap.in_capacity:
                assert kmap.in_scan[i] == kmap.out_scan[o] == scan
                found[k].append((int(i), int(o)))
                if tiles.mirrored:
                    found[volume - 1 - k].append((int(o), int(i)))
    return found


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("counts", [(40, 0, 55), (300,), (0, 0), (1, 1)], ids=str)
def test_maps_hold_the_pairs_that_a_search_finds(kind, counts):
    table = table_of(kind, counts=counts)
    expected = [sorted(found) for found in pairs_of(kind, table)]
    np.testing.assert_array_equal(table.pairs_per_offset, [len(found) for found in expected])
    kmap = padded(table)
    assert kmap.neighbors.shape == (len(expected), kmap.out_capacity)
    for k, found in enumerate(expected):
        valid = kmap.neighbors[k] < kmap.in_capacity
        assert (kmap.neighbors[k][~valid] == kmap.in_capacity).all()
        assert sorted(zip(kmap.neighbors[k][valid].tolist(), np.flatnonzero(valid).tolist(), strict=True)) == found
    assert [sorted(found) for found in pairs_of_tiles(kmap, len(expected))] == expected


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("tile_size", [1, 16, 512])
def test_tiles_are_unique_sorted_and_fit(kind, tile_size):
    kmap = padded(table_of(kind), tile_size=tile_size)
    tiles = kmap.tiles
    assert tiles.count <= len(tiles.in_rows)
    for rows in (tiles.in_rows, tiles.out_rows):
        assert (np.diff(rows, axis=1) > 0).all()


@pytest.mark.parametrize("kind", ["submanifold 3", "generative"])
def test_tiles_fit_where_every_neighbour_is_there(kind):
    block = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    stride, build, _ = TABLES[kind]
    coords = np.concatenate([np.c_[np.full(len(block), b), block * stride] for b in range(3)])
    table = build(sparse.site_set(coords.astype(np.int32), stride=stride))
    for tile_size in (1, 5, 64, 256):
        kmap = padded(table, 0, 0, tile_size)
        assert sum(map(len, pairs_of_tiles(kmap, 27))) == table.pairs_per_offset.sum()


@pytest.mark.parametrize("size", [3, (3, 1, 5)])
def test_an_odd_submanifold_map_is_its_own_mirror(size):
    table = sparse.submanifold_neighbors(random_sites(), size)
    for k, rows in enumerate(table.rows):
        outs = np.flatnonzero(rows >= 0)
        np.testing.assert_array_equal(table.rows[len(table.rows) - 1 - k][rows[outs]], outs)


def test_scans_are_no_neighbours():
    coords = np.array([[0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 1, 1], [2, 0, 0, 2]], np.int32)
    table = sparse.submanifold_neighbors(sparse.site_set(coords), 3)
    assert table.pairs_per_offset.sum() == 6


def test_rows_of_a_union():
    a, b = random_sites(seed=0), random_sites(seed=1)
    whole = sparse.unite(a, b)
    for part in (a, b):
        rows = sparse.union_rows(part, whole, len(part) + 4, len(whole) + 5)
        assert (rows[len(whole) :] == len(part) + 4).all()
        found = rows < len(part)
        assert found.sum() == len(part) and (rows[~found] == len(part) + 4).all()
        np.testing.assert_array_equal(whole.coords[found[: len(whole)]], part.coords[rows[found]])


def test_maps_without_tiles():
    kmap = padded(table_of("strided 3"), tile_size=None)
    assert kmap.tiles is None and kmap.strides == (2, 4) and kmap.num_scans == 3


def pairs_of_table(table):
    return [[(int(rows[o]), int(o)) for o in np.flatnonzero(rows >= 0)] for rows in table.rows]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, (3, 3), (2, 5), (1, 1, 3), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("draws", [{"reach": 3}, {"reach": 9, "counts": (400,)}, {"stride": 4, "reach": 3}], ids=str)
def test_any_kernel_finds_the_pairs_that_a_dictionary_finds(size, dilation, draws):
    sites = random_sites(**draws)
    if isinstance(size, tuple) and len(size) == 2:
        sites = sparse.site_set(sites.coords[:, :3], stride=sites.stride, num_scans=3)
    offsets = sparse.kernel_offsets(size, dilation) * sites.stride
    table = sparse.submanifold_neighbors(sites, size, dilation)
    assert pairs_of_table(table) == pairs_by_search(sites.coords, sites.coords, offsets)
    coarse = sparse.downsample(sites, 2)
    table = sparse.strided_neighbors(sites, coarse, size, dilation)
    assert pairs_of_table(table) == pairs_by_search(sites.coords, coarse.coords, offsets)


@pytest.mark.parametrize(("fine", "coarse"), [(2000, 1), (2000, 20), (3, 2000)])
def test_maps_between_sets_of_very_unlike_size(fine, coarse):
    inputs = random_sites(counts=(fine, fine // 2), reach=9)
    outputs = random_sites(counts=(coarse, coarse), reach=9, seed=1)
    table = sparse.strided_neighbors(inputs, outputs, 3)
    assert pairs_of_table(table) == pairs_by_search(inputs.coords, outputs.coords, sparse.kernel_offsets(3))


def test_no_kernel_meets_the_other_end_of_the_range():
    """Keys are sums of shifted fields: what leaves one field enters the next."""
    ends = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * MAX_COORDINATE
    coords = np.concatenate([np.c_[np.full(8, b), ends] for b in (0, 1, 2)]).astype(np.int32)
    sites = sparse.site_set(coords)
    assert sparse.submanifold_neighbors(sites, 3, MAX_REACH).pairs_per_offset.sum() == len(sites)
    assert sparse.submanifold_neighbors(sites, 2, MAX_REACH).pairs_per_offset.sum() == len(sites)
    coarse = sparse.downsample(sites, 512)
    children = sparse.generate(coarse, 3)
    table = sparse.strided_neighbors(children, coarse, 3)
    assert (table.pairs_per_offset == len(coarse)).all()
    wide = sparse.strided_neighbors(children, coarse, 3, 3)  # 768 voxels, beyond the children's 256
    assert wide.pairs_per_offset.sum() == len(coarse)


@pytest.mark.parametrize(
    "build",
    [
        lambda s: sparse.submanifold_neighbors(s, 3, 256),
        lambda s: sparse.strided_neighbors(s, sparse.downsample(s, 2), (1, 1, 513)),
        lambda s: sparse.pool_neighbors(s, sparse.downsample(s, 2), 513),
        lambda s: sparse.generative_neighbors(sparse.downsample(s, 2), s, 513),
        lambda s: sparse.generate(s, 1025),
    ],
)
def test_a_kernel_that_reaches_too_far_is_refused(build):
    with pytest.raises(InputError, match="smaller kernel, dilation or stride"):
        build(sparse.site_set(np.array([[0, 0, 0, 0]], np.int32), stride=4))
