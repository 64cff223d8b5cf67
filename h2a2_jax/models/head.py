"""Detection heads, 1x1 convolutions: one per dataset, of TR3D or FCAF3D, or one for the union of all classes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.layers import DatasetContext
from h2a2_jax.sparse.xla_cpu import recompute_if_narrow
from h2a2_jax.typing import AnyArray

NUM_OUTPUTS = 8
"""Box outputs with yaw; axis-aligned datasets use the first 6."""
NUM_LEVELS = 4
"""Levels of FCAF3D's head: the stages of the backbone."""
_PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)


class DatasetHeads(nnx.Module):
    """One head per dataset, stacked and padded to the same number of outputs.

    Padded outputs start at zero and no loss reads them, so that they stay zero; checkpoints leave them out.

    Attributes:
        box_kernel: [D, C, 8], kernel of the box outputs; like all of the following exclusive to each dataset.
        box_bias: [D, 8], bias of the box outputs.
        class_kernel: [D, C, K], kernel of the class logits, K the largest number of classes.
        class_bias: [D, K], bias of the class logits.
    """

    def __init__(self, channels: int, num_classes: tuple[int, ...], num_outputs: tuple[int, ...], *, rngs: nnx.Rngs):
        """Kernels N(0, 0.01), class bias at a prior of 1 % (focal loss).

        Args:
            channels: channels C of the features.
            num_classes: number of classes of each dataset.
            num_outputs: number of box outputs of each dataset, 6 or 8.
            rngs: random streams.
        """
        count, most = len(num_classes), max(num_classes)
        boxes = jnp.arange(NUM_OUTPUTS)[None] < jnp.array(num_outputs)[:, None]
        classes = jnp.arange(most)[None] < jnp.array(num_classes)[:, None]
        normal = jax.random.normal
        box_kernel = 0.01 * normal(rngs.params(), (count, channels, NUM_OUTPUTS)) * boxes[:, None]
        class_kernel = 0.01 * normal(rngs.params(), (count, channels, most)) * classes[:, None]
        self.box_kernel = nnx.Param(box_kernel, dataset_axis=0)
        self.box_bias = nnx.Param(jnp.zeros((count, NUM_OUTPUTS)), dataset_axis=0)
        self.class_kernel = nnx.Param(class_kernel, dataset_axis=0)
        self.class_bias = nnx.Param(_PRIOR_BIAS * classes.astype(jnp.float32), dataset_axis=0)

    def __call__(
        self, features: Float[Array, "n c"], dataset: DatasetContext
    ) -> tuple[Float[Array, "n 8"], Float[Array, "n k"]]:
        """Box predictions, columns 3:6 exp()-ed to extents in metres, and class logits; in float32 at least."""
        parts = (self.box_kernel, self.box_bias, self.class_kernel, self.class_bias)
        return _predict(features, *(dataset.pick(part[...]) for part in parts))


class UnionHead(nnx.Module):
    """One head for all datasets: a class column for each class of their union, one box regression.

    All parameters are shared. A dataset's loss reads its own columns alone, so that a class learns from every dataset
    that annotates it, and from no other. Axis-aligned datasets train the first 6 box outputs, whose meaning is the same
    for all datasets (`outputs_of_union`).

    Attributes:
        box_kernel: [C, 8], kernel of the box outputs.
        box_bias: [8], bias of the box outputs.
        class_kernel: [C, U], kernel of the class logits.
        class_bias: [U], bias of the class logits.

    References:
        Kolodiazhnyi et al., UniDet3D: Multi-dataset Indoor 3D Object Detection, AAAI 2025.
    """

    def __init__(self, channels: int, num_classes: int, *, rngs: nnx.Rngs):
        """Kernels N(0, 0.01), class bias at a prior of 1 % (focal loss).

        Args:
            channels: channels C of the features.
            num_classes: number of classes U of the union.
            rngs: random streams.
        """
        normal = jax.random.normal
        self.box_kernel = nnx.Param(0.01 * normal(rngs.params(), (channels, NUM_OUTPUTS)))
        self.box_bias = nnx.Param(jnp.zeros(NUM_OUTPUTS))
        self.class_kernel = nnx.Param(0.01 * normal(rngs.params(), (channels, num_classes)))
        self.class_bias = nnx.Param(jnp.full(num_classes, _PRIOR_BIAS))

    def __call__(
        self, features: Float[Array, "n c"], columns: Int[AnyArray, " k"] | None = None
    ) -> tuple[Float[Array, "n 8"], Float[Array, "n k"]]:
        """Box predictions as of `DatasetHeads`, and the logits of columns of the union; None: all."""
        kernel, bias = self.class_columns(columns)
        return _predict(features, self.box_kernel[...], self.box_bias[...], kernel, bias)

    def class_columns(self, columns: Int[AnyArray, " k"] | None) -> tuple[Float[Array, "c k"], Float[Array, " k"]]:
        """Kernel and bias of columns of the union; None: all."""
        kernel, bias = self.class_kernel[...], self.class_bias[...]
        return (kernel, bias) if columns is None else (kernel[:, columns], bias[columns])


