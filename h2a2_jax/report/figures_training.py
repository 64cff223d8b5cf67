"""Figures of training: curves.png, gradient norms, harmonisation."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from h2a2_jax.checkpoint.parameter_groups import KINDS
from h2a2_jax.errors import InputError
from h2a2_jax.figures import COLORS, Picture, as_text, canvas, legend_below, log_ticks, save, step_axis
from h2a2_jax.files import whole_file
from h2a2_jax.training.metrics import FILE_NAME, read_metrics
from h2a2_jax.training.summary import CURVES

Rows = Float[np.ndarray, "_ 2"]
"""Steps and values of a metric."""
Series = Mapping[str, Rows]
"""Rows of each metric."""
_COLUMNS = 4


def series_of(lines: Sequence[Mapping[str, float | int | None]]) -> dict[str, Rows]:
    """The values of each metric of metrics.jsonl over the steps, without nulls."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if value is not None and name not in ("step", "version"):
                found.setdefault(name, []).append((float(line["step"] or 0), float(value)))
    return {name: np.array(values) for name, values in found.items()}


def by_group(series: Series, metric: str, datasets: Sequence[str]) -> dict[str, dict[str, Rows]]:
    """The series "<metric>/<group>/<dataset>", by group and dataset."""
    groups: dict[str, dict[str, Rows]] = {}
    for name, values in series.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == metric and parts[2] in datasets:
            groups.setdefault(parts[1], {})[parts[2]] = values
    return groups


