"""Which runs a sweep is made of: the config of each, its name, and the row of the table that it counts for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from h2a2_jax.config import ExperimentConfig, from_json, leaves_of, to_json
from h2a2_jax.errors import InputError
from h2a2_jax.scans.sources import build_source
from h2a2_jax.training.build import steps_of_run

RUNS = "runs"
"""Folder of the runs in the folder of a sweep."""

ABLATION_ROWS = ("naive", "sfks", "ngh", "sfks_ngh", "tr3d")

DEFAULT_TAUS = (0.15, 0.2, 0.25, 0.3, 0.35)
"""About the default 0.25: alpha starts at 0.5 and beta about 0.5, so that all offsets are exclusive far above it and
none far below."""


@dataclass(frozen=True)
class SweepRun:
    """One training run.

    Attributes:
        name: of the setting, as in "tau0.15".
        seed: of parameters, order of scans and augmentation.
        config: everything else.
        after: the run that has to be finished before.
    """

    name: str
    seed: int
    config: ExperimentConfig
    after: "SweepRun | None" = None

    @property
    def folder(self) -> str:
        """Name of the folder that the run has unless another one holds the same experiment."""
        return f"{self.name}_seed{self.seed}"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        label: what the row is called.
        runs: those of all seeds; several of one seed have different datasets, and make the row together.
        tau: the threshold that the row stands for; None where the sweep is not over it.
    """

    label: str
    runs: tuple[SweepRun, ...]
    tau: float | None = None


def default_taus(base: ExperimentConfig) -> tuple[float, ...]:
    """The values swept when none are given; the base's own is among them."""
    own = () if base.model.selection is None else (base.model.selection.tau,)
    return tuple(sorted({*DEFAULT_TAUS, *own}))


def tau_rows(base: ExperimentConfig, taus: Sequence[float], seeds: Sequence[int]) -> list[Row]:
    """The base with every tau, a row each.

    Args:
        base: joint config with kernel selection.
        taus: thresholds of alpha * beta, each once.
        seeds: each once.

    Raises:
        InputError: the base has no kernel selection, or a value is given twice or makes no sense.
    """
    selection = base.model.selection
    if selection is None:
        raise InputError("The tau sweep needs kernel selection, and model.selection is off: give a config that has it.")
    _check_once("taus", taus)
    rows = []
    for tau in taus:
        model = replace(base.model, selection=replace(selection, tau=tau))
        rows.append(Row(f"tau = {tau:g}", seeded(f"tau{tau}", replace(base, model=model), seeds), tau))
    return rows


def ablation_rows(base: ExperimentConfig, seeds: Sequence[int], names: Sequence[str] = ()) -> list[Row]:
    """Naive joint training, SF-KS, NGH, both, and TR3D alone on each dataset.

    The single-dataset runs take as many steps as the joint ones, so that each sees as many of its scans, and lower
    their learning rate after the number of their epochs that is nearest to the same number of steps.

    Args:
        base: joint config with kernel selection; all that the ablation does not switch stays.
        seeds: each once.
        names: of the rows wanted, in their order: of `ABLATION_ROWS`, or "tr3d_" and a dataset for TR3D on that alone;
            empty: all of the former.

    Raises:
        InputError: the base has no kernel selection or only one dataset, a seed is given twice or makes no sense, or
            there is no such row.
    """
    if base.model.selection is None:
        raise InputError("The ablation switches kernel selection off itself: give a config that has model.selection.")
    if len(base.datasets) < 2:
        raise InputError(
            f"The ablation is of joint training, and the config has only {base.dataset_names[0]}: give 2+."
        )
    naive = naive_joint(base)
    both = selected_and_harmonized(base)
    joint = {
        "naive": ("naive joint", naive),
        "sfks": ("SF-KS", replace(both, harmonize=naive.harmonize)),
        "ngh": ("NGH", replace(naive, harmonize=both.harmonize)),
        "sfks_ngh": ("SF-KS + NGH", both),
    }
    rows = {name: Row(label, seeded(name, config, seeds)) for name, (label, config) in joint.items()}
    alone = {f"tr3d_{name}": seeded(f"tr3d_{name}", restricted(naive, [name]), seeds) for name in base.dataset_names}
    rows["tr3d"] = Row("TR3D alone", tuple(run for runs in alone.values() for run in runs))
    rows |= {name: Row(f"TR3D alone on {name.removeprefix('tr3d_')}", runs) for name, runs in alone.items()}
    if unknown := [name for name in names if name not in rows]:
        raise InputError(f"The ablation has no row {unknown[0]!r}; its rows are {', '.join(rows)}.")
    _check_once("rows", names or ABLATION_ROWS)
    return [rows[name] for name in names or ABLATION_ROWS]


def naive_joint(base: ExperimentConfig) -> ExperimentConfig:
    """The config without kernel selection and gradient harmonisation."""
    return replace(base, model=replace(base.model, selection=None), harmonize=replace(base.harmonize, method="mean"))


