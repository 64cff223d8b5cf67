"""Maps of FCAF3D: those of its backbone and of its neck as far as no scores decide, on the host; the rest inside jit.

    stages 8, 16, 32, 64 -> children of the sites at 64, united with stage 3 -> pruned -> children at 16 -> ... at 8

Levels are counted from the finest: level 3 is stage 4, level l the union of stage l + 1 with the children of level
l + 1. A level has all children of the coarser one, 8 a site, so that as long as nothing is pruned the sites of the
stage are among them, and the union is the children. The first level to be pruned is still a function of the voxels; the
levels below it depend on the network's scores, and their maps are made in every forward pass.

Whether a level may be pruned is static: it may if its capacity exceeds the number of sites that a scan keeps, for then
one scan could have more. A scan with fewer sites keeps all of them in either case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from h2a2_jax import sparse
from h2a2_jax.models.maps import (
    BackbonePlan,
    BackboneTables,
    PlanLayout,
    backbone_levels,
    backbone_tables,
    fields_of,
    fits_backbone,
    pad_backbone,
    tile_size_on_cpus,
)
from h2a2_jax.sparse import KernelMap, NeighborTable, Sites, SiteSet
from h2a2_jax.typing import Leaf, static_field

NUM_PRUNED = 3
"""Levels of the neck that are united and pruned."""


class FCAF3DSizes(NamedTuple):
    """Number of sites of every level, or the capacities of their arrays; those of unions 1 and 0 are bounds.

    Attributes:
        voxels: stride 1.
        stem: stride 2.
        pool: stride 4.
        stage1: stride 8.
        stage2: stride 16.
        stage3: stride 32.
        stage4: stride 64; head level 3.
        union2: stride 32, head level 2 before it is pruned.
        union1: stride 16, head level 1 before it is pruned.
        union0: stride 8, head level 0 before it is pruned.
    """

    voxels: int
    stem: int
    pool: int
    stage1: int
    stage2: int
    stage3: int
    stage4: int
    union2: int
    union1: int
    union0: int

    @property
    def unions(self) -> tuple[int, int, int]:
        """Sites, or capacities, of unions 2, 1 and 0."""
        return self[7:]

    def fits(self, capacities: "FCAF3DSizes") -> bool:
        """Return True if every level fits its capacity: then no site is ever left out, whatever the scores are."""
        return all(size <= capacity for size, capacity in zip(self, capacities, strict=True))


@dataclass(frozen=True)
class ChildTables:
    """Host tables from a level, all of whose sites are known, to its children.

    Attributes:
        generate: 2^3 generative table onto the children.
        stage: sites of the backbone's stage that the children are united with, all among them.
        conv: 3^3 submanifold table of the children.
    """

    generate: NeighborTable
    stage: SiteSet
    conv: NeighborTable


@dataclass(frozen=True)
class FCAF3DTables(BackboneTables):
    """Exact host tables of one batch, before padding.

    Attributes:
        children: tables of the levels 2, 1 and 0, down to the first that is pruned: no scores decide about these.
        prune_threshold: sites that a scan keeps on a level.
    """

    children: tuple[ChildTables, ...]
    prune_threshold: int

    @property
    def sizes(self) -> FCAF3DSizes:
        """Number of sites of every level."""
        unions = _union_bounds(self.stage_sites, self.prune_threshold)
        return FCAF3DSizes(*self.backbone_sizes, *unions)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChildMaps:
    """Maps from a level to its children.

    Attributes:
        generate: 2^3 generative map onto the children.
        stage_rows: int32 [N], for each child the row of the backbone's stage, or its capacity; None where the children
            are not known to hold the stage.
        conv: 3^3 submanifold map of the children.
    """

    generate: KernelMap
    stage_rows: Leaf
    conv: KernelMap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FCAF3DPlan(BackbonePlan):
    """Sites and maps of one batch, padded: all that FCAF3D needs beside features and parameters.

    Plans of one bucket have one tree structure: which maps are made on the host follows from the capacities.

    Attributes:
        children: maps of the levels 2, 1 and 0, as many of them as no scores can decide about in this bucket.
        unions: capacities of the unions 2, 1 and 0 (static).
        prune_threshold: sites that a scan keeps on a level (static).
        machine: machine of the layout, for the lists of maps that are made inside jit (static).
    """

    children: tuple[ChildMaps, ...]
    unions: tuple[int, int, int] = static_field()
    prune_threshold: int = static_field()
    machine: str = static_field()

    def prunes(self, level: int) -> bool:
        """Return True if scores decide which sites of a level 0 to 2 stay."""
        return self.unions[NUM_PRUNED - 1 - level] > self.prune_threshold

    def kept(self, level: int) -> int:
        """Capacity of a level 0 to 2 after it is pruned."""
        return min(self.unions[NUM_PRUNED - 1 - level], self.voxels.num_scans * self.prune_threshold)

    def child_maps(self, level: int, coarse: Sites, channels: int) -> tuple[ChildMaps, Int[Array, ""]]:
        """Maps from the sites of level + 1 to their children; inside jit where those depend on scores.

        Args:
            level: level 0 to 2 of the children.
            coarse: sites of level + 1 as they are after pruning.
            channels: channels of the layers that read the maps.

        Returns:
            The maps; overflow int32 [], the number of children that the capacity of the union has no place for.
        """
        index = NUM_PRUNED - 1 - level
        if index < len(self.children):
            return self.children[index], jnp.zeros((), jnp.int32)
        children, overflow = sparse.generate_sites(coarse, 2, self.unions[index])
        tile_size = tile_size_on_cpus("generate", coarse, children, channels) if self.machine == "cpu" else None
        generate = sparse.generative_map(coarse, children, 2, tile_size=tile_size)
        return ChildMaps(generate, None, self.conv_map(children, channels)), overflow

    def conv_map(self, sites: Sites, channels: int) -> KernelMap:
        """3^3 submanifold map of sites that depend on scores, inside jit."""
        tile_size = tile_size_on_cpus("lateral", sites, sites, channels) if self.machine == "cpu" else None
        return sparse.submanifold_map(sites, 3, tile_size=tile_size)


def fcaf3d_sizes(voxels: SiteSet, prune_threshold: int) -> FCAF3DSizes:
    """Number of sites of every level on these voxels (stride 1), without building a table.

    Args:
        voxels: sites of the input.
        prune_threshold: sites that a scan keeps on a level.
    """
    levels = backbone_levels(voxels)
    unions = _union_bounds(levels[2:], prune_threshold)
    return FCAF3DSizes(len(voxels), *(len(level) for level in levels), *unions)


def _union_bounds(stages: Sequence[SiteSet], most: int) -> list[int]:
    """Largest number of sites that unions 2, 1 and 0 may have, whatever the scores are.

    Where a scan is pruned, the stage of the next finer level brings back sites whose parent is gone, at most all of its
    sites. A scan has never more than all children of stage 4.
    """
    counts = [np.bincount(stage.scan, minlength=stage.num_scans) for stage in stages]
    union = 8 * counts[3]
    bounds = [union]
    for level in (1, 0):
        restored = np.where(union > most, counts[level], 0)
        union = np.minimum(8 * np.minimum(union, most) + restored, 8 ** (3 - level) * counts[3])
        bounds.append(union)
    return [int(bound.sum()) for bound in bounds]


def fcaf3d_tables(voxels: SiteSet, prune_threshold: int) -> FCAF3DTables:
    """Every neighbour table that depends on these voxels (stride 1) alone.

    Args:
        voxels: sites of the input.
        prune_threshold: sites that a scan keeps on a level.
    """
    backbone = backbone_tables(voxels)
    *stages, coarse = backbone.stage_sites
    tables = []
    for stage in reversed(stages):
        children = sparse.generate(coarse, 2)
        tables.append(
            ChildTables(
                sparse.generative_neighbors(coarse, children, 2), stage, sparse.submanifold_neighbors(children, 3)
            )
        )
        if len(children) > prune_threshold:
            break
        coarse = children
    return FCAF3DTables(**fields_of(backbone), children=tuple(tables), prune_threshold=prune_threshold)


def fits_fcaf3d(tables: FCAF3DTables, capacities: FCAF3DSizes, layout: PlanLayout) -> bool:
    """Return True if the layout has places for the pairs of every map; `replace(layout, machine="any")` always has."""
    used = zip(tables.children, _known(capacities, tables.prune_threshold), strict=False)
    return fits_backbone(tables, capacities, layout) and all(
        layout.fits(maps.generate, "generate", capacity) and layout.fits(maps.conv, "lateral", capacity)
        for maps, capacity in used
    )


def _known(capacities: FCAF3DSizes, prune_threshold: int) -> list[int]:
    """Capacities of the unions that are made on the host: up to the first that may be pruned."""
    known: list[int] = []
    for capacity in capacities.unions:
        known.append(capacity)
        if capacity > prune_threshold:
            break
    return known


def pad_fcaf3d(tables: FCAF3DTables, capacities: FCAF3DSizes, layout: PlanLayout | None = None) -> FCAF3DPlan:
    """The plan of a batch in the shape of a bucket (numpy arrays).

    Args:
        tables: tables of the batch.
        capacities: number of rows of each level; where unions 1 and 0 have fewer than `tables.sizes`, the forward pass
            may leave sites out, and counts them (`Predictions.overflow`).
        layout: lists of the maps; default those for CPUs.

    Raises:
        InputError: a level that is made on the host does not fit its capacity.
        ValueError: the pairs of a map do not fit the layout (`fits_fcaf3d`).
    """
    layout = layout or PlanLayout()
    backbone, widths = pad_backbone(tables, capacities, layout), layout.model.stage_channels
    coarse, children = backbone.stages[-1].residual.outputs, []
    for index, capacity in enumerate(_known(capacities, tables.prune_threshold)):
        table, level = tables.children[index], NUM_PRUNED - 1 - index
        sites = sparse.pad_sites(table.conv.outputs, capacity)
        children.append(
            ChildMaps(
                layout.pad_map(table.generate, coarse, sites, "generate", widths[level]),
                sparse.union_rows(table.stage, table.conv.outputs, capacities[3 + level], capacity),
                layout.pad_map(table.conv, sites, sites, "lateral", widths[level]),
            )
        )
        coarse = sites
    return FCAF3DPlan(
        **fields_of(backbone),
        children=tuple(children),
        unions=capacities.unions,
        prune_threshold=tables.prune_threshold,
        machine=layout.machine,
    )