def draw_psi(series: Series, threshold: float | None, folder: Path) -> Picture | None:
    """Agreement of gradient norms over training; None without it."""
    groups = {name.split("/")[1]: values for name, values in series.items() if name.startswith("psi/")}
    whole: Series = {name: groups.pop(name) for name in ("mean", "min") if name in groups}
    shares = {n.removeprefix("harmonized_share/"): v for n, v in series.items() if n.startswith("harmonized_share/")}
    if "harmonized_share" in groups:
        shares["all tensors"] = groups.pop("harmonized_share")
    groups.pop("cap_hits", None)
    if not groups and not whole:
        return None
    kinds = {name: values for name, values in groups.items() if name in KINDS}
    places = {name: values for name, values in groups.items() if name not in KINDS}
    titled = {"all tensors": (whole, ["all tensors"]), "by place": (places, [*places]), "by kind": (kinds, [*kinds])}
    parts = [(title, values, names) for title, (values, names) in titled.items() if values]
    figure, axes = canvas(2, len(parts), 5 * len(parts), 7, sharex=True)
    sides = ("left", "center", "right")
    for column, (title, values, names) in enumerate(parts):
        upper, lower = axes[:, column]
        _lines(upper, values)
        if threshold is not None:
            upper.axhline(threshold, color="0.3", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
        upper.set(title=title, ylabel="Psi, mean over tensors", ylim=(0, 1.05))
        _lines(lower, {name: shares[name] for name in names if name in shares})
        lower.set(ylabel="share of tensors below the threshold", ylim=(-0.02, 1.05))
        step_axis(lower)
        legend_below(figure, upper, sides[column], 4)
    return save(
        figure, folder, "psi", "Agreement of the datasets' gradient norms",
        "Psi of a parameter tensor is the mean over pairs of datasets of 2 a b / (a\u00b2 + b\u00b2), a and b the "
        "norms of their gradients: 1 for equal norms, 0.8 at a ratio of two. Below the threshold gradient "
        "harmonisation scales the gradients to their mean norm. Above Psi, below the share of tensors it is below the "
        "threshold in: of all tensors, by where in the detector they are, and by what they are. From metrics.jsonl; "
        "each line holds its last step.",
    )  # fmt: skip


def _lines(ax: Any, values: Series) -> None:
    for color, (name, rows) in zip(itertools.cycle(COLORS), values.items(), strict=False):
        ax.plot(*rows.T, color=color, label=name, linewidth=1.3)


def draw_by_group(
    series: Series, metric: str, datasets: Sequence[str], folder: Path, title: str, label: str, caption: str
) -> Picture | None:
    """A metric of each parameter group and dataset on a logarithmic axis; None where there is none."""
    groups = by_group(series, metric, datasets)
    if not groups:
        return None
    columns = min(_COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = canvas(rows, columns, 3.6 * columns, 0.9 + 2.7 * rows, sharex=True, sharey=True)
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, (group, own) in zip(axes.flat, groups.items(), strict=False):
        for color, name in zip(itertools.cycle(COLORS), datasets, strict=False):
            if name in own:
                ax.plot(*own[name].T, color=color, label=name, linewidth=1.2)
        shown = any((rows[:, 1] > 0).any() for rows in own.values())
        ax.set_title(group if shown else f"{group}: 0 throughout", fontsize=10)
        ax.grid(alpha=0.25)
    for ax in axes.flat[max(0, len(groups) - columns) : len(groups)]:
        step_axis(ax)
        ax.tick_params(labelbottom=True)
    values = np.concatenate([rows[:, 1] for own in groups.values() for rows in own.values()])
    if (values > 0).any():
        _logarithmic(axes[0, 0], values[values > 0])
    figure.supylabel(label, fontsize=10)
    _dataset_legend(figure, datasets)
    return save(figure, folder, metric, title, caption)


_CURVE_COLUMNS = 3
_FEW = 30
"""Largest number of points that get markers: a single point draws no line."""


@dataclass(frozen=True)
class _Panel:
    """A diagram over the steps.

    Attributes:
        of_datasets: Rows by dataset, in the colours that all panels share.
        others: Further rows by name.
        scale: "zero" begins at 0, "share" is 0 to 1, "log" is logarithmic.
    """

    title: str
    of_datasets: Mapping[str, Rows]
    others: Mapping[str, Rows]
    scale: str = "zero"


def draw_curves(workdir: Path) -> Path:
    """Draw <workdir>/curves.png: losses, mAP, learning rate, gradients, kernels, pace and counts over the steps.

    A panel without values is left out. A kill leaves the old picture or the new one.

    Raises:
        InputError: the run has no line of metrics, or one is damaged.
    """
    lines = read_metrics(workdir) if (workdir / FILE_NAME).exists() else []
    if not lines:
        raise InputError(f"{workdir} has no metrics to draw; expected is the folder of a run with a {FILE_NAME}.")
    path = workdir / CURVES
    with whole_file(path) as part:
        save(_curves(lines), part.parent, part.stem, workdir.absolute().name, "")
    return path


def draw_losses(lines: Sequence[Mapping[str, float | int | None]], folder: Path) -> Picture:
    """Draw the panels of curves.png as <folder>/losses.png for a report."""
    caption = (
        "From metrics.jsonl: means over the steps between two lines. Losses have no unit: the box loss is 1 \u2212 "
        "DIoU, the classification loss the focal loss. The gradient norm is that of all parameters, after balancing "
        "and before clipping."
    )
    return save(_curves(lines), folder, "losses", "Losses, scores, learning rate and gradients", caption)


def _curves(lines: Sequence[Mapping[str, float | int | None]]) -> Figure:
    """The panels of a run, with one legend of the datasets."""
    series = series_of(lines)
    datasets = list(dict.fromkeys(name.split("/", 1)[1] for line in lines for name in line if name.startswith("loss/")))
    panels = _panels(series, datasets)
    columns = min(_CURVE_COLUMNS, max(1, len(panels)))
    count = -(-max(1, len(panels)) // columns)
    figure, axes = canvas(count, columns, 4.4 * columns, 0.9 + 2.7 * count)
    last = float(lines[-1]["step"] or 0)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _draw(ax, panel, datasets, last)
    _dataset_legend(figure, datasets)
    return figure


def _dataset_legend(figure: Figure, datasets: Sequence[str]) -> None:
    """One legend below all panels."""
    handles = [Line2D([], [], color=_color(d), linewidth=2) for d in range(len(datasets))]
    if handles:
        names = [as_text(name) for name in datasets]
        figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)


def _panels(series: Mapping[str, Rows], datasets: Sequence[str]) -> list[_Panel]:
    """Panels that have values."""

    def rows(metrics: Mapping[str, str]) -> dict[str, Rows]:
        return {label: series[metric] for label, metric in metrics.items() if metric in series}

    def of(metric: str) -> dict[str, Rows]:
        return rows({name: f"{metric}/{name}" for name in datasets})

    scored = sorted({name.split("/", 1)[0] for name in series if name.startswith("mAP@")})
    counts = ("skipped_steps", "skipped_scans", "compilations")
    panels = [
        _Panel("loss", of("loss"), {}),
        *(_Panel(f"{metric}, validation scans", of(metric), {}) for metric in scored),
        _Panel("box loss", of("loss_box"), {}),
        _Panel("classification loss", of("loss_class"), {}),
        _Panel("centerness loss", of("loss_centerness"), {}),
        _Panel("learning rate", {}, rows({"": "learning_rate"}), "log"),
        _Panel("gradient norm before clipping", {}, rows({"": "gradient_norm"}), "log"),
        _Panel("Psi, agreement of gradient norms", {}, rows({"mean": "psi/mean", "lowest": "psi/min"}), "share"),
        _Panel(
            "share of exclusive kernels", of("exclusive_share"), rows({"alpha < 1/2": "exclusive_offsets"}), "share"
        ),
        _Panel("scans per second", {}, rows({"": "scans_per_second"})),
        _Panel("counts", {}, rows({name: name for name in counts})),
    ]
    return [panel for panel in panels if panel.of_datasets or panel.others]


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _draw(ax: Any, panel: _Panel, datasets: Sequence[str], last: float) -> None:
    shown = []
    for name, rows in panel.of_datasets.items():
        shown.append(_line(ax, rows, _color(datasets.index(name)), None, panel.scale))
    # Grey, because the colours stand for datasets.
    for shade, (name, rows) in zip(("0.15", "0.5", "0.7"), panel.others.items(), strict=False):
        shown.append(_line(ax, rows, shade, name.replace("_", " ") or None, panel.scale))
    ax.set_title(as_text(panel.title), fontsize=10, loc="left")
    ax.set_xlim(0, last * 1.02)
    step_axis(ax)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)
    values = np.concatenate(shown)
    if panel.scale == "log" and len(values):
        _logarithmic(ax, values)
    elif panel.scale == "share":
        ax.set_ylim(-0.03, 1.03)
    else:
        top = float(values.max(initial=0))
        ax.set_ylim(0, 1.08 * top if top > 0 else 1)
    if any(panel.others):  # beside the title, where it covers no curve
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}
        ax.legend(**place, ncols=3, fontsize=8, frameon=False, handlelength=1.2, columnspacing=1)


def _line(ax: Any, rows: Rows, color: str, label: str | None, scale: str) -> np.ndarray:
    """Draw a curve and return the values that it shows; a logarithmic axis shows positive values only."""
    if scale == "log":
        rows = rows[rows[:, 1] > 0]
    ax.plot(*rows.T, color=color, label=label, linewidth=1.4, marker="o" if len(rows) <= _FEW else None, markersize=3)
    return rows[:, 1]


def _logarithmic(ax: Any, values: np.ndarray) -> None:
    """A logarithmic axis of positive values, over a factor of 6 at least, so that two ticks or more have labels."""
    low, high = float(values.min()), float(values.max())
    margin = max(1.2, math.sqrt(6 * low / high))
    ax.set_yscale("log")
    ax.set_ylim(low / margin, high * margin)
    log_ticks(ax.yaxis, low / margin, high * margin)
