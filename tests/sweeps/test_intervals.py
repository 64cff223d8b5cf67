"""Intervals of differences between rows: known cases, and what is drawn."""

from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.evaluation.matches import Matches, write_matches
from h2a2_jax.sweeps.intervals import (
    Sample,
    _interval,
    drawn_scans,
    mean_sample,
    paired_difference,
    row_differences,
    samples_of,
    stored_matches,
)
from h2a2_jax.sweeps.sweep_results import Score
from h2a2_jax.sweeps.tables import difference_text

METRICS = ("mAP@0.25",)


def matches_of(hit_rate: float, scans: int = 40, seed: int = 0, boxes: int = 6) -> Matches:
    """A detector that finds a share of the boxes of every scan, among as many false positives."""
    rng = np.random.default_rng(seed)
    n = 2 * scans * boxes
    is_box = np.arange(n) < n // 2
    order = rng.permutation(n)
    return Matches(
        names=tuple(f"scan{i}" for i in range(scans)),
        iou_thresholds=(0.25,),
        scores=np.linspace(1, 0, n, dtype=np.float32),
        labels=np.zeros(n, np.int32),
        scans=np.tile(np.arange(scans), 2 * boxes)[order].astype(np.int32),
        is_hit=(is_box & (rng.random(n) < hit_rate))[order][None],
        ground_truth=np.full((scans, 1), boxes),
    )


def score_of(matches: Matches) -> float:
    return float(100 * matches.mean_average_precision(np.ones((1, len(matches.names)), np.int64))[0, 0])


def row_of(by_seed: dict[int, Matches], dataset: str = "s3dis") -> dict[int, Sample]:
    scores = [Score(seed, dataset, {METRICS[0]: score_of(own)}) for seed, own in by_seed.items()]
    return samples_of(scores, METRICS, {seed: {dataset: own} for seed, own in by_seed.items()})


def scored(*scores: float, dataset: str = "s3dis") -> dict[int, Sample]:
    return samples_of([Score(seed, dataset, {METRICS[0]: x}) for seed, x in enumerate(scores)], METRICS, {})


def difference(row: dict[int, Sample], against: dict[int, Sample] | None) -> dict:
    found = paired_difference(row, against, ("s3dis",), METRICS)
    return {"seeds": found["seeds"], "over": found["over"], **found["values"]["s3dis"]["mAP@0.25"]}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_few_seeds_hold_the_truth_as_often_as_they_say(seeds: int):
    rng, held = np.random.default_rng(seeds), []
    for _ in range(400):
        drawn = rng.normal(1.5, 2, seeds)
        found = _interval(drawn, None)
        held.append(found["low"] <= 1.5 <= found["high"])
    assert 0.91 < np.mean(held) < 0.98


def test_intervals_over_scans_hold_the_truth_as_often_as_they_say():
    # A detector that finds every box with the same chance, beside one that finds all boxes: the share found is the mAP.
    rng, held, rate = np.random.default_rng(0), [], 0.6
    counts = drawn_scans("s3dis", 30).astype(float)
    for _ in range(200):
        shares = 100 * rng.binomial(8, rate, 30) / 8
        found = _interval(shares.mean(keepdims=True), (counts @ shares / 30)[:, None])
        held.append(found["low"] <= 100 * rate <= found["high"])
    assert 0.9 < np.mean(held) < 0.99


def test_intervals_over_seeds_and_scans_hold_the_truth_as_often_as_they_say():
    # Five seeds and 40 scans; half of the scatter is particular to a seed and a scan.
    rng, held, widths, ideal = np.random.default_rng(0), [], [], 2 * 1.96 * (1 / 5 + 64 / 40 + 64 / 5 / 40) ** 0.5
    counts = drawn_scans("s3dis", 40) / 40
    for _ in range(300):
        gains = rng.normal(0, 1, (5, 1)) + rng.normal(0, 8, 40) + rng.normal(0, 8, (5, 40))
        found = _interval(gains.mean(1), counts @ gains.T)
        held.append(found["low"] <= 0 <= found["high"])
        widths.append(found["high"] - found["low"])
    assert 0.92 < np.mean(held) < 0.99
    assert 0.9 * ideal < np.median(widths) < 1.3 * ideal


def test_a_real_difference_is_told_apart_and_none_is_not():
    good, fair = ({s: matches_of(rate, seed=10 * k + s) for s in range(5)} for k, rate in enumerate((0.8, 0.5)))
    found = difference(row_of(good), row_of(fair))
    assert (found["over"], found["seeds"]) == ("seeds and scans", [0, 1, 2, 3, 4])
    expected = np.mean([score_of(good[s]) - score_of(fair[s]) for s in range(5)])
    assert found["difference"] == pytest.approx(expected) and found["low"] > 10 and found["told_apart"]
    assert difference_text(found) == f"+{expected:.1f} [{found['low']:.1f}, {found['high']:.1f}]"
    other = row_of({s: matches_of(0.5, seed=100 + s) for s in range(5)})
    null = difference(other, row_of(fair))
    assert null["low"] < 0 < null["high"] and not null["told_apart"]
    assert difference_text(null).endswith("] not told apart")
    # In every call the draws are the same.
    assert difference(other, row_of(fair)) == null


