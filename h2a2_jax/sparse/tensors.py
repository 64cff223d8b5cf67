"""Sparse tensors whole: pruned, united, with features of their scans, and as dense arrays.

All functions run inside jit and outside. Where a result may not fit its capacity, the sites that are left out are
counted, as by the functions of `in_jit`: every scan keeps a fair share of the capacity, its first sites in order.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Int, Num

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.in_jit import check_padded, report_overflow, rows_of_part, share_capacity, unite_sites
from h2a2_jax.sparse.sites import (
    MAX_SCANS,
    PerAxis,
    Sites,
    SparseTensor,
    check_count,
    check_values,
    device_array,
    key_fields,
    number_identity,
    per_axis,
    shorten,
)
from h2a2_jax.typing import AnyArray


def prune(
    x: SparseTensor, keep: Bool[AnyArray, " n"], capacity: int | None = None, *, name: str | None = None
) -> tuple[SparseTensor, Int[Array, ""]]:
    """Keep some of the sites, in their order, with their features.

    Two results of one name count as being on the same sites: name the sites to prune several tensors alike, and add
    them.

    Args:
        x: features [N, C] on sites; differentiable.
        keep: bool [N], True for the rows to keep; padding is never kept.
        capacity: number of rows of the result, default that of `x`.
        name: identity of the new sites; by default "prune(...)" of the old one, numbered, so that two results differ.

    Returns:
        The tensor; overflow int32 [], the number of kept sites that did not fit.

    Raises:
        ValueError: `x` is no sparse tensor, or `keep` is no array of bool with a value for each of its rows.
    """
    check_tensor("prune", x)
    sites = x.sites
    keep = device_array("values of keep", keep)
    if keep.shape != (sites.capacity,) or keep.dtype != jnp.bool_:
        raise ValueError(
            f"prune was given keep {keep.dtype}{list(keep.shape)}; expected bool[{sites.capacity}], as of scores > 0."
        )
    capacity = sites.capacity if capacity is None else capacity
    rows, n, overflow = _compact("prune", keep & sites.valid, jnp.asarray(sites.scan), sites.num_scans, capacity)
    coords = _pad(take_rows(sites.coords, rows, distinct=True), n, sites.num_scans)
    identity = name or number_identity(f"prune({sites.identity})", keep, sites.coords)
    pruned = Sites(coords, n, sites.stride, sites.num_scans, identity)
    return SparseTensor(take_rows(x.features, rows, distinct=True), pruned), overflow


def unite_tensors(*tensors: SparseTensor, capacity: int | None = None) -> tuple[list[SparseTensor], Int[Array, ""]]:
    """Bring tensors onto the union of their sites, with zeros where one of them has no site.

    Args:
        tensors: features [N_i, C_i] on sites of one stride; differentiable.
        capacity: number of rows of the union; default the sum of the tensors', which always suffices.

    Returns:
        The tensors on the union; overflow int32 [], 0 where no site is left out.

    Raises:
        ValueError: an argument is no sparse tensor, or the strides differ.
    """
    if not tensors:
        raise ValueError("unite_tensors was given no tensor; expected at least one.")
    for x in tensors:
        check_tensor("unite_tensors", x)
    capacity = sum(x.sites.capacity for x in tensors) if capacity is None else capacity
    overflow = jnp.zeros((), jnp.int32)

    def unite(a: Sites, b: Sites) -> Sites:
        nonlocal overflow
        sites, more = unite_sites(a, b, capacity)
        overflow += more
        return sites

    sites = reduce(unite, [x.sites for x in tensors])
    return [
        SparseTensor(take_rows(x.features, rows_of_part(x.sites, sites), distinct=True), sites) for x in tensors
    ], overflow


def union_add(a: SparseTensor, b: SparseTensor, capacity: int) -> tuple[SparseTensor, Int[Array, ""]]:
    """Add features on the union of two sets of sites; a tensor without a site there counts as zero.

    Args:
        a: features [N_a, C] on sites; differentiable.
        b: features [N_b, C] on sites of the same stride.
        capacity: number of rows of the result.

    Returns:
        The sum; overflow int32 [], the number of sites that did not fit.

    Raises:
        ValueError: an argument is no sparse tensor, or strides or channels differ.
    """
    (a, b), overflow = unite_tensors(a, b, capacity=capacity)
    check_same_channels(a, b)
    return a.with_features(a.features + b.features), overflow


def broadcast(values: Num[AnyArray, "b c"], sites: Sites) -> Num[Array, "n c"]:
    """Put the values of each scan on all of its sites; zero on padding.

    Args:
        values: a row for each scan; differentiable.
        sites: padded sites.

    Returns:
        [N, C] in the type of the values.

    Raises:
        ValueError: not one row of values for each scan, or the sites are not padded.
    """
    check_padded("broadcast", sites)
    values = device_array("values", values)
    if values.ndim != 2 or len(values) != sites.num_scans:
        raise ValueError(
            f"broadcast was given values {list(values.shape)}; expected [{sites.num_scans}, C], one row a scan."
        )
    return take_rows(values, jnp.asarray(sites.scan))


# ---------------------------------------------------------------- dense arrays


def to_dense(x: SparseTensor, shape: PerAxis, *, origin: PerAxis = 0) -> Num[Array, "b *shape c"]:
    """Dense array of the features, zero where there is no site.

    Args:
        x: features [N, C] on sites; differentiable.
        shape: number of cells along each axis, each as long as the stride of the sites: (X, Y, Z); (X, Y) in 2-D, for
            sites with z = 0; (X, Y, Z, T) in 4-D (static).
        origin: first cell, in finest voxels: one number for all axes, or one for each (static).

    Returns:
        [B, X, Y, Z, C]. Inside jit, sites outside the array are left out; within `check_values(True)` they are an error
        there too.

    Raises:
        InputError: a site lies outside the array, outside jit where that is known.
        ValueError: `x` is no sparse tensor, a number is out of range, or the origin is no multiple of the stride.
    """
    check_tensor("to_dense", x)
    sites, flat = x.sites, isinstance(shape, Sequence | np.ndarray) and len(shape) == 2
    size = np.array(per_axis(shape, sites.axes, name="shape"))
    first = _first_cell(origin, sites.strides, flat)
    coords = jnp.asarray(sites.coords)
    cell = (coords[:, 1:] - first) // np.array(sites.strides)
    valid, inside = sites.valid, ((cell >= 0) & (cell < size)).all(1)
    lost = (valid & ~inside).sum()
    if not isinstance(lost, jax.core.Tracer) and lost:
        places = np.asarray(coords)[np.asarray(valid), 1:]
        raise InputError(
            f"{int(lost)} of {len(places)} sites lie outside a dense array of shape {shape} and origin {origin}: they "
            f"reach from {places.min(0).tolist()} to {places.max(0).tolist()} in voxels; enlarge the shape, or move "
            "the origin."
        )
    if check_values.value:
        checkify.check(lost == 0, "to_dense was given {n} sites outside of the dense array.", n=lost)
    # Rows without a cell go to scans past the last, each to another one: all indices are distinct.
    scan = jnp.where(valid & inside, coords[:, 0], sites.num_scans + jnp.arange(sites.capacity))
    features = jnp.asarray(x.features)
    dense = jnp.zeros((sites.num_scans, *size.tolist(), features.shape[1]), features.dtype)
    cells = [jnp.where(inside, cell[:, axis], 0) for axis in range(sites.axes)]
    dense = dense.at[scan, *cells].set(features, mode="drop", unique_indices=True)
    return dense[:, :, :, 0] if flat else dense


def from_dense(
    dense: Num[AnyArray, "b *shape c"],
    capacity: int | None = None,
    *,
    origin: PerAxis = 0,
    stride: PerAxis = 1,
    mask: Bool[AnyArray, "b *shape"] | None = None,
    name: str = "dense",
) -> tuple[SparseTensor, Int[Array, ""]]:
    """Sparse tensor of a dense array: a site for each cell with a channel that is not zero.

    Args:
        dense: [B, X, Y, Z, C], [B, X, Y, C] in 2-D, [B, X, Y, Z, T, C] in 4-D; differentiable.
        capacity: number of rows of the result; default the number of sites, which is known outside jit.
        origin: coordinate of the first cell, in finest voxels, a multiple of the stride (static).
        stride: length of a cell in finest voxels, one number or one per axis (static).
        mask: True for the cells that are sites, whatever they hold.
        name: name of the sites in identities; a second set of one name in one trace is numbered.

    Returns:
        The tensor; overflow int32 [], the number of sites that did not fit.

    Raises:
        InputError: the array has another number of axes, or its cells are out of the range of a key.
        ValueError: a number is out of range, the origin is no multiple of the stride, the mask has another shape, or
            inside jit no capacity is given.
    """
    if np.ndim(dense) not in (4, 5, 6):
        raise InputError(
            f"dense has the shape {list(np.shape(dense))}; expected [B, X, Y, Z, C], or [B, X, Y, C] in 2-D, or [B, X, "
            "Y, Z, T, C] in 4-D."
        )
    dense, flat = device_array("the values of a dense array", dense), np.ndim(dense) == 4
    size = (*dense.shape[1:3], 1) if flat else dense.shape[1:-1]
    num_scans, axes = check_count("the number of scans", dense.shape[0], least=0, most=MAX_SCANS), len(size)
    strides = per_axis(stride, axes, name="stride")
    first = _first_cell(origin, strides, flat)
    ends, reach = np.stack([first, first + (np.array(size) - 1) * strides]), key_fields(axes).reach.given
    cells = num_scans * int(np.prod(size))
    if np.abs(ends).max() > reach or cells >= 1 << 31:
        raise InputError(
            f"a dense array {list(dense.shape)} with stride {stride} and origin {origin} has {cells} cells from "
            f"{ends[0].tolist()} to {ends[1].tolist()}; a key holds +-{reach} voxels, a row number less than 2^31."
        )
    active = (dense != 0).any(-1) if mask is None else jnp.asarray(mask)
    if active.shape != dense.shape[:-1] or active.dtype != jnp.bool_:
        raise ValueError(
            f"mask is {active.dtype}{list(active.shape)}; expected bool{list(dense.shape[:-1])}, a value for each cell."
        )
    if capacity is None and isinstance(active, jax.core.Tracer):
        raise ValueError("from_dense needs a capacity inside jit, where the number of sites is not known.")
    capacity = int(active.sum()) if capacity is None else capacity
    scan = jnp.arange(cells, dtype=jnp.int32) // max(1, int(np.prod(size)))
    rows, n, overflow = _compact("from_dense", active.reshape(-1), scan, num_scans, capacity)
    place = jnp.stack(jnp.unravel_index(rows, (max(1, num_scans), *(max(1, s) for s in size))), 1)
    coords = place * np.array([1, *strides], np.int32) + np.array([0, *first], np.int32)
    identity = number_identity(name, active)
    sites = Sites(_pad(coords, n, num_scans), n, shorten(strides), num_scans, identity)
    return SparseTensor(take_rows(dense.reshape(cells, dense.shape[-1]), rows, distinct=True), sites), overflow


def _first_cell(origin: PerAxis, strides: tuple[int, ...], flat: bool) -> np.ndarray:
    """Coordinates of the first cell; in 2-D z is 0."""
    axes = len(strides)
    numbers = list(origin) if isinstance(origin, Sequence | np.ndarray) else [origin] * (2 if flat else axes)
    if len(numbers) == 2 and axes == 3:
        numbers.append(0)
    first = np.array(per_axis(numbers, axes, name="origin", least=-(1 << 16)))
    if (first % np.array(strides)).any():
        raise ValueError(
            f"origin is {origin}; sites of stride {shorten(strides)} need a multiple of it along each axis."
        )
    return first


# ---------------------------------------------------------------- shared parts


def check_tensor(user: str, x: Any) -> None:
    """Check that an argument is a sparse tensor with a row of features for each row of its sites.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(x, SparseTensor) or not isinstance(x.sites, Sites):
        given = f"features on a {type(x.sites).__name__}" if isinstance(x, SparseTensor) else f"a {type(x).__name__}"
        raise ValueError(f"{user} was given {given}; expected sparse.SparseTensor(features, sites) of padded sites.")
    dtype = getattr(x.features, "dtype", None)
    if dtype is None or getattr(dtype, "kind", "") in "OSU":
        given = f"a {type(x.features).__name__}" if dtype is None else f"of type {dtype}"
        raise ValueError(f"{user} was given features that are {given}; expected an array of numbers [N, C].")
    if jnp.ndim(x.features) != 2 or len(x.features) != x.sites.capacity:
        raise ValueError(
            f"{user} was given features {list(jnp.shape(x.features))} on sites with {x.sites.capacity} rows, padding "
            "included; expected a row for each: see sparse.pad_rows."
        )


