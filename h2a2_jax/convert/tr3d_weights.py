"""Names and shapes of TR3D's parameters in mmdetection3d, and their places in the detector here.

A checkpoint of mmdetection3d is one dataset's detector. Its shared parameters correspond to ours one to one. Its
running statistics and its head go to that dataset's place on the dataset axis. A detector with kernel selection takes
the residual kernels as its shared ones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from h2a2_jax.errors import InputError
from h2a2_jax.layers import ConvNorm, DatasetContext, ForwardContext, SelectiveConv
from h2a2_jax.models import TR3D, DetectorConfig
from h2a2_jax.models.architecture import STAGE_BLOCKS
from h2a2_jax.models.head import UnionHead

_STEM = "backbone.conv1.kernel"


@dataclass(frozen=True)
class Slot:
    """Place of a parameter of TR3D in the detector here: a part of a Flax variable, and its shape in TR3D."""

    variable: nnx.Variable
    index: tuple[Any, ...]
    shape: tuple[int, ...]


def tr3d_slots(model: TR3D, dataset: int = 0) -> dict[str, Slot]:
    """Every parameter and running statistic of TR3D by its name in mmdetection3d; the statistics of one dataset."""
    slots = _conv_norm_slots("backbone.conv1", "backbone.norm1", model.backbone.stem, dataset)
    for s, stage in enumerate(model.backbone.stages):
        for b, block in enumerate(stage):
            name = f"backbone.layer{s + 1}.{b}"
            slots |= _conv_norm_slots(f"{name}.conv1", f"{name}.norm1", block.first, dataset)
            slots |= _conv_norm_slots(f"{name}.conv2", f"{name}.norm2", block.second, dataset)
            if block.skip is not None:
                slots |= _conv_norm_slots(f"{name}.downsample.0", f"{name}.downsample.1", block.skip, dataset)
    for step in model.neck.steps:
        parts = ((f"up_block_{step.level + 1}", step.up), (f"lateral_block_{step.level}", step.lateral),
                 (f"out_block_{step.level}", step.out))  # fmt: skip
        for name, part in parts:
            slots |= _conv_norm_slots(f"neck.{name}.0", f"neck.{name}.1", part, dataset)
    head, config = model.heads, model.heads_config[dataset]
    if isinstance(head, UnionHead):
        raise InputError(
            'model.label_space is "union": TR3D of mmdetection3d has a head for its own classes alone, so that only '
            "detectors with separate heads are converted."
        )
    outputs = (
        ("reg", head.box_kernel, head.box_bias, config.num_outputs),
        ("cls", head.class_kernel, head.class_bias, config.num_classes),
    )
    for name, kernel, bias, width in outputs:
        columns = slice(0, width)  # the rest pads to the widest head
        slots[f"bbox_head.conv_{name}.kernel"] = Slot(kernel, (dataset, slice(None), columns), (kernel.shape[1], width))
        slots[f"bbox_head.conv_{name}.bias"] = Slot(bias, (dataset, columns), (1, width))
    return slots


def _conv_norm_slots(conv_name: str, norm_name: str, part: ConvNorm, dataset: int) -> dict[str, Slot]:
    norm = part.norm
    variables = {
        f"{conv_name}.kernel": part.conv.shared if isinstance(part.conv, SelectiveConv) else part.conv.kernel,
        f"{norm_name}.bn.weight": norm.scale,
        f"{norm_name}.bn.bias": norm.bias,
        f"{norm_name}.bn.running_mean": norm.mean,
        f"{norm_name}.bn.running_var": norm.var,
    }

    def slot(variable: nnx.Variable) -> Slot:
        if variable.get_metadata().get("dataset_axis") == 0:
            return Slot(variable, (dataset,), variable.shape[1:])
        return Slot(variable, (), variable.shape)

    return {name: slot(variable) for name, variable in variables.items()}


def load_tr3d(model: TR3D, state: Mapping[str, np.ndarray], dataset: int = 0) -> None:
    """Set a detector's parameters from TR3D's, by name; names without a counterpart are skipped.

    Raises:
        ValueError: a parameter has another shape than ours.
    """
    slots = tr3d_slots(model, dataset)
    used = [name for name in slots if name in state]
    for name in used:
        if tuple(state[name].shape) != slots[name].shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} in the checkpoint, {slots[name].shape} in this detector: "
                "build the detector with the checkpoint's depth and widths."
            )
    for name in used:
        variable, index = slots[name].variable, slots[name].index
        whole = np.array(variable[...])
        whole[index] = np.asarray(state[name]).reshape(whole[index].shape)
        variable[...] = jnp.asarray(whole)


def export_tr3d(model: TR3D, dataset: int = 0) -> dict[str, np.ndarray]:
    """A detector's parameters and running statistics under TR3D's names and in its shapes."""
    slots = tr3d_slots(model, dataset)
    return {name: np.asarray(slot.variable[...][slot.index]).reshape(slot.shape) for name, slot in slots.items()}


def as_tr3d(model: TR3D, dataset: int) -> TR3D:
    """A copy in which kernels, scales and biases are those of one dataset, with its adapters and prompts in them.

    Layers with kernel selection, which TR3D cannot express, stay as they are.
    """
    copy, own = nnx.clone(model), DatasetContext.one(dataset, len(model.heads_config))
    embedding = None if model.embedding is None else own.pick(jnp.asarray(model.embedding[...]))
    for _, part in list(nnx.iter_modules(copy)):
        if isinstance(part, ConvNorm) and not isinstance(part.conv, SelectiveConv):
            scale, bias = part.norm.affine(own, embedding)
            part.conv.kernel = nnx.Param(part.conv.kernel_of(ForwardContext(own)))
            part.norm.scale, part.norm.bias = nnx.Param(scale), nnx.Param(bias)
    return copy


def without_prefix(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Remove the prefix of a wrapped detector's names, as in "module.backbone.conv1.kernel"; other names stay."""
    prefix = next((name.removesuffix(_STEM) for name in state if name.endswith(_STEM)), "")
    return {name.removeprefix(prefix): value for name, value in state.items()}


