"""Sites and kernel maps built inside jit, by JAX alone, from arrays of static shape.

The functions make the same sites and the same rows in the same order as those on the host (`sites`, `neighbors`,
`kernel_map`), with the same identities. A capacity is given for every new set of sites; sites that do not fit are left
out and counted, because nothing can be raised inside jit: every scan keeps a fair share of the capacity. Within
`sparse.check_values(True)`, under `checkify.checkify`, they are an error too. A site is sorted and searched as the two
halves of the host's key, int32, so that 64-bit integers need not be enabled:

    hi = scan << 16 | (x + 2^15)        lo = y << 16 | (z + 2^15)        padding: both 2^31 - 1, behind every site

In 4-D, where fields have 12 bits, the cut goes through y. `docs/layers.md` builds the maps of a network this way.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.covering import Window
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles
from h2a2_jax.sparse.neighbors import check_strides
from h2a2_jax.sparse.sites import (
    MAX_SCANS,
    PerAxis,
    Sites,
    check_count,
    check_values,
    check_voxel_size,
    coarser_identity,
    device_array,
    finer_strides,
    generated_identity,
    key_fields,
    key_offsets,
    number_identity,
    per_axis,
    shorten,
    voxel_offsets,
    with_axes,
)
from h2a2_jax.typing import AnyArray

_BIAS = 1 << 15
_FIELD = (1 << 16) - 1
_LOWEST = np.iinfo(np.int32).min
_PADDING = np.iinfo(np.int32).max
_FAR = 1 << 30


Words = tuple[Array, ...]
"""Keys of sites in int32 words; ordered by the first word, then by the next."""


def below(a: Words, b: Words) -> Bool[Array, "..."]:
    """True where a key comes before the other one."""
    *before, last = zip(a, b, strict=True)
    result = last[0] < last[1]
    for x, y in reversed(before):
        result = (x < y) | ((x == y) & result)
    return result


def equal(a: Words, b: Words) -> Bool[Array, "..."]:
    """True where two keys are of the same site."""
    return _all([x == y for x, y in zip(a, b, strict=True)])


def site_words(sites: Sites) -> Words:
    """Keys of padded sites, ascending."""
    return _pack(jnp.asarray(sites.coords), sites.valid)


def lower_bounds(keys: Words, queries: Words) -> Int[Array, "..."]:
    """Number of ascending keys below each query, by a binary search for all queries at once."""
    n = keys[0].shape[0]
    steps = n.bit_length()

    def advance(i: Array, count: Array) -> Array:
        more = count + (1 << (steps - 1 - i)).astype(jnp.int32)
        return jnp.where((more <= n) & below(_at(keys, more - 1), queries), more, count)

    none = jnp.zeros_like(queries[0])
    # Under shard_map counts vary over the devices, as the keys do.
    return lax.fori_loop(0, steps, advance, none + 0 * keys[0][0]) if n else none


def running_sum(values: Int[Array, "*b n"]) -> Int[Array, "*b n"]:
    """Sums of the first 1, 2, ... n values along the last axis.

    A loop that doubles the length of the sums: `jnp.cumsum` takes three times as long to compile, and on CPUs longer to
    run.
    """
    n = values.shape[-1]
    if not isinstance(n, int):  # a symbolic length, of a program that is exported for every one
        return jnp.cumsum(values, -1, dtype=values.dtype)

    def double(i: Array, sums: Array) -> Array:
        behind = jnp.concatenate([jnp.zeros_like(sums), sums], -1)
        return sums + lax.dynamic_slice_in_dim(behind, n - (1 << i), n, -1)

    return lax.fori_loop(0, max(0, n - 1).bit_length(), double, values)


def _at(words: Words, rows: Int[Array, "..."]) -> Words:
    """Keys of rows 0 and up; the last key where a row is past the end, padding where there is no key."""
    n = words[0].shape[0]
    if n == 0:
        return tuple(jnp.full_like(rows, _PADDING) for _ in words)
    rows = jnp.minimum(rows, n - 1)
    return tuple(_take(word, rows) for word in words)


def _take(values: Array, rows: Array) -> Array:
    """Values of rows that exist: without the comparisons that JAX adds for others."""
    return values.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _put(places: Array, values: Array, fill: Array | int, size: int) -> Int[Array, " size"]:
    """Values at distinct places of an int32 array of `fill`; places at or past its end are left out."""
    empty = jnp.full(size, fill, jnp.int32)
    places, values = places.reshape(-1), values.reshape(-1)
    return empty.at[places].set(values, mode="drop", wrap_negative_indices=False)


def _all(conditions: Iterable[Array]) -> Bool[Array, "..."]:
    """True where all conditions hold; unlike a reduction part of the loop that makes them."""
    return functools.reduce(operator.and_, conditions)


def _pack(coords: Array, valid: Array) -> Words:
    """Keys of rows (scan, x, y, z) or (scan, x, y, z, t); those of padding lie behind all others."""
    scan, *place = (coords[..., i] for i in range(coords.shape[-1]))
    if len(place) == 3:
        x, y, z = place
        words = (scan << 16) | (x + _BIAS), (y << 16) | (z + _BIAS)
    else:
        x, y, z, t = (axis + key_fields(4).bias for axis in place)
        words = (scan << 16) | (x << 4) | (y >> 8), ((y << 24) | (z << 12) | t) ^ _LOWEST
    return tuple(jnp.where(valid, word, _PADDING) for word in words)


def _unpack(words: Words, axes: int) -> list[Array]:
    """Columns (scan, x, y, z) or (scan, x, y, z, t) of keys."""
    hi, lo = words
    if axes == 3:
        return [hi >> 16, (hi & _FIELD) - _BIAS, lo >> 16, (lo & _FIELD) - _BIAS]
    fields, lo = key_fields(4), lo ^ _LOWEST
    y = ((hi & 15) << 8) | ((lo >> 24) & 255)
    place = [(hi >> 4) & fields.mask, y, (lo >> 12) & fields.mask, lo & fields.mask]
    return [hi >> 16, *(axis - fields.bias for axis in place)]


def _move(words: Words, offsets: Int[np.ndarray, "v d"]) -> Words:
    """Keys of the sites at each offset, [v, n]; the offsets are 0 along the last axis."""
    hi, lo = words
    if offsets.shape[1] == 3:
        dx, dy = (jnp.asarray(offsets[:, i, None], jnp.int32) for i in range(2))
        return hi + dx, lo + (dy << 16)
    moves = key_offsets(offsets)[:, None]
    moved = lo + jnp.asarray(moves.astype(np.uint32).view(np.int32))
    return hi + jnp.asarray((moves >> 32).astype(np.int32)) + (moved < lo), moved  # with the carry


# ---------------------------------------------------------------- sites


def voxelize_points(
    points: Float[AnyArray, "m d"] | Int[AnyArray, "m d"],
    scan: Int[AnyArray, " m"],
    n: Int[AnyArray, ""] | int,
    voxel_size: float | Sequence[float],
    capacity: int,
    num_scans: int,
    *,
    name: str = "voxels",
) -> tuple[Sites, Int[Array, " capacity"], Int[Array, ""]]:
    """Voxelise the points of a batch; the first point of a voxel represents it. `voxelize` inside jit.

    Args:
        points: positions in metres, padded; [m, 3], [m, 2] in 2-D, [m, 4] in 4-D.
        scan: scan of each point; points of no scan in 0..num_scans-1 are left out as padding.
        n: number of valid points.
        voxel_size: edge of a voxel in metres, or its edges along the axes (static).
        capacity: number of rows of the sites.
        num_scans: number of scans in the batch.
        name: name of the sites in identities; a second set of one name in one trace is numbered.

    Returns:
        Sites of stride 1; the first point of each, m on padding; overflow int32 [], 0 where the result is complete: the
        number of sites that did not fit, plus the number of points left out because they are not finite or lie outside
        the +-31,743 voxels (+-1,983 in 4-D) that a key can hold. Where sites do not fit every scan keeps a fair share
        of the capacity, its first sites in order.

    Raises:
        InputError: the points have other columns, or `voxel_size` is not above 0 or not one number per axis.
        ValueError: scans are not integers, or a number is out of range.
    """
    points = device_array("points", points)
    scan = _check_scan(scan, points)
    voxels, inside = point_voxels(points, voxel_size)
    given = _given(scan, n, num_scans)
    coords = with_axes(jnp.concatenate([scan[:, None].astype(jnp.int32), voxels], 1))
    words, axes = _pack(coords, given & inside), coords.shape[1] - 1
    sites, first, overflow = _distinct(words, capacity, 1, num_scans, axes, name)
    sites = replace(sites, identity=number_identity(name, sites.coords))
    overflow += (given & ~inside).sum(dtype=jnp.int32)
    return sites, first, report_overflow("voxelize_points", overflow, capacity)


def sites_from_coords(
    coords: Int[AnyArray, "m d"],
    capacity: int,
    num_scans: int,
    *,
    n: Int[AnyArray, ""] | int | None = None,
    stride: PerAxis = 1,
    name: str = "sites",
) -> tuple[Sites, Int[Array, ""]]:
    """The set of the given sites, in any order, duplicates merged. `site_set` inside jit.

    Args:
        coords: integers, rows (scan, x, y, z), (scan, x, y) in 2-D, (scan, x, y, z, t) in 4-D; rows of no scan in
            0..num_scans-1 are padding.
        capacity: number of rows of the result.
        num_scans: number of scans in the batch.
        n: number of valid rows, default all.
        stride: stride of the set; coordinates are multiples of it (static).
        name: name of the sites in identities; a second set of one name in one trace is numbered.

    Returns:
        Sites; overflow int32 [], 0 where the result is complete: the number of sites that did not fit, plus the number
        of rows left out because a coordinate is out of the range of a key or no multiple of the stride.

    Raises:
        InputError: the rows have other lengths.
        ValueError: coordinates are not integers, or a number is out of range.
    """
    rows = with_axes(_integers("sites_from_coords", coords))
    strides = per_axis(stride, rows.shape[1] - 1, name="stride")
    limit = key_fields(rows.shape[1] - 1).reach.given
    given = _given(rows[:, 0], len(rows) if n is None else n, num_scans)
    lost: Array | int = 0
    if max(strides) > 1:
        on_grid = _all((rows[:, 1:] % np.array(strides, np.int32) == 0).T)
        given, lost = given & on_grid, (given & ~on_grid).sum(dtype=jnp.int32)
    sites, overflow = _collect("sites_from_coords", rows, given, limit, capacity, strides, num_scans, name, lost)
    return replace(sites, identity=number_identity(name, sites.coords)), overflow


def downsample_sites(sites: Sites, factor: PerAxis, capacity: int) -> tuple[Sites, Int[Array, ""]]:
    """Sites of the coarser grid, floored: `downsample` inside jit.

    Args:
        sites: sites of the finer grid.
        factor: ratio of the strides, one number or one per axis (static).
        capacity: number of rows of the result.

    Returns:
        Sites; overflow as in `sites_from_coords`.

    Raises:
        ValueError: the factor is not one positive integer per axis.
    """
    check_padded("downsample_sites", sites)
    factors = per_axis(factor, sites.axes, name="factor")
    strides = tuple(s * f for s, f in zip(sites.strides, factors, strict=True))
    coords = jnp.asarray(sites.coords)
    step = strides[0] if len(set(strides)) == 1 else np.array(strides, np.int32)
    if any(s & (s - 1) for s in strides):
        floored = coords[:, 1:] // step * step
    else:
        floored = coords[:, 1:] & -step  # a division takes far more operations
    coords = jnp.concatenate([coords[:, :1], floored], 1)
    identity, limit = coarser_identity(sites.identity, factors), key_fields(sites.axes).reach.derived
    return _collect("downsample_sites", coords, sites.valid, limit, capacity, strides, sites.num_scans, identity)


def cover_sites(
    sites: Sites,
    kernel_size: PerAxis,
    stride: PerAxis,
    capacity: int,
    *,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    shape: PerAxis | None = None,
) -> tuple[Sites, Int[Array, ""]]:
    """Sites of a padded strided convolution, as spconv makes them: `cover` inside jit.

    Args:
        sites: input sites.
        kernel_size: size of the kernel (static).
        stride: ratio of the strides of outputs and inputs (static).
        capacity: number of rows of the result.
        padding: inputs before the output's own place that the kernel covers (static).
        dilation: distance of neighbouring slices, in strides of the inputs (static).
        shape: size of the grid, as in `cover` (static); None for an unbounded one.

    Returns:
        Sites; overflow as in `sites_from_coords`; sites outside of `shape` count too.

    Raises:
        ValueError: numbers are not one per axis, or the kernel is larger than the padded grid.
    """
    check_padded("cover_sites", sites)
    window = Window.of(sites.strides, kernel_size, stride, padding, dilation, shape)
    coords, valid = jnp.asarray(sites.coords), sites.valid
    lost: Array | int = 0
    if shape is not None:
        inside = window.inside(coords)
        valid, lost = valid & inside, (valid & ~inside).sum(dtype=jnp.int32)
    outputs, covered = window.outputs(coords)
    given = (covered & valid).reshape(-1)
    limit, strides = key_fields(sites.axes).reach.derived, window.coarse_strides
    outputs, identity = outputs.reshape(-1, coords.shape[1]), window.identity(sites.identity)
    return _collect("cover_sites", outputs, given, limit, capacity, strides, sites.num_scans, identity, lost)


def generate_sites(
    sites: Sites, kernel_size: PerAxis, capacity: int, factor: PerAxis = 2
) -> tuple[Sites, Int[Array, ""]]:
    """Sites of a generative transposed convolution: `generate` inside jit.

    Args:
        sites: sites of the coarser grid.
        kernel_size: size of the kernel (static).
        capacity: number of rows of the result.
        factor: ratio of the strides, one number or one per axis (static).

    Returns:
        Sites; overflow as in `sites_from_coords`.

    Raises:
        ValueError: the stride of the sites is not a multiple of `factor`.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_padded("generate_sites", sites)
    strides = finer_strides(sites.strides, factor)
    offsets = voxel_offsets(kernel_size, 1, strides, sites.axes)
    moves = jnp.asarray(np.pad(offsets, ((0, 0), (1, 0))).astype(np.int32))
    coords = (jnp.asarray(sites.coords)[None] + moves[:, None]).reshape(-1, 1 + sites.axes)
    identity = generated_identity(sites.identity, kernel_size, factor, sites.axes)
    limit, given = key_fields(sites.axes).reach.derived, jnp.tile(sites.valid, len(moves))
    return _collect("generate_sites", coords, given, limit, capacity, strides, sites.num_scans, identity)


