"""Sites and kernel maps built inside jit, by JAX alone, from arrays of static shape.

The functions make the same sites and the same rows in the same order as those on the host (`sites`, `neighbors`,
`kernel_map`), with the same identities. A capacity is given for every new set of sites; sites that do not fit are left
out and counted, because nothing can be raised inside jit: every scan keeps a fair share of the capacity. Within
`sparse.check_values(True)`, under `checkify.checkify`, they are an error too. A site is sorted and searched as the two
halves of the host's key, int32, so that 64-bit integers need not be enabled:

    hi = scan << 16 | (x + 2^15)        lo = y << 16 | (z + 2^15)        padding: both 2^31 - 1, behind every site

In 4-D, where fields have 12 bits, the cut goes through y. `docs/layers.md` builds the maps of a network this way.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.cover import Window
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


class Words(NamedTuple):
    """Keys of sites, int32 each; ordered by hi, then lo."""

    hi: Array
    lo: Array

    def below(self, other: "Words") -> Bool[Array, "..."]:
        """True where a key comes before the other one."""
        return (self.hi < other.hi) | ((self.hi == other.hi) & (self.lo < other.lo))

    def equal(self, other: "Words") -> Bool[Array, "..."]:
        """True where two keys are of the same site."""
        return (self.hi == other.hi) & (self.lo == other.lo)

    def at(self, rows: Int[Array, "..."]) -> "Words":
        """Keys of rows; padding where a row is past the end."""
        return Words(*(word.at[rows].get(mode="fill", fill_value=_PADDING) for word in self))


def site_words(sites: Sites) -> Words:
    """Keys of padded sites, ascending."""
    return _pack(jnp.asarray(sites.coords), sites.valid)


def lower_bounds(keys: Words, queries: Words) -> Int[Array, "..."]:
    """Number of ascending keys below each query, by a binary search for all queries at once."""
    n = keys.hi.shape[0]

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        below = keys.at(middle).below(queries) & (low < high)
        return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

    low = jnp.zeros_like(queries.hi)
    return lax.fori_loop(0, n.bit_length(), halve, (low, low + n))[0]


def _pack(coords: Array, valid: Array) -> Words:
    """Keys of rows (scan, x, y, z) or (scan, x, y, z, t); those of padding lie behind all others."""
    scan, *place = (coords[..., i] for i in range(coords.shape[-1]))
    if len(place) == 3:
        x, y, z = place
        words = (scan << 16) | (x + _BIAS), (y << 16) | (z + _BIAS)
    else:
        x, y, z, t = (axis + key_fields(4).bias for axis in place)
        words = (scan << 16) | (x << 4) | (y >> 8), ((y << 24) | (z << 12) | t) ^ _LOWEST
    return Words(*(jnp.where(valid, word, _PADDING) for word in words))


def _unpack(words: Words, axes: int) -> Array:
    """Rows of keys, int32 [n, 1 + axes]."""
    hi, lo = words
    if axes == 3:
        return jnp.stack([hi >> 16, (hi & _FIELD) - _BIAS, lo >> 16, (lo & _FIELD) - _BIAS], 1)
    fields, lo = key_fields(4), lo ^ _LOWEST
    y = ((hi & 15) << 8) | ((lo >> 24) & 255)
    place = [(hi >> 4) & fields.mask, y, (lo >> 12) & fields.mask, lo & fields.mask]
    return jnp.stack([hi >> 16, *(axis - fields.bias for axis in place)], 1)


def _move(words: Words, offsets: Int[np.ndarray, "v d"]) -> Words:
    """Keys of the sites at each offset, [v, n]; the offsets are 0 along the last axis."""
    if offsets.shape[1] == 3:
        dx, dy = (jnp.asarray(offsets[:, i, None], jnp.int32) for i in range(2))
        return Words(words.hi + dx, words.lo + (dy << 16))
    moves = key_offsets(offsets)[:, None]
    lo = words.lo + jnp.asarray(moves.astype(np.uint32).view(np.int32))
    return Words(words.hi + jnp.asarray((moves >> 32).astype(np.int32)) + (lo < words.lo), lo)  # with the carry


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
    points = jnp.asarray(points)
    scan = _check_scan(scan, points)
    voxels, inside = _voxels(points, voxel_size)
    given = _given(scan, n, num_scans)
    coords = with_axes(jnp.concatenate([scan[:, None].astype(jnp.int32), voxels], 1))
    words, axes = _pack(coords, given & inside), coords.shape[1] - 1
    sites, first, overflow = _distinct(words, capacity, 1, num_scans, axes, name)
    sites = replace(sites, identity=number_identity(name, sites.coords))
    overflow += (given & ~inside).sum(dtype=jnp.int32)
    return sites, first, _report("voxelize_points", overflow, capacity)


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
        on_grid = (rows[:, 1:] % np.array(strides, np.int32) == 0).all(1)
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
    coords = jnp.concatenate([coords[:, :1], coords[:, 1:] // step * step], 1)
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

    Returns:
        Sites; overflow int32 [], the number of sites that did not fit.

    Raises:
        ValueError: the strides or the numbers of axes differ.
    """
    check_padded("unite_sites", a, b, coarser=False)
    if a.strides != b.strides:
        raise ValueError(f"a union needs one stride, given {a.stride} and {b.stride}.")
    words = Words(*map(jnp.concatenate, zip(site_words(a), site_words(b), strict=True)))
    identity = f"unite({a.identity}, {b.identity})"
    sites, _, overflow = _distinct(words, capacity, a.stride, max(a.num_scans, b.num_scans), a.axes, identity)
    return sites, _report("unite_sites", overflow, capacity)


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
    """Row in a part of each row of a union, the part's capacity where it has none: `union_rows` inside jit."""
    check_padded("rows_of_part", part, whole, coarser=False)
    return _rows_of(part, site_words(whole), whole.valid)


