"""Sparse convolution by gathering: one gather and one matmul an offset, no scatter of features in either direction."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from h2a2_jax.sparse.conv_im2col import inverse_table
from h2a2_jax.sparse.conv_parts import (
    ConvOptions,
    dot_by_set,
    per_row,
    set_masks,
    take_rows,
    zeros_varying_as,
)
from h2a2_jax.sparse.kernel_map import KernelMap


def gather_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """Arguments and result as in `convolve`, in the compute type; sums in `options.sum_type`."""
    neighbors, scan = jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan)
    masks = set_masks(gamma, scan_set, w.shape[0], scan)

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        rows = take_rows(x, neighbors[k])
        return total + dot_by_set(rows, w[:, k], masks(k), options), None

    total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]


def gather_backward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    cotangent: Array,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients of x, w and gamma."""
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g = jnp.where(valid, cotangent, 0).astype(x.dtype)
    neighbors, out_scan = jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan)
    inverse = inverse_table(kmap)
    masks_in = set_masks(gamma, scan_set, w.shape[0], jnp.asarray(kmap.in_scan))
    masks_out = set_masks(gamma, scan_set, w.shape[0], out_scan)

    def add_offset(dx: Array, k: Array) -> tuple[Array, tuple]:
        wt = w[:, k].swapaxes(1, 2)
        dx = dx + dot_by_set(take_rows(g, inverse[k]), wt, masks_in(k), options)
        rows, by_set = take_rows(x, neighbors[k]), masks_out(k)
        parts = [rows] if by_set is None else [rows * by_set[:, s : s + 1].astype(rows.dtype) for s in range(len(w))]
        dw = jnp.stack([options.dot(lax.optimization_barrier(part.T), g) for part in parts])
        if gamma is None or scan_set is None:
            return dx, (_fill_sets(dw, len(w)), None)
        own = per_row(scan_set, out_scan)
        change = sum(jnp.where((own == s)[:, None], options.dot(rows, (w[0, k] - w[s, k])), 0) for s in range(len(w)))
        dgamma = jax.ops.segment_sum((change * g).sum(1), out_scan, kmap.num_scans)
        return dx, (dw, dgamma)

    dx = zeros_varying_as(x.shape, options.sum_type, (x, w, gamma, g, kmap.n_out))
    dx, (dw, dgamma) = lax.scan(add_offset, dx, jnp.arange(kmap.kernel_volume))
    dgamma = None if gamma is None else dgamma.T.astype(gamma.dtype)
    return dx.astype(x.dtype), dw.swapaxes(0, 1).astype(options.kernel_type), dgamma


def _fill_sets(dw: Array, sets: int) -> Array:
    """Gradient [1, Cin, Cout] of the one kernel in use as [S, Cin, Cout]."""
    return dw if sets == 1 else jnp.concatenate([dw, jnp.zeros((sets - 1, *dw.shape[1:]), dw.dtype)])
