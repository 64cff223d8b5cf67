"""Architecture of a detector, as values."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import Part, SelectionConfig
from h2a2_jax.layers.norm import BatchNorm
from h2a2_jax.layers.prompt_norm import PromptNorm

STAGE_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Basic blocks of each stage by depth of the residual network; 10 is for small machines."""

FCAF3D_STAGES = (64, 128, 256, 512)
"""Published widths of FCAF3D's stages; its depth, stem, neck and voxels are those of TR3D."""


Kind = Literal["tr3d", "fcaf3d"]
"""Kind of a detector, a key of `KINDS` (`h2a2_jax.models.kinds`)."""


@dataclass(frozen=True)
class DetectorConfig:
    """Architecture of a detector.

    Attributes:
        depth: depth of the residual network: 10, 18 or 34 (TR3D, FCAF3D).
        in_channels: channels of a voxel's features (3, its colour).
        stem_channels: output channels of the first convolution.
        stage_channels: output channels of the four stages.
        neck_channels: output channels of the neck, which the heads read.
        voxel_size: edge of a voxel in metres.
        selection: structure-aware kernel selection; None is the plain detector exactly.
        norm_affine: scale and bias of batch norms are "shared" by the datasets, "exclusive" to each, or follow by a
            shared map from the dataset's embedding, "prompt" (`PromptNorm`). The statistics of a batch are always those
            of one dataset.
        prompt_dim: width of the datasets' embeddings that prompts are read from; with kernel selection they are those
            of the selection, `SelectionConfig.embedding_dim` wide.
        running_statistics: of batch norms are "exclusive" to each dataset, or "shared": the mean over the datasets of a
            step.
        neck: kernels of the neck are "shared" by the datasets, or "exclusive" to each.
        label_space: "separate", a head for each dataset; "union", one head for the union of their classes, which are
            one where their names are (`h2a2_jax.scans.label_space`).
        adapters: if True, each dataset has a residual adapter at the submanifold 3^3 convolutions of the stages
            (`AdapterConv`), but not in exclusive ones.
        exclusive_stages: stages of the backbone, 1 to 4, with kernels and scales and biases of norms exclusive to each
            dataset; 0 is the stem.
        kind: "tr3d", or "fcaf3d" with its generative neck that is pruned by scores (`h2a2_jax.models.detector`).
        prune_threshold: FCAF3D: sites of a scan that its neck keeps on a level, those of the highest scores.
        assign_threshold: FCAF3D: a box asks for locations of the coarsest level, seen from the finest, up to which it
            holds this many.
        center_threshold: FCAF3D: locations that a box may take, those nearest to its centre by centerness.
    """

    depth: int = 34
    in_channels: int = 3
    stem_channels: int = 64
    stage_channels: tuple[int, int, int, int] = (64, 128, 128, 128)
    neck_channels: int = 128
    voxel_size: float = 0.01
    selection: SelectionConfig | None = None
    norm_affine: Literal["shared", "exclusive", "prompt"] = "shared"
    prompt_dim: int = 64
    running_statistics: Literal["exclusive", "shared"] = "exclusive"
    neck: Literal["shared", "exclusive"] = "shared"
    label_space: Literal["separate", "union"] = "separate"
    adapters: bool = False
    exclusive_stages: tuple[int, ...] = ()
    kind: Kind = "tr3d"
    prune_threshold: int = 100_000
    assign_threshold: int = 27
    center_threshold: int = 18

    def selection_in(self, part: Part) -> SelectionConfig | None:
        """Kernel selection of a part of the detector; None for a part without it."""
        return self.selection if self.selection is not None and part in self.selection.convolutions else None

    def kernels_in(self, stage: int) -> Literal["shared", "adapted", "exclusive"]:
        """Kernels of a stage without selection, 1 to 4, or of the stem, 0, as in `ResidualBlock`."""
        if stage in self.exclusive_stages:
            return "exclusive"
        return "adapted" if self.adapters and stage > 0 else "shared"

    def norm_in(self, stage: int) -> Callable[..., BatchNorm]:
        """Class of the batch norms of a stage, 1 to 4, or of the stem, 0, with the options of this architecture."""
        return self._norm("exclusive" if stage in self.exclusive_stages else self.norm_affine)

    @property
    def neck_norm(self) -> Callable[..., BatchNorm]:
        """Class of the batch norms of the neck, with the options of this architecture."""
        return self._norm(self.norm_affine)

    def _norm(self, affine: str) -> Callable[..., BatchNorm]:
        is_shared = self.running_statistics == "shared"
        if affine == "prompt":
            width = self.prompt_dim if self.selection is None else self.selection.embedding_dim
            return partial(PromptNorm, embedding_dim=width, shared_statistics=is_shared)
        return partial(BatchNorm, exclusive_affine=affine == "exclusive", shared_statistics=is_shared)

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Basic blocks of each stage.

        Raises:
            InputError: there is no network of this depth.
        """
        if self.depth not in STAGE_BLOCKS:
            raise InputError(f"model.depth is {self.depth}; the residual network has depth 10, 18 or 34.")
        return STAGE_BLOCKS[self.depth]
