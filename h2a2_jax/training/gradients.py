"""Loss and gradient of one dataset on the scans of one device; the training step balances and applies them."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.checkpoint.parameter_groups import without_frozen_gradients
from h2a2_jax.checkpoint.train_state import head_configs, merge_model
from h2a2_jax.config import TrainConfig
from h2a2_jax.distributed import REPLICA
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import Batch
from h2a2_jax.losses import DetectionLoss
from h2a2_jax.models import DetectorConfig, DetectorNetwork, Predictions, Targets, kind_of
from h2a2_jax.models.head import outputs_of_union, padded_columns
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.sparse import Sites
from h2a2_jax.sparse.pool import sites_per_scan


def targets_of(specs: Sequence[DatasetSpec], model: DetectorConfig) -> Targets:
    """Targets of the specs, in the order of the dataset axis."""
    columns = [head.columns for head in head_configs(specs, model) if head.columns is not None]
    most = max(spec.num_classes for spec in specs)
    levels = [list(spec.label_to_level) + [0] * (most - spec.num_classes) for spec in specs]
    mask = [[k < spec.num_classes for k in range(most)] for spec in specs]
    return Targets(
        jnp.array(levels, jnp.int32),
        jnp.array(mask),
        jnp.array([spec.has_yaw for spec in specs]),
        jnp.array(padded_columns(columns)) if columns else None,
    )


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


class DatasetMetrics(NamedTuple):
    """Metrics of one dataset's pass; equal on all its replicas.

    Attributes:
        box_loss: float32 [].
        class_loss: float32 [].
        num_positives: int32 [].
        selection: of each layer with kernel selection, by its name, without the axis of datasets.
        centerness_loss: float32 []; None for a detector without centerness.
        overflow: int32 [], sites that had no place in the network; None where that cannot be.
    """

    box_loss: Float[Array, ""]
    class_loss: Float[Array, ""]
    num_positives: Int[Array, ""]
    selection: dict[str, SelectionMetrics]
    centerness_loss: Float[Array, ""] | None = None
    overflow: Int[Array, ""] | None = None


class Terms(NamedTuple):
    """Loss of a model on the scans of a device, as `DetectorKind.loss` has it.

    Attributes:
        losses: the local parts of the loss; the number of positives is that of all replicas.
        sites: sites of the scans, which tell those that are empty.
        overflow: int32 [], sites that had no place in the network (`Predictions.overflow`).
    """

    losses: DetectionLoss
    sites: Sites
    overflow: Int[Array, ""] | None = None


Objective = Callable[[Any, Any, Targets, ForwardContext], Terms]
"""Loss of (model, batch, targets, context)."""


def detector_loss(model: DetectorNetwork, batch: Batch, targets: Targets, context: ForwardContext) -> Terms:
    """Loss of a detector on scans with boxes."""
    out, voxels = predictions_of(model, batch, targets, context), batch.plan.voxels
    losses = kind_of(model.config).loss(
        out, batch.boxes, batch.labels, targets, voxels, model.config, context.axis_name
    )
    return Terms(losses, voxels, out.overflow)


def predictions_of(model: DetectorNetwork, batch: Batch, targets: Targets, context: ForwardContext) -> Predictions:
    """Predictions of a detector for a dataset, by its head or by its columns of one label space."""
    out = model(batch.features, batch.plan, context, targets.columns)
    return out if targets.columns is None else out._replace(boxes=outputs_of_union(out.boxes, targets.has_yaw))


def dataset_gradients(
    graph: nnx.GraphDef,
    shared: nnx.State,
    exclusive: nnx.State,
    stats: nnx.State,
    batch: Any,
    targets: Targets,
    frozen: Collection[str],
    config: TrainConfig,
    step: Int[Array, ""] | None = None,
    objective: Objective = detector_loss,
) -> tuple[nnx.State, nnx.State, nnx.State, DatasetMetrics]:
    """Gradients of one dataset's loss on this device's scans, (shared, exclusive), its new statistics, its metrics.

    To be called inside `jax.shard_map`. Batch norms, the number of positives and the losses are summed over the
    dataset's replicas, the gradients are not.

    Args:
        graph: structure of the model.
        shared: parameters that all datasets share.
        exclusive: parameters of the dataset, with a dataset axis of 1.
        stats: running statistics of the dataset, with a dataset axis of 1.
        batch: the dataset's scans on this device.
        targets: targets of the dataset, without the dataset axis.
        frozen: paths of the parameters without a gradient.
        config: compute type and rematerialisation.
        step: number of the step, with which kernel selection explores; None for the choices of prediction.
        objective: the loss.
    """

    def loss(shared: nnx.State, exclusive: nnx.State) -> tuple[Array, tuple]:
        shared, exclusive = (without_frozen_gradients(tree, frozen) for tree in (shared, exclusive))
        model = merge_model(graph, exclusive, shared, stats)
        seen: dict[str, Array] = {}

        def tap(name: str, value: Any) -> None:
            if name.endswith((".alpha", ".beta", ".gamma")):
                seen[name] = lax.stop_gradient(value)

        context = ForwardContext(
            DatasetContext(jnp.ones(1)),
            step=step,
            training=True,
            axis_name=REPLICA,
            dtype=None if config.precision == "float32" else jnp.dtype(config.precision),
            rematerialize=config.rematerialize,
            tap=tap,
        )
        terms = objective(model, batch, targets, context)
        return terms.losses.total, (terms, _selection_metrics(seen, terms.sites), nnx.state(model, nnx.BatchStat))

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, (terms, selection, new_stats)), grads = value_and_grad(shared, exclusive)
    losses = terms.losses
    metrics = DatasetMetrics(
        box_loss=lax.psum(losses.box, REPLICA),
        class_loss=lax.psum(losses.classification, REPLICA),
        num_positives=losses.num_positives,
        selection=selection,
        centerness_loss=None if losses.centerness is None else lax.psum(losses.centerness, REPLICA),
        overflow=None if terms.overflow is None else lax.psum(terms.overflow, REPLICA),
    )
    return *grads, new_stats, metrics


def _selection_metrics(seen: dict[str, Array], voxels: Sites) -> dict[str, SelectionMetrics]:
    """Means and extremes of the values that layers with kernel selection record.

    Scans without sites do not count: they fill the rows of a batch, and their scores mean nothing.
    """
    real = sites_per_scan(voxels) > 0
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
