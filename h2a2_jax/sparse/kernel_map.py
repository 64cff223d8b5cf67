"""Kernel maps: a padded neighbour table, and the lists that the fast algorithms read.

A map is built once from coordinates (`pad_map`) and used by every convolution between the same two site sets. Beside
the neighbours it may hold

- the pairs of each offset and scan in tiles (`PairTiles`), for the algorithms "tiles" and "pairs",
- the sites in cubic blocks (`SiteBlocks`), for "winograd": 4^3 outputs are computed from the 6^3 voxels around them,
  occupied or not, which pays only where nearly all are.

Everything here is numpy on the host; `in_jit` makes the same maps inside jit.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from h2a2_jax.sparse import native_maps
from h2a2_jax.sparse.neighbors import KINDS, NeighborTable, check_rows, find_neighbors, submanifold_neighbors
from h2a2_jax.sparse.sites import (
    Sites,
    SiteSet,
    check_count,
    check_set,
    downsample,
    kernel_offsets,
    pack_keys,
)
from h2a2_jax.typing import AnyArray, Leaf, static_field

# ---------------------------------------------------------------- tiles of pairs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairTiles:
    """Pairs (input row, output row) of one offset and one scan, cut into tiles of T.

    A mirrored list belongs to a submanifold map with an odd kernel: it holds the first half of the offsets only, each
    tile serving offset j from input to output row and offset V-1-j from output to input row. At the centre j = V-1-j,
    where every row is its own neighbour, a tile holds rows of the scan in both lists, and each row goes to itself.

    Attributes:
        in_rows: int32 [C, T], input row of each pair; places without a pair hold distinct indices past the last row.
        out_rows: int32 [C, T], output row of each pair; distinct indices past the last row where there is none.
        offset: int32 [C], offset k of each tile.
        scan: int32 [C], scan b of each tile.
        count: int32 [], number of tiles in use; the others hold no pair.
        mirrored: if True, each tile serves two opposite offsets (static).
    """

    in_rows: Leaf
    out_rows: Leaf
    offset: Leaf
    scan: Leaf
    count: Leaf
    mirrored: bool = static_field()


def choose_tile_size(pairs: float, channels: int) -> int:
    """Pairs in a tile for the algorithm "tiles" on CPUs.

    About half of what a scan has at one offset, so that the last tile of an offset wastes little; not so many that rows
    leave the caches; and where there are enough, 512, which keep the threads of one matmul busy.

    Args:
        pairs: number of pairs expected at one offset of one scan.
        channels: channels of the layer, the geometric mean of in and out.
    """
    size = 2 ** round(math.log2(max(pairs, 1)))
    most = min(2048, max(512, 2**17 // max(1, channels)))
    return int(min(most, max(64, size if size < 1024 else size // 2)))


@dataclass(frozen=True)
class Direction:
    """Pairs of a tile in one direction.

    Attributes:
        source: int32 [T], rows to read.
        target: int32 [T], rows to write.
        offset: int32 [], offset k from target to source.
    """

    source: Array
    target: Array
    offset: Array


def directions(tiles: PairTiles, index: Any, volume: int) -> tuple[Direction, ...]:
    """Pairs of tile `index` in the one direction, or in both directions of a mirrored list.

    Args:
        tiles: the lists, as JAX arrays.
        index: index of a tile, or a slice of several.
        volume: number V of offsets of the kernel.
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
    if loaded := native_maps.library():
        in_rows, out_rows, offset, scan, count = native_maps.cut(
            loaded,
            np.ascontiguousarray(table.rows, np.int32),
            half if mirrored else volume,
            np.searchsorted(table.outputs.scan, np.arange(num_scans + 1)),
            (in_capacity, out_capacity),
            (capacity, tile),
            mirrored,
        )
        return PairTiles(in_rows, out_rows, offset, scan, np.asarray(count, np.int32), mirrored)
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


# ---------------------------------------------------------------- blocks

