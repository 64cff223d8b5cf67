"""One training step over the mesh ('dataset', 'replica').

    for each dataset:  loss and gradient on its scans; batch-norm sums, counts and positives over its replicas
    sum the gradient over replicas -> balance the shared gradients (NGH) -> mean over datasets -> clip -> optimiser

A device works on whole datasets. Where it holds several it runs them one after the other and stacks their gradients on
a leading axis. A dataset's own parameters are taken as its slice, so their gradients never grow a second dataset axis;
they take their gradient as it is, not divided by the number of datasets.

A step in which anything is not finite (a loss, a gradient, new running statistics) is skipped: the state stays as it
is, but for its counters. A step may be of several batches: their gradients are averaged, dataset by dataset, before
they are balanced.
"""

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

from h2a2_jax.balancers.dataset_axis import dataset_norms, keep_present, per_dataset, where_present
from h2a2_jax.balancers.ngh import clip_by_global_norm_sharded, mean_over_datasets
from h2a2_jax.checkpoint.train_state import Accumulated, Averages, TrainState, state_shardings, state_specs
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.distributed import DATASET, REPLICA
from h2a2_jax.loader.batching import Batch
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.training.gradients import LossConfig, SelectionMetrics, Targets, dataset_gradients


class StepMetrics(NamedTuple):
    """What a step, or one batch of it, reports.

    Attributes:
        box_loss: float32 [D], by dataset.
        class_loss: float32 [D].
        num_positives: int32 [D].
        present: bool [D], which datasets took part in the step; the losses of the others are 0.
        selection: of each layer with kernel selection, by its name.
        gradient_norm: float32 [], before clipping; 0 where nothing was applied: the step was skipped, or is of further
            batches.
        nonfinite: bool [D, T], what of a dataset was not finite: the gradients of the parameters of `tensor_names`, its
            running statistics, its loss.
        skipped: int32 [], steps skipped so far.
        skipped_in_row: int32 [], how many of them were the last ones.
        gradients: the gradients applied, after balancing and before clipping, (shared, exclusive), if asked for.
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


class StepConfig(NamedTuple):
    """Choices of a step.

    Attributes:
        clip_norm: global gradient norm above which gradients are scaled down; over shared and exclusive together.
        loss: how losses and gradients are computed.
        average_statistics: whether running statistics become those of all datasets after each step
            (`DetectorConfig.running_statistics` "shared").
        accumulate_steps: batches of a step.
        ema_decay: of the averages of the parameters, where the state has some. Early on it is lower,
            (1 + steps) / (10 + steps), so that the start is soon forgotten.
        max_skipped_steps: of this many skipped steps in a row on, the state stays as it is whatever comes, so that the
            run that is about to end keeps the state in which they were not finite; 0: never.
        keep_gradients: whether metrics carry the gradients.
    """

    clip_norm: float = 10.0
    loss: LossConfig = LossConfig()
    average_statistics: bool = False
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    max_skipped_steps: int = 0
    keep_gradients: bool = False


def make_train_step(
    graph: nnx.GraphDef,
    state: TrainState,
    specs: Sequence[DatasetSpec],
    optimizer: optax.GradientTransformation,
    balancer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    config: StepConfig | None = None,
    frozen: Collection[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The compiled step.

    Args:
        graph: structure of the model (`create_state`).
        state: of the run, or one of the same structure.
        specs: of the datasets, in the order of the dataset axis.
        optimizer: applied to the mean gradient, after clipping; must act parameter by parameter (as AdamW does),
            because exclusive parameters are spread over devices.
        balancer: of the shared gradients, with `axis_name` 'dataset'.
        mesh: see `train_mesh`.
        config: choices of the step.
        frozen: paths of the parameters that have no gradient (`frozen_paths`); the optimiser must hold them too.

    Returns:
        A function (state, batch) -> (state, metrics); `batch` has leading axes [D, replicas]. The state it is given is
        consumed. Where a step is of several batches it is called with each of them.
    """
    config = config or StepConfig()
    targets = Targets.of(specs)

    def step(state: TrainState, batch: Batch, targets: Targets) -> tuple[TrainState, StepMetrics]:
        batch = jax.tree.map(lambda leaf: leaf[:, 0], batch)  # this device is one replica
        shared = _varying(state.shared, (DATASET, REPLICA))
        exclusive = _varying(state.exclusive, (REPLICA,))
        present = lax.pmax(batch.present.astype(jnp.int32), REPLICA) > 0

        def one_dataset(part: tuple) -> tuple:
            exclusive, stats, batch, targets = part
            return dataset_gradients(graph, shared, exclusive, stats, batch, targets, frozen, config.loss)

        own, stats = jax.tree.map(lambda leaf: leaf[:, None], (exclusive, state.stats))
        g_shared, g_exclusive, stats, metrics = lax.map(one_dataset, (own, stats, batch, targets))
        g_exclusive, stats = jax.tree.map(lambda leaf: leaf[:, 0], (g_exclusive, stats))
        g_shared, g_exclusive = lax.psum((g_shared, g_exclusive), REPLICA)

        losses = metrics.box_loss + metrics.class_loss
        nonfinite = present[:, None] & _nonfinite(g_shared, g_exclusive, stats, losses)
        good = lax.psum(nonfinite.any().astype(jnp.int32), DATASET) == 0
        stopped = (state.skipped_in_row >= config.max_skipped_steps) & (config.max_skipped_steps > 0)
        state = _with_statistics(state, stats, present & good & ~stopped, config)
        gathered = Accumulated(g_shared, g_exclusive, losses, present.astype(jnp.int32), jnp.ones((), jnp.int32))
        if state.accumulated is not None:
            gathered = _added(state.accumulated, gathered, good & ~stopped)
            good = lax.psum(gathered.count.sum(), DATASET) > 0
        complete = gathered.batches == config.accumulate_steps
        applies = complete & good & ~stopped
        updated, norm, gradients = _applied(state, gathered, optimizer, balancer, config)
        # Not by lax.cond: its branches are compiled apart, which takes twice the time, and nothing in them fuses.
        state = jax.tree.map(lambda new, old: jnp.where(applies, new, old), updated, state)
        skips = complete & ~applies & ~stopped
        state = replace(
            state,
            step=state.step + (complete & ~stopped),
            skipped=state.skipped + skips,
            skipped_in_row=jnp.where(applies, 0, state.skipped_in_row + skips),
            accumulated=None if state.accumulated is None else _from_zero(complete, gathered),
        )
        told = StepMetrics(
            **metrics._asdict(),
            present=present,
            gradient_norm=jnp.where(applies, norm, 0),
            nonfinite=nonfinite,
            skipped=state.skipped,
            skipped_in_row=state.skipped_in_row,
            gradients=gradients,
        )
        return state, told

    layout = state_specs(state)

    def sharded(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        by_dataset = P(DATASET)
        out = StepMetrics(
            *(by_dataset,) * 5,  # type: ignore[arg-type]
            gradient_norm=P(),  # type: ignore[arg-type]
            nonfinite=by_dataset,  # type: ignore[arg-type]
            skipped=P(),  # type: ignore[arg-type]
            skipped_in_row=P(),  # type: ignore[arg-type]
            gradients=(P(), by_dataset) if config.keep_gradients else None,
        )
        return jax.shard_map(
            step, mesh=mesh, in_specs=(layout, P(DATASET, REPLICA), P(DATASET)), out_specs=(layout, out)
        )(state, batch, targets)

    # With its outputs placed as its inputs, the second step finds the first one's program. Where there are several
    # processes, each gets all metrics.
    everywhere = NamedSharding(mesh, P()) if mesh.is_multi_process else None
    return jax.jit(sharded, donate_argnums=0, out_shardings=(state_shardings(state, mesh), everywhere))


def tensor_names(state: TrainState) -> list[str]:
    """What the columns of `StepMetrics.nonfinite` stand for: parameters by path, "statistics", "loss"."""
    return [*flat_names(state.shared), *flat_names(state.exclusive), "statistics", "loss"]


def _nonfinite(shared: Any, exclusive: Any, stats: Any, losses: Float[Array, " local"]) -> Bool[Array, "local tensors"]:
    """Whether each gradient of a dataset is not finite; in the last two columns its new statistics, its loss.

    By norms, for balancing takes those of the shared gradients anyway.
    """
    columns = [dataset_norms(leaf) for leaf in jax.tree.leaves((shared, exclusive))]
    columns += [jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(stats)], 1).sum(1), losses]
    return ~jnp.isfinite(jnp.stack(columns, axis=1))


