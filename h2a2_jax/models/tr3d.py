"""TR3D, the detection network, with structure-aware kernel selection by config."""

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
from h2a2_jax.models.head import DatasetHeads, UnionHead
from h2a2_jax.models.maps import DetectorPlan
from h2a2_jax.models.neck import Neck
from h2a2_jax.sparse import SparseTensor
from h2a2_jax.typing import AnyArray


@dataclass(frozen=True)
class HeadConfig:
    """Outputs of the head of a dataset.

    Attributes:
        dataset: name of the dataset.
        num_classes: number of classes.
        num_outputs: 6 for axis-aligned boxes, 8 for boxes with yaw.
        columns: columns of the dataset's classes in the union of all; None where it has a head of its own.
    """

    dataset: str
    num_classes: int
    num_outputs: int
    columns: tuple[int, ...] | None = None


class Predictions(NamedTuple):
    """Outputs of a head at every location of all levels, finest first, padding included.

    Attributes:
        locations: float32 [N, 3], metres: the corner of a location's voxel, without a half-voxel shift.
        scan: int32 [N], scan of each location; num_scans on padding.
        level: int32 [N], 0 for the finest: of TR3D 0 for 16 cm and 1 for 32 cm, of FCAF3D 0 to 3 for 8 to 64 cm.
        boxes: float32 [N, 8], box outputs in metres: of TR3D columns 3:6 are exp()-ed sizes, of FCAF3D columns 0:6
            are exp()-ed distances to the faces.
        logits: float32 [N, K], class scores before the sigmoid.
        centerness: float32 [N], FCAF3D: centerness before the sigmoid; None for TR3D.
        overflow: int32 [], FCAF3D: sites that the capacities of the plan had no place for; None for TR3D.
    """

    locations: Float[Array, "n 3"]
    scan: Int[Array, " n"]
    level: Int[Array, " n"]
    boxes: Float[Array, "n 8"]
    logits: Float[Array, "n k"]
    centerness: Float[Array, " n"] | None = None
    overflow: Int[Array, ""] | None = None

    def valid(self, num_scans: int) -> Bool[Array, " n"]:
        """True for the rows that are locations."""
        return self.scan < num_scans


HeadChoice = DatasetContext | Int[AnyArray, " k"] | None
"""Outputs wanted of a detector: the dataset whose head predicts, or columns of the union of classes, int32 [K]."""


class TR3D(nnx.Module):
    """Backbone, neck, and one head per dataset or one for the union of all classes.

    Attributes:
        embedding: [D, d], embedding of each dataset, read by the layers with kernel selection and by prompt-driven
            norms; None without both.
    """

    def __init__(self, config: DetectorConfig, heads: Sequence[HeadConfig], *, rngs: nnx.Rngs):
        """Build the layers of the config; parameters are random from `rngs.params`.

        Args:
            config: architecture.
            heads: outputs of each dataset's head, in the order of the dataset axis.
            rngs: random streams.
        """
        self.config = config
        self.heads_config = tuple(heads)
        count = len(heads)
        embedding = (
            None if config.selection is None else dataset_embeddings(count, config.selection.embedding_dim, rngs)
        )
        self.backbone = MinkResNet(config, count, rngs=rngs)
        self.neck = Neck(config, count, rngs=rngs)
        columns = [h.columns for h in heads if h.columns is not None]
        self.heads: DatasetHeads | UnionHead
        if config.label_space == "union":
            if len(columns) < count:
                raise ValueError('label_space is "union": give every head its columns (`head_configs`).')
            self.heads = UnionHead(config.neck_channels, 1 + max(map(max, columns)), rngs=rngs)
        else:
            self.heads = DatasetHeads(
                config.neck_channels,
                tuple(h.num_classes for h in heads),
                tuple(h.num_outputs for h in heads),
                rngs=rngs,
            )
        if embedding is None and config.norm_affine == "prompt":
            # Drawn last: with prompts alone, all layers start as in the network of the same seed without.
            embedding = dataset_embeddings(count, config.prompt_dim, rngs)
        self.embedding = embedding

    def __call__(
        self,
        features: Float[Array, "n c"],
        plan: DetectorPlan,
        context: ForwardContext,
        head: HeadChoice = None,
    ) -> Predictions:
        """Predict at every location of a batch of scans.

        Scans of a dataset that was not trained on need three choices: the dataset of classes and box parameters
        (`head`); the dataset of embedding, statistics and exclusive kernels, or the mean of all (`context.dataset`);
        and kernels selected by structure, or shared ones everywhere (`context.dataset.kernels`).

        Args:
            features: colour of the voxels, rows of `plan.voxels`.
            plan: sites and maps of the batch.
            context: context of the pass; its embedding is set here, and its compute type becomes that of all features.
            head: dataset whose head predicts, None for that of the context; of a detector with one label space the
                columns of the classes, None for all of them.
        """
        dataset = context.dataset_of(len(self.heads_config))
        if self.embedding is not None:
            context = replace(context, embedding=dataset.pick(self.embedding[...]))
        # Cast once: every layer returns the type of the features that it is given.
        x = SparseTensor(jnp.asarray(features, context.dtype), plan.voxels)
        stages, context = self.backbone(x, plan, context)
        parts = []
        for level, x in enumerate(self.neck(stages, plan, context)):
            boxes, logits = self._outputs(x.features, dataset, head)
            locations = jnp.asarray(x.sites.coords)[:, 1:].astype(jnp.float32) * self.config.voxel_size
            scan = jnp.asarray(x.sites.scan)
            parts.append(Predictions(locations, scan, jnp.full(len(scan), level, jnp.int32), boxes, logits))
        return Predictions(*(jnp.concatenate(arrays) for arrays in zip(*(part[:5] for part in parts), strict=True)))

    def _outputs(self, features: Array, dataset: DatasetContext, head: HeadChoice) -> tuple[Array, Array]:
        if isinstance(self.heads, UnionHead):
            if isinstance(head, DatasetContext):
                raise ValueError("head is a dataset; the detector has one label space: give columns of its classes.")
            return self.heads(features, head)
        if head is not None and not isinstance(head, DatasetContext):
            raise ValueError("head are columns; the detector has a head for each dataset: give a DatasetContext.")
        return self.heads(features, head or dataset)


def dataset_embeddings(num_datasets: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Draw normal embeddings [D, d] of the datasets, exclusive to each."""
    return nnx.Param(jax.random.normal(rngs.params(), (num_datasets, width)), dataset_axis=0)


def selective_layers(model: TR3D) -> dict[str, SelectiveConv]:
    """Layers with kernel selection, by name, in the order of the forward pass."""
    blocks = (block for stage in model.backbone.stages for block in stage)
    parts = [
        model.backbone.stem,
        *(part for block in blocks for part in (block.first, block.second)),
        *(part for step in model.neck.steps for part in (step.lateral, step.out)),
    ]
    return {part.conv.name: part.conv for part in parts if isinstance(part.conv, SelectiveConv)}
