"""Pictures of the run's metrics: losses, learning rate, gradient norms and their balance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from h2a2_jax.report.canvas import COLORS, canvas, name_steps, save
from h2a2_jax.report.page import Picture
from h2a2_jax.training.parameter_groups import KINDS

Series = Mapping[str, Float[np.ndarray, "_ 2"]]
"""Of each metric its (step, value) rows."""
_COLUMNS = 4


def series_of(lines: Sequence[Mapping[str, float | int | None]]) -> dict[str, Float[np.ndarray, "_ 2"]]:
    """The values of each metric over the steps; what is null is left out.

    Args:
        lines: of metrics.jsonl, in order.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if value is not None and name not in ("step", "version"):
                found.setdefault(name, []).append((float(line["step"] or 0), float(value)))
    return {name: np.array(values) for name, values in found.items()}


def by_group(series: Series, metric: str, datasets: Sequence[str]) -> dict[str, dict[str, Float[np.ndarray, "_ 2"]]]:
    """The series "<metric>/<group>/<dataset>", by group and dataset."""
    groups: dict[str, dict[str, Float[np.ndarray, "_ 2"]]] = {}
    for name, values in series.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == metric and parts[2] in datasets:
            groups.setdefault(parts[1], {})[parts[2]] = values
    return groups


def draw_losses(series: Series, datasets: Sequence[str], folder: Path) -> Picture | None:
    """Losses, learning rate and gradient norm; None if the metrics hold none of them."""
    panels = [("loss", "loss"), ("loss_box", "box loss (1 \u2212 DIoU)"), ("loss_class", "classification loss (focal)")]
    rest = [("learning_rate", "learning rate"), ("gradient_norm", "gradient norm before clipping")]
    drawn = [p for p in panels if any(f"{p[0]}/{d}" in series for d in datasets)]
    drawn += [p for p in rest if p[0] in series]
    if not drawn:
        return None
    figure, axes = canvas(1, len(drawn), 3.6 * len(drawn), 3.6)
    for ax, (metric, label) in zip(axes[0], drawn, strict=True):
        for d, name in enumerate(datasets):
            if f"{metric}/{name}" in series:
                ax.plot(*series[f"{metric}/{name}"].T, color=COLORS[d], label=name)
        if metric in series:
            ax.plot(*series[metric].T, color="0.2", label="all parameters" if metric == "gradient_norm" else "AdamW")
        ax.set_title(label, fontsize=10)
        ax.set_ylabel(label, fontsize=9)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8)
        name_steps(ax)
    return save(
        figure, folder, "losses", "Losses, learning rate and gradient norm",
        "From metrics.jsonl: means over the steps between two lines. Losses have no unit; the gradient norm is that of "
        "all parameters together, after balancing and before clipping.",
    )  # fmt: skip


def draw_psi(series: Series, threshold: float | None, folder: Path) -> Picture | None:
    """Agreement of gradient norms over training; None without it."""
    groups = {name.split("/")[1]: values for name, values in series.items() if name.startswith("psi/")}
    whole: Series = {name: groups.pop(name) for name in ("mean", "min") if name in groups}
    shares = {"/".join(n.split("/")[1:]): v for n, v in series.items() if n.startswith("harmonized_share/")}
    if "harmonized_share" in groups:
        shares["all tensors"] = groups.pop("harmonized_share")
    groups.pop("cap_hits", None)
    if not groups and not whole:
        return None
    kinds = {name: values for name, values in groups.items() if name in KINDS}
    places = {name: values for name, values in groups.items() if name not in KINDS}
    parts: list[tuple[str, Series, list[str]]] = [
        ("all tensors", whole, ["all tensors"]),
        ("by place", places, [*places]),
        ("by kind", kinds, [*kinds]),
    ]
    parts = [part for part in parts if part[1]]
    figure, axes = canvas(2, len(parts), 5 * len(parts), 7, sharex=True)
    for column, (title, values, names) in enumerate(parts):
        upper, lower = axes[:, column]
        _lines(upper, values)
        if threshold is not None:
            upper.axhline(threshold, color="0.3", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
        upper.set(title=title, ylabel="Psi, mean over tensors (1: equal norms)", ylim=(0, 1.05))
        _lines(lower, {name: shares[name] for name in names if name in shares})
        lower.set(ylabel="share of tensors with Psi below the threshold", ylim=(-0.02, 1.05))
        name_steps(lower)
        upper.legend(fontsize=8, loc="lower left")
    return save(
        figure, folder, "psi", "Agreement of the datasets' gradient norms",
        "Psi of a parameter tensor is the mean over pairs of datasets of 2 a b / (a\u00b2 + b\u00b2), a and b the "
        "norms of their gradients: 1 for equal norms, 0.8 at a ratio of two. Below the threshold gradient "
        "harmonisation scales the gradients to their mean norm. Above Psi, below the share of tensors it is below the "
        "threshold in: of all tensors, by where in the detector they are, and by what they are. From metrics.jsonl; "
        "each line tells of its last step.",
    )  # fmt: skip


def _lines(ax: Any, values: Series) -> None:
    for i, (name, rows) in enumerate(values.items()):
        ax.plot(*rows.T, color=COLORS[i % len(COLORS)], label=name, linewidth=1.3)


def draw_by_group(
    series: Series, metric: str, datasets: Sequence[str], folder: Path, title: str, label: str, caption: str
) -> Picture | None:
    """A metric of each parameter group and dataset on a logarithmic axis; None where there is none."""
    groups = by_group(series, metric, datasets)
    if not groups:
        return None
    columns = min(_COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = canvas(rows, columns, 3.6 * columns, 0.6 + 2.7 * rows, sharex=True)
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, (group, own) in zip(axes.flat, groups.items(), strict=False):
        _logarithmic(ax, own, datasets)
        ax.set_title(group, fontsize=10)
        ax.set_ylabel(label, fontsize=8)
        name_steps(ax)
    axes[0, 0].legend(fontsize=8)
    return save(figure, folder, metric, title, caption)


def _logarithmic(ax: Any, own: Series, datasets: Sequence[str]) -> None:
    positive = False
    for d, name in enumerate(datasets):
        if name in own:
            ax.plot(*own[name].T, color=COLORS[d], label=name, linewidth=1.2)
            positive |= bool((own[name][:, 1] > 0).any())
    if positive:
        ax.set_yscale("log")
