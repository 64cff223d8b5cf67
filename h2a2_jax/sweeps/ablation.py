"""Tau sweep and ablation: settings of one config side by side."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.initialization import count_parameters
from h2a2_jax.layers.kernel_selection import READING_0_1_0
from h2a2_jax.models import kind_of
from h2a2_jax.sweeps.intervals import row_differences, samples_of, stored_matches
from h2a2_jax.sweeps.rivals import BALANCERS, PRETRAINED, SHARING, balanced, pretrained_row, shared_otherwise
from h2a2_jax.sweeps.sweep_plan import (
    Row,
    SweepRun,
    check_once,
    locate,
    naive_joint,
    restricted,
    seeded,
    selected_and_harmonized,
)
from h2a2_jax.sweeps.sweep_results import (
    ALL,
    EXCLUSIVE,
    MEAN,
    SEEDS,
    SPEED,
    Column,
    Score,
    evaluation_scores,
    last_metrics,
    metric_names,
    per_cent,
    read_evaluation,
    result_row,
    scans_per_second,
    sweep_result,
    training_length,
)
from h2a2_jax.sweeps.sweep_runner import run_sweep

ABLATION_ROWS = ("naive", "sfks", "ngh", "sfks_ngh", "single")
"""Rows of the ablation unless others are asked for."""
CONTROL_ROWS = ("frozen", "modulation", "exclusive", "naive_shared_stats", "random_labels")
"""Rows on request, each of which takes one part away that a gain may come from."""
RIVAL_ROWS = (*SHARING, "sfks_pdnorm", PRETRAINED, *BALANCERS)
"""Rows on request: other ways to share and other balancers."""

DEFAULT_TAUS = (0.15, 0.2, 0.25, 0.3, 0.35)
"""Values around the default 0.25. Beta is near 0.5, so offsets are exclusive where the prior alpha is below twice tau;
with the prior "learned" alpha stays near 0.5, and all of them are far above these thresholds and none far below."""


def run_tau_sweep(
    config: ExperimentConfig,
    workdir: Path,
    taus: Sequence[float],
    seeds: Sequence[int],
    jobs: int | None,
    budget_minutes: float | None = None,
) -> int:
    """Train and evaluate the config with every tau and seed; write the tables, results.json and tau.png.

    Finished runs in the workdir are not repeated. Without taus the sweep takes `default_taus`. Differences are from
    the config's own tau, or the first. Jobs, budget and exit status are those of `run_sweep`.

    Raises:
        InputError: the config does not fit the sweep, data are missing, or the workdir holds other runs of the same
            names.
    """
    rows = tau_rows(config, taus or default_taus(config), seeds)
    assert config.model.selection is not None
    own = [row.label for row in rows if row.tau == config.model.selection.tau] or [rows[0].label]
    result = partial(comparison_result, "tau_sweep", "Sweep of the threshold tau", config, rows, own)
    return run_sweep(
        config, workdir, partial(locate, rows, workdir), lambda found: [result(found)], jobs, budget_minutes
    )


def run_ablation(
    config: ExperimentConfig,
    workdir: Path,
    seeds: Sequence[int],
    jobs: int | None,
    budget_minutes: float | None = None,
    names: Sequence[str] = (),
    against: Sequence[str] = (),
) -> int:
    """Train and evaluate naive joint training, SF-KS, NGH, both, and the detector alone, with every seed.

    Writes the tables, results.json and ablation.png. Arguments and errors are those of `run_tau_sweep`; `names` are
    rows of `ablation_rows`, and `against` those that the differences of all others are from: without them naive, or
    the first row of a table without it.
    """
    rows = ablation_rows(config, seeds, names, workdir)
    labels = dict(zip(_row_names(config, names), (row.label for row in rows), strict=True))
    if unknown := [name for name in against if name not in labels and name != "single"]:
        raise InputError(f"--against is {unknown[0]!r}; expected rows of the table: {', '.join(labels)}.")
    references = [labels[name] for name in _row_names(config, against or ["naive"]) if name in labels] or [
        rows[0].label
    ]
    result = partial(comparison_result, "ablation", "Ablation", config, rows, references)
    starts = dict.fromkeys(run.after for row in rows for run in row.runs if run.after is not None)
    located = partial(locate, [Row("pretraining", tuple(starts)), *rows], workdir)
    return run_sweep(config, workdir, located, lambda found: [result(found)], jobs, budget_minutes)


def default_taus(base: ExperimentConfig) -> tuple[float, ...]:
    """Thresholds of a sweep when none are given, the base's own included."""
    own = () if base.model.selection is None else (base.model.selection.tau,)
    return tuple(sorted({*DEFAULT_TAUS, *own}))


