"""Tables of neighbours on the host: which input row each offset of a kernel brings to each output site."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from h2a2_jax.sparse.grid import SiteSet, Size3, kernel_offsets, key_offsets, size3

MISSING = -1


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


def inverse_neighbors(table: NeighborTable) -> NeighborTable:
    """Map of an inverse convolution: back from the outputs of a convolution onto its inputs, pair by pair.

    The pair (input i, output o) of offset k becomes (input o, output i) of offset k, so that slice k of a kernel
    meets the same pairs in both directions.
    """
    rows = np.full((len(table.rows), len(table.inputs)), MISSING, np.int32)
    for inverse, forward in zip(rows, table.rows, strict=True):
        hits = np.flatnonzero(forward >= 0).astype(np.int32)
        inverse[forward[hits]] = hits
    return NeighborTable(rows, table.outputs, table.inputs, "inverse")


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
