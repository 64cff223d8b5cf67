"""Tables of neighbours on the host: the input row that each offset of a kernel brings to each output site."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from h2a2_jax.errors import InputError
from h2a2_jax.sparse import native_maps
from h2a2_jax.sparse.sites import (
    MAX_REACH,
    PerAxis,
    SiteSet,
    check_set,
    key_offsets,
    per_axis,
    shorten,
    voxel_offsets,
)

KINDS = ("submanifold", "strided", "inverse", "generative", "pool", "neighbors")
"""Kinds of maps."""
MISSING = -1
"""Row of a neighbour that does not exist."""


@dataclass(frozen=True)
class NeighborTable:
    """A kernel map before padding, on the host.

    Attributes:
        rows: int32 [V, n_out], input row that slice k brings to each output row, -1 where there is none.
        inputs: input sites.
        outputs: output sites.
        kind: "submanifold", "strided", "inverse", "generative" or "pool"; "neighbors" for any other table, as of the
            nearest sites or those within a radius, where an offset may bring one input row to several output rows.
        offsets: int64 [V, 3], from the output to the input site of slice k, in finest voxels; [V, 4] in 4-D.
        kernel_size: size of the kernel along each axis; None for tables of any other neighbours.
    """

    rows: np.ndarray
    inputs: SiteSet
    outputs: SiteSet
    kind: str
    offsets: np.ndarray
    kernel_size: tuple[int, ...] | None = None

    @property
    def pairs_per_offset(self) -> Int[np.ndarray, " v"]:
        """Number of (input, output) pairs of each offset."""
        return (self.rows >= 0).sum(1)


def submanifold_neighbors(sites: SiteSet, kernel_size: PerAxis = 3, dilation: PerAxis = 1) -> NeighborTable:
    """Map of a stride-1 convolution: the output sites are the input sites.

    Half of an odd kernel's offsets are searched, the other half is the mirror image.

    Args:
        sites: input sites, which are the output sites too.
        kernel_size: size of the kernel.
        dilation: distance of neighbouring slices, in strides.

    Raises:
        ValueError: a size or a dilation is not one positive integer per axis.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_sets("submanifold_neighbors", sites)
    sizes = per_axis(kernel_size, sites.axes, name="kernel_size")
    offsets = voxel_offsets(sizes, dilation, sites.strides, sites.axes)
    if any(k % 2 == 0 for k in sizes):
        return NeighborTable(find_neighbors(sites, sites, offsets), sites, sites, "submanifold", offsets, sizes)
    return NeighborTable(_mirrored_neighbors(sites, offsets), sites, sites, "submanifold", offsets, sizes)


