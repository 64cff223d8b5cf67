"""Convolution on accelerators: columns of neighbours ("im2col") and batched tiles of pairs ("pairs").

Accelerators lose more to scatter-adds of features, and to loops of a dynamic length, than to some wasted products. In
both algorithms trip counts are static and no features are scattered in either direction; both work in chunks of a
bounded size.

"im2col" is one matmul over all offsets. Its work is that of a full kernel on every site, so it pays where most
neighbours exist:

    y = columns @ W,   columns[o] = [x[neighbors[0, o]], ..., x[neighbors[V-1, o]]]   [N_out, V * Cin]

Both gradients come from one set of columns, those of the cotangent by the inverse table: dx = columns @ W^T, and
dW^T = x^T @ columns. Where scans use different kernels, a chunk holds rows of one scan: each scan's kernel is made
once, and every row is multiplied once.

"pairs" multiplies the pairs there are, then sums the products of each row. Its work is the whole capacity of the tiles,
in use or not; `limit_tiles` cuts a capacity down to the need of a bucket:

    P[t] = x[in_rows[t]] @ W[kernel of tile t]          one batched matmul over tiles of pairs
    y[o] = sum_k P[position of the pair (k, o)]         V gathers and adds that XLA fuses into one pass

Products P are kept in the compute type and summed in float32: kept wider, they would be most of the traffic.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import (
    ConvOptions,
    Gradients,
    gain,
    inverse_table,
    kernel_index,
    kernel_masks,
    mask_cotangent,
    split_by_kernel,
)
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles, directions
from h2a2_jax.sparse.row_ranges import RowRanges, ranges_of_scans
from h2a2_jax.sparse.sites import Sites
from h2a2_jax.sparse.xla_cpu import take_rows, zeros_varying_as

CHUNK_BYTES = 256 * 2**20
"""Largest size of the gathered rows that exist at once: columns of "im2col", rows and kernels of "pairs"."""
_NOWHERE = np.iinfo(np.int32).max
"""Index past the end of every array."""
SCAN_ROWS = 4096
"""Most rows in a chunk of one scan."""
_UNROLL = 27
"""Offsets in one body of the gather-sum: a 3^3 kernel is one pass."""


def _equal_chunks(total: int, size: int) -> tuple[int, int]:
    """Number and length of equal chunks that cover `total` entries of `size` bytes in `CHUNK_BYTES` each."""
    most = max(1, CHUNK_BYTES // max(1, size))
    count = max(1, -(-total // most))
    return count, -(-total // count)


# ---------------------------------------------------------------- im2col


def im2col_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "im2col"; see `conv_parts` for arguments and result."""
    chunks = _row_chunks(jnp.asarray(kmap.neighbors), kmap.outputs, x, gamma)
    kernels = _kernels_of_scans(w, gamma)

    def multiply(chunk: _Rows) -> Array:
        return options.einsum("cmk,ckb->cmb", _columns(x, chunk), kernels[chunk.scan])

    return _in_order(lax.map(multiply, chunks), chunks, kmap.outputs, gamma)


