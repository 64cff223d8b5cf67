"""Parts of a run from its config: training stream, trainer with its compiled step, detector and state to begin with."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from h2a2_jax.balancers import build_balancer
from h2a2_jax.balancers.packing import pack_like, unpack
from h2a2_jax.checkpoint.integrity import DamagedCheckpointError
from h2a2_jax.checkpoint.parameter_groups import frozen_paths, frozen_text
from h2a2_jax.checkpoint.store import CheckpointStore, checkpoint_place
from h2a2_jax.checkpoint.train_state import (
    TrainState,
    create_state,
    merge_model,
    place_state,
    split_model,
)
from h2a2_jax.checkpoint.warm_start import warm_start
from h2a2_jax.config import ExperimentConfig, changes
from h2a2_jax.distributed import DATASET, MeshLayout, is_main, say
from h2a2_jax.errors import InputError
from h2a2_jax.initialization import build_detector, draw_detector
from h2a2_jax.loader.batching import Batch
from h2a2_jax.loader.stream import JointStream, count_workers
from h2a2_jax.models import DetectorNetwork
from h2a2_jax.optimizer import build_optimizer, grouped_paths, learning_rate, packing_kind
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder
from h2a2_jax.scans.scan import ScanSource
from h2a2_jax.scans.sources import CachedSource, PermutedBoxes, build_source
from h2a2_jax.scans.tfds_source import TfdsSource
from h2a2_jax.training.step import Sizes, StepMetrics, make_train_step

CACHED_SCANS = 2000
"""Sources of up to this many scans are kept in memory if a thread loads them and loading takes long."""

_SHOWN = 5
"""Changes of the config that an error message lists."""


def build_stream(config: ExperimentConfig, process_layout: MeshLayout) -> JointStream:
    """Build the training stream of a config; a process opens the datasets that it loads.

    Raises:
        InputError: a dataset is missing or has no usable scan.
    """

    def open_source(dataset: int) -> ScanSource:
        source = build_source(config.datasets[dataset], "train")
        # Prepared scans are read in milliseconds, and all of them fill gigabytes; workers would each keep some.
        is_quick = isinstance(source, Mmdet3dFolder | TfdsSource)
        if count_workers(config) == 0 and not is_quick and len(source) <= CACHED_SCANS:
            source = CachedSource(source)
        return PermutedBoxes(source, config.train.seed) if config.train.permute_boxes else source

    sources = process_layout.all_or_raise(
        lambda: {d: open_source(d) for d in process_layout.datasets}, "open its scans"
    )
    return JointStream(config, [sources.get(d) for d in range(len(config.datasets))], process_layout)


@dataclass(frozen=True)
class Trainer:
    """The compiled step of a run, with its first state.

    Attributes:
        graph: structure of the detector.
        start: state before the first step, packed and on the devices; consumed by `take_step`.
        schedule: learning rate by the number of applied steps.
        take_step: the step of packed states (`make_train_step`).
    """

    graph: nnx.GraphDef
    start: TrainState
    schedule: optax.Schedule
    take_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]

    def detector(self, state: TrainState, process_layout: MeshLayout) -> DetectorNetwork:
        """Return the detector to evaluate, on the host: of the averages if the state has some."""
        source = state if state.averages is None else state.averages
        parts = process_layout.fetch((source.exclusive, source.shared, source.stats))
        return merge_model(self.graph, *unpack(parts))

    def plain_start(self, process_layout: MeshLayout) -> TrainState:
        """Return the plain state before the first step, on the devices: the form of a checkpoint."""
        return place_state(unpack(process_layout.fetch(self.start)), process_layout.mesh)

    def packed(self, state: TrainState, process_layout: MeshLayout) -> TrainState:
        """Pack a plain state, as `take_step` takes it, on the devices."""
        return place_state(pack_like(self.start, process_layout.fetch(state)), process_layout.mesh)


def build_trainer(
    config: ExperimentConfig,
    detector: DetectorNetwork,
    process_layout: MeshLayout,
    steps_per_epoch: int,
    total: int,
    scans: Sequence[int] | None = None,
) -> Trainer:
    """Build optimiser, balancer, state and step of a config.

    Args:
        config: the run's configuration.
        detector: the detector before the first step.
        process_layout: mesh of the run.
        steps_per_epoch: optimiser steps of an epoch.
        total: optimiser steps of the run.
        scans: training scans of each dataset (`make_train_step`).

    Raises:
        InputError: `optim.freeze` names a parameter that the detector does not have.
    """
    optim, mesh = config.optim, process_layout.mesh
    schedule = learning_rate(optim, steps_per_epoch=steps_per_epoch, total_steps=total)
    _, exclusive, shared, _ = split_model(detector)
    frozen = frozen_paths(shared, exclusive, optim.freeze)
    if frozen:
        say(frozen_text(shared, exclusive, frozen))
    grouped = grouped_paths(shared, exclusive, optim)
    optimizer = build_optimizer(optim, schedule, frozen, grouped)
    balancer = build_balancer(config.harmonize, len(config.datasets), DATASET, config.train.seed)
    graph, state = create_state(
        detector, optimizer, balancer, averaged=optim.ema_decay > 0, accumulating=optim.accumulate_steps > 1,
        kind=partial(packing_kind, frozen=frozen, grouped=grouped),
    )  # fmt: skip
    if state.agreement is not None:
        _say_unmeasured(config, scans)
    take_step = make_train_step(graph, state, config, optimizer, balancer, mesh, frozen, scans=scans)
    return Trainer(graph, place_state(state, mesh), schedule, take_step)


def _say_unmeasured(config: ExperimentConfig, scans: Sequence[int] | None) -> None:
    """Say where no batch differs from another, so that kernel selection cannot tell datasets from their scatter."""
    sizes = Sizes.of(config, scans)
    full = sizes.batch >= sizes.scans
    names = [name for name, is_full in zip(config.dataset_names, full.tolist(), strict=True) if is_full]
    if names:
        say(
            f"Every batch holds all training scans of {', '.join(names)}, so that their gradients show no scatter to "
            "compare datasets by, and every offset stays shared: a smaller train.batch_size lets selection measure."
        )


def check_frozen(config: ExperimentConfig) -> None:
    """Check `optim.freeze` and `optim.groups` before anything is drawn or compiled.

    Raises:
        InputError: see `frozen_paths` and `grouped_paths`.
    """
    if config.optim.freeze or config.optim.groups:
        _, exclusive, shared, _ = split_model(nnx.eval_shape(lambda: draw_detector(config, jax.random.key(0))))
        frozen_paths(shared, exclusive, config.optim.freeze)
        grouped_paths(shared, exclusive, config.optim)


def steps_of_run(config: ExperimentConfig, batches_per_epoch: int) -> tuple[int, int]:
    """Return the optimiser steps of an epoch and of the run.

    Args:
        config: the run's configuration.
        batches_per_epoch: batches of the stream in an epoch.
    """
    steps_per_epoch = math.ceil(batches_per_epoch / config.optim.accumulate_steps)
    return steps_per_epoch, config.train.steps or config.train.epochs * steps_per_epoch


def check_init(config: ExperimentConfig, workdir: Path) -> None:
    """Check that a new run finds checkpoints to start from, before its own folder is made.

    Raises:
        InputError: there are none.
    """
    folder = config.train.init_from
    is_new = not (workdir / "checkpoints").is_dir()
    if folder and is_new and not checkpoint_place(Path(folder)).directory.is_dir():
        raise InputError(f"train.init_from is {folder!r}, where there are no checkpoints: give the folder of a run.")


def initial_detector(config: ExperimentConfig, is_new: bool) -> DetectorNetwork | None:
    """Build the detector before the first step of a run: drawn by its seed, or of another run's checkpoint.

    Args:
        config: the run's configuration.
        is_new: True if the run begins now: what was loaded is printed, and a checkpoint that cannot be loaded is an
            error. A resumed run only compares with the detector.

    Returns:
        The detector; None if a resumed run finds the checkpoint no more.

    Raises:
        InputError: the checkpoint to start from cannot be read, or nothing in it fits.
    """
    detector, train = build_detector(config), config.train
    if not train.init_from:
        return detector
    try:
        detector, report = warm_start(detector, config.specs, train.init_from, train.init_step)
    except InputError:
        if is_new:
            raise
        return None
    if is_new:
        say(report.text())
    return detector


def restore_newest(
    store: CheckpointStore,
    like: TrainState,
    config: ExperimentConfig,
    process_layout: MeshLayout,
    scans: Sequence[int] = (),
    *,
    accept_changes: bool = False,
) -> TrainState | None:
    """Restore the newest readable checkpoint; unreadable ones are set aside, with a message.

    Args:
        store: checkpoints of the run.
        like: a state with the shapes and places of arrays.
        config: the config to resume with.
        process_layout: processes of the run, which all restore the same checkpoint.
        scans: numbers of training scans of the datasets; empty: not compared with those that the run began with.
        accept_changes: True allows another config or other numbers of scans than the run began with.

    Returns:
        The state; None without a checkpoint.

    Raises:
        InputError: the checkpoint is of another architecture or other datasets, the config or a number of scans
            differs, or no checkpoint can be read.
    """
    while (step := store.latest_step()) is not None:
        state, problem = None, ""
        try:
            _check_changes(store, step, config, dict(zip(config.dataset_names, scans, strict=False)), accept_changes)
            state = store.restore_state(step, like, config.dataset_names, config)
        except DamagedCheckpointError as error:
            problem = str(error)
        if not process_layout.exchange_flag(state is None).result().any():
            assert state is not None
            # A run that too many skipped steps in a row ended may try again.
            return replace(state, skipped_in_row=jnp.zeros_like(like.skipped_in_row))
        problem = problem or f"Another process cannot read the checkpoint of step {step}."
        if len(store.steps()) == 1:  # stays where it is, so that no new run begins over it
            raise InputError(
                f"{problem} There is no other one in {store.directory}: remove the folder to begin anew, or give "
                "another --workdir."
            )
        if is_main():
            say(f"{problem} It is set aside in {store.set_aside(step)}, and the one before it is taken.")
        process_layout.exchange_flag(False).result()  # until the main process has moved it
        store.close()  # reads the folder anew
    return None


def _check_changes(
    store: CheckpointStore, step: int, config: ExperimentConfig, scans: Mapping[str, int], accept_changes: bool
) -> None:
    found = changes(store.stored_config(step), config)
    stored = store.stored_scans(step)
    found += [
        f"{name} had {stored[name]} training scans and has {count}"
        for name, count in scans.items()
        if stored.get(name, count) != count
    ]
    if not found:
        return
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    listed = f"{'; '.join(found[:_SHOWN])}{more}"
    if not accept_changes:
        raise InputError(
            f"The run in {store.directory.parent} was begun with another config: {listed}. Give the one it was begun "
            "with, another --workdir, or --accept_changes to go on with this one."
        )
    say(f"Going on with another config: {listed}.")