class HeadOutputs(NamedTuple):
    """Outputs of `CenternessHeads` at N sites, float32 at least.

    Attributes:
        boxes: [N, 8], columns 0:6 exp()-ed distances to the faces in metres, columns 6:8 as they are.
        logits: [N, K], class scores before the sigmoid.
        centerness: [N], centerness before the sigmoid.
        best: [N], largest of the logits of the dataset's classes.
    """

    boxes: Array
    logits: Array
    centerness: Array
    best: Array


class CenternessHeads(nnx.Module):
    """Heads of FCAF3D, one per dataset, each shared by all levels but for the scale of distances.

    Stacked and padded to the same number of outputs as `DatasetHeads`. The largest logit leaves out padded classes,
    known by a kernel and a bias of zero.

    Attributes:
        center_kernel: [D, C, 1], kernel of the centerness; like all of the following exclusive to each dataset.
        box_kernel: [D, C, 8], kernel of the box outputs.
        class_kernel: [D, C, K], kernel of the class logits, K the largest number of classes.
        class_bias: [D, K], bias of the class logits.
        scales: [D, 4], factor of the box outputs 0:6 before exp(), by level, finest first.

    References:
        Rukhovich et al., FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, ECCV 2022.
    """

    def __init__(self, channels: int, num_classes: tuple[int, ...], num_outputs: tuple[int, ...], *, rngs: nnx.Rngs):
        """Kernels N(0, 0.01), class bias at a prior of 1 % (focal loss), scales 1.

        Args:
            channels: channels C of the features.
            num_classes: number of classes of each dataset.
            num_outputs: number of box outputs of each dataset, 6 or 8.
            rngs: random streams.
        """
        count, most = len(num_classes), max(num_classes)
        boxes = jnp.arange(NUM_OUTPUTS)[None] < jnp.array(num_outputs)[:, None]
        classes = jnp.arange(most)[None] < jnp.array(num_classes)[:, None]

        def kernel(outputs: int) -> Array:
            return 0.01 * jax.random.normal(rngs.params(), (count, channels, outputs))

        self.center_kernel = nnx.Param(kernel(1), dataset_axis=0)
        self.box_kernel = nnx.Param(kernel(NUM_OUTPUTS) * boxes[:, None], dataset_axis=0)
        self.class_kernel = nnx.Param(kernel(most) * classes[:, None], dataset_axis=0)
        self.class_bias = nnx.Param(_PRIOR_BIAS * classes.astype(jnp.float32), dataset_axis=0)
        self.scales = nnx.Param(jnp.ones((count, NUM_LEVELS)), dataset_axis=0)

    def __call__(self, features: Float[Array, "n c"], dataset: DatasetContext, level: int) -> HeadOutputs:
        """Predict at the sites of a level, 0 for the finest, by the head of a dataset."""
        stored = (self.center_kernel, self.box_kernel, self.class_kernel, self.class_bias, self.scales)
        center_kernel, box_kernel, class_kernel, class_bias, scales = (dataset.pick(part[...]) for part in stored)
        kernel, bias = jnp.concatenate([box_kernel, center_kernel], 1), jnp.zeros(NUM_OUTPUTS + 1, box_kernel.dtype)
        boxes, logits = recompute_if_narrow(_outputs, features, kernel, bias, class_kernel, class_bias)
        distances = jnp.exp(scales[level] * boxes[:, :6])
        is_class = (class_kernel != 0).any(0) | (class_bias != 0)
        best = jnp.where(is_class, logits, jnp.finfo(logits.dtype).min).max(1)
        boxes, centerness = jnp.concatenate([distances, boxes[:, 6:8]], 1), boxes[:, 8]
        return HeadOutputs(boxes, logits, centerness, best)


def padded_columns(columns: Sequence[Sequence[int]]) -> Int[np.ndarray, "d k"]:
    """Columns of the union by dataset, int32, filled up with column 0, which a class mask then hides."""
    most = max(map(len, columns))
    return np.array([[*own, *[0] * (most - len(own))] for own in columns], np.int32)


def outputs_of_union(boxes: Float[Array, "n 8"], has_yaw: bool | Bool[AnyArray, ""]) -> Float[Array, "n 8"]:
    """Box outputs of a `UnionHead` in the form that a dataset's boxes are decoded from.

    The height of TR3D's boxes with yaw is p5 + p4, that of axis-aligned ones p5 (`boxes.codec`), and one head cannot
    mean both. In the outputs of a union the height is p5: for a dataset with yaw p4 is taken off it.
    """
    return boxes.at[:, 5].add(-jnp.where(has_yaw, boxes[:, 4], 0))


def _predict(features: Array, *parts: Array) -> tuple[Array, Array]:
    boxes, logits = recompute_if_narrow(_outputs, features, *parts)
    return jnp.concatenate([boxes[:, :3], jnp.exp(boxes[:, 3:6]), boxes[:, 6:]], 1), logits


def _outputs(
    features: Array, box_kernel: Array, box_bias: Array, class_kernel: Array, class_bias: Array
) -> tuple[Array, Array]:
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    return features @ box_kernel + box_bias, features @ class_kernel + class_bias