def _rows_of(sites: Sites, queries: Words, valid: Array) -> Array:
    """Row of each query, the capacity where it is missing or not valid."""
    keys = site_words(sites)
    rows = lower_bounds(keys, queries)
    return jnp.where(keys.at(rows).equal(queries) & valid, rows, sites.capacity)


def check_padded(user: str, fine: Any, coarse: Any = None, *, coarser: bool = True) -> None:
    """Check that sites are padded, of one batch, and that coarse strides are multiples of fine ones.

    Raises:
        ValueError: they are not.
    """
    for sites in (fine,) if coarse is None else (fine, coarse):
        if not isinstance(sites, Sites):
            raise ValueError(
                f"{user} was given a {type(sites).__name__}; expected padded Sites: pad a set with sparse.pad_sites, "
                "or make sites with sparse.voxelize_points or sparse.sites_from_coords."
            )
    if coarse is None:
        return
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
    scan = jnp.asarray(scan)
    if scan.shape != points.shape[:1] or not jnp.issubdtype(scan.dtype, jnp.integer):
        raise ValueError(
            f"voxelize_points was given scans of shape {list(scan.shape)} and type {scan.dtype} for points "
            f"{list(points.shape)}; expected one integer a point."
        )
    return scan


def _given(scan: Array, n: Array | np.ndarray | int, num_scans: int) -> Array:
    """True for the rows that are not padding."""
    return (jnp.arange(len(scan)) < n) & (scan >= 0) & (scan < num_scans)


def _report(user: str, overflow: Array, capacity: int) -> Array:
    """The overflow; an error where values are checked."""
    if check_values.value:
        checkify.check(
            overflow == 0,
            f"{user} left {{n}} sites out, which do not fit a capacity of {capacity} or are none of the grid; give "
            "more capacity.",
            n=overflow,
        )
    return overflow


