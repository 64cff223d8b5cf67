"""Convolution on CPUs: one gather and one matmul an offset ("gather"), and tiles of pairs ("tiles").

"gather" multiplies every output row at every offset, neighbour or not, and scatters in neither direction. "tiles" has
the pairs of a map sorted by scan and offset and cut into tiles of T pairs; a loop over as many tiles as are in use
gathers T rows, multiplies them by one kernel, and adds them to their output rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from h2a2_jax.sparse.conv_parts import (
    ConvOptions,
    Gradients,
    gain,
    inverse_table,
    kernel_choice,
    kernel_masks,
    mask_cotangent,
    per_row,
)
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles
from h2a2_jax.sparse.xla_cpu import take_rows, zeros_varying_as

# ---------------------------------------------------------------- gather


def gather_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "gather"; see `conv_parts` for arguments and result."""
    neighbors, scan = jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan)

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        rows, kernels = take_rows(x, _row(neighbors, k)), _kernels_at(w, k, x.dtype)
        return total + _dot_by_kernel(rows, kernels, _masks(gamma, w, k, scan), options), None

    total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, x, kmap.n_out)
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]


def gather_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "gather"."""
    g = mask_cotangent(cotangent, kmap, x.dtype)
    neighbors, inverse = jnp.asarray(kmap.neighbors), inverse_table(kmap)
    in_scan, out_scan = jnp.asarray(kmap.in_scan), jnp.asarray(kmap.out_scan)

    def add_offset(dx: Array, k: Array) -> tuple[Array, tuple]:
        kernels = _kernels_at(w, k, x.dtype)
        change = _dot_by_kernel(
            take_rows(g, _row(inverse, k)), options.transpose(kernels), _masks(gamma, w, k, in_scan), options
        )
        dx = dx + change
        rows, masks = take_rows(x, _row(neighbors, k)), _masks(gamma, w, k, out_scan)
        parts = [rows] if masks is None else [rows * masks[:, s : s + 1].astype(rows.dtype) for s in range(len(w))]
        dw = jnp.stack([options.outer(part, g) for part in parts])
        if gamma is None:
            return dx, (dw, None)
        change = options.dot(rows, gain(kernels))
        return dx, (dw, jax.ops.segment_sum((change * g).sum(1), out_scan, kmap.num_scans))

    dx = zeros_varying_as(x.shape, options.sum_type, (x, g), kmap.n_out)
    dx, (dw, dgamma) = lax.scan(add_offset, dx, jnp.arange(kmap.kernel_volume))
    dgamma = None if gamma is None else dgamma.T.astype(gamma.dtype)
    return dx.astype(x.dtype), dw.swapaxes(0, 1).astype(options.kernel_type), dgamma


def _masks(gamma: Array | None, w: Array, k: Array, scan: Array) -> Array | None:
    """Weight of each kernel for each row at offset k, [N, S], zero on padding; None without gamma."""
    return None if gamma is None else per_row(kernel_masks(gamma[:, k], w, gamma.dtype), scan)


def _dot_by_kernel(rows: Array, w: Array, masks: Array | None, options: ConvOptions) -> Array:
    """Rows [N, a] times the kernel [a, b] that each row uses, of w [S, a, b]."""
    if masks is None:
        return options.dot(rows, w[0])
    parts = [options.dot(rows * masks[:, s : s + 1].astype(rows.dtype), w[s]) for s in range(len(w))]
    return sum(parts[1:], parts[0])


# ---------------------------------------------------------------- tiles


def tiles_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "tiles", which needs `kmap.tiles`; see `conv_parts` for arguments and result."""
    tiles, stack = _tiles_of(kmap), w.reshape(-1, *w.shape[2:])

    def add_turn(turn: Array, total: Array) -> Array:
        pairs = _pairs_of(tiles, turn, gamma, w)
        # A tile's missing pairs read any row: their products are dropped.
        rows = take_rows(x, pairs.source, fill=False)
        products = options.dot(rows, _row(stack, pairs.kernel).astype(x.dtype))
        if pairs.weight is not None:
            products = products * pairs.weight
        return _scatter_add(total, pairs.target, products)

    total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, x, kmap.n_out)
    return lax.fori_loop(0, _turns(tiles), add_turn, total)


