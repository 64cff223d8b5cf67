"""Sparse convolution over padded active sites: the contract, its definition, and the choice of an algorithm.

    y[o] = sum_k x[neighbors[k, o]] @ W[k]

Every algorithm computes the same function; `segment_sum` is the one to read, the others are the ones to run: `gather`
and `tiles` (`conv_cpu`), `winograd`, `native` (`conv_native`), `im2col` and `pairs` (`conv_accelerator`), `implicit`
(`conv_implicit`).

With structure-aware kernel selection each (scan b, offset k) uses one of two kernels [W_shared, W_exclusive]: the first
where gamma[b, k] is 1, the second where it is 0. A selection, never a mixture: for one scan the selection is made once,
before the convolution; for several most algorithms index the stack and store no kernel per scan.
"""

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from h2a2_jax.sparse.conv_accelerator import im2col_backward, im2col_forward, pair_work, pairs_backward, pairs_forward
from h2a2_jax.sparse.conv_cpu import gather_backward, gather_forward, tiles_backward, tiles_forward
from h2a2_jax.sparse.conv_implicit import implicit_backward, implicit_forward
from h2a2_jax.sparse.conv_native import is_native, native_backward, native_forward
from h2a2_jax.sparse.conv_parts import Algorithm, ConvOptions, Gradients, Platform, per_row
from h2a2_jax.sparse.conv_primitive import convolve_by
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.native_call import has_native
from h2a2_jax.sparse.sites import check_count
from h2a2_jax.sparse.winograd import winograd_backward, winograd_forward
from h2a2_jax.sparse.xla_cpu import after, round_rows, take_rows, zeros_varying_as

DENSE_WORK = 0.5
"""Share of a full kernel's work from which on accelerators multiply the full kernel ("im2col") instead of "pairs"."""


def convolve(
    features: Float[Array, "n_in c_in"],
    kernels: Float[Array, "s v c_group c_out"],
    kernel_map: KernelMap,
    *,
    gamma: Float[Array, "b v"] | None = None,
    groups: int = 1,
    algorithm: Algorithm = "auto",
    dtype: Any = None,
    precision: Any = None,
) -> Float[Array, "n_out c_out"]:
    """Convolve features on active sites; differentiable in features, kernels and gamma, in every mode and order.

    Under `jax.shard_map` kernels may be replicated: their gradient is summed over the devices.
    `docs/layers.md` trains a network of such convolutions.

    Args:
        features: rows of the input sites; rows of padding are never read.
        kernels: a stack of one kernel, or of two with `gamma`; slices x fastest (`kernel_offsets`).
        kernel_map: map from the input to the output sites.
        gamma: 1 where a scan's offset uses kernels[0], 0 where it uses kernels[1]. None: kernels[0] everywhere. Its
            gradient is that of the interpolation gamma * W_0 + (1 - gamma) * W_1: <dW[b, k], W_0[k] - W_1[k]>.
        groups: number of groups of channels that are convolved apart: output channels [i * Cout / groups, ...) read
            the input channels [i * Cin / groups, ...). With Cin groups the convolution is depthwise.
        algorithm: way to compute the same result.

            - "segment_sum": gather, matmul, segment sum, one offset after the other, with JAX's own derivative. The one
              algorithm for maps of kind "neighbors", whose rows may repeat.
            - "gather": the same without a scatter in either direction.
            - "tiles": pairs sorted by offset and multiplied in tiles, only as many as there are. Needs
              `kernel_map.tiles`.
            - "winograd": F(4, 3)^3 on blocks, for nearly dense 3^3 submanifold maps. Needs `kernel_map.blocks`; where
              the map does not use them, "tiles", or "gather" without these. In float32 it rounds ten times as much as
              the others.
            - "native": compiled kernels that read the neighbours as they are, and blocks where the map uses them; on
              CPUs, where the extension was built. Programs that are exported, groups and float64 get what "auto" takes
              without it.
            - "im2col": one matmul of the full kernel on every row, for accelerators and nearly dense maps.
            - "pairs": tiles in one batched matmul, then a gather-sum, for accelerators. Needs `kernel_map.tiles`, and
              costs their capacity.
            - "implicit": Triton kernels that read rows where they multiply them and write nothing but results, for
              NVIDIA GPUs; float32 products are TF32 without a `precision`. Compiled and checked in Pallas's
              interpreter, never run on a GPU yet, and so no part of "auto". On CPUs it is for tests.
            - "auto": on CPUs "native" where it is there, else "winograd" where the map has blocks, else "tiles" where
              it has tiles, else "gather". On accelerators "pairs" where the tiles' capacity is below half of a full
              kernel (`limit_tiles`), else "im2col"; "gather" with groups. The platform is the one that the program is
              lowered for.
        dtype: compute type of the products; sums are float32 (float64 stays float64), and so is the gradient of float32
            kernels. Default: the type of the features. "winograd" always multiplies in the type of the sums, because
            its transforms magnify the rounding of factors.
        precision: precision of the products, as in `jax.lax.dot_general`.

    Returns:
        Rows of the output sites in the type of the features; padding rows are zero.

    Raises:
        ValueError: types, shapes, kernel volume or algorithm do not fit the map, or the number of kernels does not fit
            gamma.
    """
    _check(features, kernels, kernel_map, gamma, groups, algorithm)
    features, kernels = jnp.asarray(features), jnp.asarray(kernels)
    compute = _compute_type(dtype, features)
    if kernel_map.kind == "neighbors":
        algorithm = "segment_sum"
    options = ConvOptions(jnp.promote_types(compute, jnp.float32), precision, kernels.dtype, algorithm, groups)
    x, w = features.astype(compute), kernels
    if gamma is not None:
        gamma = jnp.asarray(gamma)
    out = convolve_by(_forward, _backward, x, w, gamma, kernel_map, options)
    return round_rows(out, features.dtype, kernel_map.n_out)


