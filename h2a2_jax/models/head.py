"""Detection heads, one per dataset: 1x1 box regression and class logits."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers import DatasetContext
from h2a2_jax.sparse.xla_cpu import recompute_if_narrow

NUM_OUTPUTS = 8
"""Box outputs with yaw; axis-aligned datasets use the first 6."""


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
        self.class_bias = nnx.Param(-math.log((1 - 0.01) / 0.01) * classes.astype(jnp.float32), dataset_axis=0)

    def __call__(
        self, features: Float[Array, "n c"], dataset: DatasetContext
    ) -> tuple[Float[Array, "n 8"], Float[Array, "n k"]]:
        """Box predictions, columns 3:6 exp()-ed to face distances in metres, and class logits; in float32 at least."""
        parts = (self.box_kernel, self.box_bias, self.class_kernel, self.class_bias)
        boxes, logits = recompute_if_narrow(_outputs, features, *(dataset.pick(part[...]) for part in parts))
        boxes = jnp.concatenate([boxes[:, :3], jnp.exp(boxes[:, 3:6]), boxes[:, 6:]], 1)
        return boxes, logits


def _outputs(
    features: Array, box_kernel: Array, box_bias: Array, class_kernel: Array, class_bias: Array
) -> tuple[Array, Array]:
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    return features @ box_kernel + box_bias, features @ class_kernel + class_bias
