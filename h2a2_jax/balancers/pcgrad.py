"""PCGrad: projection of each dataset's gradient off the gradients that it conflicts with."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from h2a2_jax.balancers.active_sets import everyone
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer


def pcgrad(
    num_datasets: int,
    seed: int = 0,
    axis_name: str | None = None,
    *,
    scope: Scope = "global",
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Projecting conflicting gradients (PCGrad).

    Every dataset i starts from its own gradient g_i' = g_i and goes through the others in a random order; where
    g_i' . g_j < 0 it loses its part along g_j:

        g_i' <- g_i' - (g_i' . g_j) / |g_j|^2 g_j

    g_j being the gradient before any projection. The mean of the g_i' is then the gradient of the step.

    Each g_i' is a combination sum_j c_ij g_j, and the dot products that decide are those of the g_j. As only the mean
    is wanted, sum_i g_i' = sum_j (sum_i c_ij) g_j: each gradient is multiplied by a column sum and `mean_over_datasets`
    gives PCGrad's mean, though the single updates are not the g_i'. A c_ij of i != j is set only at a conflict, to a
    positive number: factors are at least 1.

    Arguments but `seed`, `update` and choices are those of `gramian_balancer`; inactive datasets conflict with none.

    Args:
        num_datasets: number of datasets on all devices.
        seed: seed of the orders, which differ from step to step and from dataset to dataset.
        axis_name: mesh axis of the datasets.
        scope: gradients that are compared; the paper compares whole gradients.
        group_of: group of a parameter by its path.

    References:
        Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, algorithm 1.
    """

    def weigh(situation: Situation) -> Array:
        return pcgrad_weights(situation.gramian, random_orders(situation.key, num_datasets), situation.active)

    return gramian_balancer(
        weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of, sums=True, seed=seed
    )


def pcgrad_weights(
    gramian: Float[Array, "k k"], orders: Int[Array, "k k"], active: Bool[Array, " k"] | None = None
) -> Float[Array, " k"]:
    """Weights of the sum of the projected gradients; 1 for gradients of zero, 0 for datasets that are not active.

    Args:
        gramian: dot products of the datasets' gradients.
        orders: order of the other datasets for each dataset (row), whose own number is skipped.
        active: datasets that take part; all by default.
    """
    active = everyone(gramian, active)
    norms = jnp.sqrt(jnp.diagonal(gramian))
    conflicting = active & (norms > 0)
    norms = jnp.where(conflicting, norms, 1)
    cosines = jnp.where(conflicting[:, None] & conflicting, gramian / (norms[:, None] * norms), 0)
    # Between unit vectors up to here; without conflicts the weights are exactly 1.
    ratios = jnp.where(jnp.eye(len(norms), dtype=bool), 1, norms[:, None] / norms)
    coefficients = project_conflicts(cosines, orders) * ratios
    return jnp.where(active, jnp.sum(coefficients, axis=0), 0)


def random_orders(key: Key[Array, ""], num_datasets: int) -> Int[Array, "datasets datasets"]:
    """Random order in which each dataset (row) goes through all of them."""
    draws = jax.random.uniform(key, (num_datasets, num_datasets))
    return jnp.argsort(draws, axis=1)


def project_conflicts(
    cosines: Float[Array, "datasets datasets"], orders: Int[Array, "datasets datasets"]
) -> Float[Array, "datasets datasets"]:
    """Coefficients of unit gradients after all projections: row i gives g_i' / |g_i| in terms of g_j / |g_j|.

    Args:
        cosines: cosines between the datasets' gradients, zero for datasets without conflicts.
        orders: order of the other datasets for each dataset (row), whose own number is skipped.
    """
    datasets = jnp.arange(len(cosines))

    def project(turn: Array, coefficients: Array) -> Array:
        other = orders[:, turn]
        along = jnp.sum(coefficients * cosines[other], axis=1)
        conflict = (along < 0) & (other != datasets)
        return coefficients.at[datasets, other].add(-jnp.where(conflict, along, 0))

    return jax.lax.fori_loop(0, len(cosines), project, jnp.eye(len(cosines), dtype=cosines.dtype))
