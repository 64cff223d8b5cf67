"""Configs and runs under way for tests."""

from collections.abc import Sequence
from typing import Any

from h2a2_jax.config import ExperimentConfig, OptimConfig, SourceConfig, TrainConfig
from h2a2_jax.loader.stream import JointStep
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.training.callbacks import Training


def joint_config(specs: Sequence[DatasetSpec], train: TrainConfig | None = None, **optim: Any) -> ExperimentConfig:
    """A config of procedural datasets with these specs."""
    datasets = tuple(SourceConfig(spec.name, kind="synthetic") for spec in specs)
    return ExperimentConfig(datasets, optim=OptimConfig(**optim), train=train or TrainConfig())


def part_of_run(**fields: Any) -> Training:
    """A run under way of which only these fields are there."""
    training = object.__new__(Training)
    training.__dict__.update(fields)
    return training


def batch_number(number: int) -> JointStep:
    """The input of a step of which only the number is there."""
    item = object.__new__(JointStep)
    item.__dict__["step"] = number
    return item
