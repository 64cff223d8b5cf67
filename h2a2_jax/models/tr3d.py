"""The detector: TR3D, with structure-aware kernel selection by config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.layers import DatasetContext, ForwardContext, SelectiveConv
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.backbone import MinkResNet
from h2a2_jax.models.head import DatasetHeads
from h2a2_jax.models.maps import DetectorPlan
from h2a2_jax.models.neck import Neck
from h2a2_jax.sparse import SparseTensor


@dataclass(frozen=True)
class HeadConfig:
    """What the head of a dataset predicts.

    Attributes:
        dataset: name.
        num_classes: number of classes.
        num_outputs: 6 for axis-aligned boxes, 8 for boxes with yaw.
    """

    dataset: str
    num_classes: int
    num_outputs: int


class Predictions(NamedTuple):
    """What the head says at every location of both levels, 16 cm first, padding included.

    Attributes:
        locations: float32 [N, 3], metres: the corner of a location's voxel, without a half-voxel shift.
        scan: int32 [N], num_scans on padding.
        level: int32 [N], 0 for 16 cm, 1 for 32 cm.
        boxes: float32 [N, 8], columns 3:6 exp()-ed face distances in metres.
        logits: float32 [N, K].
    """

    locations: Float[Array, "n 3"]
    scan: Int[Array, " n"]
    level: Int[Array, " n"]
    boxes: Float[Array, "n 8"]
    logits: Float[Array, "n k"]

    def valid(self, num_scans: int) -> Bool[Array, " n"]:
        """Which rows are locations."""
        return self.scan < num_scans


class TR3D(nnx.Module):
    """Backbone, neck and one head a dataset.

    Attributes:
        embedding: [D, d], one a dataset, read by the layers with kernel selection; None without selection.
    """

    def __init__(self, config: DetectorConfig, heads: Sequence[HeadConfig], *, rngs: nnx.Rngs):
        """Parameters drawn from `rngs.params`.

        Args:
            config: architecture.
            heads: of the datasets, in the order of the dataset axis.
            rngs: random streams.
        """
        self.config = config
        self.heads_config = tuple(heads)
        count = len(heads)
        self.embedding = (
            nnx.Param(jax.random.normal(rngs.params(), (count, config.selection.embedding_dim)), dataset_axis=0)
            if config.selection is not None
            else None
        )
        self.backbone = MinkResNet(config, count, rngs=rngs)
        self.neck = Neck(config, count, rngs=rngs)
        self.heads = DatasetHeads(
            config.neck_channels,
            tuple(h.num_classes for h in heads),
            tuple(h.num_outputs for h in heads),
            rngs=rngs,
        )

    def __call__(
        self,
        features: Float[Array, "n c"],
        plan: DetectorPlan,
        context: ForwardContext,
        head: DatasetContext | None = None,
    ) -> Predictions:
        """Predict at every location of a batch of scans.

        Scans of a dataset that was not trained on take three choices: whose classes and box parameters (`head`); whose
        embedding, statistics and exclusive kernels (`context.dataset`: one, or the mean of all); and whether kernels
        are selected or the shared ones everywhere (`context.dataset.kernels`).

        Args:
            features: colour of the voxels, rows of `plan.voxels`.
            plan: sites and maps of the batch.
            context: of the pass; its embedding is set here, and its compute type is that of all features from here on.
            head: whose head predicts; None: that of the context's dataset.
        """
        dataset = context.dataset_of(len(self.heads_config))
        if self.embedding is not None:
            context = replace(context, embedding=dataset.pick(self.embedding[...]))
        # Once: every layer returns the type of the features that it is given.
        x = SparseTensor(jnp.asarray(features, context.dtype), plan.voxels)
        stages, context = self.backbone(x, plan, context)
        parts = []
        for level, x in enumerate(self.neck(stages, plan, context)):
            boxes, logits = self.heads(x.features, head or dataset)
            locations = jnp.asarray(x.sites.coords)[:, 1:].astype(jnp.float32) * self.config.voxel_size
            scan = jnp.asarray(x.sites.scan)
            parts.append(Predictions(locations, scan, jnp.full(len(scan), level, jnp.int32), boxes, logits))
        return Predictions(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def selective_layers(model: TR3D) -> dict[str, SelectiveConv]:
    """The layers with kernel selection, by name, in the order of the forward pass."""
    blocks = (block for stage in model.backbone.stages for block in stage)
    parts = [
        model.backbone.stem,
        *(part for block in blocks for part in (block.first, block.second)),
        *(part for step in model.neck.steps for part in (step.lateral, step.out)),
    ]
    return {part.conv.name: part.conv for part in parts if isinstance(part.conv, SelectiveConv)}


def single_context(num_datasets: int = 1, dataset: int = 0, *, training: bool = False) -> ForwardContext:
    """The plainest context: one dataset, one device."""
    return ForwardContext(DatasetContext.one(dataset, num_datasets), training=training)
