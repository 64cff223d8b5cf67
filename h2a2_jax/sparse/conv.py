"""Sparse convolution over padded active sites: the contract, its definition, and the choice of an algorithm.

    y[o] = sum_k x[neighbors[k, o]] @ W[k]

Every algorithm computes the same function; `segment_sum` is the one to read, the others are the ones to run: `gather`
and `tiles` (`conv_cpu`), `winograd`, `im2col` and `pairs` (`conv_accelerator`).

With structure-aware kernel selection each (scan b, offset k) uses one of two kernels [W_shared, W_exclusive]: the first
where gamma[b, k] is 1, the second where it is 0. A selection, never a mixture: for one scan the selection is made once,
before the convolution; for several most algorithms index the stack and store no kernel per scan.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from h2a2_jax.sparse.conv_accelerator import im2col_backward, im2col_forward, pair_work, pairs_backward, pairs_forward
from h2a2_jax.sparse.conv_cpu import gather_backward, gather_forward, tiles_backward, tiles_forward
from h2a2_jax.sparse.conv_parts import ConvOptions, Gradients, no_gradient, per_row
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.winograd import winograd_backward, winograd_forward
from h2a2_jax.sparse.xla_cpu import after, round_rows, take_rows, zeros_varying_as

Algorithm = Literal["auto", "segment_sum", "gather", "tiles", "winograd", "im2col", "pairs"]

DENSE_WORK = 0.5
"""Share of a full kernel's work from which on accelerators multiply the full kernel ("im2col") instead of "pairs"."""


def convolve(
    features: Float[Array, "n_in c_in"],
    kernels: Float[Array, "s v c_in c_out"],
    kernel_map: KernelMap,
    *,
    gamma: Float[Array, "b v"] | None = None,
    algorithm: Algorithm = "auto",
    dtype: Any = None,
    precision: Any = None,
) -> Float[Array, "n_out c_out"]:
    """Convolve features on active sites; differentiable in features, kernels and gamma.

    `docs/layers.md` trains a network of such convolutions.

    Args:
        features: rows of the input sites; rows of padding are never read.
        kernels: a stack of one kernel, or of two with `gamma`; slices x fastest (`kernel_offsets`).
        kernel_map: map from the input to the output sites.
        gamma: 1 where a scan's offset uses kernels[0], 0 where it uses kernels[1]. None: kernels[0] everywhere. Its
            gradient is that of the interpolation gamma * W_0 + (1 - gamma) * W_1: <dW[b, k], W_0[k] - W_1[k]>.
        algorithm: way to compute the same result.

            - "segment_sum": gather, matmul, segment sum, one offset after the other, by JAX's own derivative.
            - "gather": the same without a scatter in either direction.
            - "tiles": pairs sorted by offset and multiplied in tiles, only as many as there are. Needs
              `kernel_map.tiles`.
            - "winograd": F(4, 3)^3 on blocks, for nearly dense 3^3 submanifold maps. Needs `kernel_map.blocks`; where
              the map does not use them, tiles. In float32 it rounds ten times as much as the others.
            - "im2col": one matmul of the full kernel on every row, for accelerators and nearly dense maps.
            - "pairs": tiles in one batched matmul, then a gather-sum, for accelerators. Needs `kernel_map.tiles`, and
              costs their capacity.
            - "auto": on CPUs "winograd" where the map has blocks, else "tiles" where it has tiles, else "gather". On
              accelerators "pairs" where the tiles' capacity is below half of a full kernel (`limit_tiles`), else
              "im2col".
        dtype: compute type of the products; sums are float32 (float64 stays float64), and so is the gradient of float32
            kernels. Default: the type of the features. "winograd" always multiplies in the type of the sums, because
            its transforms magnify the rounding of factors.
        precision: precision of the products, as in `jax.lax.dot_general`.

    Returns:
        Rows of the output sites in the type of the features; padding rows are zero.

    Raises:
        ValueError: shapes, kernel volume or algorithm do not fit the map, or the number of kernels does not fit gamma.
    """
    _check(features, kernels, kernel_map, gamma, algorithm)
    compute = jnp.dtype(dtype) if dtype is not None else features.dtype
    x, w = features.astype(compute), kernels
    chosen = _choose(kernel_map) if algorithm == "auto" else algorithm
    options = ConvOptions(jnp.promote_types(compute, jnp.float32), precision, kernels.dtype)
    if gamma is not None and kernel_map.num_scans == 1 and chosen != "segment_sum":
        # One scan, one kernel an offset: selected once, its gradient split once, and not tile by tile. In the type of
        # the kernels: gamma's gradient is a difference of long sums.
        use_shared = gamma[0].astype(w.dtype)[:, None, None]
        w, gamma = (use_shared * w[0] + (1 - use_shared) * w[1])[None], None
    if chosen == "segment_sum":
        out = _segment_sum(x, w.astype(compute), gamma, kernel_map, options)
    else:
        out = _convolve(x, w, gamma, kernel_map, options, chosen)
    return round_rows(out, features.dtype, kernel_map.n_out)


