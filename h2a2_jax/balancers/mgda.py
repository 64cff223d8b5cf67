"""MGDA: the shortest convex combination of the datasets' gradients."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.active_sets import everyone, solve_on_subsets, subsets, tolerance
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer


def mgda(
    num_datasets: int,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiple-gradient descent algorithm (MGDA): the step's gradient is the shortest one in the convex hull.

        w = argmin |sum_k w_k g_k|^2,   w >= 0,   sum_k w_k = 1

    It has the same product with every gradient of weight above zero and at least that with the others, so that no loss
    rises to first order. Small gradients get large weights. At a Pareto stationary point the gradient is zero.

    Arguments, `update` and choices are those of `gramian_balancer`.

    References:
        Désidéri, Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective Optimization, C. R. Math. 350 (2012);
        Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018, whose Frank-Wolfe solver
        `mgda_weights` replaces by an exact one.
    """

    def weigh(situation: Situation) -> Array:
        return mgda_weights(situation.gramian, situation.active)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of)


def mgda_weights(gramian: Float[Array, "k k"], active: Bool[Array, " k"] | None = None) -> Float[Array, " k"]:
    """Weights of the point of least norm, sum 1; zero for datasets that are not active.

    Exact up to rounding: on each face of the simplex w is proportional to (G + c 1 1^T)^-1 1, which is regular for
    gradients of which none is an affine combination of the others, and the best face with w >= 0 is taken. Where the
    point of least norm has several weights, as with equal gradients, a smallest set of datasets has it.

    Args:
        gramian: dot products of the datasets' gradients.
        active: datasets that take part; all by default.

    Raises:
        ValueError: there are more than 12 datasets.
    """
    members = subsets(len(gramian))[1:]
    active = everyone(gramian, active)
    largest = jnp.max(jnp.where(active, jnp.diagonal(gramian), 0))
    gramian = gramian / jnp.where(largest == 0, 1, largest)
    # With the sum of weights at 1, the shift by c = 1 adds a constant to the squared norm.
    right = jnp.ones((len(members), len(gramian), 1), gramian.dtype)
    solution, regular = solve_on_subsets(gramian + 1, right, members)
    weights = solution[..., 0] / jnp.where(regular, jnp.sum(solution[..., 0], axis=1), 1)[:, None]
    possible = regular & jnp.all(weights >= -tolerance(gramian), axis=1) & jnp.all(active | ~members, axis=1)
    weights = jnp.maximum(weights, 0)
    weights = weights / jnp.where(possible, jnp.sum(weights, axis=1), 1)[:, None]
    squares = jnp.einsum("si,ij,sj->s", weights, gramian, weights)
    best = weights[jnp.argmin(jnp.where(possible, squares, jnp.inf))]
    return jnp.where(active, best, 0)
