"""The pairs of a kernel map as a list sorted by offset and scan, cut into tiles."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from h2a2_jax.sparse.neighbors import NeighborTable
from h2a2_jax.typing import Leaf, static_field


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairTiles:
    """Pairs (input row, output row) of one offset and one scan, cut into tiles of T.

    A mirrored list belongs to a submanifold map with an odd kernel: it holds the first half of the offsets only, each
    tile serving offset j from input to output row and offset V-1-j from output to input row. At the centre j = V-1-j,
    where every row is its own neighbour, a tile holds rows of the scan in both lists, and each row goes to itself.

    Attributes:
        in_rows: int32 [C, T]; places without a pair hold distinct indices past the last row.
        out_rows: int32 [C, T], likewise.
        offset: int32 [C].
        scan: int32 [C].
        count: int32 [], tiles in use; the others hold no pair.
        mirrored: static.
    """

    in_rows: Leaf
    out_rows: Leaf
    offset: Leaf
    scan: Leaf
    count: Leaf
    mirrored: bool = static_field()


def choose_tile_size(pairs: float, channels: int) -> int:
    """Pairs in a tile for the algorithm "tiles" on CPUs.

    As many as a scan has at one offset, so that few tiles do it; not so many that rows leave the caches; at least as
    many as keep the threads of one matmul busy (measured: 1024 at 128 channels, where 512 take as long).

    Args:
        pairs: expected at one offset of one scan.
        channels: of the layer, the geometric mean of in and out.
    """
    most = min(4096, max(1024, 2**18 // max(1, channels)))
    least = 1024 if pairs > 600 else 64
    return int(min(most, max(least, 2 ** round(math.log2(max(pairs, 1))))))


@dataclass(frozen=True)
class Direction:
    """Pairs of a tile that go one way: rows to read and to write, int32 [T], and the offset they go by, int32 []."""

    source: Array
    target: Array
    offset: Array


def directions(tiles: PairTiles, index: Any, volume: int) -> tuple[Direction, ...]:
    """The one way, or the two of a mirrored list, that the pairs of tile `index` go.

    Args:
        tiles: of arrays.
        index: of a tile, or of several.
        volume: offsets V of the kernel.
    """
    i, o, k = tiles.in_rows[index], tiles.out_rows[index], tiles.offset[index]
    if not tiles.mirrored:
        return (Direction(i, o, k),)
    centre = (k == volume // 2)[..., None]
    return Direction(i, jnp.where(centre, i, o), k), Direction(o, jnp.where(centre, o, i), volume - 1 - k)


def cut_pairs(table: NeighborTable, in_capacity: int, out_capacity: int, tile: int) -> PairTiles:
    """The pairs of a table in tiles of `tile` pairs (numpy arrays)."""
    volume, num_scans = len(table.rows), table.inputs.num_scans
    mirrored = table.kind == "submanifold" and volume % 2 == 1
    half = volume // 2
    most = min(in_capacity, out_capacity)
    # Worst case: every offset full, and one tile of each (scan, offset) begun but not filled.
    capacity = (half if mirrored else volume) * (-(-most // tile) + num_scans)
    if mirrored:
        capacity += -(-most // (2 * tile)) + num_scans
    in_rows = np.tile(in_capacity + np.arange(tile, dtype=np.int32), (capacity, 1))
    out_rows = np.tile(out_capacity + np.arange(tile, dtype=np.int32), (capacity, 1))
    offset, scan = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32)
    bounds = np.searchsorted(table.outputs.scan, np.arange(num_scans + 1))
    count = 0
    for j in range(half if mirrored else volume):
        hits = np.flatnonzero(table.rows[j] >= 0).astype(np.int32)
        cuts = np.searchsorted(hits, bounds)
        for b in range(num_scans):
            outs = hits[cuts[b] : cuts[b + 1]]
            tiles = -(-len(outs) // tile)
            in_rows[count : count + tiles].reshape(-1)[: len(outs)] = table.rows[j, outs]
            out_rows[count : count + tiles].reshape(-1)[: len(outs)] = outs
            offset[count : count + tiles], scan[count : count + tiles] = j, b
            count += tiles
    for b in range(num_scans if mirrored else 0):
        rows = np.arange(bounds[b], bounds[b + 1], dtype=np.int32)
        for first in range(0, len(rows), 2 * tile):
            there, back = rows[first : first + tile], rows[first + tile : first + 2 * tile]
            in_rows[count, : len(there)], out_rows[count, : len(back)] = there, back
            offset[count], scan[count] = half, b
            count += 1
    return PairTiles(in_rows, out_rows, offset, scan, np.asarray(count, np.int32), mirrored)
