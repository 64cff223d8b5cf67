"""Results of sweeps: scores of the finished runs, their spread over seeds, results.json, its tables and a picture.

Every kind of sweep has one table. Its rows hold scores by seed, evaluation and dataset; its columns are paths into a
row. results.json, version 4, is {"version": 4, "results": [...]} with one object for each table of the folder:

- "kind": "tau_sweep", "ablation", "protocol", "transfer_to_<dataset>" or "tuning_to_<dataset>".
- "title" and "note" of the table; "datasets" (names), "procedural" (those with procedural scans), "iou_thresholds".
- "rows": objects with "name", further facts of the row ("tau", "parameters", "head", ...), "seeds" (finished ones),
  "scores" (objects with the fields of `Score`) and "summary" (by dataset and metric, a `spread`). The metrics
  "mAP@<IoU>" and "exclusive_share" are in per cent. Dataset "mean" stands for the mean over the datasets, dataset
  "all" for the training as a whole (metric "scans_per_second"). Rows whose runs have the average precision of classes
  have "class_scores" too: by dataset, metric ("AP@<IoU>", in per cent) and class, a `spread`. Versions 2 and 3 did not
  have them.
- "columns": objects with the fields of `Column`.
- "differences": objects with "row", "against" and the fields of `intervals.paired_difference`. Version 2 did not have
  them.
"""

import contextlib
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation import documents
from h2a2_jax.figures import COLORS, canvas, save
from h2a2_jax.files import read_json, whole_file
from h2a2_jax.sweeps.tables import ALL as ALL
from h2a2_jax.sweeps.tables import MEAN, chosen, csv_text, latex, markdown, markdown_page
from h2a2_jax.training.metrics import FILE_NAME, read_metrics

FILE = "results.json"
VERSION = 4
"""Version of results.json."""
_READABLE = (2, 3, 4)
TABLES: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "md": markdown_page,
    "csv": csv_text,
    "tex": latex,
}
"""Writers of tables, by the ending of their files, table.md and so on."""
EXCLUSIVE, SPEED = "exclusive_share", "scans_per_second"
_PICTURES = ("tau_sweep", "ablation")
_MARKERS = ("o", "s", "^", "D", "v")


def finished(folder: Path, evaluations: int = 1) -> bool:
    """Return True if a run has all of its evaluations, each of them whole."""
    return all(read_evaluation(folder, number) is not None for number in range(evaluations))


def evaluation_folder(folder: Path, number: int) -> Path:
    """Folder of an evaluation of a run: the run's own for evaluation 0, a folder in it for those with other points."""
    return folder / f"evaluation_draw{number}" if number else folder


def read_evaluation(folder: Path, number: int = 0) -> dict[str, Any] | None:
    """Content of an evaluation.json of a run; None if the file is missing or damaged: the run is then run again."""
    with contextlib.suppress(InputError):
        return documents.read_evaluation(evaluation_folder(folder, number) / documents.JSON_FILE)
    return None


def last_metrics(folder: Path) -> dict[str, Any]:
    """The line of the last step of a run's metrics.jsonl; empty where there is none.

    Raises:
        InputError: a line is damaged or of another version.
    """
    lines = read_metrics(folder) if (folder / FILE_NAME).exists() else []
    return lines[-1] if lines else {}


def scans_per_second(folder: Path) -> float | None:
    """Training speed of a run: the median over its logged steps; None if none has it.

    Raises:
        InputError: a line of the run's metrics is damaged or of another version.
    """
    lines = read_metrics(folder) if (folder / FILE_NAME).exists() else []
    known = [value for line in lines if (value := line.get(SPEED)) is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True)
