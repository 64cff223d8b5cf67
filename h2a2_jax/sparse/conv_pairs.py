"""Sparse convolution by pair lists, for accelerators: products of the pairs there are, then a gather-sum.

    P[t] = x[in_rows[t]] @ W[kernel of tile t]          one batched matmul over tiles of pairs
    y[o] = sum_k P[position of the pair (k, o)]         V gathers and adds that XLA fuses into one pass

Accelerators lose more to scatter-adds of features and to loops whose length the host must ask for than to a few empty
tiles: trip counts are static, no features are scattered in either direction, and the work is that of the tiles' whole
capacity, in use or not. `limit_tiles` cuts a capacity down to what a bucket needs.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import ConvOptions, dot_by_set, per_row, set_masks, take_rows, zeros_varying_as
from h2a2_jax.sparse.kernel_map import KernelMap

CHUNK_BYTES = 256 * 2**20
"""Largest size of the gathered rows and kernels that exist at once."""
_NOWHERE = np.iinfo(np.int32).max
_UNROLL = 27


def limit_tiles(kernel_map: KernelMap, capacity: int) -> KernelMap:
    """The same map with room for fewer (or more) tiles; on the host (numpy arrays).

    The capacity of a new map suffices for a full kernel on every site. Algorithm "pairs" multiplies all of it, so a
    bucket of maps shares the largest number of tiles that it meets instead.

    Args:
        kernel_map: with tiles.
        capacity: tiles.

    Raises:
        ValueError: the map has no tiles, or more in use than `capacity`.
    """
    tiles = kernel_map.tiles
    if tiles is None:
        raise ValueError("the map has no tiles: build it with pad_map(..., tile_size=...).")
    if int(tiles.count) > capacity:
        raise ValueError(f"{int(tiles.count)} tiles are in use, a capacity of {capacity} does not hold them.")

    def resized(rows: np.ndarray, empty: np.ndarray | int) -> np.ndarray:
        out = np.empty((capacity, *rows.shape[1:]), rows.dtype)
        out[:] = empty
        out[: len(rows)] = rows[:capacity]
        return out

    place = np.arange(tiles.in_rows.shape[1])
    return replace(
        kernel_map,
        tiles=replace(
            tiles,
            in_rows=resized(tiles.in_rows, kernel_map.in_capacity + place),
            out_rows=resized(tiles.out_rows, kernel_map.out_capacity + place),
            offset=resized(tiles.offset, 0),
            scan=resized(tiles.scan, 0),
        ),
    )


def pair_work(kernel_map: KernelMap) -> float:
    """Products of "pairs" as a share of those of a full kernel on every output row; static. 1 or more without tiles."""
    tiles = kernel_map.tiles
    if tiles is None:
        return 1.0
    centre = kernel_map.out_capacity if tiles.mirrored else 0
    products = tiles.in_rows.shape[-2] * tiles.in_rows.shape[-1] * (2 if tiles.mirrored else 1) + centre
    return products / max(1, kernel_map.kernel_volume * kernel_map.out_capacity)


def pairs_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """Arguments and result as in `convolve`, in the compute type; needs `kmap.tiles`."""
    lists = _lists(kmap)
    index = _kernel_index(gamma, scan_set, kmap)[lists.scan, lists.offset]
    stack = w.reshape(-1, *w.shape[2:])

    def multiply(chunk: tuple[Array, Array]) -> Array:
        source, index = chunk
        return options.dot(take_rows(x, source), stack[index])

    products = lax.map(multiply, _chunks((lists.source, index), x, w))
    out = _gather_sum(products, _positions(lists, kmap.kernel_volume, kmap.out_capacity))
    if not lists.mirrored:
        return out
    valid, by_set = _centre(gamma, scan_set, kmap, w.shape[0])
    return out + jnp.where(valid, dot_by_set(x, w[:, kmap.kernel_volume // 2], by_set, options), 0)


def pairs_backward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    cotangent: Array,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients of x, w and gamma."""
    volume, lists = kmap.kernel_volume, _lists(kmap)
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g = jnp.where(valid, cotangent, 0).astype(x.dtype)
    index = _kernel_index(gamma, scan_set, kmap)[lists.scan, lists.offset]
    stack = w.reshape(-1, *w.shape[2:])
    transposed = stack.swapaxes(1, 2)
    kernels = volume if gamma is None else len(stack)

    def multiply(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        source, target, index, offset, scan = chunk
        x_s, g_t = take_rows(x, source), take_rows(g, target)
        dw = _outer("ctm,ctn->cmn", x_s, g_t, options)
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
    chunks = _chunks((lists.source, lists.target, index, lists.offset, lists.scan), x, w)
    (dstack, dgamma), products = lax.scan(multiply, start, chunks)
    dx = _gather_sum(products, _source_positions(lists, volume, kmap))
    dw = jnp.concatenate([dstack, jnp.zeros((len(stack) - kernels, *dstack.shape[1:]), dstack.dtype)]).reshape(w.shape)
    if lists.mirrored:
        dx_centre, dw_centre, dgamma_centre = _centre_backward(x, w, g, gamma, scan_set, kmap, options)
        dx, dw = dx + dx_centre, _with_centre(dw, dw_centre)
        if dgamma is not None and dgamma_centre is not None:
            dgamma = _with_centre(dgamma, dgamma_centre)
    if gamma is not None and dgamma is not None:
        dgamma = dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype), dgamma


