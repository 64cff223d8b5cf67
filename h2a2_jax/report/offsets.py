"""Measures of the kernel that each offset of a 3^3 kernel takes: shared (gamma = 1) or the dataset's own (0)."""

import itertools

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from h2a2_jax.sparse.sites import kernel_offsets

OFFSET_CLASSES = ("centre", "face", "edge", "corner")
"""Classes of the 27 offsets by how many coordinates move: 1 centre, 6 faces, 12 edges, 8 corners."""


def offset_classes() -> Int[np.ndarray, " 27"]:
    """Index into `OFFSET_CLASSES` of each offset, x fastest."""
    return np.abs(kernel_offsets(3)).sum(1)


def majority(gamma: Float[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
    """Return True where gamma, the share of scans that take the shared kernel, is at least one half."""
    return gamma >= 0.5


def agreement(gamma: Float[np.ndarray, "d 27"]) -> Float[np.ndarray, " 4"]:
    """By offset class, share of (pair of datasets, offset) in which both datasets' majorities take the same kind.

    NaN with fewer than two datasets.
    """
    chosen, classes = majority(gamma), offset_classes()
    same = [a == b for a, b in itertools.combinations(chosen, 2)]
    if not same:
        return np.full(len(OFFSET_CLASSES), np.nan)
    return np.array([np.mean([pair[classes == c] for pair in same]) for c in range(len(OFFSET_CLASSES))])


def chance_agreement(gamma: Float[np.ndarray, "d 27"]) -> float:
    """The agreement expected if each dataset spread its number of shared offsets over the kernel at random.

    With shares p and q of shared offsets it is p q + (1 - p)(1 - q), the mean over pairs of datasets; it is the same
    for every class. NaN with fewer than two datasets.
    """
    shares = majority(gamma).mean(-1)
    pairs = [p * q + (1 - p) * (1 - q) for p, q in itertools.combinations(shares, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def flip_shares(gamma: Float[np.ndarray, "t d 27"]) -> Float[np.ndarray, " t_minus_1"]:
    """From one time to the next, share of (dataset, offset) whose majority changes, among those known at both."""
    chosen, finite = majority(gamma), np.isfinite(gamma)
    known = finite[1:] & finite[:-1]
    changed = (chosen[1:] != chosen[:-1]) & known
    return changed.sum((1, 2)) / np.maximum(known.sum((1, 2)), 1)


def kept_share(first: Float[np.ndarray, "*s"], last: Float[np.ndarray, "*s"]) -> float:
    """Share of (dataset, offset) whose majority is the same in both, among those known in both; NaN without one."""
    known = np.isfinite(first) & np.isfinite(last)
    return float((majority(first) == majority(last))[known].mean()) if known.any() else float("nan")


def area_under_curve(score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Probability that a positive has a higher score than a negative, ties counted half; NaN without one of them."""
    if positive.all() or not positive.any():
        return float("nan")
    above, below = score[positive, None], score[None, ~positive]
    return float(((above > below) + 0.5 * (above == below)).mean())


def rank_correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation, ties with their mean rank; NaN where x or y is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def disagreement(gamma: Float[np.ndarray, "*s v"]) -> Float[np.ndarray, "*s"]:
    """Disagreement of scans: the mean over offsets of 1 - |2 gamma - 1|.

    0: every offset takes the same kind in all scans; 1: half of the scans take each. A single scan never disagrees.
    """
    return np.asarray((1 - np.abs(2 * gamma - 1)).mean(-1))
