"""GradNorm: learned weights of the datasets, which bring gradient norms in line with learning speeds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from h2a2_jax.balancers.dataset_axis import (
    SMALLEST_NORM,
    check_datasets,
    dataset_norms,
    gather_datasets,
    keep_present,
    local_rows,
    per_dataset,
)

_SMALLEST_WEIGHT = 0.01
"""Weights stay at least this large before they are brought to their sum."""


class GradNormState(NamedTuple):
    """Learned weights and first losses; float32, equal on every device.

    Attributes:
        weights: [K], factors of the next step's gradients; their sum is K.
        first_losses: [K], loss of each dataset in the first step that it took part in; 0 until then.
        scales: [K], factors that the last step multiplied the gradients by.
    """

    weights: Float[Array, " datasets"]
    first_losses: Float[Array, " datasets"]
    scales: Float[Array, " datasets"]


def gradnorm(
    num_datasets: int, alpha: float = 1.5, learning_rate: float = 0.025, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """GradNorm: dataset k's gradient g_k is multiplied by a weight w_k that is learned along.

    With n_k = |g_k| over all shared parameters, L_k the loss and L_k(0) that of the dataset's first step, a step takes

        r_k = (L_k / L_k(0)) / mean_j (L_j / L_j(0))       relative inverse training rate: above 1 for a slow dataset
        d_k = sign(w_k n_k - mean_j (w_j n_j) r_k^alpha)   too large or too small
        w_k <- w_k - learning_rate d_k n_k / mean_j n_j    then all to the sum K

    d_k n_k is the derivative of the published loss sum_k |w_k n_k - target_k| with the targets held constant. Choices
    where the publication is open, or assumes one network layer and no absent datasets:

    - The derivative is divided by the mean norm, so that a step does not depend on the unit of the gradients, and the
      weights take plain gradient descent.
    - Norms are over all shared parameters, not over a chosen layer. Exclusive parameters, which AdamW makes
      indifferent to a factor, keep their gradients.
    - A dataset is active if it took part in the step with a norm of at least 1e-12 and a loss above 0, both finite.
      Means are over active ones. The others keep their weights, and the active ones share the rest of K; with fewer
      than two active, all keep theirs.
    - A weight stays above 0: it is at least 0.01 before weights are brought to their sum.

    The step multiplies by the weights from before the update. `update` is called like that of
    `norm_gradient_harmonization`, and needs `losses`.

    Args:
        num_datasets: number of datasets on all devices.
        alpha: strength with which slow datasets get larger gradients; 0 asks for equal norms.
        learning_rate: learning rate of the weights.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    Raises:
        ValueError: gradients do not hold `num_datasets` datasets, or `losses` are missing.

    References:
        Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks, ICML 2018.
    """

    def init(params: PyTree) -> GradNormState:
        del params
        ones = jnp.ones(num_datasets, jnp.float32)
        return GradNormState(ones, jnp.zeros(num_datasets, jnp.float32), ones)

    def update(
        grads: PyTree[Float[Array, "local ..."]],
        state: GradNormState,
        params: PyTree | None = None,
        *,
        present: Bool[Array, " local"],
        losses: Float[Array, " local"] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Float[Array, "local ..."]], GradNormState]:
        del params, extra_args
        check_datasets(grads, present, num_datasets, axis_name)
        if losses is None:
            raise ValueError("GradNorm compares the datasets' losses and was given none; pass `losses` [local]")
        own_norms = jnp.stack([dataset_norms(leaf) for leaf in jax.tree.leaves(grads)], axis=1)
        # Norms of absent datasets are zero, which makes these inactive.
        own = jnp.stack([dataset_norms(own_norms), losses.astype(own_norms.dtype)], axis=1)
        norms, losses = gather_datasets(jnp.where(present[:, None], own, 0), num_datasets, axis_name).T
        weights, first_losses = update_weights(
            state.weights, state.first_losses, norms, losses, alpha=alpha, learning_rate=learning_rate
        )
        factors = local_rows(state.weights, present.shape[0], axis_name)
        updates = jax.tree.map(lambda leaf: keep_present(leaf * per_dataset(factors, leaf), present), grads)
        return updates, GradNormState(weights, first_losses, state.weights)

    return optax.GradientTransformationExtraArgs(init, update)


def update_weights(
    weights: Float[Array, " datasets"],
    first_losses: Float[Array, " datasets"],
    norms: Float[Array, " datasets"],
    losses: Float[Array, " datasets"],
    *,
    alpha: float,
    learning_rate: float,
) -> tuple[Float[Array, " datasets"], Float[Array, " datasets"]]:
    """Weights and first losses after a step, by the equations of `gradnorm`."""
    active = (norms >= SMALLEST_NORM) & jnp.isfinite(norms) & (losses > 0) & jnp.isfinite(losses)
    count = jnp.maximum(jnp.sum(active), 1)

    def mean(values: Array) -> Array:
        return jnp.sum(jnp.where(active, values, 0)) / count

    first_losses = jnp.where(active & (first_losses == 0), losses, first_losses).astype(jnp.float32)
    ratios = jnp.where(active, losses, 1) / jnp.where(active, first_losses, 1)
    norms = jnp.where(active, norms, 1)
    excess = weights * norms - mean(weights * norms) * (ratios / mean(ratios)) ** alpha
    moved = jnp.maximum(weights - learning_rate * jnp.sign(excess) * norms / mean(norms), _SMALLEST_WEIGHT)
    share = len(weights) - jnp.sum(jnp.where(active, 0, weights))
    moved = moved * share / jnp.sum(jnp.where(active, moved, 0))
    return jnp.where(active & (count >= 2), moved, weights).astype(jnp.float32), first_losses