def _compute_type(dtype: Any, features: Array) -> Any:
    """Type of the products: that of the features, or a given one."""
    if dtype is None:
        return features.dtype
    try:
        compute = jnp.dtype(dtype)
    except TypeError:
        compute = None
    if compute is None or not jnp.issubdtype(compute, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}; expected a type of floats, as jnp.bfloat16, or None.")
    return compute


def check_features(user: str, features: Any, kernel_map: Any) -> None:
    """Check that features are rows of numbers for the inputs of a map, and that the map is one.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(kernel_map, KernelMap):
        hint = ": pad it with sparse.pad_map or sparse.pad_tables" if hasattr(kernel_map, "offsets") else ""
        raise ValueError(f"{user} was given a {type(kernel_map).__name__} for a map; expected a KernelMap{hint}.")
    if not isinstance(features, jax.Array | np.ndarray):
        hint = ": give x.features, or use a layer" if hasattr(features, "features") else ""
        raise ValueError(f"{user} was given a {type(features).__name__} for features; expected an array [N, C]{hint}.")
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"{user} was given {features.dtype} features; expected floats: use features.astype(float32).")
    if features.ndim != 2 or features.shape[0] != kernel_map.in_capacity:
        raise ValueError(
            f"{user} was given features {list(features.shape)}: the kernel map expects {kernel_map.in_capacity} rows, "
            "one for each of its input sites, padding included."
        )


def _check(
    features: Array, kernels: Array, kernel_map: KernelMap, gamma: Array | None, groups: int, algorithm: str
) -> None:
    check_features("convolve", features, kernel_map)
    if not isinstance(kernels, jax.Array | np.ndarray) or kernels.ndim != 4:
        has = list(np.shape(kernels))
        raise ValueError(f"kernels are a {type(kernels).__name__} {has}; expected an array [S, V, Cin, Cout].")
    if not jnp.issubdtype(kernels.dtype, jnp.floating):
        raise ValueError(f"kernels are {kernels.dtype}; expected floats.")
    channels, groups = features.shape[1], check_count("groups", groups, least=0)
    if groups < 1 or channels % groups or kernels.shape[3] % groups:
        raise ValueError(
            f"{groups} groups do not divide {channels} input and {kernels.shape[3]} output channels; choose a divisor."
        )
    if kernels.shape[1] != kernel_map.kernel_volume or kernels.shape[2] * groups != channels:
        grouped = ("", "Cin") if groups == 1 else (f" in {groups} groups", "Cin / groups")
        raise ValueError(
            f"kernels {kernels.shape} do not fit: the map has {kernel_map.kernel_volume} offsets, the features "
            f"{channels} channels{grouped[0]}; expected [S, V, {grouped[1]}, Cout]."
        )
    if kernels.shape[0] != (1 if gamma is None else 2):
        raise ValueError(
            f"kernels {kernels.shape} were given {'without' if gamma is None else 'with'} gamma; expected [1, V, Cin, "
            "Cout] without gamma, [2, V, Cin, Cout] with gamma."
        )
    wanted = (kernel_map.num_scans, kernel_map.kernel_volume)
    if gamma is not None and not isinstance(gamma, jax.Array | np.ndarray):
        raise ValueError(f"gamma is a {type(gamma).__name__}; expected an array of floats {wanted}: scans x offsets.")
    if gamma is not None and (gamma.shape != wanted or not jnp.issubdtype(gamma.dtype, jnp.floating)):
        raise ValueError(f"gamma is {gamma.dtype}{list(gamma.shape)}, expected floats {wanted}: scans x offsets.")
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm {algorithm!r} is none of {', '.join(get_args(Algorithm))}.")
    if algorithm == "native" and not has_native():
        raise ValueError(
            "algorithm 'native' needs the compiled kernels, which are not there or turned off by H2A2_NATIVE=0; "
            "install with a C++ compiler, or take 'auto'."
        )
    if algorithm in ("tiles", "pairs") and kernel_map.tiles is None:
        raise ValueError(f"algorithm {algorithm!r} needs a map with tiles: build it with pad_map(..., tile_size=...).")
    if algorithm == "winograd" and kernel_map.blocks is None:
        raise ValueError("algorithm 'winograd' needs a map with blocks: build it with pad_map(..., blocks='always').")
    if kernel_map.kind == "neighbors" and algorithm not in ("auto", "segment_sum"):
        raise ValueError(
            f"algorithm {algorithm!r} needs a map whose rows are distinct at each offset; a map of kind 'neighbors' "
            "takes 'auto' or 'segment_sum'."
        )


def _choose(
    kernel_map: KernelMap,
    options: ConvOptions,
    platform: Platform,
    *,
    is_weighed: bool = False,
    compute: Any = jnp.float32,
) -> Algorithm:
    """The algorithm that "auto" stands for: by platform, type, lists of the map, and gamma's being any weights."""
    can_be_native = platform == "cpu" and is_native(options) and not is_weighed and not _has_explicit_axes()
    can_be_native &= compute in (jnp.float32, jnp.bfloat16)
    if options.algorithm == "native" and not can_be_native:
        platform = "any cpu" if platform == "cpu" else platform
    elif options.algorithm != "auto":
        return options.algorithm
    elif can_be_native and has_native():
        return "native"
    if platform == "accelerator":
        if options.groups > 1:
            return "gather"
        # Static: by the tiles' capacity, which is near the pairs there are only where `limit_tiles` made it so.
        return "pairs" if pair_work(kernel_map) < DENSE_WORK else "im2col"
    if kernel_map.blocks is not None and options.groups == 1:
        return "winograd"
    return "gather" if kernel_map.tiles is None else "tiles"


