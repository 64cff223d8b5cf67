"""Convolution on accelerators: columns of neighbours (im2col), and batched tiles of pairs.

Sparse convolution as one matmul over all offsets, for accelerators and nearly dense maps.

    y = columns @ W,   columns[o] = [x[neighbors[0, o]], ..., x[neighbors[V-1, o]]]   [N_out, V * Cin]

The work is that of a full kernel on every site, so it pays where most neighbours exist. Rows go in chunks of a bounded
size; trip counts are static and no features are scattered in either direction.

Sparse convolution by pair lists, for accelerators: products of the pairs there are, then a gather-sum.

    P[t] = x[in_rows[t]] @ W[kernel of tile t]          one batched matmul over tiles of pairs
    y[o] = sum_k P[position of the pair (k, o)]         V gathers and adds that XLA fuses into one pass

Accelerators lose more to scatter-adds of features and to loops whose length the host must ask for than to a few empty
tiles: trip counts are static, no features are scattered in either direction, and the work is that of the tiles' whole
capacity, in use or not. `limit_tiles` cuts a capacity down to what a bucket needs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_cpu import kernel_index
from h2a2_jax.sparse.conv_parts import ConvOptions, per_row, take_rows, zeros_varying_as
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles, directions

CHUNK_BYTES = 256 * 2**20
"""Largest size of the columns that exist at once."""


def im2col_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """Arguments and result as in `convolve`, in the compute type; sums in `options.sum_type`."""
    return _product(x, w, gamma, scan_set, jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan), options)


def im2col_backward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    cotangent: Array,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients of x, w and gamma."""
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g = jnp.where(valid, cotangent, 0).astype(x.dtype)
    dx = _product(g, w.swapaxes(2, 3), gamma, scan_set, inverse_table(kmap), jnp.asarray(kmap.in_scan), options)
    dw, dgamma = _kernel_gradients(x, g, w, gamma, scan_set, kmap, options)
    if gamma is not None and dgamma is not None:
        dgamma = dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dw.astype(options.kernel_type), dgamma


def inverse_table(kmap: KernelMap) -> Int[Array, "v n_in"]:
    """Output row that each input row reaches through each offset, N_out where none."""
    neighbors = jnp.asarray(kmap.neighbors)
    volume, n_out = neighbors.shape
    if kmap.kind == "submanifold" and volume % 2:
        return neighbors[::-1]
    outs = jnp.broadcast_to(jnp.arange(n_out, dtype=jnp.int32), neighbors.shape)
    rows = jnp.where(neighbors < kmap.in_capacity, neighbors, kmap.in_capacity + outs)  # distinct, also where dropped
    empty = jnp.full((volume, kmap.in_capacity), n_out, jnp.int32)
    return empty.at[jnp.arange(volume)[:, None], rows].set(outs, mode="drop", unique_indices=True)


def _product(
    rows: Array, w: Array, gamma: Array | None, scan_set: Array | None, table: Array, scan: Array, options: ConvOptions
) -> Float[Array, "n b"]:
    """sum_k rows[table[k]] @ W[k], where `scan` says whose kernels an output row uses."""
    volume, a, b = w.shape[1:]
    chosen = _chosen_sets(gamma, scan_set)
    flat = w.reshape(len(w), volume * a, b)

    def of_chunk(chunk: tuple[Array, Array, Array]) -> Array:
        table, scan, _ = chunk
        columns = _columns(rows, table)
        if chosen is None:
            return options.dot(columns.reshape(-1, volume * a), flat[0])
        masks = _masks(chosen, len(w), scan, rows.dtype)
        parts = [options.dot((columns * masks[:, s, :, None]).reshape(-1, volume * a), flat[s]) for s in range(len(w))]
        return sum(parts[1:], parts[0])

    return lax.map(of_chunk, _chunks(table, scan, rows)).reshape(-1, b)[: table.shape[1]]