def unite_sites(a: Sites, b: Sites, capacity: int) -> tuple[Sites, Int[Array, ""]]:
    """Union of two sets of one stride: `unite` inside jit.

    Args:
        a: sites.
        b: sites of the same stride.
        capacity: number of rows of the result.

    Returns:
        Sites; overflow int32 [], the number of sites that did not fit.

    Raises:
        ValueError: the strides or the numbers of axes differ, or an argument is no padded sites.
    """
    check_padded("unite_sites", a, b, coarser=False)
    if a.strides != b.strides:
        raise ValueError(f"a union needs one stride, given {a.stride} and {b.stride}.")
    words = tuple(map(jnp.concatenate, zip(site_words(a), site_words(b), strict=True)))
    identity = f"unite({a.identity}, {b.identity})"
    sites, _, overflow = _distinct(words, capacity, a.stride, max(a.num_scans, b.num_scans), a.axes, identity)
    return sites, report_overflow("unite_sites", overflow, capacity)


def find_rows(sites: Sites, coords: Int[AnyArray, "*m d"]) -> Int[Array, "*m"]:
    """Row of each given site: `SiteSet.lookup` inside jit.

    Args:
        sites: the sites.
        coords: integers (scan, x, y, z) in finest voxels, (scan, x, y) in 2-D, (scan, x, y, z, t) in 4-D.

    Returns:
        int32 rows, the sites' capacity where there is no such site.

    Raises:
        InputError: the coordinates have another length.
        ValueError: coordinates are not integers.
    """
    check_padded("find_rows", sites)
    rows = with_axes(_integers("find_rows", coords), sites.axes, rows=False)
    inside = (jnp.abs(rows[..., 1:]) <= key_fields(sites.axes).reach.derived).all(-1)
    inside &= (rows[..., 0] >= 0) & (rows[..., 0] < sites.num_scans)
    return _rows_of(sites, _pack(rows, inside), inside)


