"""Sites and kernel maps built inside jit, by JAX alone, from arrays of static shape.

The functions make the same sites and the same rows in the same order as those on the host (`sites`, `neighbors`,
`kernel_map`). A capacity is given for every new set of sites; sites that do not fit are left out and counted, because
nothing can be raised inside jit. A site is sorted and searched as two int32 words, so that 64-bit integers need not be
enabled:

    hi = scan << 16 | (x + 2^15)        lo = y << 16 | (z + 2^15)        padding: both 2^31 - 1, behind every site

`docs/layers.md` builds the maps of a network this way.
"""

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles
from h2a2_jax.sparse.sites import MAX_COORDINATE, MAX_DERIVED, MAX_SCANS, Sites, Size3, size3, voxel_offsets
from h2a2_jax.typing import AnyArray

_BIAS = 1 << 15
_FIELD = (1 << 16) - 1
_PADDING = np.iinfo(np.int32).max


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

    def double(i: Array, sums: Array) -> Array:
        behind = jnp.concatenate([jnp.zeros_like(sums), sums], -1)
        return sums + lax.dynamic_slice_in_dim(behind, n - (1 << i), n, -1)

    return lax.fori_loop(0, max(0, n - 1).bit_length(), double, values)


def _at(words: Words, rows: Int[Array, "..."]) -> Words:
    """Keys of rows 0 and up; the last key where a row is past the end, padding where there is no key."""
    if not len(words[0]):
        return tuple(jnp.full_like(rows, _PADDING) for _ in words)
    rows = jnp.minimum(rows, len(words[0]) - 1)
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


# ---------------------------------------------------------------- sites


def voxelize_points(
    points: Float[Array, "m 3"],
    scan: Int[AnyArray, " m"],
    n: Int[AnyArray, ""] | int,
    voxel_size: float,
    capacity: int,
    num_scans: int,
) -> tuple[Sites, Int[Array, " capacity"], Int[Array, ""]]:
    """Voxelise the points of a batch; the first point of a voxel represents it. `voxelize` inside jit.

    Args:
        points: positions in metres, padded.
        scan: scan of each point; points of no scan in 0..num_scans-1 are left out as padding.
        n: number of valid points.
        voxel_size: edge of a voxel in metres (static).
        capacity: number of rows of the sites.
        num_scans: number of scans in the batch.

    Returns:
        Sites of stride 1; the first point of each, m on padding; overflow int32 [], 0 where the result is complete: the
        number of sites that did not fit, the last ones in order, plus the number of points left out because they are
        not finite or lie outside the +-31,743 voxels that a key can hold.
    """
    voxels, inside = _voxels(points, voxel_size)
    given = _given(jnp.asarray(scan), n, num_scans)
    coords = jnp.concatenate([jnp.asarray(scan)[:, None].astype(jnp.int32), voxels], 1)
    sites, first, overflow = _distinct(_pack(coords, given & inside), capacity, 1, num_scans)
    return sites, first, overflow + (given & ~inside).sum(dtype=jnp.int32)


def sites_from_coords(
    coords: Int[AnyArray, "m d"],
    capacity: int,
    num_scans: int,
    *,
    n: Int[AnyArray, ""] | int | None = None,
    stride: int = 1,
) -> tuple[Sites, Int[Array, ""]]:
    """The set of the given sites, in any order, duplicates merged. `site_set` inside jit.

    Args:
        coords: rows (scan, x, y, z), or (scan, x, y) in 2-D; rows of no scan in 0..num_scans-1 are padding.
        capacity: number of rows of the result.
        num_scans: number of scans in the batch.
        n: number of valid rows, default all.
        stride: stride of the set; coordinates are multiples of it.

    Returns:
        Sites; overflow int32 [], 0 where the result is complete: the number of sites that did not fit, plus the number
        of rows left out because a coordinate is out of the range of a key.
    """
    rows = jnp.asarray(coords).astype(jnp.int32)
    if rows.shape[1] == 3:
        rows = jnp.concatenate([rows, jnp.zeros_like(rows[:, :1])], 1)
    given = _given(rows[:, 0], len(rows) if n is None else n, num_scans)
    return _collect(rows, given, MAX_COORDINATE, capacity, stride, num_scans)