def tau_rows(base: ExperimentConfig, taus: Sequence[float], seeds: Sequence[int]) -> list[Row]:
    """The base with every threshold of alpha * beta, a row each.

    Raises:
        InputError: the base has no kernel selection, or a value is given twice or makes no sense.
    """
    selection = base.model.selection
    if selection is None or selection.kernels != "selected":
        raise InputError("The tau sweep needs kernel selection, and model.selection is off: give a config that has it.")
    check_once("taus", taus)
    rows = []
    for tau in taus:
        model = replace(base.model, selection=replace(selection, tau=tau))
        rows.append(Row(f"tau = {tau:g}", seeded(f"tau{tau}", replace(base, model=model), seeds), tau))
    return rows


def ablation_rows(
    base: ExperimentConfig, seeds: Sequence[int], names: Sequence[str] = (), workdir: Path = Path()
) -> list[Row]:
    """Naive joint training, SF-KS, NGH, both, the detector alone on each dataset, controls and rivals.

    - "frozen": SF-KS with choices as O, P and A were drawn, by the prior "learned" without learning; beside what
      `optim.freeze` of the base names.
    - "modulation": modulation and gate alone, with the shared kernel at every offset.
    - "exclusive": modulation and gate, with the dataset's own kernel at every offset.
    - "naive_shared_stats": naive, with running statistics of batch norm that the datasets share.
    - "random_labels": SF-KS and NGH, each scan with the boxes of another one (`train.permute_boxes`).
    - naive with another balancer (`rivals.BALANCERS`) or another way to share (`rivals.SHARING`).
    - "sfks_pdnorm": SF-KS with prompt-driven norms.
    - "pretrained": trained on the first dataset, then on each (`rivals.pretrained_row`); `workdir` is the sweep's.

    The single-dataset runs take as many steps as the joint ones, so that each sees as many of its scans. Their
    learning rate falls after the number of epochs that is nearest to the same number of steps.

    Names, in the order of the table, are of `ABLATION_ROWS`, `CONTROL_ROWS` and `RIVAL_ROWS`, or "tr3d_<dataset>" for
    one dataset, "fcaf3d_<dataset>" where that is the detector; "single" is another name of "tr3d" or "fcaf3d". Without
    names the table has all of `ABLATION_ROWS`.

    Raises:
        InputError: the base selects no kernels or has only one dataset, a seed is given twice or makes no sense, or
            there is no such row.
    """
    selection = base.model.selection
    if selection is None or selection.kernels != "selected":
        raise InputError(
            "The ablation switches kernel selection off itself: give a config that has model.selection, with kernels "
            "that are 'selected'."
        )
    if len(base.datasets) < 2:
        raise InputError(
            f"The ablation is of joint training, and the config has only {base.dataset_names[0]}: give 2+."
        )
    naive = naive_joint(base)
    both = selected_and_harmonized(base)
    sfks = replace(both, harmonize=naive.harmonize)

    def with_kernels(kernels: Literal["shared", "exclusive"]) -> ExperimentConfig:
        return replace(sfks, model=replace(sfks.model, selection=replace(selection, kernels=kernels)))

    drawn = selection
    if selection.prior == "agreement":  # which would go on choosing
        drawn = replace(selection, **READING_0_1_0)
    frozen = replace(
        sfks,
        model=replace(sfks.model, selection=drawn),
        optim=replace(sfks.optim, freeze=tuple(dict.fromkeys((*base.optim.freeze, "selection")))),
    )
    # Made when a row is asked for: a rival may not fit the base, as "fixed" where it has no weights.
    joint: dict[str, tuple[str, Callable[[], ExperimentConfig]]] = {
        "naive": ("naive joint", lambda: naive),
        "sfks": ("SF-KS", lambda: sfks),
        "ngh": ("NGH", lambda: replace(naive, harmonize=both.harmonize)),
        "sfks_ngh": ("SF-KS + NGH", lambda: both),
        "frozen": ("SF-KS, frozen choice", lambda: frozen),
        "modulation": ("modulation", lambda: with_kernels("shared")),
        "exclusive": ("exclusive kernels", lambda: with_kernels("exclusive")),
        "naive_shared_stats": (
            "naive, shared statistics",
            lambda: replace(naive, model=replace(naive.model, running_statistics="shared")),
        ),
        "random_labels": ("random labels", lambda: replace(both, train=replace(both.train, permute_boxes=True))),
        "sfks_pdnorm": (
            "SF-KS + prompt-driven norms",
            lambda: replace(sfks, model=replace(sfks.model, norm_affine="prompt")),
        ),
    }
    joint |= {name: (label, partial(shared_otherwise, base, name)) for name, (label, _) in SHARING.items()}
    joint |= {name: (label, partial(balanced, base, name)) for name, label in BALANCERS.items()}

    def joint_row(name: str) -> Row:
        label, config = joint[name]
        return Row(label, seeded(name, config(), seeds))

    def alone(label: str, *names: str) -> Row:
        runs = [run for name in names for run in seeded(f"{kind}_{name}", restricted(naive, [name]), seeds)]
        return Row(label, tuple(runs))

    rows: dict[str, Callable[[], Row]] = {name: partial(joint_row, name) for name in joint}
    kind, title = base.model.kind, kind_of(base.model).title
    rows[kind] = partial(alone, f"{title} alone", *base.dataset_names)
    rows |= {f"{kind}_{name}": partial(alone, f"{title} alone on {name}", name) for name in base.dataset_names}
    rows[PRETRAINED] = lambda: pretrained_row(base, seeds, workdir)
    names = _row_names(base, names)
    if unknown := [name for name in names if name not in rows]:
        raise InputError(f"The ablation has no row {unknown[0]!r}; its rows are {', '.join(rows)}.")
    check_once("rows", names)
    return [rows[name]() for name in names]


