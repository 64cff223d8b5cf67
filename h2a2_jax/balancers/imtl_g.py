"""IMTL-G: the gradient with equal projections onto the datasets' gradients."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.active_sets import everyone, pseudo_inverse, tolerance
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer


def imtl_g(
    num_datasets: int,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Impartial multi-task learning (IMTL-G): every dataset's gradient has the same projection of the step's gradient.

        <d, g_k> / |g_k| equal for all k,   d = sum_k w_k g_k,   sum_k w_k = 1

    Weights may be negative.

    Arguments, `update` and choices are those of `gramian_balancer`.

    References:
        Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, in the form of Quinton and Rey, Jacobian Descent
        for Multi-Objective Optimization, arXiv 2406.16232, which allows for dependent gradients.
    """

    def weigh(situation: Situation) -> Array:
        return imtl_g_weights(situation.gramian, situation.active)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of)


def imtl_g_weights(
    gramian: Float[Array, "k k"], active: Bool[Array, " k"] | None = None, *, sum_eps: float = 1e-12
) -> Float[Array, " k"]:
    """Weights v / sum(v) with v = G^+ n, n the norms; zero for datasets that are not active.

    Args:
        gramian: dot products of the datasets' gradients.
        active: datasets that take part; all by default.
        sum_eps: |sum(v)| below which all weights are zero, as in TorchJD; below its own rounding error they are, too.
    """
    active = everyone(gramian, active)
    gramian = jnp.where(active[:, None] & active, gramian, 0)
    values = pseudo_inverse(gramian) @ jnp.sqrt(jnp.diagonal(gramian))
    total = jnp.sum(values)
    found = jnp.abs(total) >= jnp.maximum(sum_eps, tolerance(gramian) * jnp.sum(jnp.abs(values)))
    return jnp.where(active & found, values / jnp.where(found, total, 1), 0)
