"""Nash-MTL: the bargaining solution among the datasets."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.active_sets import everyone
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer

_MOST_STEPS = 100
"""Newton steps at most; some ten are enough where gradients do not cancel."""


def nash_mtl(
    num_datasets: int,
    max_norm: float = 1.0,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Nash bargaining among the datasets (Nash-MTL): weights w > 0 with G w = 1 / w, G the Gramian.

    The step's gradient is sum_k w_k g_k, of norm sqrt(K) whatever the gradients are, shortened to `max_norm` as in the
    published code. Weights are found anew in every step.

    Arguments but `max_norm`, `update` and choices are those of `gramian_balancer`.

    Args:
        num_datasets: number of datasets on all devices.
        max_norm: largest norm of the step's gradient (in scopes other than "global": of each group's); 0: any.
        scope: gradients that are compared.
        axis_name: mesh axis of the datasets.
        group_of: group of a parameter by its path.

    References:
        Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022.
    """

    def weigh(situation: Situation) -> Array:
        return nash_mtl_weights(situation.gramian, situation.active, max_norm=max_norm, unit=situation.unit)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of)


def nash_mtl_weights(
    gramian: Float[Array, "k k"],
    active: Bool[Array, " k"] | None = None,
    *,
    max_norm: float = 1.0,
    unit: Float[Array, ""] | float = 1.0,
) -> Float[Array, " k"]:
    """Weights w > 0 with G w = 1 / w; zero for datasets that are not active and for gradients of zero.

    With C the matrix of cosines and n the norms, w = a / n where a is the minimum of the convex, self-concordant
    function a^T C a / 2 - sum_k log a_k. Damped Newton steps find it from any start, to rounding: |w (G w) - 1| is some
    1e-14 in float64. At a Pareto stationary point there is no minimum; K eps on the diagonal bounds a there, by some
    1e3 in float32, and the step's gradient is nearly zero. TorchJD solves a sequence of convex problems that ends
    at |G w - 1 / w| < 1e-3 and starts from the last weights.

    Args:
        gramian: dot products of the datasets' gradients, in units of `unit` squared.
        active: datasets that take part; all by default.
        max_norm: largest norm of sum_k w_k g_k; 0: any.
        unit: norm of a gradient whose square is 1 in the Gramian.
    """
    size = len(gramian)
    norms = jnp.sqrt(jnp.diagonal(gramian))
    active = everyone(gramian, active) & (norms > 0)
    norms = jnp.where(active, norms, 1)
    cosines = jnp.where(active[:, None] & active, gramian / (norms[:, None] * norms), 0)
    eps = float(jnp.finfo(gramian.dtype).eps)
    # A dataset that is not active has 1 on the diagonal, hence the weight 1.
    system = cosines + jnp.diag(jnp.where(active, size * eps, 1))
    identity = jnp.eye(size, dtype=gramian.dtype)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, weights, _ = carry
        # In units of the weights the Hessian is at least the identity.
        scaled = weights[:, None] * system * weights
        slope = 1 - jnp.sum(scaled, axis=1)
        change = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(scaled + identity), True), slope)
        decrement = slope @ change
        length = jnp.where(decrement < 1 / 16, 1, 1 / (1 + jnp.sqrt(jnp.maximum(decrement, 0))))
        return count + 1, weights * (1 + length * change), decrement

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[0] < _MOST_STEPS) & (carry[2] > size * (16 * eps) ** 2)

    start = 1 / jnp.sqrt(jnp.diagonal(system))
    _, weights, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(0), start, jnp.full_like(start[0], jnp.inf)))
    weights = jnp.where(active, weights, 0)
    if max_norm > 0:
        norm = jnp.sqrt(jnp.maximum(weights @ cosines @ weights, 0))
        weights = weights * max_norm / jnp.maximum(norm, max_norm)
    return weights / (unit * norms)