def rows_of_part(part: Sites, whole: Sites) -> Int[Array, " n"]:
    """Row in a part of each row of a union: `union_rows` inside jit.

    Args:
        part: sites that were united with others.
        whole: the union.

    Returns:
        int32 [N of the union], the part's capacity where it has no such site, and on padding.

    Raises:
        ValueError: an argument is no padded sites, or the numbers of axes differ.
    """
    check_padded("rows_of_part", part, whole, coarser=False)
    return _rows_of(part, site_words(whole), whole.valid)


def _rows_of(sites: Sites, queries: Words, valid: Array) -> Array:
    """Row of each query, the capacity where it is missing or not valid."""
    keys = site_words(sites)
    rows = lower_bounds(keys, queries)
    return jnp.where(equal(_at(keys, rows), queries) & valid, rows, sites.capacity)


def check_padded(user: str, fine: Any, *others: Any, coarser: bool = True) -> None:
    """Check that sites are padded, of one batch, and that coarse strides are multiples of fine ones.

    Raises:
        ValueError: they are not.
    """
    for sites in (fine, *others):
        if not isinstance(sites, Sites):
            raise ValueError(
                f"{user} was given a {type(sites).__name__}; expected padded Sites: pad a set with sparse.pad_sites, "
                "or make sites with sparse.voxelize_points or sparse.sites_from_coords."
            )
        coords = sites.coords
        if np.ndim(coords) != 2 or not np.issubdtype(coords.dtype, np.integer):
            raise ValueError(
                f"{user} was given Sites with coordinates {coords.dtype}{list(coords.shape)}; expected int32 [N, 4] "
                "([N, 5] in 4-D), as sparse.pad_sites makes them."
            )
    if not others:
        return
    (coarse,) = others
    if (fine.axes, fine.num_scans) != (coarse.axes, coarse.num_scans) and (coarser or fine.axes != coarse.axes):
        raise ValueError(
            f"{user} was given sites with {fine.axes} and {coarse.axes} axes, of {fine.num_scans} and "
            f"{coarse.num_scans} scans; expected are two sets of one batch."
        )
    if coarser:
        check_strides(user, fine.strides, coarse.strides)