@dataclass(frozen=True)
class _Lists:
    """Tiles that each go one way: int32 rows [C, T] to read and to write, offset [C] and scan [C].

    A mirrored list holds the tiles of the map and then, in the same order, the tiles of the way back.
    """

    source: Array
    target: Array
    offset: Array
    scan: Array
    mirrored: bool


def _lists(kmap: KernelMap) -> _Lists:
    assert kmap.tiles is not None
    tiles = jax.tree.map(jnp.asarray, kmap.tiles)
    if not tiles.mirrored:
        return _Lists(tiles.in_rows, tiles.out_rows, tiles.offset, tiles.scan, False)
    return _Lists(
        jnp.concatenate([tiles.in_rows, tiles.out_rows]),
        jnp.concatenate([tiles.out_rows, tiles.in_rows]),
        jnp.concatenate([tiles.offset, kmap.kernel_volume - 1 - tiles.offset]),
        jnp.concatenate([tiles.scan, tiles.scan]),
        True,
    )


def _kernel_index(gamma: Array | None, scan_set: Array | None, kmap: KernelMap) -> Int[Array, "b v"]:
    """Index into the stack, flattened over (set, offset), of the kernel of each (scan, offset)."""
    offsets = jnp.arange(kmap.kernel_volume, dtype=jnp.int32)
    if gamma is None or scan_set is None:
        return jnp.broadcast_to(offsets, (kmap.num_scans, kmap.kernel_volume))
    return jnp.where(gamma >= 0.5, 0, scan_set[:, None]).astype(jnp.int32) * kmap.kernel_volume + offsets


