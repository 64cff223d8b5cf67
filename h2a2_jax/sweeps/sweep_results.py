"""Tables and a picture of a sweep."""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.files import whole_file
from h2a2_jax.sweeps.protocol import protocol_figures, protocol_table
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun
from h2a2_jax.sweeps.sweep_runner import last_metrics, read_evaluation, scans_per_second
from h2a2_jax.sweeps.tables import MEAN, markdown_table, per_cent, spread, spread_cell
from h2a2_jax.sweeps.transfer import transfer_figures, transfer_table
from h2a2_jax.training.build import count_parameters

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v")


def draw_tau(result: Mapping[str, Any], path: Path) -> None:
    """Draw mAP and the share of exclusive offsets against tau, bars of one standard deviation over seeds.

    Args:
        result: of the sweep, from `results.write_results`.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    scores, shares = figure.subplots(1, 2)
    rows = [row for row in result["rows"] if row["seeds"]]
    for name, colour, marker in zip(result["datasets"], _COLOURS, _MARKERS, strict=False):
        for t, threshold in enumerate(result["iou_thresholds"]):
            values = [(row["tau"], row["summary"]["mAP"][name][t]) for row in rows]
            _curve(scores, values, f"{name} @{threshold:g}", colour, _LINES[t % len(_LINES)], marker)
        values = [(row["tau"], row["summary"]["exclusive_share"].get(name)) for row in rows]
        _curve(shares, values, name, colour, "-", marker)
    scores.set_title("Detection, @ IoU threshold")
    scores.set_ylabel("mAP (%)")
    scores.set_ylim(bottom=0)
    shares.set_title("Kernel offsets that use the dataset's own kernel")
    shares.set_ylabel("exclusive offsets (%)")
    shares.set_ylim(-3, 103)
    for axes in (scores, shares):
        axes.set_xlabel("threshold tau of alpha * beta")
        axes.set_xticks([row["tau"] for row in rows])
        axes.grid(alpha=0.3)
        if axes.has_data():  # below, where it covers no curve
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(result["datasets"]), fontsize="small"
            )
    seeds = max((len(row["seeds"]) for row in rows), default=0)
    title = f"bars: one standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    procedural = "; procedural scans, which say nothing about the benchmarks" if result["procedural"] else ""
    figure.suptitle(f"Kernel selection against its threshold ({title}{procedural})", fontsize="medium")
    FigureCanvasAgg(figure).print_png(str(path))


def draw_ablation(result: Mapping[str, Any], path: Path) -> None:
    """Draw mAP by setting, a line a seed, for every dataset and their mean and every IoU threshold.

    Args:
        result: of the ablation, from `results.write_results`.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, thresholds = [*result["datasets"], MEAN], result["iou_thresholds"]
    rows = [row for row in result["rows"] if row["seeds"]]
    places = range(len(rows))
    seeds = list(dict.fromkeys(seed for row in rows for seed in row["seeds"]))
    figure = Figure(figsize=(2.6 * len(names) + 0.6, 2.3 * len(thresholds) + 1.2), layout="constrained")
    grid = figure.subplots(len(thresholds), len(names), sharex=True, sharey="row", squeeze=False)
    for t, threshold in enumerate(thresholds):
        for axes, name in zip(grid[t], names, strict=True):
            for seed, marker in zip(seeds, itertools.cycle(_MARKERS)):
                scores = [(row["seeds"].get(seed) or {"mAP": {}})["mAP"].get(name) for row in rows]
                known = [(x, levels[t]) for x, levels in zip(places, scores, strict=True) if levels is not None]
                known = [(x, score) for x, score in known if score is not None]
                style = {"color": "0.6", "marker": marker, "markersize": 4, "linewidth": 0.8}
                if known:
                    axes.plot(*zip(*known, strict=True), label=f"seed {seed}", **style)
            means = [row["summary"]["mAP"].get(name) for row in rows]
            for x, levels in zip(places, means, strict=True):
                if levels is not None and levels[t] is not None:
                    axes.hlines(levels[t]["mean"], x - 0.3, x + 0.3, color="tab:blue", linewidth=2.5)
            axes.grid(axis="y", alpha=0.3)
            axes.set_xticks(places, [row["setting"] for row in rows], rotation=35, ha="right", fontsize="small")
            axes.set_xlim(-0.5, max(len(rows) - 0.5, 0.5))
            if t == 0:
                axes.set_title(name, fontsize="medium")
        grid[t][0].set_ylabel(f"mAP@{threshold:g} (%)")
        grid[t][0].set_ylim(bottom=0)
    if grid[0][0].has_data():
        grid[0][0].legend(fontsize="x-small", loc="lower left")
    procedural = "; procedural scans, which say nothing about the benchmarks" if result["procedural"] else ""
    figure.suptitle(f"Ablation: a grey line a seed, blue their mean{procedural}", fontsize="medium")
    FigureCanvasAgg(figure).print_png(str(path))


