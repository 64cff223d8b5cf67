"""Pooling: maximum and mean over the windows of a kernel map, and over whole scans."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import no_gradient
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import Sites, SparseTensor
from h2a2_jax.sparse.xla_cpu import zeros_varying_as

_UNROLL = 32
"""Offsets in one body of a loop, which XLA fuses into one pass."""
_MATMUL_SCANS = 64
"""Largest number of scans whose sums are a product with 0 and 1: accelerators are slow at adding many rows into few."""


@jax.custom_vjp
def max_pool(features: Float[Array, "n_in c"], kernel_map: KernelMap) -> Float[Array, "n_out c"]:
    """Maximum over the active sites under each window, channel by channel.

    The gradient goes to the first site, in the order of the offsets, that holds the maximum.

    Args:
        features: rows of the input sites; rows of padding are never read.
        kernel_map: map of any kind; windows may overlap.

    Returns:
        Rows of the output sites; zero where a window holds no site, and on padding.

    Raises:
        ValueError: the features do not fit the map.
    """
    _check(features, kernel_map)

    def add_offset(best: Array, k: Array) -> tuple[Array, None]:
        return jnp.maximum(best, _window(features, kernel_map, k)), None

    start = _zeros(kernel_map.out_capacity, features, kernel_map) - jnp.inf
    # Unrolled, the offsets fuse into one pass; the rule for training keeps two arrays and is faster as a loop.
    best, _ = _scan_offsets(add_offset, start, kernel_map, unroll=_UNROLL)
    return _zero_if_empty(best, kernel_map)


def _max_forward(x: Array, kmap: KernelMap) -> tuple[Array, tuple]:
    """Maxima, and the first offset that holds each; an argmax over an axis of offsets is many times slower."""
    _check(x, kmap)
    index_type = jnp.int8 if kmap.kernel_volume <= 127 else jnp.int32

    def add_offset(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        best, chosen = carry
        window = _window(x, kmap, k)
        return (jnp.maximum(best, window), jnp.where(window > best, k.astype(index_type), chosen)), None

    zeros = _zeros(kmap.out_capacity, x, kmap)
    start = zeros - jnp.inf, zeros.astype(index_type) - 1
    (best, chosen), _ = _scan_offsets(add_offset, start, kmap)
    return _zero_if_empty(best, kmap), (chosen, kmap)


def _max_backward(residuals: tuple, g: Array) -> tuple:
    chosen, kmap = residuals

    def add_offset(dx: Array, k: Array) -> tuple[Array, None]:
        return _add_rows(dx, kmap, k, jnp.where(chosen == k, g, 0)), None

    return _scan_offsets(add_offset, _zeros(kmap.in_capacity, g, kmap), kmap)[0], no_gradient(kmap)


max_pool.defvjp(_max_forward, _max_backward)


@jax.custom_vjp
def average_pool(features: Float[Array, "n_in c"], kernel_map: KernelMap) -> Float[Array, "n_out c"]:
    """Mean over the active sites under each window: a sum over the number of sites, not over the window's volume.

    Args:
        features: rows of the input sites; rows of padding are never read.
        kernel_map: map of any kind; windows may overlap.

    Returns:
        Rows of the output sites; zero where a window holds no site, and on padding. Sums are float32 at least.

    Raises:
        ValueError: the features do not fit the map.
    """
    return _average_forward(features, kernel_map)[0]


def _average_forward(x: Array, kmap: KernelMap) -> tuple[Array, tuple]:
    _check(x, kmap)
    neighbors = jnp.asarray(kmap.neighbors)
    weight = 1 / jnp.maximum((neighbors < kmap.in_capacity).sum(0), 1).astype(jnp.promote_types(x.dtype, jnp.float32))

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        return total + _window(x, kmap, k, fill=0.0), None

    start = _zeros(kmap.out_capacity, x.astype(weight.dtype), kmap)
    total, _ = _scan_offsets(add_offset, start, kmap, unroll=_UNROLL)
    return (total * weight[:, None]).astype(x.dtype), (weight, kmap)


def _average_backward(residuals: tuple, g: Array) -> tuple:
    weight, kmap = residuals
    share = g * weight[:, None]

    def add_offset(dx: Array, k: Array) -> tuple[Array, None]:
        return _add_rows(dx, kmap, k, share), None

    dx, _ = _scan_offsets(add_offset, _zeros(kmap.in_capacity, share, kmap), kmap)
    return dx.astype(g.dtype), no_gradient(kmap)


average_pool.defvjp(_average_forward, _average_backward)


def global_pool(x: SparseTensor, reduce: Literal["mean", "max", "sum"] = "mean") -> Float[Array, "b c"]:
    """Pool each scan over all its sites to one row.

    Args:
        x: features on sites; rows of padding are never read.
        reduce: mean, maximum or sum; the gradient of a maximum goes to the first site that holds it.

    Returns:
        [B, C] in the type of the features; zero for a scan without sites. Sums are float32 at least.

    Raises:
        ValueError: `reduce` is none of the three.
    """
    if reduce == "max":
        return _global_max(x)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}, expected 'mean', 'max' or 'sum'.")
    rows = x.features.astype(jnp.promote_types(x.features.dtype, jnp.float32))
    total = scan_sum(rows, x.sites)
    if reduce == "mean":
        total = total / jnp.maximum(sites_per_scan(x.sites), 1)[:, None]
    return total.astype(x.features.dtype)


def scan_sum(rows: Float[Array, "n c"], sites: Sites) -> Float[Array, "b c"]:
    """Sum of the rows of each scan; rows of padding are never read."""
    rows, scan = jnp.where(sites.valid[:, None], rows, 0), jnp.asarray(sites.scan)
    if sites.num_scans > _MATMUL_SCANS:
        return jax.ops.segment_sum(rows, scan, sites.num_scans, indices_are_sorted=True)
    belongs = (scan == jnp.arange(sites.num_scans)[:, None]).astype(rows.dtype)
    return jnp.matmul(belongs, rows, precision=lax.Precision.HIGHEST)


def sites_per_scan(sites: Sites) -> Int[Array, " b"]:
    """Number of sites of each scan."""
    return jnp.diff(jnp.searchsorted(jnp.asarray(sites.scan), jnp.arange(sites.num_scans + 1)))


def _global_max(x: SparseTensor) -> Array:
    """Maxima by way of the first row that holds each: the derivative of a gather is exact."""
    scan, (n, c) = jnp.asarray(x.sites.scan), x.features.shape
    fixed = lax.stop_gradient(x.features)
    best = jax.ops.segment_max(fixed, scan, x.sites.num_scans, indices_are_sorted=True)
    holds = fixed == best.at[scan].get(mode="fill", fill_value=jnp.nan)
    rows = jnp.where(holds, jnp.arange(n)[:, None], n)
    first = jax.ops.segment_min(rows, scan, x.sites.num_scans, indices_are_sorted=True)
    return x.features.at[first, jnp.arange(c)].get(mode="fill", fill_value=0)


def _check(x: Array, kmap: KernelMap) -> None:
    if x.shape[0] != kmap.in_capacity:
        raise ValueError(f"features have {x.shape[0]} rows, the kernel map expects {kmap.in_capacity}.")


def _scan_offsets(add_offset: Callable, start: Any, kmap: KernelMap, unroll: int = 1) -> tuple:
    return lax.scan(add_offset, start, jnp.arange(kmap.kernel_volume), unroll=min(unroll, kmap.kernel_volume))


def _zeros(rows: int, like: Array, kmap: KernelMap) -> Array:
    return zeros_varying_as((rows, like.shape[1]), like.dtype, (like, kmap.n_out))


def _window(x: Array, kmap: KernelMap, k: Array, fill: float = -jnp.inf) -> Array:
    """Input row at offset k of each output row, `fill` where there is none."""
    return x.at[jnp.asarray(kmap.neighbors)[k]].get(mode="fill", fill_value=fill)


def _zero_if_empty(rows: Array, kmap: KernelMap) -> Array:
    """Rows as they are, zero for a window without a site."""
    return jnp.where((jnp.asarray(kmap.neighbors) < kmap.in_capacity).any(0)[:, None], rows, 0)


def _add_rows(dx: Array, kmap: KernelMap, k: Array, rows: Array) -> Array:
    """Add rows to the inputs of offset k.

    The rows written are distinct, and so are the indices past the end where there is none: an accelerator adds without
    atomics.
    """
    index = jnp.asarray(kmap.neighbors)[k]
    index = jnp.where(index < kmap.in_capacity, index, kmap.in_capacity + jnp.arange(kmap.out_capacity))
    return dx.at[index].add(rows, mode="drop", unique_indices=True)
