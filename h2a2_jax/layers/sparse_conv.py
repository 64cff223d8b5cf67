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
    """Check that features and map fit a layer whose kernel is [V, Cin, Cout].

    Raises:
        ValueError: channels, offsets or sites do not fit.
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
    """Sparse convolution of the kind of its kernel map: submanifold, strided, inverse, a lookup (size 1, stride 2).

    An inverse convolution is this layer with the map of `sparse.inverse_neighbors`. A kernel of one slice may go
    without a map: it then mixes the channels of each site. `docs/layers.md` builds networks of it.

    Attributes:
        kernel: [V, Cin, Cout], slices x fastest; [D, V, Cin, Cout] with a kernel per dataset.
        bias: [Cout] or None; [D, Cout] with a kernel per dataset.
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
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: size of the kernel, that of the map: one number for a cube, (x, y) in 2-D, or (x, y, z).
            use_bias: if True, a bias is added.
            algorithm: as in `sparse.convolve`; None for the algorithm of the context.
            dtype: compute type of the products; None for that of the context, else that of the features.
            precision: precision of the products; None for that of the context.
            exclusive_to: number of datasets with a kernel each; None for one kernel that all share.
            rngs: random streams.
        """
        x, y, z = size3(kernel_size)
        each, exclusive = ((), False) if exclusive_to is None else ((exclusive_to,), True)
        kernel = self._init(rngs.params(), (*each, x * y * z, in_channels, out_channels))
        self.kernel = parameter(kernel, exclusive)
        self.bias = parameter(jnp.zeros((*each, out_channels)), exclusive) if use_bias else None
        self.exclusive_to = exclusive_to
        self.algorithm, self.dtype, self.precision = algorithm, dtype, precision

    _init = staticmethod(kaiming_fan_out)

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
            ValueError: the map does not fit the features or the kernel.
        """
        context = context or ForwardContext()
        dtype = self.dtype if self.dtype is not None else context.dtype
        precision = self.precision if self.precision is not None else context.precision
        kernel = self._pick(self.kernel, context)
        if kernel_map is None:
            y, sites = mix_channels(x, kernel, type(self).__name__, dtype, precision), x.sites
        else:
            check_input(type(self).__name__, x, kernel_map, kernel.shape)
            algorithm = self.algorithm or context.algorithm
            y = convolve(x.features, kernel[None], kernel_map, algorithm=algorithm, dtype=dtype, precision=precision)
            sites = kernel_map.outputs
        if self.bias is not None:
            y = jnp.where(sites.valid[:, None], y + self._pick(self.bias, context).astype(y.dtype), 0)
        return SparseTensor(y, sites)

    def _pick(self, value: nnx.Param, context: ForwardContext) -> Array:
        return value[...] if self.exclusive_to is None else context.dataset_of(self.exclusive_to).pick(value[...])


def mix_channels(
    x: SparseTensor, kernel: Float[Array, "v c_in c_out"], layer: str, dtype: Any = None, precision: Any = None
) -> Float[Array, "n c_out"]:
    """Mix the channels of each site by a kernel of one slice, as a convolution without a map does.

    Raises:
        ValueError: the kernel has several slices or takes other channels; the message names the layer.
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
        """Convolve onto the map's output sites, as `SparseConv` does.

        Raises:
            ValueError: the map is of another kind, or does not fit.
        """
        if kernel_map is None or kernel_map.kind not in ("generative", "inverse"):
            given = "no map" if kernel_map is None else f"a {kernel_map.kind!r} map"
            raise ValueError(f"SparseConvTranspose was given {given}, it takes a 'generative' or an 'inverse' one.")
        return super().__call__(x, kernel_map, context)