BLOCK = 4
"""Outputs of a block along each axis."""
TILE = BLOCK + 2
"""Inputs of a block along each axis."""
CHUNK = 64
"""Blocks that are transformed and multiplied in one step; fewer leave one of two cores idle in the products."""
MIN_GAIN = 2.0
"""Pairs per product from which blocks are used: measured, they win from there on."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SiteBlocks:
    """Sites by block, in chunks of blocks of one scan.

    Attributes:
        rows: int32 [C, 6, 6, 6, n], axes z, y, x of a block with its border: the row of the site at each place, or the
            number of rows where there is none. The inner 4^3 places belong to the block itself.
        scan: int32 [C], scan of each chunk.
        count: int32 [], number of chunks in use; zero where blocks do not pay for this map.
    """

    rows: Leaf
    scan: Leaf
    count: Leaf


def fits_blocks(table: NeighborTable) -> bool:
    """Return True for a map of 3^3 submanifold offsets without dilation, on which Winograd convolution can run."""
    sites = table.inputs
    return (
        table.kind == "submanifold"
        and sites.axes == 3
        and np.array_equal(table.offsets, kernel_offsets(3) * np.array(sites.strides))
    )


def block_gain(pairs: int, blocks: int) -> float:
    """Pairs of a map for each product that its blocks compute: how many times fewer products Winograd needs."""
    return pairs / (TILE**3 * max(1, blocks))


def cut_blocks(table: NeighborTable, capacity: int, *, always: bool = False) -> SiteBlocks:
    """The sites of a 3^3 submanifold table in blocks (numpy arrays).

    Args:
        table: a table with `fits_blocks`.
        capacity: number of rows of the padded sites; it bounds the chunks too, for more blocks never pay.
        always: use the blocks even where they do not pay.
    """
    sites = table.inputs
    most = capacity if always else int(27 * capacity / (TILE**3 * MIN_GAIN))
    chunks = max(1, -(-most // CHUNK) + sites.num_scans)
    rows = np.full((chunks, TILE**3, CHUNK), capacity, np.int32)
    scan = np.zeros(chunks, np.int32)
    blocks = downsample(sites, BLOCK)
    per_scan = np.bincount(blocks.scan, minlength=sites.num_scans)
    used = -(-per_scan // CHUNK)
    pairs, count = int(np.count_nonzero(table.rows >= 0)), int(used.sum())
    pays = len(sites) > 0 and (always or block_gain(pairs, CHUNK * count) >= MIN_GAIN)
    if pays:
        first = (np.cumsum(used) - used)[blocks.scan] * CHUNK  # place of each scan's first block
        place = first + np.arange(len(blocks)) - (np.cumsum(per_scan) - per_scan)[blocks.scan]
        block_at = np.full(count * CHUNK, len(blocks), np.int32)
        block_at[place] = np.arange(len(blocks))
        _fill_blocks(rows[:count], table, blocks, block_at.reshape(count, CHUNK))
        scan[:count] = np.repeat(np.arange(sites.num_scans), used)
    rows = rows.reshape(chunks, TILE, TILE, TILE, CHUNK)
    return SiteBlocks(rows, scan, np.asarray(count if pays else 0, np.int32))


def _fill_blocks(
    out: Int[np.ndarray, "c p n"], table: NeighborTable, blocks: SiteSet, block_at: Int[np.ndarray, "c n"]
) -> None:
    """Write the row of the site at every place of each block and its border, where there is one.

    Args:
        out: int32 [chunks, 6^3, blocks of a chunk], filled with the row that stands for none.
        table: table of the sites.
        blocks: the blocks.
        block_at: block in each place of a chunk; the number of blocks where there is none.
    """
    sites = table.inputs
    inner = np.full((BLOCK**3, len(blocks) + 1), out.flat[0], np.int32)  # one more: an empty block
    found = find_neighbors(sites, blocks, kernel_offsets(BLOCK) * np.array(sites.strides))
    np.copyto(inner[:, :-1], found, where=found >= 0)
    around = submanifold_neighbors(blocks).rows
    around = np.pad(np.where(around >= 0, around, len(blocks)), ((0, 0), (0, 1)), constant_values=len(blocks))
    # Along an axis place p of the border's 6 is place (p - 1) % 4 of the neighbour at 0, 1 or 2.
    place = np.arange(TILE)
    side, within = (place + BLOCK - 1) // BLOCK, (place - 1) % BLOCK
    z, y, x = np.meshgrid(*[place] * 3, indexing="ij")
    neighbor = (side[x] + 3 * side[y] + 9 * side[z]).ravel()
    cell = ((within[z] * BLOCK + within[y]) * BLOCK + within[x]).ravel()
    first = (cell * inner.shape[1]).astype(np.int32)
    for chunk, near in zip(out, around[:, block_at].swapaxes(0, 1), strict=True):
        inner.reshape(-1).take(near[neighbor] + first[:, None], out=chunk, mode="clip")


# ---------------------------------------------------------------- maps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KernelMap:
    """Neighbour map of a convolution or a pooling.

    Attributes:
        neighbors: int32 [V, N_out], input row that offset k brings to each output row, or N_in (out of range) where
            there is none and on padding. One offset's rows are distinct and ascending, but in maps of kind "neighbors".
        inputs: padded input sites.
        outputs: padded output sites.
        tiles: the pairs as tiles; None for algorithms that read the neighbours alone.
        kind: "submanifold", "strided", "inverse", "generative", "pool" or "neighbors" (static).
        blocks: the sites as blocks, which "winograd" and "native" read; None without them.
        kernel_size: size of the kernel along each axis; None for maps of any other neighbours (static).
    """

    neighbors: Leaf
    inputs: Sites
    outputs: Sites
    tiles: PairTiles | None
    kind: str = static_field()
    blocks: SiteBlocks | None = None
    kernel_size: tuple[int, ...] | None = static_field(default=None)

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
        """Number of valid input rows."""
        return self.inputs.n

    @property
    def n_out(self) -> Int[AnyArray, ""]:
        """Number of valid output rows."""
        return self.outputs.n

    @property
    def num_scans(self) -> int:
        """Number of scans in the batch."""
        return self.inputs.num_scans

    @property
    def strides(self) -> tuple[int | tuple[int, ...], int | tuple[int, ...]]:
        """Strides of the input and of the output sites."""
        return self.inputs.stride, self.outputs.stride

    @property
    def in_capacity(self) -> int:
        """Number of input rows, padding included."""
        return self.inputs.capacity

    @property
    def out_capacity(self) -> int:
        """Number of output rows, padding included."""
        return self.outputs.capacity

    @property
    def kernel_volume(self) -> int:
        """Number V of offsets of the kernel."""
        return self.neighbors.shape[0]

    @property
    def is_mirror_image(self) -> bool:
        """True for a submanifold map of an odd kernel: offset V-1-k leads back from where offset k leads."""
        return self.kind == "submanifold" and self.kernel_volume % 2 == 1


def pad_map(
    table: NeighborTable,
    inputs: Sites,
    outputs: Sites,
    *,
    tile_size: int | None = None,
    blocks: Literal["auto", "always"] | None = None,
) -> KernelMap:
    """A host table as a padded map (numpy arrays).

    Args:
        table: the neighbours.
        inputs: the padded input sites (`pad_sites`).
        outputs: the padded output sites.
        tile_size: number of pairs in a tile; None leaves the tiles out.
        blocks: None leaves the blocks of Winograd convolution out; "auto" puts the sites in blocks if they are dense
            enough to pay, "always" in any case.

    Raises:
        InputError: an offset of a table that is not of kind "neighbors" brings one input row to several output rows.
        ValueError: the sites are not those of the table; a tile has no size; blocks are asked for where the map is not
            that of a 3^3 submanifold convolution.
    """
    _check_table(table, inputs, outputs, tile_size, blocks)
    if blocks is not None and not fits_blocks(table):
        raise ValueError(
            f"blocks serve submanifold maps of 3^3 offsets without dilation; this one is {table.kind} with "
            f"{len(table.rows)} offsets."
        )
    neighbors = _pad_rows(table, inputs.capacity, outputs.capacity)
    tiles = None if tile_size is None else cut_pairs(table, inputs.capacity, outputs.capacity, tile_size)
    cut = None if blocks is None else cut_blocks(table, inputs.capacity, always=blocks == "always")
    return KernelMap(neighbors, inputs, outputs, tiles, table.kind, cut, table.kernel_size)


def _pad_rows(table: NeighborTable, in_capacity: int, out_capacity: int) -> Int[np.ndarray, "v n"]:
    if loaded := native_maps.library():
        return native_maps.pad(loaded, np.ascontiguousarray(table.rows, np.int32), in_capacity, out_capacity)
    count = len(table.outputs)
    neighbors = np.empty((len(table.rows), out_capacity), np.int32)
    # Without sign a missing neighbour, -1, is the largest number: the minimum puts the capacity in its place.
    np.minimum(table.rows.view(np.uint32), np.uint32(in_capacity), out=neighbors[:, :count].view(np.uint32))
    neighbors[:, count:] = in_capacity
    return neighbors


_COMPARED = 64
"""Sites of a map that are compared with the table's: all of them would take longer than the padding."""


