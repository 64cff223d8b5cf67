"""The sweep over tau as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
_LINES = ("-", "--", ":", "-.")


def draw_tau(result: Mapping[str, Any], path: Path) -> None:
    """Draw mAP and the share of exclusive offsets against tau, bars of one standard deviation over seeds.

    Args:
        result: of the sweep, from `results.write_results`.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    scores, shares = figure.subplots(1, 2)
    rows = [row for row in result["rows"] if row["seeds"]]
    for name, colour in zip(result["datasets"], _COLOURS, strict=False):
        for t, threshold in enumerate(result["iou_thresholds"]):
            values = [(row["tau"], row["summary"]["mAP"][name][t]) for row in rows]
            _curve(scores, values, f"{name} @{threshold:g}", colour, _LINES[t % len(_LINES)])
        _curve(shares, [(row["tau"], row["summary"]["exclusive_share"].get(name)) for row in rows], name, colour, "-")
    scores.set_ylabel("mAP (%)")
    scores.set_title("Detection, @ IoU threshold")
    shares.set_ylabel("exclusive kernel offsets (%)")
    shares.set_title("Share of offsets with the dataset's own kernel")
    shares.set_ylim(-3, 103)
    scores.set_ylim(bottom=0)
    seeds = max((len(row["seeds"]) for row in rows), default=0)
    for axes in (scores, shares):
        axes.set_xlabel("threshold tau of alpha * beta")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
    bars = f"; bars: one standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    figure.suptitle(f"Kernel selection against its threshold{bars}", fontsize="medium")
    FigureCanvasAgg(figure).print_png(str(path))


def _curve(axes: Any, values: list[tuple[float, Any]], label: str, colour: str, line: str) -> None:
    known = sorted((tau, value["mean"], value["std"] or 0.0) for tau, value in values if value is not None)
    if known:
        tau, mean, std = zip(*known, strict=True)
        axes.errorbar(tau, mean, std, label=label, color=colour, linestyle=line, marker="o", markersize=3, capsize=3)
