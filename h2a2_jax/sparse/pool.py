"""Pooling: maximum and mean over the windows of a kernel map, and over whole scans."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import no_gradient
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.linear import call_linear
from h2a2_jax.sparse.native_call import call_either, call_native, has_native
from h2a2_jax.sparse.sites import Sites, SparseTensor, device_array
from h2a2_jax.sparse.tensors import check_tensor
from h2a2_jax.sparse.xla_cpu import zeros_varying_as
from h2a2_jax.typing import AnyArray

_UNROLL = 32
"""Offsets in one body of a loop, which XLA fuses into one pass."""
_MATMUL_SCANS = 64
"""Largest number of scans whose sums are a product with 0 and 1: accelerators are slow at adding many rows into few."""


def max_pool(features: Float[AnyArray, "n_in c"], kernel_map: KernelMap) -> Float[Array, "n_out c"]:
    """Maximum over the active sites under each window, channel by channel; NaN where one of them is NaN.

    The gradient goes to the first site, in the order of the offsets, that holds the maximum.

    Args:
        features: rows of the input sites; rows of padding are never read.
        kernel_map: map of any kind; windows may overlap.

    Returns:
        Rows of the output sites; zero where a window holds no site, and on padding.

    Raises:
        ValueError: the features are no floats or do not fit the map, or the map is none.
    """
    return _max(_check("max_pool", features, kernel_map), kernel_map)


@jax.custom_jvp
def _max(x: Array, kmap: KernelMap) -> Array:
    if _fits_native(x, kmap):
        return call_either(lambda x, kmap: _max_natively(x, kmap)[0], _max_in_one_pass, x, kmap)
    return _max_in_one_pass(x, kmap)


def _max_in_one_pass(x: Array, kmap: KernelMap) -> Array:
    def add_offset(best: Array, k: Array) -> tuple[Array, None]:
        return jnp.maximum(best, _window(x, kmap, k)), None

    start = _zeros(kmap.out_capacity, x, kmap) - jnp.inf
    # Unrolled, the offsets fuse into one pass; the rule for training keeps two arrays and is faster as a loop.
    best, _ = _scan_offsets(add_offset, start, kmap, unroll=_UNROLL)
    return _zero_if_empty(best, kmap)


@_max.defjvp
def _max_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, kmap = primals
    best, chosen = _max_and_choice(x, kmap)
    return best, call_linear(_take_chosen, _give_chosen, tangents[0], chosen, kmap)


@jax.custom_jvp
def _max_and_choice(x: Array, kmap: KernelMap) -> tuple[Array, Array]:
    """Maxima, and the first offset that holds each; an argmax over an axis of offsets is many times slower."""
    if _fits_native(x, kmap):
        return call_either(_max_natively, _max_by_offset, x, kmap)
    return _max_by_offset(x, kmap)


def _max_natively(x: Array, kmap: KernelMap) -> tuple[Array, Array]:
    shape = (kmap.out_capacity, x.shape[1])
    results = [(shape, jnp.float32), (shape, jnp.int8)]
    best, chosen = call_native("h2a2_max_pool", results, [x, jnp.asarray(kmap.neighbors)])
    return best, chosen


def _fits_native(x: Array, kmap: KernelMap) -> bool:
    """Return True where compiled kernels can pool: float32 rows, offsets that int8 holds."""
    return has_native() and x.dtype == jnp.float32 and kmap.kernel_volume <= 127


def _max_by_offset(x: Array, kmap: KernelMap) -> tuple[Array, Array]:
    index_type = jnp.int8 if kmap.kernel_volume <= 127 else jnp.int32

    def add_offset(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        best, chosen = carry
        window = _window(x, kmap, k)
        better = ~(window <= best) & ~jnp.isnan(best)  # NaN is better than any number, the first NaN is kept
        return (jnp.maximum(best, window), jnp.where(better, k.astype(index_type), chosen)), None

    zeros = _zeros(kmap.out_capacity, x, kmap)
    start = zeros - jnp.inf, zeros.astype(index_type) - 1
    (best, chosen), _ = _scan_offsets(add_offset, start, kmap)
    return _zero_if_empty(best, kmap), chosen


@_max_and_choice.defjvp
def _max_and_choice_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    x, kmap = primals
    best, chosen = _max_and_choice(x, kmap)
    return (best, chosen), (call_linear(_take_chosen, _give_chosen, tangents[0], chosen, kmap), no_gradient(chosen))


def _take_chosen(x: Array, chosen: Array, kmap: KernelMap) -> Array:
    """The entry of the chosen offset in each window."""

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        return total + jnp.where(chosen == k, _window(x, kmap, k, fill=0.0), 0), None

    return _scan_offsets(add_offset, _zeros(kmap.out_capacity, x, kmap), kmap)[0]


def _give_chosen(g: Array, chosen: Array, kmap: KernelMap) -> Array:
    """Transpose of `_take_chosen`."""
    if _fits_native(g, kmap):
        return call_either(_give_natively, _give_by_offset, g, chosen, kmap)
    return _give_by_offset(g, chosen, kmap)


def _give_natively(g: Array, chosen: Array, kmap: KernelMap) -> Array:
    results = [((kmap.in_capacity, g.shape[1]), jnp.float32)]
    return call_native("h2a2_max_pool_gradient", results, [g, chosen, jnp.asarray(kmap.neighbors)])[0]


def _give_by_offset(g: Array, chosen: Array, kmap: KernelMap) -> Array:
    def add_offset(dx: Array, k: Array) -> tuple[Array, None]:
        return _add_rows(dx, kmap, k, jnp.where(chosen == k, g, 0)), None

    return _scan_offsets(add_offset, _zeros(kmap.in_capacity, g, kmap), kmap)[0]


def average_pool(features: Float[AnyArray, "n_in c"], kernel_map: KernelMap) -> Float[Array, "n_out c"]:
    """Mean over the active sites under each window: a sum over the number of sites, not over the window's volume.

    Args:
        features: rows of the input sites; rows of padding are never read.
        kernel_map: map of any kind; windows may overlap.

    Returns:
        Rows of the output sites; zero where a window holds no site, and on padding. Sums are float32 at least.

    Raises:
        ValueError: the features are no floats or do not fit the map, or the map is none.
    """
    return call_linear(_average, _spread, _check("average_pool", features, kernel_map), kernel_map)


def _average(x: Array, kmap: KernelMap) -> Array:
    weight = _weights(kmap, x)

    def add_offset(total: Array, k: Array) -> tuple[Array, None]:
        return total + _window(x, kmap, k, fill=0.0), None

    start = _zeros(kmap.out_capacity, x.astype(weight.dtype), kmap)
    total, _ = _scan_offsets(add_offset, start, kmap, unroll=_UNROLL)
    return (total * weight).astype(x.dtype)


def _spread(g: Array, kmap: KernelMap) -> Array:
    """Transpose of `_average`."""
    share = g * _weights(kmap, g)

    def add_offset(dx: Array, k: Array) -> tuple[Array, None]:
        return _add_rows(dx, kmap, k, share), None

    dx, _ = _scan_offsets(add_offset, _zeros(kmap.in_capacity, share, kmap), kmap)
    return dx.astype(g.dtype)


def _weights(kmap: KernelMap, like: Array) -> Float[Array, "n_out 1"]:
    """One over the number of sites under each window, in the type of the sums."""
    counts = (jnp.asarray(kmap.neighbors) < kmap.in_capacity).sum(0)
    return 1 / jnp.maximum(counts, 1).astype(jnp.promote_types(like.dtype, jnp.float32))[:, None]


def global_pool(x: SparseTensor, reduce: Literal["mean", "max", "sum"] = "mean") -> Float[Array, "b c"]:
    """Pool each scan over all its sites to one row.

    Args:
        x: features on sites; rows of padding are never read.
        reduce: mean, maximum or sum; a maximum over NaN is NaN, its gradient goes to the first site that holds it.

    Returns:
        [B, C] in the type of the features; zero for a scan without sites. Sums are float32 at least.

    Raises:
        ValueError: `x` is no sparse tensor of floats, or `reduce` is none of "mean", "max" and "sum".
    """
    check_tensor("global_pool", x)
    _check_floats("global_pool", x.features)
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
    return jnp.diff(scan_bounds(jnp.asarray(sites.scan), sites.num_scans))


def scan_bounds(scan: Int[Array, " n"], num_scans: int) -> Int[Array, " bounds"]:
    """First row of each scan, and the first row of padding; scans ascend."""
    scans = jnp.arange(num_scans + 1, dtype=scan.dtype)

    def count(scan: Array) -> Array:  # one pass, where a search is twenty dependent steps
        return (scan[None] < scans[:, None]).sum(1, dtype=jnp.int32)

    def search(scan: Array) -> Array:
        return jnp.searchsorted(scan, scans).astype(jnp.int32)

    return lax.platform_dependent(scan, cpu=search, default=count)


def first_maxima(
    rows: Float[Array, "n c"], segment: Int[AnyArray, " n"], num_segments: int, *, ordered: bool = False
) -> Int[Array, "s c"]:
    """First row that holds the maximum of each segment, channel by channel; that of the first NaN where there is one.

    Args:
        rows: values; no gradient passes.
        segment: segment of each row; rows of no segment in 0..num_segments-1 are left out.
        num_segments: number of segments.
        ordered: True if segments ascend.

    Returns:
        Rows, n or more for an empty segment.
    """
    n, rows, missing = len(rows), lax.stop_gradient(rows), jnp.isnan(rows)
    best = jax.ops.segment_max(jnp.where(missing, -jnp.inf, rows), segment, num_segments, ordered)
    holds = rows == best.at[segment].get(mode="fill", fill_value=jnp.nan)
    index = jnp.arange(n)[:, None]
    # NaN, which compilers may drop from a maximum, comes as rows below n, maxima as rows from n on.
    order = jnp.where(missing, index, jnp.where(holds, n + index, 2 * n))
    first = jax.ops.segment_min(order, segment, num_segments, ordered)
    return jnp.where(first < n, first, jnp.where(first < 2 * n, first - n, n))


def _global_max(x: SparseTensor) -> Array:
    """Maxima by way of the first row that holds each: the derivative of a gather is exact."""
    first = first_maxima(x.features, jnp.asarray(x.sites.scan), x.sites.num_scans, ordered=True)
    return x.features.at[first, jnp.arange(x.features.shape[1])].get(mode="fill", fill_value=0)


def check_map(user: str, kernel_map: Any) -> None:
    """Check that a map is padded.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(kernel_map, KernelMap):
        raise ValueError(
            f"{user} was given a {type(kernel_map).__name__} for its map; expected a KernelMap: pad a table with "
            "sparse.pad_map or sparse.pad_tables, or build the map in jit."
        )


def _check(user: str, features: AnyArray, kmap: KernelMap) -> Array:
    """Features as an array of JAX, checked."""
    check_map(user, kmap)
    if isinstance(features, SparseTensor):
        raise ValueError(f"{user} was given a SparseTensor for features; expected an array [N, C]: give x.features.")
    x = device_array("features", features)
    _check_floats(user, x)
    if x.ndim != 2:
        raise ValueError(f"{user} was given features {list(x.shape)}; expected rows of the input sites, [n, C].")
    if x.shape[0] != kmap.in_capacity:
        raise ValueError(f"features have {x.shape[0]} rows, the kernel map expects {kmap.in_capacity}.")
    return x


def _check_floats(user: str, x: AnyArray) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{user} was given features of type {x.dtype}; expected floats, as of astype(jnp.float32).")


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
