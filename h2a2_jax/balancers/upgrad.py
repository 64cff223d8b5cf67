"""UPGrad and DualProj: gradients projected onto the cone in which no dataset's loss rises."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.active_sets import everyone, normalize_gramian, solve_on_subsets, subsets, uniform_weights
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer


def upgrad(
    num_datasets: int,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Unconflicting projection of gradients (UPGrad): the mean of gradients that are projected one by one.

    Each g_k is projected onto the dual cone {d : <g_j, d> >= 0 for all j}, and the step takes the mean of the
    projections. Without conflicts it is the plain mean.

    Arguments, `update` and choices are those of `gramian_balancer`.

    References:
        Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232.
    """

    def weigh(situation: Situation) -> Array:
        return upgrad_weights(situation.gramian, situation.active)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of)


def dual_proj(
    num_datasets: int,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Projection of the mean gradient onto the dual cone of the datasets' gradients (DualProj, GEM).

    Arguments, `update` and choices are those of `gramian_balancer`.

    References:
        Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017, equation 11.
    """

    def weigh(situation: Situation) -> Array:
        return dual_proj_weights(situation.gramian, situation.active)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of)


def upgrad_weights(
    gramian: Float[Array, "k k"],
    active: Bool[Array, " k"] | None = None,
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
) -> Float[Array, " k"]:
    """Weights of the mean of the projected gradients; zero for datasets that are not active.

    Args:
        gramian: dot products of the datasets' gradients.
        active: datasets that take part; all by default.
        norm_eps: see `project_weights`.
        reg_eps: see `project_weights`.

    Raises:
        ValueError: there are more than 12 datasets.
    """
    active = everyone(gramian, active)
    targets = jnp.diag(uniform_weights(gramian, active))
    gramian = jnp.where(active[:, None] & active, gramian, 0)
    return jnp.sum(project_weights(gramian, targets, norm_eps=norm_eps, reg_eps=reg_eps), axis=0)


def dual_proj_weights(
    gramian: Float[Array, "k k"],
    active: Bool[Array, " k"] | None = None,
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
) -> Float[Array, " k"]:
    """Weights of the projected mean; zero for datasets that are not active. Arguments are those of `upgrad_weights`."""
    active = everyone(gramian, active)
    targets = uniform_weights(gramian, active)[None]
    gramian = jnp.where(active[:, None] & active, gramian, 0)
    return project_weights(gramian, targets, norm_eps=norm_eps, reg_eps=reg_eps)[0]


def project_weights(
    gramian: Float[Array, "k k"], targets: Float[Array, "n k"], *, norm_eps: float = 1e-4, reg_eps: float = 1e-4
) -> Float[Array, "n k"]:
    """Weights v of combinations of gradients after projection onto their dual cone.

    The projection of sum_k u_k g_k is sum_k v_k g_k with v the minimum of v^T G v over v >= u. For each set of free
    weights, the others at their bounds, v is the solution of a linear system; the set that violates v >= u and G v >= 0
    the least is taken. Exact up to rounding.

    Args:
        gramian: dot products of the datasets' gradients.
        targets: u, one problem a row.
        norm_eps: trace of the Gramian below which nothing is projected.
        reg_eps: added to the diagonal of the Gramian over its trace, as in TorchJD; it makes the problem strictly
            convex, and lets <g_j, d> fall below zero by as much.
    """
    free = subsets(len(gramian))
    gramian = normalize_gramian(gramian, norm_eps) + reg_eps * jnp.eye(len(gramian), dtype=gramian.dtype)
    bound = jnp.where(free[:, None], 0, targets)  # [sets, n, k]
    right = -jnp.einsum("ij,snj->sin", gramian, bound)
    solution, _ = solve_on_subsets(gramian, right, free)
    values = bound + jnp.swapaxes(solution, 1, 2)
    below = jnp.where(free[:, None], targets - values, 0)
    against = jnp.where(free[:, None], 0, -jnp.einsum("ij,snj->sni", gramian, values))
    best = jnp.argmin(jnp.max(jnp.maximum(below, against), axis=2), axis=0)
    return jnp.maximum(values[best, jnp.arange(len(targets))], targets)