def selected_and_harmonized(base: ExperimentConfig) -> ExperimentConfig:
    """The config with NGH; the kernel selection is its own."""
    return replace(base, harmonize=replace(base.harmonize, method="ngh"))


def restricted(joint: ExperimentConfig, names: Sequence[str], steps: int | None = None) -> ExperimentConfig:
    """The config on some of its datasets.

    Args:
        joint: a config.
        names: of its datasets.
        steps: of training; None: those of the joint run. The learning rate falls after the same parts of them, to the
            nearest epoch that is not the last; of falls at one epoch all but the first come an epoch later. Warm-up
            takes the steps that it takes.
    """
    rest = replace(joint, datasets=tuple(source for source in joint.datasets if source.name in names))
    epoch = steps_of_run(rest, _batches_per_epoch(rest))[0]
    joint_epoch, whole = steps_of_run(joint, _batches_per_epoch(joint))
    steps = whole if steps is None else steps
    decays: list[int] = []
    for wanted in joint.optim.decay_epochs:
        nearest = math.ceil(wanted * joint_epoch * steps / whole / epoch - 0.5)
        decay = max(nearest, decays[-1] + 1 if decays else 1)
        if decay * epoch < steps:
            decays.append(decay)
    return replace(
        rest,
        optim=replace(joint.optim, decay_epochs=tuple(decays)),
        train=replace(joint.train, steps=steps),
    )


def locate(rows: Sequence[Row], workdir: Path) -> dict[SweepRun, Path]:
    """The folder of every run: one that holds the same experiment, else a new one by the run's name.

    Args:
        rows: of a sweep.
        workdir: of the sweep, which may hold the runs of other sweeps.

    Raises:
        InputError: the folder of a run's name holds another experiment.
    """
    stored = {path.parent: path.read_text() for path in sorted((workdir / RUNS).glob("*/config.json"))}
    experiments = {folder: experiment for folder, text in stored.items() if (experiment := _experiment(text))}
    folders = {}
    for run in (run for row in rows for run in row.runs):
        own = workdir / RUNS / run.folder
        same = [folder for folder, experiment in experiments.items() if _is(experiment, run)]
        if own in stored and own not in same and not _cut_short(stored[own], run.config):
            raise InputError(
                f"{own} holds another experiment ({_difference(stored[own], run.config)}): give another --workdir, or "
                "the flags that it was made with."
            )
        folders[run] = same[0] if same and own not in same else own
    return folders


def drawn_datasets(config: ExperimentConfig) -> tuple[str, ...]:
    """Those whose test protocol draws points, so that evaluating again may give other figures."""
    return tuple(spec.name for spec in config.specs if spec.test_sampling is not None)


def seeded(name: str, config: ExperimentConfig, seeds: Sequence[int]) -> tuple[SweepRun, ...]:
    """Runs of a config that differ in their seed.

    Raises:
        InputError: a seed is given twice or makes no sense, or there is none.
    """
    _check_once("seeds", seeds)
    return tuple(SweepRun(name, seed, replace(config, train=replace(config.train, seed=seed))) for seed in seeds)


def _check_once(what: str, values: Sequence[int] | Sequence[float] | Sequence[str]) -> None:
    if not values or len(set(values)) < len(values):
        raise InputError(f"The {what} are {', '.join(map(str, values)) or 'none'}; expected at least one, each once.")


def _batches_per_epoch(config: ExperimentConfig) -> int:
    """As the stream of training scans counts them."""
    batches = []
    for source in config.datasets:
        repeats = source.spec.repeats if source.repeats is None else source.repeats
        a_step = (source.batch_size or config.train.batch_size) * source.weight
        batches.append(math.ceil(len(build_source(source, "train")) * repeats / a_step))
    return max(batches)


def _experiment(text: str) -> ExperimentConfig | None:
    """What a stored config says; None if it cannot be read."""
    try:
        return from_json(text)
    except InputError:
        return None


def _is(stored: ExperimentConfig, run: SweepRun) -> bool:
    """Whether a stored config is a run's, wherever the folder of the sweep lay and however it was spelt."""
    if run.after is None:
        return stored == run.config
    return _without_place(stored) == _without_place(run.config)


def _without_place(config: ExperimentConfig) -> ExperimentConfig:
    """The config with the name alone of the folder that it starts from."""
    return replace(config, train=replace(config.train, init_from=Path(config.train.init_from).name))


def _cut_short(text: str, config: ExperimentConfig) -> bool:
    """Whether this is the beginning of the stored config: a kill may come while a run writes it."""
    return to_json(config).startswith(text)


def _difference(text: str, config: ExperimentConfig) -> str:
    """The first value that differs."""
    stored = _experiment(text)
    if stored is None:
        return "its config.json cannot be read"
    theirs, ours = leaves_of(stored), leaves_of(config)
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    key = keys[0]
    return f"{key} is {theirs.get(key)} there and {ours.get(key)} here" if keys else "its config differs"
