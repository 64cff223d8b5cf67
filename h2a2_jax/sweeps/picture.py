"""The sweep over tau as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def _curve(axes: Any, values: list[tuple[float, Any]], label: str, colour: str, line: str, marker: str) -> None:
    known = sorted((tau, value["mean"], value["std"] or 0.0) for tau, value in values if value is not None)
    if known:
        tau, mean, std = zip(*known, strict=True)
        style = {"color": colour, "linestyle": line, "marker": marker, "markerfacecolor": "none"}
        axes.errorbar(tau, mean, std, label=label, markersize=5, capsize=3, **style)
