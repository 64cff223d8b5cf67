"""Pictures of the premise: energy profiles of detectors and their correlation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from benchmarks.premise.energy import CENTRE, GROUPS, PAIR_KINDS, Measured, correlations
from benchmarks.premise.site_classes import SITE_CLASSES
from h2a2_jax.figures import COLORS, Picture, canvas, save
from h2a2_jax.report.offsets import OFFSET_CLASSES, offset_classes

_HATCHES = ("", "", "", "//", "//")
_CENTRE_NOTES = {
    True: "The centre usually carries more energy than any other offset, so correlations with it are high whatever the "
    "detectors learnt.",
    False: "The centre is left out, for it dominates.",
}


def draw_correlations(measured: Sequence[Measured], folder: Path) -> list[Picture]:
    """Mean correlation of response energies by layer, kind of pair and class of site; one picture with the centre."""
    pictures = []
    for with_centre in (True, False):
        found = correlations(measured, with_centre)
        layers = list(measured[0].profiles)
        width = max(9.0, 2.5 + 0.85 * len(layers))
        figure, axes = canvas(len(GROUPS), 1, width, 1.4 + 2.1 * len(GROUPS), sharex=True, sharey=True)
        for g, group in enumerate(GROUPS):
            ax, bar = axes[g, 0], 0.84 / max(1, len(found))
            for i, (kind, values) in enumerate(found.items()):
                k = PAIR_KINDS.index(kind)
                x = np.arange(len(layers)) - 0.42 + bar * (i + 0.5)
                face = "white" if _HATCHES[k] else COLORS[k]
                ax.bar(
                    x, values[:, g, 0], bar * 0.9, color=face, edgecolor=COLORS[k], hatch=_HATCHES[k], label=kind
                )  # fmt: skip
                ax.plot(x, values[:, g, 1], "k_", markersize=6, label="Spearman" if i == len(found) - 1 else None)
            ax.axhline(0, color="0.3", linewidth=0.8)
            ax.set_title("all sites" if g == 0 else f"{group} sites", fontsize=10)
            ax.set(ylim=(-1.05, 1.05), ylabel="correlation")
        axes[-1, 0].set_xticks(np.arange(len(layers)), layers, rotation=40, ha="right", fontsize=8)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, ncols=3, loc="outside lower center")
        suffix = "with" if with_centre else "without"
        pictures.append(
            save(
                figure,
                folder,
                f"premise_{suffix}_centre",
                f"Response energy per offset, correlated between detectors, {suffix} the centre offset",
                "Bars are Pearson's, ticks Spearman's correlation of two detectors' energy profiles over the "
                f"{27 if with_centre else 26} offsets, the mean over pairs of detectors; filled bars are trained, "
                f"hatched ones untrained detectors (the control). {_CENTRE_NOTES[with_centre]} Two detectors of one "
                "dataset ran on the same scans and show how much agreement can be expected at best. Detectors with "
                "the same start have drawn the same first kernels, and a part of their agreement may be what is left "
                "of them: compare with the untrained pair of the same start. Evidence for the premise is a trained bar "
                "of different starts above the untrained one, at plane, edge and corner sites alike; no bar where a "
                "class was met too rarely.",
            )
        )
    return pictures


def draw_profiles(measured: Sequence[Measured], folder: Path) -> Picture:
    """Energy of each offset, by class of site and trained detector, for the first layer of each stage."""
    trained = [m for m in measured if m.trained]
    layers = [layer for layer in measured[0].profiles if layer.endswith("_0.conv2")]
    order = np.argsort(offset_classes(), kind="stable")
    order = order[order != CENTRE]
    figure, axes = canvas(1, len(layers), 1.5 + 4.4 * len(layers), 1.6 + 0.24 * len(SITE_CLASSES) * len(trained))
    image: Any = None
    ends = np.cumsum(np.bincount(offset_classes()))[1:] - 1
    names = [f"{group}: {m.dataset} {m.start}" for group in SITE_CLASSES for m in trained]
    for ax, layer in zip(axes[0], layers, strict=True):
        rows = np.stack([m.profiles[layer][1 + g][order] for g in range(len(SITE_CLASSES)) for m in trained])
        known = np.isfinite(rows)
        mean = np.where(known, rows, 0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
        image = ax.imshow(rows / np.where(mean > 0, mean, np.nan), cmap="magma", vmin=0, vmax=2.5, aspect="auto")
        ax.set_title(layer, fontsize=10)
        ax.set_yticks(np.arange(len(names)), names if ax is axes[0, 0] else [""] * len(names), fontsize=7)
        ax.vlines(ends[:-1] - 0.5, -0.5, len(names) - 0.5, color="white", linewidth=1)
        ax.hlines(np.arange(1, len(SITE_CLASSES)) * len(trained) - 0.5, -0.5, 25.5, color="white", linewidth=1)
        middles = (np.append(0, ends[:-1]) + ends) / 2 - 0.5
        ax.set_xticks(middles, OFFSET_CLASSES[1:], fontsize=8)
        ax.set_xlabel("offset, by class")
    figure.colorbar(image, ax=axes, location="right", shrink=0.8).set_label("energy / mean of the 26 offsets")
    return save(
        figure, folder, "premise_profiles", "Where the response comes from, offset by offset",
        "A row is a trained detector (dataset and seed) at sites of one class, a column one of the 26 offsets around "
        "the centre, the colour the mean energy |x W|\u00b2 of the neighbours there over its mean over offsets. Rows "
        "of one block that look alike are detectors that listen to the same offsets. Second convolution of the first "
        "block of each stage; white cells were met too rarely.",
    )  # fmt: skip


def draw_site_classes(counts: Mapping[str, Int[np.ndarray, "4 4"]], folder: Path) -> Picture:
    """Share of plane, edge, corner and other sites, by stage and dataset."""
    figure, axes = canvas(1, len(counts), 1 + 3.4 * len(counts), 3.4, sharey=True)
    for ax, (name, rows) in zip(axes[0], counts.items(), strict=True):
        shares: Float[np.ndarray, "4 4"] = rows / np.maximum(rows.sum(1, keepdims=True), 1)
        base = np.zeros(4)
        for c, kind in enumerate(SITE_CLASSES):
            ax.bar(np.arange(4), shares[:, c], 0.75, bottom=base, color=COLORS[c], label=kind)
            base += shares[:, c]
        ax.set_title(f"{name} ({int(rows[0].sum())} sites in layer1)", fontsize=9)
        ax.set_xticks(np.arange(4), [f"layer{s + 1}" for s in range(4)])
    axes[0, 0].set_ylabel("share of sites")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return save(
        figure, folder, "site_classes", "Plane, edge and corner sites",
        "Share of the classes among the sites of each stage, on the scans that the detectors ran on. The class depends "
        "on the sites occupied within 2.5 sites around (eigenvalues of their covariance, distance of their mean): "
        "flat and centred is a plane, folded or one-sided an edge, folded and one-sided in all directions a corner. It "
        "is judged at the stage's own resolution, where furniture may be a few sites large.",
    )  # fmt: skip
