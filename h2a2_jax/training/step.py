"""One training step over the mesh ('dataset', 'replica').

    for each dataset:  loss and gradient on its scans; batch-norm sums, counts and positives over its replicas
    sum the gradient over replicas -> balance the shared gradients (NGH) -> mean over datasets -> clip -> optimiser

A device works on whole datasets. Where it holds several it runs them one after the other and stacks their gradients on
a leading axis. Exclusive parameters are taken as the dataset's slice, so that their gradients never grow a second
dataset axis; their gradients are not divided by the number of datasets.

Between the gradients and their balance, kernel selection measures how well the datasets agree
(`h2a2_jax.layers.agreement_tracking`).

A step in which anything is not finite (a loss, a gradient, new running statistics) is skipped: nothing but the counters
of the state changes. A step may consist of several batches: their gradients are averaged, dataset by dataset, before
they are balanced.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.balancers.dataset_axis import keep_present, per_dataset, where_present
from h2a2_jax.balancers.ngh import clip_by_global_norm_sharded, mean_over_datasets
from h2a2_jax.balancers.packing import count_tensors, name_tensors, pack_like, tensor_norms, unpack
from h2a2_jax.checkpoint.train_state import Accumulated, Averages, TrainState, state_shardings, state_specs
from h2a2_jax.config import ExperimentConfig, OptimConfig
from h2a2_jax.distributed import DATASET, REPLICA
from h2a2_jax.layers.agreement_tracking import AgreementLayers
from h2a2_jax.models import DetectorConfig, Targets
from h2a2_jax.sparse.xla_cpu import compiler_options
from h2a2_jax.training.gradients import Objective, SelectionMetrics, dataset_gradients, detector_loss, targets_of


class StepMetrics(NamedTuple):
    """Metrics of a step, or of one of its batches.

    Attributes:
        box_loss: float32 [D], by dataset.
        class_loss: float32 [D], by dataset.
        num_positives: int32 [D], locations with a box, by dataset.
        present: bool [D], True for the datasets that took part in the step; the losses of the others are 0.
        selection: metrics of each layer with kernel selection, by its name.
        gradient_norm: float32 [], before clipping; 0 if the step was skipped or needs further batches.
        nonfinite: bool [D, T], True if a part of a dataset's results was not finite; parts as `tensor_names` has them.
        skipped: int32 [], steps skipped so far.
        skipped_in_row: int32 [], skipped steps in a row up to this one.
        gradients: the applied gradients, after balancing and before clipping, (shared, exclusive), if asked for.
        centerness_loss: float32 [D], by dataset; None for a detector without centerness.
        overflow: int32 [D], sites that had no place in the network, by dataset; None where that cannot be.
    """

    box_loss: Float[Array, " d"]
    class_loss: Float[Array, " d"]
    num_positives: Int[Array, " d"]
    present: Bool[Array, " d"]
    selection: dict[str, SelectionMetrics]
    gradient_norm: Float[Array, ""]
    nonfinite: Bool[Array, "d t"]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    gradients: Any = None
    centerness_loss: Float[Array, " d"] | None = None
    overflow: Int[Array, " d"] | None = None


class Sizes(NamedTuple):
    """Numbers of scans of each dataset.

    Attributes:
        batch: float32 [D], in a batch.
        scans: float32 [D], different ones in training, as kernel selection counts them; infinity where no scan is seen
            twice.
    """

    batch: Float[Array, " d"]
    scans: Float[Array, " d"]

    @classmethod
    def of(cls, config: ExperimentConfig, scans: Sequence[int] | None) -> "Sizes":
        """Sizes of a run's datasets, with `scans` of `make_train_step`."""
        batch = [source.batch_size or config.train.batch_size for source in config.datasets]
        views = 1.0 if config.model.selection is None else config.model.selection.agreement_views
        known: Sequence[float] = scans or [math.inf] * len(batch)
        count = [
            number * (views if source.augment else 1.0) for number, source in zip(known, config.datasets, strict=True)
        ]
        return cls(jnp.array(batch, jnp.float32), jnp.array(count, jnp.float32))


