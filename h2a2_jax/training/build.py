"""What a run is made of, from its config: detector, optimiser, stream of scans, compiled step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from h2a2_jax.balancers import build_balancer
from h2a2_jax.checkpoint.parameter_groups import frozen_paths, frozen_text
from h2a2_jax.checkpoint.train_state import (
    TrainState,
    create_state,
    head_configs,
    merge_model,
    place_state,
    split_model,
)
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import DATASET, REPLICA, MeshLayout, say
from h2a2_jax.host import available_cores
from h2a2_jax.loader.batching import Batch
from h2a2_jax.loader.drawing import StreamDataset
from h2a2_jax.loader.stream import JointStream, StreamConfig
from h2a2_jax.models import TR3D, DetectorConfig, HeadConfig, PlanLayout
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder
from h2a2_jax.scans.scan import ScanSource
from h2a2_jax.scans.sources import CachedSource, SourceConfig, build_source, permuted_boxes
from h2a2_jax.scans.tfds_source import TfdsSource
from h2a2_jax.training.gradients import LossConfig
from h2a2_jax.training.optimizer import build_optimizer, learning_rate
from h2a2_jax.training.step import StepConfig, StepMetrics, make_train_step

CACHED_SCANS = 2000
"""Sources of up to this many scans are kept in memory, where a thread loads them and loading takes long."""


def build_detector(config: ExperimentConfig) -> TR3D:
    """The detector of a config with the parameters that its seed draws."""
    build = partial(draw_detector, config)
    # Drawn in one program, for hundreds of small ones would be compiled otherwise; the same for all seeds.
    key = jax.random.key(config.train.seed)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(build, key)), jax.jit(lambda key: nnx.state(build(key)))(key))


def draw_detector(config: ExperimentConfig, key: PRNGKeyArray) -> TR3D:
    """The detector of a config with the parameters that a key draws; for use inside jit or `nnx.eval_shape`."""
    return TR3D(config.model, head_configs(config.specs), rngs=nnx.Rngs(key))


def count_parameters(config: ExperimentConfig) -> int:
    """Trained numbers of the detector of a config, those of all datasets together; none of them is drawn."""
    return _count_parameters(config.model, tuple(head_configs(config.specs)))


@cache
def _count_parameters(model: DetectorConfig, heads: tuple[HeadConfig, ...]) -> int:
    shapes = nnx.eval_shape(lambda: TR3D(model, heads, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


def build_stream(config: ExperimentConfig, process_layout: MeshLayout) -> JointStream:
    """The training stream of a config; a process opens the datasets that it loads.

    Raises:
        InputError: a dataset is missing or has no usable scan.
    """
    workers = _workers(config)

    def opened(chosen: SourceConfig) -> ScanSource:
        source = build_source(chosen, "train")
        # Prepared scans are read in milliseconds, and all of them fill gigabytes; workers would each keep some.
        is_quick = isinstance(source, Mmdet3dFolder | TfdsSource)
        if workers == 0 and not is_quick and len(source) <= CACHED_SCANS:
            source = CachedSource(source)
        return permuted_boxes(source, config.train.seed) if config.train.permute_boxes else source

    own = process_layout.all_or_raise(
        lambda: {d: opened(config.datasets[d]) for d in process_layout.datasets}, "open its scans"
    )
    return JointStream(
        [
            StreamDataset(
                chosen.spec,
                own.get(d),
                chosen.repeats,
                chosen.sample,
                chosen.augment,
                chosen.batch_size,
                chosen.weight,
            )
            for d, chosen in enumerate(config.datasets)
        ],
        StreamConfig(
            batch_size=config.train.batch_size,
            replicas=process_layout.mesh.shape[REPLICA],
            voxel_size=config.model.voxel_size,
            seed=config.train.seed,
            max_bucket=config.train.max_bucket,
            layout=PlanLayout.of(config.model),
            workers=workers,
        ),
        process_layout,
    )


def _workers(config: ExperimentConfig) -> int:
    """Processes that prepare scans."""
    if config.train.workers is not None:
        return config.train.workers
    if jax.default_backend() == "cpu":
        return 0  # the cores are busy already
    return max(1, available_cores() - 2)


@dataclass(frozen=True)
class Trainer:
    """What takes the steps of a run.

    Attributes:
        graph: structure of the detector.
        start: state before the first step, on the devices; consumed by `take_step`.
        schedule: learning rate by the number of steps applied.
        take_step: see `make_train_step`.
    """

    graph: nnx.GraphDef
    start: TrainState
    schedule: optax.Schedule
    take_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]

    def detector(self, state: TrainState, process_layout: MeshLayout) -> TR3D:
        """What is evaluated of a state, on the host: the averages where there are some."""
        source = state if state.averages is None else state.averages
        return merge_model(self.graph, *process_layout.fetch((source.exclusive, source.shared, source.stats)))


def build_trainer(
    config: ExperimentConfig, detector: TR3D, process_layout: MeshLayout, steps_per_epoch: int, total: int
) -> Trainer:
    """Optimiser, balancer, state and step of a config.

    Args:
        config: of the run.
        detector: as it starts.
        process_layout: of the mesh.
        steps_per_epoch: optimiser steps of an epoch.
        total: optimiser steps of the run.

    Raises:
        InputError: what is to be frozen is not there.
    """
    optim, names, mesh = config.optim, config.dataset_names, process_layout.mesh
    schedule = learning_rate(
        optim.lr,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        schedule=optim.schedule,
        decay_epochs=optim.decay_epochs,
        decay_factor=optim.decay_factor,
        final_lr=optim.final_lr,
        warmup_steps=optim.warmup_steps,
    )
    _, exclusive, shared, _ = split_model(detector)
    frozen = frozen_paths(shared, exclusive, optim.freeze)
    if frozen:
        say(frozen_text(shared, exclusive, frozen))
    optimizer = build_optimizer(
        schedule, optim.weight_decay, decay_norms_and_biases=optim.decay_norms_and_biases, frozen=frozen
    )
    balancer = build_balancer(config.harmonize, len(names), DATASET, config.train.seed)
    graph, state = create_state(
        detector, optimizer, balancer, averaged=optim.ema_decay > 0, accumulating=optim.accumulate_steps > 1
    )
    step_config = StepConfig(
        clip_norm=optim.clip_norm,
        loss=LossConfig(
            dtype=None if config.train.precision == "float32" else config.train.precision,
            rematerialize=config.train.rematerialize,
        ),
        average_statistics=config.model.running_statistics == "shared",
        accumulate_steps=optim.accumulate_steps,
        ema_decay=optim.ema_decay,
        max_skipped_steps=config.train.max_skipped_steps,
    )
    take_step = make_train_step(graph, state, config.specs, optimizer, balancer, mesh, step_config, frozen)
    return Trainer(graph, place_state(state, mesh), schedule, take_step)


def check_frozen(config: ExperimentConfig) -> None:
    """Whether what is to be frozen is there, before anything is drawn or compiled.

    Raises:
        InputError: see `frozen_paths`.
    """
    if config.optim.freeze:
        _, exclusive, shared, _ = split_model(nnx.eval_shape(lambda: draw_detector(config, jax.random.key(0))))
        frozen_paths(shared, exclusive, config.optim.freeze)


def steps_of_run(config: ExperimentConfig, batches_per_epoch: int) -> tuple[int, int]:
    """Optimiser steps of an epoch and of the run.

    Args:
        config: of the run.
        batches_per_epoch: that the stream counts.
    """
    steps_per_epoch = math.ceil(batches_per_epoch / config.optim.accumulate_steps)
    return steps_per_epoch, config.train.steps or config.train.epochs * steps_per_epoch