# ---------------------------------------------------------------- dispatch


def _forward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, platform: Platform
) -> Array:
    is_weighed = gamma is not None and len(w) == 1
    algorithm = _choose(kmap, options, platform, is_weighed=is_weighed, compute=x.dtype)
    if gamma is not None and _is_one_choice(algorithm, gamma, w):
        w, gamma = _select(w, gamma), None
    if algorithm not in _BY_OFFSET:
        w, options = _dense_groups(w.astype(x.dtype), options, algorithm)
    if algorithm == "winograd":
        use_blocks = jnp.asarray(kmap.blocks.count) > 0  # type: ignore[union-attr]  # one program serves both
        without = gather_forward if kmap.tiles is None else tiles_forward
        forward = [partial(f, options=options) for f in (winograd_forward, without)]
        return lax.cond(use_blocks, *forward, x, w, gamma, kmap)
    return _ALGORITHMS[algorithm][0](x, w, gamma, kmap, options)


def _backward(
    x: Array,
    w: Array,
    gamma: Array | None,
    kmap: KernelMap,
    options: ConvOptions,
    cotangent: Array,
    platform: Platform,
) -> Gradients:
    is_weighed = gamma is not None and len(w) == 1
    algorithm = _choose(kmap, options, platform, is_weighed=is_weighed, compute=x.dtype)
    if gamma is not None and _is_one_choice(algorithm, gamma, w):
        dx, (dw,), _ = _backward(x, _select(w, gamma), None, kmap, options, cotangent, platform)
        use_shared = gamma[0].astype(dw.dtype)[:, None, None]
        dgamma = (dw * (w[0] - w[1])).sum((1, 2))[None].astype(gamma.dtype)
        return dx, jnp.stack([use_shared * dw, (1 - use_shared) * dw]), dgamma
    shape, groups = w.shape, options.groups
    if algorithm not in _BY_OFFSET:
        w = after(cotangent, w)  # else values that depend on the kernels alone would be made, and kept, long before
        w, options = _dense_groups(w.astype(x.dtype), options, algorithm)
    if algorithm == "winograd":
        use_blocks = jnp.asarray(kmap.blocks.count) > 0  # type: ignore[union-attr]  # one program serves both
        without_blocks = gather_backward if kmap.tiles is None else tiles_backward
        backward = [partial(f, options=options, cotangent=cotangent) for f in (winograd_backward, without_blocks)]
        dx, dw, dgamma = lax.cond(use_blocks, *backward, x, w, gamma, kmap)
    else:
        dx, dw, dgamma = _ALGORITHMS[algorithm][1](x, w, gamma, kmap, options, cotangent)
    if dw.shape != shape:  # the blocks of the diagonal
        blocks = dw.reshape(*shape[:2], groups, shape[2], groups, -1)
        dw = jnp.moveaxis(jnp.diagonal(blocks, axis1=2, axis2=4), -1, -2).reshape(shape)
    return dx, dw, dgamma


