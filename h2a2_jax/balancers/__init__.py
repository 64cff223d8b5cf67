"""Gradient balancers: optax transformations that weigh the datasets' gradients of the shared parameters.

A balancer is called as `update(grads, state, params=None, *, present, losses=None)`, described in `ngh`, and knows of
devices only the name of a mesh axis. `build_balancer` makes one from a config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from h2a2_jax.balancers.gradnorm import GradNormState, gradnorm
from h2a2_jax.balancers.ngh import HarmonizationState, norm_gradient_harmonization
from h2a2_jax.balancers.pcgrad import PCGradState, pcgrad

_BY_DATASET: dict[type, tuple[str, ...]] = {
    HarmonizationState: ("norms", "scales"),
    PCGradState: ("scales",),
    GradNormState: ("weights", "first_losses", "scales"),
}
"""Fields of each state whose arrays have a leading dataset axis."""

__all__ = [
    "GradNormState",
    "HarmonizationState",
    "HarmonizeConfig",
    "PCGradState",
    "RecordedState",
    "build_balancer",
    "gradnorm",
    "has_dataset_axis",
    "norm_gradient_harmonization",
    "pcgrad",
    "recorded",
]


@dataclass(frozen=True)
class HarmonizeConfig:
    """Method that makes one gradient of the datasets' gradients, for shared parameters.

    Attributes:
        method: "ngh", norm-based gradient harmonisation; "mean", the plain mean; "pcgrad", the mean after conflicts are
            projected away; "gradnorm", a mean with learned weights.
        threshold: agreement of norms (Psi, 0 to 1) below which NGH scales gradients to their mean norm. Every method
            records how often Psi is below it.
        scope: norms per parameter "tensor", or one "global" norm over all shared parameters. For methods other than NGH
            it only changes the record.
        cap: largest factor by which NGH scales a gradient up.
        alpha: strength with which GradNorm gives slow datasets larger gradients; 0 asks for equal norms.
        weight_lr: learning rate of GradNorm's weights.
    """

    method: Literal["ngh", "mean", "pcgrad", "gradnorm"] = "ngh"
    threshold: float = 0.8
    scope: Literal["tensor", "global"] = "tensor"
    cap: float = 100.0
    alpha: float = 1.5
    weight_lr: float = 0.025


class RecordedState(NamedTuple):
    """State of a balancer that does not record by itself.

    Attributes:
        record: agreement and norms of the gradients of the last step, and the factors that the method applied.
        method: state of the balancer.
    """

    record: HarmonizationState
    method: Any


def build_balancer(
    config: HarmonizeConfig, num_datasets: int, axis_name: str | None = None, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The gradient balancer of a config.

    For every method, `recorded` finds Psi, norms and factors in the state.

    Args:
        config: method and its options.
        num_datasets: number of datasets on all devices.
        axis_name: mesh axis that further datasets are spread over; None if all are local.
        seed: seed of PCGrad's random orders.
    """

    def harmonization(threshold: float) -> optax.GradientTransformationExtraArgs:
        return norm_gradient_harmonization(num_datasets, threshold, config.scope, config.cap, axis_name)

    builders: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
        "ngh": lambda: harmonization(config.threshold),
        "mean": lambda: harmonization(0.0),
        "pcgrad": lambda: _add_record(pcgrad(num_datasets, seed, axis_name), harmonization(0.0)),
        "gradnorm": lambda: _add_record(
            gradnorm(num_datasets, config.alpha, config.weight_lr, axis_name), harmonization(0.0)
        ),
    }
    return builders[config.method]()


def recorded(state: Any) -> HarmonizationState | None:
    """Record of a balancer's last step; None if the balancer records nothing."""
    if isinstance(state, RecordedState):
        return state.record
    return state if isinstance(state, HarmonizationState) else None


def has_dataset_axis(state: Any) -> Any:
    """Tree of a balancer's state, True for arrays with a leading dataset axis; None for an unknown state."""
    if isinstance(state, RecordedState):
        record, method = has_dataset_axis(state.record), has_dataset_axis(state.method)
        return None if method is None else RecordedState(record, method)
    if type(state) not in _BY_DATASET:
        return None
    marked = {
        part: jax.tree.map(lambda _, part=part: part in _BY_DATASET[type(state)], value)
        for part, value in state._asdict().items()
    }
    return type(state)(**marked)


def _add_record(
    balancer: optax.GradientTransformationExtraArgs, recorder: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """A balancer that also keeps the record of another one, whose gradients are not used."""

    def init(params: PyTree) -> RecordedState:
        return RecordedState(recorder.init(params), balancer.init(params))  # type: ignore[arg-type]

    def update(
        grads: PyTree, state: RecordedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, RecordedState]:
        record: Any
        method: Any
        _, record = recorder.update(grads, state.record, params, **extra_args)
        updates, method = balancer.update(grads, state.method, params, **extra_args)
        scales = jax.tree.map(lambda leaf: jnp.broadcast_to(method.scales, leaf.shape), record.scales)
        return updates, RecordedState(record._replace(scales=scales), method)

    return optax.GradientTransformationExtraArgs(init, update)
