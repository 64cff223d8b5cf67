"""What a detector is made of, as values."""

from dataclasses import dataclass

from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import KernelSelection

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
        selection: structure-aware kernel selection in the 3^3 residual convolutions; None is TR3D exactly.
    """

    depth: int = 34
    in_channels: int = 3
    stem_channels: int = 64
    stage_channels: tuple[int, int, int, int] = (64, 128, 128, 128)
    neck_channels: int = 128
    voxel_size: float = 0.01
    selection: KernelSelection | None = None

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Basic blocks of each stage.

        Raises:
            InputError: unknown depth.
        """
        if self.depth not in STAGE_BLOCKS:
            raise InputError(f"model.depth is {self.depth}; the residual network has depth 10, 18 or 34.")
        return STAGE_BLOCKS[self.depth]
