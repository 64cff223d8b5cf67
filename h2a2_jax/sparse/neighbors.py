"""Tables of neighbours on the host: the input row that each offset of a kernel brings to each output site."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from h2a2_jax.sparse.sites import SiteSet, Size3, key_offsets, size3, voxel_offsets

MISSING = -1
"""Row of a neighbour that does not exist."""


@dataclass(frozen=True)
class NeighborTable:
    """A kernel map before padding, on the host.

    Attributes:
        rows: int32 [V, n_out], input row that slice k brings to each output row, -1 where there is none.
        inputs: input sites.
        outputs: output sites.
        kind: "submanifold", "strided", "inverse", "generative" or "pool".
        offsets: int64 [V, 3], from the output to the input site of slice k, in finest voxels.
    """

    rows: np.ndarray
    inputs: SiteSet
    outputs: SiteSet
    kind: str
    offsets: np.ndarray

    @property
    def pairs_per_offset(self) -> Int[np.ndarray, " v"]:
        """Number of (input, output) pairs of each offset."""
        return (self.rows >= 0).sum(1)


def submanifold_neighbors(sites: SiteSet, kernel_size: Size3 = 3, dilation: int = 1) -> NeighborTable:
    """Map of a stride-1 convolution: the output sites are the input sites.

    Half of an odd kernel's offsets are searched, the other half is the mirror image.

    Args:
        sites: input sites, which are the output sites too.
        kernel_size: size of the kernel.
        dilation: distance of neighbouring slices, in strides.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    offsets = voxel_offsets(kernel_size, dilation, sites.stride)
    if any(k % 2 == 0 for k in size3(kernel_size)):
        return NeighborTable(_neighbors(sites, sites, offsets), sites, sites, "submanifold", offsets)
    rows = np.full((len(offsets), len(sites)), MISSING, np.int32)
    rows[len(offsets) // 2] = np.arange(len(sites), dtype=np.int32)
    half = np.flatnonzero(key_offsets(offsets) > 0)  # whole runs along z, and of the centre's run the part behind it
    for j, found, centres in _search(sites.keys, sites.keys, offsets[half]):
        rows[half[j]][centres] = found
        rows[-1 - half[j]][found] = centres
    return NeighborTable(rows, sites, sites, "submanifold", offsets)


def strided_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: Size3, dilation: int = 1) -> NeighborTable:
    """Map of a strided convolution: in = out + offset * input stride. Kernel size 1 is a lookup of the coarse sites.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    offsets = voxel_offsets(kernel_size, dilation, inputs.stride)
    return NeighborTable(_neighbors(inputs, outputs, offsets), inputs, outputs, "strided", offsets)


def pool_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: Size3) -> NeighborTable:
    """Map of a pooling: the inputs under each output site's window.

    Raises:
        InputError: the window reaches farther than a key has room for.
    """
    offsets = voxel_offsets(kernel_size, 1, inputs.stride)
    return NeighborTable(_neighbors(inputs, outputs, offsets), inputs, outputs, "pool", offsets)


def generative_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: Size3) -> NeighborTable:
    """Map of a generative transposed convolution: out = in + offset * output stride, same slice order, no flip.

    Raises:
        InputError: the kernel reaches farther than a key has room for.
    """
    offsets = -voxel_offsets(kernel_size, 1, outputs.stride)
    return NeighborTable(_neighbors(inputs, outputs, offsets), inputs, outputs, "generative", offsets)


def inverse_neighbors(table: NeighborTable) -> NeighborTable:
    """Map of an inverse convolution: back from the outputs of a convolution onto its inputs, pair by pair.

    The pair (input i, output o) of offset k becomes (input o, output i) of offset k, so that slice k of a kernel
    meets the same pairs in both directions.
    """
    rows = np.full((len(table.rows), len(table.inputs)), MISSING, np.int32)
    for inverse, forward in zip(rows, table.rows, strict=True):
        hits = np.flatnonzero(forward >= 0).astype(np.int32)
        inverse[forward[hits]] = hits
    return NeighborTable(rows, table.outputs, table.inputs, "inverse", -table.offsets)


def _neighbors(inputs: SiteSet, outputs: SiteSet, offsets: Int[np.ndarray, "v 3"]) -> Int[np.ndarray, "v n"]:
    rows = np.full((len(offsets), len(outputs)), MISSING, np.int32)
    for j, found, centres in _search(inputs.keys, outputs.keys, offsets):
        rows[j][centres] = found
    return rows


def _search(
    keys: Int[np.ndarray, " n"], centres: Int[np.ndarray, " m"], offsets: Int[np.ndarray, "v 3"]
) -> Iterator[tuple[int, Int[np.ndarray, " p"], Int[np.ndarray, " p"]]]:
    """For each offset j the pairs (row in keys, row in centres) with key = centre + offset; both are sorted.

    Offsets that share dx, dy form a run along z, where keys are adjacent: one search finds the first key at or behind
    the run's first site, the next ones follow by comparing with the next key.
    """
    ends = np.append(keys, np.iinfo(np.int64).max)
    moves = key_offsets(offsets)
    runs: dict[tuple[int, int], list[int]] = {}
    for j in np.argsort(offsets[:, 2], kind="stable"):
        runs.setdefault((int(offsets[j, 0]), int(offsets[j, 1])), []).append(int(j))
    for run in runs.values():
        first = centres + moves[run[0]]
        if centres is keys and moves[run[0]] > 0 and not offsets[run[0], :2].any():
            position = np.arange(1, len(keys) + 1)  # the next site in z can only lie behind the site itself
        else:
            position = _lower_bounds(keys, first)
        ahead = ends.take(position) - first
        near = np.flatnonzero(ahead <= moves[run[-1]] - moves[run[0]])
        position, first, ahead = position.take(near), first.take(near), ahead.take(near)
        for j in run:
            step = moves[j] - moves[run[0]]
            behind = ahead < step
            while behind.any():  # once where a run has no gaps; more often where dilation passes over sites
                position += behind
                ahead = ends.take(position) - first
                behind = ahead < step
            hits = np.flatnonzero(ahead == step)
            yield j, position.take(hits).astype(np.int32), near.take(hits).astype(np.int32)


def _lower_bounds(keys: Int[np.ndarray, " n"], queries: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """Number of keys below each query; both sorted.

    By merging: a stable sort of two sorted lists is linear, and takes half the time of as many binary searches. The
    lowest bit is 0 for queries, which come before an equal key, and 1 for keys.
    """
    n = len(queries)
    if len(keys) > 8 * n:
        return np.searchsorted(keys, queries)
    merged = np.empty(n + len(keys), np.int64)
    np.left_shift(queries, 1, out=merged[:n])
    np.left_shift(keys, 1, out=merged[n:])
    merged[n:] |= 1
    merged.sort(kind="stable")
    position = np.flatnonzero((merged & 1) == 0)
    position -= np.arange(n)
    return position