def _curve(axes: Any, values: list[tuple[float, Any]], label: str, colour: str, line: str, marker: str) -> None:
    known = sorted((tau, value["mean"], value["std"] or 0.0) for tau, value in values if value is not None)
    if known:
        tau, mean, std = zip(*known, strict=True)
        style = {"color": colour, "linestyle": line, "marker": marker, "markerfacecolor": "none"}
        axes.errorbar(tau, mean, std, label=label, markersize=5, capsize=3, **style)


VERSION = 1
"""Of results.json."""

_TITLES = {
    "tau_sweep": "Sweep of the threshold tau",
    "ablation": "Ablation",
    "protocol": "Trainings and evaluations",
}
TRANSFER = "transfer_to_"
"""How a transfer is called in results.json, before the name of the dataset."""


def write_results(
    sweep: str, base: ExperimentConfig, rows: Sequence[Row], folders: Mapping[SweepRun, Path], workdir: Path
) -> dict[str, Any]:
    """Write <workdir>/results.json and table.md, which keep what other sweeps wrote there.

    results.json, version 1: "version", and by the name of a sweep "note" (what the numbers are), "datasets",
    "procedural" (those of them whose scans are procedural), "iou_thresholds" and "rows". A row has "setting", "tau" (or
    null), "parameters" (how many, of all its detectors together), "seeds" and "summary". Of each seed: "folders" of its
    runs, "mAP" (by dataset, and "mean" for the mean over them, a list, one per threshold, in per cent; null where the
    row has no such dataset), "exclusive_share" (by dataset, in per cent) and "scans_per_second" (in training). The
    summary has the latter three with, in place of each number, its "mean", "std" (sample standard deviation; null for
    one seed) and "n" (seeds that have it).

    Args:
        sweep: "tau_sweep" or "ablation".
        base: config of the sweep.
        rows: of the table; those of runs that are not finished are left out seed by seed.
        folders: of the runs.
        workdir: of the sweep.

    Returns:
        What results.json holds of this sweep.
    """
    names, thresholds = base.dataset_names, base.eval.iou_thresholds
    entries = []
    for row in rows:
        seeds: dict[str, Any] = {}
        for seed in dict.fromkeys(run.seed for run in row.runs):
            of_seed = {run: folders[run] for run in row.runs if run.seed == seed}
            found = _of_seed(of_seed, names, len(thresholds))
            if found is not None:
                seeds[str(seed)] = found
        parameters = sum(count_parameters(run.config) for run in row.runs if run.seed == row.runs[0].seed)
        entries.append(
            {
                "setting": row.label,
                "tau": row.tau,
                "parameters": parameters,
                "seeds": seeds,
                "summary": _summary([*seeds.values()]),
            }
        )
    result = {
        "note": _note(base),
        "datasets": list(names),
        "procedural": _procedural(base),
        "iou_thresholds": list(thresholds),
        "rows": entries,
    }
    _store(sweep, result, workdir)
    return result


