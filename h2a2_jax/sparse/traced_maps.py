"""Kernel maps inside jit: those of `neighbors` and `pad_map`, bit for bit, from padded sites by JAX alone."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from h2a2_jax.sparse.grid import Size3, moved_offsets, size3
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.pair_tiles import PairTiles
from h2a2_jax.sparse.tensor import Sites
from h2a2_jax.sparse.traced_sites import Words, lower_bounds, site_words


def submanifold_map(
    sites: Sites, kernel_size: Size3 = 3, dilation: int = 1, *, tile_size: int | None = None
) -> KernelMap:
    """Map of a stride-1 convolution: `submanifold_neighbors` and `pad_map` inside jit.

    Args:
        sites: input and output sites.
        kernel_size: static.
        dilation: static.
        tile_size: pairs in a tile (static); None leaves the tiles out.

    Raises:
        InputError: the kernel reaches too far, see `moved_offsets`.
    """
    offsets = moved_offsets(kernel_size, dilation, sites.stride)
    if any(k % 2 == 0 for k in size3(kernel_size)):
        return _map(_search(sites, sites, offsets), sites, sites, tile_size, "submanifold")
    # One of each two opposite runs along z is searched, the other is its mirror image; the centre's is its own.
    runs = [tuple(offset) for offset in offsets[:, :2].tolist()]
    centre = [j for j, run in enumerate(runs) if run == (0, 0)]
    ahead = [j for j, run in enumerate(runs) if run > (0, 0)]
    searched = _search(sites, sites, offsets[centre + ahead])
    mirrored = _inverse(searched[len(centre) :], sites.capacity)
    held = [*centre, *ahead, *(len(offsets) - 1 - j for j in ahead)]
    rows = jnp.concatenate([searched, mirrored])[np.argsort(held)]
    return _map(rows, sites, sites, tile_size, "submanifold")


def strided_map(
    inputs: Sites, outputs: Sites, kernel_size: Size3, dilation: int = 1, *, tile_size: int | None = None
) -> KernelMap:
    """Map of a strided convolution: `strided_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the kernel reaches too far, see `moved_offsets`.
    """
    offsets = moved_offsets(kernel_size, dilation, inputs.stride)
    return _map(_search(inputs, outputs, offsets), inputs, outputs, tile_size, "strided")


def pool_map(inputs: Sites, outputs: Sites, kernel_size: Size3, *, tile_size: int | None = None) -> KernelMap:
    """Map of a pooling: `pool_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the window reaches too far, see `moved_offsets`.
    """
    rows = _search(inputs, outputs, moved_offsets(kernel_size, 1, inputs.stride))
    return _map(rows, inputs, outputs, tile_size, "pool")


def generative_map(inputs: Sites, outputs: Sites, kernel_size: Size3, *, tile_size: int | None = None) -> KernelMap:
    """Map of a generative transposed convolution: `generative_neighbors` and `pad_map` inside jit.

    Raises:
        InputError: the kernel reaches too far, see `moved_offsets`.
    """
    rows = _search(inputs, outputs, -moved_offsets(kernel_size, 1, outputs.stride))
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

    The offsets are whole runs along z. One binary search finds the first key at or behind each run's first site; where
    a run leaves no gaps, the next ones follow by comparing with the next key.
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
    """For each offset and input row the output row that it reaches, the outputs' capacity where there is none."""
    volume, n_out = rows.shape
    empty = jnp.full((volume, in_capacity), n_out, jnp.int32)
    outs = jnp.broadcast_to(jnp.arange(n_out, dtype=jnp.int32), rows.shape)
    return empty.at[jnp.arange(volume)[:, None], rows].set(outs, mode="drop")


def _cut_pairs(rows: Int[Array, "v n_out"], inputs: Sites, outputs: Sites, tile: int, kind: str) -> PairTiles:
    """The pairs of a map in tiles of `tile` pairs, each in the place where `cut_pairs` puts it."""
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
    own = jnp.minimum(scan, num_scans - 1)
    outs = jnp.arange(outputs.capacity, dtype=jnp.int32)
    # Place of a pair: that of the first one of its offset and scan, and on by its rank among them.
    places = (begins[:used] * tile - bounds[:, :-1])[:, own] + rank[:, :-1]
    places = jnp.where(hit, places, capacity * tile).reshape(-1)
    in_places, out_places = [places], [places]
    in_values, out_values = [rows.reshape(-1)], [jnp.broadcast_to(outs, rows.shape).reshape(-1)]
    if mirrored:  # the centre's tiles hold one row after the other, in either list
        nth = outs - starts[own]
        centre, place = begins[used][own] + nth // (2 * tile), nth % (2 * tile)
        for half, (into, values) in enumerate([(in_places, in_values), (out_places, out_values)]):
            here = (place // tile == half) & (scan < num_scans)
            into.append(jnp.where(here, centre * tile + place % tile, capacity * tile))
            values.append(outs)

    def filled(places: list[Array], values: list[Array], past: int) -> Array:
        empty = jnp.broadcast_to(past + jnp.arange(tile, dtype=jnp.int32), (capacity, tile)).reshape(-1)
        full = empty.at[jnp.concatenate(places)].set(jnp.concatenate(values), mode="drop")
        return full.reshape(capacity, tile)

    count = ends[-1]
    index = jnp.arange(capacity, dtype=jnp.int32)
    of_tile = jnp.where(index < count, jnp.searchsorted(ends, index, side="right").astype(jnp.int32), 0)
    return PairTiles(
        filled(in_places, in_values, inputs.capacity),
        filled(out_places, out_values, outputs.capacity),
        of_tile // num_scans,
        of_tile % num_scans,
        count,
        mirrored,
    )
