"""Balancers of gradients: optax transformations that make one gradient of several datasets' gradients."""

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
    """How the datasets' gradients of shared parameters become one.

    Attributes:
        method: "ngh", norm-based gradient harmonisation; "mean", their plain mean; "pcgrad", the mean after projecting
            conflicts away; "gradnorm", a mean with learned weights.
        threshold: agreement of norms (Psi, 0 to 1) below which NGH scales gradients to their mean norm; every method
            records how often that is so.
        scope: norms per parameter "tensor", or one "global" norm over all shared parameters; for the methods other than
            NGH of what is recorded only.
        cap: largest factor by which NGH scales a gradient up.
        alpha: how strongly GradNorm gives datasets that learn slowly larger gradients; 0 asks for equal norms.
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
        record: agreement and norms of the gradients that the last step got, and the factors of the method.
        method: state of the balancer.
    """

    record: HarmonizationState
    method: Any


def build_balancer(
    config: HarmonizeConfig, num_datasets: int, axis_name: str | None = None, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The gradient balancer of a config.

    Whatever the method, `recorded` finds Psi, norms and factors in its state.

    Args:
        config: method and its numbers.
        num_datasets: number of datasets on all devices.
        axis_name: mesh axis that further datasets are spread over; None if all are local.
        seed: of the methods that draw.
    """

    def harmonization(threshold: float) -> optax.GradientTransformationExtraArgs:
        return norm_gradient_harmonization(num_datasets, threshold, config.scope, config.cap, axis_name)

    builders: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
        "ngh": lambda: harmonization(config.threshold),
        "mean": lambda: harmonization(0.0),
        "pcgrad": lambda: _recording(pcgrad(num_datasets, seed, axis_name), harmonization(0.0)),
        "gradnorm": lambda: _recording(
            gradnorm(num_datasets, config.alpha, config.weight_lr, axis_name), harmonization(0.0)
        ),
    }
    return builders[config.method]()


def recorded(state: Any) -> HarmonizationState | None:
    """What a balancer's last step recorded; None if it records nothing."""
    return (
        state.record if isinstance(state, RecordedState) else state if isinstance(state, HarmonizationState) else None
    )


def has_dataset_axis(state: Any) -> Any:
    """Which arrays of a balancer's state have a leading dataset axis, in its structure; None if it is not known."""
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


def _recording(
    balancer: optax.GradientTransformationExtraArgs, recorder: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """A balancer that also keeps what a recorder sees; the recorder's gradients are not used."""

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