class Score:
    """Metrics of one dataset in one evaluation.

    Attributes:
        dataset: Name of the dataset, `MEAN` or `ALL`.
        metrics: Values by name of the metric; None where a metric is undefined.
        folder: Name of the run's folder; empty where several runs make up the score.
        evaluation: Number of the evaluation, from 0; evaluations of one training differ in the sampled points.
    """

    seed: int
    dataset: str
    metrics: Mapping[str, float | None]
    folder: str = ""
    evaluation: int = 0


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        path: Keys that lead from a row of results.json to the value; "*" stands for the only key there.
        form: "text", "count", "length" (of a list), "millions", "decimals", "interval" or "spread" (mean ± standard
            deviation).
    """

    title: str
    path: tuple[str, ...]
    form: str = "spread"


SEEDS = Column("seeds", ("seeds",), "length")


def metric_names(base: ExperimentConfig) -> list[str]:
    """Names of the average precisions that a config asks for, as in "mAP@0.25"."""
    return [f"mAP@{threshold:g}" for threshold in base.eval.iou_thresholds]


def per_cent(share: float | None) -> float | None:
    """A share in per cent; None stays None."""
    return None if share is None else 100 * share


def evaluation_scores(
    evaluation: Mapping[str, Any], base: ExperimentConfig, seed: int, folder: str = "", number: int = 0
) -> list[Score]:
    """Scores of each dataset of an evaluation.json, and of their mean.

    The parts of several evaluations may be given as one. The mean is None unless every dataset of the base has a score.
    """
    names = metric_names(base)
    found = {
        dataset: dict(zip(names, [per_cent(level["mAP"]) for level in part["thresholds"]], strict=True))
        for dataset, part in evaluation.items()
    }
    scores = [Score(seed, dataset, metrics, folder, number) for dataset, metrics in found.items()]
    means: dict[str, float | None] = {}
    for metric in names:
        values = [found.get(dataset, {}).get(metric) for dataset in base.dataset_names]
        known = [value for value in values if value is not None]
        means[metric] = statistics.fmean(known) if len(known) == len(values) else None
    return [*scores, Score(seed, MEAN, means, evaluation=number)]


def spread(values: Mapping[int, Sequence[float | None]]) -> dict[str, Any]:
    """Mean, extremes and deviations of a metric.

    Args:
        values: One list for each seed, of one value for each evaluation; None where there is no value.

    Returns:
        "mean", "std" (sample standard deviation of all values), "std_seeds" (of the seeds' means), "std_evaluations"
        (root of the mean variance within a seed), "best", "worst" and "n" (number of values). Undefined entries, such
        as the deviation of a single value, are None.
    """
    known = [[value for value in of_seed if value is not None] for of_seed in values.values()]
    flat = [value for of_seed in known for value in of_seed]
    within = [statistics.variance(of_seed) for of_seed in known if len(of_seed) > 1]
    return {
        "mean": statistics.fmean(flat) if flat else None,
        "std": _deviation(flat),
        "std_seeds": _deviation([statistics.fmean(of_seed) for of_seed in known if of_seed]),
        "std_evaluations": statistics.fmean(within) ** 0.5 if within else None,
        "best": max(flat, default=None),
        "worst": min(flat, default=None),
        "n": len(flat),
    }


def result_row(name: str, scores: Sequence[Score], **facts: Any) -> dict[str, Any]:
    """A row of results.json with the scores of the finished runs and further JSON values."""
    values: dict[str, dict[str, dict[int, list[float | None]]]] = {}
    for score in scores:
        for metric, value in score.metrics.items():
            of_metric = values.setdefault(score.dataset, {}).setdefault(metric, {})
            of_metric.setdefault(score.seed, []).append(value)
    summary = {dataset: {metric: spread(v) for metric, v in found.items()} for dataset, found in values.items()}
    seeds = list(dict.fromkeys(score.seed for score in scores))
    return {"name": name, **facts, "seeds": seeds, "scores": [asdict(s) for s in scores], "summary": summary}


def sweep_result(
    kind: str,
    title: str,
    note: str,
    base: ExperimentConfig,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[Column],
    differences: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """One table as results.json holds it, with rows from `result_row`, and differences from `row_differences`.

    Of one kind a folder keeps the last table. Where scans are procedural, the note below the table gets a sentence on
    them.
    """
    procedural = [source.name for source in base.datasets if source.is_procedural]
    if procedural:
        note += (
            f" The scans of {', '.join(procedural)} are procedural stand-ins: these numbers say nothing about the "
            "benchmarks of these names."
        )
    result = {
        "kind": kind,
        "title": title,
        "note": note,
        "datasets": base.dataset_names,
        "procedural": procedural,
        "iou_thresholds": base.eval.iou_thresholds,
        "rows": rows,
        "columns": [asdict(column) for column in columns],
        "differences": differences,
    }
    return json.loads(json.dumps(result))  # lists for tuples, as in a result that was read from the file


def write_results(results: Sequence[Mapping[str, Any]], workdir: Path) -> str:
    """Write results.json, its tables and the pictures, and return the Markdown tables, without those of classes.

    Stored results of other kinds stay. The scores of classes are read from the runs in <workdir>/runs.
    """
    path = workdir / FILE
    document = read_json(path) or {}
    stored = {old["kind"]: old for old in document["results"]} if document.get("version") in _READABLE else {}
    stored |= {result["kind"]: with_class_scores(result, workdir) for result in results}
    with whole_file(path) as part:
        part.write_text(json.dumps({"version": VERSION, "results": [*stored.values()]}, indent=2) + "\n")
    write_tables([*stored.values()], workdir)
    for result in results:
        if result["kind"] in _PICTURES:
            print(f"Drawn in {draw_result(result, workdir)}", flush=True)
    return "\n".join(map(markdown, results))


def write_tables(results: Sequence[Mapping[str, Any]], workdir: Path) -> list[Path]:
    """Write table.md, table.csv and table.tex of some results, and return their paths."""
    paths = []
    for ending, write in TABLES.items():
        paths.append(workdir / f"table.{ending}")
        with whole_file(paths[-1]) as part:
            part.write_text(write(results), encoding="utf-8")
    return paths


def make_tables(workdir: Path, form: str | None = None, kinds: Sequence[str] = (), metrics: Sequence[str] = ()) -> str:
    """Make the tables of a sweep anew from its results.json; those of classes from its runs, where these are there.

    Args:
        workdir: Folder of the sweep.
        form: "md", "csv" or "tex" for the text of one table; None writes all three files.
        kinds: Kinds of tables, as in "ablation"; empty: all.
        metrics: Metrics of datasets, as in "mAP@0.5"; empty: all.

    Returns:
        The text, or a sentence on the files.

    Raises:
        InputError: there is no results.json, it cannot be read, or it has no table of a kind or no metric.
    """
    results = [with_class_scores(result, workdir) for result in read_results(workdir)]
    results = chosen(results, kinds, metrics)
    if form is not None:
        return TABLES[form](results)
    return f"Written to {', '.join(map(str, write_tables(results, workdir)))}.\n"


def read_results(workdir: Path) -> list[dict[str, Any]]:
    """Read the results of a folder's results.json, of this version or an older one.

    Raises:
        InputError: the file is missing, damaged or of an unknown version.
    """
    path = workdir / FILE
    if not path.exists():
        raise InputError(f"There is no {path}: give the folder of a sweep, as in runs/sweep, which writes it.")
    document = read_json(path)
    version = document.get("version") if isinstance(document, dict) else None
    if version not in _READABLE:
        raise InputError(
            f"{path} has version {version}, this program reads versions {', '.join(map(str, _READABLE))}: the command "
            "of the sweep makes it anew from the finished runs."
        )
    return document["results"]


def with_class_scores(result: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Add the average precision of classes to the rows of a result, read from the evaluations of its runs.

    A row whose runs are not there, or hold none, stays as it is.
    """
    read = cache(partial(_class_precisions, workdir / "runs"))
    rows = []
    for row in result["rows"]:
        found = [
            (score["seed"], score["dataset"], metric, classes)
            for score in row["scores"]
            for metric, classes in read(score["folder"], score["dataset"], score["evaluation"]).items()
            if f"m{metric}" in score["metrics"]
        ]
        rows.append({**row, "class_scores": class_spreads(found)} if found else row)
    return {**result, "rows": rows}


def class_spreads(found: Iterable[tuple[int, str, str, Mapping[str, float | None]]]) -> dict[str, Any]:
    """The "class_scores" of a row, of average precisions (0 to 1) by class with their seed, dataset and metric."""
    values: dict[str, dict[str, dict[str, dict[int, list[float | None]]]]] = {}
    for seed, dataset, metric, classes in found:
        of_metric = values.setdefault(dataset, {}).setdefault(metric, {})
        for name, value in classes.items():
            of_metric.setdefault(name, {}).setdefault(seed, []).append(per_cent(value))
    return {
        dataset: {metric: {name: spread(v) for name, v in own.items()} for metric, own in of_dataset.items()}
        for dataset, of_dataset in values.items()
    }


def _class_precisions(runs: Path, folder: str, dataset: str, number: int) -> dict[str, dict[str, float | None]]:
    """Average precision (0 to 1) in an evaluation of a run, by "AP@<IoU>" and class; empty without a folder."""
    if not folder:
        return {}
    # Evaluations after the first are of the datasets alone whose points are sampled.
    found = (read_evaluation(runs / folder, n) or {} for n in dict.fromkeys((number, 0)))
    part = next((evaluation[dataset] for evaluation in found if dataset in evaluation), {"thresholds": ()})
    return {f"AP@{level['iou']:g}": level["AP"] for level in part["thresholds"] if level.get("AP")}


def draw_result(result: Mapping[str, Any], workdir: Path) -> Path:
    """Draw the metrics of a tau sweep or an ablation as <workdir>/tau.png or ablation.png.

    A row of diagrams is a metric, a column a dataset or the mean of them; rows of the table, or their tau, run to the
    right. Each seed is a grey line; the mean over seeds is blue, with a bar of one standard deviation.
    """
    rows = [row for row in result["rows"] if row["seeds"]]
    is_tau = result["kind"] == "tau_sweep"
    places = [row["tau"] for row in rows] if is_tau else range(len(rows))
    datasets = [*result["datasets"], MEAN]
    metrics = [*(f"mAP@{threshold:g}" for threshold in result["iou_thresholds"]), *([EXCLUSIVE] if is_tau else [])]
    seeds = list(dict.fromkeys(seed for row in rows for seed in row["seeds"]))
    width = 2.6 + 0.14 * max(0, len(rows) - 5)  # names of more rows need more room
    size = (width * len(datasets) + 0.6, 2.3 * len(metrics) + 1.2)
    figure, axes = canvas(len(metrics), len(datasets), *size, sharex=True, sharey="row")
    for r, metric in enumerate(metrics):
        for ax, dataset in zip(axes[r], datasets, strict=True):
            for seed, marker in zip(seeds, itertools.cycle(_MARKERS)):
                points = [
                    (place, score["metrics"][metric])
                    for place, row in zip(places, rows, strict=True)
                    for score in row["scores"]
                    if (score["seed"], score["dataset"]) == (seed, dataset) and score["metrics"].get(metric) is not None
                ]
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    ax.plot(x, y, color="0.6", marker=marker, markersize=4, linewidth=0.8, label=f"seed {seed}")
            spreads = [row["summary"].get(dataset, {}).get(metric) for row in rows]
            means = [(x, s["mean"], s["std"] or 0.0) for x, s in zip(places, spreads, strict=True) if s and s["n"]]
            if means:
                x, mean, std = zip(*sorted(means), strict=True)
                style = {"fmt": "o-", "markersize": 6} if is_tau else {"fmt": "_", "markersize": 16}
                ax.errorbar(x, mean, std, **style, color=COLORS[0], markeredgewidth=2, capsize=3)
            ax.grid(axis="y", alpha=0.3)
            labels = [f"{row['tau']:g}" if is_tau else row["name"] for row in rows]
            rotated = {} if is_tau else {"rotation": 35, "ha": "right"}
            ax.set_xticks(places, labels, fontsize="small", **rotated)
            if r == 0:
                ax.set_title(dataset, fontsize="medium")
        axes[r, 0].set_ylabel("exclusive offsets (%)" if metric == EXCLUSIVE else f"{metric} (%)")
        axes[r, 0].set_ylim(bottom=0)
    if is_tau:
        axes[-1, -1].set_visible(False)  # exclusive offsets have no mean over datasets
        axes[-2, -1].tick_params(labelbottom=True)
        for ax in axes[-1]:
            ax.set_xlabel("threshold tau of alpha * beta", fontsize="small")
    else:
        axes[0, 0].set_xlim(-0.5, max(len(rows) - 0.5, 0.5))
    if axes[0, 0].has_data():
        axes[0, 0].legend(fontsize="x-small", loc="lower left")
    title = f"{result['title']}: a grey line a seed, blue their mean and standard deviation"
    if result["procedural"]:
        title += "\nprocedural scans, which say nothing about the benchmarks"
    return save(figure, workdir, "tau" if is_tau else "ablation", title, result["note"]).path


def training_length(base: ExperimentConfig) -> str:
    """Length of a training in words, as in "200 steps"."""
    return f"{base.train.steps} steps" if base.train.steps else f"{base.train.epochs} epochs"


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
