"""Architecture of a detector, as values."""

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
        depth: depth of the residual network: 10, 18 or 34 (TR3D).
        in_channels: channels of a voxel's features (3, its colour).
        stem_channels: output channels of the first convolution.
        stage_channels: output channels of the four stages.
        neck_channels: output channels of the neck, which the heads read.
        voxel_size: edge of a voxel in metres.
        selection: structure-aware kernel selection; None is TR3D exactly.
        norm_affine: scale and bias of batch norms are "shared" by the datasets, or "exclusive" to each. The statistics
            of a batch are always those of one dataset.
        running_statistics: of batch norms are "exclusive" to each dataset, or "shared": the mean over the datasets of a
            step.
        neck: kernels of the neck are "shared" by the datasets, or "exclusive" to each.
        label_space: "separate", a head for each dataset; "union", one head for the union of their classes, which are
            one where their names are (`h2a2_jax.scans.label_space`).
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
    label_space: Literal["separate", "union"] = "separate"

    def selection_in(self, part: Part) -> SelectionConfig | None:
        """Kernel selection of a part of the detector; None for a part without it."""
        return self.selection if self.selection is not None and part in self.selection.convolutions else None

    @property
    def norm(self) -> Callable[..., BatchNorm]:
        """Class of the batch norms, with the options of this architecture."""
        return partial(
            BatchNorm,
            exclusive_affine=self.norm_affine == "exclusive",
            shared_statistics=self.running_statistics == "shared",
        )

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Basic blocks of each stage.

        Raises:
            InputError: there is no network of this depth.
        """
        if self.depth not in STAGE_BLOCKS:
            raise InputError(f"model.depth is {self.depth}; the residual network has depth 10, 18 or 34.")
        return STAGE_BLOCKS[self.depth]