def check_same_channels(a: SparseTensor, b: SparseTensor) -> None:
    """Check that two tensors have the same channels.

    Raises:
        ValueError: they do not.
    """
    if a.features.shape[1] != b.features.shape[1]:
        raise ValueError(f"a sum needs the same channels, given {a.features.shape[1]} and {b.features.shape[1]}.")


def _compact(
    user: str, keep: Bool[Array, " m"], scan: Int[Array, " m"], num_scans: int, capacity: int
) -> tuple[Int[Array, " capacity"], Int[Array, ""], Int[Array, ""]]:
    """Rows to keep, in order and distinct ones from m on behind them; their number; the number that did not fit."""
    capacity, m = check_count("capacity", capacity, least=0), len(keep)
    count, place = keep.sum(dtype=jnp.int32), jnp.cumsum(keep, dtype=jnp.int32) - 1
    if num_scans > 1 and m > capacity:
        keep, place = share_capacity(keep, place, scan, num_scans, capacity)
    past = jnp.arange(m, m + capacity, dtype=jnp.int32)
    rows = past.at[jnp.where(keep, place, capacity)].set(jnp.arange(m, dtype=jnp.int32), mode="drop")
    n = jnp.minimum(count, capacity)
    return rows, n, report_overflow(user, count - n, capacity)


def take_rows(rows: AnyArray, index: Int[Array, " m"], *, distinct: bool = False) -> Array:
    """Rows by index, zero for an index past the end; `distinct` promises that those below it differ."""
    rows = jnp.asarray(rows)
    if not len(rows):  # which JAX takes nothing from
        return jnp.zeros((len(index), *rows.shape[1:]), rows.dtype)
    if distinct:
        index = jnp.where(index < len(rows), index, len(rows) + jnp.arange(len(index)))
    return rows.at[index].get(mode="fill", fill_value=0, unique_indices=distinct)


def _pad(coords: Array, n: Array, num_scans: int) -> Array:
    """Coordinates of which the first n are sites, and the rest become padding."""
    padding = jnp.asarray([num_scans] + [0] * (coords.shape[1] - 1), jnp.int32)
    return jnp.where((jnp.arange(len(coords)) < n)[:, None], coords.astype(jnp.int32), padding)
