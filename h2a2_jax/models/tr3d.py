"""TR3D, the detection network, with structure-aware kernel selection by config."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from h2a2_jax.boxes.nms import detections_from_predictions
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.losses import DetectionLoss, detection_loss
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.detector import (
    DetectorNetwork,
    HeadChoice,
    HeadConfig,
    Predictions,
    Targets,
)
from h2a2_jax.models.head import DatasetHeads, UnionHead
from h2a2_jax.models.maps import (
    DetectorPlan,
    DetectorTables,
    LevelSizes,
    backbone_support,
    detector_tables,
    fits_layout,
    pad_plan,
    pyramid_sizes,
)
from h2a2_jax.models.neck import Neck
from h2a2_jax.models.tr3d_weights import published_tr3d, tr3d_of_weights, tr3d_slots
from h2a2_jax.sparse import Sites, SiteSet
from h2a2_jax.typing import AnyArray


class TR3D(DetectorNetwork):
    """Backbone, neck, and one head per dataset or one for the union of all classes.

    References:
        TR3D: Towards Real-Time Indoor 3D Object Detection, https://arxiv.org/abs/2302.02858.
    """

    def build_neck(self, rngs: nnx.Rngs) -> Neck:
        """Build the neck."""
        return Neck(self.config, len(self.heads_config), rngs=rngs)

    def build_heads(self, rngs: nnx.Rngs) -> DatasetHeads | UnionHead:
        """Build a head of each dataset, or one for the union of their classes.

        Raises:
            ValueError: a head of the union has no columns.
        """
        channels, heads = self.config.neck_channels, self.heads_config
        if self.config.label_space == "separate":
            return DatasetHeads(
                channels, tuple(h.num_classes for h in heads), tuple(h.num_outputs for h in heads), rngs=rngs
            )
        columns = [h.columns for h in heads if h.columns is not None]
        if len(columns) < len(heads):
            raise ValueError('label_space is "union": give every head its columns (`head_configs`).')
        return UnionHead(channels, 1 + max(map(max, columns)), rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "n c"],
        plan: DetectorPlan,
        context: ForwardContext,
        head: HeadChoice = None,
    ) -> Predictions:
        """Predict at every location of a batch of scans, as of `DetectorNetwork`.

        Raises:
            ValueError: `head` is a dataset where the detector has one label space, or columns where it has none.
        """
        stages, dataset, context = self.stages(features, plan, context)
        parts = []
        for level, x in enumerate(self.neck(stages, plan, context)):
            parts.append((*self.locations(x.sites, level), *self._outputs(x.features, dataset, head)))
        return Predictions(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _outputs(self, features: Array, dataset: DatasetContext, head: HeadChoice) -> tuple[Array, Array]:
        if isinstance(self.heads, UnionHead):
            if isinstance(head, DatasetContext):
                raise ValueError("head is a dataset; the detector has one label space: give columns of its classes.")
            return self.heads(features, head)
        if head is not None and not isinstance(head, DatasetContext):
            raise ValueError("head are columns; the detector has a head for each dataset: give a DatasetContext.")
        return self.heads(features, head or dataset)


class TR3DKind:
    """TR3D as training, prediction and conversion see it (`DetectorKind`)."""

    title = "TR3D"
    levels = LevelSizes
    least = LevelSizes(2048, 2048, 2048, 1024, 512, 256, 128, 512, 4096)
    fits = staticmethod(fits_layout)
    pad = staticmethod(pad_plan)
    slots = staticmethod(tr3d_slots)
    published = staticmethod(published_tr3d)
    config_of = staticmethod(tr3d_of_weights)

    def check(self, config: DetectorConfig) -> None:
        """TR3D has every option."""

    def build(self, config: DetectorConfig, heads: Sequence[HeadConfig], *, rngs: nnx.Rngs) -> TR3D:
        """Build the network."""
        return TR3D(config, heads, rngs=rngs)

    def sizes(self, voxels: SiteSet, config: DetectorConfig) -> LevelSizes:
        """Number of sites of every level."""
        return pyramid_sizes(voxels)

    def tables(self, voxels: SiteSet, config: DetectorConfig) -> DetectorTables:
        """Every table of the network."""
        return detector_tables(voxels)

    def loss(
        self,
        out: Predictions,
        boxes: Float[AnyArray, "b g 7"],
        labels: Int[AnyArray, "b g"],
        targets: Targets,
        voxels: Sites,
        config: DetectorConfig,
        axis_name: Any = None,
    ) -> DetectionLoss:
        """Focal loss of all locations, DIoU loss of the assigned ones (`detection_loss`)."""
        return detection_loss(
            out.locations, out.scan, out.level, out.boxes, out.logits, boxes, labels,
            targets.label_to_level, targets.class_mask, targets.has_yaw,
            axis_name=axis_name,
        )  # fmt: skip

    def detect(
        self,
        out: Predictions,
        num_scans: int,
        *,
        rotated: bool,
        score_threshold: Float[AnyArray, ""],
        iou_threshold: Float[AnyArray, ""],
    ) -> tuple[Float[Array, "b k 7"], Float[Array, "b k"], Int32[Array, "b k"], Int32[Array, " b"]]:
        """Boxes of each scan (`detections_from_predictions`)."""
        detect = partial(
            detections_from_predictions,
            out.locations,
            outputs=out.boxes,
            logits=out.logits,
            rotated=rotated,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
        )
        return jax.vmap(lambda scan: detect(valid=out.scan == scan))(jnp.arange(num_scans))

    def support(self, tables: DetectorTables, layer: str) -> Float[np.ndarray, " v"]:
        """Share of a layer's output sites that have a neighbour at each offset."""
        if not layer.startswith("neck"):
            return backbone_support(tables, layer)
        # Steps of the neck are counted from the finest, their tables are stored coarsest first.
        lateral = tables.ups[-1 - int(layer.partition(".")[0].removeprefix("neck"))].lateral
        return np.asarray(lateral.pairs_per_offset / len(lateral.outputs))
