"""Residual adapters: a convolution that datasets share, and a 1^3 convolution of each dataset beside it.

    y = conv(x; W) + x A_k  =  conv(x; W + A_k at the centre)            W: shared; A_k: of dataset k, exclusive

The parallel residual adapters of Rebuffi et al. ("Efficient parametrization of multi-domain deep neural networks", CVPR
2018), which follow the serial ones of "Learning multiple visual domains with residual adapters" (NeurIPS 2017). There W
is trained on ImageNet and frozen, and adapters are trained domain by domain; here all are trained jointly. A site of a
submanifold map is its own neighbour at the centre of an odd kernel, so that one convolution computes both terms:
adapters cost the sum of two kernels, and no pass over the sites.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers.checks import check_map
from h2a2_jax.layers.context import ForwardContext, Initializer, parameter
from h2a2_jax.layers.sparse_conv import SparseConv
from h2a2_jax.sparse.conv import Algorithm
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import PerAxis, SparseTensor


class AdapterConv(SparseConv):
    """Submanifold convolution with a residual adapter for each dataset; starts as `SparseConv`.

    Attributes:
        kernel: [V, Cin, Cout], W, which datasets share.
        adapter: [D, Cin, Cout], A_k of each dataset.
        bias: [Cout] or None, shared.
        kernel_size: size of the kernel along each axis, 1 along z in 2-D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis = 3,
        *,
        num_datasets: int = 1,
        use_bias: bool = False,
        algorithm: Algorithm | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Build kernel and bias as `SparseConv`, and adapters, which start at zero.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: size of the kernel, odd along each axis.
            num_datasets: number D of datasets.
            use_bias: if True, a bias is added.
            algorithm: as in `sparse.convolve`; None for the algorithm of the context.
            dtype: compute type of the products; None for that of the context, else that of the features.
            param_dtype: type of kernel, adapters and bias.
            precision: precision of the products; None for that of the context.
            kernel_init: as in `SparseConv`.
            bias_init: the same for the bias.
            rngs: random streams.

        Raises:
            ValueError: the kernel size is no size, or not odd.
        """
        super().__init__(
            in_channels, out_channels, kernel_size, use_bias=use_bias, algorithm=algorithm, dtype=dtype,
            param_dtype=param_dtype, precision=precision, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs,
        )  # fmt: skip
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(
                f"AdapterConv was given a kernel of size {self.kernel_size}, which has no centre: give odd sizes."
            )
        self.adapter = parameter(jnp.zeros((num_datasets, in_channels, out_channels), param_dtype), exclusive=True)

    def kernel_of(self, context: ForwardContext) -> Float[Array, "v c_in c_out"]:
        """The kernel of a dataset, W with A_k at the centre; W alone where a context asks for shared kernels."""
        kernel, dataset = jnp.asarray(self.kernel[...]), context.dataset_of(len(self.adapter[...]))
        if dataset.kernels == "shared":
            return kernel
        return kernel.at[len(kernel) // 2].add(dataset.pick(self.adapter[...]))

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Convolve, as `SparseConv` does, with the adapter of the context's dataset.

        Raises:
            ValueError: the map is no submanifold one, or does not fit; or a layer of several datasets trains and the
                context names none.
        """
        if kernel_map is not None:
            check_map("AdapterConv", kernel_map)
            if kernel_map.kind != "submanifold":
                raise ValueError(
                    f"AdapterConv was given a {kernel_map.kind!r} map, it takes a 'submanifold' one: elsewhere no "
                    "offset is the site itself."
                )
        return super().__call__(x, kernel_map, context)