def make_train_step(
    graph: nnx.GraphDef,
    state: TrainState,
    config: ExperimentConfig,
    optimizer: optax.GradientTransformation,
    balancer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    frozen: Collection[str] = (),
    *,
    keep_gradients: bool = False,
    scans: Sequence[int] | None = None,
    objective: Objective = detector_loss,
) -> Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]:
    """Compile the step of a run.

    Args:
        graph: structure of the model (`create_state`).
        state: a state of the run's structure, plain or packed (`create_state`).
        config: the run's configuration.
        optimizer: applied to the mean gradient, after clipping; must act parameter by parameter (as AdamW does),
            because exclusive parameters are spread over devices.
        balancer: balances the shared gradients, with `axis_name` 'dataset'.
        mesh: mesh of devices (`train_mesh`).
        frozen: paths of the parameters that have no gradient (`frozen_paths`); the optimiser must hold them too.
        keep_gradients: True adds the gradients to the metrics.
        scans: number of training scans of each dataset, by which kernel selection knows what their gradients let
            differ by chance; None where no scan is seen twice.
        objective: the loss of a dataset.

    Returns:
        A function (state, batch) -> (state, metrics); `batch`, a `Batch` or what the objective takes, has leading axes
        [D, replicas]. The state that is passed
        is consumed. A step of several batches is one call per batch.
    """
    optim, train = config.optim, config.train
    targets = targets_of(config.specs, config.model)
    sizes = Sizes.of(config, scans)
    measuring = None
    if state.agreement is not None:
        shapes = jax.eval_shape(unpack, (state.exclusive, state.shared, state.stats))
        measuring = AgreementLayers.of(nnx.merge(graph, *shapes))

    def step(state: TrainState, batch: Any, targets: Targets, sizes: Sizes) -> tuple[TrainState, StepMetrics]:
        batch = jax.tree.map(lambda leaf: leaf[:, 0], batch)  # this device is one replica
        shared = _varying(state.shared, (DATASET, REPLICA))
        exclusive = _varying(state.exclusive, (REPLICA,))
        plain = unpack(shared)
        present = lax.pmax(batch.present.astype(jnp.int32), REPLICA) > 0

        def one_dataset(part: tuple) -> tuple:
            exclusive, stats, batch, targets = part
            *changes, metrics = dataset_gradients(
                graph, plain, unpack(exclusive), unpack(stats), batch, targets, frozen, train, state.step, objective
            )
            return *pack_like((state.shared, state.exclusive, state.stats), tuple(changes)), metrics

        own, stats = jax.tree.map(lambda leaf: leaf[:, None], (exclusive, state.stats))
        g_shared, g_exclusive, stats, metrics = lax.map(one_dataset, (own, stats, batch, targets))
        g_exclusive, stats = jax.tree.map(lambda leaf: leaf[:, 0], (g_exclusive, stats))
        g_shared, g_exclusive = lax.psum((g_shared, g_exclusive), REPLICA)

        losses = metrics.box_loss + metrics.class_loss
        if metrics.centerness_loss is not None:
            losses += metrics.centerness_loss
        nonfinite = present[:, None] & _nonfinite(g_shared, g_exclusive, stats, losses)
        good = lax.psum(nonfinite.any().astype(jnp.int32), DATASET) == 0
        # From here on the state stays as it is: the run that is about to end keeps the state that led to this.
        stopped = state.skipped_in_row >= train.max_skipped_steps
        counts = present & good & ~stopped
        state = _update_statistics(state, stats, counts, config.model)
        if measuring is not None:
            gamma = {name: layer.gamma for name, layer in metrics.selection.items()}
            averages, stats = measuring.measure(
                state.agreement, state.stats, g_shared, gamma, counts, sizes.batch, sizes.scans, DATASET
            )
            state = replace(state, agreement=averages, stats=stats)
        accumulated = Accumulated(g_shared, g_exclusive, losses, present.astype(jnp.int32), jnp.ones((), jnp.int32))
        if state.accumulated is not None:
            accumulated = _accumulate(state.accumulated, accumulated, good & ~stopped)
            good = lax.psum(accumulated.count.sum(), DATASET) > 0
        complete = accumulated.batches == optim.accumulate_steps
        applies = complete & good & ~stopped
        updated, norm, gradients = _apply(
            state, accumulated, optimizer, balancer, optim, measuring, frozen, keep_gradients
        )
        # Not by lax.cond: its branches are compiled apart, which takes twice the time, and nothing in them fuses.
        state = jax.tree.map(lambda new, old: jnp.where(applies, new, old), updated, state)
        skips = complete & ~applies & ~stopped
        state = replace(
            state,
            step=state.step + (complete & ~stopped),
            skipped=state.skipped + skips,
            skipped_in_row=jnp.where(applies, 0, state.skipped_in_row + skips),
            accumulated=None if state.accumulated is None else _reset(accumulated, complete),
        )
        report = StepMetrics(
            **metrics._asdict(),
            present=present,
            gradient_norm=jnp.where(applies, norm, 0),
            nonfinite=nonfinite,
            skipped=state.skipped,
            skipped_in_row=state.skipped_in_row,
            gradients=gradients,
        )
        return state, report

    layout = state_specs(state)

    def sharded(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        by_dataset = P(DATASET)
        out = StepMetrics(
            *(by_dataset,) * 5,  # type: ignore[arg-type]
            gradient_norm=P(),  # type: ignore[arg-type]
            nonfinite=by_dataset,  # type: ignore[arg-type]
            skipped=P(),  # type: ignore[arg-type]
            skipped_in_row=P(),  # type: ignore[arg-type]
            gradients=(P(), by_dataset) if keep_gradients else None,
            centerness_loss=by_dataset,  # type: ignore[arg-type]
            overflow=by_dataset,  # type: ignore[arg-type]
        )
        return jax.shard_map(
            step, mesh=mesh, in_specs=(layout, P(DATASET, REPLICA), P(DATASET), P(DATASET)), out_specs=(layout, out)
        )(state, batch, targets, sizes)

    # With its outputs placed as its inputs, the second step finds the first one's program. Where there are several
    # processes, each gets all metrics.
    everywhere = NamedSharding(mesh, P()) if mesh.is_multi_process else None
    shardings = state_shardings(state, mesh), everywhere
    return jax.jit(sharded, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options())


def tensor_names(state: TrainState) -> list[str]:
    """Names of the columns of `StepMetrics.nonfinite`: parameters by path, "statistics", "loss"."""
    return [*name_tensors(state.shared), *name_tensors(state.exclusive), "statistics", "loss"]


def _nonfinite(shared: Any, exclusive: Any, stats: Any, losses: Float[Array, " local"]) -> Bool[Array, "local tensors"]:
    """Return True for each gradient of a dataset that is not finite; the last two columns are statistics and loss.

    Norms tell it, which balancing computes of the shared gradients anyway.
    """
    total = sum((leaf.reshape(len(leaf), -1).sum(1) for leaf in jax.tree.leaves(stats)), jnp.zeros_like(losses))
    # With one label space and without kernel selection, nothing but statistics is exclusive.
    columns = [tensor_norms(tree) for tree in (shared, exclusive) if count_tensors(tree)]
    columns.append(jnp.stack([total, losses], axis=1))
    return ~jnp.isfinite(jnp.concatenate(columns, axis=1))


def _update_statistics(state: TrainState, new: Any, counts: Bool[Array, " local"], model: DetectorConfig) -> TrainState:
    """The state with the new running statistics of the datasets that count."""
    stats = jax.tree.map(lambda new, old: where_present(counts, new, old), new, state.stats)
    if model.running_statistics == "shared":
        stats = _average(stats, state.stats, counts)
    return replace(state, stats=stats)


def _accumulate(before: Accumulated, new: Accumulated, good: Bool[Array, ""]) -> Accumulated:
    """Add the gradients of a further batch, which counts only if it is good."""
    counts = (new.count > 0) & good
    sums = (new.shared, new.exclusive, new.losses)
    shared, exclusive, losses = jax.tree.map(lambda leaf: keep_present(leaf, counts), sums)
    this = Accumulated(shared, exclusive, losses, counts.astype(jnp.int32), new.batches)
    return jax.tree.map(jnp.add, before, this)


def _apply(
    state: TrainState,
    accumulated: Accumulated,
    optimizer: optax.GradientTransformation,
    balancer: optax.GradientTransformationExtraArgs,
    optim: OptimConfig,
    measuring: AgreementLayers | None,
    frozen: Collection[str],
    keep_gradients: bool,
) -> tuple[TrainState, Float[Array, ""], Any]:
    """The state after an update, the gradient's norm before clipping, and the gradients if asked for."""
    present = accumulated.count > 0
    gradients = (accumulated.shared, accumulated.exclusive, accumulated.losses)
    if optim.accumulate_steps > 1:
        batches = jnp.maximum(accumulated.count, 1)
        gradients = jax.tree.map(lambda leaf: leaf / per_dataset(batches, leaf), gradients)
    g_shared, g_exclusive, losses = gradients
    g_exclusive = jax.tree.map(lambda leaf: keep_present(leaf, present), g_exclusive)
    balanced, balancer_state = balancer.update(g_shared, state.balancer, state.shared, present=present, losses=losses)
    mean = mean_over_datasets(balanced, present, DATASET)
    kept = unpack((mean, g_exclusive)) if keep_gradients else None
    mean, g_exclusive, norm = clip_by_global_norm_sharded(mean, g_exclusive, optim.clip_norm, DATASET)
    shared_updates, shared_optimizer = optimizer.update(mean, state.shared_optimizer, state.shared)
    own_updates, exclusive_optimizer = optimizer.update(g_exclusive, state.exclusive_optimizer, state.exclusive)
    state = replace(
        state,
        shared=optax.apply_updates(state.shared, shared_updates),
        exclusive=optax.apply_updates(state.exclusive, own_updates),
        shared_optimizer=shared_optimizer,
        exclusive_optimizer=exclusive_optimizer,
        balancer=balancer_state,
    )
    if measuring is not None:
        exclusive = measuring.follow_shared(state.shared, state.exclusive, state.stats, frozen)
        state = replace(state, exclusive=exclusive)
    if state.averages is not None:
        state = replace(state, averages=_move_averages(state, optim.ema_decay))
    return state, norm.astype(jnp.float32), kept


def _move_averages(state: TrainState, decay: float) -> Averages:
    """Move the averages towards the parameters of the state.

    Early on the decay is (1 + updates) / (10 + updates), so that the start is soon forgotten.
    """
    updates = (state.step - state.skipped + 1).astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1 + updates) / (10 + updates))
    latest = Averages(state.shared, state.exclusive, state.stats)
    return jax.tree.map(
        lambda old, new: old + ((1 - decay_now) * (new - old)).astype(old.dtype), state.averages, latest
    )


def _reset(accumulated: Accumulated, complete: Bool[Array, ""]) -> Accumulated:
    """Zeros after the last batch of a step."""
    return jax.tree.map(lambda leaf: jnp.where(complete, jnp.zeros_like(leaf), leaf), accumulated)


def _average(stats: Any, before: Any, present: Bool[Array, " local"]) -> Any:
    """Give every dataset the mean statistics [local, ...] of the datasets that took part."""
    mean = mean_over_datasets(stats, present, DATASET)
    some = lax.pmax(present.any().astype(jnp.int32), DATASET) > 0
    return jax.tree.map(lambda old, new: jnp.where(some, jnp.broadcast_to(new, old.shape), old), before, mean)


def _varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """Mark replicated values as each device's own, so that gradients with respect to them are too.

    Without this the gradient arrives already summed over devices, and a balancer would see equal norms.
    """
    return jax.tree.map(lambda leaf: lax.pcast(leaf, axes, to="varying"), tree)