def _chunks(parts: tuple[Array, ...], x: Array, w: Array) -> tuple[Array, ...]:
    """Lists [C, ...] cut into [chunks, tiles, ...] of bounded size; places past the end read and write no row."""
    tiles, pairs = parts[0].shape
    channels, kernel = w.shape[2] + w.shape[3], w.shape[2] * w.shape[3]
    chunk = max(1, CHUNK_BYTES // max(1, (pairs * channels + 2 * kernel) * x.dtype.itemsize))
    count = max(1, -(-tiles // chunk))
    chunk = -(-tiles // count)
    more = count * chunk - tiles

    def cut(part: Array) -> Array:
        empty = _NOWHERE if part.ndim == 2 else 0
        padded = jnp.pad(part, ((0, more), *[(0, 0)] * (part.ndim - 1)), constant_values=empty)
        return padded.reshape(count, chunk, *part.shape[1:])

    return tuple(cut(part) for part in parts)


def _positions(lists: _Lists, volume: int, rows: int) -> Int[Array, "v n"]:
    """Place among the products of the pair of each (offset, row written), `_NOWHERE` where there is none.

    Made of nothing but the map: XLA keeps one copy for all convolutions of a program that share a map.
    """
    place = jnp.arange(lists.target.size, dtype=jnp.int32).reshape(lists.target.shape)
    row = jnp.where(lists.target < rows, lists.target, rows + place)  # distinct, also where dropped
    empty = jnp.full((volume, rows), _NOWHERE, jnp.int32)
    return empty.at[lists.offset[:, None], row].set(place, mode="drop", unique_indices=True)


def _source_positions(lists: _Lists, volume: int, kmap: KernelMap) -> Int[Array, "v n"]:
    """As `_positions`, of each (offset, row read)."""
    if not lists.mirrored:
        return _positions(replace(lists, target=lists.source), volume, kmap.in_capacity)
    # The pair that reads row i at offset k is the way back of the pair that writes it at offset V-1-k.
    back, half = _positions(lists, volume, kmap.out_capacity)[::-1], lists.source.size // 2
    return jnp.where(back == _NOWHERE, _NOWHERE, jnp.where(back < half, back + half, back - half))


def _gather_sum(products: Float[Array, "*chunks t c"], positions: Int[Array, "v n"]) -> Float[Array, "n c"]:
    """sum_k products[positions[k]], unrolled: one pass over the output."""
    products = products.reshape(-1, products.shape[-1])

    def add_offset(total: Array, at: Array) -> tuple[Array, None]:
        return total + take_rows(products, at), None

    shape = positions.shape[1], products.shape[1]
    total = zeros_varying_as(shape, products.dtype, (products, positions))
    return lax.scan(add_offset, total, positions, unroll=min(len(positions), _UNROLL))[0]


def _centre(gamma: Array | None, scan_set: Array | None, kmap: KernelMap, sets: int) -> tuple[Array, Array | None]:
    """Valid rows, and which kernel each uses at the centre of a submanifold kernel, where row o reads row o."""
    masks = set_masks(gamma, scan_set, sets, jnp.asarray(kmap.out_scan))
    return (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None], masks(kmap.kernel_volume // 2)


def _centre_backward(
    x: Array, w: Array, g: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> tuple[Array, Array, Array | None]:
    """Gradients through the centre: of x, of the kernels [S, Cin, Cout] and of gamma [B]."""
    valid, by_set = _centre(gamma, scan_set, kmap, w.shape[0])
    x, w = jnp.where(valid, x, 0), w[:, kmap.kernel_volume // 2]
    dx = dot_by_set(g, w.swapaxes(1, 2), by_set, options)
    if by_set is None or gamma is None or scan_set is None:
        dw = _outer("tm,tn->mn", x, g, options)[None]
        return dx, jnp.concatenate([dw, jnp.zeros((len(w) - 1, *dw.shape[1:]), dw.dtype)]), None
    masks = by_set.astype(x.dtype)
    dw = jnp.stack([_outer("tm,tn->mn", x * masks[:, s : s + 1], g, options) for s in range(len(w))])
    scan = jnp.asarray(kmap.out_scan)
    own = per_row(scan_set, scan)[:, None]
    change = sum(jnp.where(own == s, options.dot(x, w[0] - w[s]), 0) for s in range(1, len(w)))
    slope = (change * g).sum(1, dtype=options.sum_type)
    return dx, dw, _exact(jax.nn.one_hot(scan, kmap.num_scans, axis=0, dtype=options.sum_type), slope)


def _with_centre(values: Array, centre: Array) -> Array:
    """Values [B, V, ...] with those of the middle offset replaced by [B, ...]."""
    middle = values.shape[1] // 2
    return jnp.concatenate([values[:, :middle], centre[:, None], values[:, middle + 1 :]], 1)


def _outer(formula: str, a: Array, b: Array, options: ConvOptions) -> Array:
    return jnp.einsum(formula, a, b, precision=options.precision, preferred_element_type=options.sum_type)


def _exact(a: Array, b: Array) -> Array:
    """Matmul whose only purpose is to add: in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