def _integers(user: str, coords: AnyArray) -> Array:
    """Coordinates as int32; those that it does not hold become far ones."""
    if not hasattr(coords, "dtype") or not np.issubdtype(coords.dtype, np.integer):
        given = f"coordinates of type {coords.dtype}" if hasattr(coords, "dtype") else f"a {type(coords).__name__}"
        raise ValueError(
            f"{user} was given {given}; expected an array of integers: floor points to voxels first, as "
            "sparse.voxelize_points does."
        )
    if coords.dtype.itemsize >= 4 and coords.dtype != np.int32:  # a cast would wrap them
        xp = np if isinstance(coords, np.ndarray) else jnp
        coords = xp.clip(coords, None if coords.dtype.kind == "u" else -_FAR, _FAR)
    return jnp.asarray(coords).astype(jnp.int32)


def _check_scan(scan: AnyArray, points: Array) -> Array:
    scan = device_array("scans", scan)
    if scan.shape != points.shape[:1] or not jnp.issubdtype(scan.dtype, jnp.integer):
        raise ValueError(
            f"voxelize_points was given scans of shape {list(scan.shape)} and type {scan.dtype} for points "
            f"{list(points.shape)}; expected one integer a point."
        )
    return scan


def _given(scan: Array, n: Array | np.ndarray | int, num_scans: int) -> Array:
    """True for the rows that are not padding."""
    if isinstance(n, int | float | np.generic):
        check_count("n", n, least=0, most=len(scan))
    return (jnp.arange(scan.shape[0]) < n) & (scan >= 0) & (scan < num_scans)


