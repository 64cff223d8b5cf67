"""Sparse convolution over padded active sites.

    y[o] = sum_k x[neighbors[k, o]] @ W[k]

Every algorithm computes the same function; `segment_sum` is the one to read, the others are the ones to run.

With structure-aware kernel selection each (scan b, offset k) uses one kernel of a stack [W_shared, W_exclusive_1, ...]:
the shared one where gamma[b, k] is 1, the scan's own where it is 0. A selection, never a mixture: for one scan it is
made once, before the convolution; for several most algorithms index the stack and store no kernel a scan.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_accelerator import (
    im2col_backward,
    im2col_forward,
    inverse_table,
    pair_work,
    pairs_backward,
    pairs_forward,
)
from h2a2_jax.sparse.conv_cpu import tiles_backward, tiles_forward
from h2a2_jax.sparse.conv_parts import (
    ConvOptions,
    after,
    dot_by_set,
    no_gradient,
    per_row,
    round_rows,
    set_masks,
    take_rows,
    zeros_varying_as,
)
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.winograd import winograd_backward, winograd_forward


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


Algorithm = Literal["auto", "segment_sum", "gather", "tiles", "winograd", "im2col", "pairs"]

DENSE_WORK = 0.5
"""Share of a full kernel's work from which on accelerators multiply the full kernel ("im2col") instead of "pairs"."""


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
            tiles, only as many as there are (needs `kernel_map.tiles`). "winograd": F(4, 3)^3 on blocks, for nearly
            dense 3^3 submanifold maps (needs `kernel_map.blocks`; where the map does not use them, tiles); in float32
            it rounds ten times as much as the others.
            "im2col": one matmul of the full kernel on every row, for accelerators and nearly dense maps. "pairs": tiles
            in one batched matmul, then a gather-sum, for accelerators (needs `kernel_map.tiles`; costs their capacity).
            "auto": on CPU blocks where the map uses them, else tiles where it has them, else gather. On accelerators
            pairs where the tiles' capacity is below half of a full kernel (`limit_tiles`), else im2col.
        dtype: compute type of the products; sums are float32 (float64 stays float64), and so is the gradient of float32
            kernels. Default: the features'. "winograd" multiplies in the type of the sums whatever the compute type,
            for its transforms magnify the rounding of what is multiplied.
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
    x, w = features.astype(compute), kernels
    chosen = _choose(kernel_map) if algorithm == "auto" else algorithm
    options = ConvOptions(jnp.promote_types(compute, jnp.float32), precision, kernels.dtype)
    if gamma is not None and scan_set is not None and num_scans == 1 and chosen != "segment_sum":
        # One scan, one kernel an offset: selected once, its gradient split once, and not tile by tile. In the type of
        # the kernels: gamma's gradient is a difference of long sums.
        use_shared = gamma[0].astype(w.dtype)[:, None, None]
        w = (use_shared * w[0] + (1 - use_shared) * w[scan_set[0]])[None]
        gamma = scan_set = None
    if chosen == "segment_sum":
        out = _convolve_by_segment_sum(x, w.astype(compute), gamma, scan_set, kernel_map, options)
    else:
        out = _convolve(x, w, gamma, scan_set, kernel_map, options, chosen)
    return round_rows(out, features.dtype, kernel_map.n_out)


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
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm {algorithm!r} is none of {', '.join(get_args(Algorithm))}.")
    if algorithm in ("tiles", "pairs") and kernel_map.tiles is None:
        raise ValueError(f"algorithm {algorithm!r} needs a map with tiles: build it with pad_map(..., tile_size=...).")
    if algorithm == "winograd" and kernel_map.blocks is None:
        raise ValueError("algorithm 'winograd' needs a map with blocks: build it with pad_map(..., blocks='always').")


def _choose(kernel_map: KernelMap) -> str:
    if jax.default_backend() != "cpu":
        # Static: by the tiles' capacity, which is near the pairs there are only where `limit_tiles` made it so.
        return "pairs" if pair_work(kernel_map) < DENSE_WORK else "im2col"
    if kernel_map.blocks is not None:
        return "winograd"
    return "gather" if kernel_map.tiles is None else "tiles"


def _may_use_tiles(algorithm: str, kmap: KernelMap) -> bool:
    """Whether the map's coordinates, at run time, choose between its blocks and its tiles: one program serves both."""
    return algorithm == "winograd" and kmap.tiles is not None


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _convolve(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    algorithm: str,
) -> Array:  # fmt: skip
    w = w.astype(x.dtype)
    if _may_use_tiles(algorithm, kmap):
        use_blocks = jnp.asarray(kmap.blocks.count) > 0  # type: ignore[union-attr]
        forward = [partial(f, options=options) for f in (winograd_forward, tiles_forward)]
        return lax.cond(use_blocks, *forward, x, w, gamma, scan_set, kmap)
    return _ALGORITHMS[algorithm][0](x, w, gamma, scan_set, kmap, options)


def _forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    algorithm: str,
) -> tuple[Array, tuple]:  # fmt: skip
    w = w.astype(x.dtype)
    return _convolve(x, w, gamma, scan_set, kmap, options, algorithm), (x, w, gamma, scan_set, kmap)


def _backward(options: ConvOptions, algorithm: str, residuals: tuple, cotangent: Array) -> tuple:
    x, w, gamma, scan_set, kmap = residuals
    w = after(cotangent, w)  # else what is made of the kernels alone would be made and kept long before
    if _may_use_tiles(algorithm, kmap):
        use_blocks = jnp.asarray(kmap.blocks.count) > 0  # type: ignore[union-attr]
        backward = [partial(f, options=options, cotangent=cotangent) for f in (winograd_backward, tiles_backward)]
        gradients = lax.cond(use_blocks, *backward, x, w, gamma, scan_set, kmap)
    else:
        gradients = _ALGORITHMS[algorithm][1](x, w, gamma, scan_set, kmap, options, cotangent)
    return *gradients, no_gradient(scan_set), no_gradient(kmap)


_convolve.defvjp(_forward, _backward)

_ALGORITHMS = {
    "gather": (gather_forward, gather_backward),
    "tiles": (tiles_forward, tiles_backward),
    "im2col": (im2col_forward, im2col_backward),
    "pairs": (pairs_forward, pairs_backward),
    "winograd": (winograd_forward, winograd_backward),
}
"""Pairs of forward(x, w, gamma, scan_set, kmap, options) and backward(..., cotangent) -> (dx, dw, dgamma)."""


def _convolve_by_segment_sum(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """The definition: for each offset gather, multiply, sum the products by output row."""
    rows = jnp.arange(kmap.out_capacity)
    valid = (rows < kmap.n_out)[:, None]
    wide = x.astype(options.sum_type)  # the derivative of a gather is a sum

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        neighbors = take_rows(wide, jnp.asarray(kmap.neighbors)[k]).astype(x.dtype)
        products = options.dot(neighbors, w[0, k])
        if gamma is not None and scan_set is not None:
            use_shared = per_row(gamma[:, k], jnp.asarray(kmap.out_scan))[:, None]
            own_set = per_row(scan_set, jnp.asarray(kmap.out_scan))[:, None]
            own = sum(jnp.where(own_set == s, options.dot(neighbors, w[s, k]), 0) for s in range(w.shape[0]))
            products = use_shared * products + (1 - use_shared) * own
        products = jnp.where(valid, products, 0)  # nor may a cotangent on padding reach a kernel
        return total + jax.ops.segment_sum(products, rows, kmap.out_capacity), None

    total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]
