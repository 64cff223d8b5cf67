"""The field's protocol: several trainings, each evaluated several times; the best, the mean and the spread.

Trainings differ in their seed. Evaluations of one training differ in the points that the test protocol of a dataset
draws; where it uses all points (ScanNet), one evaluation is all there is to know, and it counts for each.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, drawn_datasets, seeded
from h2a2_jax.sweeps.sweep_runner import read_evaluation
from h2a2_jax.sweeps.tables import markdown_table, per_cent


def protocol_rows(base: ExperimentConfig, trainings: int, evaluations: int) -> list[Row]:
    """One row with the trainings, of seeds from the config's on.

    Raises:
        InputError: a number is less than 1.
    """
    for flag, count in (("trainings", trainings), ("evaluations", evaluations)):
        if count < 1:
            raise InputError(f"--{flag} is {count}; expected 1 or more, 5 as the field has it.")
    seeds = range(base.train.seed, base.train.seed + trainings)
    return [Row("trainings", seeded("training", base, seeds))]


def protocol_figures(
    base: ExperimentConfig, rows: Sequence[Row], folders: Mapping[SweepRun, Path], evaluations: int
) -> dict[str, Any]:
    """What the protocol comes to, of the trainings that are finished.

    Args:
        base: config of the trainings.
        rows: from `protocol_rows`.
        folders: of the runs.
        evaluations: of each training.

    Returns:
        "trainings" and "evaluations" (asked for), "runs" (each with its seed, folder and, by dataset, a list per
        threshold of the mAP of each evaluation in per cent), and "summary" (by dataset, and "mean" for the mean over
        datasets, a list per threshold of `summarised`).
    """
    thresholds = range(len(base.eval.iou_thresholds))
    repeated = drawn_datasets(base)
    runs: list[dict[str, Any]] = []
    for run in (run for row in rows for run in row.runs):
        found = [read_evaluation(folders[run], draw) for draw in range(evaluations if repeated else 1)]
        first = found[0]
        if first is None or None in found:
            continue
        scores: dict[str, list[list[float | None]]] = {}
        for name in base.dataset_names:
            of_draw = [one if one is not None and name in repeated else first for one in found]
            of_draw += [first] * (evaluations - len(found))
            scores[name] = [[per_cent(one[name]["thresholds"][t]["mAP"]) for one in of_draw] for t in thresholds]
        scores["mean"] = [
            [_mean([scores[name][t][draw] for name in base.dataset_names]) for draw in range(evaluations)]
            for t in thresholds
        ]
        runs.append({"seed": run.seed, "folder": folders[run].name, "mAP": scores})
    names = [*base.dataset_names, "mean"]
    summary = {name: [summarised([run["mAP"][name][t] for run in runs]) for t in thresholds] for name in names}
    trainings = sum(len(row.runs) for row in rows)
    return {"trainings": trainings, "evaluations": evaluations, "runs": runs, "summary": summary}


def summarised(scores: Sequence[Sequence[float | None]]) -> dict[str, Any] | None:
    """Best, mean and spread of scores by training and evaluation.

    Args:
        scores: of each training, of each evaluation; None where there is no score.

    Returns:
        "best", "worst", "mean", "std" (sample standard deviation of all), "std_trainings" (of the trainings' means),
        "std_evaluations" (root of the mean variance within a training) and "n"; deviations of a single value are null.
        None without a score.
    """
    known = [[score for score in of_run if score is not None] for of_run in scores]
    flat = [score for of_run in known for score in of_run]
    if not flat:
        return None
    within = [statistics.variance(of_run) for of_run in known if len(of_run) > 1]
    return {
        "best": max(flat),
        "worst": min(flat),
        "mean": statistics.fmean(flat),
        "std": _std(flat),
        "std_trainings": _std([statistics.fmean(of_run) for of_run in known if of_run]),
        "std_evaluations": statistics.fmean(within) ** 0.5 if within else None,
        "n": len(flat),
    }


def protocol_table(result: Mapping[str, Any]) -> str:
    """A Markdown table of what results.json holds of the protocol, and the note on what the numbers are."""
    columns = ["mAP", "best", "mean", "± all", "± trainings", "± evaluations", "worst", "n"]
    keys = ["best", "mean", "std", "std_trainings", "std_evaluations", "worst"]
    lines = [columns]
    for name, levels in result["summary"].items():
        for threshold, level in zip(result["iou_thresholds"], levels, strict=True):
            cells = ["-"] * 6 if level is None else [_cell(level[key]) for key in keys]
            lines.append([f"{name} @{threshold:g}", *cells, "0" if level is None else str(level["n"])])
    return f"{markdown_table(lines)}\n\n{result['note']}\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