def im2col_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "im2col"."""
    volume, a, b = w.shape[1:]
    g = cotangent.astype(x.dtype)  # the inverse table names no row of padding
    chunks = _row_chunks(inverse_table(kmap), kmap.inputs, g, gamma)
    kernels = _kernels_of_scans(w.swapaxes(2, 3), gamma)
    scans = len(kernels)

    def multiply(total: Array, chunk: _Rows) -> tuple[Array, Array]:
        columns = _columns(g, chunk)
        dx = options.einsum("cmk,cka->cma", columns, kernels[chunk.scan])
        dw = options.einsum("cma,cmk->cak", take_rows(x, chunk.rows), columns)
        if scans == 1:
            return total + dw.sum(0)[None], dx
        of_scan = jax.nn.one_hot(chunk.scan, scans, axis=0, dtype=dw.dtype)
        return total + _add_up(of_scan, dw.reshape(len(dw), -1)).reshape(total.shape), dx

    start = zeros_varying_as((scans, a, volume * b), options.sum_type, (x, w, gamma, g), kmap.n_out)
    total, dx = lax.scan(multiply, start, chunks)
    dx = _in_order(dx, chunks, kmap.inputs, gamma).astype(x.dtype)
    dw, dgamma = split_by_kernel(total.reshape(scans, a, volume, b).swapaxes(1, 2), w, gamma)
    return dx, dw.astype(options.kernel_type), dgamma


class _Rows(NamedTuple):
    """Rows to write in chunks of one kernel each.

    Attributes:
        table: int32 [chunks, c, V, m], rows to read; past the end where there is none.
        rows: int32 [chunks, c, m], rows to write; past the end of every array for places without one.
        scan: int32 [chunks, c], index of the kernel that the chunk uses.
    """

    table: Array
    rows: Array
    scan: Array


def _row_chunks(table: Int[Array, "v n"], sites: Sites, rows: Array, gamma: Array | None) -> _Rows:
    """The sites of a table's columns in chunks of bounded size, without padding; of one scan each with gamma."""
    volume, n = table.shape
    size = volume * rows.shape[1] * rows.dtype.itemsize
    if not _by_scan(sites, gamma):
        count, length = _equal_chunks(n, size)
        start = jnp.arange(count, dtype=jnp.int32) * length
        ranges = RowRanges(start, jnp.minimum(start + length, n), jnp.zeros_like(start))
        each = 1
    else:
        length = _rows_of_one_scan(n, sites.num_scans)
        ranges = ranges_of_scans(jnp.asarray(sites.scan), sites.num_scans, length)
        count, each = _equal_chunks(len(ranges.start), length * size)
        ends = (0, count * each - len(ranges.start))
        ranges = RowRanges(*(jnp.pad(part, ends) for part in ranges))  # empty
    place = ranges.start[:, None] + jnp.arange(length, dtype=jnp.int32)
    own = (place < ranges.end[:, None]) & (place < sites.n)
    sources = jnp.where(own, table[:, jnp.minimum(place, n - 1)], _NOWHERE).swapaxes(0, 1)
    kernel = jnp.minimum(ranges.scan, sites.num_scans - 1)  # padding has no neighbours
    parts = sources, jnp.where(own, place, _NOWHERE), kernel
    return _Rows(*(part.reshape(count, each, *part.shape[1:]) for part in parts))


def _by_scan(sites: Sites, gamma: Array | None) -> bool:
    """Return True if scans use different kernels."""
    return gamma is not None and sites.num_scans > 1


