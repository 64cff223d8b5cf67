"""Convolution on accelerators: columns of neighbours ("im2col") and batched tiles of pairs ("pairs").

Accelerators lose more to scatter-adds of features, and to loops of a dynamic length, than to some wasted products. In
both algorithms trip counts are static and no features are scattered in either direction; both work in chunks of a
bounded size.

"im2col" is one matmul over all offsets. Its work is that of a full kernel on every site, so it pays where most
neighbours exist:

    y = columns @ W,   columns[o] = [x[neighbors[0, o]], ..., x[neighbors[V-1, o]]]   [N_out, V * Cin]

"pairs" multiplies the pairs there are, then sums the products of each row. Its work is the whole capacity of the tiles,
in use or not; `limit_tiles` cuts a capacity down to the need of a bucket:

    P[t] = x[in_rows[t]] @ W[kernel of tile t]          one batched matmul over tiles of pairs
    y[o] = sum_k P[position of the pair (k, o)]         V gathers and adds that XLA fuses into one pass
"""

from functools import partial
from typing import Any

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
    per_row,
)
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles, directions
from h2a2_jax.sparse.xla_cpu import take_rows, zeros_varying_as

CHUNK_BYTES = 256 * 2**20
"""Largest size of the gathered rows that exist at once: columns of "im2col", rows and kernels of "pairs"."""
_NOWHERE = np.iinfo(np.int32).max
"""Index past the end of every array."""
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
    return _product(x, w, gamma, jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan), options)


def im2col_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "im2col"."""
    g = mask_cotangent(cotangent, kmap, x.dtype)
    dx = _product(g, w.swapaxes(2, 3), gamma, inverse_table(kmap), jnp.asarray(kmap.in_scan), options)
    dw, dgamma = _kernel_gradients(x, g, w, gamma, kmap, options)
    if gamma is not None and dgamma is not None:
        dgamma = dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dw.astype(options.kernel_type), dgamma


def _product(
    rows: Array, w: Array, gamma: Array | None, table: Array, scan: Array, options: ConvOptions
) -> Float[Array, "n b"]:
    """sum_k rows[table[k]] @ W[k]; `scan` is that of each output row, and chooses its kernels."""
    volume, a, b = w.shape[1:]
    flat = w.reshape(len(w), volume * a, b)

    def multiply(chunk: tuple[Array, Array, Array]) -> Array:
        table, scan, _ = chunk
        columns = take_rows(rows, table.T)
        if gamma is None:
            return options.dot(columns.reshape(-1, volume * a), flat[0])
        masks = _masks(gamma, w, scan, rows.dtype)
        parts = [options.dot((columns * masks[:, s, :, None]).reshape(-1, volume * a), flat[s]) for s in range(len(w))]
        return sum(parts[1:], parts[0])

    return lax.map(multiply, _row_chunks(table, scan, rows)).reshape(-1, b)[: table.shape[1]]


def _kernel_gradients(
    x: Array, g: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions
) -> tuple[Array, Array | None]:
    """Gradients of the kernels and of gamma."""
    volume, a, b = w.shape[1:]
    g = jnp.concatenate([g, jnp.zeros((1, b), g.dtype)])  # rows past the end of the last chunk read the zero
    outer = partial(options.einsum, "nva,nb->vab")

    def add_chunk(total: tuple, chunk: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        table, scan, at = chunk
        columns, grads = take_rows(x, table.T), g[at]
        if gamma is None:
            return (total[0] + outer(columns, grads)[None], None), None
        masks = _masks(gamma, w, scan, x.dtype)
        dw = jnp.stack([outer(columns * masks[:, s, :, None], grads) for s in range(len(w))])
        # <dW[b, k], W_0[k] - W_1[k]>, taken row by row before it is summed over the rows of a scan.
        back = options.dot(grads, gain(w).reshape(volume * a, b).T).reshape(-1, volume, a)
        dots = (back * columns).sum(2, dtype=options.sum_type)
        of_scan = jax.nn.one_hot(scan, kmap.num_scans, axis=0, dtype=options.sum_type)
        return (total[0] + dw, total[1] + _add_up(of_scan, dots)), None

    zeros = partial(zeros_varying_as, dtype=options.sum_type, like=(x, w, gamma, g, kmap.n_out))
    start = zeros(w.shape), None if gamma is None else zeros((kmap.num_scans, volume))
    chunks = _row_chunks(jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan), x)
    (dw, dgamma), _ = lax.scan(add_chunk, start, chunks)
    return dw, dgamma


def _row_chunks(
    table: Array, scan: Array, rows: Array
) -> tuple[Int[Array, "c v m"], Int[Array, "c m"], Int[Array, "c m"]]:
    """Output rows in chunks: their columns of the table, their scans, and their indices (past the end: N_out)."""
    volume, n = table.shape
    count, length = _equal_chunks(n, volume * rows.shape[1] * rows.dtype.itemsize)
    more = count * length - n
    tables = jnp.pad(table, ((0, 0), (0, more)), constant_values=len(rows)).reshape(volume, count, length)
    scans = jnp.pad(scan, (0, more), constant_values=_NOWHERE).reshape(count, length)
    return tables.swapaxes(0, 1), scans, jnp.minimum(jnp.arange(count * length), n).reshape(count, length)


def _masks(gamma: Array, w: Array, scan: Array, dtype: Any) -> Float[Array, "n s v"]:
    """Weight of each kernel of the stack for each row at each offset; zero on padding."""
    return per_row(jnp.moveaxis(kernel_masks(gamma, w, dtype), -1, 1), scan)


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
        return options.dot(take_rows(x, source), stack[index])

    products = lax.map(multiply, _tile_chunks((source, index), x, w))
    products = _weigh(products, weights)
    return _gather_sum(products, _positions(target, offset, kmap.kernel_volume, kmap.out_capacity))


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
        return add_by_kernel(carry, dw, index, offset, scan), options.dot(g_t, transposed[index])

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
    products = _weigh(products, weights)
    dx = _gather_sum(products, _positions(source, offset, volume, kmap.in_capacity))
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


def _gather_sum(products: Float[Array, "*chunks t c"], positions: Int[Array, "v n"]) -> Float[Array, "n c"]:
    """sum_k products[positions[k]], unrolled: one pass over the output."""
    products = products.reshape(-1, products.shape[-1])

    def add_offset(total: Array, at: Array) -> tuple[Array, None]:
        return total + take_rows(products, at), None

    shape = positions.shape[1], products.shape[1]
    total = zeros_varying_as(shape, products.dtype, (products, positions))
    return lax.scan(add_offset, total, positions, unroll=min(len(positions), _UNROLL))[0]


def _add_up(a: Array, b: Array) -> Array:
    """Matmul with 0 and 1 whose only purpose is to add: in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