def _check(features: Array, kernels: Array, kernel_map: KernelMap, gamma: Array | None, algorithm: str) -> None:
    if features.shape[0] != kernel_map.in_capacity:
        raise ValueError(f"features have {features.shape[0]} rows, the kernel map expects {kernel_map.in_capacity}.")
    if kernels.shape[1] != kernel_map.kernel_volume or kernels.shape[2] != features.shape[1]:
        raise ValueError(
            f"kernels {kernels.shape} do not fit: the map has {kernel_map.kernel_volume} offsets, the features "
            f"{features.shape[1]} channels; expected [S, V, Cin, Cout]."
        )
    if kernels.shape[0] != (1 if gamma is None else 2):
        raise ValueError(
            f"kernels {kernels.shape} were given {'without' if gamma is None else 'with'} gamma; expected [1, V, Cin, "
            "Cout] without gamma, [2, V, Cin, Cout] with gamma."
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
    """The algorithm that "auto" stands for: by the device and by the lists of the map."""
    if jax.default_backend() != "cpu":
        # Static: by the tiles' capacity, which is near the pairs there are only where `limit_tiles` made it so.
        return "pairs" if pair_work(kernel_map) < DENSE_WORK else "im2col"
    if kernel_map.blocks is not None:
        return "winograd"
    return "gather" if kernel_map.tiles is None else "tiles"


def _segment_sum(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """The definition: for each offset gather, multiply, sum the products by output row."""
    rows = jnp.arange(kmap.out_capacity)
    valid = (rows < kmap.n_out)[:, None]
    wide = x.astype(options.sum_type)  # the derivative of a gather is a sum

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        neighbors = take_rows(wide, jnp.asarray(kmap.neighbors)[k]).astype(x.dtype)
        products = options.dot(neighbors, w[0, k])
        if gamma is not None:
            use_shared = per_row(gamma[:, k], jnp.asarray(kmap.out_scan))[:, None]
            products = use_shared * products + (1 - use_shared) * options.dot(neighbors, w[1, k])
        products = jnp.where(valid, products, 0)  # nor may a cotangent on padding reach a kernel
        return total + jax.ops.segment_sum(products, rows, kmap.out_capacity), None

    total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]


_ALGORITHMS = {
    "gather": (gather_forward, gather_backward),
    "tiles": (tiles_forward, tiles_backward),
    "im2col": (im2col_forward, im2col_backward),
    "pairs": (pairs_forward, pairs_backward),
    "winograd": (winograd_forward, winograd_backward),
}
"""Forward and backward function of each algorithm with a derivative of its own; see `conv_parts` for arguments."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _convolve(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, algorithm: str) -> Array:
    w = w.astype(x.dtype)
    if _may_use_tiles(algorithm, kmap):
        use_blocks = jnp.asarray(kmap.blocks.count) > 0  # type: ignore[union-attr]
        forward = [partial(f, options=options) for f in (winograd_forward, tiles_forward)]
        return lax.cond(use_blocks, *forward, x, w, gamma, kmap)
    return _ALGORITHMS[algorithm][0](x, w, gamma, kmap, options)


def _forward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, algorithm: str
) -> tuple[Array, tuple]:
    w = w.astype(x.dtype)
    return _convolve(x, w, gamma, kmap, options, algorithm), (x, w, gamma, kmap)


def _backward(options: ConvOptions, algorithm: str, residuals: tuple, cotangent: Array) -> tuple:
    x, w, gamma, kmap = residuals
    w = after(cotangent, w)  # else values that depend on the kernels alone would be made, and kept, long before
    gradients: Gradients
    if _may_use_tiles(algorithm, kmap):
        use_blocks = jnp.asarray(kmap.blocks.count) > 0  # type: ignore[union-attr]
        backward = [partial(f, options=options, cotangent=cotangent) for f in (winograd_backward, tiles_backward)]
        gradients = lax.cond(use_blocks, *backward, x, w, gamma, kmap)
    else:
        gradients = _ALGORITHMS[algorithm][1](x, w, gamma, kmap, options, cotangent)
    return *gradients, no_gradient(kmap)


_convolve.defvjp(_forward, _backward)


def _may_use_tiles(algorithm: str, kmap: KernelMap) -> bool:
    """Return True where one program serves both: the map's coordinates choose blocks or tiles at run time."""
    return algorithm == "winograd" and kmap.tiles is not None