def _voxels(points: Array, voxel_size: float | Sequence[float]) -> tuple[Array, Array]:
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
    inside = jnp.isfinite(points).all(1)
    points = jnp.where(inside[:, None], points, 0)
    estimate = jnp.floor(jnp.clip(points / size, -2.0 * _BIAS, 2.0 * _BIAS))
    voxels = floor_quotient(points, estimate, size)
    inside &= (jnp.abs(voxels) < limit).all(1)
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
    inside = (coords[:, 1:] >= -limit).all(1) & (coords[:, 1:] <= limit).all(1)
    words, axes = _pack(coords, given & inside), coords.shape[1] - 1
    sites, _, overflow = _distinct(words, capacity, shorten(strides), num_scans, axes, identity)
    return sites, _report(user, overflow + (given & ~inside).sum(dtype=jnp.int32) + lost, capacity)


def _distinct(
    words: Words, capacity: int, stride: int | tuple[int, ...], num_scans: int, axes: int, identity: str
) -> tuple[Sites, Array, Array]:
    """The distinct sites of unordered keys, the first row with each, and the number of sites that did not fit."""
    num_scans = check_count("num_scans", num_scans, least=0, most=MAX_SCANS)
    capacity = check_count("capacity", capacity)
    m = words.hi.shape[0]
    rows = jnp.arange(m, dtype=jnp.int32)
    hi, lo, rows = lax.sort((*words, rows), num_keys=2, is_stable=True)
    ordered = Words(hi, lo)
    before = Words(*(jnp.concatenate([jnp.full(1, -1, jnp.int32), word[:-1]]) for word in ordered))
    starts = ~ordered.equal(before) & (hi != _PADDING)
    count = starts.sum(dtype=jnp.int32)
    place = jnp.cumsum(starts, dtype=jnp.int32) - 1
    if num_scans > 1:
        starts, place = _share(starts, place, hi >> 16, num_scans, capacity)
    place = jnp.where(starts, place, capacity)
    chosen = jnp.full(capacity, m, jnp.int32).at[place].set(jnp.arange(m, dtype=jnp.int32), mode="drop")
    coords = _unpack(ordered.at(chosen), axes)
    n = jnp.minimum(count, capacity)
    padding = jnp.asarray([num_scans] + [0] * axes, jnp.int32)
    coords = jnp.where((jnp.arange(capacity) < n)[:, None], coords, padding)
    first = rows.at[chosen].get(mode="fill", fill_value=m)
    return Sites(coords, n, stride, num_scans, identity), first, count - n


