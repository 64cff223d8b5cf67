"""Sweeps as pictures."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h2a2_jax.sweeps.tables import MEAN

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
