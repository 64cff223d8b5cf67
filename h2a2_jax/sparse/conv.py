"""Sparse convolution over padded active sites.

    y[o] = sum_k x[neighbors[k, o]] @ W[k]

Every algorithm computes the same function; `segment_sum` is the one to read, the others are the ones to run.

With structure-aware kernel selection each (scan b, offset k) uses one kernel of a stack [W_shared, W_exclusive_1, ...]:
the shared one where gamma[b, k] is 1, the scan's own where it is 0. A selection, never a mixture: the fast algorithms
index the stack and no mixed kernel is ever stored.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles

Algorithm = Literal["auto", "segment_sum", "gather", "tiles"]


def convolve(
    features: Float[Array, "n_in c_in"],
    kernels: Float[Array, "s v c_in c_out"],
    kernel_map: KernelMap,
    *,
    gamma: Float[Array, "b v"] | None = None,
    scan_set: Int[Array, " b"] | None = None,
    algorithm: Algorithm = "auto",
    dtype: Any = None,
    precision: Any = None,
) -> Float[Array, "n_out c_out"]:
    """Convolve features on active sites; differentiable in features, kernels and gamma.

    Args:
        features: rows of the input sites; rows of padding are never read.
        kernels: a stack of S kernels, slices x fastest (`kernel_offsets`).
        kernel_map: from the input to the output sites.
        gamma: 1 where a scan's offset uses kernels[0], 0 where it uses kernels[scan_set[b]]. None: kernels[0]
            everywhere, or kernels[scan_set[b]] everywhere if `scan_set` is given. Its gradient is that of the
            interpolation gamma * W_0 + (1 - gamma) * W_set: <dW[b, k], W_0[k] - W_set[k]>.
        scan_set: kernel of the stack that each scan calls its own; default 1 where gamma is given.
        algorithm: "segment_sum": gather, matmul, segment sum, one offset after the other, by JAX's own derivative.
            "gather": the same without a scatter in either direction. "tiles": pairs sorted by offset and multiplied in
            tiles, only as many as there are (needs `kernel_map.tiles`). "auto": tiles on CPU where the map has them,
            else gather.
        dtype: compute type of the products; sums are float32 (float64 stays float64). Default: the features'.
        precision: of the products, as in `jax.lax.dot_general`.

    Returns:
        Rows of the output sites in the type of the features; padding rows are zero.

    Raises:
        ValueError: shapes, kernel volume or algorithm do not fit the map.
    """
    _check(features, kernels, kernel_map, gamma, algorithm)
    num_scans = kernel_map.num_scans
    if gamma is not None and scan_set is None:
        scan_set = jnp.ones(num_scans, jnp.int32)
    if gamma is None and scan_set is not None:
        gamma = jnp.zeros((num_scans, kernel_map.kernel_volume), kernels.dtype)
    compute = jnp.dtype(dtype) if dtype is not None else features.dtype
    x, w = features.astype(compute), kernels.astype(compute)
    if algorithm == "auto":
        algorithm = _choose(kernel_map)
    options = _Options(jnp.promote_types(compute, jnp.float32), precision)
    if algorithm == "segment_sum":
        out = _segment_sum(x, w, gamma, scan_set, kernel_map, options)
    elif algorithm == "gather":
        out = _gather(x, w, gamma, scan_set, kernel_map, options)
    else:
        out = _tiled(x, w, gamma, scan_set, kernel_map, options)
    return out.astype(features.dtype)


@dataclass(frozen=True)
class _Options:
    sum_type: Any
    precision: Any

    def dot(self, a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=self.precision, preferred_element_type=self.sum_type)


def _check(features: Array, kernels: Array, kernel_map: KernelMap, gamma: Array | None, algorithm: str) -> None:
    if features.shape[0] != kernel_map.in_capacity:
        raise ValueError(f"features have {features.shape[0]} rows, the kernel map expects {kernel_map.in_capacity}.")
    if kernels.shape[1] != kernel_map.kernel_volume or kernels.shape[2] != features.shape[1]:
        raise ValueError(
            f"kernels {kernels.shape} do not fit: the map has {kernel_map.kernel_volume} offsets, the features "
            f"{features.shape[1]} channels; expected [S, V, Cin, Cout]."
        )
    if gamma is not None and gamma.shape != (kernel_map.num_scans, kernel_map.kernel_volume):
        raise ValueError(
            f"gamma is {gamma.shape}, expected {(kernel_map.num_scans, kernel_map.kernel_volume)}: scans x offsets."
        )
    if algorithm not in ("auto", "segment_sum", "gather", "tiles"):
        raise ValueError(f"algorithm {algorithm!r} is none of auto, segment_sum, gather, tiles.")
    if algorithm == "tiles" and kernel_map.tiles is None:
        raise ValueError("algorithm 'tiles' needs a map with tiles: build it with pad_map(..., tile_size=...).")


def _choose(kernel_map: KernelMap) -> Algorithm:
    on_cpu = jax.default_backend() == "cpu"
    return "tiles" if on_cpu and kernel_map.tiles is not None else "gather"


def _take(rows: Array, index: Array) -> Array:
    """Rows by index; an index past the end gives zeros."""
    return rows.at[index].get(mode="fill", fill_value=0)


def _per_row(values: Num[Array, "b *c"], scan: Int[Array, " n"]) -> Num[Array, "n *c"]:
    """A value of each scan on its rows, zero on padding."""
    return values.at[scan].get(mode="fill", fill_value=0)


def _zeros(shape: tuple[int, ...], dtype: Any, like: tuple[Any, ...]) -> Array:
    """Zeros that vary over every mesh axis that one of `like` varies over: a loop under shard_map may add to them.

    A choice that never falls on the array's value passes its type on, and compiles to nothing.
    """
    zero = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(like):
        zero = zero + jnp.where(False, jnp.asarray(leaf).reshape(-1)[:1].sum().astype(dtype), 0)
    return jnp.broadcast_to(zero, shape)


def _segment_sum(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: _Options
) -> Array:
    """The definition: for each offset gather, multiply, sum the products by output row."""
    rows = jnp.arange(kmap.out_capacity)
    valid = (rows < kmap.n_out)[:, None]

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        neighbors = _take(x, jnp.asarray(kmap.neighbors)[k])
        products = options.dot(neighbors, w[0, k])
        if gamma is not None and scan_set is not None:
            use_shared = _per_row(gamma[:, k], jnp.asarray(kmap.out_scan))[:, None]
            own_set = _per_row(scan_set, jnp.asarray(kmap.out_scan))[:, None]
            own = sum(jnp.where(own_set == s, options.dot(neighbors, w[s, k]), 0) for s in range(w.shape[0]))
            products = use_shared * products + (1 - use_shared) * own
        products = jnp.where(valid, products, 0)  # nor may a cotangent on padding reach a kernel
        return total + jax.ops.segment_sum(products, rows, kmap.out_capacity), None

    total = _zeros((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]


# --- gather: one gather and one matmul an offset, no scatter of features in either direction ---


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _gather(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: _Options
) -> Array:
    neighbors, scan = jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan)
    masks = _set_masks(gamma, scan_set, w.shape[0], scan)

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        rows = _take(x, neighbors[k])
        return total + _dot_by_set(rows, w[:, k], masks(k), options), None

    total = _zeros((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]


def _gather_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: _Options
) -> tuple[Array, tuple]:
    return _gather(x, w, gamma, scan_set, kmap, options), (x, w, gamma, scan_set, kmap)


def _gather_backward(options: _Options, residuals: tuple, cotangent: Array) -> tuple:
    x, w, gamma, scan_set, kmap = residuals
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g = jnp.where(valid, cotangent, 0).astype(x.dtype)
    neighbors, out_scan = jnp.asarray(kmap.neighbors), jnp.asarray(kmap.out_scan)
    inverse = _inverse_neighbors(kmap)
    masks_in = _set_masks(gamma, scan_set, w.shape[0], jnp.asarray(kmap.in_scan))
    masks_out = _set_masks(gamma, scan_set, w.shape[0], out_scan)

    def add_offset(dx: Array, k: Array) -> tuple[Array, tuple]:
        wt = w[:, k].swapaxes(1, 2)
        dx = dx + _dot_by_set(_take(g, inverse[k]), wt, masks_in(k), options)
        rows, by_set = _take(x, neighbors[k]), masks_out(k)
        parts = [rows] if by_set is None else [rows * by_set[:, s : s + 1].astype(rows.dtype) for s in range(len(w))]
        dw = jnp.stack([options.dot(lax.optimization_barrier(part.T), g) for part in parts])
        if gamma is None or scan_set is None:
            return dx, (_fill_sets(dw, len(w)), None)
        own = _per_row(scan_set, out_scan)
        change = sum(jnp.where((own == s)[:, None], options.dot(rows, (w[0, k] - w[s, k])), 0) for s in range(len(w)))
        dgamma = jax.ops.segment_sum((change * g).sum(1), out_scan, kmap.num_scans)
        return dx, (dw, dgamma)

    dx = _zeros(x.shape, options.sum_type, (x, w, gamma, g, kmap.n_out))
    dx, (dw, dgamma) = lax.scan(add_offset, dx, jnp.arange(kmap.kernel_volume))
    dgamma = None if gamma is None else dgamma.T.astype(gamma.dtype)
    return dx.astype(x.dtype), dw.swapaxes(0, 1).astype(w.dtype), dgamma, _no_gradient(scan_set), _no_gradient(kmap)


_gather.defvjp(_gather_forward, _gather_backward)


def _fill_sets(dw: Array, sets: int) -> Array:
    """Gradient [1, Cin, Cout] of the one kernel in use as [S, Cin, Cout]."""
    return dw if sets == 1 else jnp.concatenate([dw, jnp.zeros((sets - 1, *dw.shape[1:]), dw.dtype)])


def _inverse_neighbors(kmap: KernelMap) -> Int[Array, "v n_in"]:
    """Output row that each input row reaches through each offset, N_out where none."""
    neighbors = jnp.asarray(kmap.neighbors)
    volume, n_out = neighbors.shape
    if kmap.kind == "submanifold" and volume % 2:
        return neighbors[::-1]
    empty = jnp.full((volume, kmap.in_capacity), n_out, jnp.int32)
    outs = jnp.broadcast_to(jnp.arange(n_out, dtype=jnp.int32), neighbors.shape)
    return empty.at[jnp.arange(volume)[:, None], neighbors].set(outs, mode="drop")


def _set_masks(gamma: Array | None, scan_set: Array | None, sets: int, scan: Array) -> Any:
    """Function of the offset k: which kernel of the stack each row uses, [n, S] of 0 and 1; None if it is always 0."""
    if gamma is None or scan_set is None:
        return lambda k: None

    def masks(k: Array | int) -> Array:
        chosen = jnp.where(gamma[:, k] >= 0.5, 0, scan_set)
        return _per_row(jax.nn.one_hot(chosen, sets), scan)

    return masks


def _dot_by_set(rows: Array, w: Float[Array, "s a b"], by_set: Array | None, options: _Options) -> Array:
    if by_set is None:
        return options.dot(rows, w[0])
    return sum((options.dot(rows * by_set[:, s : s + 1].astype(rows.dtype), w[s]) for s in range(1, len(w))),
               options.dot(rows * by_set[:, :1].astype(rows.dtype), w[0]))  # fmt: skip


def _no_gradient(tree: Any) -> Any:
    """Cotangents of integer arguments."""
    return jax.tree.map(lambda a: np.zeros(np.shape(a), jax.dtypes.float0), tree)


# --- tiles: a loop over as many tiles as there are ---


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: _Options
) -> Array:
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    chosen, stack = _chosen(gamma, scan_set, kmap), w.reshape(-1, *w.shape[2:])

    def add_tile(t: Array, total: Array) -> Array:
        i, o, k, b = tiles.in_rows[t], tiles.out_rows[t], tiles.offset[t], tiles.scan[t]
        total = _scatter_add(total, o, options.dot(_take(x, i), stack[chosen[b, k]]))
        if tiles.mirrored:
            total = _scatter_add(total, i, options.dot(_take(x, o), stack[chosen[b, volume - 1 - k]]))
        return total

    if tiles.mirrored:
        masks = _set_masks(gamma, scan_set, w.shape[0], jnp.asarray(kmap.out_scan))
        total = _dot_by_set(x, w[:, volume // 2], masks(volume // 2), options)
        total = jnp.where((jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None], total, 0)
    else:
        total = _zeros((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.fori_loop(0, tiles.count, add_tile, total)


def _tiled_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: _Options
) -> tuple[Array, tuple]:
    return _tiled(x, w, gamma, scan_set, kmap, options), (x, w, gamma, scan_set, kmap)


def _tiled_backward(options: _Options, residuals: tuple, cotangent: Array) -> tuple:
    x, w, gamma, scan_set, kmap = residuals
    tiles, volume = _tiles_of(kmap), kmap.kernel_volume
    g = cotangent.astype(x.dtype)
    chosen, stack = _chosen(gamma, scan_set, kmap), w.reshape(-1, *w.shape[2:])
    transposed = stack.swapaxes(1, 2)

    def add_kernel_gradient(carry: tuple, rows: Array, grads: Array, b: Array, k: Array) -> tuple:
        dstack, dgamma = carry
        # The barrier keeps XLA from folding the transpose into a slower product.
        dw = options.dot(lax.optimization_barrier(rows.T), grads)
        dstack = dstack.at[chosen[b, k]].add(dw)
        if dgamma is not None:
            dgamma = dgamma.at[b, k].add(jnp.vdot(dw, w[0, k] - w[scan_set[b], k]))
        return dstack, dgamma

    def add_tile(t: Array, carry: tuple) -> tuple:
        dx, rest = carry
        i, o, k, b = tiles.in_rows[t], tiles.out_rows[t], tiles.offset[t], tiles.scan[t]
        x_i, g_o = _take(x, i), _take(g, o)
        dx = _scatter_add(dx, i, options.dot(g_o, transposed[chosen[b, k]]))
        rest = add_kernel_gradient(rest, x_i, g_o, b, k)
        if tiles.mirrored:
            x_o, g_i = _take(x, o), _take(g, i)
            dx = _scatter_add(dx, o, options.dot(g_i, transposed[chosen[b, volume - 1 - k]]))
            rest = add_kernel_gradient(rest, x_o, g_i, b, volume - 1 - k)
        return dx, rest

    like = (x, w, gamma, g, kmap.n_out)
    dx = _zeros(x.shape, options.sum_type, like)
    dstack = _zeros(stack.shape, options.sum_type, like)
    dgamma = None if gamma is None else _zeros(gamma.shape, options.sum_type, like)
    if tiles.mirrored:
        dx, dstack, dgamma = _centre_backward(x, w, g, gamma, scan_set, kmap, options, dstack, dgamma)
    dx, (dstack, dgamma) = lax.fori_loop(0, tiles.count, add_tile, (dx, (dstack, dgamma)))
    dgamma = None if gamma is None else dgamma.astype(gamma.dtype)
    dw = dstack.reshape(w.shape).astype(w.dtype)
    return dx.astype(x.dtype), dw, dgamma, _no_gradient(scan_set), _no_gradient(kmap)


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _centre_backward(
    x: Array, w: Array, g: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: _Options,
    dstack: Array, dgamma: Array | None,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients through the centre of a submanifold kernel: a plain matmul of every row, kernels chosen by scan."""
    centre, scan = kmap.kernel_volume // 2, jnp.asarray(kmap.out_scan)
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g, x = jnp.where(valid, g, 0), jnp.where(valid, x, 0)
    by_set = _set_masks(gamma, scan_set, w.shape[0], scan)(centre)
    dx = _dot_by_set(g, w[:, centre].swapaxes(1, 2), by_set, options)
    for s in range(w.shape[0] if by_set is not None else 1):
        rows = x if by_set is None else x * by_set[:, s : s + 1].astype(x.dtype)
        dw = options.dot(lax.optimization_barrier(rows.T), g)
        dstack = dstack.at[s * kmap.kernel_volume + centre].add(dw)
    if dgamma is not None and scan_set is not None:
        own = _per_row(scan_set, scan)
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
