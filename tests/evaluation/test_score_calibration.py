from dataclasses import replace

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.matches import Matches
from h2a2_jax.evaluation.score_calibration import calibrated, fit_scores
from tests.pretrained.detectors import stored_detector


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def detections(slope, offset, count, seed=0):
    """Scores, and hits that occur as often as a logistic curve of the score says."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.02, 0.98, count)
    share = sigmoid(slope * np.log(scores / (1 - scores)) + offset)
    return scores.astype(np.float32), rng.random(count) < share


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.6, -1.2), (2.0, 0.7)])
def test_the_line_of_the_logits_is_found(slope, offset):
    found = fit_scores(*detections(slope, offset, 100_000))
    np.testing.assert_allclose(found, (slope, offset), atol=0.05)


def test_few_detections_move_little_and_the_order_stays():
    assert fit_scores(np.zeros(0, np.float32), np.zeros(0, bool)) == (1.0, 0.0)
    slope, offset = fit_scores(np.array([0.9], np.float32), np.array([False]))
    assert 0.7 < slope < 1 and -0.2 < offset < 0
    wrong, hits = detections(-3.0, 0.0, 5000)
    assert fit_scores(wrong, hits)[0] == pytest.approx(0.2)  # the worse the score the likelier a hit: kept in order


def matches_of(spec, label):
    scores, hits = detections(0.5, -1.0, 20_000)
    order = np.argsort(-scores)
    count = len(scores)
    return Matches(
        names=("a",), iou_thresholds=(0.25,), scores=scores[order], labels=np.full(count, label),
        scans=np.zeros(count, int), is_hit=hits[order][None], ground_truth=np.full((1, spec.num_classes), 9),
    )  # fmt: skip


def test_the_line_goes_into_kernel_and_bias_of_the_class_alone():
    detector = stored_detector()
    matches = {spec.name: matches_of(spec, 1) for spec in detector.specs}
    after = calibrated(detector, matches)
    features = np.random.default_rng(0).normal(size=(50, detector.parts[0]["heads.class_kernel"].shape[1]))
    for row, spec in enumerate(detector.specs):
        before, now = (
            features @ parts[0]["heads.class_kernel"][row] + parts[0]["heads.class_bias"][row]
            for parts in (detector.parts, after.parts)
        )
        np.testing.assert_allclose(now[:, 1], 0.5 * before[:, 1] - 1.0, atol=0.1)
        np.testing.assert_array_equal(np.delete(now, 1, axis=1), np.delete(before, 1, axis=1))
        assert spec.num_classes > 1
    same = set(detector.parts[0]) - {"heads.class_kernel", "heads.class_bias"}
    assert same and all(after.parts[0][name] is detector.parts[0][name] for name in same)


def test_what_cannot_be_calibrated_is_refused():
    detector = stored_detector()
    matches = {spec.name: matches_of(spec, 0) for spec in detector.specs}
    with pytest.raises(InputError, match=r"no matches of .* at an IoU of 0.5: evaluate it"):
        calibrated(detector, matches, 0.5)
    with pytest.raises(InputError, match="no matches of"):
        calibrated(detector, {})
    union = replace(detector.config.model, label_space="union")
    with pytest.raises(InputError, match="no class head of its own"):
        calibrated(replace(detector, config=replace(detector.config, model=union)), matches)
