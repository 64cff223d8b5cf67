"""Weights that look at nothing: tuned ones that stay, and ones drawn anew in every step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.balancers.loss_weighting import loss_balancer, softmax_of


class WeightsState(NamedTuple):
    """State of fixed and of random weights; equal on every device.

    Attributes:
        steps: number of steps done, int32.
        scales: float32 [K], factors that the last step multiplied the gradients by.
    """

    steps: Int[Array, ""]
    scales: Float[Array, " datasets"]


def fixed_weights(weights: Sequence[float], axis_name: str | None = None) -> optax.GradientTransformationExtraArgs:
    """Fixed weights: dataset k's gradient is multiplied by K w_k / sum_j w_j.

    The mean of the factors over all datasets is 1, so that a change of unit of the weights changes neither the length
    of the gradient nor its clipping. Datasets that are absent in a step leave the others' factors as they are.

    `update` takes `present` and ignores `losses`.

    Args:
        weights: one for each dataset on all devices, 0 or more, not all 0.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, or gradients hold another number of datasets.
    """
    given = np.asarray(weights, np.float64)
    if given.size == 0 or not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
        raise ValueError(f"fixed weights are {tuple(weights)}; give one for each dataset, from 0, not all of them 0")
    factors = jnp.asarray(given * len(given) / given.sum(), jnp.float32)
    return _weights(lambda steps, present: factors, len(given), axis_name)


def random_weights(
    num_datasets: int, seed: int = 0, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Random loss weighting (RLW): in every step the softmax of standard normal numbers, times the number of datasets.

    The softmax is over the datasets of the step, and their factors have the mean 1.

    `update` takes `present` and ignores `losses`.

    Args:
        num_datasets: number of datasets on all devices.
        seed: seed of the numbers, which differ from step to step.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    Raises:
        ValueError: gradients do not hold `num_datasets` datasets.

    References:
        Lin et al., Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning, TMLR 2022.
    """

    def draw(steps: Array, present: Array) -> Array:
        return draw_weights(jax.random.fold_in(jax.random.key(seed), steps), present) * jnp.sum(present)

    return _weights(draw, num_datasets, axis_name)


def draw_weights(key: Array, present: Bool[Array, " datasets"]) -> Float[Array, " datasets"]:
    """Softmax of standard normal numbers over the datasets that are present, zero for the others."""
    return softmax_of(jax.random.normal(key, present.shape, jnp.float32), present)


def _weights(
    find: Callable[[Array, Array], Array], num_datasets: int, axis_name: str | None
) -> optax.GradientTransformationExtraArgs:
    """Transformation with factors by the number of the step and the datasets that are present."""

    def start() -> WeightsState:
        return WeightsState(jnp.zeros((), jnp.int32), jnp.ones(num_datasets, jnp.float32))

    def advance(state: WeightsState, losses: Array, present: Array) -> WeightsState:
        return WeightsState(state.steps + 1, find(state.steps, present))

    return loss_balancer(start, advance, num_datasets, axis_name)
