"""Balancers that weigh the datasets' losses, whatever their gradients are.

The gradient of a weighted loss is the weighted gradient, so a weight of a loss is a factor of its dataset's gradient of
the shared parameters. Exclusive parameters, which AdamW makes indifferent to a factor, keep their gradients. Devices
exchange one number a dataset, or none.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from h2a2_jax.balancers.dataset_axis import check_datasets, gather_datasets, keep_present, local_rows, per_dataset

Advance = Callable[[Any, Array, Array], Any]
"""The state of a step, whose `scales` [K] multiply its gradients: of the last state, the losses [K] and the datasets
bool [K] that count."""


def loss_balancer(
    start: Callable[[], Any],
    advance: Advance,
    num_datasets: int,
    axis_name: str | None = None,
    *,
    needed_by: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Transformation of a method that weighs losses.

    It is called as `update(grads, state, params=None, *, present, losses)`, with leaves of `grads` [local, ...],
    `present` bool [local] and `losses` [local], and returns the gradients times factors, those of absent datasets zero.
    A dataset counts if it is present with a finite loss above zero; another that is present keeps its gradient.

    Args:
        start: makes the state before the first step.
        advance: makes the state of a step.
        num_datasets: number of datasets on all devices.
        axis_name: mesh axis that further datasets are spread over; None if all are local.
        needed_by: name of the method that needs losses, for an error message; None for one that needs none, to which
            all datasets that are present count, with losses of 1.

    Raises:
        ValueError: gradients do not hold `num_datasets` datasets, or `losses` are missing.
    """

    def init(params: PyTree) -> Any:
        del params
        return start()

    def update(
        grads: PyTree[Float[Array, "local ..."]],
        state: Any,
        params: PyTree | None = None,
        *,
        present: Bool[Array, " local"],
        losses: Float[Array, " local"] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Float[Array, "local ..."]], Any]:
        del params, extra_args
        check_datasets(grads, present, num_datasets, axis_name)
        if needed_by is None:
            losses = jnp.ones(present.shape)
        elif losses is None:
            raise ValueError(f"{needed_by} weighs the datasets' losses and was given none; pass `losses` [local]")
        counts = present & jnp.isfinite(losses) & (losses > 0)
        own = jnp.where(counts, losses, 0).astype(jnp.promote_types(losses.dtype, jnp.float32))
        every = gather_datasets(own[:, None], num_datasets, axis_name)[:, 0]
        state = advance(state, every, every > 0)
        state = state._replace(scales=jnp.where(every > 0, state.scales, 1).astype(jnp.float32))
        factors = local_rows(state.scales, present.shape[0], axis_name)
        return jax.tree.map(lambda leaf: keep_present(leaf * per_dataset(factors, leaf), present), grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def softmax_of(values: Float[Array, " datasets"], counts: Bool[Array, " datasets"]) -> Float[Array, " datasets"]:
    """Softmax over the datasets that count, zero for the others."""
    values = jnp.where(counts, values, -jnp.inf)
    largest = jnp.max(values)
    numbers = jnp.exp(values - jnp.where(jnp.isfinite(largest), largest, 0))
    return numbers / jnp.maximum(jnp.sum(numbers), 1)  # the largest is exp(0)
