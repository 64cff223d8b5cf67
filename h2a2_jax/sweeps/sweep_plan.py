"""Runs of a sweep: the config of each, its name, its folder, and the row of the table that it counts for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from h2a2_jax.config import ExperimentConfig, from_json, leaves_of, to_json
from h2a2_jax.errors import InputError
from h2a2_jax.loader.stream import batches_per_epoch
from h2a2_jax.scans.sources import build_source
from h2a2_jax.training.build import steps_of_run


@dataclass(frozen=True)
class SweepRun:
    """One training run.

    Attributes:
        name: Name of the setting, as in "tau0.15".
        seed: Seed of the parameters, the order of scans and the augmentation; `config` has it too.
        after: Run that has to be finished before this one begins; None: this one may begin at once.
    """

    name: str
    seed: int
    config: ExperimentConfig
    after: "SweepRun | None" = None

    @property
    def folder(self) -> str:
        """Name of the run's folder, unless another folder holds the same experiment (`locate`)."""
        return f"{self.name}_seed{self.seed}"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        runs: Runs of all seeds; several of one seed have different datasets and make up the row.
        tau: Threshold of alpha * beta that the row stands for; None in sweeps over something else.
    """

    label: str
    runs: tuple[SweepRun, ...]
    tau: float | None = None


def naive_joint(base: ExperimentConfig) -> ExperimentConfig:
    """The config without kernel selection and gradient harmonisation."""
    return replace(base, model=replace(base.model, selection=None), harmonize=replace(base.harmonize, method="mean"))


def selected_and_harmonized(base: ExperimentConfig) -> ExperimentConfig:
    """The config with NGH; its kernel selection stays."""
    return replace(base, harmonize=replace(base.harmonize, method="ngh"))


def restricted(joint: ExperimentConfig, names: Sequence[str], steps: int | None = None) -> ExperimentConfig:
    """The config on some of its datasets.

    The learning rate falls after the same fractions of the training, rounded to the nearest epoch. A decay that would
    coincide with the one before comes an epoch later; one that would come at the end is dropped. Warm-up keeps its
    number of steps. Without `steps` the training takes as many as the joint one.
    """
    rest = replace(joint, datasets=tuple(source for source in joint.datasets if source.name in names))
    epoch = steps_of_run(rest, _epoch_of(rest))[0]
    joint_epoch, whole = steps_of_run(joint, _epoch_of(joint))
    steps = whole if steps is None else steps
    decays: list[int] = []
    for wanted in joint.optim.decay_epochs:
        nearest = math.ceil(wanted * joint_epoch * steps / whole / epoch - 0.5)
        decay = max(nearest, decays[-1] + 1 if decays else 1)
        if decay * epoch < steps:
            decays.append(decay)
    optim = replace(joint.optim, decay_epochs=tuple(decays))
    return replace(rest, optim=optim, train=replace(joint.train, steps=steps))


def locate(rows: Sequence[Row], workdir: Path) -> dict[SweepRun, Path]:
    """The folder of every run: one that holds the same experiment, else a new one by the run's name.

    Raises:
        InputError: the folder of a run's name holds another experiment.
    """
    stored = {path.parent: path.read_text() for path in sorted((workdir / "runs").glob("*/config.json"))}
    experiments = {folder: experiment for folder, text in stored.items() if (experiment := _experiment(text))}
    folders = {}
    for run in (run for row in rows for run in row.runs):
        own = workdir / "runs" / run.folder
        same = [folder for folder, experiment in experiments.items() if _is_experiment(experiment, run)]
        # A kill while the config was written leaves the beginning of it.
        is_cut = own in stored and to_json(run.config).startswith(stored[own])
        if own in stored and own not in same and not is_cut:
            raise InputError(
                f"{own} holds another experiment ({_difference(stored[own], run.config)}): give another --workdir, or "
                "the flags that it was made with."
            )
        folders[run] = same[0] if same and own not in same else own
    return folders


def check_once(what: str, values: Sequence[int] | Sequence[float] | Sequence[str]) -> None:
    """Raise InputError if there is no value, or one is given twice."""
    if not values or len(set(values)) < len(values):
        raise InputError(f"The {what} are {', '.join(map(str, values)) or 'none'}; expected at least one, each once.")


def sampled_datasets(config: ExperimentConfig) -> tuple[str, ...]:
    """Datasets whose test protocol samples points, so that another evaluation may give other scores."""
    return tuple(spec.name for spec in config.specs if spec.test_sampling is not None)


def seeded(name: str, config: ExperimentConfig, seeds: Sequence[int]) -> tuple[SweepRun, ...]:
    """Runs of a config that differ in their seed.

    Raises:
        InputError: a seed is given twice or makes no sense, or there is none.
    """
    check_once("seeds", seeds)
    return tuple(SweepRun(name, seed, replace(config, train=replace(config.train, seed=seed))) for seed in seeds)


def _epoch_of(config: ExperimentConfig) -> int:
    """Batches of an epoch of the datasets of a config."""
    return batches_per_epoch(config, [len(build_source(source, "train")) for source in config.datasets])


def _experiment(text: str) -> ExperimentConfig | None:
    """The config of a text; None if it cannot be read."""
    try:
        return from_json(text)
    except InputError:
        return None


def _is_experiment(stored: ExperimentConfig, run: SweepRun) -> bool:
    """Return True if a stored config is a run's, even if the folder of the sweep has moved since."""
    if run.after is None:
        return stored == run.config
    # init_from is a folder of the sweep: only its name is compared.
    first, second = (
        replace(config, train=replace(config.train, init_from=Path(config.train.init_from).name))
        for config in (stored, run.config)
    )
    return first == second


def _difference(text: str, config: ExperimentConfig) -> str:
    """The first value in which two configs differ, in words."""
    stored = _experiment(text)
    if stored is None:
        return "its config.json cannot be read"
    theirs, ours = leaves_of(stored), leaves_of(config)
    key = next((key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)), None)
    return "its config differs" if key is None else f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
