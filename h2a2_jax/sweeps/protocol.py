"""The field's protocol: several trainings, each evaluated several times; the best, the mean and the spread.

Trainings differ in their seed. Evaluations of one training differ in the points that the test protocol of a dataset
samples. A dataset that is tested on all points (ScanNet) is evaluated once, and that evaluation counts for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.sweeps.intervals import Sample, mean_sample, paired_difference, samples_of, stored_matches
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, locate, sampled_datasets, seeded
from h2a2_jax.sweeps.sweep_results import (
    MEAN,
    Column,
    Score,
    evaluation_scores,
    metric_names,
    read_evaluation,
    result_row,
    sweep_result,
    training_length,
)
from h2a2_jax.sweeps.sweep_runner import run_sweep

_STATISTICS = {
    "best": "best",
    "mean": "mean",
    "± all": "std",
    "± trainings": "std_seeds",
    "± evaluations": "std_evaluations",
    "worst": "worst",
}
"""Keys of a `spread`, by title of the column."""


def run_protocol(
    config: ExperimentConfig,
    workdir: Path,
    trainings: int = 5,
    evaluations: int = 5,
    jobs: int | None = None,
    budget_minutes: float | None = None,
) -> int:
    """Train several times and evaluate each training several times; write the tables and results.json.

    The seeds count up from the config's. Finished runs in the workdir are not repeated, nor runs of other sweeps that
    are the same experiment. Jobs, budget and exit status are those of `run_sweep`.

    Raises:
        InputError: a number makes no sense, data are missing, or the workdir holds other runs of the same names.
    """
    rows = protocol_rows(config, trainings, evaluations)
    result = partial(protocol_result, config, rows, evaluations)
    located = partial(locate, rows, workdir)
    return run_sweep(config, workdir, located, lambda found: [result(found)], jobs, budget_minutes, evaluations)


def protocol_rows(base: ExperimentConfig, trainings: int, evaluations: int) -> list[Row]:
    """One row with the trainings, with seeds that count up from the config's.

    Raises:
        InputError: a number is less than 1.
    """
    for flag, count in (("trainings", trainings), ("evaluations", evaluations)):
        if count < 1:
            raise InputError(f"--{flag} is {count}; expected 1 or more, 5 as the field has it.")
    seeds = range(base.train.seed, base.train.seed + trainings)
    return [Row("trainings", seeded("training", base, seeds))]


def protocol_result(
    base: ExperimentConfig, rows: Sequence[Row], evaluations: int, folders: Mapping[SweepRun, Path]
) -> dict[str, Any]:
    """Result of the trainings that have all of their evaluations: one row for each dataset and threshold."""
    repeated = sampled_datasets(base)
    scores: list[Score] = []
    samples: dict[int, Sample] = {}
    metrics = metric_names(base)
    for run in (run for row in rows for run in row.runs):
        found = [read_evaluation(folders[run], number) for number in range(evaluations if repeated else 1)]
        whole = [evaluation for evaluation in found if evaluation is not None]
        if len(whole) < len(found):
            continue
        matches = [stored_matches([folders[run]], number) for number in range(len(whole))]
        of_evaluations: list[Sample] = []
        for number in range(evaluations):
            # The evaluations after the first are of the repeated datasets alone.
            numbers = {name: number if name in repeated else 0 for name in base.dataset_names}
            parts = {name: whole[n][name] for name, n in numbers.items()}
            own = evaluation_scores(parts, base, run.seed, folders[run].name, number)
            there = {name: matches[n][name] for name, n in numbers.items() if name in matches[n]}
            of_evaluations += samples_of(own, metrics, {run.seed: there}).values()
            scores += own
        samples[run.seed] = mean_sample(of_evaluations)
    measured = paired_difference(samples, None, base.dataset_names, metrics)
    lines = [
        result_row(
            f"{name} {metric.removeprefix('mAP')}",
            [replace(s, metrics={metric: s.metrics[metric]}) for s in scores if s.dataset == name],
            interval=measured["values"].get(name, {}).get(metric),
        )
        for name in [*base.dataset_names, MEAN]
        for metric in metrics
    ]
    only = ("summary", "*", "*")  # a row has one dataset and one metric
    columns = [
        Column("mAP", ("name",), "text"),
        *(Column(title, (*only, key), "decimals") for title, key in _STATISTICS.items()),
        Column("95 %", ("interval",), "interval"),
        Column("n", (*only, "n"), "count"),
    ]
    trainings = len({score.seed for score in scores})
    note = (
        f"mAP in per cent after {training_length(base)}; trainings: {trainings}, evaluations of each: {evaluations}; "
        "sample standard deviations of all values, of the trainings' means, and within a training"
    )
    drawn = measured["over"].replace("seeds", "trainings")
    note += f"; 95 %: interval of the mean over {drawn}." if drawn else "."
    fixed = [name for name in base.dataset_names if name not in repeated]
    if fixed and evaluations > 1:
        note += f" The test protocol of {', '.join(fixed)} uses all points: its evaluations are one and the same."
    return sweep_result("protocol", "Trainings and evaluations", note, base, lines, columns)
