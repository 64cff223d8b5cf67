"""Sparse convolution as one matmul over all offsets, for accelerators and nearly dense maps.

    y = columns @ W,   columns[o] = [x[neighbors[0, o]], ..., x[neighbors[V-1, o]]]   [N_out, V * Cin]

The work is that of a full kernel on every site, so it pays where most neighbours exist. Rows go in chunks of a bounded
size; trip counts are static and no features are scattered in either direction.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import ConvOptions, per_row, take_rows, zeros_varying_as
from h2a2_jax.sparse.kernel_map import KernelMap

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
