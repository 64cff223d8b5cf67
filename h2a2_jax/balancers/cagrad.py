"""CAGrad: the gradient near the mean that serves the worst-off dataset best."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.active_sets import (
    everyone,
    normalize_gramian,
    solve_on_subsets,
    subsets,
    tolerance,
    uniform_weights,
)
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer
from h2a2_jax.balancers.mgda import mgda_weights


def cagrad(
    num_datasets: int,
    c: float = 0.4,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Conflict-averse gradient descent (CAGrad): the best gradient for the worst-off dataset within a ball.

        maximise min_k <g_k, d>   over   |d - g_0| <= c |g_0|,   g_0 the mean of the gradients

    With c = 0 it is the mean; the paper proves convergence to a minimum of the mean loss for c < 1, and with c growing
    the result nears MGDA's direction.

    Arguments but `c`, `update` and choices are those of `gramian_balancer`.

    Args:
        num_datasets: number of datasets on all devices.
        c: radius of the ball, relative to the norm of the mean; the paper uses 0.2 to 0.5.
        scope: gradients that are compared.
        axis_name: mesh axis of the datasets.
        group_of: group of a parameter by its path.

    References:
        Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, algorithm 1 without the
        rescaling by 1 / (1 + c^2) of its code.
    """

    def weigh(situation: Situation) -> Array:
        return cagrad_weights(situation.gramian, situation.active, c=c)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of)


def cagrad_weights(
    gramian: Float[Array, "k k"], active: Bool[Array, " k"] | None = None, *, c: float = 0.4, norm_eps: float = 1e-4
) -> Float[Array, " k"]:
    """Weights 1 / K + z_k of the gradients, zero for datasets that are not active.

    The dual of the problem is a minimum over the simplex, of <g_0, g_w> + c |g_0| |g_w| with g_w = sum_k w_k g_k, and
    z = c |g_0| / |g_w| w. On each face all <g_k, g_0 + g_z> are equal and |g_z| = c |g_0|, which is a quadratic
    equation for that number; the best face with z >= 0 is taken. Exact up to rounding.

    Args:
        gramian: dot products of the datasets' gradients.
        active: datasets that take part; all by default.
        c: radius of the ball, relative to the norm of the mean.
        norm_eps: with the Gramian divided by its trace, |g_w| below which gradients count as Pareto stationary and all
            weights are zero, as in TorchJD; they are zero, too, if the trace is below it.

    Raises:
        ValueError: there are more than 12 datasets.
    """
    members = subsets(len(gramian))[1:]
    active = everyone(gramian, active)
    gramian = normalize_gramian(jnp.where(active[:, None] & active, gramian, 0), norm_eps)
    mean = uniform_weights(gramian, active)
    products = gramian @ mean
    radius = c * jnp.sqrt(jnp.maximum(mean @ products, 0))

    right = jnp.broadcast_to(jnp.stack([jnp.ones_like(products), products], axis=1), (*members.shape, 2))
    solution, regular = solve_on_subsets(gramian, right, members)
    for_ones, for_products = solution[..., 0], solution[..., 1]
    total, linear = jnp.sum(for_ones, axis=1), jnp.sum(for_products, axis=1)
    under_root = linear**2 - total * (for_products @ products - radius**2)
    possible = regular & (under_root >= 0) & jnp.all(active | ~members, axis=1)
    root = jnp.sqrt(jnp.where(possible, under_root, 0))
    level = (linear + jnp.stack([root, -root])) / jnp.where(possible, total, 1)
    shifts = (level[..., None] * for_ones - for_products).reshape(-1, len(gramian))
    sums = jnp.sum(shifts, axis=1)
    possible = jnp.tile(possible, 2) & (sums > 0)
    possible &= jnp.all(shifts >= -tolerance(gramian) * jnp.max(jnp.abs(shifts), axis=1, keepdims=True), axis=1)
    on_faces = jnp.maximum(shifts, 0) / jnp.where(possible, sums, 1)[:, None]
    # Where the minimum is at g_w = 0, no face has it.
    weights = jnp.concatenate([on_faces, mgda_weights(gramian, active)[None]])
    possible = jnp.append(possible, True)

    norms = jnp.sqrt(jnp.maximum(jnp.einsum("si,ij,sj->s", weights, gramian, weights), 0))
    best = jnp.argmin(jnp.where(possible, weights @ products + radius * norms, jnp.inf))
    norm = norms[best]
    ascent = jnp.where(norm < norm_eps, 0, mean + radius / jnp.where(norm < norm_eps, 1, norm) * weights[best])
    return jnp.where(radius > 0, ascent, jnp.where(jnp.trace(gramian) > 0, mean, 0))
