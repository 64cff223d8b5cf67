"""Buckets: few sets of static shapes for batches whose numbers of sites differ.

Shapes are static to the compiler, numbers of sites are not. All levels of a network are coupled to one scalar ladder (a
bucket multiplies every capacity by the same ratio), so that a run compiles a handful of shapes and not one per
combination of levels. `BucketLadder` chooses a bucket; `pad_tables` pads the sites and maps of any network to it, given
as a host function of the voxels:

    def tables(voxels):
        coarse = sparse.downsample(voxels, 2)
        down = sparse.strided_neighbors(voxels, coarse, 2)
        return {"fine": sparse.submanifold_neighbors(voxels), "down": down, "up": sparse.inverse_neighbors(down)}

    exact = [tables(sparse.voxelize(clouds, 0.02).sites) for clouds in batches]
    ladder = sparse.BucketLadder.measured([sparse.level_sizes(t) for t in exact])
    plan = sparse.pad_tables(exact[0], ladder.fit(sparse.level_sizes(exact[0])))

The function may return any structure of nested dictionaries, lists, tuples, named tuples and dataclasses. Tables in it
become kernel maps and site sets become padded sites; all else stays. `docs/layers.md` trains a network this way.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import jax
import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.kernel_map import KernelMap, choose_tile_size, pad_map
from h2a2_jax.sparse.native_call import has_native
from h2a2_jax.sparse.neighbors import NeighborTable
from h2a2_jax.sparse.sites import Root, Sites, SiteSet, Voxelization, check_count, pad_sites, render_identity, roots_of

SizesT = TypeVar("SizesT", bound=tuple[int, ...])


@dataclass(frozen=True)
class BucketLadder(Generic[SizesT]):
    """Capacities by bucket: those of bucket r are base * ratio**r, rounded up to multiples of 64 rows.

    Sizes and capacities are tuples with one number per level (`level_sizes`); a NamedTuple stays one.

    Attributes:
        base: capacities of bucket 0.
        ratio: factor from one bucket to the next, above 1. At 1.25 batches of 16 scans need some 5 shapes.
        max_bucket: highest bucket that training may use; a batch that does not fit it is cropped.
    """

    base: SizesT
    ratio: float = 1.25
    max_bucket: int = 8

    _BLOCK = 64

    def __post_init__(self) -> None:
        if not self.ratio > 1:
            raise InputError(f"a ladder of ratio {self.ratio} does not rise; choose one above 1, such as 1.25.")
        if isinstance(self.base, str) or not isinstance(self.base, Sequence):
            raise ValueError(f"base is {self.base!r}; expected one capacity for each level.")
        for level, size in enumerate(self.base):
            check_count(f"base of level {level}", size, least=0)
        check_count("max_bucket", self.max_bucket, least=0)

    def capacities(self, bucket: int) -> SizesT:
        """Capacities of a bucket; at least 64 rows per level."""
        factor = self.ratio**bucket
        sizes = (int(-(-max(size, 1) * factor // self._BLOCK) * self._BLOCK) for size in self.base)
        return _like(self.base, sizes)

    def bucket(self, sizes: SizesT, limit: int | None = None) -> int | None:
        """Lowest bucket that the sizes fit; None if it lies above `limit`.

        Raises:
            InputError: the sizes have another number of levels than the ladder.
        """
        if len(sizes) != len(self.base):
            raise InputError(
                f"the ladder has {len(self.base)} levels, the sizes {len(sizes)}; measure a ladder for each network."
            )
        bucket = 0
        while any(size > capacity for size, capacity in zip(sizes, self.capacities(bucket), strict=True)):
            bucket += 1
            if limit is not None and bucket > limit:
                return None
        return bucket

    def fit(self, sizes: SizesT) -> SizesT:
        """Capacities of the lowest bucket that the sizes fit, however high it is."""
        return self.capacities(cast(int, self.bucket(sizes)))

    @classmethod
    def measured(
        cls,
        sizes: Sequence[SizesT] | Sequence[Sequence[SizesT]],
        scans: int = 1,
        *,
        lowest: str = "usual",
        **options: Any,
    ) -> "BucketLadder[SizesT]":
        """Measure a ladder on samples of the batches, or of the scans, that are to fit.

        Level by level the base holds the mean size of a batch plus three standard deviations, for the dataset that
        needs most: nearly every batch has one shape. Where batches differ much, as those of one scan do, that pads most
        of them heavily; `lowest="smallest"` begins at the smallest ones and makes more shapes.

        Args:
            sizes: sizes of some sample batches; or for each dataset the sizes of some of its single scans.
            scans: number of samples in a batch: 1 where samples are batches.
            lowest: batch that bucket 0 holds, the "usual" or the "smallest" one.
            options: `ratio` and `max_bucket` of the ladder.

        Raises:
            InputError: there is no sample.
            ValueError: `lowest` is neither "usual" nor "smallest".
        """
        if lowest not in ("usual", "smallest"):
            raise ValueError(f"lowest is {lowest!r}, expected 'usual' or 'smallest'.")
        # A sample is a tuple of numbers; a dataset is a sequence of such tuples.
        flat = any(len(s) and np.ndim(s[0]) == 0 for s in sizes)
        datasets = cast(Sequence[Sequence[SizesT]], [sizes] if flat else [s for s in sizes if len(s)])
        if not datasets:
            raise InputError("a ladder is measured on samples, given none; pass the sizes of at least one batch.")
        tables = [np.asarray(s, np.float64) for s in datasets]
        means, spreads = [t.mean(0) * scans for t in tables], [3 * t.std(0) * scans**0.5 for t in tables]
        base = np.max([mean + spread for mean, spread in zip(means, spreads, strict=True)], 0)
        if lowest == "smallest":  # levels in their usual proportion
            usual = np.maximum(np.mean(means, 0), 1)
            least = [t.min(0) * scans for t in tables]
            lows = [np.maximum(a, b - c) for a, b, c in zip(least, means, spreads, strict=True)]
            base = usual * min((low / usual).max() for low in lows)
        return cls(_like(datasets[0][0], np.ceil(base).astype(int).tolist()), **options)


def _like(example: SizesT, sizes: Iterable[int]) -> SizesT:
    """The numbers as a tuple of the example's type."""
    kind: Any = type(example)
    return cast(SizesT, kind(*sizes) if hasattr(kind, "_fields") else tuple(sizes))


