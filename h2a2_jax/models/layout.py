"""Which lists the maps of a detector carry: what the convolution algorithms of a machine read."""

from dataclasses import dataclass
from typing import Literal

import jax

from h2a2_jax import sparse
from h2a2_jax.models.config import DetectorConfig
from h2a2_jax.sparse import KernelMap, NeighborTable, Sites

Machine = Literal["cpu", "accelerator", "any"]
Role = Literal["stem", "skip", "down", "residual", "deep residual", "generate", "lateral"]

EXPECTED_FILL = {"stem": 0.1, "down": 0.25, "residual": 0.4, "deep residual": 0.5, "generate": 1.0, "lateral": 0.85}
"""Share of the sites (of the smaller side) with a given neighbour in real scans; it decides how pairs are cut."""
SPARSE_ROLES = ("stem", "down", "residual", "generate")
"""Maps that are less than half full on every scan met; accelerators multiply the others whole."""
ACCELERATOR_FILL = 0.45
"""Share of a sparse map's neighbours for which it has places on accelerators."""
ACCELERATOR_TILE = 128
"""Pairs in a tile on accelerators: rows of a batched matmul."""


@dataclass(frozen=True)
class PlanLayout:
    """How the maps of a plan are laid out.

    Attributes:
        machine: "cpu": tiles on every map with neighbours, blocks on the neck's; "accelerator": tiles with a static
            number of places on sparse maps, nothing on the others; "any": nothing.
        stage_channels: of the four stages; widths decide how the pairs are cut.
        neck_channels: of the neck.
    """

    machine: Machine = "cpu"
    stage_channels: tuple[int, ...] = (64, 128, 128, 128)
    neck_channels: int = 128

    @classmethod
    def of(cls, config: DetectorConfig, machine: Machine | None = None) -> "PlanLayout":
        """For a detector, on the machine that JAX computes on if none is named."""
        here: Machine = "cpu" if jax.default_backend() == "cpu" else "accelerator"
        return cls(machine or here, tuple(config.stage_channels), config.neck_channels)

    def fits(self, table: NeighborTable, role: Role, capacity: int) -> bool:
        """Whether the pairs of a map find places among those of its padded output rows."""
        if self.machine != "accelerator" or role not in SPARSE_ROLES:
            return True
        return int(table.pairs_per_offset.sum()) <= ACCELERATOR_FILL * len(table.rows) * capacity

    def pad_map(self, table: NeighborTable, inputs: Sites, outputs: Sites, role: Role, channels: int = 1) -> KernelMap:
        """A table as a padded map with its lists (numpy arrays).

        Args:
            table: the neighbours.
            inputs: padded input sites.
            outputs: padded output sites.
            role: of the map in the detector.
            channels: of the layers that read it.
        """
        if self.machine == "cpu" and role != "skip":
            pairs = EXPECTED_FILL[role] * min(inputs.capacity, outputs.capacity) / max(1, inputs.num_scans)
            return sparse.pad_map(
                table,
                inputs,
                outputs,
                tile_size=sparse.choose_tile_size(pairs, channels),
                blocks="auto" if role == "lateral" else None,
            )
        if self.machine == "accelerator" and role in SPARSE_ROLES:
            kmap = sparse.pad_map(table, inputs, outputs, tile_size=ACCELERATOR_TILE)
            # A mirrored list holds half of the pairs; every (offset, scan) may leave a tile unfilled.
            offsets = len(table.rows) // 2 if table.kind == "submanifold" else len(table.rows)
            places = ACCELERATOR_FILL * offsets * outputs.capacity
            return sparse.limit_tiles(kmap, int(places / ACCELERATOR_TILE) + 1 + offsets * inputs.num_scans)
        return sparse.pad_map(table, inputs, outputs)