def _kernel_gradients(
    x: Array, g: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> tuple[Array, Array | None]:
    """Gradients of the kernels and of gamma."""
    sets, volume, a, b = w.shape
    chosen = _chosen_sets(gamma, scan_set)
    g = jnp.concatenate([g, jnp.zeros((1, b), g.dtype)])  # rows past the end of the last chunk read the zero

    def add_chunk(total: tuple, chunk: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        table, scan, at = chunk
        columns, grads = _columns(x, table), g[at]
        if chosen is None or scan_set is None:
            return (total[0] + _outer(columns, grads, options)[None], None), None
        masks = _masks(chosen, sets, scan, x.dtype)
        dw = jnp.stack([_outer(columns * masks[:, s, :, None], grads, options) for s in range(sets)])
        # <dW[b, k], W_0[k] - W_set[k]>, taken row by row before it is summed over the rows of a scan.
        own = per_row(scan_set, scan)
        dots = jnp.zeros((len(scan), volume), options.sum_type)
        for s in range(1, sets):
            difference = (w[0] - w[s]).reshape(volume * a, b)
            back = options.dot(grads, difference.T).reshape(-1, volume, a)
            dots = dots + jnp.where((own == s)[:, None], (back * columns).sum(2, dtype=options.sum_type), 0)
        of_scan = jax.nn.one_hot(scan, kmap.num_scans, axis=0, dtype=options.sum_type)
        return (total[0] + dw, total[1] + jnp.matmul(of_scan, dots, precision=lax.Precision.HIGHEST)), None

    zeros = partial(zeros_varying_as, dtype=options.sum_type, like=(x, w, gamma, g, kmap.n_out))
    kernels = zeros((1 if chosen is None else sets, volume, a, b))
    start = kernels, None if chosen is None else zeros((kmap.num_scans, volume))
    chunks = _chunks(jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan), x)
    (dw, dgamma), _ = lax.scan(add_chunk, start, chunks)
    if chosen is None or scan_set is None:
        return jnp.concatenate([dw, jnp.zeros((sets - 1, *dw.shape[1:]), dw.dtype)]), None
    return dw, dgamma


def _chunks(table: Array, scan: Array, rows: Array) -> tuple[Int[Array, "c v m"], Int[Array, "c m"], Int[Array, "c m"]]:
    """Output rows in chunks of bounded size: their table, their scans, and their index (past the end: the first)."""
    volume, n = table.shape
    chunk = max(1, CHUNK_BYTES // max(1, volume * rows.shape[1] * rows.dtype.itemsize))
    count = max(1, -(-n // chunk))
    chunk = -(-n // count)  # equal chunks, little padding
    more = count * chunk - n
    tables = jnp.pad(table, ((0, 0), (0, more)), constant_values=len(rows)).reshape(volume, count, chunk)
    scans = jnp.pad(scan, (0, more), constant_values=jnp.iinfo(jnp.int32).max).reshape(count, chunk)
    return tables.swapaxes(0, 1), scans, jnp.minimum(jnp.arange(count * chunk), n).reshape(count, chunk)


def _masks(chosen: Int[Array, "b v"], sets: int, scan: Array, dtype: Any) -> Float[Array, "n s v"]:
    """1 where a row's scan uses a kernel of the stack at an offset, else 0; 0 on padding."""
    return per_row(jax.nn.one_hot(chosen, sets, axis=1, dtype=dtype), scan)


def _columns(rows: Array, table: Array) -> Float[Array, "n v a"]:
    return take_rows(rows, table.T)


def _outer(columns: Array, grads: Array, options: ConvOptions) -> Float[Array, "v a b"]:
    return jnp.einsum(
        "nva,nb->vab", columns, grads, precision=options.precision, preferred_element_type=options.sum_type
    )


def _chosen_sets(gamma: Array | None, scan_set: Array | None) -> Int[Array, "b v"] | None:
    """Kernel of the stack that each (scan, offset) uses; None if it is always 0."""
    if gamma is None or scan_set is None:
        return None
    return jnp.where(gamma >= 0.5, 0, scan_set[:, None]).astype(jnp.int32)


TILE_CHUNK_BYTES = 256 * 2**20
"""Largest size of the gathered rows and kernels that exist at once."""
_NOWHERE = np.iinfo(np.int32).max
_UNROLL = 27


def pair_work(kernel_map: KernelMap) -> float:
    """Products of "pairs" as a share of those of a full kernel on every output row; static. 1 or more without tiles."""
    tiles = kernel_map.tiles
    if tiles is None:
        return 1.0
    products = tiles.in_rows.shape[-2] * tiles.in_rows.shape[-1] * (2 if tiles.mirrored else 1)
    return products / max(1, kernel_map.kernel_volume * kernel_map.out_capacity)


def pairs_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """Arguments and result as in `convolve`, in the compute type; needs `kmap.tiles`."""
    lists = _lists(kmap)
    index = kernel_index(gamma, scan_set, kmap)[lists.scan, lists.offset]
    stack = w.reshape(-1, *w.shape[2:])

    def multiply(chunk: tuple[Array, Array]) -> Array:
        source, index = chunk
        return options.dot(take_rows(x, source), stack[index])

    products = lax.map(multiply, _tile_chunks((lists.source, index), x, w))
    return _gather_sum(products, _positions(lists.target, lists.offset, kmap.kernel_volume, kmap.out_capacity))


def pairs_backward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    cotangent: Array,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients of x, w and gamma."""
    volume, lists = kmap.kernel_volume, _lists(kmap)
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g = jnp.where(valid, cotangent, 0).astype(x.dtype)
    index = kernel_index(gamma, scan_set, kmap)[lists.scan, lists.offset]
    stack = w.reshape(-1, *w.shape[2:])
    transposed = stack.swapaxes(1, 2)
    kernels = volume if gamma is None else len(stack)

    def multiply(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        source, target, index, offset, scan = chunk
        x_s, g_t = take_rows(x, source), take_rows(g, target)
        dw = _tile_outer("ctm,ctn->cmn", x_s, g_t, options)
        return _add_by_kernel(carry, dw, index, offset, scan), options.dot(g_t, transposed[index])

    def _add_by_kernel(carry: tuple, dw: Array, index: Array, offset: Array, scan: Array) -> tuple:
        """Sums over tiles, as matmuls with 0 and 1: a handful of products beside those of the tiles, and no atomics."""
        dstack, dgamma = carry
        of_kernel = jax.nn.one_hot(index, kernels, axis=0, dtype=dw.dtype)
        dstack = dstack + _exact(of_kernel, dw.reshape(len(dw), -1)).reshape(dstack.shape)
        if dgamma is None or scan_set is None:
            return dstack, None
        difference = stack[offset] - stack[scan_set[scan] * volume + offset]
        slope = (dw * difference).sum((1, 2), dtype=dw.dtype)
        of_scan = jax.nn.one_hot(scan, kmap.num_scans, axis=0, dtype=dw.dtype)
        return dstack, dgamma + _exact(of_scan * slope, jax.nn.one_hot(offset, volume, dtype=dw.dtype))

    zeros = partial(zeros_varying_as, dtype=options.sum_type, like=(x, w, gamma, scan_set, g, kmap.n_out))
    start = zeros((kernels, *w.shape[2:])), None if gamma is None else zeros((kmap.num_scans, volume))
    chunks = _tile_chunks((lists.source, lists.target, index, lists.offset, lists.scan), x, w)
    (dstack, dgamma), products = lax.scan(multiply, start, chunks)
    dx = _gather_sum(products, _positions(lists.source, lists.offset, volume, kmap.in_capacity))
    dw = jnp.concatenate([dstack, jnp.zeros((len(stack) - kernels, *dstack.shape[1:]), dstack.dtype)]).reshape(w.shape)
    if gamma is not None and dgamma is not None:
        dgamma = dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dw.astype(options.kernel_type), dgamma


@dataclass(frozen=True)
class _Lists:
    """Tiles that each go one way: int32 rows [C, T] to read and to write, offset [C] and scan [C].

    Of mirrored tiles those of the way back follow, in the same order.
    """

    source: Array
    target: Array
    offset: Array
    scan: Array


def _lists(kmap: KernelMap) -> _Lists:
    assert kmap.tiles is not None
    tiles: PairTiles = jax.tree.map(jnp.asarray, kmap.tiles)
    ways = directions(tiles, slice(None), kmap.kernel_volume)
    return _Lists(
        jnp.concatenate([way.source for way in ways]),
        jnp.concatenate([way.target for way in ways]),
        jnp.concatenate([way.offset for way in ways]),
        jnp.concatenate([tiles.scan for _ in ways]),
    )


def _tile_chunks(parts: tuple[Array, ...], x: Array, w: Array) -> tuple[Array, ...]:
    """Lists [C, ...] cut into [chunks, tiles, ...] of bounded size; places past the end read and write no row."""
    tiles, pairs = parts[0].shape
    channels, kernel = w.shape[2] + w.shape[3], w.shape[2] * w.shape[3]
    chunk = max(1, TILE_CHUNK_BYTES // max(1, (pairs * channels + 2 * kernel) * x.dtype.itemsize))
    count = max(1, -(-tiles // chunk))
    chunk = -(-tiles // count)
    more = count * chunk - tiles

    def cut(part: Array) -> Array:
        empty = _NOWHERE if part.ndim == 2 else 0
        padded = jnp.pad(part, ((0, more), *[(0, 0)] * (part.ndim - 1)), constant_values=empty)
        return padded.reshape(count, chunk, *part.shape[1:])

    return tuple(cut(part) for part in parts)


def _positions(of_pairs: Int[Array, "c t"], offset: Int[Array, " c"], volume: int, rows: int) -> Int[Array, "v n"]:
    """Place among the products of the pair of each (offset, row), `_NOWHERE` where there is none.

    Made of nothing but the map: XLA keeps one copy for all convolutions of a program that share a map.
    """
    place = jnp.arange(of_pairs.size, dtype=jnp.int32).reshape(of_pairs.shape)
    row = jnp.where(of_pairs < rows, of_pairs, rows + place)  # distinct, also where dropped
    empty = jnp.full((volume, rows), _NOWHERE, jnp.int32)
    return empty.at[offset[:, None], row].set(place, mode="drop", unique_indices=True)


def _gather_sum(products: Float[Array, "*chunks t c"], positions: Int[Array, "v n"]) -> Float[Array, "n c"]:
    """sum_k products[positions[k]], unrolled: one pass over the output."""
    products = products.reshape(-1, products.shape[-1])

    def add_offset(total: Array, at: Array) -> tuple[Array, None]:
        return total + take_rows(products, at), None

    shape = positions.shape[1], products.shape[1]
    total = zeros_varying_as(shape, products.dtype, (products, positions))
    return lax.scan(add_offset, total, positions, unroll=min(len(positions), _UNROLL))[0]


def _tile_outer(formula: str, a: Array, b: Array, options: ConvOptions) -> Array:
    return jnp.einsum(formula, a, b, precision=options.precision, preferred_element_type=options.sum_type)


def _exact(a: Array, b: Array) -> Array:
    """Matmul whose only purpose is to add: in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