MapLayout = Callable[[NeighborTable, Sites, Sites], KernelMap]
"""Function that makes a map from a table and its padded input and output sites."""

_EXPECTED_FILL = 0.4
"""Share of the sites that have a given neighbour, on the surfaces of rooms."""


def level_sizes(tables: Any) -> tuple[int, ...]:
    """Number of sites of each level of a structure of tables.

    A level is a distinct `SiteSet`, by identity: one set that serves many tables is one level. Levels are in the order
    of their first occurrence; the inputs of a table come before its outputs.

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
        capacities: number of rows of each level, in the order of `level_sizes`.
        layout: lists that the maps carry: "tiles", which convolutions on CPUs read; "neighbors", the neighbours alone;
            or a function of a table and its padded sites that calls `pad_map`. Its choices may depend on capacities
            and on the kind of table, not on the pairs, for they are part of the shapes. Default: "tiles" if JAX
            computes on a CPU without the compiled kernels.
        channels: channels of the layers, for the size of the tiles.

    Returns:
        The same structure with a `KernelMap` for every table and `Sites` for every set; sites of one set are one
        object throughout. Sets that begin from several clouds of one name are numbered in their identities.

    Raises:
        InputError: a level does not fit its capacity, or the numbers of levels and capacities differ.
        ValueError: there is no such layout, a capacity is no integer, or something is padded already.
    """
    levels = list(_levels(tables))
    if not isinstance(capacities, Sequence | np.ndarray):
        raise ValueError(f"capacities is {capacities!r}; expected one number for each of {len(levels)} levels.")
    capacities = [check_count(f"capacity of level {i}", c, least=0) for i, c in enumerate(capacities)]
    if len(levels) != len(capacities):
        raise InputError(
            f"these tables have {len(levels)} levels, given are {len(capacities)} capacities; take those of a ladder "
            "measured on level_sizes(tables)."
        )
    padded: dict[int, Sites] = {}
    numbers = _number_roots(levels)
    for level, ((path, sites), capacity) in enumerate(zip(levels, capacities, strict=True)):
        if len(sites) > capacity:
            raise InputError(
                f"level {level} (stride {sites.stride}, first met at {path or 'the top'}) has {len(sites)} sites, "
                f"which do not fit a capacity of {capacity}; take a larger bucket."
            )
        padded[id(sites)] = pad_sites(sites, capacity, identity=render_identity(sites.lineage, numbers))
    as_map = _layout(layout, channels)

    def pad(leaf: NeighborTable | SiteSet) -> KernelMap | Sites:
        if isinstance(leaf, SiteSet):
            return padded[id(leaf)]
        return as_map(leaf, padded[id(leaf.inputs)], padded[id(leaf.outputs)])

    return _rebuild(tables, pad)


