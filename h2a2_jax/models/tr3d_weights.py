"""Names and shapes of TR3D's parameters in mmdetection3d, and their places in the detector here."""

from collections.abc import Mapping

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.detector import DetectorNetwork
from h2a2_jax.models.head import UnionHead
from h2a2_jax.models.weight_slots import (
    WeightSlot,
    backbone_of_weights,
    conv_norm_slots,
    last_axis,
    output_slots,
    stage_slots,
)

_NECK = "neck.out_block_0.0.kernel"


def tr3d_slots(model: DetectorNetwork, dataset: int = 0) -> dict[str, WeightSlot]:
    """Every parameter and running statistic of TR3D by its name in mmdetection3d; the statistics of one dataset.

    Raises:
        InputError: the detector has one label space.
    """
    slots = conv_norm_slots("backbone.conv1", "backbone.norm1", model.backbone.stem, dataset)
    slots |= stage_slots(model.backbone, dataset)
    for step in model.neck.steps:
        parts = ((f"up_block_{step.level + 1}", step.up), (f"lateral_block_{step.level}", step.lateral),
                 (f"out_block_{step.level}", step.out))  # fmt: skip
        for name, part in parts:
            slots |= conv_norm_slots(f"neck.{name}.0", f"neck.{name}.1", part, dataset)
    head, config = model.heads, model.heads_config[dataset]
    if isinstance(head, UnionHead):
        raise InputError(
            'model.label_space is "union": TR3D of mmdetection3d has a head for its own classes alone, so that only '
            "detectors with separate heads are converted."
        )
    slots |= output_slots("bbox_head.conv_reg", head.box_kernel, head.box_bias, config.num_outputs, dataset)
    slots |= output_slots("bbox_head.conv_cls", head.class_kernel, head.class_bias, config.num_classes, dataset)
    return slots


def published_tr3d(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Weights of TR3D as they are, for their names have not changed; None without a neck, by which they are known."""
    return dict(state) if _NECK in state else None


def tr3d_of_weights(state: Mapping[str, np.ndarray]) -> DetectorConfig:
    """Find the architecture of weights of TR3D from their names and shapes.

    Weights of a backbone alone give the default width of the neck.

    Raises:
        InputError: there is no such backbone, or one of other blocks or another depth.
    """
    neck = last_axis(state, _NECK) if _NECK in state else DetectorConfig.neck_channels
    return DetectorConfig(kind="tr3d", neck_channels=neck, **backbone_of_weights(state))
