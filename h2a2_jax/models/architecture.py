"""What a detector is made of, as values."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import Part, SelectionConfig
from h2a2_jax.layers.norm import BatchNorm

STAGE_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Basic blocks of each stage by depth of the residual network; 10 is for small machines."""


@dataclass(frozen=True)
class DetectorConfig:
    """Architecture of a detector.

    Attributes:
        depth: of the residual network: 10, 18 or 34 (TR3D).
        in_channels: of a voxel's features (colour).
        stem_channels: of the first convolution.
        stage_channels: of the four stages.
        neck_channels: of the neck and of what the heads read.
        voxel_size: metres.
        selection: structure-aware kernel selection; None is TR3D exactly.
        norm_affine: scale and bias of batch norms are "shared" by the datasets, or "exclusive" to each. Statistics of a
            batch are always one dataset's.
        running_statistics: of batch norms are "exclusive" to each dataset, or "shared": the mean over the datasets of a
            step.
        neck: the kernels of the neck are "shared", or "exclusive" to each dataset. Heads are always exclusive, for
            classes and box parameters differ.
    """

    depth: int = 34
    in_channels: int = 3
    stem_channels: int = 64
    stage_channels: tuple[int, int, int, int] = (64, 128, 128, 128)
    neck_channels: int = 128
    voxel_size: float = 0.01
    selection: SelectionConfig | None = None
    norm_affine: Literal["shared", "exclusive"] = "shared"
    running_statistics: Literal["exclusive", "shared"] = "exclusive"
    neck: Literal["shared", "exclusive"] = "shared"

    def selection_in(self, part: Part) -> SelectionConfig | None:
        """How a part of the detector selects kernels; None where it does not."""
        return self.selection if self.selection is not None and part in self.selection.convolutions else None

    @property
    def norm(self) -> Callable[..., BatchNorm]:
        """Builds a batch norm."""
        return partial(
            BatchNorm,
            exclusive_affine=self.norm_affine == "exclusive",
            shared_statistics=self.running_statistics == "shared",
        )

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Basic blocks of each stage.

        Raises:
            InputError: unknown depth.
        """
        if self.depth not in STAGE_BLOCKS:
            raise InputError(f"model.depth is {self.depth}; the residual network has depth 10, 18 or 34.")
        return STAGE_BLOCKS[self.depth]