def _has_explicit_axes() -> bool:
    """Return True under a mesh with explicit axes outside of shard_map, over which no foreign function is spread."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _is_one_choice(algorithm: str, gamma: Array, w: Array) -> bool:
    """Return True where a kernel an offset serves the one scan: it is selected once, and not tile by tile."""
    return len(w) == 2 and len(gamma) == 1 and algorithm != "segment_sum"


def _select(w: Array, gamma: Array) -> Array:
    # In the type of the kernels: gamma's gradient is a difference of long sums.
    use_shared = gamma[0].astype(w.dtype)[:, None, None]
    return (use_shared * w[0] + (1 - use_shared) * w[1])[None]


def _dense_groups(w: Array, options: ConvOptions, algorithm: str) -> tuple[Array, ConvOptions]:
    """Kernels without groups, block-diagonal, for the algorithms that know of none."""
    groups = options.groups
    if groups == 1 or algorithm == "segment_sum":
        return w, options
    parts = w.reshape(*w.shape[:3], groups, -1)
    same = jnp.eye(groups, dtype=w.dtype)[:, None, :, None]
    dense = parts[:, :, None] * same  # [S, V, G, Cin / G, G, Cout / G]
    return dense.reshape(*w.shape[:2], groups * w.shape[2], w.shape[3]), replace(options, groups=1)


# ---------------------------------------------------------------- definition


def segment_sum_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """The definition: for each offset gather, multiply, sum the products by output row."""
    rows = jnp.arange(kmap.out_capacity)
    valid = (rows < kmap.n_out)[:, None]
    wide = x.astype(options.sum_type)  # the derivative of a gather is a sum

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        neighbors = take_rows(wide, jnp.asarray(kmap.neighbors)[k]).astype(x.dtype)
        products = options.dot(neighbors, w[0, k])
        if gamma is not None:
            weights = per_row(gamma[:, k], jnp.asarray(kmap.out_scan))[:, None]
            products = weights * products
            if len(w) == 2:
                products = products + (1 - weights) * options.dot(neighbors, w[1, k])
        products = jnp.where(valid, products, 0)  # nor may a cotangent on padding reach a kernel
        return total + jax.ops.segment_sum(products, rows, kmap.out_capacity), None

    total = zeros_varying_as((kmap.out_capacity, w.shape[-1]), options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.scan(add_offset, total, jnp.arange(kmap.kernel_volume))[0]


def segment_sum_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the definition, by JAX."""
    forward = partial(segment_sum_forward, kmap=kmap, options=options)
    dx, dw, dgamma = jax.vjp(lambda x, w, gamma: forward(x, w, gamma), x, w, gamma)[1](cotangent)
    return dx, dw.astype(options.kernel_type), dgamma


_BY_OFFSET = ("gather", "tiles")
"""Algorithms that convert and transpose the kernel of one offset at a time, and know of groups."""
_ALGORITHMS = {
    "segment_sum": (segment_sum_forward, segment_sum_backward),
    "gather": (gather_forward, gather_backward),
    "tiles": (tiles_forward, tiles_backward),
    "im2col": (im2col_forward, im2col_backward),
    "pairs": (pairs_forward, pairs_backward),
    "implicit": (implicit_forward, implicit_backward),
    "winograd": (winograd_forward, winograd_backward),
    "native": (native_forward, native_backward),
}
"""Forward and backward function of each algorithm; see `conv_parts` for arguments."""