def config_of_weights(state: Mapping[str, np.ndarray]) -> DetectorConfig:
    """Find the architecture of weights from their names and shapes; without a neck, it gets its default width.

    Raises:
        InputError: there is no such backbone, or one of other blocks or another depth.
    """

    def last(name: str, dimensions: int) -> int:
        if name not in state or state[name].ndim != dimensions:
            found = f"is {'x'.join(map(str, state[name].shape))}" if name in state else "is missing"
            raise InputError(f"These are no weights of TR3D or of its backbone: {name} {found}.")
        return state[name].shape[-1]

    stem = last(_STEM, 3)
    first, second, third, fourth = (last(f"backbone.layer{stage}.0.conv1.kernel", 3) for stage in (1, 2, 3, 4))
    numbers = [re.match(r"backbone\.layer([1-4])\.(\d{1,3})\.", name) for name in state]
    places = {(int(found[1]), int(found[2])) for found in numbers if found}
    blocks = tuple(sum(stage == place for place, _ in places) for stage in (1, 2, 3, 4))
    depths = {known: depth for depth, known in STAGE_BLOCKS.items()}
    if blocks not in depths or any(re.match(r"backbone\.layer\d+\.\d+\.conv3", name) for name in state):
        raise InputError(
            f"The backbone has stages of {', '.join(map(str, blocks))} blocks; those of depth "
            f"{', '.join(map(str, STAGE_BLOCKS))} with blocks of two convolutions can be converted."
        )
    neck = "neck.out_block_0.0.kernel"
    return DetectorConfig(
        depth=depths[blocks],
        in_channels=state[_STEM].shape[1],
        stem_channels=stem,
        stage_channels=(first, second, third, fourth),
        neck_channels=last(neck, 3) if neck in state else DetectorConfig.neck_channels,
    )
