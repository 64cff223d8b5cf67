"""Sparse convolution by tiles: pairs sorted by scan and offset, a loop over as many tiles of them as there are."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from h2a2_jax.sparse.conv_parts import (
    ConvOptions,
    dot_by_set,
    per_row,
    set_masks,
    take_rows,
    zeros_varying_as,
)
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.pair_tiles import PairTiles


def tiles_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """Arguments and result as in `convolve`, in the compute type; needs `kmap.tiles`."""
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    chosen, stack = _chosen(gamma, scan_set, kmap), w.reshape(-1, *w.shape[2:])

    def add_tile(t: Array, total: Array) -> Array:
        i, o, k, b = tiles.in_rows[t], tiles.out_rows[t], tiles.offset[t], tiles.scan[t]
        total = _scatter_add(total, o, options.dot(take_rows(x, i), stack[chosen[b, k]]))
        if tiles.mirrored:
            total = _scatter_add(total, i, options.dot(take_rows(x, o), stack[chosen[b, volume - 1 - k]]))
        return total

    if tiles.mirrored:
        masks = set_masks(gamma, scan_set, w.shape[0], jnp.asarray(kmap.out_scan))
        total = dot_by_set(x, w[:, volume // 2], masks(volume // 2), options)
        total = jnp.where((jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None], total, 0)
    else:
        total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.fori_loop(0, tiles.count, add_tile, total)


def tiles_backward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    cotangent: Array,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients of x, w and gamma."""
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    g = cotangent.astype(x.dtype)
    chosen, stack = _chosen(gamma, scan_set, kmap), w.reshape(-1, *w.shape[2:])
    transposed = stack.swapaxes(1, 2)

    def add_kernel_gradient(carry: tuple, rows: Array, grads: Array, b: Array, k: Array) -> tuple:
        dstack, dgamma = carry
        # The barrier keeps XLA from folding the transpose into a slower product.
        dw = options.dot(lax.optimization_barrier(rows.T), grads)
        dstack = dstack.at[chosen[b, k]].add(dw)
        if dgamma is not None and scan_set is not None:
            dgamma = dgamma.at[b, k].add(jnp.vdot(dw, w[0, k] - w[scan_set[b], k]))
        return dstack, dgamma

    def add_tile(t: Array, carry: tuple) -> tuple:
        dx, rest = carry
        i, o, k, b = tiles.in_rows[t], tiles.out_rows[t], tiles.offset[t], tiles.scan[t]
        x_i, g_o = take_rows(x, i), take_rows(g, o)
        dx = _scatter_add(dx, i, options.dot(g_o, transposed[chosen[b, k]]))
        rest = add_kernel_gradient(rest, x_i, g_o, b, k)
        if tiles.mirrored:
            x_o, g_i = take_rows(x, o), take_rows(g, i)
            dx = _scatter_add(dx, o, options.dot(g_i, transposed[chosen[b, volume - 1 - k]]))
            rest = add_kernel_gradient(rest, x_o, g_i, b, volume - 1 - k)
        return dx, rest

    like = (x, w, gamma, g, kmap.n_out)
    dx = zeros_varying_as(x.shape, options.sum_type, like)
    dstack = zeros_varying_as(stack.shape, options.sum_type, like)
    dgamma = None if gamma is None else zeros_varying_as(gamma.shape, options.sum_type, like)
    if tiles.mirrored:
        dx, dstack, dgamma = _centre_backward(x, w, g, gamma, scan_set, kmap, options, dstack, dgamma)
    dx, (dstack, dgamma) = lax.fori_loop(0, tiles.count, add_tile, (dx, (dstack, dgamma)))
    dgamma = None if gamma is None else dgamma.astype(gamma.dtype)
    dw = dstack.reshape(w.shape).astype(w.dtype)
    return dx.astype(x.dtype), dw, dgamma


def _centre_backward(
    x: Array, w: Array, g: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    dstack: Array, dgamma: Array | None,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients through the centre of a submanifold kernel: a plain matmul of every row, kernels chosen by scan."""
    centre, scan = kmap.kernel_volume // 2, jnp.asarray(kmap.out_scan)
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g, x = jnp.where(valid, g, 0), jnp.where(valid, x, 0)
    by_set = set_masks(gamma, scan_set, w.shape[0], scan)(centre)
    dx = dot_by_set(g, w[:, centre].swapaxes(1, 2), by_set, options)
    for s in range(w.shape[0] if by_set is not None else 1):
        rows = x if by_set is None else x * by_set[:, s : s + 1].astype(x.dtype)
        dw = options.dot(lax.optimization_barrier(rows.T), g)
        dstack = dstack.at[s * kmap.kernel_volume + centre].add(dw)
    if dgamma is not None and scan_set is not None:
        own = per_row(scan_set, scan)
        change = sum(
            jnp.where((own == s)[:, None], options.dot(x, w[0, centre] - w[s, centre]), 0) for s in range(w.shape[0])
        )
        dgamma = dgamma.at[:, centre].add(jax.ops.segment_sum((change * g).sum(1), scan, kmap.num_scans))
    return dx, dstack, dgamma


def _tiles_of(kmap: KernelMap) -> PairTiles:
    assert kmap.tiles is not None
    return jax.tree.map(jnp.asarray, kmap.tiles)


def _chosen(gamma: Array | None, scan_set: Array | None, kmap: KernelMap) -> Int[Array, "b v"]:
    """Index into the stack, flattened over (set, offset), of the kernel of each (scan, offset)."""
    offsets = jnp.arange(kmap.kernel_volume, dtype=jnp.int32)
    if gamma is None or scan_set is None:
        return jnp.broadcast_to(offsets, (kmap.num_scans, kmap.kernel_volume))
    return jnp.where(gamma >= 0.5, 0, scan_set[:, None]).astype(jnp.int32) * kmap.kernel_volume + offsets


def _scatter_add(total: Array, rows: Array, values: Array) -> Array:
    return total.at[rows].add(values, mode="drop", unique_indices=True, indices_are_sorted=True)