def write_protocol(
    base: ExperimentConfig, rows: Sequence[Row], folders: Mapping[SweepRun, Path], workdir: Path, evaluations: int
) -> dict[str, Any]:
    """Write the protocol's part of <workdir>/results.json and table.md, which keep what sweeps wrote there.

    In results.json, version 1, "protocol" holds "note", "datasets", "procedural" and "iou_thresholds" as sweeps do, and
    what `protocol.protocol_figures` says.

    Args:
        base: config of the trainings.
        rows: of the protocol.
        folders: of the runs.
        workdir: of the protocol.
        evaluations: of each training.

    Returns:
        What results.json holds of the protocol.
    """
    figures = protocol_figures(base, rows, folders, evaluations)
    fixed = [spec.name for spec in base.specs if spec.test_sampling is None]
    note = (
        f"mAP in per cent after {_length(base)}; trainings: {len(figures['runs'])}, evaluations of each: "
        f"{evaluations}; sample standard deviations of all values, of the trainings' means, and within a training."
    )
    if fixed and evaluations > 1:
        note += f" The test protocol of {', '.join(fixed)} uses all points: its evaluations are one and the same."
    result = {
        "note": note + _procedural_note(base),
        "datasets": list(base.dataset_names),
        "procedural": _procedural(base),
        "iou_thresholds": list(base.eval.iou_thresholds),
        **figures,
    }
    _store("protocol", result, workdir)
    return result


