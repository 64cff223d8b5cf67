"""Places of published parameters in a detector here, and what the formats of TR3D and FCAF3D have in common.

A checkpoint of mmdetection3d is one dataset's detector. Its shared parameters correspond to ours one to one. Its
running statistics and its head go to that dataset's place on the dataset axis. A detector with kernel selection takes
the residual kernels as its shared ones.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from h2a2_jax.errors import InputError
from h2a2_jax.layers import ConvNorm, DatasetContext, ForwardContext, SelectiveConv
from h2a2_jax.models.architecture import STAGE_BLOCKS
from h2a2_jax.models.backbone import MinkResNet
from h2a2_jax.models.detector import DetectorNetwork, WeightSlot

STEM = "backbone.conv1.kernel"
"""First parameter of every backbone."""


def conv_norm_slots(conv_name: str, norm_name: str, part: ConvNorm, dataset: int) -> dict[str, WeightSlot]:
    """Kernel of a convolution, and scale, bias and running statistics of its batch norm; those of one dataset."""
    norm = part.norm
    variables = {
        f"{conv_name}.kernel": part.conv.shared if isinstance(part.conv, SelectiveConv) else part.conv.kernel,
        f"{norm_name}.bn.weight": norm.scale,
        f"{norm_name}.bn.bias": norm.bias,
        f"{norm_name}.bn.running_mean": norm.mean,
        f"{norm_name}.bn.running_var": norm.var,
    }

    def slot(variable: nnx.Variable) -> WeightSlot:
        if variable.get_metadata().get("dataset_axis") == 0:
            return WeightSlot(variable, (dataset,), variable.shape[1:])
        return WeightSlot(variable, (), variable.shape)

    return {name: slot(variable) for name, variable in variables.items()}


def stage_slots(backbone: MinkResNet, dataset: int) -> dict[str, WeightSlot]:
    """Parameters and running statistics of a backbone's stages, without the stem; the statistics of one dataset."""
    slots: dict[str, WeightSlot] = {}
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage):
            name = f"backbone.layer{s + 1}.{b}"
            slots |= conv_norm_slots(f"{name}.conv1", f"{name}.norm1", block.first, dataset)
            slots |= conv_norm_slots(f"{name}.conv2", f"{name}.norm2", block.second, dataset)
            if block.skip is not None:
                slots |= conv_norm_slots(f"{name}.downsample.0", f"{name}.downsample.1", block.skip, dataset)
    return slots


def output_slots(
    name: str, kernel: nnx.Variable, bias: nnx.Variable | None, width: int, dataset: int
) -> dict[str, WeightSlot]:
    """Kernel and bias of outputs of a dataset's head, `width` of them: the rest pads to the widest head."""
    slots = {f"{name}.kernel": WeightSlot(kernel, (dataset, slice(None), slice(0, width)), (kernel.shape[1], width))}
    if bias is not None:
        slots[f"{name}.bias"] = WeightSlot(bias, (dataset, slice(0, width)), (1, width))
    return slots


def load_slots(slots: Mapping[str, WeightSlot], state: Mapping[str, np.ndarray]) -> None:
    """Set a detector's parameters from published ones, by name; names without a counterpart are skipped.

    Raises:
        ValueError: a parameter has another shape than ours.
    """
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


def export_slots(slots: Mapping[str, WeightSlot]) -> dict[str, np.ndarray]:
    """A detector's parameters and running statistics under their published names and in the published shapes."""
    return {name: np.asarray(slot.variable[...][slot.index]).reshape(slot.shape) for name, slot in slots.items()}


def of_one_dataset(model: DetectorNetwork, dataset: int) -> DetectorNetwork:
    """Copy a detector with the kernels, scales and biases of one dataset, its adapters and prompts in them.

    Layers with kernel selection, which no published detector has, stay as they are.
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
    prefix = next((name.removesuffix(STEM) for name in state if name.endswith(STEM)), "")
    return {name.removeprefix(prefix): value for name, value in state.items()}


def backbone_of_weights(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Find depth and widths of a backbone, values of `DetectorConfig`, from the names and shapes of its weights.

    Raises:
        InputError: there is no such backbone, or one of other blocks or another depth.
    """
    stem = last_axis(state, STEM)
    widths = tuple(last_axis(state, f"backbone.layer{stage}.0.conv1.kernel") for stage in (1, 2, 3, 4))
    numbers = [re.match(r"backbone\.layer([1-4])\.(\d{1,3})\.", name) for name in state]
    places = {(int(found[1]), int(found[2])) for found in numbers if found}
    blocks = tuple(sum(stage == place for place, _ in places) for stage in (1, 2, 3, 4))
    depths = {known: depth for depth, known in STAGE_BLOCKS.items()}
    if blocks not in depths or any(re.match(r"backbone\.layer\d+\.\d+\.conv3", name) for name in state):
        raise InputError(
            f"The backbone has stages of {', '.join(map(str, blocks))} blocks; those of depth "
            f"{', '.join(map(str, STAGE_BLOCKS))} with blocks of two convolutions can be converted."
        )
    return {
        "depth": depths[blocks],
        "in_channels": state[STEM].shape[1],
        "stem_channels": stem,
        "stage_channels": widths,
    }


def last_axis(state: Mapping[str, np.ndarray], name: str) -> int:
    """Length of the last axis of a kernel [V, Cin, Cout].

    Raises:
        InputError: the kernel is missing or no array of three axes.
    """
    if name not in state or state[name].ndim != 3:
        found = f"is {'x'.join(map(str, state[name].shape))}" if name in state else "is missing"
        raise InputError(f"These are no weights of TR3D, of FCAF3D or of their backbone: {name} {found}.")
    return state[name].shape[-1]
