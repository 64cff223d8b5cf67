"""FAMO: losses that fall at one rate, from the losses alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.loss_weighting import loss_balancer, softmax_of

_FIRST, _SECOND, _EPS = 0.9, 0.999, 1e-8
"""Decays and epsilon of Adam."""


class FAMOState(NamedTuple):
    """Learned logits and their Adam; float32 [K], equal on every device.

    Attributes:
        logits: logits of the weights, 0 at the start.
        first: first moments of Adam.
        second: second moments of Adam.
        updates: number of updates of each logit.
        losses: loss of each dataset in the last step that it took part in; 0 until then.
        scales: factors that the last step multiplied the gradients by.
    """

    logits: Float[Array, " datasets"]
    first: Float[Array, " datasets"]
    second: Float[Array, " datasets"]
    updates: Float[Array, " datasets"]
    losses: Float[Array, " datasets"]
    scales: Float[Array, " datasets"]


def famo(
    num_datasets: int,
    learning_rate: float = 0.025,
    weight_decay: float = 1e-3,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fast adaptive multitask optimisation (FAMO): the mean of log losses, weighted so that all fall at one rate.

    With z = softmax(logits), gradients are weighed by z_k / L_k over the sum of these, times the number of datasets.
    The logits follow the fall of the log losses: Adam takes a step against the derivative of sum_k z_k delta_k,

        delta_k = log L_k(before) - log L_k(after)

    so that a dataset whose loss fell more than the others' loses weight.

    Choices: "after" is the loss in the next step that the dataset takes part in, on other scans, in place of a second
    forward pass through the same ones: with losses that vary from batch to batch delta is noisy, and its mean is the
    fall over the steps between. The softmax is over the datasets of the step. Datasets without a new fall keep logit
    and moments, and each logit's Adam counts its own updates.

    `update` is that of `h2a2_jax.balancers.loss_weighting.loss_balancer`.

    Args:
        num_datasets: number of datasets on all devices.
        learning_rate: learning rate of Adam.
        weight_decay: decay of the logits, added to their gradient; 1e-3 as in the paper's algorithm 2.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    References:
        Liu et al., FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023.
    """

    def start() -> FAMOState:
        zeros = jnp.zeros(num_datasets, jnp.float32)
        return FAMOState(zeros, zeros, zeros, zeros, zeros, jnp.ones(num_datasets, jnp.float32))

    def advance(state: FAMOState, losses: Array, counts: Array) -> FAMOState:
        losses = losses.astype(jnp.float32)
        state = update_logits(state, losses, counts, learning_rate=learning_rate, weight_decay=weight_decay)
        scales = famo_weights(state.logits, losses, counts) * jnp.sum(counts)
        return state._replace(losses=jnp.where(counts, losses, state.losses), scales=scales)

    return loss_balancer(start, advance, num_datasets, axis_name, needed_by="FAMO")


def famo_weights(
    logits: Float[Array, " datasets"], losses: Float[Array, " datasets"], counts: Bool[Array, " datasets"]
) -> Float[Array, " datasets"]:
    """Weights z_k / L_k over their sum; zero for datasets that do not count."""
    return softmax_of(logits - jnp.log(jnp.where(counts, losses, 1)), counts)


def update_logits(
    state: FAMOState,
    losses: Float[Array, " datasets"],
    counts: Bool[Array, " datasets"],
    *,
    learning_rate: float,
    weight_decay: float,
) -> FAMOState:
    """The state after Adam's step on the logits, for the losses that follow those of the state."""
    fell = counts & (state.losses > 0)
    fall = jnp.where(fell, jnp.log(jnp.where(fell, state.losses, 1)) - jnp.log(jnp.where(fell, losses, 1)), 0)
    weights = softmax_of(state.logits, fell)
    slope = weights * (fall - jnp.sum(weights * fall)) + weight_decay * state.logits
    first = _FIRST * state.first + (1 - _FIRST) * slope
    second = _SECOND * state.second + (1 - _SECOND) * slope**2
    updates = state.updates + 1
    size = jnp.sqrt(second / (1 - _SECOND**updates)) + _EPS
    logits = state.logits - learning_rate * first / (1 - _FIRST**updates) / size
    new = FAMOState(logits, first, second, updates, state.losses, state.scales)
    return jax.tree.map(lambda new, old: jnp.where(fell, new, old), new, state)
