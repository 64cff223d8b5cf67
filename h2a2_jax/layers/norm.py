"""Normalisation over active sites.

Flax's batch norm would not do: padding must not count, the replicas of a dataset hold unequal numbers of sites (so that
sums, not means, are added over devices), and every dataset keeps its own running statistics.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from h2a2_jax.layers.checks import check_channels, check_context, check_tensor
from h2a2_jax.layers.context import AxisName, DatasetContext, ForwardContext, Initializer, draw, is_training, parameter
from h2a2_jax.sparse.pool import scan_sum, sites_per_scan
from h2a2_jax.sparse.sites import SparseTensor
from h2a2_jax.sparse.xla_cpu import after, vary_alike


class Statistics(NamedTuple):
    """Mean and variance of each channel, float [C].

    Attributes:
        mean: mean.
        var: variance.
    """

    mean: Array
    var: Array


class BatchStatistics(NamedTuple):
    """Statistics of a batch, and the number of sites in them.

    Attributes:
        statistics: mean and biased variance, float [C] each.
        num_sites: number of sites, float [].
    """

    statistics: Statistics
    num_sites: Array


def batch_statistics(x: Float[Array, "n c"], valid: Bool[Array, " n"], axis_name: AxisName = None) -> BatchStatistics:
    """Mean and biased variance over the valid rows of all devices along `axis_name`.

    Without a valid row both are zero. Sums are at least float32.
    """

    def total(values: Array) -> Array:
        return lax.psum(values, axis_name) if axis_name is not None else values

    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = total(valid.sum().astype(x.dtype))
    mean = total(jnp.where(valid[:, None], x, 0).sum(0)) / jnp.maximum(count, 1)
    var = total((jnp.where(valid[:, None], x - mean, 0) ** 2).sum(0)) / jnp.maximum(count, 1)
    return BatchStatistics(Statistics(mean, var), count)


def normalize(
    x: Float[Array, "n c"],
    valid: Bool[Array, " n"],
    statistics: Statistics,
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    eps: float,
) -> Float[Array, "n c"]:
    """(x - mean) / sqrt(var + eps) * scale + bias on valid rows, zero on padding, in the type of x."""
    factor = scale * lax.rsqrt(statistics.var + eps)
    y = jnp.where(valid[:, None], x, 0) * factor + (bias - statistics.mean * factor)
    return jnp.where(valid[:, None], y, 0).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalize_by_batch(
    x: Float[Array, "n c"],
    valid: Bool[Array, " n"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    eps: float,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "n c"], BatchStatistics]:
    """`normalize` with `batch_statistics` of the same rows, which are returned too.

    The custom gradient keeps x alone for the backward pass, where the derivatives of mean and variance would keep two
    more arrays of its size, and takes one pass over the rows to sum and one to write.
    """
    batch = batch_statistics(x, valid, axis_name)
    mean, var = batch.statistics
    factor = scale * lax.rsqrt(var + eps)
    # Nothing of the rows' size appears in two expressions here or in the gradient: XLA would store it.
    y = jnp.where(valid[:, None], x * factor + (bias - mean * factor), 0)
    return y.astype(x.dtype), batch


def _by_batch_forward(
    x: Array, valid: Array, scale: Array, bias: Array, eps: float, axis_name: AxisName
) -> tuple[tuple[Array, BatchStatistics], tuple]:
    y, batch = normalize_by_batch(x, valid, scale, bias, eps, axis_name)
    return (y, batch), (x, valid, scale, batch)


def _by_batch_backward(eps: float, axis_name: AxisName, residuals: tuple, cotangents: tuple) -> tuple:
    x, valid, scale, ((mean, var), num_sites) = residuals
    g, ((dmean, dvar), _) = cotangents
    if x.dtype != mean.dtype:
        x = after(g, x)  # else the float32 values of the forward pass would be kept for this line
    wide, keep = mean.dtype, valid[:, None]
    inverse = lax.rsqrt(var + eps)
    sum_g = jnp.where(keep, g, 0).astype(wide).sum(0)
    sum_gx = jnp.where(keep, g * (x - mean), 0).sum(0)
    total_g, total_gx = lax.psum((sum_g, sum_gx), axis_name) if axis_name is not None else (sum_g, sum_gx)
    count = jnp.maximum(num_sites, 1)
    factor = scale * inverse
    slope = (2 * dvar - factor * inverse**2 * total_gx) / count
    shift = (dmean - factor * total_g) / count - mean * slope
    dx = jnp.where(keep, g * factor + x * slope + shift, 0)
    dscale, dbias = (sum_gx * inverse).astype(scale.dtype), sum_g.astype(scale.dtype)
    return dx.astype(x.dtype), np.zeros(valid.shape, jax.dtypes.float0), dscale, dbias


normalize_by_batch.defvjp(_by_batch_forward, _by_batch_backward)


def update_running(running: Statistics, batch: BatchStatistics, rate: float) -> Statistics:
    """Running statistics after a batch: (1 - rate) * old + rate * new, with the unbiased variance.

    A batch of one site counts with its biased variance; one without sites changes nothing. The rate is Torch's
    `momentum`, and one minus Flax's.
    """
    unbiased = batch.statistics.var * batch.num_sites / jnp.maximum(batch.num_sites - 1, 1)
    rate = jnp.where(batch.num_sites > 0, rate, 0.0)  # type: ignore[assignment]
    return Statistics(
        (1 - rate) * running.mean + rate * batch.statistics.mean, (1 - rate) * running.var + rate * unbiased
    )


def instance_norm(
    x: SparseTensor, scale: Float[Array, " c"], bias: Float[Array, " c"], eps: float = 1e-8
) -> SparseTensor:
    """Normalise each scan's channels over its own active sites, with the biased variance.

    Instance norm (Ulyanov et al. 2016). Padding rows come out as zero and are never read.

    Args:
        x: features [N, C]; sums are float32 at least.
        scale: factor of each channel.
        bias: added to each channel.
        eps: added to variances.

    Returns:
        Features on the same sites, in the type of x.
    """
    check_tensor("instance_norm", x)
    valid, scan = x.sites.valid[:, None], jnp.asarray(x.sites.scan)
    counts = jnp.maximum(sites_per_scan(x.sites), 1)[:, None]

    def mean(rows: Array) -> Array:
        return (scan_sum(rows, x.sites) / counts).at[scan].get(mode="fill", fill_value=0)

    rows = jnp.where(valid, x.features.astype(jnp.promote_types(x.features.dtype, jnp.float32)), 0)
    centred = rows - mean(rows)
    y = centred * lax.rsqrt(mean(centred**2) + eps) * scale + bias
    return x.with_features(jnp.where(valid, y, 0).astype(x.features.dtype))


def layer_norm(x: SparseTensor, scale: Float[Array, " c"], bias: Float[Array, " c"], eps: float = 1e-6) -> SparseTensor:
    """Normalise each site over its channels, with the biased variance (Ba et al. 2016).

    Args:
        x: features [N, C]; sums are float32 at least.
        scale: factor of each channel.
        bias: added to each channel.
        eps: added to variances.

    Returns:
        Features on the same sites, in the type of x; zero on padding.
    """
    check_tensor("layer_norm", x)
    valid = x.sites.valid[:, None]
    rows = jnp.where(valid, x.features.astype(jnp.promote_types(x.features.dtype, jnp.float32)), 0)
    centred = rows - rows.mean(1, keepdims=True)
    y = centred * lax.rsqrt((centred**2).mean(1, keepdims=True) + eps) * scale + bias
    return x.with_features(jnp.where(valid, y, 0).astype(x.features.dtype))


def _affine(
    channels: int,
    dtype: Any,
    scale_init: Initializer | None,
    bias_init: Initializer | None,
    rngs: nnx.Rngs | None,
    datasets: int | None = None,
) -> tuple[nnx.Param, nnx.Param]:
    """Scale and bias of a norm, each [C], or [D, C] with a number of datasets."""
    exclusive = datasets is not None
    full = (datasets, channels) if exclusive else (channels,)

    def build(name: str, init: Initializer | None, default: float) -> nnx.Param:
        if init is None:
            return parameter(jnp.full(full, default, dtype), exclusive)
        if rngs is None:
            raise ValueError(f"{name} was given without rngs, from which it draws: give rngs=nnx.Rngs(0).")
        return parameter(draw(init, rngs, (channels,), dtype, datasets), exclusive)

    return build("scale_init", scale_init, 1.0), build("bias_init", bias_init, 0.0)


class InstanceNorm(nnx.Module):
    """Instance norm: each scan over its own active sites (`instance_norm`).

    Attributes:
        scale: [C], factor of each channel.
        bias: [C], added to each channel.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        param_dtype: Any = jnp.float32,
        scale_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Build scale and bias.

        Args:
            channels: number C of channels.
            eps: added to variances.
            param_dtype: type of scale and bias.
            scale_init: function of (key, shape, dtype) for the initial scale [C]; None for ones.
            bias_init: the same for the bias; None for zeros.
            rngs: random streams; read by `scale_init` and `bias_init` alone.

        Raises:
            ValueError: `scale_init` or `bias_init` without `rngs`.
        """
        self.scale, self.bias = _affine(channels, param_dtype, scale_init, bias_init, rngs)
        self.eps = eps

    def __call__(self, x: SparseTensor, context: ForwardContext | None = None) -> SparseTensor:
        """Normalise features [N, C]; the context is not read.

        Raises:
            ValueError: x has another number of channels, or an argument is of another kind.
        """
        _check(self, x, context)
        return instance_norm(x, self.scale[...], self.bias[...], self.eps)


class LayerNorm(nnx.Module):
    """Layer norm: each site over its channels (`layer_norm`).

    Attributes:
        scale: [C], factor of each channel.
        bias: [C], added to each channel.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-6,
        param_dtype: Any = jnp.float32,
        scale_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Build scale and bias.

        Args:
            channels: number C of channels.
            eps: added to variances.
            param_dtype: type of scale and bias.
            scale_init: function of (key, shape, dtype) for the initial scale [C]; None for ones.
            bias_init: the same for the bias; None for zeros.
            rngs: random streams; read by `scale_init` and `bias_init` alone.

        Raises:
            ValueError: `scale_init` or `bias_init` without `rngs`.
        """
        self.scale, self.bias = _affine(channels, param_dtype, scale_init, bias_init, rngs)
        self.eps = eps

    def __call__(self, x: SparseTensor, context: ForwardContext | None = None) -> SparseTensor:
        """Normalise features [N, C]; the context is not read.

        Raises:
            ValueError: x has another number of channels, or an argument is of another kind.
        """
        _check(self, x, context)
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class BatchNorm(nnx.Module):
    """Batch norm over the active sites: scale and bias shared by all datasets, running statistics per dataset.

    Batch norm of Ioffe and Szegedy (2015). The statistics of a batch are always one dataset's: mixed ones would let one
    dataset's scans into the gradient of another's loss.

    `model.train()` and `model.eval()` set `use_running_average`, as for the layers of Flax; a context that says
    `training` overrides it. Unlike Flax's batch norm the layer evaluates unless told to train.

    Attributes:
        scale: [C]; [D, C] with `exclusive_affine`.
        bias: [C]; [D, C] with `exclusive_affine`.
        use_running_average: if True, the layer evaluates: the running statistics are used, and stay.
        mean: [D, C], running mean.
        var: [D, C], running variance.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_datasets: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.9,
        exclusive_affine: bool = False,
        shared_statistics: bool = False,
        use_running_average: bool = True,
        param_dtype: Any = jnp.float32,
        scale_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Build scale and bias; the running mean starts at zero, the running variance at one.

        Args:
            channels: number C of channels.
            num_datasets: number D of datasets.
            eps: added to variances.
            momentum: weight of the old running statistics, as in Flax: running = momentum * running + (1 - momentum) *
                batch. Torch's `momentum` is the other weight: its m is 1 - m here, its default 0.1 is the 0.9 here.
            exclusive_affine: if True, each dataset has a scale and a bias.
            shared_statistics: if True, every batch enters the running statistics of all datasets, which are then equal.
            use_running_average: if False, the layer trains where no context says otherwise. Flax's default is False.
            param_dtype: type of scale and bias; running statistics are at least float32.
            scale_init: function of (key, shape, dtype) for the initial scale [C], called once per dataset with
                `exclusive_affine`; None for ones.
            bias_init: the same for the bias; None for zeros.
            rngs: random streams; read by `scale_init` and `bias_init` alone.

        Raises:
            ValueError: `momentum` is not in 0.5..1, most likely Torch's; or `scale_init` or `bias_init` without `rngs`.
        """
        if not 0.5 <= momentum <= 1:
            raise ValueError(
                f"BatchNorm was given momentum={momentum}, expected is Flax's, the weight of the old statistics, in "
                "0.5..1: for Torch's momentum m give 1 - m."
            )
        each = num_datasets if exclusive_affine else None
        self.scale, self.bias = _affine(channels, param_dtype, scale_init, bias_init, rngs, each)
        wide = jnp.promote_types(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros((num_datasets, channels), wide), dataset_axis=0)
        self.var = nnx.BatchStat(jnp.ones((num_datasets, channels), wide), dataset_axis=0)
        self.eps, self.momentum, self.use_running_average = eps, momentum, use_running_average
        self.exclusive_affine, self.shared_statistics = exclusive_affine, shared_statistics

    def affine(
        self, dataset: DatasetContext, embedding: Float[Array, "*b d"] | None = None
    ) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Scale and bias of a dataset; its embedding is not read."""
        if self.exclusive_affine:
            return dataset.pick(self.scale[...]), dataset.pick(self.bias[...])
        return self.scale[...], self.bias[...]

    def __call__(self, x: SparseTensor, context: ForwardContext | None = None) -> SparseTensor:
        """Normalise; in training with the batch's statistics, which also enter the dataset's running ones.

        Args:
            x: features [N, C] and sites.
            context: context of the pass: the dataset of the running statistics, training or evaluation, and the mesh
                axis over which the batch is spread. Without it, or where it leaves `training` open, the layer does as
                `use_running_average` says.

        Raises:
            ValueError: x has another number of channels; an argument is of another kind; or a layer of several datasets
                trains and the context names none.
        """
        _check(self, x, context)
        context = context or ForwardContext()
        training = is_training(self, context)
        dataset, valid = replace(context, training=training).dataset_of(self.mean.shape[0]), x.sites.valid
        scale, bias = self.affine(dataset, context.embedding)
        if not training:
            return x.with_features(normalize(x.features, valid, self.running(dataset), scale, bias, self.eps))
        scale, bias = vary_alike([scale, bias], [x.features])
        features, batch = normalize_by_batch(x.features, valid, scale, bias, self.eps, context.axis_name)
        self._remember(batch, dataset)
        return x.with_features(features)

    def running(self, dataset: DatasetContext) -> Statistics:
        """Running statistics of a dataset."""
        return Statistics(dataset.pick(self.mean[...]), dataset.pick(self.var[...]))

    def _remember(self, batch: BatchStatistics, dataset: DatasetContext) -> None:
        batch = jax.tree.map(lax.stop_gradient, batch)
        rate = round(1 - self.momentum, 15)  # 1 - 0.9 is 0.1 to the last bit
        new = update_running(Statistics(self.mean[...], self.var[...]), batch, rate)
        changed = (jnp.asarray(dataset.weights)[:, None] > 0) | self.shared_statistics
        self.mean[...] = jnp.where(changed, new.mean, self.mean[...])
        self.var[...] = jnp.where(changed, new.var, self.var[...])


def _check(norm: BatchNorm | InstanceNorm | LayerNorm, x: SparseTensor, context: ForwardContext | None) -> None:
    name = type(norm).__name__
    check_context(name, context)
    check_tensor(name, x)
    check_channels(name, x, norm.scale.shape[-1])
