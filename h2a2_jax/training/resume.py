"""With what a run begins: its newest checkpoint that can be read, another run's, or parameters drawn by its seed."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from h2a2_jax.checkpoint.integrity import DamagedCheckpointError
from h2a2_jax.checkpoint.store import CheckpointStore, checkpoint_place
from h2a2_jax.checkpoint.train_state import TrainState
from h2a2_jax.checkpoint.warm_start import warm_start
from h2a2_jax.config import ExperimentConfig, changes
from h2a2_jax.distributed import MeshLayout, is_main, say
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.documents import FOLDER as EVALUATIONS
from h2a2_jax.files import drop_lines_after
from h2a2_jax.models import TR3D
from h2a2_jax.training.build import build_detector
from h2a2_jax.training.nonfinite import kept_batches

_SHOWN = 5


def check_init(config: ExperimentConfig, workdir: Path) -> None:
    """Whether there is a folder for a new run to start from, before its own is made.

    Raises:
        InputError: there is not.
    """
    folder = config.train.init_from
    is_new = not (workdir / "checkpoints").is_dir()
    if folder and is_new and not checkpoint_place(Path(folder)).directory.is_dir():
        raise InputError(f"train.init_from is {folder!r}, where there are no checkpoints: give the folder of a run.")


def initial_detector(config: ExperimentConfig, is_new: bool) -> TR3D | None:
    """The detector before the first step of a run.

    Args:
        config: of the run.
        is_new: whether the run begins now: what was loaded is said, and what cannot be loaded is an error. A run that
            goes on asks for it only to compare with; then None where it cannot be had any more.

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
    *,
    accept_changes: bool = False,
) -> TrainState | None:
    """The state of the newest checkpoint that can be read; those that cannot are set aside, which is said.

    Args:
        store: of the run's checkpoints.
        like: state of the shapes and places wanted.
        config: to go on with.
        process_layout: of the processes, which all restore the same one.
        accept_changes: whether it may differ from the one that the run was begun with.

    Returns:
        The state; None where there is no checkpoint.

    Raises:
        InputError: the checkpoint is of another architecture or other datasets, the config differs, or no checkpoint
            can be read.
    """
    while (step := store.latest_step()) is not None:
        state, problem = None, ""
        try:
            _refuse_changes(store, step, config, accept_changes)
            state = store.restore_state(step, like, config.dataset_names, config)
        except DamagedCheckpointError as error:
            problem = str(error)
        if not process_layout.exchange(np.array([state is None], np.int32))().any():
            assert state is not None
            # Skipped steps in a row are those of one start: a run that was ended by them may try again.
            return replace(state, skipped_in_row=jnp.zeros_like(like.skipped_in_row))
        problem = problem or f"Another process cannot read the checkpoint of step {step}."
        if len(store.steps()) == 1:  # it stays where it is: nothing is to be begun anew over it
            raise InputError(
                f"{problem} There is no other one in {store.directory}: remove the folder to begin anew, or give "
                "another --workdir."
            )
        if is_main():
            say(f"{problem} It is set aside in {store.set_aside(step)}, and the one before it is taken.")
        process_layout.exchange(np.zeros(1, np.int32))()
        store.close()  # what is there is looked up anew
    return None


def drop_lost_steps(workdir: Path, step: int, batches: int = 1) -> None:
    """Drop what was told of steps after the one that a run goes on from, for they are taken again.

    Args:
        workdir: of the run.
        step: the one that it goes on from.
        batches: of a step.
    """
    for name in ("metrics.jsonl", "selection.jsonl"):
        drop_lines_after(workdir / name, step)
    for folder in (workdir / EVALUATIONS).glob("*/"):
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)
    for number, paths in kept_batches(workdir).items():
        for path in paths if number >= step * batches else ():
            path.unlink()


def _refuse_changes(store: CheckpointStore, step: int, config: ExperimentConfig, accept_changes: bool) -> None:
    found = changes(store.stored_config(step), config)
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