def _check_table(table: Any, inputs: Any, outputs: Any, tile_size: Any, blocks: Any) -> None:
    if not isinstance(table, NeighborTable):
        raise ValueError(f"pad_map was given a {type(table).__name__}; expected a NeighborTable of the host.")
    if tile_size is not None:
        check_count("tile_size", tile_size)
    if blocks not in (None, "auto", "always"):
        raise ValueError(f"blocks is {blocks!r}; expected 'auto', 'always' or None.")
    if table.kind not in KINDS:
        raise ValueError(f"a table has the kind {table.kind!r}; expected one of {', '.join(KINDS)}.")
    for side, sites, exact in (("inputs", inputs, table.inputs), ("outputs", outputs, table.outputs)):
        if not isinstance(sites, Sites):
            raise ValueError(
                f"pad_map was given a {type(sites).__name__} for {side}; expected Sites, of sparse.pad_sites."
            )
        if (int(sites.n), sites.strides, sites.num_scans) != (len(exact), exact.strides, exact.num_scans):
            raise ValueError(
                f"pad_map was given {side} with {int(sites.n)} sites of stride {sites.stride} in {sites.num_scans} "
                f"scans; the table has {len(exact)} of stride {exact.stride} in {exact.num_scans}: pad the table's own."
            )
        some = np.linspace(0, len(exact), _COMPARED if len(exact) else 0, endpoint=False, dtype=int)
        if not np.array_equal(pack_keys(np.asarray(sites.coords)[some]), exact.keys[some]):
            raise ValueError(f"pad_map was given {side} with other coordinates than the table's: pad the table's own.")
    if table.kernel_size is None and table.kind != "neighbors":
        check_rows(table)
    if table.kind == "neighbors" and tile_size is not None:
        raise ValueError("a table of kind 'neighbors' has no tiles, whose rows are distinct; leave tile_size out.")