def _with_statistics(state: TrainState, new: Any, counts: Bool[Array, " local"], config: StepConfig) -> TrainState:
    """The state with the new running statistics of the datasets that count."""
    stats = jax.tree.map(lambda new, old: where_present(counts, new, old), new, state.stats)
    if config.average_statistics:
        stats = _averaged(stats, state.stats, counts)
    return replace(state, stats=stats)


def _added(before: Accumulated, new: Accumulated, good: Bool[Array, ""]) -> Accumulated:
    """The gradients of a step so far with those of a further batch, which counts only if it is good."""
    counts = (new.count > 0) & good
    sums = (new.shared, new.exclusive, new.losses)
    shared, exclusive, losses = jax.tree.map(lambda leaf: keep_present(leaf, counts), sums)
    this = Accumulated(shared, exclusive, losses, counts.astype(jnp.int32), new.batches)
    return jax.tree.map(jnp.add, before, this)


def _applied(
    state: TrainState,
    gathered: Accumulated,
    optimizer: optax.GradientTransformation,
    balancer: optax.GradientTransformationExtraArgs,
    config: StepConfig,
) -> tuple[TrainState, Float[Array, ""], Any]:
    """The state after an update, the gradient's norm before clipping, and the gradients if asked for."""
    present = gathered.count > 0
    gradients = (gathered.shared, gathered.exclusive, gathered.losses)
    if config.accumulate_steps > 1:
        batches = jnp.maximum(gathered.count, 1)
        gradients = jax.tree.map(lambda leaf: leaf / per_dataset(batches, leaf), gradients)
    g_shared, g_exclusive, losses = gradients
    g_exclusive = jax.tree.map(lambda leaf: keep_present(leaf, present), g_exclusive)
    balanced, balancer_state = balancer.update(g_shared, state.balancer, state.shared, present=present, losses=losses)
    mean = mean_over_datasets(balanced, present, DATASET)
    kept = (mean, g_exclusive) if config.keep_gradients else None
    mean, g_exclusive, norm = clip_by_global_norm_sharded(mean, g_exclusive, config.clip_norm, DATASET)
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
    if state.averages is not None:
        state = replace(state, averages=_moved_averages(state, config.ema_decay))
    return state, norm.astype(jnp.float32), kept


