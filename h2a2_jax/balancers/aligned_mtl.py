"""Aligned-MTL: gradients made orthogonal and of one length."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from h2a2_jax.balancers.active_sets import everyone, uniform_weights
from h2a2_jax.balancers.gramian import Scope, Situation, gramian_balancer

ScaleMode = Literal["min", "median", "rmse"]
"""Eigenvalue of the Gramian whose root is the length of the aligned gradients."""


def aligned_mtl(
    num_datasets: int,
    scale_mode: ScaleMode = "min",
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Aligned-MTL: the mean of gradients whose principal components are brought to one length.

    With the Gramian G = V diag(lambda) V^T and sigma^2 its smallest eigenvalue above zero,

        w = sigma V diag(lambda^-1/2) V^T 1 / K

    so that the linear system of the gradients has condition number 1: nothing dominates, nothing conflicts.

    Arguments but `scale_mode`, `update` and choices are those of `gramian_balancer`.

    Args:
        num_datasets: number of datasets on all devices.
        scale_mode: sigma^2 as the smallest ("min"), the median ("median") or the mean ("rmse") eigenvalue above zero.
        scope: gradients that are compared.
        axis_name: mesh axis of the datasets.
        group_of: group of a parameter by its path.

    References:
        Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, algorithm 1 (Aligned-MTL
        without preferences).
    """

    def weigh(situation: Situation) -> Array:
        return aligned_mtl_weights(situation.gramian, situation.active, scale_mode=scale_mode)

    return gramian_balancer(weigh, num_datasets, scope=scope, axis_name=axis_name, group_of=group_of)


def aligned_mtl_weights(
    gramian: Float[Array, "k k"], active: Bool[Array, " k"] | None = None, *, scale_mode: ScaleMode = "min"
) -> Float[Array, " k"]:
    """Weights of the gradients; zero for datasets that are not active.

    Eigenvalues up to K eps times the largest count as zero; if all do, the weights are those of the mean.

    Args:
        gramian: dot products of the datasets' gradients.
        active: datasets that take part; all by default.
        scale_mode: see `aligned_mtl`; of an even number of eigenvalues the lower median, as in TorchJD.
    """
    active = everyone(gramian, active)
    mean = uniform_weights(gramian, active)
    values, vectors = jnp.linalg.eigh(jnp.where(active[:, None] & active, gramian, 0))  # rising
    kept = values > values[-1] * len(values) * jnp.finfo(values.dtype).eps
    rank = jnp.sum(kept)
    if scale_mode == "rmse":
        scale = jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1)
    else:
        above = 0 if scale_mode == "min" else jnp.maximum(rank - 1, 0) // 2
        scale = values[jnp.minimum(len(values) - rank + above, len(values) - 1)]
    factors = jnp.where(kept, jnp.sqrt(scale / jnp.where(kept, values, 1)), 0)
    return jnp.where(active, jnp.where(rank > 0, (vectors * factors) @ (vectors.T @ mean), mean), 0)
