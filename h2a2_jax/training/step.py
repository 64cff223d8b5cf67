"""One training step over the mesh ('dataset', 'replica').

    for each dataset:  loss and gradient on its scans; batch-norm sums, counts and positives over its replicas
    sum the gradient over replicas -> balance the shared gradients (NGH) -> mean over datasets -> clip -> optimiser

A device works on whole datasets. Where it holds several it runs them one after the other and stacks their gradients on
a leading axis. A dataset's own parameters are taken as its slice, so their gradients never grow a second dataset axis;
they take their gradient as it is, not divided by the number of datasets.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.inputs.batching import Batch
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.objective import detection_loss
from h2a2_jax.sparse import Sites
from h2a2_jax.training.harmonize import clip_by_global_norm_sharded, mean_over_datasets
from h2a2_jax.training.mesh import DATASET, REPLICA
from h2a2_jax.training.state import TrainState, merge_model, state_shardings, state_specs
from h2a2_jax.typing import AnyArray


class Targets(NamedTuple):
    """What the loss knows of each dataset; leading dataset axis.

    Attributes:
        label_to_level: int32 [D, K].
        class_mask: bool [D, K], False on padded classes.
        has_yaw: bool [D].
    """

    label_to_level: Int[Array, "d k"]
    class_mask: Bool[Array, "d k"]
    has_yaw: Bool[Array, " d"]

    @classmethod
    def of(cls, specs: Sequence[DatasetSpec]) -> "Targets":
        """From the specs, in the order of the dataset axis."""
        most = max(spec.num_classes for spec in specs)
        levels = [list(spec.label_to_level) + [0] * (most - spec.num_classes) for spec in specs]
        mask = [[k < spec.num_classes for k in range(most)] for spec in specs]
        return cls(jnp.array(levels, jnp.int32), jnp.array(mask), jnp.array([spec.has_yaw for spec in specs]))


class SelectionMetrics(NamedTuple):
    """Kernel selection in one layer, by dataset: means over the scans of a step that have sites.

    Where a dataset has no such scan in the step, beta, gamma and the scores are NaN.

    Attributes:
        alpha: float32 [D, V], validity prior of each offset.
        beta: float32 [D, V], structural consistency of each offset, mean over scans.
        gamma: float32 [D, V], share of scans that took the shared kernel.
        lowest_score: float32 [D], smallest alpha * beta of a scan and offset; below the threshold it takes the
            exclusive kernel.
        highest_score: float32 [D], largest one.
    """

    alpha: Float[Array, "d v"]
    beta: Float[Array, "d v"]
    gamma: Float[Array, "d v"]
    lowest_score: Float[Array, " d"]
    highest_score: Float[Array, " d"]

    @property
    def exclusive_share(self) -> Float[AnyArray, " d"]:
        """Share of (scan, offset) pairs that took the exclusive kernel."""
        return 1 - self.gamma.mean(-1)


class StepMetrics(NamedTuple):
    """What a step reports.

    Attributes:
        box_loss: float32 [D], by dataset.
        class_loss: float32 [D].
        num_positives: int32 [D].
        present: bool [D], which datasets took part in the step; the losses of the others are 0.
        selection: of each layer with kernel selection, by its name.
        gradient_norm: float32 [], before clipping.
        gradients: the gradients applied, after balancing and before clipping, (shared, exclusive), if asked for.
    """

    box_loss: Float[Array, " d"]
    class_loss: Float[Array, " d"]
    num_positives: Int[Array, " d"]
    present: Bool[Array, " d"]
    selection: dict[str, SelectionMetrics]
    gradient_norm: Float[Array, ""]
    gradients: Any = None


class StepConfig(NamedTuple):
    """Choices of a step.

    Attributes:
        clip_norm: global gradient norm above which gradients are scaled down; over shared and exclusive together.
        center_distance: of the rotated DIoU loss, "xyz" or "published".
        algorithm: of the sparse convolutions.
        average_statistics: whether running statistics become those of all datasets after each step
            (`DetectorConfig.running_statistics` "shared").
        keep_gradients: whether metrics carry the gradients.
    """

    clip_norm: float = 10.0
    center_distance: str = "xyz"
    algorithm: str = "auto"
    average_statistics: bool = False
    keep_gradients: bool = False


def make_train_step(
    graph: nnx.GraphDef,
    state: TrainState,
    specs: Sequence[DatasetSpec],
    optimizer: optax.GradientTransformation,
    balancer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    config: StepConfig | None = None,
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

    Returns:
        A function (state, batch) -> (state, metrics); `batch` has leading axes [D, replicas]. The state it is given is
        consumed.
    """
    config = config or StepConfig()
    targets = Targets.of(specs)

    def step(state: TrainState, batch: Batch, targets: Targets) -> tuple[TrainState, StepMetrics]:
        batch = jax.tree.map(lambda leaf: leaf[:, 0], batch)  # this device is one replica
        shared = _varying(state.shared, (DATASET, REPLICA))
        exclusive = _varying(state.exclusive, (REPLICA,))
        present = lax.pmax(batch.present.astype(jnp.int32), REPLICA) > 0

        def one_dataset(part: tuple) -> tuple:
            exclusive, stats, batch, targets, present = part
            return _dataset_gradients(graph, shared, exclusive, stats, batch, targets, present, config)

        own, stats = jax.tree.map(lambda leaf: leaf[:, None], (exclusive, state.stats))
        g_shared, g_exclusive, stats, metrics = lax.map(one_dataset, (own, stats, batch, targets, present))
        g_exclusive, stats = jax.tree.map(lambda leaf: leaf[:, 0], (g_exclusive, stats))
        g_shared, g_exclusive = lax.psum((g_shared, g_exclusive), REPLICA)
        if config.average_statistics:
            stats = _averaged(stats, state.stats, present)
        losses = metrics.box_loss + metrics.class_loss

        balanced, balancer_state = balancer.update(
            g_shared, state.balancer, state.shared, present=present, losses=losses
        )
        mean = mean_over_datasets(balanced, present, DATASET)
        g_exclusive = jax.tree.map(
            lambda leaf: jnp.where(present.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), g_exclusive
        )
        kept = (mean, g_exclusive) if config.keep_gradients else None
        mean, g_exclusive, norm = clip_by_global_norm_sharded(mean, g_exclusive, config.clip_norm, DATASET)
        shared_updates, shared_optimizer = optimizer.update(mean, state.shared_optimizer, state.shared)
        own_updates, exclusive_optimizer = optimizer.update(g_exclusive, state.exclusive_optimizer, state.exclusive)
        new = TrainState(
            step=state.step + 1,
            shared=optax.apply_updates(state.shared, shared_updates),
            exclusive=optax.apply_updates(state.exclusive, own_updates),
            stats=stats,
            shared_optimizer=shared_optimizer,
            exclusive_optimizer=exclusive_optimizer,
            balancer=balancer_state,
        )
        return new, metrics._replace(gradient_norm=norm, gradients=kept)

    layout = state_specs(state)

    def sharded(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        kept = (P(), P(DATASET)) if config.keep_gradients else None
        by_dataset = P(DATASET)
        each = dict.fromkeys(("box_loss", "class_loss", "num_positives", "present", "selection"), by_dataset)
        out = StepMetrics(**each, gradient_norm=P(), gradients=kept)  # type: ignore[arg-type]
        return jax.shard_map(
            step, mesh=mesh, in_specs=(layout, P(DATASET, REPLICA), P(DATASET)), out_specs=(layout, out)
        )(state, batch, targets)

    # With its outputs placed as its inputs, the second step finds the first one's program. Where there are several
    # processes, each gets all metrics.
    everywhere = NamedSharding(mesh, P()) if mesh.is_multi_process else None
    return jax.jit(sharded, donate_argnums=0, out_shardings=(state_shardings(state, mesh), everywhere))


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


def _dataset_gradients(
    graph: nnx.GraphDef,
    shared: nnx.State,
    exclusive: nnx.State,
    stats: nnx.State,
    batch: Batch,
    targets: Targets,
    present: Array,
    config: StepConfig,
) -> tuple[nnx.State, nnx.State, nnx.State, StepMetrics]:
    """Gradients of one dataset's loss on this device's scans, its new statistics, its metrics."""

    def loss(shared: nnx.State, exclusive: nnx.State) -> tuple[Array, tuple]:
        model = merge_model(graph, exclusive, shared, stats)
        seen: dict[str, Array] = {}

        def tap(name: str, value: Any) -> None:
            if name.endswith((".alpha", ".beta", ".gamma")):
                seen[name] = lax.stop_gradient(value)

        context = ForwardContext(
            DatasetContext(jnp.ones(1)),
            training=True,
            axis_name=REPLICA,
            algorithm=config.algorithm,  # type: ignore[arg-type]
            tap=tap,
        )
        out = model(batch.features, batch.plan, context)
        losses = detection_loss(
            out.locations, out.scan, out.level, out.boxes, out.logits, batch.boxes, batch.labels,
            targets.label_to_level, targets.class_mask, targets.has_yaw,
            axis_name=REPLICA, center_distance=config.center_distance,  # type: ignore[arg-type]
        )  # fmt: skip
        return losses.total, (losses, _selection_metrics(seen, batch.plan.voxels), nnx.state(model, nnx.BatchStat))

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, (losses, selection, new_stats)), grads = value_and_grad(shared, exclusive)
    new_stats = jax.tree.map(lambda new, old: jnp.where(present, new, old), new_stats, stats)
    metrics = StepMetrics(
        box_loss=lax.psum(losses.box, REPLICA),
        class_loss=lax.psum(losses.classification, REPLICA),
        num_positives=losses.num_positives,
        present=present,
        selection=selection,
        gradient_norm=jnp.zeros(()),
    )
    return *grads, new_stats, metrics


