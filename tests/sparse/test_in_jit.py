"""Sites and maps made inside jit are those of the host."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.sparse.in_jit import floor_quotient
from h2a2_jax.sparse.sites import MAX_COORDINATE, MAX_REACH
from tests.sparse.transcription import random_sites

DRAWS = {
    "scans, one empty": {"counts": (40, 0, 55)},
    "dense": {"counts": (300, 200), "reach": 3},
    "a site": {"counts": (1,)},
    "a site each": {"counts": (1, 1, 1)},
    "nothing": {"counts": (0, 0)},
}
SPARE = 9


def traced(build, *arguments):
    return jax.tree.map(np.asarray, jax.jit(build)(*arguments))


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
        assert np.asarray(a).dtype == np.asarray(b).dtype, jax.tree_util.keystr(path)


def padded(sites, spare=SPARE):
    return sparse.pad_sites(sites, len(sites) + spare)


def assert_all(sites_and_overflow, expected, capacity):
    sites, overflow = sites_and_overflow
    assert_same(sites, sparse.pad_sites(expected, capacity))
    assert overflow == 0 and overflow.dtype == np.int32


@pytest.mark.parametrize("draws", DRAWS)
def test_sites(draws):
    spare = 0 if draws == "dense" else SPARE
    sites = random_sites(stride=4, **DRAWS[draws])
    rng, num_scans = np.random.default_rng(0), sites.num_scans
    rows = padded(sites)
    shuffled = np.concatenate([sites.coords, sites.coords[::2]])[rng.permutation(len(sites) + -(-len(sites) // 2))]
    cap = max(1, len(sites) + spare)
    given = np.concatenate([shuffled, np.full((3, 4), num_scans, np.int32), np.full((2, 4), -1, np.int32)])
    assert_all(
        traced(lambda c: sparse.sites_from_coords(c, cap, num_scans, stride=4), given),
        sites, cap,
    )  # fmt: skip
    for factor in (2, 3):
        coarse = sparse.downsample(sites, factor)
        cap = max(1, len(coarse) + spare)
        assert_all(traced(partial(sparse.downsample_sites, factor=factor, capacity=cap), rows), coarse, cap)
    for size in (3, 2):
        children = sparse.generate(sites, size)
        cap = max(1, len(children) + spare)
        assert_all(traced(lambda r, k=size, c=cap: sparse.generate_sites(r, k, c), rows), children, cap)
    other = random_sites(stride=4, counts=(30, 20), seed=5)
    whole = sparse.unite(sites, other)
    cap = len(whole) + spare
    assert_all(traced(lambda a, b: sparse.unite_sites(a, b, cap), rows, padded(other)), whole, cap)
    part_rows = traced(sparse.rows_of_part, rows, sparse.pad_sites(whole, cap))
    np.testing.assert_array_equal(part_rows, sparse.union_rows(sites, whole, rows.capacity, cap))


def test_sites_in_two_dimensions():
    coords = np.array([[1, -2, 3], [0, 5, 6], [0, 5, 6]], np.int32)
    expected = sparse.site_set(coords, num_scans=2)
    assert_all(traced(lambda c: sparse.sites_from_coords(c, 4, 2), coords), expected, 4)


@pytest.mark.parametrize("counts", [(300, 0, 200), (0,), (1, 1)], ids=str)
def test_voxels_and_their_first_points(counts):
    rng = np.random.default_rng(2)
    clouds = [rng.uniform(-0.05, 0.05, (m, 3)).astype(np.float32) for m in counts]
    host = sparse.voxelize(clouds, 0.01)
    total, capacity = sum(counts), max(1, len(host.sites)) + 4
    points = np.concatenate([*clouds, np.full((7, 3), 5, np.float32)])
    scan = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.zeros(7, np.int64)]).astype(np.int32)
    sites, first, overflow = traced(
        lambda p, s, m: sparse.voxelize_points(p, s, m, 0.01, capacity, len(counts)), points, scan, np.int32(total)
    )
    assert_all((sites, overflow), host.sites, capacity)
    np.testing.assert_array_equal(first[: len(host.first_point)], host.first_point)
    assert (first[len(host.first_point) :] == len(points)).all()


@pytest.mark.parametrize("size", [0.01, 0.02, 0.05, 0.07, 0.25, 1 / 3])
def test_points_on_the_faces_of_voxels_fall_on_the_host_s_side(size):
    faces = np.arange(-31_700, 31_700).astype(np.float32) * np.float32(size)
    steps = [faces]
    for direction in (-np.inf, np.inf):
        near = faces
        for _ in range(3):
            near = np.nextafter(near, np.float32(direction))
            steps.append(near)
    steps.append(np.arange(-31_700, 31_700).astype(np.float32) / np.float32(100) * np.float32(size * 100))
    values = np.concatenate(steps)
    values = values[(np.abs(values) > 1e-30) | (values == 0)]
    points = np.stack([values] * 3, 1)
    expected = np.floor(values / np.float32(size))
    np.testing.assert_array_equal(sparse.voxel_coordinates(points, size)[:, 0], expected)
    for error in (-1, 0, 1):
        got = traced(lambda p, e: floor_quotient(p, e, np.float32(size)), values, expected + np.float32(error))
        np.testing.assert_array_equal(got, expected)
    scan = np.zeros(len(points), np.int32)
    sites, first, _ = traced(
        lambda p, s: sparse.voxelize_points(p, s, len(p), size, 70_000, 1), points, scan
    )  # fmt: skip
    host = sparse.voxelize([points], size)
    assert_same(sites, sparse.pad_sites(host.sites, 70_000))
    np.testing.assert_array_equal(first[: len(host.sites)], host.first_point)


def test_what_does_not_fit_is_counted_and_the_first_sites_of_a_scan_stay():
    sites = random_sites(stride=2, counts=(60,))
    half = len(sites) // 2
    kept = sparse.SiteSet(sites.keys[:half], 2, 1)
    got, overflow = traced(lambda c: sparse.sites_from_coords(c, half, 1, stride=2), sites.coords)
    assert_same(got, sparse.pad_sites(kept, half))
    assert overflow == len(sites) - half
    for make, full in (
        (lambda r: sparse.downsample_sites(r, 2, 5), sparse.downsample(sites, 2)),
        (lambda r: sparse.generate_sites(r, 3, 5), sparse.generate(sites, 3)),
        (lambda r: sparse.unite_sites(r, r, 5), sites),
    ):
        got, overflow = traced(make, padded(sites))
        np.testing.assert_array_equal(got.coords, full.coords[:5])
        assert overflow == len(full) - 5 and got.n == 5


@pytest.mark.parametrize(
    ("counts", "capacity", "kept"),
    [
        ((50, 3, 20, 7), 30, (10, 3, 10, 7)),
        ((50, 3, 20, 7), 33, (12, 3, 11, 7)),
        ((50, 3, 20, 7), 80, (50, 3, 20, 7)),
        ((50, 3, 20, 7), 3, (1, 1, 1, 0)),
        ((0, 9, 0, 9), 11, (0, 6, 0, 5)),
    ],
)
def test_every_scan_keeps_a_fair_share_where_sites_do_not_fit(counts, capacity, kept):
    line = [[b, 0, 0, i] for b, n in enumerate(counts) for i in range(n)]
    rows = np.random.default_rng(0).permutation(np.array(line, np.int32))
    got, overflow = traced(lambda c: sparse.sites_from_coords(c, capacity, 4), rows)
    assert overflow == sum(counts) - sum(kept) and got.n == sum(kept)
    expected = [[b, 0, 0, i] for b, n in enumerate(kept) for i in range(n)]
    np.testing.assert_array_equal(got.coords[: sum(kept)], expected)
    assert (got.coords[sum(kept) :, 0] == 4).all()


def test_overflow_is_an_error_where_values_are_checked():
    rows = padded(random_sites())
    with sparse.check_values(True):
        checked = checkify.checkify(jax.jit(lambda r, c: sparse.downsample_sites(r, 2, c), static_argnums=1))
        assert checked(rows, 128)[0].get() is None
        error, (_, overflow) = checked(rows, 5)
    with pytest.raises(
        checkify.JaxRuntimeError, match=f"downsample_sites left {overflow} sites out, which do not fit a"
    ):
        error.throw()


def test_coordinates_off_the_grid_are_left_out_and_counted():
    coords = np.array([[0, 4, 0, -8], [0, 4, 1, 0], [0, 2, 0, 0]], np.int32)
    got, overflow = traced(lambda c: sparse.sites_from_coords(c, 3, 1, stride=(4, 1, 8)), coords)
    assert got.n == 2 and overflow == 1 and got.coords[:2].tolist() == [[0, 4, 0, -8], [0, 4, 1, 0]]
    with jax.enable_x64(True):  # a cast to 32 bits would wrap these around to 0
        far = jnp.array([[0, 1 << 32, 0, 0], [0, 0, 0, 0]])
        assert sparse.sites_from_coords(far, 2, 1)[1] == 1 and sparse.sites_from_coords(np.asarray(far), 2, 1)[1] == 1


def test_rows_are_found():
    sites = random_sites(stride=2)
    rows = padded(sites)
    order = np.random.default_rng(3).permutation(len(sites))
    wanted = sites.coords[order].reshape(2, -1, 4) if len(sites) % 2 == 0 else sites.coords[order][None]
    found = traced(sparse.find_rows, rows, wanted)
    np.testing.assert_array_equal(found, order.reshape(wanted.shape[:-1]))
    lost = np.array([[0, 99, 0, 0], [3, 0, 0, 0], [-1, 0, 0, 0], [0, 1 << 20, 0, 0], [0, 1, 0, 0]], np.int64)
    assert (traced(sparse.find_rows, rows, lost) == rows.capacity).all()
    flat = sparse.pad_sites(sparse.site_set(np.array([[0, 1, 2], [0, -1, 2]])), 4)
    assert traced(sparse.find_rows, flat, np.array([[0, 1, 2], [0, 2, 1], [0, -1, 2]])).tolist() == [1, 4, 0]


def test_identities_are_those_of_the_host():
    def build(points, name):
        scan = jnp.zeros(len(points), jnp.int32)
        fine, *_ = sparse.voxelize_points(points, scan, len(points), 0.1, 64, 1)
        other, *_ = sparse.voxelize_points(points + 1, scan, len(points), 0.1, 64, 1)
        named, *_ = sparse.voxelize_points(points, scan, len(points), 0.1, 64, 1, name=name)
        coarse = sparse.downsample_sites(sparse.downsample_sites(fine, (2, 1, 1), 64)[0], 2, 64)[0]
        return (
            fine,
            other,
            named,
            coarse,
            sparse.generate_sites(coarse, 3, 64)[0],
            sparse.unite_sites(fine, named, 64)[0],
        )

    points = np.random.default_rng(0).uniform(0, 1, (9, 3)).astype(np.float32)
    build = jax.jit(build, static_argnums=1)
    got = [sites.identity for sites in build(points, "lidar")]
    assert got == [
        "voxels", "voxels#1", "lidar", "voxels/4x2x2", "generate(voxels/4x2x2, 3, 2)", "unite(voxels, lidar)",
    ]  # fmt: skip
    assert [sites.identity for sites in build(points[:5], "lidar")] == got  # another trace
    fine, named = sparse.voxelize([points], 0.1).sites, sparse.voxelize([points], 0.1, name="lidar").sites
    coarse = sparse.downsample(sparse.downsample(fine, (2, 1, 1)), 2)
    host = [fine, named, coarse, sparse.generate(coarse, 3), sparse.unite(fine, named)]
    assert [sites.identity for sites in host] == [got[0], *got[2:]]


def test_sites_out_of_range_are_dropped_and_counted():
    edge = MAX_COORDINATE
    coords = np.array([[0, 0, 0, edge + 1], [0, -edge - 1, 0, 0], [0, edge, 0, -edge], [0, 1 << 20, 0, 0]], np.int32)
    sites, overflow = traced(lambda c: sparse.sites_from_coords(c, 4, 1), coords)
    assert_same(sites, sparse.pad_sites(sparse.site_set(coords[2:3]), 4))
    assert overflow == 3
    points = np.array([[0, 0, np.nan], [np.inf, 0, 0], [0, 3e38, 0], [0, 0, 0.5], [-edge, 0, 0]], np.float32)
    sites, first, overflow = traced(
        lambda p: sparse.voxelize_points(p, np.zeros(5, np.int32), 5, 1.0, 4, 1), points
    )  # fmt: skip
    assert sites.n == 1 and overflow == 4 and first.tolist() == [3, 5, 5, 5]
    wide = sparse.pad_sites(sparse.site_set(np.array([[0, -edge, 0, 512]], np.int32), stride=512), 2)
    coarse, overflow = traced(lambda r: sparse.downsample_sites(r, 4, 2), wide)
    assert coarse.n == 0 and overflow == 1
    children, overflow = traced(
        lambda r: sparse.generate_sites(sparse.generate_sites(r, (3, 1, 1), 3, 1)[0], (3, 1, 1), 9, 1), wide
    )
    assert overflow == 1 and children.coords[: children.n, 1].tolist() == [-edge - 512 + 512 * i for i in range(4)]


KERNELS = [(3, 1), (3, 2), (2, 1), (2, 2), (5, 1), (1, 1), ((3, 3), 1), ((3, 1, 2), 3), ((1, 1, 3), 2)]


@pytest.mark.parametrize(("size", "dilation"), KERNELS, ids=str)
def test_submanifold_maps(size, dilation):
    build = jax.jit(lambda r: sparse.submanifold_map(r, size, dilation, tile_size=16))
    for counts in ((40, 0, 55), (300, 0, 0), (1, 0, 1), (0, 0, 0)):
        sites = random_sites(stride=2, counts=counts)
        if isinstance(size, tuple) and len(size) == 2:
            sites = sparse.site_set(sites.coords[:, :3], stride=2, num_scans=3)
        table = sparse.submanifold_neighbors(sites, size, dilation)
        rows = sparse.pad_sites(sites, 320)
        assert_same(jax.tree.map(np.asarray, build(rows)), sparse.pad_map(table, rows, rows, tile_size=16))


def test_maps_without_tiles_or_spare_rows():
    sites = random_sites()
    rows = padded(sites, 0)
    table = sparse.submanifold_neighbors(sites, 3)
    assert_same(traced(sparse.submanifold_map, rows), sparse.pad_map(table, rows, rows))


@pytest.mark.parametrize(("size", "dilation"), KERNELS, ids=str)
def test_strided_maps_and_their_inverses(size, dilation):
    def build(fine, coarse):
        there = sparse.strided_map(fine, coarse, size, dilation, tile_size=16)
        return there, sparse.inverse_map(there, tile_size=8)

    build = jax.jit(build)
    for counts in ((40, 0, 55), (0, 0, 0)):
        sites = random_sites(stride=2, counts=counts)
        coarse = sparse.downsample(sites, 2)
        table = sparse.strided_neighbors(sites, coarse, size, dilation)
        fine_rows, coarse_rows = sparse.pad_sites(sites, 100), sparse.pad_sites(coarse, 90)
        there, back = jax.tree.map(np.asarray, build(fine_rows, coarse_rows))
        assert_same(there, sparse.pad_map(table, fine_rows, coarse_rows, tile_size=16))
        back_table = sparse.inverse_neighbors(table)
        assert_same(back, sparse.pad_map(back_table, coarse_rows, fine_rows, tile_size=8))


@pytest.mark.parametrize("size", [2, 3, (2, 1, 3)], ids=str)
def test_pool_and_generative_maps(size):
    sites = random_sites(stride=4)
    coarse, children = sparse.downsample(sites, 2), sparse.generate(sites, size)
    rows, coarse_rows, children_rows = padded(sites), padded(coarse), padded(children)
    assert_same(
        traced(partial(sparse.pool_map, kernel_size=size, tile_size=4), rows, coarse_rows),
        sparse.pad_map(sparse.pool_neighbors(sites, coarse, size), rows, coarse_rows, tile_size=4),
    )
    assert_same(
        traced(partial(sparse.generative_map, kernel_size=size, tile_size=64), rows, children_rows),
        sparse.pad_map(sparse.generative_neighbors(sites, children, size), rows, children_rows, tile_size=64),
    )


def test_every_batch_of_a_shape_has_its_own_map_under_vmap():
    sets = [random_sites(counts=counts, seed=seed) for seed, counts in enumerate([(40, 20), (0, 0), (1, 70)])]
    rows = [sparse.pad_sites(s, 100) for s in sets]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    maps = traced(jax.vmap(lambda r: sparse.submanifold_map(r, 3, tile_size=8)), stacked)
    for i, (sites, row) in enumerate(zip(sets, rows, strict=True)):
        expected = sparse.pad_map(sparse.submanifold_neighbors(sites, 3), row, row, tile_size=8)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], maps), expected)


def test_no_kernel_meets_the_other_end_of_the_range():
    ends = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * MAX_COORDINATE
    coords = np.concatenate([np.c_[np.full(8, b), ends] for b in (0, 1, 2)]).astype(np.int32)
    rows = padded(sparse.site_set(coords))
    kmap = traced(lambda r: sparse.submanifold_map(r, 3, MAX_REACH), rows)
    assert (kmap.neighbors < rows.capacity).sum() == len(coords)
    with pytest.raises(InputError, match="smaller kernel"):
        jax.jit(lambda r: sparse.submanifold_map(r, 3, MAX_REACH + 1))(rows)


def test_a_network_of_sites_and_maps_in_one_program():
    """From points to a convolved, downsampled tensor without the host."""

    def run(points, kernels):
        scan = jnp.zeros(len(points), jnp.int32)
        fine, _, lost = sparse.voxelize_points(points, scan, len(points), 0.1, 256, 1)
        coarse, _ = sparse.downsample_sites(fine, 2, 256)
        x = jnp.where(fine.valid[:, None], jnp.ones((256, 2)), 0)
        x = sparse.convolve(x, kernels, sparse.submanifold_map(fine, 3, tile_size=32))
        return sparse.convolve(x, kernels, sparse.strided_map(fine, coarse, 3)), lost

    points = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 3)).astype(np.float32)
    kernels = np.random.default_rng(1).normal(size=(1, 27, 2, 2)).astype(np.float32)
    got, lost = traced(run, points, kernels)
    voxels = sparse.voxelize([points], 0.1).sites
    coarse = sparse.downsample(voxels, 2)
    fine_rows, coarse_rows = sparse.pad_sites(voxels, 256), sparse.pad_sites(coarse, 256)
    x = jnp.asarray(sparse.pad_rows(np.ones((len(voxels), 2), np.float32), 256))
    fine_map = sparse.pad_map(sparse.submanifold_neighbors(voxels), fine_rows, fine_rows)
    x = sparse.convolve(x, jnp.asarray(kernels), fine_map)
    down = sparse.pad_map(sparse.strided_neighbors(voxels, coarse, 3), fine_rows, coarse_rows)
    expected = sparse.convolve(x, jnp.asarray(kernels), down)
    assert lost == 0
    np.testing.assert_allclose(got, expected, atol=1e-4)
