"""Sparse convolution by tiles: pairs sorted by scan and offset, a loop over as many tiles of them as there are."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from h2a2_jax.sparse.conv_parts import ConvOptions, take_rows, zeros_varying_as
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles, directions


def tiles_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """Arguments and result as in `convolve`, in the compute type; needs `kmap.tiles`."""
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    kernel, stack = kernel_index(gamma, scan_set, kmap), w.reshape(-1, *w.shape[2:])

    def add_tile(t: Array, total: Array) -> Array:
        for way in directions(tiles, t, volume):
            w = stack[kernel[tiles.scan[t], way.offset]]
            total = _scatter_add(total, way.target, options.dot(take_rows(x, way.source), w))
        return total

    shape = kmap.out_capacity, w.shape[-1]
    return lax.fori_loop(0, tiles.count, add_tile, zeros_varying_as(shape, options.sum_type, (x, w, gamma, kmap.n_out)))


def tiles_backward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    cotangent: Array,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients of x, w and gamma."""
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    g = cotangent.astype(x.dtype)
    kernel, stack = kernel_index(gamma, scan_set, kmap), w.reshape(-1, *w.shape[2:])
    transposed = stack.swapaxes(1, 2)

    def add_tile(t: Array, carry: tuple) -> tuple:
        dx, dstack, dgamma = carry
        b = tiles.scan[t]
        for way in directions(tiles, t, volume):
            k = kernel[b, way.offset]
            rows, grads = take_rows(x, way.source), take_rows(g, way.target)
            dx = _scatter_add(dx, way.source, options.dot(grads, transposed[k]))
            # The barrier keeps XLA from folding the transpose into a slower product.
            dw = options.dot(lax.optimization_barrier(rows.T), grads)
            dstack = dstack.at[k].add(dw)
            if dgamma is not None and scan_set is not None:
                difference = stack[way.offset] - stack[scan_set[b] * volume + way.offset]
                dgamma = dgamma.at[b, way.offset].add(jnp.vdot(dw, difference))
        return dx, dstack, dgamma

    like = (x, w, gamma, g, kmap.n_out)
    dx = zeros_varying_as(x.shape, options.sum_type, like)
    dstack = zeros_varying_as(stack.shape, options.sum_type, like)
    dgamma = None if gamma is None else zeros_varying_as(gamma.shape, options.sum_type, like)
    dx, dstack, dgamma = lax.fori_loop(0, tiles.count, add_tile, (dx, dstack, dgamma))
    dgamma = None if gamma is None else dgamma.astype(gamma.dtype)
    return dx.astype(x.dtype), dstack.reshape(w.shape).astype(options.kernel_type), dgamma


def kernel_index(gamma: Array | None, scan_set: Array | None, kmap: KernelMap) -> Int[Array, "b v"]:
    """Index into the stack, flattened over (set, offset), of the kernel of each (scan, offset)."""
    offsets = jnp.arange(kmap.kernel_volume, dtype=jnp.int32)
    if gamma is None or scan_set is None:
        return jnp.broadcast_to(offsets, (kmap.num_scans, kmap.kernel_volume))
    return jnp.where(gamma >= 0.5, 0, scan_set[:, None]).astype(jnp.int32) * kmap.kernel_volume + offsets


def _tiles_of(kmap: KernelMap) -> PairTiles:
    assert kmap.tiles is not None
    return jax.tree.map(jnp.asarray, kmap.tiles)


def _scatter_add(total: Array, rows: Array, values: Array) -> Array:
    return total.at[rows].add(values, mode="drop", unique_indices=True)