def _selection_metrics(seen: dict[str, Array], voxels: Sites) -> dict[str, SelectionMetrics]:
    """From the values that the layers with kernel selection record.

    Scans without sites do not count: they only fill the rows of a batch, and their scores mean nothing.
    """
    real = jnp.zeros(voxels.num_scans, bool).at[voxels.scan].set(True, mode="drop")
    count = lax.psum(real.sum(), REPLICA)

    def mean(values: Array) -> Array:
        total = lax.psum(jnp.where(real[:, None], values, 0).sum(0), REPLICA)
        return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)

    layers = [name.removesuffix(".gamma") for name in seen if name.endswith(".gamma")]
    metrics = {}
    for layer in layers:
        alpha, beta, gamma = (seen[f"{layer}.{part}"] for part in ("alpha", "beta", "gamma"))
        score = alpha * beta
        lowest = lax.pmin(jnp.where(real[:, None], score, jnp.inf).min(), REPLICA)
        highest = lax.pmax(jnp.where(real[:, None], score, -jnp.inf).max(), REPLICA)
        metrics[layer] = SelectionMetrics(
            lax.pmean(alpha, REPLICA),
            mean(beta),
            mean(gamma),
            jnp.where(count > 0, lowest, jnp.nan),
            jnp.where(count > 0, highest, jnp.nan),
        )
    return metrics
