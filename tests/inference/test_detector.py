"""`h2a2_jax.Detector`: what goes in as arrays comes out as boxes in the frame and unit of the arrays."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import h2a2_jax
from h2a2_jax.errors import InputError
from h2a2_jax.inference.detector import Detector
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.scans.frame import NO_COLORS, UPRIGHT, respelt
from tests.inference.tiny import SPECS, random_detector, room

SMALL, OTHER = room("small", 500, 1.2), room("other", 400, 1.0)


class LowDetector(Detector):
    """A detector of random weights, whose scores are low."""

    def __call__(self, *arguments, score=0.1, **options):
        return super().__call__(*arguments, score=score, **options)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return LowDetector(Predictor(random_detector(), SPECS, score_threshold=0.05))


@pytest.fixture(scope="module")
def found(detector: Detector) -> Boxes:
    boxes = detector(SMALL.points, SMALL.colors, "s3dis")
    assert len(boxes) > 20
    return boxes


def assert_same(a: Boxes, b: Boxes, atol: float = 1e-4) -> None:
    assert a.names == b.names
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    for ours, theirs in ((a.centers, b.centers), (a.sizes, b.sizes), (a.yaws, b.yaws)):
        np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.slow
def test_a_detector_finds_the_boxes_of_its_predictor(detector: Detector, found: Boxes):
    spec = detector.predictor.spec("s3dis")
    (expected,) = detector.predictor.predict([prepare(replace(SMALL, name="scan"), spec)], "s3dis")
    chosen = np.argsort(-expected.scores, kind="stable")[: (expected.scores >= 0.1).sum()]  # best first
    np.testing.assert_allclose(
        np.concatenate([found.centers, found.sizes, found.yaws[:, None]], 1), expected.boxes[chosen], atol=1e-5
    )
    np.testing.assert_array_equal(found.scores, expected.scores[chosen])
    assert found.names == tuple(spec.classes[label] for label in expected.labels[chosen])
    assert detector.datasets == ("sunrgbd", "s3dis") and detector.classes("s3dis") == spec.classes


def test_boxes_below_the_score_are_left_out(detector: Detector, found: Boxes):
    median = float(np.median(found.scores))
    assert_same(detector(SMALL.points, SMALL.colors, "s3dis", score=median), found[found.scores >= median])
    single = next(iter(found))
    assert (
        len(single) == 1 and single.names == found.names[:1] and single.centers.tolist() == [found.centers[0].tolist()]
    )


@pytest.mark.parametrize(("up", "unit", "scale"), [("y", "mm", 1000), ("-x", "cm", 100)])
def test_boxes_come_back_in_the_frame_and_unit_of_the_points(
    detector: Detector, found: Boxes, up: str, unit: str, scale: int
):
    upright = np.array(UPRIGHT[up], np.float64)
    # Of all digits: a float32 rounded in another unit may fall into the next voxel.
    points = SMALL.points.astype(np.float64) @ upright * scale
    turned = detector(points, SMALL.colors, "s3dis", up=up, unit=unit)
    assert_same(
        Boxes(
            turned.centers @ upright.T / scale,
            turned.sizes @ np.abs(upright).T / scale,
            turned.yaws,
            turned.scores,
            turned.labels,
            turned.names,
        ),
        found,
    )


def test_map_coordinates_keep_their_digits(detector: Detector, found: Boxes):
    away = np.array([512_000, 5_403_000, 400])
    moved = detector(SMALL.points.astype(np.float64) + away, SMALL.colors, "s3dis")
    # The points are shifted back by whole metres, so that some fall into other voxels: the best boxes are the same.
    assert np.abs(moved.centers - away).max() < 20
    shifted = detector(SMALL.points + np.float32([3, -2, 1]), SMALL.colors, "s3dis")
    assert shifted.centers.mean(0) == pytest.approx(found.centers.mean(0) + np.array([3, -2, 1]), abs=0.1)


@pytest.mark.slow
def test_lists_of_clouds_give_lists_of_boxes_in_passes_of_one_shape(detector: Detector, found: Boxes):
    clouds, colors = [SMALL.points, OTHER.points, SMALL.points], [SMALL.colors, None, SMALL.colors]
    one_by_one = detector(clouds, colors, "s3dis")
    compiled = detector.predictor._forward._cache_size()
    in_twos = detector(clouds, colors, "s3dis", batch_size=2)
    assert detector.predictor._forward._cache_size() == compiled + 1
    for single, paired in zip(one_by_one, in_twos, strict=True):
        assert_same(single, paired)
    assert_same(one_by_one[0], found)
    assert one_by_one[1].notes == {NO_COLORS: 1} and one_by_one[0].notes == {}
    assert detector([], dataset="s3dis") == []


def test_colours_may_be_bytes(detector: Detector):
    as_bytes = np.round(SMALL.colors * 255).astype(np.uint8)
    boxes = detector(SMALL.points, as_bytes, "s3dis")
    assert_same(boxes, detector(SMALL.points, as_bytes / np.float32(255), "s3dis"))
    in_16_bits = detector(SMALL.points, as_bytes.astype(np.uint16), "s3dis")
    assert_same(boxes, in_16_bits)
    assert any("if they are not, say color_range" in remark for remark in in_16_bits.remarks)


def test_points_that_are_not_finite_are_left_out(detector: Detector, found: Boxes):
    points = np.concatenate([SMALL.points, np.full((3, 3), np.nan, np.float32)])
    boxes = detector(points, np.concatenate([SMALL.colors, SMALL.colors[:3]]), "s3dis")
    assert boxes.notes == {"points with NaN or infinite values": 3}
    # As another number of points is drawn from, others are drawn.
    assert len(boxes) > 0


def test_threads_get_their_own_boxes(detector: Detector, found: Boxes):
    other = detector(OTHER.points, OTHER.colors, "s3dis")
    scans = [SMALL, OTHER] * 6
    with ThreadPoolExecutor(4) as pool:
        for scan, boxes in zip(scans, pool.map(lambda s: detector(s.points, s.colors, "s3dis"), scans), strict=True):
            assert_same(boxes, found if scan is SMALL else other)


class OnADevice:
    """An array that numpy cannot read, as of another library on a device."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("use .cpu() first")


