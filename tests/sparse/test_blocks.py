"""Blocks of sites and Winograd convolution on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.sparse.kernel_map import BLOCK, CHUNK, TILE, fits_blocks
from h2a2_jax.sparse.winograd import winograd_matrices
from tests.sparse.transcription import padded, random_sites


def dense_sites(size=14, stride=2, scans=1, keep=1.0, seed=0):
    """Sites of a full cube in each scan; a share of them, `keep`, is kept."""
    rng = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(*[np.arange(size) - 5] * 3, indexing="ij"), -1).reshape(-1, 3) * stride
    coords = [np.c_[np.full(len(cells), b), cells][rng.random(len(cells)) <= keep] for b in range(scans)]
    return sparse.site_set(np.concatenate(coords).astype(np.int32), stride=stride, num_scans=scans)


def blocks_of(sites, capacity=None, **how):
    padded_sites = sparse.pad_sites(sites, capacity or len(sites) + 5)
    return sparse.pad_map(sparse.submanifold_neighbors(sites), padded_sites, padded_sites, tile_size=16, **how)


def test_matrices_compute_a_correlation():
    output, kernel, inputs = winograd_matrices()
    rng = np.random.default_rng(0)
    d, g = rng.normal(size=6), rng.normal(size=3)
    np.testing.assert_allclose(output @ ((kernel @ g) * (inputs @ d)), np.correlate(d, g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scans", [1, 3])
def test_blocks_hold_every_site_once_and_its_neighbourhood(scans):
    sites = random_sites((70, 0, 50)[:scans], stride=4, reach=9)
    kmap = blocks_of(sites, blocks="always")
    blocks, n = kmap.blocks, len(sites)
    used = blocks.rows[: int(blocks.count)].transpose(0, 4, 1, 2, 3).reshape(-1, TILE, TILE, TILE)
    inner = used[:, 1 : 1 + BLOCK, 1 : 1 + BLOCK, 1 : 1 + BLOCK]
    np.testing.assert_array_equal(np.sort(inner[inner < kmap.in_capacity]), np.arange(n))
    coords = sites.coords
    for block in used:
        own = np.argwhere(block[1:-1, 1:-1, 1:-1] < kmap.in_capacity)
        if not len(own):  # fills the last chunk of a scan
            assert (block == kmap.in_capacity).all()
            continue
        z, y, x = own[0] + 1
        scan, *first = coords[block[z, y, x]]
        cells = np.stack(np.meshgrid(*[np.arange(TILE)] * 3, indexing="ij"), -1)[..., ::-1].reshape(-1, 3)
        at = np.array(first) + 4 * (cells - [x, y, z])
        rows = sites.lookup(np.c_[np.full(len(at), scan), at].astype(np.int32))
        np.testing.assert_array_equal(block.reshape(-1), np.where(rows >= 0, rows, kmap.in_capacity))
    assert (blocks.rows[int(blocks.count) :] == kmap.in_capacity).all()


def test_a_chunk_is_of_one_scan():
    kmap = blocks_of(dense_sites(scans=2, size=18), blocks="always")
    scan = kmap.inputs.coords[:, 0]
    for chunk, b in zip(kmap.blocks.rows[: int(kmap.blocks.count)], kmap.blocks.scan, strict=False):
        assert set(scan[chunk[chunk < kmap.in_capacity]]) == {b}
    assert int(kmap.blocks.count) == 2 * -(-(6**3) // CHUNK)


def test_blocks_are_used_where_they_pay():
    dense, thin = dense_sites(size=24), dense_sites(size=24, keep=0.15)
    assert int(blocks_of(dense, blocks="auto").blocks.count) > 0
    assert int(blocks_of(thin, blocks="auto").blocks.count) == 0
    assert int(blocks_of(random_sites((0,)), blocks="auto").blocks.count) == 0


def test_blocks_of_other_maps_raise():
    sites = random_sites((40,))
    tables = [
        sparse.submanifold_neighbors(sites, 5),
        sparse.submanifold_neighbors(sites, 3, dilation=2),
        sparse.submanifold_neighbors(sites, (27, 1, 1)),
        sparse.strided_neighbors(sites, sparse.downsample(sites, 2), 3),
    ]
    for table in tables:
        assert not fits_blocks(table)
        inputs, outputs = (sparse.pad_sites(s, len(s)) for s in (table.inputs, table.outputs))
        with pytest.raises(ValueError, match="blocks serve submanifold maps"):
            sparse.pad_map(table, inputs, outputs, blocks="auto")


def test_one_program_serves_dense_and_sparse_maps():
    """Blocks or tiles are chosen by the coordinates, at run time; both equal the definition, with their gradients."""
    sites = [dense_sites(size=24), dense_sites(size=24, keep=0.15)]
    capacity = max(map(len, sites)) + 5
    rng = np.random.default_rng(1)
    kernels = jnp.asarray(rng.normal(size=(1, 27, 4, 3)), jnp.float32)
    traced = []

    def both(algorithm, kmap, x, weight):
        traced.append(algorithm)
        y, pull = jax.vjp(lambda x, w: sparse.convolve(x, w, kmap, algorithm=algorithm), x, kernels)
        return y, *pull(weight)

    program = jax.jit(both, static_argnums=0)
    used = []
    for s in sites:
        kmap = blocks_of(s, capacity, blocks="auto")
        used.append(int(kmap.blocks.count) > 0)
        x, weight = (sparse.pad_rows(rng.normal(size=(len(s), c)).astype(np.float32), capacity) for c in (4, 3))
        for ours, expected in zip(program("auto", kmap, x, weight), program("gather", kmap, x, weight), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert used == [True, False]
    assert traced == ["auto", "gather"]


def test_blocks_that_do_not_pay_never_give_zeros():
    """Forced or not, a map that leaves its blocks unused is convolved by its tiles, or without these by its table."""
    sites = dense_sites(size=24, keep=0.15)
    kmap = blocks_of(sites, blocks="auto")
    assert int(kmap.blocks.count) == 0
    x, kernels = jnp.ones((kmap.in_capacity, 2)), jnp.ones((1, 27, 2, 2))
    expected = sparse.convolve(x, kernels, kmap, algorithm="gather")
    np.testing.assert_allclose(sparse.convolve(x, kernels, kmap, algorithm="winograd"), expected, rtol=1e-6)
    rows = sparse.pad_sites(sites, kmap.in_capacity)
    bare = sparse.pad_map(sparse.submanifold_neighbors(sites), rows, rows, blocks="auto")
    for algorithm in ("winograd", "auto"):
        np.testing.assert_allclose(sparse.convolve(x, kernels, bare, algorithm=algorithm), expected, rtol=1e-6)


def test_permuted_scans_give_permuted_outputs():
    """The transforms of one scan never meet another's: swapping two scans swaps the rows, to the last bit."""
    a, b = dense_sites(size=9, seed=1, keep=0.9), dense_sites(size=9, seed=2, keep=0.9)

    def joined(first, second):
        coords = [first.coords, second.coords + np.array([[1, 0, 0, 0]], np.int32)]
        return sparse.site_set(np.concatenate(coords), stride=2, num_scans=2)

    rng = np.random.default_rng(0)
    xa, xb = (rng.normal(size=(len(s), 3)).astype(np.float32) for s in (a, b))
    kernels = jnp.asarray(rng.normal(size=(1, 27, 3, 3)), jnp.float32)
    out = []
    for s, x in ((joined(a, b), np.concatenate([xa, xb])), (joined(b, a), np.concatenate([xb, xa]))):
        kmap, rows = blocks_of(s, blocks="always"), jnp.asarray(sparse.pad_rows(x, len(x) + 5))
        out.append(np.asarray(sparse.convolve(rows, kernels, kmap, algorithm="winograd"))[: len(x)])
    np.testing.assert_array_equal(out[0], np.concatenate([out[1][len(b) :], out[1][: len(b)]]))


def test_padding_is_never_read():
    kmap = padded(sparse.submanifold_neighbors(random_sites((60, 30))))
    x = np.full((kmap.in_capacity, 2), np.nan, np.float32)
    x[: int(kmap.n_in)] = 1
    y = sparse.convolve(jnp.asarray(x), jnp.ones((1, 27, 2, 2)), kmap, algorithm="winograd")
    assert np.isfinite(y).all() and (np.asarray(y)[int(kmap.n_out) :] == 0).all()
