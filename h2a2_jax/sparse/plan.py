"""The sites and maps of any network, written as a host function of its voxels, in the shapes of a bucket.

    def tables(voxels):
        coarse = sparse.downsample(voxels, 2)
        down = sparse.strided_neighbors(voxels, coarse, 2)
        return {"fine": sparse.submanifold_neighbors(voxels), "down": down, "up": sparse.inverse_neighbors(down)}

    exact = [tables(sparse.voxelize(clouds, 0.02).sites) for clouds in batches]
    ladder = sparse.BucketLadder.measured([sparse.level_sizes(t) for t in exact])
    plan = sparse.pad_tables(exact[0], ladder.fit(sparse.level_sizes(exact[0])))

What the function returns is a structure of its author's choice: dictionaries, lists, tuples, named tuples and
dataclasses, nested; of it tables become kernel maps and site sets become padded sites, all else stays.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.grid import SiteSet
from h2a2_jax.sparse.kernel_map import KernelMap, pad_map
from h2a2_jax.sparse.neighbors import NeighborTable
from h2a2_jax.sparse.pair_tiles import choose_tile_size
from h2a2_jax.sparse.tensor import Sites, pad_sites

MapLayout = Callable[[NeighborTable, Sites, Sites], KernelMap]
"""How a table becomes a map: of the table and its padded input and output sites."""

_EXPECTED_FILL = 0.4
"""Share of the sites that have a given neighbour, on the surfaces of rooms."""


def level_sizes(tables: Any) -> tuple[int, ...]:
    """Sites of each distinct site set of a structure, in the order in which it comes first.

    Sets are told apart by identity: one set that serves many tables is one level. A table's inputs come before its
    outputs.

    Args:
        tables: structure of `NeighborTable` and `SiteSet`.
    """
    return tuple(len(sites) for _, sites in _levels(tables))


def pad_tables(
    tables: Any,
    capacities: Sequence[int],
    *,
    layout: str | MapLayout | None = None,
    channels: int = 64,
) -> Any:
    """A structure of host tables in the shapes of a bucket (numpy arrays).

    Args:
        tables: structure of `NeighborTable` and `SiteSet`.
        capacities: rows of each level, in the order of `level_sizes`.
        layout: which lists the maps carry: "tiles", what convolutions on CPUs read; "neighbors", the neighbours alone;
            or a function of a table and its padded sites that calls `pad_map`. Its choices may depend on capacities
            and on the kind of table, not on the pairs, for they are part of the shapes. Default: tiles if JAX
            computes on a CPU.
        channels: of the layers, for the size of the tiles.

    Returns:
        The same structure with a `KernelMap` for every table and `Sites` for every set; sites of one set are one
        object throughout.

    Raises:
        InputError: a level does not fit its capacity, or the numbers of levels and capacities differ.
        ValueError: there is no such layout.
    """
    levels = list(_levels(tables))
    if len(levels) != len(capacities):
        raise InputError(
            f"these tables have {len(levels)} levels, given are {len(capacities)} capacities; take those of a ladder "
            "measured on level_sizes(tables)."
        )
    padded: dict[int, Sites] = {}
    for level, ((path, sites), capacity) in enumerate(zip(levels, capacities, strict=True)):
        if len(sites) > capacity:
            raise InputError(
                f"level {level} (stride {sites.stride}, first met at {path or 'the top'}) has {len(sites)} sites, "
                f"which do not fit a capacity of {capacity}; take a larger bucket."
            )
        padded[id(sites)] = pad_sites(sites, capacity)
    as_map = _layout(layout, channels)

    def pad(leaf: NeighborTable | SiteSet) -> KernelMap | Sites:
        if isinstance(leaf, SiteSet):
            return padded[id(leaf)]
        return as_map(leaf, padded[id(leaf.inputs)], padded[id(leaf.outputs)])

    return _rebuild(tables, pad)


def _layout(layout: str | MapLayout | None, channels: int) -> MapLayout:
    if callable(layout):
        return layout
    if layout is None:
        layout = "tiles" if jax.default_backend() == "cpu" else "neighbors"
    if layout not in ("tiles", "neighbors"):
        raise ValueError(f"layout {layout!r} is neither 'tiles' nor 'neighbors', nor a function.")

    def with_tiles(table: NeighborTable, inputs: Sites, outputs: Sites) -> KernelMap:
        # A single offset is one plain gather, and pooling reads no lists.
        if layout == "neighbors" or len(table.rows) == 1 or table.kind == "pool":
            return pad_map(table, inputs, outputs)
        pairs = _EXPECTED_FILL * min(inputs.capacity, outputs.capacity) / max(1, inputs.num_scans)
        return pad_map(table, inputs, outputs, tile_size=choose_tile_size(pairs, channels))

    return with_tiles


def _levels(tables: Any) -> Iterator[tuple[str, SiteSet]]:
    """Distinct site sets, each with the path to where it comes first."""
    seen: set[int] = set()
    for path, leaf in _leaves(tables):
        sets = [("", leaf)] if isinstance(leaf, SiteSet) else [(".inputs", leaf.inputs), (".outputs", leaf.outputs)]
        for side, sites in sets:
            if id(sites) not in seen:
                seen.add(id(sites))
                yield path + side, sites


def _children(node: Any) -> list[tuple[str, str | int, Any]] | None:
    """Parts of a container: how to write the way to each, its key, and it; None if it is not one that is entered."""
    if isinstance(node, NeighborTable | SiteSet):
        return None
    if isinstance(node, dict):
        return [(f"[{key!r}]", key, value) for key, value in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(f".{name}", name, getattr(node, name)) for name in node._fields]
    if isinstance(node, list | tuple):
        return [(f"[{i}]", i, value) for i, value in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f".{field.name}", field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, NeighborTable | SiteSet]]:
    if isinstance(node, NeighborTable | SiteSet):
        yield path, node
    for step, _, child in _children(node) or []:
        yield from _leaves(child, path + step)


def _rebuild(node: Any, pad: Callable[[NeighborTable | SiteSet], KernelMap | Sites]) -> Any:
    if isinstance(node, NeighborTable | SiteSet):
        return pad(node)
    children = _children(node)
    if children is None:
        return node
    rebuilt: dict[Any, Any] = {key: _rebuild(child, pad) for _, key, child in children}
    if isinstance(node, dict):
        same = copy.copy(node)
        same.update(rebuilt)
        return same
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(**rebuilt)
    if isinstance(node, list | tuple):
        return type(node)(rebuilt.values())
    return dataclasses.replace(node, **rebuilt)