def _number_roots(levels: Sequence[tuple[str, SiteSet]]) -> dict[Root, int]:
    """Number of each root among those of its name, in the order of the levels."""
    numbers: dict[Root, int] = {}
    names: Counter[str] = Counter()
    for _, sites in levels:
        for root in roots_of(sites.lineage):
            if root not in numbers:
                numbers[root] = names[root.name]
                names[root.name] += 1
    return numbers


def _layout(layout: str | MapLayout | None, channels: int) -> MapLayout:
    """The function that a layout stands for."""
    if callable(layout):
        return layout
    if layout is None:
        layout = "tiles" if jax.default_backend() == "cpu" and not has_native() else "neighbors"
    if layout not in ("tiles", "neighbors"):
        raise ValueError(f"layout {layout!r} is neither 'tiles' nor 'neighbors', nor a function.")

    def with_tiles(table: NeighborTable, inputs: Sites, outputs: Sites) -> KernelMap:
        # A single offset is one plain gather, and pooling reads no lists.
        if layout == "neighbors" or len(table.rows) == 1 or table.kind in ("pool", "neighbors"):
            return pad_map(table, inputs, outputs)
        pairs = _EXPECTED_FILL * min(inputs.capacity, outputs.capacity) / max(1, inputs.num_scans)
        return pad_map(table, inputs, outputs, tile_size=choose_tile_size(pairs, channels))

    return with_tiles


def _levels(tables: Any) -> Iterator[tuple[str, SiteSet]]:
    """Distinct site sets, each with the path to its first occurrence."""
    seen: set[int] = set()
    for path, leaf in _leaves(tables):
        sets = [("", leaf)] if isinstance(leaf, SiteSet) else [(".inputs", leaf.inputs), (".outputs", leaf.outputs)]
        for side, sites in sets:
            if id(sites) not in seen:
                seen.add(id(sites))
                yield path + side, sites


def _children(node: Any) -> list[tuple[str, str | int, Any]] | None:
    """Parts of a container as (text of the step to it, key, part); None for a leaf."""
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
    if isinstance(node, Sites | KernelMap):
        raise ValueError(
            f"{path or 'the top'} is a {type(node).__name__}, which is padded already; expected tables and site sets "
            "of the host."
        )
    if isinstance(node, Voxelization):
        raise ValueError(f"{path or 'the top'} is a Voxelization; expected tables and site sets: give voxels.sites.")
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
        same = copy.copy(node)  # a subclass of dict stays one
        same.update(rebuilt)
        return same
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(**rebuilt)
    if isinstance(node, list | tuple):
        return type(node)(rebuilt.values())
    return dataclasses.replace(node, **rebuilt)
