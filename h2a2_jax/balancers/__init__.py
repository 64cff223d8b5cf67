"""Gradient balancers: optax transformations that weigh the datasets' gradients of the shared parameters.

A balancer is called as `update(grads, state, params=None, *, present, losses=None)`, described in `ngh`, and knows of
devices only the name of a mesh axis. `build_balancer` makes one from a config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from h2a2_jax.balancers.aligned_mtl import ScaleMode, aligned_mtl, aligned_mtl_weights
from h2a2_jax.balancers.cagrad import cagrad, cagrad_weights
from h2a2_jax.balancers.conflict_free import conflict_free, conflict_free_weights
from h2a2_jax.balancers.dwa import DWAState, dwa
from h2a2_jax.balancers.famo import FAMOState, famo
from h2a2_jax.balancers.fixed import WeightsState, fixed_weights, random_weights
from h2a2_jax.balancers.gradnorm import GradNormState, gradnorm
from h2a2_jax.balancers.gradvac import gradvac, gradvac_weights
from h2a2_jax.balancers.gramian import GramianState, Scope, Situation, gramian_balancer
from h2a2_jax.balancers.imtl_g import imtl_g, imtl_g_weights
from h2a2_jax.balancers.mgda import mgda, mgda_weights
from h2a2_jax.balancers.nash_mtl import nash_mtl, nash_mtl_weights
from h2a2_jax.balancers.ngh import (
    HarmonizationState,
    mean_over_datasets,
    norm_gradient_harmonization,
    plain_mean,
)
from h2a2_jax.balancers.packing import tensor_values
from h2a2_jax.balancers.pcgrad import pcgrad, pcgrad_weights
from h2a2_jax.balancers.uncertainty import UncertaintyState, uncertainty
from h2a2_jax.balancers.upgrad import dual_proj, dual_proj_weights, upgrad, upgrad_weights

_BY_DATASET: dict[type, dict[str, int]] = {
    HarmonizationState: {"norms": 1, "scales": 1},
    GramianState: {"scales": 1, "memory": 2},
    GradNormState: {"weights": 1, "first_losses": 1, "scales": 1},
    UncertaintyState: {"log_variances": 1, "scales": 1},
    DWAState: {"sums": 1, "counts": 1, "last": 1, "before": 1, "scales": 1},
    FAMOState: dict.fromkeys(FAMOState._fields, 1),
    WeightsState: {"scales": 1},
}
"""Fields of each state whose arrays have leading dataset axes, with the number of them."""

__all__ = [
    "DWAState",
    "FAMOState",
    "GradNormState",
    "GramianState",
    "HarmonizationState",
    "HarmonizeConfig",
    "RecordedState",
    "Situation",
    "UncertaintyState",
    "WeightsState",
    "aligned_mtl",
    "aligned_mtl_weights",
    "build_balancer",
    "cagrad",
    "cagrad_weights",
    "conflict_free",
    "conflict_free_weights",
    "dataset_axes",
    "dual_proj",
    "dual_proj_weights",
    "dwa",
    "famo",
    "fixed_weights",
    "gradnorm",
    "gradvac",
    "gradvac_weights",
    "gramian_balancer",
    "imtl_g",
    "imtl_g_weights",
    "mean_over_datasets",
    "mgda",
    "mgda_weights",
    "nash_mtl",
    "nash_mtl_weights",
    "norm_gradient_harmonization",
    "pcgrad",
    "pcgrad_weights",
    "plain_mean",
    "random_weights",
    "recorded",
    "uncertainty",
    "upgrad",
    "upgrad_weights",
]

GRAMIAN_METHODS = (
    "pcgrad",
    "gradvac",
    "mgda",
    "cagrad",
    "imtl_g",
    "nash_mtl",
    "aligned_mtl",
    "upgrad",
    "dual_proj",
    "conflict_free",
)
"""Config words of the methods that need the Gramian of the gradients."""

EXHAUSTIVE_METHODS = ("mgda", "cagrad", "upgrad", "dual_proj")
"""Config words of the methods that try every set of datasets, of which there may be `active_sets.MOST_DATASETS`."""


@dataclass(frozen=True)
class HarmonizeConfig:
    """Method that makes one gradient of the datasets' gradients, for shared parameters.

    Attributes:
        method: "ngh", norm-based gradient harmonisation; "mean", the plain mean; "pcgrad", the mean after conflicts are
            projected away; "gradnorm", a mean with learned weights. By the dot products of the gradients: "mgda",
            "cagrad", "imtl_g", "nash_mtl", "aligned_mtl", "upgrad", "dual_proj", "gradvac", and "conflict_free", which
            is ConFIG. By the losses: "uncertainty", "dwa", "famo". "random", weights drawn in every step; "fixed",
            those of `weights`.
        threshold: agreement of norms (Psi, 0 to 1) below which NGH scales gradients to their mean norm. Every method
            records how often Psi is below it.
        scope: norms of NGH and of the record of every method: per parameter "tensor", per "group", a part of the
            network, or one "global" norm over all shared parameters.
        cap: largest factor by which NGH scales a gradient up.
        alpha: strength with which GradNorm gives slow datasets larger gradients; 0 asks for equal norms.
        weight_lr: learning rate of what GradNorm, uncertainty weighting and FAMO learn.
        gramian_scope: gradients that the methods by dot products (PCGrad is one) compare: "global", all shared
            parameters as one vector, as published; each "group" or each "tensor" for itself.
        cagrad_c: radius of CAGrad's ball around the mean gradient, relative to its norm; 0 gives the mean.
        nash_max_norm: largest norm of the gradient of Nash-MTL; 0: any.
        aligned_scale: eigenvalue of the Gramian that sets the length in Aligned-MTL.
        gradvac_beta: share of the latest cosine in the targets of GradVac.
        dwa_window: steps of an average of DWA.
        dwa_temperature: temperature of DWA; a large one makes the weights equal.
        famo_decay: weight decay of FAMO's logits.
        weights: weights of "fixed", one for each dataset in their order; only their ratios count.
    """

    method: Literal[
        "ngh",
        "mean",
        "pcgrad",
        "gradnorm",
        "mgda",
        "cagrad",
        "imtl_g",
        "nash_mtl",
        "aligned_mtl",
        "upgrad",
        "dual_proj",
        "gradvac",
        "conflict_free",
        "uncertainty",
        "dwa",
        "famo",
        "random",
        "fixed",
    ] = "ngh"
    threshold: float = 0.8
    scope: Scope = "tensor"
    cap: float = 100.0
    alpha: float = 1.5
    weight_lr: float = 0.025
    gramian_scope: Scope = "global"
    cagrad_c: float = 0.4
    nash_max_norm: float = 1.0
    aligned_scale: ScaleMode = "min"
    gradvac_beta: float = 0.5
    dwa_window: int = 50
    dwa_temperature: float = 2.0
    famo_decay: float = 1e-3
    weights: tuple[float, ...] = ()


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

    For every method, `recorded` finds Psi, norms and factors in the state. Groups are the beginnings of the parameters'
    paths (`h2a2_jax.balancers.gramian.beginning_of`).

    Args:
        config: method and its options.
        num_datasets: number of datasets on all devices.
        axis_name: mesh axis that further datasets are spread over; None if all are local.
        seed: seed of the orders of PCGrad and GradVac and of random weights.

    Raises:
        ValueError: `config.weights` of the method "fixed" are not one for each dataset.
    """
    # A record of one norm has no room for factors by tensor.
    scope = "tensor" if config.method in GRAMIAN_METHODS and config.gramian_scope != "global" else config.scope

    def harmonization(threshold: float) -> optax.GradientTransformationExtraArgs:
        return norm_gradient_harmonization(num_datasets, threshold, scope, config.cap, axis_name)

    if config.method == "ngh":
        return harmonization(config.threshold)
    if config.method == "mean":
        return harmonization(0.0)
    if config.method == "fixed" and len(config.weights) != num_datasets:
        raise ValueError(
            f"there are {len(config.weights)} weights for {num_datasets} datasets; give one for each, in their order"
        )
    common: dict[str, Any] = {"axis_name": axis_name, "scope": config.gramian_scope}
    builders: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
        "pcgrad": partial(pcgrad, num_datasets, seed, **common),
        "gradvac": partial(gradvac, num_datasets, config.gradvac_beta, seed, **common),
        "mgda": partial(mgda, num_datasets, **common),
        "cagrad": partial(cagrad, num_datasets, config.cagrad_c, **common),
        "imtl_g": partial(imtl_g, num_datasets, **common),
        "nash_mtl": partial(nash_mtl, num_datasets, config.nash_max_norm, **common),
        "aligned_mtl": partial(aligned_mtl, num_datasets, config.aligned_scale, **common),
        "upgrad": partial(upgrad, num_datasets, **common),
        "dual_proj": partial(dual_proj, num_datasets, **common),
        "conflict_free": partial(conflict_free, num_datasets, **common),
        "gradnorm": partial(gradnorm, num_datasets, config.alpha, config.weight_lr, axis_name),
        "uncertainty": partial(uncertainty, num_datasets, config.weight_lr, axis_name),
        "dwa": partial(dwa, num_datasets, config.dwa_window, config.dwa_temperature, axis_name),
        "famo": partial(famo, num_datasets, config.weight_lr, config.famo_decay, axis_name),
        "random": partial(random_weights, num_datasets, seed, axis_name),
        "fixed": partial(fixed_weights, config.weights, axis_name),
    }
    return _add_record(builders[config.method](), harmonization(0.0))


def recorded(state: Any) -> HarmonizationState | None:
    """Record of a balancer's last step; None if the balancer records nothing."""
    if isinstance(state, RecordedState):
        return state.record
    return state if isinstance(state, HarmonizationState) else None


def dataset_axes(state: Any) -> Any:
    """Tree of a balancer's state with the number of leading dataset axes of each array; None for an unknown state.

    An array with two of them has a value for each pair of datasets.
    """
    if isinstance(state, RecordedState):
        record, method = dataset_axes(state.record), dataset_axes(state.method)
        return None if method is None else RecordedState(record, method)
    if type(state) not in _BY_DATASET:
        return None
    axes = _BY_DATASET[type(state)]
    marked = {
        part: jax.tree.map(lambda _, part=part: axes.get(part, 0), value) for part, value in state._asdict().items()
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
        if method.scales.ndim == 2:
            scales = tensor_values(grads, method.scales.T)
        else:
            scales = jax.tree.map(lambda leaf: jnp.broadcast_to(method.scales, leaf.shape), record.scales)
        return updates, RecordedState(record._replace(scales=scales), method)

    return optax.GradientTransformationExtraArgs(init, update)