def _row_names(base: ExperimentConfig, names: Sequence[str]) -> list[str]:
    """Names of rows, those of `ABLATION_ROWS` if there are none."""
    return [base.model.kind if name == "single" else name for name in names or ABLATION_ROWS]


def comparison_result(
    kind: str,
    title: str,
    base: ExperimentConfig,
    rows: Sequence[Row],
    against: Sequence[str],
    folders: Mapping[SweepRun, Path],
) -> dict[str, Any]:
    """Result of a tau sweep or an ablation: average precision, exclusive offsets, parameters and speed of each setting.

    A seed of a row counts when all of its runs are finished. Differences are from the rows whose labels are `against`.
    """
    entries, samples = [], {}
    for row in rows:
        seeds = dict.fromkeys(run.seed for run in row.runs)
        runs = {seed: {run: folders[run] for run in row.runs if run.seed == seed} for seed in seeds}
        scores = [score for seed in seeds for score in _comparison_scores(runs[seed], base)]
        matches = {seed: stored_matches(runs[seed].values()) for seed in seeds}
        samples[row.label] = samples_of(scores, metric_names(base), matches)
        parameters = sum(count_parameters(run.config) for run in runs[row.runs[0].seed])
        entries.append(result_row(row.label, scores, tau=row.tau, parameters=parameters))
    columns = [Column("setting", ("name",), "text")]
    for name in [*base.dataset_names, MEAN]:
        columns += [Column(f"{name} {metric}", ("summary", name, metric)) for metric in metric_names(base)]
    if any(EXCLUSIVE in found for row in entries for found in row["summary"].values()):
        columns += [Column(f"{name} exclusive", ("summary", name, EXCLUSIVE)) for name in base.dataset_names]
    columns += [Column("parameters", ("parameters",), "millions"), Column("scans/s", ("summary", ALL, SPEED)), SEEDS]
    note = (
        f"mAP and exclusive in per cent, after {training_length(base)} of {base.train.batch_size} scans a dataset; "
        "mean ± sample standard deviation over seeds; exclusive: share of the kernel offsets that use the dataset's "
        "own kernel, of the last line of metrics; parameters: of all detectors of a row, also those without effect; "
        "scans/s: in training, median "
        "over the run's logged steps, beside whatever ran at the same time."
    )
    differences = row_differences(samples, against, base.dataset_names, metric_names(base))
    return sweep_result(kind, title, note, base, entries, columns, differences)


def _comparison_scores(runs: Mapping[SweepRun, Path], base: ExperimentConfig) -> list[Score]:
    """Scores of one seed of a row, from its runs on different datasets; none unless all of them are finished."""
    seed = next(iter(runs)).seed
    merged: dict[str, Any] = {}
    folder_names, extra = {}, {}
    for folder in runs.values():
        evaluation, last = read_evaluation(folder), last_metrics(folder)
        if evaluation is None:
            return []
        merged |= evaluation
        for name in evaluation:
            folder_names[name] = folder.name
            if (key := f"{EXCLUSIVE}/{name}") in last:
                extra[name] = {EXCLUSIVE: per_cent(last[key])}
    scores = [
        replace(s, metrics={**s.metrics, **extra.get(s.dataset, {})}, folder=folder_names.get(s.dataset, ""))
        for s in evaluation_scores(merged, base, seed)
    ]
    rates = [rate for folder in runs.values() if (rate := scans_per_second(folder)) is not None]
    # Trainings one after the other: the mean is weighted by their scans. Configs in epochs have 0 steps and equal
    # weights here.
    scans = [
        run.config.train.steps
        * sum((d.batch_size or run.config.train.batch_size) * d.weight for d in run.config.datasets)
        for run in runs
    ]
    speed = statistics.harmonic_mean(rates, scans if all(scans) else None) if len(rates) == len(runs) else None
    return [*scores, Score(seed, ALL, {SPEED: speed})]
