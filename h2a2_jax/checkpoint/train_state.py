"""The state of a training run, split into arrays that datasets share and arrays with a dataset axis."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from h2a2_jax.balancers.packing import Kind, Packing
from h2a2_jax.distributed import DATASET
from h2a2_jax.layers.agreement_tracking import AgreementLayers
from h2a2_jax.models import DetectorConfig, HeadConfig
from h2a2_jax.scans.label_space import union_columns
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; the parameters are split as by `split_model`."""

    step: Leaf  # int32 [], steps taken, skipped ones among them
    shared: Leaf
    exclusive: Leaf  # with a leading dataset axis
    stats: Leaf  # running statistics, with a leading dataset axis
    shared_optimizer: Leaf
    exclusive_optimizer: Leaf
    balancer: Leaf
    skipped: Leaf  # int32 [], steps that were skipped because a value in them was not finite
    skipped_in_row: Leaf  # int32 [], skipped steps since the last step that was not skipped
    averages: Leaf = None  # `Averages`; None if the run keeps none
    accumulated: Leaf = None  # `Accumulated`; None if a step is one batch
    agreement: Leaf = None  # `Agreement` by shape of kernel, with a dataset axis; None if no layer measures it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Averages:
    """Exponential moving averages of a detector: smoother than the parameters, and used in evaluation."""

    shared: Leaf
    exclusive: Leaf
    stats: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accumulated:
    """Sums of the gradients over the batches of an unfinished step; zero between steps."""

    shared: Leaf  # with a leading dataset axis: balancing needs each dataset's own
    exclusive: Leaf
    losses: Leaf  # float [D], sums
    count: Leaf  # int32 [D], batches that each dataset took part in
    batches: Leaf  # int32 [], batches seen


def head_configs(specs: Sequence[DatasetSpec], model: DetectorConfig) -> list[HeadConfig]:
    """Configs of the datasets' heads, in their order."""
    columns = union_columns(specs) if model.label_space == "union" else (None,) * len(specs)
    return [
        HeadConfig(spec.name, spec.num_classes, spec.num_outputs, own) for spec, own in zip(specs, columns, strict=True)
    ]


def is_exclusive(path: Any, variable: Any) -> bool:
    """Return True if a Flax variable has a leading dataset axis; a predicate for `nnx.split`."""
    return isinstance(variable, nnx.Variable) and variable.get_metadata().get("dataset_axis") == 0


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    """Split into (structure, exclusive parameters, shared parameters, statistics); `merge_model` is the inverse."""
    return nnx.split(model, nnx.All(nnx.Param, is_exclusive), nnx.Param, nnx.BatchStat)  # type: ignore[return-value]


def merge_model(graph: nnx.GraphDef, exclusive: nnx.State, shared: nnx.State, stats: nnx.State) -> Any:
    """Build a model that shares no variables with others from the parts of `split_model`."""
    return nnx.merge(graph, exclusive, shared, stats, copy=True)


def create_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    balancer: optax.GradientTransformationExtraArgs,
    *,
    averaged: bool = False,
    accumulating: bool = False,
    kind: Kind | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """Create the state of a run before its first step.

    Args:
        model: the detector.
        optimizer: initialises its state for shared and for exclusive parameters.
        balancer: initialises its state for shared parameters.
        averaged: True keeps averages.
        accumulating: True if a step has several batches.
        kind: kinds of parameters to pack (`h2a2_jax.balancers.packing`); None for plain trees. `unpack` makes a plain
            state of a packed one, `pack_like` the reverse.
    """
    exclusive: Any
    shared: Any
    stats: Any
    graph, exclusive, shared, stats = split_model(model)
    measuring = AgreementLayers.of(model)
    if kind is not None:
        # On the host: each shape would be a program of its own.
        exclusive, shared, stats = jax.device_get((exclusive, shared, stats))
        exclusive, shared = Packing.of(exclusive, kind, 1).pack(exclusive), Packing.of(shared, kind).pack(shared)
        stats = Packing.of(stats, _kind_of_statistics, 1).pack(stats)
    accumulated = None
    if accumulating:
        datasets = len(jax.tree.leaves(stats)[0])
        accumulated = Accumulated(
            shared=jax.tree.map(lambda leaf: jnp.zeros((datasets, *leaf.shape), leaf.dtype), shared),
            exclusive=jax.tree.map(jnp.zeros_like, exclusive),
            losses=jnp.zeros(datasets),
            count=jnp.zeros(datasets, jnp.int32),
            batches=jnp.zeros((), jnp.int32),
        )
    return graph, TrainState(
        step=jnp.zeros((), jnp.int32),
        shared=shared,
        exclusive=exclusive,
        stats=stats,
        shared_optimizer=optimizer.init(shared),
        exclusive_optimizer=optimizer.init(exclusive),
        balancer=balancer.init(shared),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        averages=Averages(shared, exclusive, stats) if averaged else None,
        accumulated=accumulated,
        agreement=None if measuring is None else measuring.empty(),
    )


def _kind_of_statistics(name: str) -> str:
    """Kind of a statistic to pack: those that a step measures itself, and those that the layers move."""
    return "disagreement" if name.endswith("disagreement") else "statistics"


def state_specs(state: TrainState) -> TrainState:
    """Partition specs of the state: leading dataset axes along the mesh axis 'dataset', all else replicated."""

    def along_datasets(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: P(DATASET) if jnp.ndim(leaf) else P(), tree)

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: P(), tree)

    averages = state.averages
    return replace(
        everywhere(state),
        exclusive=along_datasets(state.exclusive),
        stats=along_datasets(state.stats),
        exclusive_optimizer=along_datasets(state.exclusive_optimizer),
        averages=averages and replace(along_datasets(averages), shared=everywhere(averages.shared)),
        accumulated=along_datasets(state.accumulated),
        agreement=along_datasets(state.agreement),
    )


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of the state's arrays on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state))


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Copy the state to the devices of a mesh; a copy, because a step donates the state it is given.

    In a mesh of several processes each one places the part of its own devices: all must hold the same state.
    """
    state, shardings = jax.tree.map(jnp.array, state), state_shardings(state, mesh)
    if not mesh.is_multi_process:
        return jax.device_put(state, shardings)

    def placed(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        parts = sharding.addressable_devices_indices_map(leaf.shape)
        own = [jax.device_put(leaf[index], device) for device, index in parts.items()]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, own)

    return jax.tree.map(placed, state, shardings)