def report_overflow(user: str, overflow: Array, capacity: int) -> Array:
    """The overflow as it is given; within `check_values(True)` one above 0 is an error."""
    if check_values.value:
        checkify.check(
            overflow == 0,
            f"{user} left {{n}} sites out, which do not fit a capacity of {capacity} or are none of the grid; give "
            "more capacity.",
            n=overflow,
        )
    return overflow


def point_voxels(points: Array, voxel_size: float | Sequence[float]) -> tuple[Array, Array]:
    """Voxels floor(p / voxel_size), divided in float32, int32 [m, d]; True for the points with a voxel in range."""
    number = jnp.issubdtype(points.dtype, jnp.floating) or jnp.issubdtype(points.dtype, jnp.integer)
    if points.ndim != 2 or points.shape[1] not in (2, 3, 4) or not number:
        raise InputError(
            f"points have the shape {list(points.shape)} and the type {points.dtype}; expected are numbers [m, 3], "
            "[m, 2] or [m, 4], positions alone: cut colours and intensities off."
        )
    size = check_voxel_size(voxel_size, points.shape[1])
    limit = key_fields(4 if points.shape[1] == 4 else 3).reach.given
    points = points.astype(jnp.float32)
    inside = _all(jnp.isfinite(points).T)
    points = jnp.where(inside[:, None], points, 0)
    estimate = jnp.floor(jnp.clip(points / size, -2.0 * _BIAS, 2.0 * _BIAS))
    voxels = floor_quotient(points, estimate, size)
    inside &= _all((jnp.abs(voxels) < limit).T)
    return voxels.astype(jnp.int32), inside