def downsample_sites(sites: Sites, factor: int, capacity: int) -> tuple[Sites, Int[Array, ""]]:
    """Sites of the coarser grid, floored: `downsample` inside jit.

    Returns:
        Sites; overflow as in `sites_from_coords`.
    """
    stride = sites.stride * factor
    coords = jnp.asarray(sites.coords)
    if stride & (stride - 1):
        floored = coords[:, 1:] // stride * stride
    else:
        floored = coords[:, 1:] & -stride  # a division takes far more operations
    coords = jnp.concatenate([coords[:, :1], floored], 1)
    return _collect(coords, sites.valid, MAX_DERIVED, capacity, stride, sites.num_scans)


def generate_sites(sites: Sites, kernel_size: Size3, capacity: int, factor: int = 2) -> tuple[Sites, Int[Array, ""]]:
    """Sites of a generative transposed convolution: `generate` inside jit.

    Returns:
        Sites; overflow as in `sites_from_coords`.

    Raises:
        ValueError: the stride of the sites is not a multiple of `factor`.
        InputError: the kernel reaches farther than a key has room for.
    """
    if sites.stride % factor:
        raise ValueError(f"sites of stride {sites.stride} have no finer grid at 1/{factor} of it.")
    stride = sites.stride // factor
    offsets = voxel_offsets(kernel_size, 1, stride)
    moves = jnp.asarray(np.pad(offsets, ((0, 0), (1, 0))).astype(np.int32))
    coords = (jnp.asarray(sites.coords)[None] + moves[:, None]).reshape(-1, 4)
    return _collect(coords, jnp.tile(sites.valid, len(moves)), MAX_DERIVED, capacity, stride, sites.num_scans)


def unite_sites(a: Sites, b: Sites, capacity: int) -> tuple[Sites, Int[Array, ""]]:
    """Union of two sets of one stride: `unite` inside jit.

    Returns:
        Sites; overflow int32 [], the number of sites that did not fit.

    Raises:
        ValueError: the strides differ.
    """
    if a.stride != b.stride:
        raise ValueError(f"a union needs one stride, given {a.stride} and {b.stride}.")
    words = tuple(map(jnp.concatenate, zip(site_words(a), site_words(b), strict=True)))
    sites, _, overflow = _distinct(words, capacity, a.stride, max(a.num_scans, b.num_scans))
    return sites, overflow


def rows_of_part(part: Sites, whole: Sites) -> Int[Array, " n"]:
    """Row in a part of each row of a union, the part's capacity where it has none: `union_rows` inside jit."""
    keys, queries = site_words(part), site_words(whole)
    rows = lower_bounds(keys, queries)
    return jnp.where(equal(_at(keys, rows), queries) & whole.valid, rows, part.capacity)


def _given(scan: Array, n: Array | np.ndarray | int, num_scans: int) -> Array:
    """True for the rows that are not padding."""
    return (jnp.arange(len(scan)) < n) & (scan >= 0) & (scan < num_scans)


def _voxels(points: Array, voxel_size: float) -> tuple[Array, Array]:
    """Voxels floor(p / voxel_size), divided in float32, int32 [m, 3]; True for the points with a voxel in range."""
    size = np.float32(voxel_size)
    points = points.astype(jnp.float32)
    inside = _all(jnp.isfinite(points).T)
    points = jnp.where(inside[:, None], points, 0)
    estimate = jnp.floor(jnp.clip(points / size, -2.0 * _BIAS, 2.0 * _BIAS))
    voxels = floor_quotient(points, estimate, size)
    inside &= _all((jnp.abs(voxels) < MAX_COORDINATE).T)
    return voxels.astype(jnp.int32), inside


