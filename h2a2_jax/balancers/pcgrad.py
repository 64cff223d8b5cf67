"""PCGrad: projection of each dataset's gradient off the gradients that it conflicts with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from h2a2_jax.balancers.dataset_axis import (
    SMALLEST_NORM,
    check_datasets,
    gather_datasets,
    keep_present,
    local_rows,
    nonzero,
    per_dataset,
)


class PCGradState(NamedTuple):
    """State of PCGrad.

    Attributes:
        steps: number of steps done, int32; with the seed it gives the orders of the next step.
        scales: float32 [K], factors that the last step multiplied the gradients by; 1 before the first.
    """

    steps: Int[Array, ""]
    scales: Float[Array, " datasets"]


def pcgrad(num_datasets: int, seed: int = 0, axis_name: str | None = None) -> optax.GradientTransformationExtraArgs:
    """Projecting conflicting gradients (PCGrad), over all shared parameters as one vector.

    Every dataset i starts from its own gradient g_i' = g_i and goes through the others in a random order; where
    g_i' . g_j < 0 it loses its part along g_j:

        g_i' <- g_i' - (g_i' . g_j) / |g_j|^2 g_j

    g_j being the gradient before any projection. The mean of the g_i' is then the gradient of the step.

    Each g_i' is a combination sum_j c_ij g_j, and the dot products that decide are those of the g_j. So devices
    exchange the gradients of one parameter after the other, for the K x K dot products; the rest is arithmetic on
    the c_ij. And as only the mean is wanted, sum_i g_i' = sum_j (sum_i c_ij) g_j: each device multiplies its own
    gradients by the column sums and `mean_over_datasets` gives PCGrad's mean, though the single updates are not the
    g_i'. A c_ij of i != j is set only at a conflict, to a positive number: factors are at least 1.

    A dataset that took no part in the step, one whose gradient is (nearly) zero and one whose gradient is not finite
    conflict with none; a gradient that is not finite reaches the check of the step.

    `update` is called like that of `norm_gradient_harmonization`.

    Args:
        num_datasets: number of datasets on all devices.
        seed: seed of the orders, which differ from step to step and from dataset to dataset.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    Raises:
        ValueError: gradients do not hold `num_datasets` datasets.

    References:
        Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, algorithm 1.
    """

    def init(params: PyTree) -> PCGradState:
        del params
        return PCGradState(jnp.zeros((), jnp.int32), jnp.ones(num_datasets, jnp.float32))

    def update(
        grads: PyTree[Float[Array, "local ..."]],
        state: PCGradState,
        params: PyTree | None = None,
        *,
        present: Bool[Array, " local"],
        losses: Float[Array, " local"] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Float[Array, "local ..."]], PCGradState]:
        del params, losses, extra_args
        check_datasets(grads, present, num_datasets, axis_name)
        cosines, norms = _cosines(jax.tree.leaves(grads), present, num_datasets, axis_name)
        key = jax.random.fold_in(jax.random.key(seed), state.steps)
        coefficients = project_conflicts(cosines, random_orders(key, num_datasets))
        # Between unit vectors up to here; every norm is above zero.
        scales = jnp.sum(coefficients * (norms[:, None] / norms), axis=0)
        own = local_rows(scales, present.shape[0], axis_name)
        updates = jax.tree.map(lambda leaf: keep_present(leaf * per_dataset(own, leaf), present), grads)
        return updates, PCGradState(state.steps + 1, scales.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)


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


def _cosines(
    leaves: list[Float[Array, "local ..."]], present: Bool[Array, " local"], num_datasets: int, axis_name: str | None
) -> tuple[Float[Array, "datasets datasets"], Float[Array, " datasets"]]:
    """Cosines between the datasets' gradients, and their norms; 0 and 1 for inactive datasets."""
    dtype = jnp.result_type(jnp.float32, *leaves)
    flat = [keep_present(leaf, present).reshape(len(present), -1).astype(dtype) for leaf in leaves]
    # Squares of gradients near 1e-20 vanish in float32 and those near 1e20 overflow.
    largest = jnp.stack([jnp.max(jnp.abs(leaf), axis=1, initial=0) for leaf in flat]).max(axis=0)
    dots = jnp.zeros((len(present), num_datasets), dtype)
    for leaf in flat:
        own = leaf / nonzero(largest)[:, None]
        every = own if axis_name is None else jax.lax.all_gather(own, axis_name, tiled=True)
        dots += jnp.matmul(own, every.T, precision=jax.lax.Precision.HIGHEST)
    columns = gather_datasets(jnp.concatenate([dots, largest[:, None]], axis=1), num_datasets, axis_name)
    dots, largest = columns[:, :-1], columns[:, -1]

    relative = jnp.sqrt(jnp.diagonal(dots))
    active = (relative * largest >= SMALLEST_NORM) & jnp.isfinite(relative * largest)
    relative = jnp.where(active, relative, 1)
    cosines = jnp.where(active[:, None] & active, dots / (relative[:, None] * relative), 0)
    return cosines, jnp.where(active, relative * largest, 1)