def limit_tiles(kernel_map: KernelMap, capacity: int) -> KernelMap:
    """The same map with room for fewer (or more) tiles; on the host (numpy arrays).

    The capacity of a new map suffices for a full kernel on every site. Algorithm "pairs" multiplies all of it, so the
    maps of a bucket share the largest number of tiles that any of them needs instead.

    Args:
        kernel_map: a map with tiles.
        capacity: number of tiles of the result.

    Raises:
        ValueError: the map is none or has no tiles, or more of them are in use than `capacity`.
    """
    if not isinstance(kernel_map, KernelMap):
        raise ValueError(f"limit_tiles was given a {type(kernel_map).__name__}; expected a KernelMap, of pad_map.")
    tiles = kernel_map.tiles
    if tiles is None:
        raise ValueError("the map has no tiles: build it with pad_map(..., tile_size=...).")
    capacity = check_count("capacity", capacity, least=0)
    if int(tiles.count) > capacity:
        raise ValueError(f"{int(tiles.count)} tiles are in use, a capacity of {capacity} does not hold them.")

    def resize(rows: np.ndarray, empty: np.ndarray | int) -> np.ndarray:
        out = np.empty((capacity, *rows.shape[1:]), rows.dtype)
        out[:] = empty
        out[: len(rows)] = rows[:capacity]
        return out

    place = np.arange(tiles.in_rows.shape[1])
    return replace(
        kernel_map,
        tiles=replace(
            tiles,
            in_rows=resize(tiles.in_rows, kernel_map.in_capacity + place),
            out_rows=resize(tiles.out_rows, kernel_map.out_capacity + place),
            offset=resize(tiles.offset, 0),
            scan=resize(tiles.scan, 0),
        ),
    )


def union_rows(part: SiteSet, whole: SiteSet, part_capacity: int, whole_capacity: int) -> Int[np.ndarray, " n"]:
    """Row in a part of each row of a union (numpy).

    Args:
        part: one of the sets that were united.
        whole: their union.
        part_capacity: number of rows of the padded part.
        whole_capacity: number of rows of the padded union.

    Returns:
        int32 [whole_capacity], part_capacity where the part has no such site.

    Raises:
        ValueError: an argument is no set of the host, the whole lacks sites of the part, or a capacity does not hold
            them.
    """
    for sites in (part, whole):
        check_set("union_rows", sites)
    part_capacity = check_count("part_capacity", part_capacity, least=len(part))
    whole_capacity = check_count("whole_capacity", whole_capacity, least=len(whole))
    rows = np.full(whole_capacity, part_capacity, np.int32)
    found = find_neighbors(part, whole, np.zeros((1, whole.axes), np.int64))[0]
    if (held := int((found >= 0).sum())) < len(part):
        raise ValueError(
            f"union_rows was given a part of {len(part)} sites, of which the whole holds {held}; expected is a union."
        )
    rows[: len(whole)] = np.where(found >= 0, found, part_capacity)
    return rows
