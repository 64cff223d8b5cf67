"""Response energy of the offsets of a convolution, and how it correlates between detectors.

    E[c, j] = mean over sites n of class c whose neighbour m at offset j exists of |x_m W_j|^2

It says how much of a layer's response comes through each offset where the surface is a plane, an edge, a corner.
Whether a neighbour exists, which is geometry and not learnt, is taken out by averaging over those that do.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import pearsonr, spearmanr

from h2a2_jax.report.geometry import SITE_CLASSES
from h2a2_jax.report.offsets import CENTRE, VOLUME

GROUPS = ("all", *SITE_CLASSES)
"""Rows of an energy profile: all sites, then those of each class."""


@dataclass
class EnergySums:
    """Sums of response energies over scans, by group of sites and offset.

    Attributes:
        total: [5, 27], sums of |x W_j|^2.
        count: [5, 27], pairs summed.
    """

    total: np.ndarray = field(default_factory=lambda: np.zeros((len(GROUPS), VOLUME)))
    count: np.ndarray = field(default_factory=lambda: np.zeros((len(GROUPS), VOLUME), np.int64))

    def add(
        self,
        energies: Float[np.ndarray, "27 n_in"],
        neighbors: Int[np.ndarray, "27 n_out"],
        classes: Int[np.ndarray, " n_out"],
    ) -> None:
        """Add a scan.

        Args:
            energies: |x_m W_j|^2 of every input row m and offset j.
            neighbors: input row that each offset brings to each output row, -1 where there is none.
            classes: of the output rows (`classify_sites`).
        """
        exists = neighbors >= 0
        found = np.where(exists, np.take_along_axis(energies.astype(np.float64), np.maximum(neighbors, 0), 1), 0)
        for g in range(len(GROUPS)):
            chosen = slice(None) if g == 0 else classes == g - 1
            self.total[g] += found[:, chosen].sum(1)
            self.count[g] += exists[:, chosen].sum(1)

    def profile(self, fewest: int = 10) -> Float[np.ndarray, "5 27"]:
        """Mean energy of each offset over the sum of the means; NaN where fewer than `fewest` pairs were met."""
        mean = np.where(self.count >= fewest, self.total / np.maximum(self.count, 1), np.nan)
        with np.errstate(invalid="ignore"):
            whole = np.nansum(mean, 1, keepdims=True)
            return mean / np.where(whole > 0, whole, np.nan)


class Correlation(NamedTuple):
    """Of two energy profiles over the offsets that both have.

    Attributes:
        pearson: linear correlation.
        spearman: rank correlation.
    """

    pearson: float
    spearman: float


def correlate(
    a: Float[np.ndarray, " 27"], b: Float[np.ndarray, " 27"], with_centre: bool = True, fewest: int = 13
) -> Correlation:
    """Correlation of two profiles over offsets.

    Args:
        a: profile; NaN where unknown.
        b: another one.
        with_centre: whether the centre offset, which dominates, takes part.
        fewest: offsets that both must know.

    Returns:
        NaN where fewer offsets are known, or one profile is constant.
    """
    known = np.isfinite(a) & np.isfinite(b)
    known[CENTRE] &= with_centre
    if known.sum() < fewest or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return Correlation(float("nan"), float("nan"))
    return Correlation(float(pearsonr(a[known], b[known])[0]), float(spearmanr(a[known], b[known])[0]))


PAIR_KINDS = (
    "trained, same start",
    "trained, other start",
    "same dataset, trained, other start",
    "untrained, same start",
    "untrained, other start",
)
"""Kinds of pairs of detectors; the last two are the controls, the third bounds what can be expected."""


@dataclass(frozen=True)
class Measured:
    """Profiles of one detector.

    Attributes:
        dataset: it was trained on, and whose scans it ran on.
        start: seed of its first parameters; equal seeds are equal kernels.
        trained: or as drawn.
        profiles: by layer, [5, 27].
    """

    dataset: str
    start: int
    trained: bool
    profiles: dict[str, Float[np.ndarray, "5 27"]]


def pair_kind(a: Measured, b: Measured) -> str | None:
    """Which of `PAIR_KINDS` a pair is; None for pairs that say nothing."""
    if a.trained != b.trained or (a.dataset == b.dataset and (a.start == b.start or not a.trained)):
        return None
    if a.dataset == b.dataset:
        return PAIR_KINDS[2]
    return f"{'trained' if a.trained else 'untrained'}, {'same' if a.start == b.start else 'other'} start"


def correlations(measured: Sequence[Measured], with_centre: bool) -> dict[str, Float[np.ndarray, "l 5 2"]]:
    """By kind of pair, the mean correlation (Pearson, Spearman) over its pairs, by layer and group of sites.

    NaN where no pair has one; kinds without a pair are left out.
    """
    found: dict[str, list[np.ndarray]] = {}
    for a, b in itertools.combinations(measured, 2):
        kind = pair_kind(a, b)
        if kind is None:
            continue
        rows = [
            [correlate(a.profiles[layer][g], b.profiles[layer][g], with_centre) for g in range(len(GROUPS))]
            for layer in a.profiles
        ]
        found.setdefault(kind, []).append(np.array(rows))
    return {kind: _nanmean(np.stack(found[kind]), 0) for kind in PAIR_KINDS if kind in found}


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