def test_remarks_name_the_arguments_of_the_call(detector: Detector):
    wide = np.round(SMALL.colors * 255).astype(np.uint16)
    assert any(remark.endswith("say color_range)") for remark in detector(SMALL.points, wide, "s3dis").remarks)
    flags = "bytes need --colors=0-255, or say --columns"
    assert respelt(flags, "color_range", "={!r}") == "bytes need color_range='0-255', or say columns"


def test_turned_walls_are_remarked_on(detector: Detector):
    rng = np.random.default_rng(0)
    floor, wall, other = (rng.uniform(0, high, (3000, 3)) for high in ([3, 3, 0.01], [0.01, 3, 2], [3, 0.01, 2]))
    turn = np.array([[np.cos(0.4), np.sin(0.4), 0], [-np.sin(0.4), np.cos(0.4), 0], [0, 0, 1]])
    remarks = detector(np.concatenate([floor, wall, other]) @ turn, None, "s3dis").remarks
    (remark,) = [remark for remark in remarks if "its walls at" in remark]
    assert remark.endswith("boxes of s3dis are axis-aligned: add align='manhattan'")


def test_wrong_arguments_of_a_call_are_errors(detector: Detector):
    points, colors = SMALL.points, SMALL.colors
    for arguments, options, sentence in (
        ((points, colors, "scannet"), {}, "dataset is 'scannet'; expected is one of sunrgbd, s3dis, auto"),
        ((points[:, :2], colors), {"dataset": "s3dis"}, r"points are float32 of shape \(500, 2\)"),
        ((points, colors[1:]), {"dataset": "s3dis"}, r"colors are float32 of shape \(499, 3\)"),
        ((points.astype(str), colors), {"dataset": "s3dis"}, "points are <U"),
        (
            ([points, points], [colors]),
            {"dataset": "s3dis"},
            "points are a list of 2, the colours a list of 1; expected",
        ),
        ((points, colors * 3), {"dataset": "s3dis", "color_range": "0-1"}, "reach from 0 to .*, or say color_range"),
        ((points[:0],), {"dataset": "s3dis"}, "no usable point"),
        ((points, colors, "s3dis"), {"up": "w"}, "up is 'w'; expected is one of z, -z"),
        ((points, colors, "s3dis"), {"unit": "inch"}, "unit is 'inch'"),
        ((points, colors, "s3dis"), {"batch_size": 0}, "batch_size is 0"),
        ((points, colors, "s3dis"), {"batch_size": 1.5}, "batch_size is 1.5; expected is an integer"),
        ((points, colors, "s3dis"), {"score": "0.3"}, "score is '0.3'; expected is a number"),
        ((points.tolist(),), {"dataset": "s3dis"}, "points are a list of rows; .* as np.array"),
        ((points[None],), {"dataset": "s3dis"}, "points are one array of three dimensions"),
        (([points, points], np.stack([colors] * 2)), {"dataset": "s3dis"}, "a list of 2, the colours one ndarray"),
        ((np.ma.masked_less(points, 0.1),), {"dataset": "s3dis"}, "points are partly masked; give the rows that count"),
        (({"x": points},), {"dataset": "s3dis"}, "The points are a dict that is no array for numpy: it has no rows"),
        ((points, colors, "s3dis"), {"floor": "low"}, "floor is 'low'; expected is auto, keep or the height"),
        ((OnADevice(),), {"dataset": "s3dis"}, "OnADevice that is no array for numpy: use .cpu.. first"),
        ((points, colors, "s3dis"), {"classes": ["chairs"]}, "the detector has no class 'chairs' .did you mean chair"),
        ((points, colors, "s3dis"), {"classes": None}, "classes is None; expected is a list of names"),
        ((points, colors, "s3dis"), {"classes": [1]}, r"classes is \[1\]; expected is a list of names"),
        ((b"room.ply",), {}, "points are b'room.ply'; expected are numbers, or the path of a file as a str or a Path"),
        ((points, "red"), {}, "colors are 'red'; expected are numbers"),
        ((points, colors, "s3dis"), {"tile": 1}, "tile is 1; expected is auto, off or the sides"),
        ((points, colors, "s3dis"), {"align": "walls"}, "align is 'walls'; expected is one of none, gravity"),
        (("room.ply", colors), {}, "room.ply is a file, which has its own colours"),
        (("nowhere.ply",), {}, "There is no file nowhere.ply"),
        ((".",), {}, "is a folder: give a list of files"),
        ((points, colors, "s3dis"), {"score": 2.0}, "score is 2.0; expected is a number from 0 to 1"),
    ):
        with pytest.raises(InputError, match=sentence):
            # In the tests wrong types already end at the annotations.
            inspect.unwrap(Detector.__call__)(detector, *arguments, **options)


