"""Section of the report on learning: choices that left the start, and what choices and alpha go with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from h2a2_jax.figures import COLORS, Picture, Section, Table, canvas, legend_below, log_ticks, number, save
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.report.observation import LayerSelection
from h2a2_jax.report.offsets import (
    OFFSET_CLASSES,
    area_under_curve,
    kept_share,
    majority,
    offset_classes,
    rank_correlation,
)
from h2a2_jax.training.metrics import SELECTION_FILE, SelectionHistory

_COLUMNS = 4
Points = Callable[[LayerSelection], tuple[Float[np.ndarray, " v"], Float[np.ndarray, " v"]]]
"""x and y of the offsets of a layer."""


def learnt_section(
    config: SelectionConfig,
    selections: Mapping[str, LayerSelection],
    steps: Int[np.ndarray, " t"],
    history: Mapping[str, SelectionHistory],
    folder: Path,
) -> Section:
    """Tables and pictures of what was learnt, and sentences on what they show.

    Args:
        config: options of the selection.
        selections: selection on validation scans, by layer; at least one.
        steps: steps of the lines of selection.jsonl.
        history: lines of selection.jsonl of each layer; empty without the file.
        folder: folder of the pictures.
    """
    text: list[str] = []
    contents: list[Picture | Table] = []
    if selections.keys() <= history.keys():
        kept = _kept_table(selections, history, int(steps[0]))
        contents.append(kept)
        text.append(
            f"Of the choices on validation scans a share of {kept.rows[-1][-2]} is that of the first steps of "
            f"training; with as many exclusive ones placed at random it would be {kept.rows[-1][-1]}."
        )
    if all(selection.gradients is not None for selection in selections.values()):
        contents += [_gradients_table(selections, config), draw_gradients(selections, config, folder)]
    else:
        text.append('The prior is "learned": F, the disagreement of the datasets\' gradients, was not measured.')
    support, alpha = _pooled(selections, support_and_prior)
    rho = rank_correlation(support, alpha)
    falls = "falls" if rho > 0.2 else "rises" if rho < -0.2 else "hardly changes"
    text.append(
        "alpha is the same at all offsets." if np.isnan(rho) else
        f"alpha is from {alpha.min():.3f} to {alpha.max():.3f}. Over the offsets of all layers it {falls} where "
        f"support lacks: Spearman's correlation is {rho:.2f}."
    )  # fmt: skip
    return Section("learnt", "What is learnt", text, [*contents, draw_support(selections, folder)])


def _kept_table(selections: Mapping[str, LayerSelection], history: Mapping[str, SelectionHistory], step: int) -> Table:
    """Choices of the first line, the last line and the validation scans, and shares that are kept."""
    gammas = {n: np.stack([history[n].gamma[0], history[n].gamma[-1], s.shared_share]) for n, s in selections.items()}
    gammas["all"] = np.concatenate(list(gammas.values()), 1)
    rows, times = [], ("first", "last", "validation")
    for name, (first, last, now) in gammas.items():
        p, end, q = (float(1 - majority(gamma[np.isfinite(gamma)]).mean()) for gamma in (first, last, now))
        kept = kept_share(first, last), kept_share(first, now), p * q + (1 - p) * (1 - q)
        rows.append([name, *(number(value, 2) for value in (p, end, q, *kept))])
    return Table(
        f"Majority choice of each (dataset, offset): the share of exclusive ones in the first line of {SELECTION_FILE} "
        f"(steps up to {step}), in its last line and on validation scans; the share of choices in the last line, and "
        "on validation scans, that are those of the first line; the latter if as many were exclusive at random.",
        ["layer", *(f"exclusive, {n}" for n in times), *(f"kept, {n}" for n in times[1:]), "at random"],
        rows,
    )


def _gradients_table(selections: Mapping[str, LayerSelection], config: SelectionConfig) -> Table:
    """F by layer, and how the choices go with it."""
    pairs = [*map(gradients_and_choice, selections.values()), _pooled(selections, gradients_and_choice)]
    rows = []
    for name, (f, exclusive) in zip([*selections, "all"], pairs, strict=True):
        above = f"{(f > config.agreement_threshold).sum()} of {f.size}"
        follows = area_under_curve(f, exclusive > 0.5), rank_correlation(f, exclusive)
        rows.append([name, *(number(v, 2) for v in (np.median(f), f.max())), above, *(number(v, 2) for v in follows)])
    return Table(
        "F, the disagreement of the datasets' gradients, over the offsets of a layer; the area under the curve (AUC) "
        "of F for telling offsets whose exclusive kernel is in the majority, and Spearman's correlation of F and the "
        "share of scans that take it, on validation scans. A dash: all offsets are alike.",
        ["layer", "median F", "largest F", f"F above {config.agreement_threshold:g}", "AUC", "correlation"],
        rows,
    )


def gradients_and_choice(selection: LayerSelection) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """F, and the share of validation scans that take the exclusive kernel, mean over datasets; by offset.

    Raises:
        ValueError: the prior is "learned", which measures no F.
    """
    if selection.gradients is None:
        raise ValueError('F is measured with the prior "agreement" alone.')
    return selection.gradients, 1 - selection.shared_share.mean(0)


def support_and_prior(selection: LayerSelection) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """Support and alpha, mean over datasets; by offset."""
    return selection.support.mean(0), selection.alpha.mean(0)


def draw_gradients(selections: Mapping[str, LayerSelection], config: SelectionConfig, folder: Path) -> Picture:
    """Share of scans that take the exclusive kernel against F, a diagram a layer."""
    threshold = config.agreement_threshold
    values = _pooled(selections, gradients_and_choice)[0].clip(1e-3)
    limits = float(min(values.min(), threshold / 2)) / 1.2, float(max(values.max(), threshold * 2)) * 1.2

    def finish(ax: Any) -> None:
        curve = np.geomspace(*limits)
        logit = config.prior_init + config.agreement_sharpness * np.log(threshold / curve)
        ax.plot(
            curve, 1 / (1 + np.exp(logit)), color="0.5", linewidth=1, zorder=1, label="1 \u2212 alpha at the initial O"
        )
        ax.axvline(threshold, color="0.2", linestyle="--", linewidth=1, zorder=1, label="threshold of F")

    labels = "disagreement F of gradients", "share of validation scans with the exclusive kernel"
    figure = _scatter(selections, gradients_and_choice, finish, limits, "log", *labels)
    return save(
        figure, folder, "gradients", "Exclusive kernels against the disagreement of gradients",
        "One point an offset of the kernel, its class by colour. F says how far the datasets' gradients for the shared "
        "kernel differ, in units of what their scans let differ by chance: 1 where all want the same kernel, and where "
        "F is not measured yet; 0 if each batch holds all scans. From the threshold on, kernels of their own are "
        "better. alpha follows from F, so that the points lie near a step at the threshold by construction; O and beta "
        "move them off it. What was learnt is the place of the points along F. rho is Spearman's correlation.",
    )  # fmt: skip


def draw_support(selections: Mapping[str, LayerSelection], folder: Path) -> Picture:
    """Draw alpha against support, a diagram a layer."""

    def finish(ax: Any) -> None:
        ax.axhline(0.5, color="0.2", linestyle="--", linewidth=1, zorder=1, label="alpha = 1/2")

    labels = "support of the offset", "validity prior alpha"
    figure = _scatter(selections, support_and_prior, finish, (0.0, 1.05), "linear", *labels)
    return save(
        figure, folder, "support", "Validity prior against support, by class of offset",
        "One point an offset of the kernel, its class by colour. Support is the share of a layer's output sites that "
        "have a neighbour at the offset, the mean over validation scans and datasets. The paper expects alpha to fall "
        "where support lacks. rho is Spearman's correlation over the 27 offsets.",
    )  # fmt: skip


def _pooled(
    selections: Mapping[str, LayerSelection], points: Points
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Points of the offsets of all layers."""
    x, y = zip(*map(points, selections.values()), strict=True)
    return np.concatenate(x), np.concatenate(y)


