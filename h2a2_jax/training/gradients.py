"""Loss and gradient of one dataset on the scans of one device: what a training step balances and applies."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.checkpoint.parameter_groups import without_frozen_gradients
from h2a2_jax.checkpoint.train_state import merge_model
from h2a2_jax.distributed import REPLICA
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import Batch
from h2a2_jax.losses import detection_loss
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.sparse import Sites
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


class LossConfig(NamedTuple):
    """How losses and their gradients are computed.

    Attributes:
        center_distance: of the rotated DIoU loss, "xyz" or "published".
        algorithm: of the sparse convolutions.
        dtype: compute type of the network, as "bfloat16"; None: float32. Parameters, statistics and losses are float32
            whatever it is.
        rematerialize: whether what a block computes is computed again for the backward pass rather than kept.
    """

    center_distance: str = "xyz"
    algorithm: str = "auto"
    dtype: str | None = None
    rematerialize: bool = False


class DatasetMetrics(NamedTuple):
    """What one dataset's pass reports; all equal on its replicas.

    Attributes:
        box_loss: float32 [].
        class_loss: float32 [].
        num_positives: int32 [].
        selection: of each layer with kernel selection, by its name, without the axis of datasets.
    """

    box_loss: Float[Array, ""]
    class_loss: Float[Array, ""]
    num_positives: Int[Array, ""]
    selection: dict[str, SelectionMetrics]


def dataset_gradients(
    graph: nnx.GraphDef,
    shared: nnx.State,
    exclusive: nnx.State,
    stats: nnx.State,
    batch: Batch,
    targets: Targets,
    frozen: Collection[str],
    config: LossConfig,
) -> tuple[nnx.State, nnx.State, nnx.State, DatasetMetrics]:
    """Gradients of one dataset's loss on this device's scans, its statistics after them, its metrics.

    Inside `jax.shard_map`; sums over the dataset's replicas are made for batch norms, the number of positives and the
    losses, not for the gradients.

    Args:
        graph: structure of the model.
        shared: parameters that all datasets share.
        exclusive: the dataset's own, with a dataset axis of 1.
        stats: its running statistics, likewise.
        batch: its scans on this device.
        targets: of the dataset, without the dataset axis.
        frozen: paths of the parameters for which no gradient is worked out.
        config: how.
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
            training=True,
            axis_name=REPLICA,
            algorithm=config.algorithm,  # type: ignore[arg-type]
            dtype=None if config.dtype is None else jnp.dtype(config.dtype),
            rematerialize=config.rematerialize,
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
    metrics = DatasetMetrics(
        box_loss=lax.psum(losses.box, REPLICA),
        class_loss=lax.psum(losses.classification, REPLICA),
        num_positives=losses.num_positives,
        selection=selection,
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
