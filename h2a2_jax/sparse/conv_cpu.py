"""Convolution on CPUs: one gather and one matmul an offset ("gather"), and tiles of pairs ("tiles").

"gather" multiplies every output row at every offset, neighbour or not, and scatters in neither direction. "tiles" has
the pairs of a map sorted by scan and offset and cut into tiles of T pairs; a loop over as many tiles as are in use
gathers T rows, multiplies them by one kernel, and adds them to their output rows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

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

# ---------------------------------------------------------------- gather


def gather_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "gather"; see `conv_parts` for arguments and result."""
    neighbors, scan = jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan)

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        rows = take_rows(x, neighbors[k])
        return total + _dot_by_kernel(rows, w[:, k], _masks(gamma, w, k, scan), options), None

    total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]


def gather_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "gather"."""
    g = mask_cotangent(cotangent, kmap, x.dtype)
    neighbors, inverse = jnp.asarray(kmap.neighbors), inverse_table(kmap)
    in_scan, out_scan = jnp.asarray(kmap.in_scan), jnp.asarray(kmap.out_scan)

    def add_offset(dx: Array, k: Array) -> tuple[Array, tuple]:
        transposed = options.transpose(w[:, k])
        dx = dx + _dot_by_kernel(take_rows(g, inverse[k]), transposed, _masks(gamma, w, k, in_scan), options)
        rows, masks = take_rows(x, neighbors[k]), _masks(gamma, w, k, out_scan)
        parts = [rows] if masks is None else [rows * masks[:, s : s + 1].astype(rows.dtype) for s in range(len(w))]
        dw = jnp.stack([options.outer(part, g) for part in parts])
        if gamma is None:
            return dx, (dw, None)
        change = options.dot(rows, gain(w[:, k]))
        return dx, (dw, jax.ops.segment_sum((change * g).sum(1), out_scan, kmap.num_scans))

    dx = zeros_varying_as(x.shape, options.sum_type, (x, w, gamma, g, kmap.n_out))
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
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    kernel, stack = kernel_index(gamma, w, kmap), w.reshape(-1, *w.shape[2:])
    weights = gamma if len(w) == 1 else None

    def add_tile(t: Array, total: Array) -> Array:
        for way in directions(tiles, t, volume):
            b = tiles.scan[t]
            products = options.dot(take_rows(x, way.source), stack[kernel[b, way.offset]])
            if weights is not None:
                products = products * weights[b, way.offset]
            total = _scatter_add(total, way.target, products)
        return total

    shape = kmap.out_capacity, w.shape[-1]
    return lax.fori_loop(0, tiles.count, add_tile, zeros_varying_as(shape, options.sum_type, (x, w, gamma, kmap.n_out)))


def tiles_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "tiles"."""
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    g = cotangent.astype(x.dtype)  # tiles hold no pair of a padding row
    kernel, stack = kernel_index(gamma, w, kmap), w.reshape(-1, *w.shape[2:])
    weights = gamma if len(w) == 1 else None
    transposed, gained = options.transpose(stack), gain(w)

    def add_tile(t: Array, carry: tuple) -> tuple:
        dx, dstack, dgamma = carry
        b = tiles.scan[t]
        for way in directions(tiles, t, volume):
            k = kernel[b, way.offset]
            rows, grads = take_rows(x, way.source), take_rows(g, way.target)
            dw, change = options.outer(rows, grads), options.dot(grads, transposed[k])
            if dgamma is not None:
                dgamma = dgamma.at[b, way.offset].add(jnp.vdot(dw, gained[way.offset].astype(dw.dtype)))
            if weights is not None:
                dw, change = dw * weights[b, way.offset], change * weights[b, way.offset]
            dx, dstack = _scatter_add(dx, way.source, change), dstack.at[k].add(dw)
        return dx, dstack, dgamma

    like = (x, w, gamma, g, kmap.n_out)
    dx = zeros_varying_as(x.shape, options.sum_type, like)
    dstack = zeros_varying_as(stack.shape, options.sum_type, like)
    dgamma = None if gamma is None else zeros_varying_as(gamma.shape, options.sum_type, like)
    dx, dstack, dgamma = lax.fori_loop(0, tiles.count, add_tile, (dx, dstack, dgamma))
    dgamma = None if gamma is None else dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dstack.reshape(w.shape).astype(options.kernel_type), dgamma


def _tiles_of(kmap: KernelMap) -> PairTiles:
    assert kmap.tiles is not None
    return jax.tree.map(jnp.asarray, kmap.tiles)


def _scatter_add(total: Array, rows: Array, values: Array) -> Array:
    return total.at[rows].add(values, mode="drop", unique_indices=True)
