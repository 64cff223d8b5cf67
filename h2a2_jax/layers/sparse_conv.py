"""Sparse convolutions as Flax modules."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from h2a2_jax.layers.checks import check_channels, check_context, check_input, check_map, check_tensor
from h2a2_jax.layers.context import ForwardContext, Initializer, draw, parameter
from h2a2_jax.sparse.conv import Algorithm, convolve
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import PerAxis, Sites, SparseTensor, axes_of, per_axis


def kaiming_fan_out(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, "*s v c_in c_out"]:
    """Normal kernels [..., V, Cin, Cout] with variance 2 / (V * Cout) (He et al. 2015, fan-out)."""
    return jax.random.normal(key, shape, dtype) * (2 / (shape[-3] * shape[-1])) ** 0.5


def uniform_fan_out(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, "*s v c_in c_out"]:
    """Uniform kernels [..., V, Cin, Cout] in +-1 / sqrt(V * Cout), as generative transposed convolutions start."""
    bound = (shape[-3] * shape[-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def uniform_fan_in(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, "*s v c_in c_out"]:
    """Uniform kernels [..., V, Cin, Cout] in +-1 / sqrt(V * Cin), MinkowskiEngine's initial convolutions."""
    bound = (shape[-3] * shape[-2]) ** -0.5
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def size_per_axis(kernel_size: PerAxis) -> tuple[int, ...]:
    """Size of a kernel along each axis: three numbers, 1 along z in 2-D, or four.

    Raises:
        ValueError: it is not one, two, three or four integers from 1 on.
    """
    return per_axis(kernel_size, axes_of(kernel_size), name="kernel_size")


def output_sites(x: SparseTensor, kernel_map: KernelMap) -> Sites:
    """Output sites of a map, those of the input if they are the same.

    They are JAX arrays if those of the input are: a loop wants the same kind of arrays out of its body as into it.
    """
    if kernel_map.kind == "submanifold":
        return x.sites
    sites = kernel_map.outputs
    if isinstance(x.sites.coords, jax.Array) and not isinstance(sites.coords, jax.Array):
        return replace(sites, coords=jnp.asarray(sites.coords), n=jnp.asarray(sites.n))
    return sites


