"""Names and shapes of FCAF3D's parameters in mmdetection3d, and their places in the detector here.

The neck is a part of the head there: `bbox_head.up_block_<i>` makes level i - 1 of level i, and what the heads read on
level l, 0 the finest, comes from `bbox_head.out_block_<l>`. Older files call the head `head`.
"""

from collections.abc import Mapping

import numpy as np

from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.detector import DetectorNetwork
from h2a2_jax.models.weight_slots import (
    STEM,
    WeightSlot,
    backbone_of_weights,
    conv_norm_slots,
    last_axis,
    output_slots,
    stage_slots,
)

_MARK = "conv_center.kernel"
_NECK = "bbox_head.out_block_0.0.kernel"
_HEAD, _OLD_HEAD = "bbox_head.", "head."


def published_fcaf3d(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Weights of FCAF3D by their present names, `bbox_head` for a head called `head`; None for another head.

    Only the beginning of a name counts: `bbox_head.` has the old name within it.
    """
    if not any(f"{head}{_MARK}" in state for head in (_HEAD, _OLD_HEAD)):
        return None
    return {f"bbox_{name}" if name.startswith(_OLD_HEAD) else name: value for name, value in state.items()}


def fcaf3d_slots(model: DetectorNetwork, dataset: int = 0) -> dict[str, WeightSlot]:
    """Every parameter and running statistic of FCAF3D by its name in mmdetection3d; the statistics of one dataset."""
    stem = model.backbone.stem
    slots = {
        STEM: WeightSlot(stem.conv.kernel, (), stem.conv.kernel.shape),
        "backbone.norm1.weight": WeightSlot(stem.norm.scale, (), (1, *stem.norm.scale.shape)),
        "backbone.norm1.bias": WeightSlot(stem.norm.bias, (), (1, *stem.norm.bias.shape)),
    }
    slots |= stage_slots(model.backbone, dataset)
    for i, up in enumerate(model.neck.ups, 1):
        name = f"{_HEAD}up_block_{i}"
        slots |= conv_norm_slots(f"{name}.0", f"{name}.1", up.generate, dataset)
        slots |= conv_norm_slots(f"{name}.3", f"{name}.4", up.conv, dataset)
    for level, out in enumerate(model.neck.outs):
        name = f"{_HEAD}out_block_{level}"
        slots |= conv_norm_slots(f"{name}.0", f"{name}.1", out, dataset)
    heads, config = model.heads, model.heads_config[dataset]
    slots |= output_slots(f"{_HEAD}conv_center", heads.center_kernel, None, 1, dataset)
    slots |= output_slots(f"{_HEAD}conv_reg", heads.box_kernel, None, config.num_outputs, dataset)
    slots |= output_slots(f"{_HEAD}conv_cls", heads.class_kernel, heads.class_bias, config.num_classes, dataset)
    for level in range(heads.scales.shape[1]):
        slots[f"{_HEAD}scales.{level}.scale"] = WeightSlot(heads.scales, (dataset, level), ())
    return slots


def fcaf3d_of_weights(state: Mapping[str, np.ndarray]) -> DetectorConfig:
    """Find the architecture of weights of FCAF3D from their names and shapes.

    Weights of a backbone alone give the default width of the neck. The thresholds, which weights do not hold, are the
    published ones.

    Raises:
        InputError: there is no such backbone, or one of other blocks or another depth.
    """
    neck = last_axis(state, _NECK) if _NECK in state else DetectorConfig.neck_channels
    return DetectorConfig(kind="fcaf3d", neck_channels=neck, **backbone_of_weights(state))
