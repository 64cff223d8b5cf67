"""Kernel maps: padded neighbour tables, with the lists that the fast algorithms read.

A map is built once from coordinates and used by every convolution between the same two site sets.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int

from h2a2_jax.sparse.blocks import SiteBlocks, cut_blocks, fits_blocks
from h2a2_jax.sparse.grid import SiteSet, find_keys
from h2a2_jax.sparse.neighbors import NeighborTable
from h2a2_jax.sparse.pair_tiles import PairTiles, cut_pairs
from h2a2_jax.sparse.tensor import Sites
from h2a2_jax.typing import AnyArray, Leaf, static_field


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
        blocks: the sites as blocks, likewise.
        kind: "submanifold", "strided", "inverse", "generative" or "pool" (static).
    """

    neighbors: Leaf
    inputs: Sites
    outputs: Sites
    tiles: PairTiles | None
    kind: str = static_field()
    blocks: SiteBlocks | None = None

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
        tile_size: pairs in a tile; None leaves the tiles out.
        blocks: None leaves the blocks of Winograd convolution out; "auto" puts the sites in blocks if they are dense
            enough to pay, "always" in any case.

    Raises:
        ValueError: blocks are asked for where the map is not that of a 3^3 submanifold convolution, or "auto" without
            the tiles that serve a map on which they do not pay.
    """
    if blocks is not None and not fits_blocks(table):
        raise ValueError(
            f"blocks serve submanifold maps of 3^3 offsets without dilation; this one is {table.kind} with "
            f"{len(table.rows)} offsets."
        )
    if blocks == "auto" and tile_size is None:
        raise ValueError("blocks='auto' needs a tile_size: tiles serve the maps on which blocks do not pay.")
    count = len(table.outputs)
    neighbors = np.empty((len(table.rows), outputs.capacity), np.int32)
    # Without sign a missing neighbour, -1, is the largest number: the minimum puts the capacity in its place.
    np.minimum(table.rows.view(np.uint32), np.uint32(inputs.capacity), out=neighbors[:, :count].view(np.uint32))
    neighbors[:, count:] = inputs.capacity
    tiles = None if tile_size is None else cut_pairs(table, inputs.capacity, outputs.capacity, tile_size)
    cut = None if blocks is None else cut_blocks(table, inputs.capacity, always=blocks == "always")
    return KernelMap(neighbors, inputs, outputs, tiles, table.kind, cut)


def limit_tiles(kernel_map: KernelMap, capacity: int) -> KernelMap:
    """The same map with room for fewer (or more) tiles; on the host (numpy arrays).

    The capacity of a new map suffices for a full kernel on every site. Algorithm "pairs" multiplies all of it, so a
    bucket of maps shares the largest number of tiles that it meets instead.

    Args:
        kernel_map: with tiles.
        capacity: tiles.

    Raises:
        ValueError: the map has no tiles, or more in use than `capacity`.
    """
    tiles = kernel_map.tiles
    if tiles is None:
        raise ValueError("the map has no tiles: build it with pad_map(..., tile_size=...).")
    if int(tiles.count) > capacity:
        raise ValueError(f"{int(tiles.count)} tiles are in use, a capacity of {capacity} does not hold them.")

    def resized(rows: np.ndarray, empty: np.ndarray | int) -> np.ndarray:
        out = np.empty((capacity, *rows.shape[1:]), rows.dtype)
        out[:] = empty
        out[: len(rows)] = rows[:capacity]
        return out

    place = np.arange(tiles.in_rows.shape[1])
    return replace(
        kernel_map,
        tiles=replace(
            tiles,
            in_rows=resized(tiles.in_rows, kernel_map.in_capacity + place),
            out_rows=resized(tiles.out_rows, kernel_map.out_capacity + place),
            offset=resized(tiles.offset, 0),
            scan=resized(tiles.scan, 0),
        ),
    )


def union_rows(part: SiteSet, whole: SiteSet, part_capacity: int, whole_capacity: int) -> Int[np.ndarray, " n"]:
    """Row in a part of each row of a union: int32 [whole_capacity], part_capacity where the part has none."""
    rows = np.full(whole_capacity, part_capacity, np.int32)
    found = find_keys(part.keys, whole.keys)
    rows[: len(whole)] = np.where(found >= 0, found, part_capacity)
    return rows
