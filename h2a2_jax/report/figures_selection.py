"""Figures of kernel selection."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.patches import Rectangle

from h2a2_jax.figures import COLORS, SHARED_MAP, Picture, canvas, groups_of, legend_below, save, step_axis
from h2a2_jax.report.observation import LayerSelection
from h2a2_jax.report.offsets import (
    OFFSET_CLASSES,
    agreement,
    chance_agreement,
    disagreement,
    flip_shares,
    offset_classes,
)
from h2a2_jax.training.metrics import SelectionHistory


def kernel_slices(values: Float[np.ndarray, " 27"]) -> Float[np.ndarray, "3 11"]:
    """Values of a 3^3 kernel as three slices z = -1, 0, 1 side by side; rows are y, columns x; NaN between slices."""
    cube = values.reshape(3, 3, 3)  # z, y, x: slices of a kernel are stored x fastest
    gap = np.full((3, 1), np.nan)
    return np.concatenate([cube[0], gap, cube[1], gap, cube[2]], 1)


def draw_kernels(
    selections: Mapping[str, LayerSelection], datasets: Sequence[str], scans: Sequence[int], folder: Path
) -> list[Picture]:
    """Share of validation scans with gamma = 1 on the kernel, one picture a stage: layers by datasets."""
    pictures = []
    for group, layers in groups_of(list(selections)).items():
        figure, axes = canvas(len(layers), len(datasets), 1.4 + 3.5 * len(datasets), 1.3 + 1.2 * len(layers))
        image: Any = None
        for row, layer in enumerate(layers):
            for d, name in enumerate(datasets):
                ax, share = axes[row, d], selections[layer].shared_share[d]
                image = ax.imshow(kernel_slices(share), vmin=0, vmax=1, cmap=SHARED_MAP, origin="lower")
                for x, y in itertools.product((0, 1, 2, 4, 5, 6, 8, 9, 10), range(3)):
                    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="0.4", linewidth=0.6))
                ax.set_xticks([1, 5, 9], ["z = \u22121", "z = 0", "z = +1"], fontsize=8)
                ax.set_yticks([0, 1, 2], ["\u22121", "0", "+1"], fontsize=7)
                ax.tick_params(length=0)
                ax.spines[:].set_visible(False)
                title = f"{100 * (1 - share.mean()):.0f} % exclusive"
                ax.set_title(f"{name} ({scans[d]} scans)\n{title}" if row == 0 else title, fontsize=9)
            axes[row, 0].set_ylabel(f"{layer}\ny (sites)", fontsize=9)
        for ax in axes[-1]:
            ax.set_xlabel("x = \u22121, 0, +1 (sites) in each slice", fontsize=8)
        figure.set_layout_engine("constrained", w_pad=0.15)
        bar = figure.colorbar(image, ax=axes, location="right", shrink=min(0.9, 2.4 / len(layers)))
        bar.set_label("share of scans that take the shared kernel\n(0: the dataset's own everywhere)")
        pictures.append(
            save(
                figure, folder, f"kernels_{group}", f"Shared and exclusive offsets, {group}",
                "Each panel is the 3\u00d73\u00d73 kernel of a layer for a dataset, cut into its three slices along "
                "z; in a slice x runs to the right and y upwards, one cell an offset. The colour is the share of "
                "validation scans whose gamma is 1 at that offset, so purple offsets take the shared kernel and "
                "orange ones the dataset's own. Computed by running the newest checkpoint on the scans, each on its "
                "own.",
            )
        )  # fmt: skip
    return pictures


def draw_history(
    steps: Int[np.ndarray, " t"], history: Mapping[str, SelectionHistory], datasets: Sequence[str], folder: Path
) -> list[Picture]:
    """Alpha, beta and gamma over training, one picture a stage."""
    classes, order = offset_classes(), np.argsort(offset_classes(), kind="stable")
    ends = np.cumsum(np.bincount(classes))
    pictures = []
    for group, layers in groups_of(list(history)).items():
        columns = 2 + len(datasets)
        figure, axes = canvas(len(layers), columns, 3.1 * columns, 1.3 + 2.0 * len(layers), sharex=True)
        image: Any = None
        for row, layer in enumerate(layers):
            log = history[layer]
            ax = axes[row, 0]
            for c, name in enumerate(OFFSET_CLASSES):
                _band(ax, steps, log.alpha[:, :, classes == c].reshape(len(steps), -1), COLORS[c], name)
            ax.axhline(0.5, color="0.3", linestyle="--", linewidth=0.8)
            ax.set(ylim=(0, 1.02))
            ax.set_ylabel(f"{layer}\nalpha", fontsize=9)
            ax = axes[row, 1]
            for d, name in enumerate(datasets):
                _band(ax, steps, log.beta[:, d], COLORS[d], name)
            ax.set_ylabel("beta", fontsize=9)
            for d, name in enumerate(datasets):
                ax = axes[row, 2 + d]
                image = ax.pcolormesh(
                    _edges(steps), np.arange(28), log.gamma[:, d, order].T, vmin=0, vmax=1, cmap=SHARED_MAP,
                    rasterized=True,
                )  # fmt: skip
                ax.set_yticks(np.append(0, ends[:-1]) + np.bincount(classes) / 2, OFFSET_CLASSES, fontsize=7)
                ax.hlines(ends[:-1], *_edges(steps)[[0, -1]], color="0.2", linewidth=0.6)
                ax.invert_yaxis()
                if row == 0:
                    ax.set_title(f"gamma, {name}", fontsize=9)
            if row == 0:
                axes[0, 0].set_title("alpha, by class of offset", fontsize=9)
                axes[0, 1].set_title("beta, by dataset", fontsize=9)
        for ax in axes[-1]:
            step_axis(ax)
        legend_below(figure, axes[0, 0], "left", 4, "alpha")
        legend_below(figure, axes[0, 1], "center", 4, "beta")
        figure.colorbar(image, ax=axes, location="right", shrink=0.6).set_label("share of scans with gamma = 1")
        pictures.append(
            save(
                figure, folder, f"history_{group}", f"alpha, beta and gamma over training, {group}",
                "Left: the validity prior alpha, mean (line) and range (band) over the offsets of a class (and the "
                "datasets); below one half exclusive kernels are preferred. Middle: the structural consistency beta of "
                "a dataset's scans, mean and range over the 27 offsets. Right: the share of training scans whose gamma "
                "is 1, one row an offset, grouped by class; purple is the shared kernel. With the prior \"agreement\" "
                "training takes the shared kernel in a share of the steps that rises with alpha, so that few offsets "
                "are all purple or all orange. From selection.jsonl: means over the steps between two of its lines; "
                "beta and gamma are those of augmented training scans.",
            )
        )  # fmt: skip
    return pictures


def draw_agreement(
    selections: Mapping[str, LayerSelection], history: Mapping[str, SelectionHistory], folder: Path
) -> Picture:
    """Agreement of the datasets' selections by layer and class of offset, beside chance and the start of training."""
    layers = list(selections)
    values = np.stack([agreement(s.shared_share) for s in selections.values()])
    chance = np.array([chance_agreement(s.shared_share) for s in selections.values()])
    figure, axes = canvas(1, 1, max(7.5, 2 + 0.75 * len(layers)), 4.4)
    ax, x, width = axes[0, 0], np.arange(len(layers)), 0.8 / len(OFFSET_CLASSES)
    counts = np.bincount(offset_classes())
    for c, name in enumerate(OFFSET_CLASSES):
        places = x - 0.4 + width * (c + 0.5)
        ax.bar(places, values[:, c], width * 0.92, color=COLORS[c], label=f"{name} ({counts[c]})")
        if all(layer in history for layer in layers):
            first = [agreement(history[layer].gamma[0])[c] for layer in layers]
            ax.plot(places, first, "kD", markersize=3, label="first line of training" if c == 3 else None)
    ax.hlines(chance, x - 0.42, x + 0.42, color="black", linewidth=2, label="chance, from the shares")
    ax.set_xticks(x, layers, rotation=40, ha="right", fontsize=8)
    ax.set(ylim=(0, 1.05), ylabel="share of (pair of datasets, offset)\nwith the same choice")
    ax.legend(fontsize=8, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return save(
        figure, folder, "agreement", "Agreement of selections across datasets, by class of offset",
        "For every pair of datasets and every offset, whether the majority of validation scans of both takes the "
        "same kind of kernel (shared or own); bars are the mean over pairs and over the offsets of a class (their "
        "number in brackets; the centre is a single offset, so its bar takes few values). The black line is what "
        "would be expected if each dataset placed its number of shared offsets at random. Agreement above it alone "
        "is no sign of learning: alpha, prototypes and projection are the same for all datasets, so scans that "
        "resemble each other agree from the first step on. Diamonds show that start (training scans, first line of "
        "selection.jsonl); what lies between them and the bars came with training.",
    )  # fmt: skip


def draw_stability(
    steps: Int[np.ndarray, " t"],
    history: Mapping[str, SelectionHistory],
    selections: Mapping[str, LayerSelection],
    datasets: Sequence[str],
    folder: Path,
) -> Picture:
    """Flips of majorities over training, and disagreement of the scans of a dataset."""
    panels = 1 + (len(steps) > 0) + (len(steps) > 1)
    figure, axes = canvas(1, panels, 5.2 * panels, 4.4 + 0.03 * len(history))
    _draw_disagreement(axes[0, -1], selections, datasets)
    legend_below(figure, axes[0, -1], "right")
    if len(steps) > 1:
        _draw_flips(axes[0, 0], steps, history)
        legend_below(figure, axes[0, 0], "left", 6)
    if len(steps) > 0:
        ax = axes[0, -2]
        for d, name in enumerate(datasets):
            over_layers = np.mean([disagreement(log.gamma[:, d]) for log in history.values()], 0)
            ax.plot(steps, over_layers, color=COLORS[d], label=name, marker="." if len(steps) == 1 else None)
        ax.set(ylabel="1 \u2212 |2 gamma \u2212 1|", ylim=(-0.02, 1.02))
        ax.set_title("disagreement in training, mean of layers")
        step_axis(ax)
    return save(
        figure, folder, "stability", "How often selections flip, and how far scans disagree",
        "Flips: the share of (dataset, offset) whose majority changes from one line of selection.jsonl to the next, a "
        "line for each layer, a colour for each stage, darker for later layers. Disagreement: how far the scans of one "
        "dataset differ, the mean over offsets of 1 \u2212 |2 gamma \u2212 1| with gamma the share of scans that take "
        "the shared kernel: 0 where all take the same kind, 1 where half take each. In training gamma is the mean over "
        "the steps of a line, so that it also holds changes from step to step, as those of exploration; on "
        "validation scans the model stands still.",
    )  # fmt: skip


def _draw_flips(ax: Any, steps: Int[np.ndarray, " t"], history: Mapping[str, SelectionHistory]) -> None:
    for color, layers in zip(COLORS, groups_of(list(history)).values(), strict=False):
        for i, layer in enumerate(layers):
            depth = 0.35 + 0.65 * (i + 1) / len(layers)
            flips = flip_shares(history[layer].gamma)
            ax.plot(steps[1:], flips, color=color, alpha=depth, linewidth=1.2, label=layer)
    ax.set(title="flips from line to line", ylabel="share of (dataset, offset) that change sides")
    ax.set_ylim(-0.02, max(0.2, 1.05 * ax.get_ylim()[1]))
    step_axis(ax)


def _draw_disagreement(ax: Any, selections: Mapping[str, LayerSelection], datasets: Sequence[str]) -> None:
    layers, width = list(selections), 0.8 / len(datasets)
    for d, name in enumerate(datasets):
        values = [disagreement(selections[layer].shared_share[d]) for layer in layers]
        places = np.arange(len(layers)) - 0.4 + width * (d + 0.5)
        ax.bar(places, values, width * 0.92, color=COLORS[d], label=name)
    ax.set_xticks(np.arange(len(layers)), layers, rotation=40, ha="right", fontsize=7)
    ax.set(title="disagreement on validation scans", ylabel="1 \u2212 |2 gamma \u2212 1|", ylim=(0, 1.02))


def _band(ax: Any, x: np.ndarray, values: Float[np.ndarray, "t n"], color: str, label: str) -> None:
    """Mean and range over the columns."""
    ax.fill_between(x, values.min(1), values.max(1), color=color, alpha=0.18, linewidth=0)
    ax.plot(x, values.mean(1), color=color, label=label, linewidth=1.4)


def _edges(steps: Int[np.ndarray, " t"]) -> Float[np.ndarray, " t_plus_1"]:
    """Borders of the columns of a picture of log lines: a line covers the steps since the line before."""
    before = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return np.append(max(0, before), steps).astype(np.float64)