def test_boxes_are_chosen_by_index_slice_and_mask(found: Boxes):
    assert found[0].names == found[:1].names == found.names[:1] and len(found[2:5]) == 3
    assert found[np.array([3, 1])].scores.tolist() == [found.scores[3], found.scores[1]]
    assert_same(found[-1], found[np.arange(len(found)) == len(found) - 1])
    with pytest.raises(IndexError):
        found[len(found)]


def test_wrong_arguments_of_restore_are_errors(tmp_path: Path):
    for name, value, sentence in (
        ("score_threshold", 7.0, "score_threshold is 7.0; expected is a number from 0 to 1"),
        ("iou_threshold", float("nan"), "iou_threshold is nan"),
    ):
        with pytest.raises(InputError, match=sentence):
            h2a2_jax.Detector.restore(tmp_path, **{name: value})


def test_a_missing_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"Detector\('rooms'\) is no detector: use Detector\.from_pretrained"):
        inspect.unwrap(Detector.__init__)(Detector.__new__(Detector), "rooms")
    with pytest.raises(InputError, match="There is no folder"):
        h2a2_jax.Detector.restore(tmp_path / "nowhere")
    with pytest.raises(InputError, match="There is no checkpoint in"):
        h2a2_jax.Detector.restore(tmp_path)
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"is a file; .* h2a2_jax.convert.tr3d`"):
        h2a2_jax.Detector.restore(tmp_path / "model.pth")