def tiles_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "tiles"."""
    tiles, stack = _tiles_of(kmap), w.reshape(-1, *w.shape[2:])
    g = cotangent.astype(x.dtype)  # tiles hold no pair of a padding row

    def add_turn(turn: Array, carry: tuple) -> tuple:
        dx, dstack, dgamma = carry
        pairs = _pairs_of(tiles, turn, gamma, w)
        rows, grads = take_rows(x, pairs.source), take_rows(g, pairs.target)
        # Kernels are converted and transposed one by one: nothing of the size of all of them exists.
        transposed = options.transpose(_row(stack, pairs.kernel).astype(x.dtype))
        dw, change = options.outer(rows, grads), options.dot(grads, transposed)
        if dgamma is not None:
            gained = gain(_kernels_at(w, pairs.offset, x.dtype)).astype(dw.dtype)
            dgamma = dgamma.at[pairs.scan, pairs.offset].add(jnp.vdot(dw, gained))
        if pairs.weight is not None:
            dw, change = dw * pairs.weight, change * pairs.weight
        dstack = lax.dynamic_update_index_in_dim(dstack, _row(dstack, pairs.kernel) + dw, pairs.kernel, 0)
        return _scatter_add(dx, pairs.source, change), dstack, dgamma

    zero = zeros_varying_as((), options.sum_type, (x, g), kmap.n_out)
    zeros = [None if like is None else jnp.broadcast_to(zero, like.shape) for like in (x, stack, gamma)]
    dx, dstack, dgamma = lax.fori_loop(0, _turns(tiles), add_turn, tuple(zeros))
    dgamma = None if gamma is None else dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dstack.reshape(w.shape).astype(options.kernel_type), dgamma


class _Pairs(NamedTuple):
    """Pairs of a tile in one direction.

    Attributes:
        source: int32 [T], rows to read.
        target: int32 [T], rows to write.
        offset: int32 [], offset k from target to source.
        kernel: int32 [], kernel in the stack flattened over (kernel, offset).
        scan: int32 [], scan b.
        weight: float [], weight of the kernel; None for one.
    """

    source: Array
    target: Array
    offset: Array
    kernel: Array
    scan: Array
    weight: Array | None


def _turns(tiles: PairTiles) -> Array:
    """Number of turns of a loop over the tiles in use: two for a tile that serves two offsets."""
    return 2 * tiles.count if tiles.mirrored else tiles.count


def _pairs_of(tiles: PairTiles, turn: Array, gamma: Array | None, w: Array) -> _Pairs:
    """Pairs of a turn: of a tile, or of a mirrored tile there or back.

    Both ways share one body of the loop, which XLA compiles in half the time of two.
    """
    volume = w.shape[1]
    t = turn >> 1 if tiles.mirrored else turn
    source, target, offset, scan = (_row(a, t) for a in (tiles.in_rows, tiles.out_rows, tiles.offset, tiles.scan))
    if tiles.mirrored:
        back = (turn & 1) == 1
        centre = offset == volume // 2
        source, target = jnp.where(back, target, source), jnp.where(back == centre, target, source)
        offset = jnp.where(back, volume - 1 - offset, offset)
    kernel, weight = offset, None
    if gamma is not None:
        chosen = gamma[scan, offset]
        if len(w) == 1:
            weight = chosen
        else:
            kernel = kernel_choice(chosen) * volume + offset
    return _Pairs(source, target, offset, kernel, scan, weight)


def _kernels_at(w: Array, k: Array, dtype: Any) -> Array:
    """Kernels [S, i, o] of an offset of w [S, V, i, o], in the compute type."""
    return lax.dynamic_index_in_dim(w, k, 1, keepdims=False, allow_negative_indices=False).astype(dtype)


def _row(array: Array, index: Array) -> Array:
    return lax.dynamic_index_in_dim(array, index, keepdims=False, allow_negative_indices=False)


def _tiles_of(kmap: KernelMap) -> PairTiles:
    assert kmap.tiles is not None
    return jax.tree.map(jnp.asarray, kmap.tiles)


def _scatter_add(total: Array, rows: Array, values: Array) -> Array:
    return total.at[rows].add(values, mode="drop", unique_indices=True, wrap_negative_indices=False)