def _rows_of_one_scan(n: int, num_scans: int) -> int:
    """Rows of a chunk: a kernel is read again for each chunk, and a scan's last chunk is not full."""
    return min(SCAN_ROWS, max(1, -(-n // (256 * num_scans))) * 64)


def _columns(rows: Array, chunk: _Rows) -> Float[Array, "c m k"]:
    """Rows at all offsets, side by side."""
    columns = take_rows(rows, chunk.table.swapaxes(1, 2))
    return columns.reshape(*columns.shape[:2], -1)


def _in_order(
    results: Float[Array, "chunks c m b"], chunks: _Rows, sites: Sites, gamma: Array | None
) -> Float[Array, "n b"]:
    """Results of all chunks, in the order of the rows; zero on padding."""
    n, results = sites.capacity, results.reshape(-1, results.shape[-1])
    if not _by_scan(sites, gamma):
        return results[:n]
    rows = chunks.rows.reshape(-1)
    place = jnp.arange(len(rows), dtype=jnp.int32)
    index = jnp.where(rows < n, rows, n + place)  # distinct, also where dropped
    position = jnp.full(n, _NOWHERE, jnp.int32).at[index].set(place, mode="drop", unique_indices=True)
    return take_rows(results, position)


def _kernels_of_scans(w: Array, gamma: Array | None) -> Float[Array, "b k c_out"]:
    """Kernel that each scan uses at all offsets, [B, V * a, b]; one without gamma."""
    kernels = w[:1]
    if gamma is not None:
        masks = kernel_masks(gamma, w, w.dtype)[..., None, None]
        kernels = masks[:, :, 0] * w[0] + (masks[:, :, 1] * w[1] if len(w) == 2 else 0)
    return kernels.reshape(len(kernels), -1, w.shape[-1])


# ---------------------------------------------------------------- pairs


def pair_work(kernel_map: KernelMap) -> float:
    """Products of "pairs" as a share of those of a full kernel on every output row; static. 1 or more without tiles."""
    tiles = kernel_map.tiles
    if tiles is None:
        return 1.0
    products = tiles.in_rows.shape[-2] * tiles.in_rows.shape[-1] * (2 if tiles.mirrored else 1)
    return products / max(1, kernel_map.kernel_volume * kernel_map.out_capacity)


def pairs_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "pairs", which needs `kmap.tiles`; see `conv_parts` for arguments and result."""
    source, target, offset, scan = _split_ways(kmap)
    index = kernel_index(gamma, w, kmap)[scan, offset]
    weights = gamma[scan, offset] if gamma is not None and len(w) == 1 else None
    stack = w.reshape(-1, *w.shape[2:])

    def multiply(chunk: tuple[Array, Array]) -> Array:
        source, index = chunk
        return options.dot(take_rows(x, source), stack[index]).astype(x.dtype)

    products = lax.map(multiply, _tile_chunks((source, index), x, w))
    positions = _positions(target, offset, kmap.kernel_volume, kmap.out_capacity)
    return _gather_sum(_weigh(products, weights), positions, options.sum_type)


def pairs_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "pairs"."""
    volume = kmap.kernel_volume
    source, target, offset, scan = _split_ways(kmap)
    g = mask_cotangent(cotangent, kmap, x.dtype)
    index = kernel_index(gamma, w, kmap)[scan, offset]
    weights = gamma[scan, offset] if gamma is not None and len(w) == 1 else None
    stack = w.reshape(-1, *w.shape[2:])
    transposed, gained = stack.swapaxes(1, 2), gain(w)

    def multiply(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        source, target, index, offset, scan = chunk
        x_s, g_t = take_rows(x, source), take_rows(g, target)
        dw = options.einsum("ctm,ctn->cmn", x_s, g_t)
        change = options.dot(g_t, transposed[index]).astype(x.dtype)
        return add_by_kernel(carry, dw, index, offset, scan), change

    def add_by_kernel(carry: tuple, dw: Array, index: Array, offset: Array, scan: Array) -> tuple:
        """Sums over tiles, as matmuls with 0 and 1: a handful of products beside those of the tiles, and no atomics."""
        dstack, dgamma = carry
        of_kernel = jax.nn.one_hot(index, len(stack), axis=0, dtype=dw.dtype)
        if gamma is not None and weights is not None:
            of_kernel = of_kernel * gamma[scan, offset].astype(dw.dtype)
        dstack = dstack + _add_up(of_kernel, dw.reshape(len(dw), -1)).reshape(dstack.shape)
        if dgamma is None:
            return dstack, None
        slope = (dw * gained[offset]).sum((1, 2), dtype=dw.dtype)
        of_scan = jax.nn.one_hot(scan, kmap.num_scans, axis=0, dtype=dw.dtype)
        return dstack, dgamma + _add_up(of_scan * slope, jax.nn.one_hot(offset, volume, dtype=dw.dtype))

    zeros = partial(zeros_varying_as, dtype=options.sum_type, like=(x, w, gamma, g, kmap.n_out))
    start = zeros(stack.shape), None if gamma is None else zeros((kmap.num_scans, volume))
    chunks = _tile_chunks((source, target, index, offset, scan), x, w)
    (dstack, dgamma), products = lax.scan(multiply, start, chunks)
    dx = _gather_sum(_weigh(products, weights), _positions(source, offset, volume, kmap.in_capacity), options.sum_type)
    if gamma is not None and dgamma is not None:
        dgamma = dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dstack.reshape(w.shape).astype(options.kernel_type), dgamma


def _weigh(products: Float[Array, "*chunks t c"], weights: Float[Array, " n"] | None) -> Float[Array, "*rows t c"]:
    """Products of each tile times its weight; tiles past the end of the lists are not read."""
    if weights is None:
        return products
    tiles = products.reshape(-1, *products.shape[-2:])
    return tiles * jnp.pad(weights, (0, len(tiles) - len(weights)))[:, None, None].astype(products.dtype)


def _split_ways(kmap: KernelMap) -> tuple[Int[Array, "c t"], Int[Array, "c t"], Int[Array, " c"], Int[Array, " c"]]:
    """Tiles whose pairs all go one way: rows to read, rows to write, offset and scan.

    The ways back of mirrored tiles follow those there, in the same order.
    """
    assert kmap.tiles is not None
    tiles: PairTiles = jax.tree.map(jnp.asarray, kmap.tiles)
    ways = directions(tiles, slice(None), kmap.kernel_volume)
    source, target, offset = (
        jnp.concatenate([getattr(way, part) for way in ways]) for part in ("source", "target", "offset")
    )
    return source, target, offset, jnp.concatenate([tiles.scan for _ in ways])


def _tile_chunks(parts: tuple[Array, ...], x: Array, w: Array) -> tuple[Array, ...]:
    """Lists [C, ...] cut into [chunks, tiles, ...]; places past the end read and write no row."""
    tiles, pairs = parts[0].shape
    channels, kernel = w.shape[2] + w.shape[3], w.shape[2] * w.shape[3]
    count, length = _equal_chunks(tiles, (pairs * channels + 2 * kernel) * x.dtype.itemsize)

    def cut(part: Array) -> Array:
        empty = _NOWHERE if part.ndim == 2 else 0
        ends = ((0, count * length - tiles), *[(0, 0)] * (part.ndim - 1))
        return jnp.pad(part, ends, constant_values=empty).reshape(count, length, *part.shape[1:])

    return tuple(cut(part) for part in parts)


def _positions(rows: Int[Array, "c t"], offset: Int[Array, " c"], volume: int, capacity: int) -> Int[Array, "v n"]:
    """Place among the products of the pair of each (offset, row), `_NOWHERE` where there is none.

    Computed from nothing but the map: XLA keeps one copy for all convolutions of a program that share a map.

    Args:
        rows: row of each pair.
        offset: offset of each tile.
        volume: number V of offsets.
        capacity: number of rows N.
    """
    place = jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
    row = jnp.where(rows < capacity, rows, capacity + place)  # distinct, also where dropped
    empty = jnp.full((volume, capacity), _NOWHERE, jnp.int32)
    return empty.at[offset[:, None], row].set(place, mode="drop", unique_indices=True)


def _gather_sum(products: Float[Array, "*chunks t c"], positions: Int[Array, "v n"], dtype: Any) -> Float[Array, "n c"]:
    """sum_k products[positions[k]] in a given type, unrolled: one pass over the output."""
    products = products.reshape(-1, products.shape[-1])

    def add_offset(total: Array, at: Array) -> tuple[Array, None]:
        return total + take_rows(products, at).astype(dtype), None

    total = zeros_varying_as((positions.shape[1], products.shape[1]), dtype, (products, positions))
    return lax.scan(add_offset, total, positions, unroll=min(len(positions), _UNROLL))[0]


def _add_up(a: Array, b: Array) -> Array:
    """Matmul with 0 and 1 whose only purpose is to add: in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