def test_what_both_rows_have_in_common_does_not_widen_the_interval():
    rng = np.random.default_rng(0)
    common = rng.normal(50, 10, 6)
    paired = difference(scored(*common + 2 + rng.normal(0, 0.5, 6)), scored(*common))
    apart = difference(scored(*common + 2 + rng.normal(0, 0.5, 6)), scored(*rng.permutation(common)))
    assert paired["told_apart"] and not apart["told_apart"]
    assert apart["high"] - apart["low"] > 10 * (paired["high"] - paired["low"])
    # Nor do hard scans: the same detections but for one that is missed in every scan.
    good = {0: matches_of(0.7)}
    worse = good[0].is_hit.copy()
    _, first = np.unique(np.where(worse[0], good[0].scans, -1), return_index=True)
    worse[0, first[1:]] = False
    lost = {0: Matches(**{**vars(good[0]), "is_hit": worse})}
    close, wide = difference(row_of(good), row_of(lost)), difference(row_of(good), None)
    assert close["over"] == wide["over"] == "scans" and close["told_apart"]
    assert close["high"] - close["low"] < 0.7 * (wide["high"] - wide["low"])


def test_only_what_is_there_is_drawn():
    whole = {seed: matches_of(0.6, seed=seed) for seed in range(3)}
    row, against = row_of(whole), scored(40.0, 41.0, 44.0, 50.0)
    found = difference(row, against)
    assert (found["over"], found["seeds"]) == ("seeds", [0, 1, 2])  # `against` has no matches
    one = difference(scored(40.0), scored(38.0))
    assert one == {"seeds": [0], "over": "", "difference": 2.0, "low": None, "high": None, "told_apart": None}
    assert difference_text(one) == "+2.0"
    assert difference({0: row[0]}, {0: row[1]})["over"] == "scans"
    others = row_of({seed: matches_of(0.6, scans=30, seed=seed) for seed in range(3)})
    assert difference(row, others)["over"] == "seeds"  # other scans
    assert paired_difference(row, {7: row[0]}, ("s3dis",), METRICS) == {"seeds": [], "over": "", "values": {}}
    # Matches that do not give the score of evaluation.json are of another evaluation.
    stale = samples_of([Score(0, "s3dis", {METRICS[0]: 1.0})], METRICS, {0: {"s3dis": whole[0]}})
    assert stale[0].drawn == {}
    undefined = samples_of([Score(0, "s3dis", {METRICS[0]: None})], METRICS, {})
    assert difference_text(difference(undefined, undefined)) == "-"


def test_the_mean_over_datasets_needs_all_of_them():
    def row(scannet: tuple[float, ...], s3dis: tuple[float, ...]) -> dict[int, Sample]:
        first, second = scored(*scannet, dataset="scannet"), scored(*s3dis)
        return {seed: Sample({**first[seed].scores, **second[seed].scores}) for seed in first}

    rows = {
        "naive": row((10.0, 20.0), (30.0, 30.0)),
        "both": row((12.0, 24.0), (30.0, 32.0)),
        "one": scored(31.0, 32.0),
    }
    both, one = row_differences(rows, ["naive"], ("scannet", "s3dis"), METRICS)
    assert [(each["row"], each["against"]) for each in (both, one)] == [("both", "naive"), ("one", "naive")]
    gains = {name: of["mAP@0.25"]["difference"] for name, of in both["values"].items()}
    assert gains == pytest.approx({"scannet": 3, "s3dis": 1, "mean": 2})
    assert list(one["values"]) == ["s3dis"]


def test_a_row_is_made_of_the_matches_of_its_runs(tmp_path: Path):
    own = {name: matches_of(0.5, seed=i) for i, name in enumerate(("scannet", "s3dis"))}
    for name, matches in own.items():
        write_matches(tmp_path / name / "matches.npz", {name: matches})
    found = stored_matches([tmp_path / "scannet", tmp_path / "s3dis", tmp_path / "older"])
    assert {name: each.to_dict() for name, each in found.items()} == {n: each.to_dict() for n, each in own.items()}
    (sample,) = row_of({0: own["s3dis"]}).values()
    (other,) = row_of({0: matches_of(0.9)}).values()
    mean = mean_sample([sample, other])
    np.testing.assert_allclose(mean.drawn["s3dis"], (sample.drawn["s3dis"] + other.drawn["s3dis"]) / 2)
    assert mean_sample([sample, scored(50.0)[0]]).drawn == {}
