"""ConFIG: the gradient with one and the same angle to every dataset's gradient."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.active_sets import everyone, pseudo_inverse
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer


def conflict_free(
    num_datasets: int,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Conflict-free inverse gradients (ConFIG): equal cosines with all gradients, and the length of their projections.

    With U the unit gradients as rows and t the unit vector along pinv(U) 1,

        d = (sum_k <g_k, t>) t

    and the step takes d / K. As pinv(U) = U^T (U U^T)^+, it is a combination of gradients by their cosines.

    Arguments, `update` and choices are those of `gramian_balancer`.

    References:
        Liu et al., ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, ICLR 2025, equation 2.
    """

    def weigh(situation: Situation) -> Array:
        return conflict_free_weights(situation.gramian, situation.active)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of, sums=True)


def conflict_free_weights(gramian: Float[Array, "k k"], active: Bool[Array, " k"] | None = None) -> Float[Array, " k"]:
    """Weights that give d of `conflict_free`; zero for datasets that are not active and for gradients of zero.

    Eigenvalues of the matrix of cosines up to K eps times the largest count as zero. TorchJD cuts the singular values
    of U instead, of which these are the squares, so that between a relative 1e-15 and 1e-8 (float64) the two differ.

    Args:
        gramian: dot products of the datasets' gradients.
        active: datasets that take part; all by default.
    """
    norms = jnp.sqrt(jnp.diagonal(gramian))
    active = everyone(gramian, active) & (norms > 0)
    norms = jnp.where(active, norms, 1)
    cosines = jnp.where(active[:, None] & active, gramian / (norms[:, None] * norms), 0)
    along = pseudo_inverse(cosines) @ active.astype(gramian.dtype)
    projections = cosines @ along
    length = jnp.maximum(jnp.sqrt(jnp.maximum(along @ projections, 0)), 1e-12)
    return jnp.where(active, jnp.sum(norms * projections) / length**2 * along / norms, 0)