def _scatter(
    selections: Mapping[str, LayerSelection],
    points: Points,
    finish: Callable[[Any], None],
    limits: tuple[float, float],
    scale: str,
    x_label: str,
    y_label: str,
) -> Figure:
    """A diagram a layer with one legend below; `finish` adds lines, the same in each."""
    columns = min(_COLUMNS, len(selections))
    rows = -(-len(selections) // columns)
    figure, axes = canvas(rows, columns, 1 + 2.8 * columns, 1.4 + 2.3 * rows, sharex=True, sharey=True)
    classes = offset_classes()
    for ax, (layer, selection) in zip(axes.flat, selections.items(), strict=False):
        x, y = points(selection)
        ax.set(xscale=scale, xlim=limits, ylim=(-0.05, 1.05))
        for c, name in enumerate(OFFSET_CLASSES):
            own = classes == c
            ax.plot(
                x[own].clip(*limits), y[own], "o", color=COLORS[c], markersize=4, alpha=0.8, label=name, clip_on=False
            )
        finish(ax)
        rho = rank_correlation(x, y)
        ax.set_title(layer + ("" if np.isnan(rho) else f", rho = {rho:.2f}"), fontsize=9)
        ax.tick_params(labelsize=8)
        if scale == "log":
            log_ticks(ax.xaxis, *limits)
    for ax in axes.flat[len(selections) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(selections) - columns) : len(selections)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=10)
    legend_below(figure, axes[0, 0])
    return figure
