"""Folders of small runs, as training leaves them after no step."""

from dataclasses import replace
from pathlib import Path

import optax

from configs.joint import demo
from h2a2_jax.balancers.ngh import plain_mean
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import create_state
from h2a2_jax.config import ExperimentConfig, to_json
from h2a2_jax.initialization import build_detector


def small(names: tuple[str, ...], selection: bool) -> ExperimentConfig:
    config = demo()
    datasets = [replace(d, train_size=1, val_size=2) for d in config.datasets if d.name in names]
    model = replace(config.model, stem_channels=4, stage_channels=(4, 4, 4, 4), neck_channels=4, voxel_size=0.03)
    if not selection:
        model = replace(model, selection=None)
    return replace(config, datasets=tuple(datasets), model=model)


def store(config: ExperimentConfig, workdir: Path) -> None:
    """Write the checkpoint and the config of a run."""
    _, state = create_state(build_detector(config), optax.sgd(0.1), plain_mean())
    with CheckpointStore(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, state, config, config.dataset_names)
    (workdir / "config.json").write_text(to_json(config))
