"""Scores of drawings of scans, from the hits and misses by scan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.evaluation.matches import Matches, read_matches, write_matches
from tests.evaluation.test_scores import CASES, evaluate, scans_of


def evaluated(case: str, order: list[int] | None = None):
    detections, ground_truth = scans_of(CASES[case])
    order = [*range(len(detections))] if order is None else order
    return evaluate(
        [detections[scan] for scan in order],
        [ground_truth[scan] for scan in order],
        num_classes=int(CASES[case]["num_classes"]),
        rotated="sunrgbd" in case,
    )


@pytest.mark.parametrize("case", CASES)
def test_a_drawing_scores_as_an_evaluation_of_its_scans(case: str):
    whole = evaluated(case)
    scans = len(whole.matches.names)
    once = whole.matches.mean_average_precision(np.ones((1, scans), np.int64))
    np.testing.assert_allclose(once[0], whole.mean_average_precision, rtol=1e-12)
    rng = np.random.default_rng(0)
    drawn = [sorted(rng.integers(scans, size=scans).tolist()) for _ in range(3)]
    counts = np.stack([np.bincount(order, minlength=scans) for order in drawn])
    assert counts.max() > 1 and counts.min() == 0
    expected = [evaluated(case, order).mean_average_precision for order in drawn]
    np.testing.assert_allclose(whole.matches.mean_average_precision(counts), expected, rtol=1e-12)


def test_a_drawing_without_ground_truth_has_no_score():
    matches = Matches(
        names=("a", "b"),
        iou_thresholds=(0.25,),
        scores=np.array([0.9, 0.8, 0.7], np.float32),
        labels=np.zeros(3, np.int32),
        scans=np.array([1, 0, 0], np.int32),
        is_hit=np.array([[False, True, False]]),
        ground_truth=np.array([[2], [0]]),
    )
    # The two boxes of a: one is hit behind a false positive of b, which is there once, not at all, and alone.
    found = matches.mean_average_precision(np.array([[1, 1], [2, 0], [0, 2]]))
    np.testing.assert_allclose(found[:, 0], [0.25, 0.5, np.nan])
    # Boxes that nothing detects score 0.
    nothing = replace(matches, scores=matches.scores[:0], labels=matches.labels[:0], scans=matches.scans[:0],
                      is_hit=matches.is_hit[:, :0])  # fmt: skip
    assert nothing.mean_average_precision(np.array([[1, 1]])) == [[0]]


def test_matches_are_read_as_they_were_written(tmp_path: Path):
    case = next(iter(CASES))
    matches = {"scannet": evaluated(case).matches, "own data": evaluated(case, [0]).matches}
    write_matches(tmp_path / "matches.npz", matches)
    found = read_matches(tmp_path / "matches.npz")
    assert list(found) == ["scannet", "own data"]
    for name, own in matches.items():
        assert Matches.from_dict(own.to_dict()).to_dict() == found[name].to_dict() == own.to_dict()
    empty = evaluated(case, []).matches
    again = Matches.from_dict(empty.to_dict())
    assert again.to_dict() == empty.to_dict()
    assert np.isnan(again.mean_average_precision(np.ones((1, 0), np.int64))).all()
    assert read_matches(tmp_path / "none.npz") == {}


def test_damaged_matches_are_left_out_with_a_line_or_read_as_they_were(tmp_path: Path, capsys):
    case, file = next(iter(CASES)), tmp_path / "matches.npz"
    write_matches(file, {"scannet": evaluated(case).matches})
    content, expected = file.read_bytes(), read_matches(file)["scannet"].to_dict()
    flips = np.random.default_rng(0).integers(8 * len(content), size=150).tolist()
    damaged = [content[:100], content[:-100], b"", b"PK", content[: len(content) // 2]]
    for place in flips:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    left_out = 0
    for changed in damaged:
        file.write_bytes(changed)
        found, line = read_matches(file), capsys.readouterr().out
        if found:
            assert found["scannet"].to_dict() == expected and not line
        else:
            assert line.startswith(f"{file} is damaged and left out (") and line.count("\n") == 1
            left_out += 1
    assert left_out > 100
    file.unlink()
    file.mkdir()
    assert read_matches(file) == {} and "Is a directory" in capsys.readouterr().out


def test_matches_whose_arrays_do_not_belong_together_are_left_out(tmp_path: Path, capsys):
    matches = evaluated(next(iter(CASES))).matches
    for change in ({"scans": matches.scans + 100}, {"labels": matches.labels + 9}, {"labels": matches.labels - 1}):
        write_matches(tmp_path / "matches.npz", {"scannet": replace(matches, **change)})
        assert read_matches(tmp_path / "matches.npz") == {}
        assert "detections" in capsys.readouterr().out