def test_files_clouds_and_arrays_give_the_same_boxes(detector: Detector, tmp_path: Path):
    np.savez(tmp_path / "small.npz", points=SMALL.points, colors=SMALL.colors)
    path = tmp_path / "small.npz"
    cloud = h2a2_jax.read_point_cloud(path)

    class OfOpen3D:
        points, colors = SMALL.points.astype(np.float64), SMALL.colors.astype(np.float64)

    expected = detector(SMALL.points, SMALL.colors, "s3dis")
    of_file, of_text, of_cloud, of_open3d = detector([path, str(path), cloud, OfOpen3D()], dataset="s3dis")
    for boxes in (of_file, of_text, of_cloud, of_open3d):
        assert_same(boxes, expected)
    assert of_file.file == str(path) and of_file.scan.name == "small" and of_cloud.file is None
    assert (np.diff(expected.scores) <= 0).all()


def test_the_head_is_that_of_what_a_scan_shows(detector: Detector):
    rng = np.random.default_rng(0)
    angle, up = rng.uniform(1.1, 2.0, 6000), rng.uniform(-0.35, 0.3, 6000)
    depth = np.minimum(3 / np.sin(angle), 1.2 / np.maximum(-np.tan(up), 1e-3))[:, None]
    view = depth * np.stack([np.cos(angle), np.sin(angle), np.tan(up)], axis=1)
    for points, dataset, others in ((view, "sunrgbd", "s3dis"), (SMALL.points, "s3dis", "sunrgbd")):
        boxes = detector(points)
        assert boxes.dataset == dataset
        (remark,) = [remark for remark in boxes.remarks if "(head of" in remark]
        assert f"(head of {dataset}); " in remark and f"dataset='{others}' chooses another" in remark
    assert not [r for r in detector(SMALL.points, SMALL.colors, "s3dis").remarks if "head of" in r]


def test_boxes_of_chosen_classes_and_one_for_each_object(detector: Detector):
    every = detector(SMALL.points, SMALL.colors, "s3dis")
    first, second, *others = every.counts
    assert others
    chosen = detector(SMALL.points, SMALL.colors, "s3dis", classes=[first.upper(), second])
    assert set(chosen.names) == {first, second}
    assert_same(chosen, every.of_class(first, second))
    single = detector(SMALL.points, SMALL.colors, "s3dis", agnostic_nms=True)
    assert 0 < len(single) < len(every)
    assert single.scores[0] == every.scores[0]


def test_a_large_scan_is_predicted_in_tiles_and_keeps_the_boxes_of_its_rooms(detector: Detector):
    rooms = [SMALL.points + np.float32([6.4 * i, 0, 0]) for i in range(3)]
    colors = np.concatenate([SMALL.colors] * 3)
    alone = detector(rooms, [SMALL.colors] * 3, "s3dis", floor="keep")
    tiled = detector(np.concatenate(rooms), colors, "s3dis", tile=6.0, floor="keep")
    # Points of one room are drawn as often as the protocol of s3dis says, those of a tile are all taken once: the best
    # boxes are found again.
    for boxes, shift in zip(alone, (0, 6.4, 12.8), strict=True):
        near = tiled[np.abs(tiled.centers[:, 0] - shift - 0.6) < 3]
        assert abs(len(near) - len(boxes)) < 0.2 * len(boxes)
    assert len(tiled.scan.points) == 1500 and tiled.rows is None
