"""AdamW, its learning rate, and what it leaves alone: parameters that do not decay, and frozen ones.

The state has the same arrays under the same paths whatever is chosen, so that a run goes on from a checkpoint with
another choice.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from h2a2_jax.checkpoint.parameter_groups import frozen_mask
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.typing import Schedule

_WEIGHTS = r"(^|\.)(kernel|box_kernel|class_kernel|shared|exclusive|projection)$"
"""Paths of what multiplies features. Others are scales and biases of norms, biases, validity priors, and tables of
vectors: embeddings and prototypes, of which the latter count by direction alone."""


def learning_rate(
    lr: float,
    *,
    steps_per_epoch: int,
    total_steps: int,
    schedule: Schedule = "step",
    decay_epochs: Sequence[int] = (),
    decay_factor: float = 0.1,
    final_lr: float = 0.0,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """The learning rate of a step, counted from 0.

    Args:
        lr: after warm-up.
        steps_per_epoch: in which `decay_epochs` are measured.
        total_steps: of the run.
        schedule: "step", multiplied by `decay_factor` after each of `decay_epochs`; "cosine", half a cosine from the
            end of warm-up down to `final_lr` times `lr` at `total_steps` (Loshchilov and Hutter 2017, without
            restarts); or "constant".
        decay_epochs: rising.
        decay_factor: see there.
        final_lr: fraction of `lr`, 0 to 1.
        warmup_steps: over which a factor rises linearly to 1, in every schedule.
    """
    if schedule == "step":
        after = optax.piecewise_constant_schedule(lr, {epoch * steps_per_epoch: decay_factor for epoch in decay_epochs})
    elif schedule == "cosine":
        falling = optax.cosine_decay_schedule(lr, max(total_steps - warmup_steps, 1), final_lr)

        def after(count: Any) -> Any:
            return falling(jnp.maximum(count - warmup_steps, 0))

    else:
        after = optax.constant_schedule(lr)

    def rate(count: Any) -> Any:
        if not warmup_steps:
            return after(count)
        return after(count) * jnp.minimum(1.0, (count + 1) / warmup_steps)

    return rate


def build_optimizer(
    schedule: optax.Schedule,
    weight_decay: float,
    *,
    decay_norms_and_biases: bool = True,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), for a tree of shared and for one of exclusive parameters alike.

    What is decayed or frozen goes by the path of a parameter, never by its axes, of which exclusive ones have one more.

    Args:
        schedule: learning rate of each step.
        weight_decay: decoupled.
        decay_norms_and_biases: whether it pulls at every parameter, or at kernels and other weight matrices only.
        frozen: paths of parameters (`frozen_paths`) whose update is zero and whose moments take in nothing.

    Returns:
        A transformation that acts parameter by parameter.
    """
    optimizer = optax.adamw(schedule, weight_decay=weight_decay, mask=None if decay_norms_and_biases else is_weight)
    return _hold(optimizer, frozen) if frozen else optimizer


def is_weight(tree: Any) -> Any:
    """The tree with True in place of kernels and other weight matrices, False of other parameters."""
    weights = [re.search(_WEIGHTS, name) is not None for name in flat_names(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), weights)


def _hold(optimizer: optax.GradientTransformation, frozen: Collection[str]) -> optax.GradientTransformation:
    """The optimiser with zeros in and out for frozen parameters; its state stays what it is."""

    def zeroed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf, held: jnp.zeros_like(leaf) if held else leaf, tree, frozen_mask(tree, frozen))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(zeroed(updates), state, params)
        return zeroed(updates), state  # for weight decay came in between

    return optax.GradientTransformation(optimizer.init, update)
