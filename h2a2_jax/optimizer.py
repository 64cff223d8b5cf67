"""The optimiser of a run from its config: learning rate, AdamW with groups and frozen parameters, kinds to pack."""

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from h2a2_jax.checkpoint.parameter_groups import frozen_mask, named_paths
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import OptimConfig

_WEIGHTS = r"(^|\.)((\w+_)?kernel|shared|exclusive|adapter|projection)$"
"""Paths of parameters that multiply features. Others are scales and biases of norms, biases, validity priors, and
tables of vectors: embeddings and prototypes; prototypes count by direction alone."""


def learning_rate(optim: OptimConfig, *, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    During warm-up a factor rises linearly to 1, in every schedule. "step" multiplies by `decay_factor` after each of
    `decay_epochs`; "cosine" is half a cosine from the end of warm-up down to `final_lr` times `lr` at the last step
    (Loshchilov and Hutter 2017, without restarts); "constant" stays.

    Args:
        optim: schedule and its numbers.
        steps_per_epoch: optimiser steps of an epoch, the unit of `decay_epochs`.
        total_steps: optimiser steps of the run.
    """
    warmup = optim.warmup_steps
    if optim.schedule == "step":
        decays = {epoch * steps_per_epoch: optim.decay_factor for epoch in optim.decay_epochs}
        after = optax.piecewise_constant_schedule(optim.lr, decays)
    elif optim.schedule == "cosine":
        falling = optax.cosine_decay_schedule(optim.lr, max(total_steps - warmup, 1), optim.final_lr)

        def after(count: Any) -> Any:
            return falling(jnp.maximum(count - warmup, 0))

    else:
        after = optax.constant_schedule(optim.lr)

    def rate(count: Any) -> Any:
        return after(count) * _warm(warmup, count) if warmup else after(count)

    return rate


def _warm(steps: int, count: Any) -> Any:
    """Factor of the learning rate in a warm-up of some steps."""
    return jnp.minimum(1.0, (count + 1) / steps) if steps else 1.0


def build_optimizer(
    optim: OptimConfig,
    schedule: optax.Schedule,
    frozen: Collection[str] = (),
    grouped: Mapping[str, int] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov and Hutter 2019), for a tree of shared and for one of exclusive parameters alike.

    Paths of parameters decide about weight decay and freezing, never axes: exclusive parameters have one more. The
    state has the same arrays under the same paths whatever the choice, so that a run resumes with another one.

    Args:
        optim: weight decay, and groups with learning rates of their own.
        schedule: learning rate of each step.
        frozen: paths of parameters (`frozen_paths`) whose update is zero and whose moments stay.
        grouped: number of the group in `optim.groups` by path (`grouped_paths`).

    Returns:
        A transformation that acts parameter by parameter.
    """
    mask = None if optim.decay_norms_and_biases else is_weight
    optimizer = optax.adamw(schedule, weight_decay=optim.weight_decay, mask=mask)
    if not frozen and not grouped:
        return optimizer

    def factor(name: str, count: Any) -> Any:
        group = optim.groups[number] if (number := _group_of(name, grouped)) is not None else None
        if group is None:
            return 1.0
        if group.warmup_steps is None:
            return group.lr
        return group.lr * _warm(group.warmup_steps, count) / _warm(optim.warmup_steps, count)

    def scale(tree: Any, count: Any) -> Any:
        scaled = [leaf * factor(n, count) for n, leaf in zip(flat_names(tree), jax.tree.leaves(tree), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(tree), scaled)

    def clear(tree: Any) -> Any:
        return jax.tree.map(lambda leaf, held: jnp.zeros_like(leaf) if held else leaf, tree, frozen_mask(tree, frozen))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state[0].count  # of Adam's part
        updates, state = optimizer.update(clear(updates), state, params)
        updates = clear(updates)  # again, for weight decay came in between
        return scale(updates, count) if grouped else updates, state

    return optax.GradientTransformation(optimizer.init, update)


def is_weight(tree: Any) -> Any:
    """Return the tree with True in place of kernels and other weight matrices, False of other parameters."""
    weights = [re.search(_WEIGHTS, name) is not None for name in flat_names(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), weights)


def grouped_paths(shared: Any, exclusive: Any, optim: OptimConfig) -> dict[str, int]:
    """Return the number of the group in `optim.groups` of each parameter that one of them names, by path.

    Raises:
        InputError: a group names something that the detector does not have.
    """
    found: dict[str, int] = {}
    for number, group in enumerate(optim.groups):
        for path in named_paths(shared, exclusive, group.parameters, f"optim.groups.{number}.parameters"):
            found.setdefault(path, number)
    return found


def _group_of(name: str, grouped: Mapping[str, int]) -> int | None:
    """Number of the group of a parameter, or of an array of packed ones (`packing_kind`)."""
    packed = re.match(r"packed\..*\.group(\d+)\.", name)
    return int(packed[1]) if packed else grouped.get(name)


def packing_kind(name: str, frozen: Collection[str], grouped: Mapping[str, int]) -> str | None:
    """Kind of a parameter to pack: names for which `is_weight` holds or not, by group; frozen ones keep their names."""
    if name in frozen:
        return None
    if name.endswith("exclusive"):
        kind = "exclusive"
    else:
        kind = "kernel" if re.search(_WEIGHTS, name) else "bias"
    return f"group{grouped[name]}.{kind}" if name in grouped else kind
