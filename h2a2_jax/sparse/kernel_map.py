"""Neighbour-index maps: which input row each offset of a kernel brings to each output row.

A map is built once from coordinates, on the host, and used by every convolution between the same two site sets. From
the table of neighbours follow the lists that the fast algorithms read: pairs sorted by offset and scan, cut into tiles.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from h2a2_jax.sparse.grid import SiteSet, Size3, find_keys, kernel_offsets, key_offsets, size3
from h2a2_jax.sparse.tensor import Sites
from h2a2_jax.typing import AnyArray, Leaf, static_field

MISSING = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairTiles:
    """Pairs (input row, output row) of one offset and one scan, cut into tiles of T.

    A mirrored list belongs to a submanifold map with an odd kernel: it holds the first half of the offsets only, each
    tile serving offset j from input to output row and offset V-1-j from output to input row; the centre is no tile.

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KernelMap:
    """Neighbour-index map of a convolution or a pooling.

    Attributes:
        neighbors: int32 [V, N_out], input row that offset k brings to each output row, or N_in (out of range) where
            there is none and on padding. One offset's rows are distinct and ascending.
        inputs: padded input sites.
        outputs: padded output sites.
        tiles: the pairs as tiles, or None where no algorithm wants them.
        kind: "submanifold", "strided", "generative" or "pool" (static).
    """

    neighbors: Leaf
    inputs: Sites
    outputs: Sites
    tiles: PairTiles | None
    kind: str = static_field()

    @property
    def in_scan(self) -> Int[AnyArray, " n_in"]:
        """Scan of each input row, num_scans on padding."""
        return self.inputs.scan

    @property
    def out_scan(self) -> Int[AnyArray, " n_out"]:
        """Scan of each output row, num_scans on padding."""
        return self.outputs.scan

    @property
    def n_in(self) -> Int[AnyArray, ""]:
        """Valid input rows."""
        return self.inputs.n

    @property
    def n_out(self) -> Int[AnyArray, ""]:
        """Valid output rows."""
        return self.outputs.n

    @property
    def num_scans(self) -> int:
        """Scans in the batch."""
        return self.inputs.num_scans

    @property
    def strides(self) -> tuple[int, int]:
        """Strides of the input and of the output sites."""
        return self.inputs.stride, self.outputs.stride

    @property
    def in_capacity(self) -> int:
        """Input rows, padding included."""
        return self.inputs.capacity

    @property
    def out_capacity(self) -> int:
        """Output rows, padding included."""
        return self.outputs.capacity

    @property
    def kernel_volume(self) -> int:
        """Offsets V of the kernel."""
        return self.neighbors.shape[0]


@dataclass(frozen=True)
class NeighborTable:
    """A kernel map before padding, on the host: int32 [V, n_out] input rows, -1 where there is none."""

    rows: np.ndarray
    inputs: SiteSet
    outputs: SiteSet
    kind: str

    @property
    def pairs_per_offset(self) -> Int[np.ndarray, " v"]:
        """Number of (input, output) pairs of each offset."""
        return (self.rows >= 0).sum(1)


def submanifold_neighbors(sites: SiteSet, kernel_size: Size3 = 3, dilation: int = 1) -> NeighborTable:
    """Map of a stride-1 convolution: the output sites are the input sites.

    Half of an odd kernel's offsets is searched, the other half is its mirror image.
    """
    offsets = kernel_offsets(kernel_size, dilation) * sites.stride
    if all(k % 2 for k in size3(kernel_size)):
        rows = np.full((len(offsets), len(sites)), MISSING, np.int32)
        half = len(offsets) // 2
        rows[half] = np.arange(len(sites), dtype=np.int32)
        _search(sites.keys, sites.keys, offsets[:half], rows[:half])
        for j in range(half):
            hits = np.flatnonzero(rows[j] >= 0).astype(np.int32)
            rows[-1 - j, rows[j, hits]] = hits
        return NeighborTable(rows, sites, sites, "submanifold")
    return NeighborTable(_neighbors(sites, sites, offsets), sites, sites, "submanifold")


def strided_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: Size3, dilation: int = 1) -> NeighborTable:
    """Map of a strided convolution: in = out + offset * input stride. Kernel size 1 is a lookup of the coarse sites."""
    rows = _neighbors(inputs, outputs, kernel_offsets(kernel_size, dilation) * inputs.stride)
    return NeighborTable(rows, inputs, outputs, "strided")


def pool_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: Size3) -> NeighborTable:
    """Map of a pooling: the inputs under each output site's window."""
    rows = _neighbors(inputs, outputs, kernel_offsets(kernel_size) * inputs.stride)
    return NeighborTable(rows, inputs, outputs, "pool")


