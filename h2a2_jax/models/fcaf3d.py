"""FCAF3D, the detection network: backbone, a neck that is pruned by scores, heads on four levels."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from h2a2_jax.boxes.nms import detections_from_centerness
from h2a2_jax.errors import InputError
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.layers.kernel_selection import Part
from h2a2_jax.losses import DetectionLoss, centerness_loss
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.detector import (
    DetectorNetwork,
    HeadChoice,
    HeadConfig,
    Predictions,
    Targets,
)
from h2a2_jax.models.fcaf3d_maps import (
    NUM_PRUNED,
    FCAF3DPlan,
    FCAF3DSizes,
    FCAF3DTables,
    fcaf3d_sizes,
    fcaf3d_tables,
    fits_fcaf3d,
    pad_fcaf3d,
)
from h2a2_jax.models.fcaf3d_neck import PrunedNeck
from h2a2_jax.models.fcaf3d_weights import fcaf3d_of_weights, fcaf3d_slots, published_fcaf3d
from h2a2_jax.models.head import CenternessHeads
from h2a2_jax.models.maps import backbone_support
from h2a2_jax.sparse import Sites, SiteSet
from h2a2_jax.sparse.pool import sites_per_scan
from h2a2_jax.typing import AnyArray


class FCAF3D(DetectorNetwork):
    """Backbone with instance norm in its stem, pruned neck, and one head per dataset.

    References:
        Rukhovich et al., FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, ECCV 2022.
    """

    def build_neck(self, rngs: nnx.Rngs) -> PrunedNeck:
        """Build the neck.

        Raises:
            InputError: the config asks for what FCAF3D does not have (`FCAF3DKind.check`).
        """
        FCAF3DKind().check(self.config)
        return PrunedNeck(self.config, len(self.heads_config), rngs=rngs)

    def build_heads(self, rngs: nnx.Rngs) -> CenternessHeads:
        """Build a head of each dataset."""
        heads = self.heads_config
        return CenternessHeads(
            self.config.neck_channels, tuple(h.num_classes for h in heads), tuple(h.num_outputs for h in heads),
            rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        features: Float[Array, "n c"],
        plan: FCAF3DPlan,
        context: ForwardContext,
        head: HeadChoice = None,
    ) -> Predictions:
        """Predict at every location of a batch of scans.

        The scores that decide which sites of a level stay are those of the head that predicts, so that the heads of two
        datasets may have different locations in one scan.

        Args:
            features: colour of the voxels, rows of `plan.voxels`.
            plan: sites and maps of the batch.
            context: context of the pass; its embedding is set here, and its compute type becomes that of all features.
            head: dataset whose head predicts, None for that of the context.

        Returns:
            Outputs at the locations of levels 0 to 3. Where `overflow` is above zero the capacities of the plan were
            too small, and locations are missing.

        Raises:
            ValueError: `head` is not a dataset but columns, of which a detector with one label space has some.
        """
        if head is not None and not isinstance(head, DatasetContext):
            raise ValueError("head are columns; FCAF3D has a head for each dataset: give a DatasetContext.")
        stages, dataset, context = self.stages(features, plan, context)
        x, kernel_map, overflow = stages[NUM_PRUNED], plan.stages[NUM_PRUNED].residual, jnp.zeros((), jnp.int32)
        levels: list[tuple[Array, ...]] = []
        for level in reversed(range(NUM_PRUNED + 1)):
            out = self.neck.read(x, kernel_map, level, context)
            outputs = self.heads(out.features, head or dataset, level)
            levels.append((*self.locations(out.sites, level), outputs.boxes, outputs.logits, outputs.centerness))
            if level > 0:
                scores = out.with_features(lax.stop_gradient(outputs.best)[:, None])
                x, kernel_map, lost = self.neck.grow(x, stages[level - 1], scores, level - 1, plan, context)
                overflow += lost
        parts = [jnp.concatenate(arrays) for arrays in zip(*reversed(levels), strict=True)]
        return Predictions._make([*parts, overflow])


class FCAF3DKind:
    """FCAF3D as training, prediction and conversion see it (`DetectorKind`)."""

    title = "FCAF3D"
    levels = FCAF3DSizes
    least = FCAF3DSizes(2048, 2048, 2048, 1024, 512, 256, 128, 1024, 4096, 8192)
    fits = staticmethod(fits_fcaf3d)
    pad = staticmethod(pad_fcaf3d)
    support = staticmethod(backbone_support)
    slots = staticmethod(fcaf3d_slots)
    published = staticmethod(published_fcaf3d)
    config_of = staticmethod(fcaf3d_of_weights)

    def check(self, config: DetectorConfig) -> None:
        """Refuse what FCAF3D does not have.

        Raises:
            InputError: one label space, kernel selection in its stem or neck, or a stem exclusive to each dataset.
        """
        if config.kind != "fcaf3d":
            raise InputError(f'model.kind is "{config.kind}"; FCAF3D takes a config of kind "fcaf3d".')
        if config.label_space != "separate":
            raise InputError(
                f'model.label_space is "{config.label_space}"; FCAF3D has a head for each dataset: choose "separate".'
            )
        parts: tuple[Part, ...] = ("stem", "neck")
        for part in parts:
            if config.selection_in(part) is not None:
                raise InputError(
                    f'model.selection.convolutions has "{part}"; FCAF3D selects kernels in its residual stages alone: '
                    'choose ("residual",).'
                )
        if 0 in config.exclusive_stages:
            raise InputError("model.exclusive_stages has 0, the stem, which FCAF3D shares; choose stages from 1 to 4.")

    def build(self, config: DetectorConfig, heads: Sequence[HeadConfig], *, rngs: nnx.Rngs) -> FCAF3D:
        """Build the network.

        Raises:
            InputError: the config asks for what FCAF3D does not have (`check`).
        """
        return FCAF3D(config, heads, rngs=rngs)

    def sizes(self, voxels: SiteSet, config: DetectorConfig) -> FCAF3DSizes:
        """Number of sites of every level; of unions 1 and 0 an upper bound for any scores."""
        return fcaf3d_sizes(voxels, config.prune_threshold)

    def tables(self, voxels: SiteSet, config: DetectorConfig) -> FCAF3DTables:
        """Every table that no scores decide about."""
        return fcaf3d_tables(voxels, config.prune_threshold)

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
        """Focal, centerness and IoU loss by scan, mean over the scans that have sites (`centerness_loss`)."""
        assert out.centerness is not None
        is_scan = sites_per_scan(voxels) > 0
        return centerness_loss(
            out.locations, out.scan, out.level, out.boxes, out.logits, out.centerness, boxes, labels,
            targets.class_mask, targets.has_yaw, is_scan,
            axis_name=axis_name, assign_threshold=config.assign_threshold, center_threshold=config.center_threshold,
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
        """Boxes of each scan (`detections_from_centerness`), one scan after the other for the memory that it takes."""
        assert out.centerness is not None
        detect = partial(
            detections_from_centerness,
            out.locations,
            level=out.level,
            outputs=out.boxes,
            logits=out.logits,
            center_logits=out.centerness,
            rotated=rotated,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
        )
        return lax.map(lambda scan: detect(valid=out.scan == scan), jnp.arange(num_scans))
