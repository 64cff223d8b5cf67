"""Sites and kernel maps built inside jit, by JAX alone, from arrays of static shape.

The functions make the same sites and the same rows in the same order as those on the host (`sites`, `neighbors`,
`kernel_map`). A capacity is given for every new set of sites; sites that do not fit are left out and counted, because
nothing can be raised inside jit. A site is sorted and searched as two int32 words, so that 64-bit integers need not be
enabled:

    hi = scan << 16 | (x + 2^15)        lo = y << 16 | (z + 2^15)        padding: both 2^31 - 1, behind every site

`docs/layers.md` builds the maps of a network this way.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.kernel_map import KernelMap, PairTiles
from h2a2_jax.sparse.sites import MAX_COORDINATE, MAX_DERIVED, MAX_SCANS, PerAxis, Sites, per_axis, voxel_offsets
from h2a2_jax.typing import AnyArray

_BIAS = 1 << 15
_FIELD = (1 << 16) - 1
_PADDING = np.iinfo(np.int32).max


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
    coords = jnp.concatenate([coords[:, :1], coords[:, 1:] // stride * stride], 1)
    return _collect(coords, sites.valid, MAX_DERIVED, capacity, stride, sites.num_scans)


def generate_sites(sites: Sites, kernel_size: PerAxis, capacity: int, factor: int = 2) -> tuple[Sites, Int[Array, ""]]:
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
    words = Words(*map(jnp.concatenate, zip(site_words(a), site_words(b), strict=True)))
    sites, _, overflow = _distinct(words, capacity, a.stride, max(a.num_scans, b.num_scans))
    return sites, overflow


def rows_of_part(part: Sites, whole: Sites) -> Int[Array, " n"]:
    """Row in a part of each row of a union, the part's capacity where it has none: `union_rows` inside jit."""
    keys, queries = site_words(part), site_words(whole)
    rows = lower_bounds(keys, queries)
    return jnp.where(keys.at(rows).equal(queries) & whole.valid, rows, part.capacity)


def _given(scan: Array, n: Array | np.ndarray | int, num_scans: int) -> Array:
    """True for the rows that are not padding."""
    return (jnp.arange(len(scan)) < n) & (scan >= 0) & (scan < num_scans)


def _voxels(points: Array, voxel_size: float) -> tuple[Array, Array]:
    """Voxels floor(p / voxel_size), divided in float32, int32 [m, 3]; True for the points with a voxel in range."""
    size = np.float32(voxel_size)
    points = points.astype(jnp.float32)
    inside = jnp.isfinite(points).all(1)
    points = jnp.where(inside[:, None], points, 0)
    estimate = jnp.floor(jnp.clip(points / size, -2.0 * _BIAS, 2.0 * _BIAS))
    voxels = floor_quotient(points, estimate, size)
    inside &= (jnp.abs(voxels) < MAX_COORDINATE).all(1)
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
    inside = (coords[:, 1:] >= -limit).all(1) & (coords[:, 1:] <= limit).all(1)
    sites, _, overflow = _distinct(_pack(coords, given & inside), capacity, stride, num_scans)
    return sites, overflow + (given & ~inside).sum(dtype=jnp.int32)


def _pack(coords: Array, valid: Array) -> Words:
    """Keys of rows (scan, x, y, z); those of padding lie behind all others."""
    scan, x, y, z = (coords[:, i] for i in range(4))
    words = (scan << 16) | (x + _BIAS), (y << 16) | (z + _BIAS)
    return Words(*(jnp.where(valid, word, _PADDING) for word in words))


def _distinct(words: Words, capacity: int, stride: int, num_scans: int) -> tuple[Sites, Array, Array]:
    """The distinct sites of unordered keys, the first row with each, and the number of sites that did not fit."""
    if num_scans > MAX_SCANS:
        raise InputError(f"a batch of {num_scans} scans is too large for a key, which holds {MAX_SCANS}; split it.")
    m = words.hi.shape[0]
    rows = jnp.arange(m, dtype=jnp.int32)
    hi, lo, rows = lax.sort((*words, rows), num_keys=2, is_stable=True)
    ordered = Words(hi, lo)
    before = Words(*(jnp.concatenate([jnp.full(1, -1, jnp.int32), word[:-1]]) for word in ordered))
    starts = ~ordered.equal(before) & (hi != _PADDING)
    count = starts.sum(dtype=jnp.int32)
    place = jnp.where(starts, jnp.cumsum(starts, dtype=jnp.int32) - 1, capacity)
    chosen = jnp.full(capacity, m, jnp.int32).at[place].set(jnp.arange(m, dtype=jnp.int32), mode="drop")
    hi, lo = ordered.at(chosen)
    coords = jnp.stack([hi >> 16, (hi & _FIELD) - _BIAS, lo >> 16, (lo & _FIELD) - _BIAS], 1)
    n = jnp.minimum(count, capacity)
    padding = jnp.asarray([num_scans, 0, 0, 0], jnp.int32)
    coords = jnp.where((jnp.arange(capacity) < n)[:, None], coords, padding)
    first = rows.at[chosen].get(mode="fill", fill_value=m)
    return Sites(coords, n, stride, num_scans), first, count - n


