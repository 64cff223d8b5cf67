"""Sites of a nearly dense submanifold map in cubic blocks, for Winograd convolution.

A block of 4^3 grid cells is convolved from the 6^3 cells around it, whatever number of them is occupied: that pays
where nearly all of them are, and only there.
"""

from dataclasses import dataclass

import jax
import numpy as np

from h2a2_jax.sparse.grid import downsample, find_keys, kernel_offsets, pack_keys
from h2a2_jax.sparse.neighbors import NeighborTable, submanifold_neighbors
from h2a2_jax.typing import Leaf

BLOCK = 4
"""Outputs of a block along each axis."""
TILE = BLOCK + 2
"""Inputs of a block along each axis."""
CHUNK = 32
"""Blocks that are transformed and multiplied together: as many as the caches of a core hold at 128 channels."""
MIN_GAIN = 2.5
"""Pairs per product from which blocks are used: measured, they win from 3 on and lose below 2.3."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SiteBlocks:
    """Sites by block, in chunks of blocks of one scan.

    Attributes:
        rows: int32 [C, 6, 6, 6, n], axes z, y, x of a block with its border: the row of each cell, or the number of
            rows where the cell is empty. The inner 4^3 cells are the block's own.
        scan: int32 [C].
        count: int32 [], chunks in use; zero where blocks do not pay for this map.
    """

    rows: Leaf
    scan: Leaf
    count: Leaf


def fits_blocks(table: NeighborTable) -> bool:
    """Whether Winograd convolution can run on a map: submanifold, 3^3 offsets, no dilation."""
    return table.kind == "submanifold" and np.array_equal(table.offsets, kernel_offsets(3) * table.inputs.stride)


def block_gain(pairs: int, blocks: int) -> float:
    """Pairs of a map for each product that its blocks compute: how many times fewer products Winograd needs."""
    return pairs / (TILE**3 * max(1, blocks))


def cut_blocks(table: NeighborTable, capacity: int, *, always: bool = False) -> SiteBlocks:
    """The sites of a 3^3 submanifold table in blocks (numpy arrays).

    Args:
        table: with `fits_blocks`.
        capacity: rows of the padded sites; it bounds the chunks too, for more than that many blocks never pay.
        always: use the blocks even where they do not pay.
    """
    sites = table.inputs
    most = capacity if always else int(27 * capacity / (TILE**3 * MIN_GAIN))
    chunks = max(1, -(-most // CHUNK) + sites.num_scans)
    rows = np.full((chunks, CHUNK, TILE, TILE, TILE), capacity, np.int32)
    scan = np.zeros(chunks, np.int32)
    blocks = downsample(sites, BLOCK)
    per_scan = np.bincount(blocks.scan, minlength=sites.num_scans)
    used = -(-per_scan // CHUNK)
    pairs = int((table.rows >= 0).sum())
    pays = len(sites) > 0 and (always or block_gain(pairs, CHUNK * int(used.sum())) >= MIN_GAIN)
    if pays:
        first = (np.cumsum(used) - used)[blocks.scan] * CHUNK  # place of each scan's first block
        place = first + np.arange(len(blocks)) - (np.cumsum(per_scan) - per_scan)[blocks.scan]
        rows.reshape(-1, TILE, TILE, TILE)[place] = _with_border(table, capacity)
        scan[: int(used.sum())] = np.repeat(np.arange(sites.num_scans), used)
    rows = np.ascontiguousarray(rows.transpose(0, 2, 3, 4, 1))
    return SiteBlocks(rows, scan, np.asarray(used.sum() if pays else 0, np.int32))


def _with_border(table: NeighborTable, missing: int) -> np.ndarray:
    """Row of every cell of each block and its border, int32 [blocks, 6, 6, 6], axes z, y, x."""
    sites = table.inputs
    blocks = downsample(sites, BLOCK)
    own = np.full((len(blocks) + 1, BLOCK, BLOCK, BLOCK), missing, np.int32)
    corner = sites.coords
    corner[:, 1:] -= corner[:, 1:] % blocks.stride
    cell = (sites.coords - corner) // sites.stride
    block = find_keys(blocks.keys, pack_keys(corner))
    own[block, cell[:, 3], cell[:, 2], cell[:, 1]] = np.arange(len(sites), dtype=np.int32)
    around = submanifold_neighbors(blocks).rows
    around = np.where(around >= 0, around, len(blocks))
    out = np.empty((len(blocks), TILE, TILE, TILE), np.int32)
    # Along an axis, what the neighbour at -1, 0, +1 gives: its last cell, all its cells, its first cell.
    to = (slice(0, 1), slice(1, TILE - 1), slice(TILE - 1, TILE))
    of = (slice(BLOCK - 1, BLOCK), slice(0, BLOCK), slice(0, 1))
    for (x, y, z), neighbor in zip(kernel_offsets(3) + 1, around, strict=True):
        out[:, to[z], to[y], to[x]] = own[neighbor][:, of[z], of[y], of[x]]
    return out
