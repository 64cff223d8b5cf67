"""Prediction: padding and neighbours change nothing, empty scans give nothing, evaluation names what it leaves out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax import nnx

from h2a2_jax.boxes import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.evaluate import predict_source
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.loader.batching import BucketLadder, scan_sizes
from h2a2_jax.models import TR3D, DetectorConfig, HeadConfig, LevelSizes
from h2a2_jax.models.tr3d import TR3DKind
from h2a2_jax.scans.scan import Scan, ScanError
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD
from tests.inference.tiny import SPECS, TINY, random_detector, room

SMALL, OTHER, BIG = room("small", 500, 1.2), room("other", 400, 1.0), room("big", 6000, 8.0)
NOTHING = np.zeros((0, 3), np.float32)
EMPTY = Scan("empty", NOTHING, NOTHING, np.zeros((0, 7), np.float32), np.zeros(0, np.int32))


@pytest.fixture(scope="module")
def model() -> TR3D:
    return random_detector()


@pytest.fixture(scope="module")
def make_predictor(model: TR3D) -> Callable[[], Predictor]:
    """Makes predictors of one model."""
    return lambda: Predictor(model, SPECS, score_threshold=0.1)


@pytest.fixture(scope="module")
def predictor(make_predictor: Callable[[], Predictor]) -> Predictor:
    return make_predictor()


@pytest.fixture(scope="module")
def small_boxes(predictor: Predictor) -> Detections:
    (found,) = predictor.predict([SMALL], "sunrgbd")
    assert len(found) > 20 and len(np.unique(found.labels)) > 3
    return found


def assert_same(a: Detections, b: Detections) -> None:
    assert a.labels.tolist() == b.labels.tolist()
    np.testing.assert_allclose(a.scores, b.scores, atol=2e-5)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=2e-4)


def test_a_bigger_bucket_gives_the_same_boxes(make_predictor: Callable[[], Predictor], small_boxes: Detections):
    other = make_predictor()
    other._ladders[1] = BucketLadder(LevelSizes(*(2 * size for size in TR3DKind.least)))
    assert_same(other.predict([SMALL], "sunrgbd")[0], small_boxes)


def test_a_scan_that_does_not_fit_takes_a_higher_bucket(predictor: Predictor, small_boxes: Detections):
    small, big = scan_sizes([SMALL], DetectorConfig()), scan_sizes([BIG], DetectorConfig())
    lowest, higher = predictor._capacities(small, 1), predictor._capacities(big, 1)
    assert small.fits(lowest) and not big.fits(lowest) and big.fits(higher)
    ladder = predictor._ladders[1]
    assert higher in [ladder.capacities(bucket) for bucket in range(20)]


def test_a_bucket_that_was_seen_never_compiles_again(predictor: Predictor, small_boxes: Detections):
    predictor.predict([OTHER], "sunrgbd")
    compiled = predictor._forward._cache_size()
    for scan in (SMALL, room("third", 450, 1.1), EMPTY):
        predictor.predict([scan], "s3dis")
    assert predictor._forward._cache_size() == compiled
    predictor.predict([OTHER, SMALL], "s3dis")
    assert predictor._forward._cache_size() == compiled + 1


def test_a_scan_beside_others_gives_the_same_boxes(predictor: Predictor, small_boxes: Detections):
    found = predictor.predict([OTHER, SMALL, EMPTY], "sunrgbd")
    assert_same(found[1], small_boxes)
    assert len(found[0]) and not len(found[2])


def test_a_scan_without_points_has_no_boxes(predictor: Predictor):
    (found,) = predictor.predict([EMPTY], "s3dis")
    assert found.boxes.shape == (0, 7) and found.scores.shape == (0,) and found.labels.shape == (0,)
    assert predictor.predict([], "s3dis") == []


def test_datasets_have_their_own_heads(predictor: Predictor):
    (found,) = predictor.predict([SMALL], "s3dis")
    assert len(found) and found.labels.max() < S3DIS.num_classes and not found.boxes[:, 6].any()


def test_unknown_datasets_and_wrong_specs_are_refused(predictor: Predictor):
    with pytest.raises(InputError, match="predicts as sunrgbd, s3dis, not as 'scannet'"):
        predictor.predict([SMALL], "scannet")
    with pytest.raises(ValueError, match="the model expects sunrgbd, s3dis"):
        Predictor(predictor_model(predictor), (SCANNET, S3DIS))


def predictor_model(predictor: Predictor) -> TR3D:
    heads = [HeadConfig(s.name, s.num_classes, s.num_outputs) for s in predictor.specs]
    return nnx.eval_shape(lambda: TR3D(TINY, heads, rngs=nnx.Rngs(0)))


def test_points_are_drawn_by_the_test_protocol_and_always_the_same():
    drawn = prepare(SMALL, SUNRGBD)
    assert len(drawn.points) == 100_000
    np.testing.assert_array_equal(drawn.points, prepare(SMALL, SUNRGBD).points)
    assert prepare(SMALL, SCANNET) is SMALL and prepare(EMPTY, SUNRGBD) is EMPTY


def test_a_scan_with_nan_is_named(predictor: Predictor):
    bad = dataclasses.replace(SMALL, name="bad", points=np.full_like(SMALL.points, np.nan))
    with pytest.raises(ScanError, match="Scan bad cannot be used: 500 of 500 points are NaN") as error:
        predictor.predict([SMALL, bad], "s3dis")
    assert error.value.scan == "bad"


class Listed:
    """A source of the given scans; None stands for one that cannot be loaded."""

    def __init__(self, scans: list[Scan | None]):
        self.scans = scans

    @property
    def names(self) -> list[str]:
        return [scan.name if scan else "broken" for scan in self.scans]

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> Scan:
        scan = self.scans[index]
        if scan is None:
            raise ScanError("broken", "Scan broken is cut off.")
        return scan


def test_evaluation_names_what_it_leaves_out(predictor: Predictor, capsys: pytest.CaptureFixture[str]):
    spec = dataclasses.replace(SUNRGBD, test_sampling=None)
    (found,) = predictor.predict([SMALL], "sunrgbd")
    best = np.flatnonzero(found.labels == found.labels[0])
    annotated = dataclasses.replace(
        SMALL,
        boxes=np.concatenate([found.boxes[best], found.boxes[:1]]),
        labels=np.append(found.labels[best], -1).astype(np.int32),
        notes={"points repaired": 2},
    )
    bad = dataclasses.replace(SMALL, name="bad", points=np.full_like(SMALL.points, 1e4))
    source = Listed([None, annotated, bad])
    result = predict_source(predictor, source, spec)
    evaluation = result.evaluate(spec, (0.9,))
    assert evaluation.iou_thresholds == (0.9,) and evaluation.mean_average_precision[0] == pytest.approx(1)
    assert evaluation.num_ground_truth.sum() == len(best)
    assert len(result.detections) == 1 and len(result.detections[0]) == len(found)
    assert set(result.skipped) == {"broken", "bad"} and "m from the origin" in result.skipped["bad"]
    assert result.notes == {SMALL.name: {"points repaired": 2}}
    assert "sunrgbd: 100%" in capsys.readouterr().err


def test_unseen_data_take_a_head_a_conditioning_and_kernels(model: TR3D, small_boxes: Detections):
    def boxes(**choices: Any) -> Detections:
        return Predictor(model, SPECS, score_threshold=0.1, **choices).predict([SMALL], "sunrgbd")[0]

    for choices in ({"conditioning": "s3dis"}, {"conditioning": "mean"}, {"kernels": "shared"}):
        other = boxes(**choices)
        assert len(other) != len(small_boxes) or np.abs(other.scores - small_boxes.scores).max() > 0.01
    with pytest.raises(InputError, match=r"trained on sunrgbd, s3dis, not on 'scannet'"):
        boxes(conditioning="scannet")


def test_what_is_not_folded_gives_the_same_boxes(model: TR3D, small_boxes: Detections):
    whole = Predictor(model, SPECS, score_threshold=0.1, folded=False)
    assert_same(whole.predict([SMALL], "sunrgbd")[0], small_boxes)