# ---------------------------------------------------------------- kernel maps


def submanifold_map(
    sites: Sites, kernel_size: PerAxis = 3, dilation: int = 1, *, tile_size: int | None = None
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
    offsets = voxel_offsets(kernel_size, dilation, sites.stride)
    if any(k % 2 == 0 for k in per_axis(kernel_size)):
        return _map(_search(sites, sites, offsets), sites, sites, tile_size, "submanifold")
    # Of two opposite runs along z one is searched, the other is its mirror image. The run of the centre is searched.
    runs = [tuple(offset) for offset in offsets[:, :2].tolist()]
    centre = [j for j, run in enumerate(runs) if run == (0, 0)]
    ahead = [j for j, run in enumerate(runs) if run > (0, 0)]
    searched = _search(sites, sites, offsets[centre + ahead])
    mirrored = _inverse(searched[len(centre) :], sites.capacity)
    held = [*centre, *ahead, *(len(offsets) - 1 - j for j in ahead)]
    rows = jnp.concatenate([searched, mirrored])[np.argsort(held)]
    return _map(rows, sites, sites, tile_size, "submanifold")


def strided_map(
    inputs: Sites, outputs: Sites, kernel_size: PerAxis, dilation: int = 1, *, tile_size: int | None = None
) -> KernelMap:
    """Map of a strided convolution: `strided_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    offsets = voxel_offsets(kernel_size, dilation, inputs.stride)
    return _map(_search(inputs, outputs, offsets), inputs, outputs, tile_size, "strided")


def pool_map(inputs: Sites, outputs: Sites, kernel_size: PerAxis, *, tile_size: int | None = None) -> KernelMap:
    """Map of a pooling: `pool_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the window reaches farther than a key has room for.
    """
    rows = _search(inputs, outputs, voxel_offsets(kernel_size, 1, inputs.stride))
    return _map(rows, inputs, outputs, tile_size, "pool")


def generative_map(inputs: Sites, outputs: Sites, kernel_size: PerAxis, *, tile_size: int | None = None) -> KernelMap:
    """Map of a generative transposed convolution: `generative_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    rows = _search(inputs, outputs, -voxel_offsets(kernel_size, 1, outputs.stride))
    return _map(rows, inputs, outputs, tile_size, "generative")


def inverse_map(kernel_map: KernelMap, *, tile_size: int | None = None) -> KernelMap:
    """Map of an inverse convolution: `inverse_neighbors` and `pad_map` inside jit."""
    rows = _inverse(jnp.asarray(kernel_map.neighbors), kernel_map.in_capacity)
    return _map(rows, kernel_map.outputs, kernel_map.inputs, tile_size, "inverse")


def _map(rows: Array, inputs: Sites, outputs: Sites, tile_size: int | None, kind: str) -> KernelMap:
    tiles = None if tile_size is None else _cut_pairs(rows, inputs, outputs, tile_size, kind)
    return KernelMap(rows, inputs, outputs, tiles, kind)


def _search(inputs: Sites, outputs: Sites, offsets: Int[np.ndarray, "v 3"]) -> Int[Array, "v n_out"]:
    """For each offset and output site the input row at out + offset, the inputs' capacity where there is none.

    The offsets are whole runs along z. One binary search finds the first key at or behind the first site of each run;
    where a run has no gaps, the next ones follow by comparing with the next key.
    """
    keys, centres = site_words(inputs), site_words(outputs)
    runs, run_of = np.unique(offsets[:, :2], axis=0, return_inverse=True)
    heights, height_of = np.unique(offsets[:, 2], return_inverse=True)
    dx, dy = (jnp.asarray(runs[:, i, None], jnp.int32) for i in range(2))
    columns = Words(centres.hi + dx, centres.lo + (dy << 16))
    found = []
    for i, z in enumerate(heights.tolist()):
        query = Words(columns.hi, columns.lo + z)
        if i == 0 or z - heights[i - 1] > inputs.stride:
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