class SparseConv(nnx.Module):
    """Sparse convolution of the kind of its kernel map: submanifold, strided, inverse, a lookup (size 1, stride 2).

    An inverse convolution is this layer with the map of `sparse.inverse_neighbors`. A kernel of one slice may go
    without a map: it then mixes the channels of each site. `docs/layers.md` builds networks of it.

    Attributes:
        kernel: [V, Cin / groups, Cout], slices x fastest; [D, V, Cin / groups, Cout] with a kernel per dataset.
        bias: [Cout] or None; [D, Cout] with a kernel per dataset.
        kernel_size: size of the kernel along each axis, 1 along z in 2-D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis = 3,
        *,
        use_bias: bool = False,
        groups: int = 1,
        algorithm: Algorithm | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        exclusive_to: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Build kernel and bias.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: size of the kernel, that of the map: one number for a cube, (x, y) in 2-D, (x, y, z), or (x, y,
                z, t) in 4-D.
            use_bias: if True, a bias is added.
            groups: number of groups of channels, each convolved on its own; Cin makes a depthwise convolution.
            algorithm: as in `sparse.convolve`; None for the algorithm of the context.
            dtype: compute type of the products; None for that of the context, else that of the features.
            param_dtype: type of kernel and bias.
            precision: precision of the products; None for that of the context.
            kernel_init: function of (key, shape, dtype), such as those of `jax.nn.initializers`; the shape is [V, Cin /
                groups, Cout], also with `exclusive_to`, which calls it once per dataset. None for normal values of
                variance 2 / (V * Cout), in `SparseConvTranspose` uniform ones within 1 / sqrt(V * Cout).
            bias_init: the same for the bias, [Cout]; None for zeros.
            exclusive_to: number of datasets with a kernel each; None for one kernel that all share.
            rngs: random streams.

        Raises:
            ValueError: the kernel size is no size, or the groups do not divide the channels.
        """
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} does not divide {in_channels} input and {out_channels} output channels; give a "
                "divisor of both."
            )
        self.kernel_size, self.groups = size_per_axis(kernel_size), groups
        shape = (math.prod(self.kernel_size), in_channels // groups, out_channels)
        each, exclusive = ((), False) if exclusive_to is None else ((exclusive_to,), True)
        kernel = (
            self._init(rngs.params(), (*each, *shape), param_dtype)
            if kernel_init is None
            else draw(kernel_init, rngs, shape, param_dtype, exclusive_to)
        )
        self.kernel = parameter(kernel, exclusive)
        bias = None
        if use_bias and bias_init is None:
            bias = jnp.zeros((*each, out_channels), param_dtype)
        elif use_bias and bias_init is not None:
            bias = draw(bias_init, rngs, (out_channels,), param_dtype, exclusive_to)
        self.bias = None if bias is None else parameter(bias, exclusive)
        self.exclusive_to = exclusive_to
        self.algorithm, self.dtype, self.precision = algorithm, dtype, precision

    _init: Callable[..., Array] = staticmethod(kaiming_fan_out)

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Convolve onto the map's output sites.

        Args:
            x: features [N_in, Cin] on the map's input sites.
            kernel_map: map with as many offsets as the kernel has slices; None for a kernel of one slice.
            context: context of the pass: algorithm, compute type and precision where the layer has none.

        Returns:
            Features [N_out, Cout] on the map's output sites, in the type of x.

        Raises:
            ValueError: the map does not fit the features or the kernel, or an argument is of another kind.
        """
        name = type(self).__name__
        check_context(name, context)
        context = context or ForwardContext()
        dtype = self.dtype if self.dtype is not None else context.dtype
        precision = self.precision if self.precision is not None else context.precision
        kernel = self.kernel_of(context)
        if kernel_map is None:
            y, sites = mix_channels(x, kernel, name, dtype, precision, groups=self.groups), x.sites
        else:
            check_input(name, x, kernel_map, kernel.shape, self.kernel_size, groups=self.groups)
            algorithm = self.algorithm or context.algorithm
            grouped: dict[str, Any] = {} if self.groups == 1 else {"groups": self.groups}
            y = convolve(
                x.features, kernel[None], kernel_map, algorithm=algorithm, dtype=dtype, precision=precision, **grouped
            )
            sites = output_sites(x, kernel_map)
        if self.bias is not None:
            y = jnp.where(sites.valid[:, None], y + self._pick(self.bias, context).astype(y.dtype), 0)
        return SparseTensor(y, sites)

    def kernel_of(self, context: ForwardContext) -> Float[Array, "v c_group c_out"]:
        """The kernel of a pass, that of the context's dataset where each has one."""
        return self._pick(self.kernel, context)

    def _pick(self, value: nnx.Param, context: ForwardContext) -> Array:
        return value[...] if self.exclusive_to is None else context.dataset_of(self.exclusive_to).pick(value[...])


def mix_channels(
    x: SparseTensor,
    kernel: Float[Array, "v c_group c_out"],
    layer: str,
    dtype: Any = None,
    precision: Any = None,
    *,
    groups: int = 1,
) -> Float[Array, "n c_out"]:
    """Mix the channels of each site by a kernel of one slice, as a convolution without a map does.

    Raises:
        ValueError: the kernel has several slices or takes other channels; the message names the layer.
    """
    check_tensor(layer, x)
    volume, channels, outputs = kernel.shape
    if volume != 1:
        raise ValueError(
            f"{layer} with {volume} slices was given no kernel map: without a map it mixes the channels of a site by "
            "one slice."
        )
    check_channels(layer, x, channels * groups)
    rows = jnp.where(x.sites.valid[:, None], x.features, 0)
    compute = jnp.dtype(dtype) if dtype is not None else rows.dtype
    sums = jnp.promote_types(compute, jnp.float32)
    rows, weights = rows.astype(compute), kernel[0].astype(compute)
    if groups == 1:
        y = jnp.matmul(rows, weights, precision=precision, preferred_element_type=sums)
    else:
        y = jnp.einsum(
            "ngi,igo->ngo",
            rows.reshape(-1, groups, channels),
            weights.reshape(channels, groups, -1),
            precision=precision,
            preferred_element_type=sums,
        ).reshape(-1, outputs)
    return y.astype(x.features.dtype)


class SparseConvTranspose(SparseConv):
    """Transposed convolution onto finer sites.

    With a "generative" map it makes every finer site under the kernel, with an "inverse" one it goes back to the sites
    that a strided convolution came from.
    """

    _init: Callable[..., Array] = staticmethod(uniform_fan_out)

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Convolve onto the map's output sites, as `SparseConv` does.

        Raises:
            ValueError: the map is of another kind, or does not fit.
        """
        if kernel_map is not None:
            check_map("SparseConvTranspose", kernel_map)
        if kernel_map is None or kernel_map.kind not in ("generative", "inverse"):
            given = "no map" if kernel_map is None else f"a {kernel_map.kind!r} map"
            raise ValueError(f"SparseConvTranspose was given {given}, it takes a 'generative' or an 'inverse' one.")
        return super().__call__(x, kernel_map, context)
