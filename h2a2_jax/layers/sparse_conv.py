"""Sparse convolutions as Flax modules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from h2a2_jax.layers.context import ForwardContext, parameter
from h2a2_jax.sparse.conv import Algorithm, convolve
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import Size3, SparseTensor, size3


def kaiming_fan_out(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*s v c_in c_out"]:
    """Normal kernels [..., V, Cin, Cout] with variance 2 / (V * Cout) (He et al. 2015, fan-out)."""
    return jax.random.normal(key, shape) * (2 / (shape[-3] * shape[-1])) ** 0.5


def uniform_fan_out(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*s v c_in c_out"]:
    """Uniform kernels [..., V, Cin, Cout] in +-1 / sqrt(V * Cout), as generative transposed convolutions start."""
    bound = (shape[-3] * shape[-1]) ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def check_input(layer: str, x: SparseTensor, kernel_map: KernelMap, kernel: tuple[int, ...]) -> None:
    """Whether features and map fit a layer whose kernel is [V, Cin, Cout].

    Raises:
        ValueError: says what does not.
    """
    volume, channels, _ = kernel
    if x.features.shape[1] != channels:
        raise ValueError(f"{layer} takes {channels} channels, given features of {x.features.shape[1]}.")
    if kernel_map.kernel_volume != volume:
        raise ValueError(
            f"{layer} has a kernel of {volume} slices, given a map of {kernel_map.kernel_volume} offsets: "
            "build the map with the layer's kernel size."
        )
    has, starts = ((s.stride, s.capacity, s.num_scans) for s in (x.sites, kernel_map.inputs))
    if has != starts:
        raise ValueError(
            f"{layer} was given features on other sites than the map's inputs: stride, rows and scans are "
            f"{has}, of the map {starts}."
        )


class SparseConv(nnx.Module):
    """Sparse convolution; the kernel map says which: submanifold, strided, inverse, a lookup (size 1, stride 2).

    An inverse convolution is this layer with the map of `sparse.inverse_neighbors`. A kernel of one slice may go
    without a map: it then mixes the channels of each site.

    Attributes:
        kernel: [V, Cin, Cout], slices x fastest; [D, V, Cin, Cout] where datasets have their own.
        bias: [Cout] or None; [D, Cout] likewise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size3 = 3,
        *,
        use_bias: bool = False,
        algorithm: Algorithm | None = None,
        dtype: Any = None,
        precision: Any = None,
        exclusive_to: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Kernels start kaiming-normal over the fan-out, biases at zero.

        Args:
            in_channels: of the input.
            out_channels: of the output.
            kernel_size: one number for a cube, (x, y) in 2-D, (x, y, z); the map's.
            use_bias: whether to add a bias.
            algorithm: as in `sparse.convolve`; None: the context's.
            dtype: compute type of the products; None: the context's, else the features' own.
            precision: of the products; None: the context's.
            exclusive_to: number of datasets that each have a kernel of their own; None: one for all.
            rngs: random streams.
        """
        x, y, z = size3(kernel_size)
        own, exclusive = ((), False) if exclusive_to is None else ((exclusive_to,), True)
        kernel = self._init(rngs.params(), (*own, x * y * z, in_channels, out_channels))
        self.kernel = parameter(kernel, exclusive)
        self.bias = parameter(jnp.zeros((*own, out_channels)), exclusive) if use_bias else None
        self.exclusive_to = exclusive_to
        self.algorithm, self.dtype, self.precision = algorithm, dtype, precision

    _init = staticmethod(kaiming_fan_out)

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Convolve onto the map's output sites.

        Args:
            x: on the map's input sites.
            kernel_map: with as many offsets as the kernel has slices; None for a kernel of one slice.
            context: algorithm, compute type and precision, where the layer names none.

        Raises:
            ValueError: the map does not fit the features or the kernel.
        """
        context = context or ForwardContext()
        dtype = self.dtype if self.dtype is not None else context.dtype
        precision = self.precision if self.precision is not None else context.precision
        kernel = self._own(self.kernel, context)
        if kernel_map is None:
            y, sites = mix_channels(x, kernel, type(self).__name__, dtype, precision), x.sites
        else:
            check_input(type(self).__name__, x, kernel_map, kernel.shape)
            algorithm = self.algorithm or context.algorithm
            y = convolve(x.features, kernel[None], kernel_map, algorithm=algorithm, dtype=dtype, precision=precision)
            sites = kernel_map.outputs
        if self.bias is not None:
            y = jnp.where(sites.valid[:, None], y + self._own(self.bias, context).astype(y.dtype), 0)
        return SparseTensor(y, sites)

    def _own(self, value: nnx.Param, context: ForwardContext) -> Array:
        return value[...] if self.exclusive_to is None else context.dataset_of(self.exclusive_to).pick(value[...])


def mix_channels(
    x: SparseTensor, kernel: Float[Array, "v c_in c_out"], layer: str, dtype: Any = None, precision: Any = None
) -> Float[Array, "n c_out"]:
    """Channels of each site mixed by a kernel of one slice, as a convolution without a map does.

    Raises:
        ValueError: the kernel has several slices or takes other channels; names the layer.
    """
    volume, channels, _ = kernel.shape
    if volume != 1 or x.features.shape[1] != channels:
        raise ValueError(
            f"{layer} with {volume} slices of {channels} channels was given no kernel map and features of "
            f"{x.features.shape[1]}: without a map it mixes the channels of a site by one slice."
        )
    rows = jnp.where(x.sites.valid[:, None], x.features, 0)
    compute = jnp.dtype(dtype) if dtype is not None else rows.dtype
    sums = jnp.promote_types(compute, jnp.float32)
    y = jnp.matmul(rows.astype(compute), kernel[0].astype(compute), precision=precision, preferred_element_type=sums)
    return y.astype(x.features.dtype)


class SparseConvTranspose(SparseConv):
    """Transposed convolution onto finer sites.

    With a "generative" map it makes every finer site under the kernel, with an "inverse" one it goes back to the sites
    that a strided convolution came from.
    """

    _init = staticmethod(uniform_fan_out)

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """As `SparseConv`.

        Raises:
            ValueError: the map is of another kind, or does not fit.
        """
        if kernel_map is None or kernel_map.kind not in ("generative", "inverse"):
            given = "no map" if kernel_map is None else f"a {kernel_map.kind!r} map"
            raise ValueError(f"SparseConvTranspose was given {given}, it takes a 'generative' or an 'inverse' one.")
        return super().__call__(x, kernel_map, context)
