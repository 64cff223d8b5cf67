"""GradVac: gradients turned towards one another until their cosines reach learned targets."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.balancers.active_sets import everyone
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer
from h2a2_jax.balancers.pcgrad import random_orders


def gradvac(
    num_datasets: int,
    beta: float = 0.5,
    seed: int = 0,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient vaccine (GradVac): PCGrad with a target for the cosine of each pair in place of zero.

    Every dataset i starts from g_i' = g_i and goes through the others in a random order. With phi the cosine of g_i'
    and g_j, and s_ij the target, an exponential moving average of such cosines, where phi < s_ij

        g_i' <- g_i' + |g_i'| (s_ij sqrt(1 - phi^2) - phi sqrt(1 - s_ij^2)) / (|g_j| sqrt(1 - s_ij^2)) g_j

    after which their cosine is s_ij; then s_ij <- (1 - beta) s_ij + beta phi. The mean of the g_i' is the gradient of
    the step. Targets start at zero and are the memory of the state; those of pairs with an inactive dataset stay.

    Arguments but `beta` and `seed`, `update` and choices are those of `gramian_balancer`.

    Args:
        num_datasets: number of datasets on all devices.
        beta: share of the latest cosine in the average; 0.5 as in TorchJD, where the paper uses 0.01.
        seed: seed of the orders.
        scope: gradients that are compared; the paper recommends tensors over the whole model.
        axis_name: mesh axis of the datasets.
        group_of: group of a parameter by its path.

    References:
        Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
        Models, ICLR 2021.
    """

    def weigh(situation: Situation) -> tuple[Array, Array]:
        orders = random_orders(situation.key, num_datasets)
        return gradvac_weights(situation.gramian, orders, situation.memory, situation.active, beta=beta)

    return gramian_balancer(
        weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of, sums=True, remembers=True, seed=seed
    )


def gradvac_weights(
    gramian: Float[Array, "k k"],
    orders: Int[Array, "k k"],
    targets: Float[Array, "k k"],
    active: Bool[Array, " k"] | None = None,
    *,
    beta: float = 0.5,
    eps: float = 1e-8,
) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
    """Weights of the sum of the turned gradients, 0 for datasets that are not active; and the next targets.

    Args:
        gramian: dot products of the datasets' gradients.
        orders: order of the other datasets for each dataset (row), whose own number is skipped.
        targets: s_ij, for dataset i in row i.
        active: datasets that take part; all by default.
        beta: share of the latest cosine in the next targets.
        eps: added to products of norms that are divided by, as in TorchJD.
    """
    active = everyone(gramian, active)
    gramian = jnp.where(active[:, None] & active, gramian, 0)
    targets = targets.astype(gramian.dtype)
    datasets, norms = jnp.arange(len(gramian)), jnp.sqrt(jnp.diagonal(gramian))

    def turn(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        coefficients, targets = carry
        other = orders[:, number]
        counts = active & active[other] & (other != datasets)
        products = jnp.matmul(coefficients, gramian, precision=jax.lax.Precision.HIGHEST)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(products * coefficients, axis=1), 0))
        cosine = products[datasets, other] / (norm * norms[other] + eps)
        target = targets[datasets, other]
        sine, wanted = (jnp.sqrt(jnp.maximum(1 - c * c, 0)) for c in (cosine, target))
        added = norm * (target * sine - cosine * wanted) / (norms[other] * wanted + eps)
        added = jnp.where(counts & (cosine < target), added, 0)
        following = jnp.where(counts, (1 - beta) * target + beta * cosine, target)
        return coefficients.at[datasets, other].add(added), targets.at[datasets, other].set(following)

    start = jnp.eye(len(gramian), dtype=gramian.dtype), targets
    coefficients, targets = jax.lax.fori_loop(0, len(gramian), turn, start)
    return jnp.where(active, jnp.sum(coefficients, axis=0), 0), targets