def floor_quotient(
    points: Float[Array, "*s"], estimate: Float[Array, "*s"], size: np.ndarray | np.floating
) -> Float[Array, "*s"]:
    """floor(fl(p / size)), where fl rounds to the nearest float32, from an estimate that is at most 1 off.

    Compilers replace a division by an approximate one, or by a product with the reciprocal, and points on a voxel's
    face then change sides. Exact without a division: fl(p / s) >= m for an integer m where p - m * s >= -h * s with h
    half the distance of m from the float32 below it (a tie goes to m, whose last bit is zero). The product with m of
    16 bits is exact in each of three parts of s of 8 bits, and so is the difference where its sign is in doubt.
    """
    parts, rest = [], np.asarray(size, np.float32)
    for _ in range(3):
        part = (rest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        parts.append(part)
        rest = rest - part

    def reached(m: Array) -> Array:
        remainder = points
        for part in parts:
            remainder = remainder - m * part
        binade = lax.bitcast_convert_type(jnp.abs(m - 0.5), jnp.int32) & 0x7F800000
        half = lax.bitcast_convert_type(binade, jnp.float32) * np.float32(2.0**-24)
        return remainder >= jnp.where(m == 0, 0, -half * size)

    return estimate - 1 + reached(estimate) + reached(estimate + 1)


def _collect(
    user: str,
    coords: Array,
    given: Array,
    limit: int,
    capacity: int,
    strides: tuple[int, ...],
    num_scans: int,
    identity: str,
    lost: Array | int = 0,
) -> tuple[Sites, Array]:
    """The distinct sites among given rows; overflow counts the rows beyond +-limit and those lost before too."""
    # Without sign, what lies below the range is a large number too.
    inside = _all(((coords[:, 1:] + limit).astype(jnp.uint32) <= 2 * limit).T)
    words, axes = _pack(coords, given & inside), coords.shape[1] - 1
    sites, _, overflow = _distinct(words, capacity, shorten(strides), num_scans, axes, identity)
    return sites, report_overflow(user, overflow + (given & ~inside).sum(dtype=jnp.int32) + lost, capacity)


def _distinct(
    words: Words, capacity: int, stride: int | tuple[int, ...], num_scans: int, axes: int, identity: str
) -> tuple[Sites, Array, Array]:
    """The distinct sites of unordered keys, the first row with each, and the number of sites that did not fit."""
    num_scans = check_count("num_scans", num_scans, least=0, most=MAX_SCANS)
    capacity = check_count("capacity", capacity, least=0)
    m = words[0].shape[0]
    rows = jnp.arange(m, dtype=jnp.int32)
    *ordered, rows = lax.sort((*words, rows), num_keys=len(words), is_stable=True)
    before = tuple(jnp.concatenate([jnp.full(1, -1, jnp.int32), word[:-1]]) for word in ordered)
    starts = ~equal(tuple(ordered), before) & (ordered[0] != _PADDING)
    nth = running_sum(starts.astype(jnp.int32))
    known = isinstance(m, int)  # and no symbolic number, of a program that is exported for every one
    count = jnp.int32(0) if known and m == 0 else nth[-1]
    place = nth - 1
    if num_scans > 1 and not (known and m <= capacity):
        starts, place = share_capacity(starts, place, ordered[0] >> 16, num_scans, capacity)
    chosen = _put(jnp.where(starts, place, capacity), jnp.arange(m, dtype=jnp.int32), 0, capacity)
    n = jnp.minimum(count, capacity)
    valid = jnp.arange(capacity) < n
    fields, padding = _unpack(_at(tuple(ordered), chosen), axes), [num_scans, *[0] * axes]
    coords = jnp.stack([jnp.where(valid, field, empty) for field, empty in zip(fields, padding, strict=True)], 1)
    first = jnp.where(valid, _at((rows,), chosen)[0], m)
    return Sites(coords, n, stride, num_scans, identity), first, count - n


def share_capacity(starts: Array, rank: Array, scan: Array, num_scans: int, capacity: int) -> tuple[Array, Array]:
    """Fair shares of a capacity among scans.

    A scan with fewer sites than its share keeps all, the others share the rest evenly; each keeps its first sites.

    Args:
        starts: bool [m], True for the rows that are sites; they are in order of scans.
        rank: int32 [m], number of sites before each of them.
        scan: int32 [m], scan of each row; any number from num_scans on for rows that are no sites.
        num_scans: number of scans.
        capacity: number of sites that may stay.

    Returns:
        bool [m], True for the sites that stay; int32 [m], the place of each of them among these.
    """
    ones = starts.astype(jnp.int32)
    sites = jnp.zeros(num_scans, jnp.int32).at[scan].add(ones, mode="drop", wrap_negative_indices=False)
    steps = capacity.bit_length()

    def rise(i: Array, level: Array) -> Array:
        more = level + (1 << (steps - 1 - i)).astype(jnp.int32)
        return jnp.where(jnp.minimum(sites, more).sum() <= capacity, more, level)

    level = lax.fori_loop(0, steps, rise, 0 * sites[0])  # all keep that many
    more = (sites > level).astype(jnp.int32)
    even = jnp.minimum(sites, level)
    sites_end, even_end, more_end = running_sum(jnp.stack([sites, even, more]))
    spare = capacity - even_end[-1]  # the first of the others keep one more
    begin, kept = sites_end - sites, even + more * (more_end <= spare)
    shift = even_end + jnp.minimum(more_end, spare) - kept - begin
    end, shift = _take(jnp.stack([begin + kept, shift], 1), jnp.minimum(scan, num_scans - 1)).T  # padding is in none
    return starts & (rank < end), rank + shift


# ---------------------------------------------------------------- kernel maps


def submanifold_map(
    sites: Sites, kernel_size: PerAxis = 3, dilation: PerAxis = 1, *, tile_size: int | None = None
) -> KernelMap:
    """Map of a stride-1 convolution: `submanifold_neighbors` and `pad_map` inside jit.

    Args:
        sites: input sites, which are the output sites too.
        kernel_size: size of the kernel (static).
        dilation: distance of neighbouring slices in strides (static).
        tile_size: number of pairs in a tile (static); None leaves the tiles out.

    Raises:
        ValueError: a size or a dilation is not one positive integer per axis, or the sites are not padded ones.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_padded("submanifold_map", sites)
    sizes = per_axis(kernel_size, sites.axes, name="kernel_size")
    grid = _grid(sizes, dilation, sites.strides)
    if any(k % 2 == 0 for k in sizes):
        return _map(_search(sites, sites, grid), sites, sites, tile_size, "submanifold", sizes)
    # Of two opposite runs one is searched, the other is its mirror image. The run of the centre is searched.
    ahead = grid.shape[1] // 2
    rows = _search(sites, sites, grid[:, ahead:])
    if ahead:
        mirrored = _inverse(rows[:, 1:], sites.capacity)[::-1, ::-1]
        rows = jnp.concatenate([mirrored, rows], 1)
    return _map(rows, sites, sites, tile_size, "submanifold", sizes)


def strided_map(
    inputs: Sites,
    outputs: Sites,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    padding: PerAxis | None = None,
    tile_size: int | None = None,
) -> KernelMap:
    """Map of a strided convolution: `strided_neighbors` and `pad_map` inside jit.

    Args:
        inputs: sites of the finer grid.
        outputs: sites of the coarser grid (`downsample_sites`, `cover_sites`).
        kernel_size: size of the kernel (static).
        dilation: distance of neighbouring slices, in strides of the inputs (static).
        padding: inputs before the output's own place that the kernel covers, as in `strided_neighbors` (static).
        tile_size: number of pairs in a tile (static); None leaves the tiles out.

    Raises:
        ValueError: the stride of the outputs is no multiple of that of the inputs, or numbers are not one per axis.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_padded("strided_map", inputs, outputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    rows = _search(inputs, outputs, _grid(sizes, dilation, inputs.strides, padding))
    return _map(rows, inputs, outputs, tile_size, "strided", sizes)


def pool_map(inputs: Sites, outputs: Sites, kernel_size: PerAxis, *, tile_size: int | None = None) -> KernelMap:
    """Map of a pooling: `pool_neighbors` and `pad_map` inside jit.

    Args:
        inputs: sites of the finer grid.
        outputs: sites of the coarser grid.
        kernel_size: size of the window (static).
        tile_size: number of pairs in a tile (static), for convolutions by this map; pooling reads none.

    Raises:
        ValueError: the stride of the outputs is no multiple of that of the inputs, or numbers are not one per axis.
        InputError: the window reaches farther than a key has room for.
    """
    check_padded("pool_map", inputs, outputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    rows = _search(inputs, outputs, _grid(sizes, 1, inputs.strides))
    return _map(rows, inputs, outputs, tile_size, "pool", sizes)


def generative_map(inputs: Sites, outputs: Sites, kernel_size: PerAxis, *, tile_size: int | None = None) -> KernelMap:
    """Map of a generative transposed convolution: `generative_neighbors` and `pad_map` inside jit.

    Args:
        inputs: sites of the coarser grid.
        outputs: sites of the finer grid (`generate_sites`).
        kernel_size: size of the kernel (static).
        tile_size: number of pairs in a tile (static); None leaves the tiles out.

    Raises:
        ValueError: the stride of the inputs is no multiple of that of the outputs, or numbers are not one per axis.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_padded("generative_map", outputs, inputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    rows = _search(inputs, outputs, -_grid(sizes, 1, outputs.strides))
    return _map(rows, inputs, outputs, tile_size, "generative", sizes)


def inverse_map(kernel_map: KernelMap, *, tile_size: int | None = None) -> KernelMap:
    """Map of an inverse convolution: `inverse_neighbors` and `pad_map` inside jit.

    Args:
        kernel_map: map of a convolution, with tiles or without.
        tile_size: number of pairs in a tile (static); None leaves the tiles out.

    Raises:
        ValueError: the map is none, or of kind "neighbors", whose offsets bring one input row to several output rows.
    """
    if not isinstance(kernel_map, KernelMap) or kernel_map.kind == "neighbors":
        given = f"map of kind {kernel_map.kind!r}" if isinstance(kernel_map, KernelMap) else type(kernel_map).__name__
        raise ValueError(f"inverse_map was given a {given}; expected the KernelMap of a convolution.")
    inputs, outputs, tiles = kernel_map.outputs, kernel_map.inputs, kernel_map.tiles
    rows = _inverse(jnp.asarray(kernel_map.neighbors), kernel_map.in_capacity)
    inverse = _map(rows, inputs, outputs, None, "inverse", kernel_map.kernel_size)
    if tile_size is None:
        return inverse
    check_count("tile_size", tile_size)
    capacity = _tile_capacity(len(rows), inputs, outputs, tile_size, mirrored=False)
    if tiles is not None and not tiles.mirrored and jnp.shape(tiles.in_rows) == (capacity, tile_size):
        # The rows of an offset ascend on both sides of its pairs: the tiles are the same.
        return replace(inverse, tiles=replace(tiles, in_rows=tiles.out_rows, out_rows=tiles.in_rows))
    return _map(rows, inputs, outputs, tile_size, "inverse", kernel_map.kernel_size)


def _map(
    rows: Int[Array, "*v n_out"],
    inputs: Sites,
    outputs: Sites,
    tile_size: int | None,
    kind: str,
    kernel_size: tuple[int, ...] | None,
) -> KernelMap:
    rows = rows.reshape(math.prod(rows.shape[:-1]), outputs.capacity)
    tiles = None
    if tile_size is not None:
        tiles = _cut_pairs(rows, inputs, outputs, check_count("tile_size", tile_size), kind)
    return KernelMap(rows, inputs, outputs, tiles, kind, kernel_size=kernel_size)


def _grid(
    sizes: tuple[int, ...], dilation: PerAxis, strides: tuple[int, ...], padding: PerAxis | None = None
) -> Int[np.ndarray, "h r d"]:
    """Offsets of a kernel's slices, in their order, by height (the last axis) and run of heights."""
    axes = len(strides)
    return voxel_offsets(sizes, dilation, strides, axes, padding=padding).reshape(sizes[-1], -1, axes)


def _search(inputs: Sites, outputs: Sites, grid: Int[np.ndarray, "h r d"]) -> Int[Array, "h r n_out"]:
    """For each offset and output site the input row at out + offset, the inputs' capacity where there is none.

    Keys that differ in height alone follow each other. One binary search finds the first key at or behind the lowest
    site of each run; where a run has no gaps, the next ones follow by comparing with the next key.
    """
    keys, centres = site_words(inputs), site_words(outputs)
    heights, runs = grid[:, 0, -1], grid[0].copy()
    runs[:, -1] = 0
    columns = _move(centres, runs)

    def compare(position: Array, query: Words) -> tuple[Array, Array]:
        hit = equal(_at(keys, position), query) & outputs.valid
        return hit, jnp.where(hit, position, inputs.capacity)

    def raise_query(position: Array, z: Array) -> tuple[Array, Array]:
        hit, rows = compare(position, (*columns[:-1], columns[-1] + z))
        return position + hit, rows

    order = np.argsort(heights)
    z = jnp.asarray(heights[order], jnp.int32)
    if np.diff(heights[order]).max(initial=0) > inputs.strides[-1]:
        query = (
            *(jnp.broadcast_to(word, (len(z), *word.shape)) for word in columns[:-1]),
            columns[-1] + z[:, None, None],
        )
        return compare(lower_bounds(keys, query), query)[1]
    lowest = lower_bounds(keys, (*columns[:-1], columns[-1] + z[0]))
    rows = lax.scan(raise_query, lowest, z)[1]
    return rows if (order[:-1] < order[1:]).all() else rows[::-1]


def _inverse(rows: Int[Array, "*v n_out"], in_capacity: int) -> Int[Array, "*v n_in"]:
    """For each offset and input row the output row that reads it, the outputs' capacity where there is none."""
    *volume, n_out = rows.shape
    size = math.prod(volume) * in_capacity
    first = np.arange(0, size, in_capacity, dtype=np.int32).reshape(*volume, 1) if size else 0
    places = jnp.where(rows < in_capacity, first + rows, size)
    outs = lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)
    return _put(places, outs, n_out, size).reshape(*volume, in_capacity)


def _tile_capacity(volume: int, inputs: Sites, outputs: Sites, tile: int, *, mirrored: bool) -> int:
    """Number of tiles that holds every map of these shapes, as in `kernel_map.cut_pairs`."""
    most, num_scans = min(inputs.capacity, outputs.capacity), inputs.num_scans
    used = volume // 2 if mirrored else volume
    return used * (-(-most // tile) + num_scans) + mirrored * (-(-most // (2 * tile)) + num_scans)


def _cut_pairs(rows: Int[Array, "v n_out"], inputs: Sites, outputs: Sites, tile: int, kind: str) -> PairTiles:
    """The pairs of a map in tiles of `tile` pairs, every pair in the place where `kernel_map.cut_pairs` puts it."""
    volume, num_scans = len(rows), inputs.num_scans
    mirrored = kind == "submanifold" and volume % 2 == 1
    used = volume // 2 if mirrored else volume
    capacity = _tile_capacity(volume, inputs, outputs, tile, mirrored=mirrored)
    rows, scan = rows[:used], jnp.asarray(outputs.scan)
    starts = lower_bounds((scan,), (jnp.arange(num_scans + 1, dtype=jnp.int32),))
    # Number of pairs of each offset up to and with a row, and before the first row of each scan.
    hit = rows < inputs.capacity
    rank = running_sum(hit.astype(jnp.int32))
    if rows.size:
        bounds = jnp.where(starts > 0, _take(rank.T, jnp.maximum(starts, 1) - 1).T, 0)
    else:
        bounds = jnp.zeros((used, num_scans + 1), jnp.int32)
    tiles = lax.div(bounds[:, 1:] - bounds[:, :-1] + (tile - 1), np.int32(tile))
    if mirrored:
        centre_tiles = lax.div(starts[1:] - starts[:-1] + (2 * tile - 1), np.int32(2 * tile))
        tiles = jnp.concatenate([tiles, centre_tiles[None]])
    ends = running_sum(tiles.reshape(-1))
    begins = ends.reshape(tiles.shape) - tiles
    count, index = ends[-1], jnp.arange(capacity, dtype=jnp.int32)
    of_tile = jnp.where(index < count, lower_bounds((ends,), (index + 1,)), 0)
    offset, of_scan = lax.div(of_tile, np.int32(num_scans)), lax.rem(of_tile, np.int32(num_scans))
    nth = jnp.arange(tile, dtype=jnp.int32)
    in_rows, out_rows = (jnp.broadcast_to(past + nth, (capacity, tile)) for past in (inputs.capacity, outputs.capacity))
    if rows.size:
        # Place of a pair: that of the first pair of its offset and scan, plus its rank among these.
        base = begins[:used] * tile - bounds[:, :-1] - 1
        places = _take(base.T, jnp.minimum(scan, num_scans - 1)).T + rank  # padding rows need any scan in range
        places = jnp.where(hit, places, capacity * tile)
        pair = _put(places, jnp.arange(rows.size, dtype=jnp.int32), rows.size, capacity * tile).reshape(capacity, tile)
        held = pair < rows.size
        in_rows = jnp.where(held, _at((rows.reshape(-1),), pair)[0], in_rows)
        out_rows = jnp.where(held, lax.rem(pair, np.int32(outputs.capacity)), out_rows)
    if mirrored:  # the tiles of the centre hold T rows in the list of inputs, the next T in the list of outputs
        first = _take(starts[:-1] - begins[used] * (2 * tile), of_scan) + index * (2 * tile)
        first = jnp.where((offset == used) & (index < count), first, outputs.capacity)[:, None]
        end = _take(starts[1:], of_scan)[:, None]
        in_rows = jnp.where(first + nth < end, first + nth, in_rows)
        out_rows = jnp.where(first + tile + nth < end, first + tile + nth, out_rows)
    return PairTiles(in_rows, out_rows, offset, of_scan, count, mirrored)
