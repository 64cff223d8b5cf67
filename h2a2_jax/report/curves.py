"""How a run went, as one picture in its workdir: curves.png, from metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.report.canvas import COLORS, as_text, canvas, name_steps, save
from h2a2_jax.report.figures_training import series_of
from h2a2_jax.training.metrics import FILE_NAME, read_metrics
from h2a2_jax.training.summary import CURVES

_COLUMNS = 3
_FEW = 30
"""Up to this many points are marked: one alone draws no line."""

Rows = Float[np.ndarray, "_ 2"]


@dataclass(frozen=True)
class _Panel:
    """A diagram over the steps.

    Attributes:
        title: what it shows.
        of_datasets: rows by dataset, in the colours that all panels share.
        others: further rows by name.
        scale: "zero" begins at 0, "share" is 0 to 1, "log" is logarithmic.
    """

    title: str
    of_datasets: Mapping[str, Rows]
    others: Mapping[str, Rows]
    scale: str = "zero"


def draw_curves(workdir: Path) -> Path:
    """Draw <workdir>/curves.png: losses, mAP, learning rate, gradients, kernels, pace and counts over the steps.

    What the metrics do not hold has no panel. The picture is replaced in one go.

    Args:
        workdir: of the run.

    Returns:
        Path of the picture.

    Raises:
        InputError: the run has no line of metrics, or one is damaged.
    """
    lines = read_metrics(workdir) if (workdir / FILE_NAME).exists() else []
    if not lines:
        raise InputError(f"{workdir} has no metrics to draw; expected is the folder of a run with a {FILE_NAME}.")
    series = series_of(lines)
    datasets = list(dict.fromkeys(name.split("/", 1)[1] for line in lines for name in line if name.startswith("loss/")))
    panels = _panels(series, datasets)
    columns = min(_COLUMNS, max(1, len(panels)))
    count = -(-max(1, len(panels)) // columns)
    figure, axes = canvas(count, columns, 4.4 * columns, 0.9 + 2.7 * count)
    last = float(lines[-1]["step"] or 0)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _draw(ax, panel, datasets, last)
    handles = [Line2D([], [], color=_color(d), linewidth=2) for d in range(len(datasets))]
    if handles:  # one for all panels
        names = [as_text(name) for name in datasets]
        figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    path = workdir / CURVES
    with whole_file(path) as part:
        save(figure, part.parent, part.stem, workdir.absolute().name, "")
    return path


def _panels(series: Mapping[str, Rows], datasets: Sequence[str]) -> list[_Panel]:
    """Those that have something to show."""

    def of(metric: str) -> dict[str, Rows]:
        return {name: series[f"{metric}/{name}"] for name in datasets if f"{metric}/{name}" in series}

    def alone(*metrics: str) -> dict[str, Rows]:
        return {metric: series[metric] for metric in metrics if metric in series}

    def one(metric: str) -> dict[str, Rows]:
        return {"": series[metric]} if metric in series else {}

    scored = sorted({name.split("/", 1)[0] for name in series if name.startswith("mAP@")})
    agreement = {"mean": "psi/mean", "lowest": "psi/min"}
    panels = [
        _Panel("loss", of("loss"), {}),
        *(_Panel(f"{metric}, validation scans", of(metric), {}) for metric in scored),
        _Panel("box loss", of("loss_box"), {}),
        _Panel("classification loss", of("loss_class"), {}),
        _Panel("learning rate", {}, one("learning_rate"), "log"),
        _Panel("gradient norm before clipping", {}, one("gradient_norm"), "log"),
        _Panel(
            "Psi, agreement of gradient norms",
            {},
            {name: series[metric] for name, metric in agreement.items() if metric in series},
            "share",
        ),
        _Panel("share of exclusive kernels", of("exclusive_share"), {}, "share"),
        _Panel("scans per second", {}, one("scans_per_second")),
        _Panel("counts", {}, alone("skipped_steps", "skipped_scans", "compilations")),
    ]
    return [panel for panel in panels if panel.of_datasets or panel.others]


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _draw(ax: Any, panel: _Panel, datasets: Sequence[str], last: float) -> None:
    shown = []
    for name, rows in panel.of_datasets.items():
        shown.append(_line(ax, rows, _color(datasets.index(name)), None, panel.scale))
    # Not the colours of datasets: these are of the run.
    for shade, (name, rows) in zip(("0.15", "0.5", "0.7"), panel.others.items(), strict=False):
        shown.append(_line(ax, rows, shade, name.replace("_", " ") or None, panel.scale))
    ax.set_title(as_text(panel.title), fontsize=10, loc="left")
    ax.set_xlim(0, last * 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)
    name_steps(ax)
    values = np.concatenate(shown)
    if panel.scale == "log" and len(values):
        _decades(ax, values)
    elif panel.scale == "share":
        ax.set_ylim(-0.03, 1.03)
    else:
        top = float(values.max(initial=0))
        ax.set_ylim(0, 1.08 * top if top > 0 else 1)
    if any(panel.others):  # beside the title, where it covers no curve
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}
        ax.legend(**place, ncols=3, fontsize=8, frameon=False, handlelength=1.2, columnspacing=1)


def _line(ax: Any, rows: Rows, color: str, label: str | None, scale: str) -> np.ndarray:
    """Draws a curve; what it shows, without what a logarithm does not have."""
    if scale == "log":
        rows = rows[rows[:, 1] > 0]
    ax.plot(*rows.T, color=color, label=label, linewidth=1.4, marker="o" if len(rows) <= _FEW else None, markersize=3)
    return rows[:, 1]


def _decades(ax: Any, values: np.ndarray) -> None:
    """A logarithmic axis over whole decades, which alone have labels: those between would touch each other."""
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    ax.set_yscale("log")
    ax.set_ylim(10.0**low / 1.2, 10.0 ** max(high, low + 1) * 1.2)
    ax.yaxis.set_major_locator(LogLocator(10, numticks=8))
    ax.yaxis.set_minor_formatter(NullFormatter())