def _share(starts: Array, rank: Array, scan: Array, num_scans: int, capacity: int) -> tuple[Array, Array]:
    """Fair shares of the capacity: the sites that stay, and the row of each.

    A scan with fewer sites than its share keeps all; the others share the rest evenly. Sites are in order of scans;
    `rank` is their place among all. The level L of the shares is the largest with sum(min(sites, L)) <= capacity, and
    sum(min(sites, L)) is the smallest over k of the k least numbers of sites plus L for each other scan.
    """
    sites = jnp.zeros(num_scans, jnp.int32).at[scan].add(starts.astype(jnp.int32), mode="drop", indices_are_sorted=True)
    ascending = jnp.sort(sites)
    least = jnp.cumsum(ascending) - ascending
    level = lax.div(capacity - least, num_scans - jnp.arange(num_scans, dtype=jnp.int32)).max()
    more = sites > level
    spare = capacity - jnp.minimum(sites, level).sum(dtype=jnp.int32)
    kept = jnp.minimum(sites, level) + (more & (jnp.cumsum(more, dtype=jnp.int32) <= spare))
    scan = jnp.minimum(scan, num_scans - 1)  # padding is in none
    begin, end = jnp.cumsum(sites) - sites, jnp.cumsum(kept)
    inside = rank - begin[scan]
    return starts & (inside < kept[scan]), inside + (end - kept)[scan]


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
    offsets = voxel_offsets(sizes, dilation, sites.strides, sites.axes)
    if any(k % 2 == 0 for k in sizes):
        return _map(_search(sites, sites, offsets), sites, sites, tile_size, "submanifold", sizes)
    # Of two opposite runs along the last axis one is searched, the other is its mirror image. The run of the centre is
    # searched.
    runs = [tuple(offset) for offset in offsets[:, :-1].tolist()]
    middle = (0,) * (sites.axes - 1)
    centre = [j for j, run in enumerate(runs) if run == middle]
    ahead = [j for j, run in enumerate(runs) if run > middle]
    searched = _search(sites, sites, offsets[centre + ahead])
    mirrored = _inverse(searched[len(centre) :], sites.capacity)
    held = [*centre, *ahead, *(len(offsets) - 1 - j for j in ahead)]
    rows = jnp.concatenate([searched, mirrored])[np.argsort(held)]
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

    Raises:
        ValueError: the stride of the outputs is no multiple of that of the inputs, or numbers are not one per axis.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_padded("strided_map", inputs, outputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    offsets = voxel_offsets(sizes, dilation, inputs.strides, inputs.axes, padding=padding)
    return _map(_search(inputs, outputs, offsets), inputs, outputs, tile_size, "strided", sizes)


def pool_map(inputs: Sites, outputs: Sites, kernel_size: PerAxis, *, tile_size: int | None = None) -> KernelMap:
    """Map of a pooling: `pool_neighbors` and `pad_map` inside jit.

    Raises:
        ValueError: the stride of the outputs is no multiple of that of the inputs, or numbers are not one per axis.
        InputError: the window reaches farther than a key has room for.
    """
    check_padded("pool_map", inputs, outputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    rows = _search(inputs, outputs, voxel_offsets(sizes, 1, inputs.strides, inputs.axes))
    return _map(rows, inputs, outputs, tile_size, "pool", sizes)


def generative_map(inputs: Sites, outputs: Sites, kernel_size: PerAxis, *, tile_size: int | None = None) -> KernelMap:
    """Map of a generative transposed convolution: `generative_neighbors` and `pad_map` inside jit.

    Raises:
        ValueError: the stride of the inputs is no multiple of that of the outputs, or numbers are not one per axis.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_padded("generative_map", outputs, inputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    rows = _search(inputs, outputs, -voxel_offsets(sizes, 1, outputs.strides, inputs.axes))
    return _map(rows, inputs, outputs, tile_size, "generative", sizes)


def inverse_map(kernel_map: KernelMap, *, tile_size: int | None = None) -> KernelMap:
    """Map of an inverse convolution: `inverse_neighbors` and `pad_map` inside jit.

    Raises:
        ValueError: the map is of kind "neighbors", whose offsets bring one input row to several output rows.
    """
    if not isinstance(kernel_map, KernelMap) or kernel_map.kind == "neighbors":
        given = f"map of kind {kernel_map.kind!r}" if isinstance(kernel_map, KernelMap) else type(kernel_map).__name__
        raise ValueError(f"inverse_map was given a {given}; expected the KernelMap of a convolution.")
    rows = _inverse(jnp.asarray(kernel_map.neighbors), kernel_map.in_capacity)
    return _map(rows, kernel_map.outputs, kernel_map.inputs, tile_size, "inverse", kernel_map.kernel_size)


def _map(
    rows: Array,
    inputs: Sites,
    outputs: Sites,
    tile_size: int | None,
    kind: str,
    kernel_size: tuple[int, ...] | None,
) -> KernelMap:
    tiles = None
    if tile_size is not None:
        tiles = _cut_pairs(rows, inputs, outputs, check_count("tile_size", tile_size), kind)
    return KernelMap(rows, inputs, outputs, tiles, kind, kernel_size=kernel_size)


def _search(inputs: Sites, outputs: Sites, offsets: Int[np.ndarray, "v d"]) -> Int[Array, "v n_out"]:
    """For each offset and output site the input row at out + offset, the inputs' capacity where there is none.

    The offsets are whole runs along z, the last axis. One binary search finds the first key at or behind the first
    site of each run; where a run has no gaps, the next ones follow by comparing with the next key.
    """
    keys, centres = site_words(inputs), site_words(outputs)
    runs, run_of = np.unique(offsets[:, :-1], axis=0, return_inverse=True)
    heights, height_of = np.unique(offsets[:, -1], return_inverse=True)
    columns = _move(centres, np.pad(runs, ((0, 0), (0, 1))))
    found = []
    for i, z in enumerate(heights.tolist()):
        query = Words(columns.hi, columns.lo + z)
        if i == 0 or z - heights[i - 1] > inputs.strides[-1]:
            position = lower_bounds(keys, query)
        hit = keys.at(position).equal(query) & outputs.valid
        found.append(jnp.where(hit, position, inputs.capacity))
        position = position + hit
    return jnp.concatenate(found)[height_of.ravel() * len(runs) + run_of.ravel()]


def _inverse(rows: Int[Array, "v n_out"], in_capacity: int) -> Int[Array, "v n_in"]:
    """For each offset and input row the output row that reads it, the outputs' capacity where there is none."""
    volume, n_out = rows.shape
    empty = jnp.full((volume, in_capacity), n_out, jnp.int32)
    outs = jnp.broadcast_to(jnp.arange(n_out, dtype=jnp.int32), rows.shape)
    return empty.at[jnp.arange(volume)[:, None], rows].set(outs, mode="drop")


def _cut_pairs(rows: Int[Array, "v n_out"], inputs: Sites, outputs: Sites, tile: int, kind: str) -> PairTiles:
    """The pairs of a map in tiles of `tile` pairs, every pair in the place where `kernel_map.cut_pairs` puts it."""
    volume, num_scans = len(rows), inputs.num_scans
    mirrored = kind == "submanifold" and volume % 2 == 1
    used, most = volume // 2 if mirrored else volume, min(inputs.capacity, outputs.capacity)
    capacity = used * (-(-most // tile) + num_scans) + mirrored * (-(-most // (2 * tile)) + num_scans)
    rows, scan = rows[:used], jnp.asarray(outputs.scan)
    hit = rows < inputs.capacity
    rank = jnp.pad(jnp.cumsum(hit, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
    starts = jnp.searchsorted(scan, jnp.arange(num_scans + 1)).astype(jnp.int32)
    bounds = rank[:, starts]
    tiles = -(-jnp.diff(bounds, axis=1) // tile)
    if mirrored:
        tiles = jnp.concatenate([tiles, -(-jnp.diff(starts) // (2 * tile))[None]])
    ends = jnp.cumsum(tiles.reshape(-1), dtype=jnp.int32)
    begins = jnp.pad(ends, (1, 0))[:-1].reshape(-1, num_scans)
    known_scan = jnp.minimum(scan, num_scans - 1)  # padding rows need any index in range
    outs = jnp.arange(outputs.capacity, dtype=jnp.int32)
    # Place of a pair: that of the first pair of its offset and scan, plus its rank among these.
    places = (begins[:used] * tile - bounds[:, :-1])[:, known_scan] + rank[:, :-1]
    places = jnp.where(hit, places, capacity * tile).reshape(-1)
    in_places, out_places = [places], [places]
    in_values, out_values = [rows.reshape(-1)], [jnp.broadcast_to(outs, rows.shape).reshape(-1)]
    if mirrored:  # the tiles of the centre hold T rows in the list of inputs, the next T in the list of outputs
        nth = outs - starts[known_scan]
        centre, place = begins[used][known_scan] + nth // (2 * tile), nth % (2 * tile)
        for half, (into, values) in enumerate([(in_places, in_values), (out_places, out_values)]):
            here = (place // tile == half) & (scan < num_scans)
            into.append(jnp.where(here, centre * tile + place % tile, capacity * tile))
            values.append(outs)

    def fill(places: list[Array], values: list[Array], past: int) -> Array:
        empty = jnp.broadcast_to(past + jnp.arange(tile, dtype=jnp.int32), (capacity, tile)).reshape(-1)
        full = empty.at[jnp.concatenate(places)].set(jnp.concatenate(values), mode="drop")
        return full.reshape(capacity, tile)

    count = ends[-1]
    index = jnp.arange(capacity, dtype=jnp.int32)
    of_tile = jnp.where(index < count, jnp.searchsorted(ends, index, side="right").astype(jnp.int32), 0)
    return PairTiles(
        fill(in_places, in_values, inputs.capacity),
        fill(out_places, out_values, outputs.capacity),
        of_tile // num_scans,
        of_tile % num_scans,
        count,
        mirrored,
    )