def write_transfer(
    base: ExperimentConfig,
    held_out: str,
    pretrained: Sequence[Row],
    tuned: Sequence[Row],
    folders: Mapping[SweepRun, Path],
    workdir: Path,
) -> dict[str, Any]:
    """Write transfer's part of <workdir>/results.json and table.md, which keep what other sweeps wrote there.

    In results.json, version 1, "transfer_to_<dataset>" holds "note", "datasets", "procedural" and "iou_thresholds" as
    sweeps do, and what `transfer.transfer_figures` says.

    Args:
        base: config of the sweep.
        held_out: the dataset.
        pretrained: rows of what was trained without it.
        tuned: rows of what was trained on it.
        folders: of the runs.
        workdir: of the sweep.

    Returns:
        What results.json holds of transfer.
    """
    without, on_it = (rows[0].runs[0].config.train.steps for rows in (pretrained, tuned))
    note = (
        f"mAP in per cent on the validation scans of {held_out}, mean ± sample standard deviation over seeds. Trained "
        f"without it for {without} steps of {base.train.batch_size} scans a dataset, on it for {on_it} steps. The "
        "first table is over the classes that the head's dataset has too, the second over all."
    )
    result = {
        "note": note + _procedural_note(base),
        "datasets": list(base.dataset_names),
        "procedural": _procedural(base),
        "iou_thresholds": list(base.eval.iou_thresholds),
        **transfer_figures(base, held_out, pretrained, tuned, folders),
    }
    _store(f"{TRANSFER}{held_out}", result, workdir)
    return result


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table of a sweep as results.json has it, and the note on what the numbers are.

    Args:
        result: from `write_results`.
    """
    columns: list[tuple[str, str, int | None]]
    columns = [("mAP", name, t) for name in [*result["datasets"], MEAN] for t in range(len(result["iou_thresholds"]))]
    titles = [f"{name} mAP@{result['iou_thresholds'][t]:g}" for _, name, t in columns if t is not None]
    if any(row["summary"]["exclusive_share"] for row in result["rows"]):
        columns += [("exclusive_share", name, None) for name in result["datasets"]]
        titles += [f"{name} exclusive" for name in result["datasets"]]
    lines = [["setting", *titles, "parameters", "scans/s", "seeds"]]
    for row in result["rows"]:
        cells = []
        for group, name, t in columns:
            value = row["summary"][group].get(name)
            cells.append(spread_cell(value[t] if value is not None and t is not None else value))
        parameters = row.get("parameters")  # which were not counted from the beginning
        counted = "-" if parameters is None else f"{parameters / 1e6:.2f} M"
        speed = spread_cell(row["summary"].get("scans_per_second"))
        lines.append([row["setting"], *cells, counted, speed, str(len(row["seeds"]))])
    return f"{markdown_table(lines)}\n\n{result['note']}\n"


def _of_seed(of_seed: Mapping[SweepRun, Path], names: Sequence[str], thresholds: int) -> dict[str, Any] | None:
    """Scores of one seed, from the one run or the runs that make the row; None unless all are finished."""
    folders = [*of_seed.values()]
    scores: dict[str, list[float | None]] = {}
    shares: dict[str, float | None] = {}
    for folder in folders:
        evaluation, metrics = read_evaluation(folder), last_metrics(folder)
        if evaluation is None:
            return None
        for name, found in evaluation.items():
            scores[name] = [per_cent(level["mAP"]) for level in found["thresholds"]]
            if f"exclusive_share/{name}" in metrics:
                shares[name] = per_cent(metrics[f"exclusive_share/{name}"])
    scores |= {name: [None] * thresholds for name in names if name not in scores}
    of_level = [[scores[name][t] for name in names] for t in range(thresholds)]
    scores[MEAN] = [
        None if None in level else statistics.fmean(v for v in level if v is not None) for level in of_level
    ]
    scans = [_scans_of_step(run.config) * run.config.train.steps for run in of_seed]
    rates = [rate for rate in map(scans_per_second, folders) if rate is not None]
    # Of runs one after the other. Without a number of steps, the only run's weight is of no account.
    weights = scans if all(scans) else None
    speed = statistics.harmonic_mean(rates, weights) if len(rates) == len(folders) else None
    return {
        "folders": [folder.name for folder in folders],
        "mAP": scores,
        "exclusive_share": shares,
        "scans_per_second": speed,
    }


def _scans_of_step(config: ExperimentConfig) -> float:
    return sum((source.batch_size or config.train.batch_size) * source.weight for source in config.datasets)


def _summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not seeds:
        return {"mAP": {}, "exclusive_share": {}, "scans_per_second": None}
    scores = {
        name: [spread([seed["mAP"][name][t] for seed in seeds]) for t in range(len(levels))]
        for name, levels in seeds[0]["mAP"].items()
    }
    shares = {name: spread([seed["exclusive_share"][name] for seed in seeds]) for name in seeds[0]["exclusive_share"]}
    speed = spread([seed["scans_per_second"] for seed in seeds])
    return {"mAP": scores, "exclusive_share": shares, "scans_per_second": speed}


def _store(sweep: str, result: Mapping[str, Any], workdir: Path) -> None:
    path = workdir / "results.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    document = {**(document if document.get("version") == VERSION else {}), "version": VERSION, sweep: result}
    _replace(path, json.dumps(document, indent=2) + "\n")
    parts = [
        f"## {title}\n\n{(protocol_table if name == 'protocol' else table)(document[name])}"
        for name, title in _TITLES.items()
        if name in document
    ]
    for name, found in document.items():
        if name.startswith(TRANSFER):
            parts.append(f"## Transfer to {name.removeprefix(TRANSFER)}\n\n{transfer_table(found)}")
    _replace(workdir / "table.md", "\n".join(parts))


def _length(base: ExperimentConfig) -> str:
    return f"{base.train.steps} steps" if base.train.steps else f"{base.train.epochs} epochs"


def _note(base: ExperimentConfig) -> str:
    return (
        f"mAP and exclusive in per cent, after {_length(base)} of {base.train.batch_size} scans a dataset; mean ± "
        "sample standard deviation over seeds; exclusive: share of the kernel offsets that use the dataset's own "
        "kernel, of the last line of metrics; parameters: of all detectors of a row; scans/s: in training, median over "
        "the run's logged steps, beside whatever ran at the same time."
    ) + _procedural_note(base)


def _procedural_note(base: ExperimentConfig) -> str:
    procedural = _procedural(base)
    if not procedural:
        return ""
    return (
        f" The scans of {', '.join(procedural)} are procedural stand-ins: these numbers say nothing about the "
        "benchmarks of these names."
    )


def _procedural(base: ExperimentConfig) -> list[str]:
    return [source.name for source in base.datasets if source.is_procedural]


def _replace(path: Path, text: str) -> None:
    """Write a file in one go: a kill leaves the old one or the new one."""
    with whole_file(path) as part:
        part.write_text(text)
