"""Uncertainty weighting: each loss divided by a variance that is learned along."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.loss_weighting import loss_balancer


class UncertaintyState(NamedTuple):
    """Learned variances; float32, equal on every device.

    Attributes:
        log_variances: [K], s_k of the next step; 0 at the start.
        scales: [K], factors that the last step multiplied the gradients by.
    """

    log_variances: Float[Array, " datasets"]
    scales: Float[Array, " datasets"]


def uncertainty(
    num_datasets: int, learning_rate: float = 0.025, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Uncertainty weighting: dataset k's gradient is multiplied by exp(-s_k), s_k the logarithm of a variance.

    The loss is the mean of exp(-s_k) L_k + s_k, and s_k takes a step of gradient descent on half of its own term,

        s_k <- s_k - learning_rate (1 - exp(-s_k) L_k) / 2

    Choices: the published sum of halves is twice that mean over K, so that the factors start at 1. Log variances have
    a learning rate of their own, without momentum. A step upwards ends at the minimum s_k = log L_k, which it would
    pass where a loss is many times the variance. Datasets without a loss in a step keep s_k.

    `update` is that of `h2a2_jax.balancers.loss_weighting.loss_balancer`.

    Args:
        num_datasets: number of datasets on all devices.
        learning_rate: learning rate of the log variances.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    References:
        Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics, CVPR 2018.
    """

    def start() -> UncertaintyState:
        return UncertaintyState(jnp.zeros(num_datasets, jnp.float32), jnp.ones(num_datasets, jnp.float32))

    def advance(state: UncertaintyState, losses: Array, counts: Array) -> UncertaintyState:
        variances = next_log_variances(state.log_variances, losses, counts, learning_rate=learning_rate)
        return UncertaintyState(variances, jnp.exp(-state.log_variances))

    return loss_balancer(start, advance, num_datasets, axis_name, needed_by="Uncertainty weighting")


def next_log_variances(
    log_variances: Float[Array, " datasets"],
    losses: Float[Array, " datasets"],
    counts: Bool[Array, " datasets"],
    *,
    learning_rate: float,
) -> Float[Array, " datasets"]:
    """Log variances after a step, by the equation of `uncertainty`."""
    losses = jnp.where(counts, losses, 1)
    moved = log_variances - learning_rate * (1 - jnp.exp(-log_variances) * losses) / 2
    moved = jnp.minimum(moved, jnp.maximum(log_variances, jnp.log(losses)))
    return jnp.where(counts, moved, log_variances).astype(log_variances.dtype)
