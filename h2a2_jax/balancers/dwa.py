"""Dynamic weight average (DWA): larger weights for losses that fall slowly."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from h2a2_jax.balancers.loss_weighting import loss_balancer, softmax_of


class DWAState(NamedTuple):
    """Average losses of the windows; float32, equal on every device.

    Attributes:
        steps: steps done in the present window, int32.
        sums: [K], sums of the losses in the present window.
        counts: [K], steps of the present window that each dataset took part in.
        last: [K], mean losses of the last window; 0 for a dataset without one.
        before: [K], mean losses of the window before.
        scales: [K], factors that the last step multiplied the gradients by.
    """

    steps: Int[Array, ""]
    sums: Float[Array, " datasets"]
    counts: Float[Array, " datasets"]
    last: Float[Array, " datasets"]
    before: Float[Array, " datasets"]
    scales: Float[Array, " datasets"]


def dwa(
    num_datasets: int, window: int = 50, temperature: float = 2.0, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Dynamic weight average: gradients are multiplied by K softmax(r / temperature), r the ratios of average losses.

        r_k = (mean loss of dataset k in the last window) / (that in the window before)

    Choices: averages are over `window` steps, where the paper takes epochs, of which the datasets have several lengths.
    The softmax is over the datasets of the step, and their factors have the mean 1. A dataset takes the ratio 1 until
    it has two averages, as in the first two windows; one that was absent for a whole window keeps its averages.

    `update` is that of `h2a2_jax.balancers.loss_weighting.loss_balancer`.

    Args:
        num_datasets: number of datasets on all devices.
        window: steps of an average.
        temperature: a large one makes the factors equal; the paper uses 2.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    References:
        Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019, equation 7.
    """

    def start() -> DWAState:
        zeros = jnp.zeros(num_datasets, jnp.float32)
        return DWAState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, zeros, jnp.ones(num_datasets, jnp.float32))

    def advance(state: DWAState, losses: Array, counts: Array) -> DWAState:
        scales = softmax_of(loss_ratios(state.last, state.before) / temperature, counts) * jnp.sum(counts)
        steps, sums, seen = state.steps + 1, state.sums + losses.astype(jnp.float32), state.counts + counts
        full = steps >= window
        averaged = full & (seen > 0)
        return DWAState(
            jnp.where(full, 0, steps),
            jnp.where(full, 0, sums),
            jnp.where(full, 0, seen),
            jnp.where(averaged, sums / jnp.maximum(seen, 1), state.last),
            jnp.where(averaged, state.last, state.before),
            scales,
        )

    return loss_balancer(start, advance, num_datasets, axis_name, needed_by="DWA")


def loss_ratios(last: Float[Array, " datasets"], before: Float[Array, " datasets"]) -> Float[Array, " datasets"]:
    """Ratios of average losses; 1 for a dataset that lacks one of them."""
    known = (last > 0) & (before > 0)
    return jnp.where(known, last / jnp.where(known, before, 1), 1)
