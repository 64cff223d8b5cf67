"""Normalisation over active sites.

Batch norm is our own because padding must not count, because the replicas of a dataset hold unequal numbers of sites
(so that sums, not means, are to be added over devices), and because every dataset keeps its own running statistics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from h2a2_jax.layers.context import AxisName, DatasetContext
from h2a2_jax.sparse.tensor import SparseTensor


class Statistics(NamedTuple):
    """Mean and variance of each channel, float [C]."""

    mean: Array
    var: Array


class BatchStatistics(NamedTuple):
    """Mean and biased variance of a batch, and the number of sites they are over (float [])."""

    statistics: Statistics
    num_sites: Array


def batch_statistics(x: Float[Array, "n c"], valid: Bool[Array, " n"], axis_name: AxisName = None) -> BatchStatistics:
    """Mean and biased variance over valid rows, of all devices along `axis_name` together.

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


def update_running(running: Statistics, batch: BatchStatistics, momentum: float) -> Statistics:
    """Running statistics after a batch: (1 - momentum) * old + momentum * new, with the unbiased variance.

    A batch of one site counts with its biased variance; one without sites changes nothing.
    """
    unbiased = batch.statistics.var * batch.num_sites / jnp.maximum(batch.num_sites - 1, 1)
    rate = jnp.where(batch.num_sites > 0, momentum, 0.0)
    return Statistics(
        (1 - rate) * running.mean + rate * batch.statistics.mean, (1 - rate) * running.var + rate * unbiased
    )


def instance_norm(
    x: SparseTensor, scale: Float[Array, " c"], bias: Float[Array, " c"], eps: float = 1e-8
) -> SparseTensor:
    """Normalise each scan's channels over its own active sites, with the biased variance."""
    scan, num_scans = x.sites.scan, x.sites.num_scans
    counts = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(x.features[:, :1]), scan, num_scans), 1)

    def mean(rows: Array) -> Array:
        means = jax.ops.segment_sum(rows, scan, num_scans) / counts
        return means.at[scan].get(mode="fill", fill_value=0)

    centred = x.features - mean(x.features)
    y = centred * lax.rsqrt(mean(centred**2) + eps) * scale + bias
    return x.with_features(jnp.where(x.sites.valid[:, None], y, 0))


class BatchNorm(nnx.Module):
    """Batch norm over the active sites: scale and bias shared by all datasets, running statistics per dataset.

    Attributes:
        scale: [C].
        bias: [C].
        mean: running mean, [D, C].
        var: running variance, [D, C].
    """

    def __init__(self, channels: int, *, num_datasets: int = 1, eps: float = 1e-5, momentum: float = 0.1):
        """Args: `momentum` is the weight of the new batch in the running statistics."""
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros((num_datasets, channels)), dataset_axis=0)
        self.var = nnx.BatchStat(jnp.ones((num_datasets, channels)), dataset_axis=0)
        self.eps, self.momentum = eps, momentum

    def __call__(
        self,
        x: SparseTensor,
        dataset: DatasetContext | None = None,
        *,
        training: bool = False,
        axis_name: AxisName = None,
    ) -> SparseTensor:
        """Normalise; in training with the batch's statistics, which also enter the dataset's running ones.

        Args:
            x: features and sites.
            dataset: whose running statistics; may be left out with one dataset.
            training: see above.
            axis_name: mesh axis over which the dataset's batch is spread.
        """
        dataset = dataset if dataset is not None else DatasetContext.mean(self.mean.shape[0])
        valid = x.sites.valid
        if not training:
            used = Statistics(dataset.pick(self.mean[...]), dataset.pick(self.var[...]))
        else:
            batch = batch_statistics(x.features, valid, axis_name)
            used = batch.statistics
            self._remember(batch, dataset)
        features = normalize(x.features, valid, used, self.scale[...], self.bias[...], self.eps)
        return x.with_features(features)

    def _remember(self, batch: BatchStatistics, dataset: DatasetContext) -> None:
        batch = jax.tree.map(lax.stop_gradient, batch)
        new = update_running(Statistics(self.mean[...], self.var[...]), batch, self.momentum)
        own = jnp.asarray(dataset.weights)[:, None] > 0
        self.mean[...] = jnp.where(own, new.mean, self.mean[...])
        self.var[...] = jnp.where(own, new.var, self.var[...])