def strided_neighbors(
    inputs: SiteSet,
    outputs: SiteSet,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    padding: PerAxis | None = None,
) -> NeighborTable:
    """Map of a strided convolution: in = out + offset * input stride. Kernel size 1 is a lookup of the coarse sites.

    Args:
        inputs: sites of the finer grid.
        outputs: sites of the coarser grid (`downsample`, `cover`).
        kernel_size: size of the kernel.
        dilation: distance of neighbouring slices, in strides of the inputs.
        padding: inputs before the output's own place that the kernel covers, as in spconv and Torch: slice i brings
            out + (i * dilation - padding) * input stride. Default: odd kernels are centred, even ones begin at the
            output's place.

    Raises:
        ValueError: the stride of the outputs is no multiple of that of the inputs, or numbers are not one per axis.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_sets("strided_neighbors", inputs, outputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    offsets = voxel_offsets(sizes, dilation, inputs.strides, inputs.axes, padding=padding)
    return NeighborTable(find_neighbors(inputs, outputs, offsets), inputs, outputs, "strided", offsets, sizes)


def pool_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: PerAxis) -> NeighborTable:
    """Map of a pooling: the inputs under each output site's window.

    Args:
        inputs: sites of the finer grid.
        outputs: sites of the coarser grid (`downsample`), or the inputs for overlapping windows of stride 1.
        kernel_size: size of the window; odd ones are centred, even ones begin at the output's place.

    Raises:
        ValueError: the stride of the outputs is no multiple of that of the inputs, or numbers are not one per axis.
        InputError: the window reaches farther than a key has room for.
    """
    check_sets("pool_neighbors", inputs, outputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    offsets = voxel_offsets(sizes, 1, inputs.strides, inputs.axes)
    return NeighborTable(find_neighbors(inputs, outputs, offsets), inputs, outputs, "pool", offsets, sizes)


def generative_neighbors(inputs: SiteSet, outputs: SiteSet, kernel_size: PerAxis) -> NeighborTable:
    """Map of a generative transposed convolution: out = in + offset * output stride, same slice order, no flip.

    Args:
        inputs: sites of the coarser grid.
        outputs: sites of the finer grid (`generate`).
        kernel_size: size of the kernel.

    Raises:
        ValueError: the stride of the inputs is no multiple of that of the outputs, or numbers are not one per axis.
        InputError: the kernel reaches farther than a key has room for.
    """
    check_sets("generative_neighbors", outputs, inputs)
    sizes = per_axis(kernel_size, inputs.axes, name="kernel_size")
    offsets = -voxel_offsets(sizes, 1, outputs.strides, inputs.axes)
    return NeighborTable(find_neighbors(inputs, outputs, offsets), inputs, outputs, "generative", offsets, sizes)


def inverse_neighbors(table: NeighborTable) -> NeighborTable:
    """Map of an inverse convolution: back from the outputs of a convolution onto its inputs, pair by pair.

    The pair (input i, output o) of offset k becomes (input o, output i) of offset k, so that slice k of a kernel
    meets the same pairs in both directions.

    Args:
        table: table of a convolution, usually a strided one.

    Raises:
        ValueError: the table is none.
        InputError: an offset brings one input row to several output rows.
    """
    if not isinstance(table, NeighborTable):
        hint = ": inverse padded maps by sparse.inverse_map" if hasattr(table, "neighbors") else ""
        raise ValueError(f"inverse_neighbors was given a {type(table).__name__}; expected a NeighborTable{hint}.")
    check_rows(table)
    rows = np.full((len(table.rows), len(table.inputs)), MISSING, np.int32)
    for inverse, forward in zip(rows, table.rows, strict=True):
        hits = np.flatnonzero(forward >= 0).astype(np.int32)
        inverse[forward[hits]] = hits
    return NeighborTable(rows, table.outputs, table.inputs, "inverse", -table.offsets, table.kernel_size)


def check_sets(user: str, fine: Any, *others: Any) -> None:
    """Check that sets are sets, of one batch, and that the stride of the coarse one is a multiple of the fine one's.

    Raises:
        ValueError: they are not.
    """
    for sites in (fine, *others):
        check_set(user, sites)
    if not others:
        return
    (coarse,) = others
    if (fine.axes, fine.num_scans) != (coarse.axes, coarse.num_scans):
        raise ValueError(
            f"{user} was given sites with {fine.axes} and {coarse.axes} axes, of {fine.num_scans} and "
            f"{coarse.num_scans} scans; expected are two sets of one batch."
        )
    check_strides(user, fine.strides, coarse.strides)


def check_strides(user: str, fine: tuple[int, ...], coarse: tuple[int, ...]) -> None:
    """Check that coarse strides are multiples of fine ones.

    Raises:
        ValueError: they are not.
    """
    if any(c % f for f, c in zip(fine, coarse, strict=True)):
        ends = ("inputs", "outputs") if user[:4] != "gene" else ("outputs", "inputs")
        raise ValueError(
            f"{user} was given {ends[0]} of stride {shorten(fine)} and {ends[1]} of stride {shorten(coarse)}, which is "
            "no multiple of it: swap the arguments."
        )


def check_rows(table: NeighborTable) -> None:
    """Check that no offset brings one input row to two output rows, as tables of nearest neighbours may.

    Raises:
        InputError: one does.
    """
    for k, rows in enumerate(table.rows):
        present = rows[rows >= 0]
        if len(present) and np.bincount(present).max() > 1:
            raise InputError(
                f"offset {k} of a {table.kind!r} table brings one input row to several output rows; give such a table "
                "the kind 'neighbors', which has no inverse."
            )


def find_neighbors(inputs: SiteSet, outputs: SiteSet, offsets: Int[np.ndarray, "v d"]) -> Int[np.ndarray, "v n"]:
    """Input row at each offset (finest voxels) from each output site, int32, -1 where there is none."""
    moves, runs = key_offsets(offsets), _runs(offsets)
    if loaded := native_maps.library():
        return native_maps.search(loaded, inputs.keys, outputs.keys, moves, runs, mirrored=False)
    rows = np.full((len(offsets), len(outputs)), MISSING, np.int32)
    for j, found, centres in _search(inputs.keys, outputs.keys, moves, runs):
        rows[j][centres] = found
    return rows


def _mirrored_neighbors(sites: SiteSet, offsets: Int[np.ndarray, "v d"]) -> Int[np.ndarray, "v n"]:
    moves = key_offsets(offsets)
    # Whole runs along the last axis, and of the centre's run the part behind it.
    runs = _runs(offsets, moves > 0)
    if loaded := native_maps.library():
        return native_maps.search(loaded, sites.keys, sites.keys, moves, runs, mirrored=True)
    rows = np.full((len(offsets), len(sites)), MISSING, np.int32)
    rows[len(offsets) // 2] = np.arange(len(sites), dtype=np.int32)
    for j, found, centres in _search(sites.keys, sites.keys, moves, runs):
        rows[j][centres] = found
        rows[-1 - j][found] = centres
    return rows


def _runs(offsets: Int[np.ndarray, "v d"], chosen: Bool[np.ndarray, " v"] | None = None) -> list[list[int]]:
    """Chosen offsets by run: those that differ in z alone, the last axis, ascending."""
    runs: dict[tuple[int, ...], list[int]] = {}
    for j in np.argsort(offsets[:, -1], kind="stable"):
        if chosen is None or chosen[j]:
            runs.setdefault(tuple(offsets[j, :-1].tolist()), []).append(int(j))
    return list(runs.values())


def _search(
    keys: Int[np.ndarray, " n"],
    centres: Int[np.ndarray, " m"],
    moves: Int[np.ndarray, " v"],
    runs: Sequence[Sequence[int]],
) -> Iterator[tuple[int, Int[np.ndarray, " p"], Int[np.ndarray, " p"]]]:
    """For each offset j the pairs (row in keys, row in centres) with key = centre + move; both are sorted.

    In a run keys are adjacent: one search finds the first key at or behind the run's first site, the next ones follow
    by comparing with the next key.
    """
    ends = np.append(keys, np.iinfo(np.int64).max)
    for run in runs:
        first = centres + moves[run[0]]
        if centres is keys and 0 < moves[run[0]] <= MAX_REACH:
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