def _moved_averages(state: TrainState, decay: float) -> Averages:
    """The averages after an update, its parameters being those of the state."""
    updates = (state.step - state.skipped + 1).astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1 + updates) / (10 + updates))
    latest = Averages(state.shared, state.exclusive, state.stats)
    return jax.tree.map(
        lambda old, new: old + ((1 - decay_now) * (new - old)).astype(old.dtype), state.averages, latest
    )


def _from_zero(complete: Bool[Array, ""], gathered: Accumulated) -> Accumulated:
    """What the next batch is added to."""
    return jax.tree.map(lambda leaf: jnp.where(complete, jnp.zeros_like(leaf), leaf), gathered)


def _averaged(stats: Any, before: Any, present: Bool[Array, " local"]) -> Any:
    """Statistics [local, ...] of the datasets that took part, as their mean for every dataset."""
    mean = mean_over_datasets(stats, present, DATASET)
    some = lax.pmax(present.any().astype(jnp.int32), DATASET) > 0
    return jax.tree.map(lambda old, new: jnp.where(some, jnp.broadcast_to(new, old.shape), old), before, mean)


def _varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """Mark replicated values as each device's own: the gradient with respect to them is then the device's own too.

    Without this the gradient arrives already summed over devices, and a balancer would see equal norms.
    """
    return jax.tree.map(lambda leaf: lax.pcast(leaf, axes, to="varying"), tree)