def generative_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: Size3) -> NeighborTable:
    """Map of a generative transposed convolution: out = in + offset * output stride, same slice order, no flip."""
    rows = _neighbors(inputs, outputs, -kernel_offsets(kernel_size) * outputs.stride)
    return NeighborTable(rows, inputs, outputs, "generative")


def _neighbors(inputs: SiteSet, outputs: SiteSet, offsets: Int[np.ndarray, "v 3"]) -> Int[np.ndarray, "v n"]:
    rows = np.full((len(offsets), len(outputs)), MISSING, np.int32)
    _search(inputs.keys, outputs.keys, offsets, rows)
    return rows


def _search(keys: np.ndarray, centres: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> None:
    """Fill rows [v, n] with the row of centre + offset in the sorted keys.

    Offsets that share dx, dy form a run along z, where keys are adjacent: one binary search finds the run's first key,
    the next ones follow by comparing with the next key.
    """
    if not len(keys):
        return
    ends = np.concatenate([keys, np.full(1, np.iinfo(np.int64).max)])
    moves = key_offsets(offsets)
    runs: dict[tuple[int, int], list[int]] = {}
    for j in np.argsort(offsets[:, 2], kind="stable"):
        runs.setdefault((int(offsets[j, 0]), int(offsets[j, 1])), []).append(int(j))
    for run in runs.values():
        position = np.searchsorted(keys, centres + moves[run[0]])
        for j in run:
            target = centres + moves[j]
            behind = ends[position] < target
            while behind.any():  # one step where a run has no gaps; more where dilation passes over sites
                position = position + behind
                behind = ends[position] < target
            found = np.flatnonzero(ends[position] == target)
            rows[j, found] = position[found]


def pad_map(table: NeighborTable, inputs: Sites, outputs: Sites, *, tile_size: int | None = None) -> KernelMap:
    """A host table as a padded map (numpy arrays).

    Args:
        table: the neighbours.
        inputs: the padded input sites (`pad_sites`).
        outputs: the padded output sites.
        tile_size: pairs in a tile; None leaves the tiles out.
    """
    neighbors = np.full((len(table.rows), outputs.capacity), inputs.capacity, np.int32)
    neighbors[:, : len(table.outputs)] = np.where(table.rows >= 0, table.rows, inputs.capacity)
    tiles = None if tile_size is None else _tiles(table, inputs.capacity, outputs.capacity, tile_size)
    return KernelMap(neighbors, inputs, outputs, tiles, table.kind)


def _tiles(table: NeighborTable, in_capacity: int, out_capacity: int, tile: int) -> PairTiles:
    volume, num_scans = len(table.rows), table.inputs.num_scans
    mirrored = table.kind == "submanifold" and volume % 2 == 1
    used = volume // 2 if mirrored else volume
    # Worst case: every offset full, and one tile of each (scan, offset) begun but not filled.
    capacity = max(1, used * (-(-min(in_capacity, out_capacity) // tile) + num_scans))
    bounds = np.searchsorted(table.outputs.scan, np.arange(num_scans + 1))
    in_rows = np.tile(in_capacity + np.arange(tile, dtype=np.int32), (capacity, 1))
    out_rows = np.tile(out_capacity + np.arange(tile, dtype=np.int32), (capacity, 1))
    offset, scan = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32)
    count = 0
    for j in range(used):
        hits = np.flatnonzero(table.rows[j] >= 0).astype(np.int32)
        cuts = np.searchsorted(hits, bounds)
        for b in range(num_scans):
            outs = hits[cuts[b] : cuts[b + 1]]
            tiles = -(-len(outs) // tile)
            in_rows[count : count + tiles].reshape(-1)[: len(outs)] = table.rows[j, outs]
            out_rows[count : count + tiles].reshape(-1)[: len(outs)] = outs
            offset[count : count + tiles], scan[count : count + tiles] = j, b
            count += tiles
    return PairTiles(in_rows, out_rows, offset, scan, np.asarray(count, np.int32), mirrored)


def union_rows(part: SiteSet, whole: SiteSet, part_capacity: int, whole_capacity: int) -> Int[np.ndarray, " n"]:
    """Row in a part of each row of a union: int32 [whole_capacity], part_capacity where the part has none."""
    rows = np.full(whole_capacity, part_capacity, np.int32)
    found = find_keys(part.keys, whole.keys)
    rows[: len(whole)] = np.where(found >= 0, found, part_capacity)
    return rows
