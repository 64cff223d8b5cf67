"""Maps of a detector: sites of every level, neighbour tables, and the lists that a machine's algorithms read.

All are made from the voxels of a batch alone, before the network runs:

    voxels 1 -> stem 2 -> pool 4 -> stages 8, 16, 32, 64 -> generated 32 and 16, each united with its stage

Strides are in finest voxels. The host computes exact tables first (`detector_tables`); their sizes choose a bucket, and
padding to the bucket's capacities gives the plan that goes to the device (`pad_plan`).
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from h2a2_jax import sparse
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.sparse import KernelMap, NeighborTable, Sites, SiteSet
from h2a2_jax.sparse.packed import fits_packing, pack_neighbors
from h2a2_jax.typing import Leaf

Machine = Literal["cpu", "native", "accelerator", "gpu", "any"]
Role = Literal["stem", "skip", "down", "residual", "deep residual", "generate", "lateral"]

EXPECTED_FILL = {"stem": 0.1, "down": 0.25, "residual": 0.4, "deep residual": 0.5, "generate": 1.0, "lateral": 0.85}
"""Share of the sites (of the smaller side) with a given neighbour in real scans; the size of tiles follows from it."""
SPARSE_ROLES = ("stem", "generate")
"""Maps that are sparse on every scan tried; accelerators multiply the others whole, columns being written and read in
less time than products from a third of the neighbours on."""
ACCELERATOR_FILL = {"stem": 0.15, "generate": 0.2}
"""Share of a sparse map's neighbours for which it has places on accelerators: real scans fill half of them. A map with
more takes the layout without places."""
ACCELERATOR_TILE = 512
"""Pairs in a tile on accelerators: rows of a batched matmul, which reads a kernel for each."""
_PACKED = ("accelerator", "gpu")


@dataclass(frozen=True)
class PlanLayout:
    """Lists that the maps of a plan carry.

    Attributes:
        machine: "cpu": tiles on every map with neighbours, blocks on those of the neck; "native", a CPU with compiled
            kernels: blocks alone; "accelerator": tiles with a static number of places on sparse maps, no lists on the
            others, neighbours in 16 bits; "gpu": neighbours in 16 bits and no lists, for the algorithm "implicit";
            "any": plain neighbours and no lists.
        model: architecture; the widths of its stages and neck decide the size of tiles.
    """

    machine: Machine = "cpu"
    model: DetectorConfig = field(default_factory=DetectorConfig)

    @classmethod
    def of(cls, config: DetectorConfig, machine: Machine | None = None) -> "PlanLayout":
        """The layout for a detector; default machine is that on which JAX computes."""
        cpu: Machine = "native" if sparse.has_native() else "cpu"
        return cls(machine or (cpu if jax.default_backend() == "cpu" else "accelerator"), config)

    def fits(self, table: NeighborTable, role: Role, capacity: int) -> bool:
        """Return True if the layout has room for a map of `capacity` padded output rows: bits, and places for pairs."""
        if self.machine in _PACKED and not fits_packing(table):
            return False
        if self.machine != "accelerator" or role not in SPARSE_ROLES:
            return True
        return int(table.pairs_per_offset.sum()) <= ACCELERATOR_FILL[role] * len(table.rows) * capacity

    def pad_map(self, table: NeighborTable, inputs: Sites, outputs: Sites, role: Role, channels: int = 1) -> KernelMap:
        """A table as a padded map with its lists (numpy arrays).

        Args:
            table: the neighbours.
            inputs: padded input sites.
            outputs: padded output sites.
            role: role of the map in the detector.
            channels: channels of the layers that read the map.
        """
        if self.machine == "native" and role == "lateral":
            return sparse.pad_map(table, inputs, outputs, blocks="auto")
        if self.machine == "cpu" and role != "skip":
            tile_size = tile_size_on_cpus(role, inputs, outputs, channels)
            return sparse.pad_map(
                table, inputs, outputs, tile_size=tile_size, blocks="auto" if role == "lateral" else None
            )
        if self.machine == "accelerator" and role in SPARSE_ROLES:
            kmap = sparse.pad_map(table, inputs, outputs, tile_size=ACCELERATOR_TILE)
            # A mirrored list holds half of the pairs; every (offset, scan) may leave a tile unfilled.
            offsets = len(table.rows) // 2 if table.kind == "submanifold" else len(table.rows)
            places = ACCELERATOR_FILL[role] * offsets * outputs.capacity
            kmap = sparse.limit_tiles(kmap, int(places / ACCELERATOR_TILE) + 1 + offsets * inputs.num_scans)
        else:
            kmap = sparse.pad_map(table, inputs, outputs)
        return pack_neighbors(kmap) if self.machine in _PACKED else kmap


def tile_size_on_cpus(role: Role, inputs: Sites, outputs: Sites, channels: int) -> int:
    """Pairs in a tile of a map on CPUs without compiled kernels.

    Args:
        role: role of the map in the detector; none is known for "skip", which has no tiles.
        inputs: padded input sites.
        outputs: padded output sites.
        channels: channels of the layers that read the map.
    """
    pairs = EXPECTED_FILL[role] * min(inputs.capacity, outputs.capacity) / max(1, inputs.num_scans)
    return sparse.choose_tile_size(pairs, channels)


NUM_STAGES = 4
"""Residual stages of the backbone."""
NUM_UPS = 2
"""Steps of the neck."""


class LevelSizes(NamedTuple):
    """Number of sites of every level of the pyramid, or the capacities of their arrays.

    Attributes:
        voxels: stride 1.
        stem: stride 2.
        pool: stride 4.
        stage1: stride 8.
        stage2: stride 16.
        stage3: stride 32.
        stage4: stride 64.
        up1: stride 32, generated sites and those of stage 3.
        up0: stride 16, generated sites and those of stage 2.
    """

    voxels: int
    stem: int
    pool: int
    stage1: int
    stage2: int
    stage3: int
    stage4: int
    up1: int
    up0: int

    def fits(self, capacities: "LevelSizes") -> bool:
        """Return True if every level fits its capacity."""
        return all(size <= capacity for size, capacity in zip(self, capacities, strict=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageMaps:
    """Maps of a residual stage.

    Attributes:
        down: 3^3 strided map onto the sites of the stage.
        skip: 1^3 strided lookup of the sites of the stage.
        residual: 3^3 submanifold map of the stage.
    """

    down: KernelMap
    skip: KernelMap
    residual: KernelMap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UpMaps:
    """Maps of one step of the neck.

    Attributes:
        generate: 3^3 generative transposed convolution onto its children.
        children_rows: int32 [N], for each row of the union the row of the generated children, or their capacity.
        stage_rows: int32 [N], for each row of the union the row of the backbone's stage, or its capacity.
        lateral: 3^3 submanifold map of the union.
    """

    generate: KernelMap
    children_rows: Leaf
    stage_rows: Leaf
    lateral: KernelMap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BackbonePlan:
    """Sites and maps of the backbone for one batch, padded.

    Attributes:
        voxels: sites of the input.
        stem: 3^3 strided map of stride 1 -> 2.
        pool: 2^3 window map of stride 2 -> 4.
        stages: maps of the four stages, finest first.
    """

    voxels: Sites
    stem: KernelMap
    pool: KernelMap
    stages: tuple[StageMaps, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DetectorPlan(BackbonePlan):
    """Sites and maps of one batch, padded: all that a detector needs beside features and parameters.

    Attributes:
        ups: maps of the neck, coarsest first: onto strides 32 and 16.
    """

    ups: tuple[UpMaps, ...]


@dataclass(frozen=True)
class UpTables:
    """Host tables of one step of the neck.

    Attributes:
        generate: 3^3 generative table onto the children.
        stage: sites of the backbone's stage.
        lateral: 3^3 submanifold table of the union of both.
    """

    generate: NeighborTable
    stage: SiteSet
    lateral: NeighborTable


@dataclass(frozen=True)
class BackboneTables:
    """Exact host tables of the backbone for one batch, before padding.

    Attributes:
        voxels: sites of the input.
        stem: 3^3 strided table of stride 1 -> 2.
        pool: 2^3 window table of stride 2 -> 4.
        stages: for each stage, finest first, the tables (down, skip, residual) of its `StageMaps`.
    """

    voxels: SiteSet
    stem: NeighborTable
    pool: NeighborTable
    stages: tuple[tuple[NeighborTable, NeighborTable, NeighborTable], ...]

    @property
    def stage_sites(self) -> list[SiteSet]:
        """Sites of each stage, finest first."""
        return [residual.outputs for _, _, residual in self.stages]

    @property
    def backbone_sizes(self) -> tuple[int, ...]:
        """Number of sites of the voxels, of stem and pool, and of each stage."""
        levels = (self.voxels, self.stem.outputs, self.pool.outputs, *self.stage_sites)
        return tuple(len(level) for level in levels)


@dataclass(frozen=True)
class DetectorTables(BackboneTables):
    """Exact host tables of one batch, before padding.

    Attributes:
        ups: tables of the neck, coarsest first.
    """

    ups: tuple[UpTables, ...]

    @property
    def sizes(self) -> LevelSizes:
        """Number of sites of every level."""
        return LevelSizes(*self.backbone_sizes, *(len(up.lateral.outputs) for up in self.ups))


def pyramid_sizes(voxels: SiteSet) -> LevelSizes:
    """Number of sites of every level, without building a table."""
    levels = backbone_levels(voxels)
    up1 = sparse.unite(sparse.generate(levels[-1], 3), levels[-2])
    up0 = sparse.unite(sparse.generate(up1, 3), levels[-3])
    return LevelSizes(len(voxels), *(len(level) for level in (*levels, up1, up0)))


def backbone_levels(voxels: SiteSet) -> list[SiteSet]:
    """Sites of stem, pool and the four stages on these voxels (stride 1), finest first."""
    levels = [sparse.downsample(voxels, 2)]
    for _ in range(1 + NUM_STAGES):
        levels.append(sparse.downsample(levels[-1], 2))
    return levels


def backbone_tables(voxels: SiteSet) -> BackboneTables:
    """Every neighbour table of the backbone on these voxels (stride 1)."""
    stem, pool, *stages = backbone_levels(voxels)
    stage_tables = []
    for fine, coarse in zip([pool, *stages[:-1]], stages, strict=True):
        stage_tables.append(
            (
                sparse.strided_neighbors(fine, coarse, 3),
                sparse.strided_neighbors(fine, coarse, 1),
                sparse.submanifold_neighbors(coarse, 3),
            )
        )
    stem_table, pool_table = sparse.strided_neighbors(voxels, stem, 3), sparse.pool_neighbors(stem, pool, 2)
    return BackboneTables(voxels, stem_table, pool_table, tuple(stage_tables))


def detector_tables(voxels: SiteSet) -> DetectorTables:
    """Every neighbour table of a detector on these voxels (stride 1)."""
    backbone = backbone_tables(voxels)
    *_, coarse = stages = backbone.stage_sites
    ups = []
    for stage in stages[-2 : -2 - NUM_UPS : -1]:
        children = sparse.generate(coarse, 3)
        union = sparse.unite(children, stage)
        ups.append(
            UpTables(sparse.generative_neighbors(coarse, children, 3), stage, sparse.submanifold_neighbors(union, 3))
        )
        coarse = union
    return DetectorTables(**fields_of(backbone), ups=tuple(ups))


def fits_layout(tables: DetectorTables, capacities: LevelSizes, layout: PlanLayout) -> bool:
    """Return True if the layout has places for the pairs of every map; `replace(layout, machine="any")` always has."""
    roles: list[tuple[NeighborTable, Role, int]] = []
    for up, capacity in zip(tables.ups, capacities[7:], strict=True):
        roles += [(up.generate, "generate", capacity), (up.lateral, "lateral", capacity)]
    return fits_backbone(tables, capacities, layout) and all(layout.fits(*role) for role in roles)


def fits_backbone(tables: BackboneTables, capacities: tuple[int, ...], layout: PlanLayout) -> bool:
    """Return True if the layout has places for the pairs of the backbone's maps.

    Args:
        tables: tables of the batch.
        capacities: number of rows of voxels, stem, pool and the four stages; what follows is not read.
        layout: lists of the maps.
    """
    roles: list[tuple[NeighborTable, Role, int]] = [(tables.stem, "stem", capacities[1])]
    for s, ((down, skip, residual), capacity) in enumerate(zip(tables.stages, capacities[3:7], strict=True)):
        roles += [(down, "down", capacity), (skip, "skip", capacity)]
        roles += [(residual, "residual" if s == 0 else "deep residual", capacity)]
    return all(layout.fits(*role) for role in roles)


def pad_plan(tables: DetectorTables, capacities: LevelSizes, layout: PlanLayout | None = None) -> DetectorPlan:
    """The plan of a batch in the shape of a bucket (numpy arrays).

    Args:
        tables: tables of the batch.
        capacities: number of rows of each level; the generated children share the capacity of their union.
        layout: lists of the maps; default those for CPUs.

    Raises:
        InputError: a level does not fit its capacity.
        ValueError: the pairs of a map do not fit the layout (`fits_layout`).
    """
    layout = layout or PlanLayout()
    backbone, padded = pad_backbone(tables, capacities, layout), layout.pad_map
    ups, coarse = [], backbone.stages[-1].residual.outputs
    for up, capacity, stage_capacity in zip(tables.ups, capacities[7:], capacities[5:3:-1], strict=True):
        children, union = up.generate.outputs, up.lateral.outputs
        outputs = sparse.pad_sites(union, capacity)
        ups.append(
            UpMaps(
                padded(
                    up.generate, coarse, sparse.pad_sites(children, capacity), "generate", layout.model.neck_channels
                ),
                sparse.union_rows(children, union, capacity, capacity),
                sparse.union_rows(up.stage, union, stage_capacity, capacity),
                padded(up.lateral, outputs, outputs, "lateral", layout.model.neck_channels),
            )
        )
        coarse = outputs
    return DetectorPlan(**fields_of(backbone), ups=tuple(ups))


def pad_backbone(tables: BackboneTables, capacities: tuple[int, ...], layout: PlanLayout) -> BackbonePlan:
    """The backbone's maps in the shape of a bucket (numpy arrays).

    Args:
        tables: tables of the batch.
        capacities: number of rows of voxels, stem, pool and the four stages; what follows is not read.
        layout: lists of the maps.

    Raises:
        InputError: a level does not fit its capacity.
        ValueError: the pairs of a map do not fit the layout (`fits_backbone`).
    """
    voxels = sparse.pad_sites(tables.voxels, capacities[0])
    stem = sparse.pad_sites(tables.stem.outputs, capacities[1])
    pool = sparse.pad_sites(tables.pool.outputs, capacities[2])
    padded, widths = layout.pad_map, layout.model.stage_channels
    stages, fine = [], pool
    for s, ((down, skip, residual), capacity) in enumerate(zip(tables.stages, capacities[3:7], strict=True)):
        coarse = sparse.pad_sites(residual.outputs, capacity)
        stages.append(
            StageMaps(
                padded(down, fine, coarse, "down", widths[s]),
                padded(skip, fine, coarse, "skip"),
                padded(residual, coarse, coarse, "residual" if s == 0 else "deep residual", widths[s]),
            )
        )
        fine = coarse
    stem_map = padded(tables.stem, voxels, stem, "stem", 16)
    return BackbonePlan(voxels, stem_map, sparse.pad_map(tables.pool, stem, pool), tuple(stages))


def fields_of(part: BackbonePlan | BackboneTables) -> dict[str, Any]:
    """Fields of the maps or tables of a backbone, which those of a detector take over."""
    return {field.name: getattr(part, field.name) for field in fields(part)}


def backbone_support(tables: BackboneTables, layer: str) -> Float[np.ndarray, " v"]:
    """Share of the output sites of a layer of the backbone that have a neighbour at each offset.

    Args:
        tables: tables of one scan.
        layer: "stem", or a layer of a residual stage, such as "layer1_0.conv1".
    """
    table, (part, _, conv) = tables.stem, layer.partition(".")
    if part.startswith("layer"):
        stage, block = part.removeprefix("layer").split("_")
        down, _, residual = tables.stages[int(stage) - 1]
        table = down if (block, conv) == ("0", "conv1") else residual
    return np.asarray(table.pairs_per_offset / len(table.outputs))