def floor_quotient(points: Float[Array, "*s"], estimate: Float[Array, "*s"], size: np.float32) -> Float[Array, "*s"]:
    """floor(fl(p / size)), where fl rounds to the nearest float32, from an estimate that is at most 1 off.

    Compilers replace a division by an approximate one, or by a product with the reciprocal, and points on a voxel's
    face then change sides. Exact without a division: fl(p / s) >= m for an integer m where p - m * s >= -h * s with h
    half the distance of m from the float32 below it (a tie goes to m, whose last bit is zero). The product with m of
    16 bits is exact in each of three parts of s of 8 bits, and so is the difference where its sign is in doubt.
    """
    parts, rest = [], np.float32(size)
    for _ in range(3):
        part = (rest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        parts.append(part)
        rest = np.float32(rest - part)

    def reached(m: Array) -> Array:
        remainder = points
        for part in parts:
            remainder = remainder - m * part
        binade = lax.bitcast_convert_type(jnp.abs(m - 0.5), jnp.int32) & 0x7F800000
        half = lax.bitcast_convert_type(binade, jnp.float32) * np.float32(2.0**-24)
        return remainder >= jnp.where(m == 0, 0, -half * size)

    return estimate - 1 + reached(estimate) + reached(estimate + 1)


def _collect(
    coords: Array, given: Array, limit: int, capacity: int, stride: int, num_scans: int
) -> tuple[Sites, Array]:
    """The distinct sites among given rows; overflow counts the rows beyond +-limit too."""
    # Without sign, what lies below the range is a large number too.
    inside = _all(((coords[:, 1:] + limit).astype(jnp.uint32) <= 2 * limit).T)
    sites, _, overflow = _distinct(_pack(coords, given & inside), capacity, stride, num_scans)
    return sites, overflow + (given & ~inside).sum(dtype=jnp.int32)


def _pack(coords: Array, valid: Array) -> Words:
    """Keys of rows (scan, x, y, z); those of padding lie behind all others."""
    scan, x, y, z = (coords[:, i] for i in range(4))
    words = (scan << 16) | (x + _BIAS), (y << 16) | (z + _BIAS)
    return tuple(jnp.where(valid, word, _PADDING) for word in words)


def _distinct(words: Words, capacity: int, stride: int, num_scans: int) -> tuple[Sites, Array, Array]:
    """The distinct sites of unordered keys, the first row with each, and the number of sites that did not fit."""
    if num_scans > MAX_SCANS:
        raise InputError(f"a batch of {num_scans} scans is too large for a key, which holds {MAX_SCANS}; split it.")
    m = words[0].shape[0]
    rows = jnp.arange(m, dtype=jnp.int32)
    *ordered, rows = lax.sort((*words, rows), num_keys=len(words), is_stable=True)
    before = tuple(jnp.concatenate([jnp.full(1, -1, jnp.int32), word[:-1]]) for word in ordered)
    starts = ~equal(tuple(ordered), before) & (ordered[0] != _PADDING)
    nth = running_sum(starts.astype(jnp.int32))
    count = nth[-1] if m else jnp.int32(0)
    chosen = _put(jnp.where(starts, nth - 1, capacity), jnp.arange(m, dtype=jnp.int32), 0, capacity)
    n = jnp.minimum(count, capacity)
    valid = jnp.arange(capacity) < n
    fields = [field for word in _at(tuple(ordered), chosen) for field in (word >> 16, (word & _FIELD) - _BIAS)]
    padding = [num_scans, *[0] * (len(fields) - 1)]
    coords = jnp.stack([jnp.where(valid, field, empty) for field, empty in zip(fields, padding, strict=True)], 1)
    first = jnp.where(valid, _at((rows,), chosen)[0], m)
    return Sites(coords, n, stride, num_scans), first, count - n


# ---------------------------------------------------------------- kernel maps


def submanifold_map(
    sites: Sites, kernel_size: Size3 = 3, dilation: int = 1, *, tile_size: int | None = None
) -> KernelMap:
    """Map of a stride-1 convolution: `submanifold_neighbors` and `pad_map` inside jit.

    Args:
        sites: input sites, which are the output sites too.
        kernel_size: size of the kernel (static).
        dilation: distance of neighbouring slices in strides (static).
        tile_size: number of pairs in a tile (static); None leaves the tiles out.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    grid = _grid(kernel_size, dilation, sites.stride)
    if any(k % 2 == 0 for k in size3(kernel_size)):
        return _map(_search(sites, sites, grid), sites, sites, tile_size, "submanifold")
    # Of two opposite runs one is searched, the other is its mirror image. The run of the centre is searched.
    ahead = grid.shape[1] // 2
    rows = _search(sites, sites, grid[:, ahead:])
    if ahead:
        mirrored = _inverse(rows[:, 1:], sites.capacity)[::-1, ::-1]
        rows = jnp.concatenate([mirrored, rows], 1)
    return _map(rows, sites, sites, tile_size, "submanifold")


def strided_map(
    inputs: Sites, outputs: Sites, kernel_size: Size3, dilation: int = 1, *, tile_size: int | None = None
) -> KernelMap:
    """Map of a strided convolution: `strided_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    rows = _search(inputs, outputs, _grid(kernel_size, dilation, inputs.stride))
    return _map(rows, inputs, outputs, tile_size, "strided")


def pool_map(inputs: Sites, outputs: Sites, kernel_size: Size3, *, tile_size: int | None = None) -> KernelMap:
    """Map of a pooling: `pool_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the window reaches farther than a key has room for.
    """
    rows = _search(inputs, outputs, _grid(kernel_size, 1, inputs.stride))
    return _map(rows, inputs, outputs, tile_size, "pool")


def generative_map(inputs: Sites, outputs: Sites, kernel_size: Size3, *, tile_size: int | None = None) -> KernelMap:
    """Map of a generative transposed convolution: `generative_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    rows = _search(inputs, outputs, -_grid(kernel_size, 1, outputs.stride))
    return _map(rows, inputs, outputs, tile_size, "generative")


def inverse_map(kernel_map: KernelMap, *, tile_size: int | None = None) -> KernelMap:
    """Map of an inverse convolution: `inverse_neighbors` and `pad_map` inside jit."""
    inputs, outputs, tiles = kernel_map.outputs, kernel_map.inputs, kernel_map.tiles
    rows = _inverse(jnp.asarray(kernel_map.neighbors), kernel_map.in_capacity)
    inverse = _map(rows, inputs, outputs, None, "inverse")
    if tile_size is None:
        return inverse
    capacity = _tile_capacity(len(rows), inputs, outputs, tile_size, mirrored=False)
    if tiles is not None and not tiles.mirrored and jnp.shape(tiles.in_rows) == (capacity, tile_size):
        # The rows of an offset ascend on both sides of its pairs: the tiles are the same.
        return replace(inverse, tiles=replace(tiles, in_rows=tiles.out_rows, out_rows=tiles.in_rows))
    return _map(rows, inputs, outputs, tile_size, "inverse")


def _map(rows: Int[Array, "*v n_out"], inputs: Sites, outputs: Sites, tile_size: int | None, kind: str) -> KernelMap:
    rows = rows.reshape(math.prod(rows.shape[:-1]), outputs.capacity)
    tiles = None if tile_size is None else _cut_pairs(rows, inputs, outputs, tile_size, kind)
    return KernelMap(rows, inputs, outputs, tiles, kind)


def _grid(kernel_size: Size3, dilation: int, stride: int) -> Int[np.ndarray, "h r 3"]:
    """Offsets of a kernel's slices, in their order, by height (the last axis) and run of heights."""
    offsets = voxel_offsets(kernel_size, dilation, stride)
    return offsets.reshape(size3(kernel_size)[-1], -1, offsets.shape[1])


def _search(inputs: Sites, outputs: Sites, grid: Int[np.ndarray, "h r 3"]) -> Int[Array, "h r n_out"]:
    """For each offset and output site the input row at out + offset, the inputs' capacity where there is none.

    Keys that differ in height alone follow each other. One binary search finds the first key at or behind the lowest
    site of each run; where a run has no gaps, the next ones follow by comparing with the next key.
    """
    keys, centres = site_words(inputs), site_words(outputs)
    heights = grid[:, 0, 2]
    dx, dy = (jnp.asarray(grid[0, :, i, None], jnp.int32) for i in range(2))
    columns = centres[0] + dx, centres[1] + (dy << 16)

    def compare(position: Array, query: Words) -> tuple[Array, Array]:
        hit = equal(_at(keys, position), query) & outputs.valid
        return hit, jnp.where(hit, position, inputs.capacity)

    def raise_query(position: Array, z: Array) -> tuple[Array, Array]:
        hit, rows = compare(position, (*columns[:-1], columns[-1] + z))
        return position + hit, rows

    order = np.argsort(heights)
    z = jnp.asarray(heights[order], jnp.int32)
    if np.diff(heights[order]).max(initial=0) > inputs.stride:
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
