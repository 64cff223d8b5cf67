"""Differences between rows of a table with 95 % intervals, by a bootstrap over seeds and validation scans.

A draw takes validation scans with replacement, the same for all rows and seeds, and seeds with replacement, the same
for both rows. Its difference is that of the rows' mean mAP on the scans drawn, plus what the seeds drawn differ from
the mean of all seeds, on all scans. (Seeds on the scans drawn would count three times what is particular to a seed and
a scan.) The interval holds the middle 95 % of the draws.

A few seeds drawn with replacement scatter less than seeds do. So the part of the seeds is multiplied by
t / z * sqrt(n / (n - 1)), with the 97.5 % quantiles t of Student's distribution for n seeds and z of the normal one:
1.6 for five seeds, 2.7 for three, 9.2 for two.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtri, stdtrit

from h2a2_jax.evaluation.matches import MATCHES_FILE, Matches, read_matches
from h2a2_jax.sweeps.sweep_results import MEAN, Score, evaluation_folder

DRAWS = 2000
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Sample:
    """Average precision of one seed of a row, in per cent, by dataset.

    Attributes:
        scores: Of all validation scans, by threshold; NaN where it is not defined.
        drawn: Of each drawing of the scans; only of datasets whose matches are stored.
        scans: Names of the scans that are drawn.
    """

    scores: Mapping[str, Float[np.ndarray, " t"]]
    drawn: Mapping[str, Float[np.ndarray, "draws t"]] = field(default_factory=dict)
    scans: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def stored_matches(folders: Iterable[Path], number: int = 0) -> dict[str, Matches]:
    """Matches by dataset of an evaluation of runs that make up a row; of older runs there are none."""
    found = (read_matches(evaluation_folder(folder, number) / MATCHES_FILE) for folder in folders)
    return {name: own for each in found for name, own in each.items()}


def samples_of(
    scores: Iterable[Score], metrics: Sequence[str], matches: Mapping[int, Mapping[str, Matches]]
) -> dict[int, Sample]:
    """The samples of a row by seed, from its scores and the matches of every seed.

    Matches that do not give the scores are of another evaluation and are left out.
    """
    by_seed: dict[int, dict[str, np.ndarray]] = {}
    for score in scores:
        if score.dataset != MEAN and set(metrics) <= set(score.metrics):
            known = [math.nan if (value := score.metrics[m]) is None else value for m in metrics]
            by_seed.setdefault(score.seed, {})[score.dataset] = np.array(known)
    samples = {}
    for seed, values in by_seed.items():
        own = {name: found for name, found in matches.get(seed, {}).items() if _gives(found, values.get(name))}
        drawn = {
            name: 100 * found.mean_average_precision(drawn_scans(name, len(found.names))) for name, found in own.items()
        }
        samples[seed] = Sample(values, drawn, {name: found.names for name, found in own.items()})
    return samples


def mean_sample(evaluations: Sequence[Sample]) -> Sample:
    """The mean of several evaluations of one training on the same scans."""
    first = evaluations[0]
    scans = {n: own for n, own in first.scans.items() if all(each.scans.get(n) == own for each in evaluations)}
    return Sample(
        {name: np.mean([each.scores[name] for each in evaluations], axis=0) for name in first.scores},
        {name: np.mean([each.drawn[name] for each in evaluations], axis=0) for name in scans},
        scans,
    )


def paired_difference(
    row: Mapping[int, Sample], against: Mapping[int, Sample] | None, datasets: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any]:
    """Difference of two rows, over the seeds that both have; without `against`, the row itself.

    Args:
        row: Samples by seed.
        against: Samples of the row that is subtracted.
        datasets: Datasets of the table; the result has those that both rows have, and `MEAN` if they have all.
        metrics: Names of the average precisions, by threshold.

    Returns:
        "seeds"; "over", what was drawn: "seeds and scans", "seeds" where a run has no matches or runs have other scans,
        "scans" where there is one seed, or ""; "values" by dataset and metric, each with "difference", "low" and
        "high" in per cent, and "told_apart", True if the interval does not hold zero. Values that are not defined
        are None.
    """
    seeds = [seed for seed in row if against is None or seed in against]
    parts = [own[seed] for own in (row, against or {}) for seed in seeds if seed in own]
    names = [name for name in datasets if parts and all(name in part.scores for part in parts)]
    scans = [{part.scans.get(name) for part in parts} for name in names]
    by_scans = bool(names) and all(len(own) == 1 and None not in own for own in scans)

    def gains(kind: Literal["scores", "drawn"]) -> dict[str, np.ndarray]:
        """Differences by draw, seed and threshold; the scores on all scans are one draw."""

        def stacked(own: Mapping[int, Sample], name: str) -> np.ndarray:
            return np.stack([np.atleast_2d(getattr(own[seed], kind)[name]) for seed in seeds], axis=1)

        found = {n: stacked(row, n) - (0.0 if against is None else stacked(against, n)) for n in names}
        if len(datasets) > 1 and len(names) == len(datasets):
            found[MEAN] = np.mean([*found.values()], axis=0)
        return found

    whole, drawn = gains("scores"), gains("drawn") if by_scans else {}
    over = [part for part, is_drawn in (("seeds", len(seeds) > 1), ("scans", by_scans)) if is_drawn]
    return {
        "seeds": seeds,
        "over": " and ".join(over),
        "values": {
            name: {
                metric: _interval(whole[name][0, :, t], drawn[name][:, :, t] if by_scans else None)
                for t, metric in enumerate(metrics)
            }
            for name in whole
        },
    }


def row_differences(
    rows: Mapping[str, Mapping[int, Sample]], against: Sequence[str], datasets: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """`paired_difference` of every other row and each of those `against`, with the names of both."""
    return [
        {"row": name, "against": other, **paired_difference(rows[name], rows[other], datasets, metrics)}
        for other in against
        for name in rows
        if name != other
    ]


def drawn_scans(dataset: str, count: int) -> Int[np.ndarray, "draws s"]:
    """Times that each draw has each of a dataset's scans; the same in every call."""
    rng = np.random.default_rng([zlib.crc32(dataset.encode()), count])
    return rng.multinomial(count, np.full(count, 1 / count), DRAWS)


def _gives(matches: Matches, scores: np.ndarray | None) -> bool:
    if scores is None or len(matches.iou_thresholds) != len(scores) or not matches.names:
        return False
    found = 100 * matches.mean_average_precision(np.ones((1, len(matches.names)), np.int64))[0]
    return np.allclose(found, scores, rtol=0, atol=1e-6, equal_nan=True)


def _interval(whole: Float[np.ndarray, " seeds"], drawn: Float[np.ndarray, "draws seeds"] | None) -> dict[str, Any]:
    """The interval of the mean of differences, by seed, on all scans and on each drawing of them."""
    count, difference = len(whole), float(whole.mean())
    if math.isnan(difference):
        return dict.fromkeys(("difference", "low", "high", "told_apart"))
    if count == 1 and drawn is None:
        return {"difference": difference, "low": None, "high": None, "told_apart": None}
    values = np.full(DRAWS, difference) if drawn is None else drawn.mean(1)
    if count > 1:
        seeds = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), DRAWS)
        widening = stdtrit(count - 1, _TAILS[1]) / ndtri(_TAILS[1]) * math.sqrt(count / (count - 1))
        values = values + widening * (seeds @ whole / count - difference)
    # Rounded, for equal scores differ by rounding; and few seeds would allow for more than all points.
    low, high = np.clip(np.nanquantile(values, _TAILS).round(9), -100, 100).tolist()
    return {"difference": difference, "low": low, "high": high, "told_apart": low > 0 or high < 0}
