"""Sparse convolutions as Flax modules."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from h2a2_jax.layers.context import ForwardContext
from h2a2_jax.sparse.conv import convolve
from h2a2_jax.sparse.grid import Size3, size3
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.tensor import SparseTensor


def kaiming_fan_out(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*s v c_in c_out"]:
    """Normal kernels [..., V, Cin, Cout] with variance 2 / (V * Cout) (He et al. 2015, fan-out)."""
    return jax.random.normal(key, shape) * (2 / (shape[-3] * shape[-1])) ** 0.5


def uniform_fan_out(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*s v c_in c_out"]:
    """Uniform kernels [..., V, Cin, Cout] in +-1 / sqrt(V * Cout), as generative transposed convolutions start."""
    bound = (shape[-3] * shape[-1]) ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class SparseConv(nnx.Module):
    """Sparse convolution; the kernel map says whether submanifold, strided or a lookup (size 1, stride 2).

    Attributes:
        kernel: [V, Cin, Cout], slices x fastest.
        bias: [Cout] or None.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size3 = 3, *, use_bias: bool = False, rngs: nnx.Rngs
    ):
        """Kernels start kaiming-normal over the fan-out, biases at zero."""
        x, y, z = size3(kernel_size)
        self.kernel = nnx.Param(self._init(rngs.params(), (x * y * z, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if use_bias else None

    _init = staticmethod(kaiming_fan_out)

    def __call__(self, x: SparseTensor, kernel_map: KernelMap, context: ForwardContext | None = None) -> SparseTensor:
        """Convolve onto the map's output sites.

        Args:
            x: on the map's input sites.
            kernel_map: with as many offsets as the kernel has slices.
            context: algorithm, compute type and precision; default ones if left out.

        Raises:
            ValueError: the map does not fit the features or the kernel.
        """
        how = {} if context is None else {k: getattr(context, k) for k in ("algorithm", "dtype", "precision")}
        y = convolve(x.features, self.kernel[...][None], kernel_map, **how)
        if self.bias is not None:
            y = jnp.where(kernel_map.outputs.valid[:, None], y + self.bias[...], 0)
        return SparseTensor(y, kernel_map.outputs)


class SparseConvTranspose(SparseConv):
    """Generative transposed convolution: makes every finer site under the kernel (with a "generative" map)."""

    _init = staticmethod(uniform_fan_out)
