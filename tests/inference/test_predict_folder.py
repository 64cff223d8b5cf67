"""Prediction of folders of files: boxes move with the scan, and a damaged file is named and stops nothing."""

import csv
import dataclasses
import json
import math
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.inference import input_files
from h2a2_jax.inference.background import WorkBehind, read_ahead
from h2a2_jax.inference.input_files import FoundInputs, PredictRequest, find_inputs
from h2a2_jax.inference.predict_folder import Outcome, _closing, predict_files
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.inference.results import read_predicted_scans
from h2a2_jax.inference.writers import check_output
from h2a2_jax.models import LevelSizes
from h2a2_jax.models.tr3d import TR3DKind
from h2a2_jax.scans.formats.ply import read_ply_columns
from tests.inference.tiny import SPECS, random_detector
from tests.scans.test_damaged import FILES

SCORE = 0.1
BLOCK = 0.64  # m, a voxel of the coarsest level


@pytest.fixture(scope="module")
def predictor():
    """Of random weights, which sees all points of a scan in their order."""
    specs = [dataclasses.replace(spec, test_sampling=None, floor=0.005, faces_y=False) for spec in SPECS]
    predictor = Predictor(random_detector(), specs, score_threshold=SCORE)
    # One shape for all, for compiling takes time.
    predictor.set_bucket_bases({1: LevelSizes(*(2 * size for size in TR3DKind.least))})
    return predictor


def grid_room(seed=0):
    """A floor, a wall and a heap on the middles of voxels, no two in one; colours of bytes."""
    rng = np.random.default_rng(seed)
    floor = rng.integers([0, 0, 0], [150, 130, 1], (900, 3))
    wall = rng.integers([0, 0, 0], [1, 130, 120], (500, 3))
    heap = rng.integers([60, 50, 0], [100, 80, 50], (700, 3))
    voxels = np.unique(np.concatenate([floor, wall, heap]), axis=0)
    rng.shuffle(voxels)
    return (voxels + 0.5) / 100, rng.integers(0, 256, voxels.shape).astype(np.uint8)


POINTS, COLORS = grid_room()


def predict(predictor, folder: Path, output: Path | None = None, said: list[str] | None = None, **request) -> Outcome:
    output = output or folder.with_name(f"{folder.name}_boxes")
    chosen = {"score": SCORE, "formats": ("json",), "dataset": "sunrgbd", "overwrite": True, **request}
    request = PredictRequest((str(folder),), output, **chosen)
    found = find_inputs(request.inputs, output)
    check_output(output, [file.name for file in found.files], request.formats)
    return predict_files(predictor, found, request, output, [].append if said is None else said.append)


def boxes(predictor, folder: Path, points, colors, **request) -> list[np.ndarray]:
    """Corners of the boxes found in a scan, in its file's frame, by descending score."""
    folder.mkdir()
    colors = {} if colors is None else {"colors": colors}
    np.savez(folder / "scan.npz", points=points, **colors)
    outcome = predict(predictor, folder, **request)
    assert not outcome.failed
    (scan,) = read_predicted_scans({"version": 1, "scans": outcome.entries})
    found = scan.detections
    assert len(found) > 10
    order = np.lexsort([found.labels, -found.scores.round(4)])
    return scan.corners[order], found.scores[order], found.labels[order]


@pytest.fixture(scope="module")
def still(predictor, tmp_path_factory):
    """The boxes of the scan as it is."""
    return boxes(predictor, tmp_path_factory.mktemp("still") / "scans", POINTS, COLORS)


def assert_moved(found, still, motion):
    """Check that boxes are the same with their corners moved; the numbering of corners may change."""
    corners, scores, labels = found
    assert sorted(labels.tolist()) == sorted(still[2].tolist())
    np.testing.assert_allclose(scores, still[1], atol=1e-4)
    expected = motion(still[0].reshape(-1, 3)).reshape(-1, 8, 3)
    unit = np.linalg.norm(motion(np.eye(3)[:1]) - motion(np.zeros((1, 3))))
    middles, sizes = expected.mean(1) / unit, (expected.max(1) - expected.min(1)) / unit
    distances = np.abs(middles[:, None] - corners.mean(1) / unit).max(-1)
    distances += np.abs(sizes[:, None] - (corners.max(1) - corners.min(1)) / unit).max(-1)
    assert distances.min(axis=0).max() < 2e-3 and distances.min(axis=1).max() < 2e-3


UP_Y = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, y, z) of the room is (x, z, -y) of the file
MOTIONS = {
    "in millimetres": (lambda p: 1000 * p, {"unit": "mm"}),
    "in centimetres, the unit guessed": (lambda p: 100 * p, {"unit": "auto"}),
    "y up": (lambda p: p @ UP_Y.T, {"up": "y"}),
    "y up in millimetres, the unit guessed": (lambda p: 1000 * p @ UP_Y.T, {"up": "y"}),
    "upside down": (lambda p: p * [1, -1, -1], {"up": "-z"}),
    "moved by whole voxels": (lambda p: p + np.array([3, -5, 1]) * BLOCK, {}),
    "in map coordinates": (lambda p: p + np.array([800_000, 7_600_000, 0]) * BLOCK, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOTIONS)
def test_boxes_move_with_the_scan(predictor, still, tmp_path, kind):
    motion, request = MOTIONS[kind]
    assert_moved(boxes(predictor, tmp_path / "scans", motion(POINTS), COLORS, **request), still, motion)


def test_the_order_of_points_and_copies_of_them_do_not_matter(predictor, still, tmp_path):
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(POINTS)), 3))
    assert_moved(boxes(predictor, tmp_path / "scans", POINTS[order], COLORS[order]), still, np.array)


def test_without_colours_a_scan_is_grey(predictor, still, tmp_path):
    said = []
    grey = boxes(predictor, tmp_path / "grey", POINTS, np.full(POINTS.shape, 0.5))
    assert_moved(boxes(predictor, tmp_path / "none", POINTS, None), grey, np.array)
    predict(predictor, tmp_path / "none", said=said)
    assert any("has no colours and is taken as grey" in sentence for sentence in said)
    assert len(grey[1]) != len(still[1]) or np.abs(grey[1] - still[1]).max() > 1e-3


def test_a_tilted_scan_is_turned_upright_and_its_boxes_back(predictor, tmp_path):
    angle = math.radians(20)
    tilt = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    said, root = [], tmp_path / "scans"
    root.mkdir()
    rng = np.random.default_rng(0)
    sides = [
        rng.uniform([0, 0, 0], [3, 2, 0.001], (1400, 3)),
        rng.uniform([0, 0, 0], [0.001, 2, 2], (900, 3)),
        rng.uniform([0, 2, 0], [3, 2.001, 2], (900, 3)),
    ]
    np.save(root / "a.npy", np.concatenate(sides).astype(np.float32) @ tilt.T.astype(np.float32))
    predict(predictor, root, said=said)
    assert any("looks tilted by 20" in sentence and "add --align=gravity" in sentence for sentence in said)
    for chosen in ({}, {"align": "manhattan"}):  # for axis-aligned boxes, both at once
        said = []
        predict(predictor, root, said=said, dataset="s3dis", **chosen)
        (advice,) = (sentence for sentence in said if "add --align" in sentence)
        assert advice.endswith("looks tilted by 20.0 degrees: add --align=both.")
    outcome = predict(predictor, root, align="both", formats=("json", "csv", "ply"))
    (scan,) = read_predicted_scans(json.loads((tmp_path / "scans_boxes" / "a.json").read_text()))
    up = scan.alignment.T @ [0, 0, 1]
    assert math.degrees(math.acos(up @ tilt @ [0, 0, 1])) < 0.5
    # Every box stands on the tilted floor's normal: its last axis is up.
    edges = scan.corners[:, 4] - scan.corners[:, 0]
    np.testing.assert_allclose(edges / np.linalg.norm(edges, axis=1, keepdims=True), np.tile(up, (len(edges), 1)))
    columns = read_ply_columns(tmp_path / "scans_boxes" / "a_boxes.ply")
    vertices = np.stack([columns[axis] for axis in "xyz"], axis=1).reshape(-1, 96, 3)
    assert len(vertices) == outcome.boxes
    middles = (vertices.max(1) + vertices.min(1)) / 2
    np.testing.assert_allclose(middles, scan.corners.mean(1), atol=1e-4)
    with (tmp_path / "scans_boxes" / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == outcome.boxes and {row["upright"] for row in rows} == {"0"}
    w, x, y, z = (float(rows[0][f"q{axis}"]) for axis in "wxyz")
    turned = [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]
    np.testing.assert_allclose(turned, up, atol=1e-5)


def test_results_are_written_and_may_be_written_again(predictor, tmp_path):
    root, output = tmp_path / "scans", tmp_path / "out"
    (root / "below").mkdir(parents=True)
    output.mkdir()
    (output / "mine.txt").write_text("stays")
    points = POINTS + np.array([500_000, 0, 0])
    np.savez(root / "below" / "a.npz", points=points, colors=COLORS)
    for _ in range(2):  # the second time over its own results
        outcome = predict(predictor, root, output, formats=("json", "csv", "ply"))
    assert not outcome.failed and set(outcome.seconds) >= {"load", "maps", "network", "boxes", "write"}
    written = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert written == [
        ".lock",
        *("below/a.json", "below/a_boxes.ply", "below/a_points.ply"),
        *("boxes.csv", "mine.txt", "predictions.json", "predictions.jsonl"),
    ]
    document = json.loads((output / "predictions.json").read_text())
    assert document == json.loads((output / "below" / "a.json").read_text())
    (scan,) = read_predicted_scans(document)
    assert document["dataset"] == "sunrgbd" and scan.name == "below/a" and scan.file == str(root / "below" / "a.npz")
    columns = read_ply_columns(output / "below" / "a_points.ply")
    places = np.stack([columns[axis] for axis in "xyz"], axis=1)
    np.testing.assert_allclose(places, points, atol=1e-5)
    np.testing.assert_array_equal(np.stack([columns[c] for c in ("red", "green", "blue")], axis=1), COLORS)
    np.testing.assert_array_equal(columns["index"], np.arange(len(points)))
    inside = columns["instance"] >= 0
    assert inside.any()
    np.testing.assert_array_equal(columns["label"][inside], scan.detections.labels[columns["instance"][inside]])
    np.testing.assert_allclose(columns["score"][inside], scan.detections.scores[columns["instance"][inside]], atol=1e-6)
    number = columns["instance"][inside][0]
    corners, place = scan.corners[number], places[inside][0]
    assert (place >= corners.min(0) - 1e-4).all() and (place <= corners.max(0) + 1e-4).all()
    with (output / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["center_x"]) for row in rows] == pytest.approx(scan.detections.boxes[:, 0], abs=1e-5)
    assert {row["scan"] for row in rows} == {"below/a"} and rows[0]["unit"] == "m"


def test_boxes_of_lower_scores_are_on_the_page_alone(predictor, tmp_path):
    root = tmp_path / "scans"
    root.mkdir()
    np.savez(root / "a.npz", points=POINTS, colors=COLORS)
    (entry,) = predict(predictor, root).entries
    scores = sorted(box["score"] for box in entry["boxes"])
    middle = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    for lowest, expected in ((middle, len(scores) - len(scores) // 2), (0.99, 0)):
        said, output = [], tmp_path / f"at{lowest}"
        outcome = predict(predictor, root, output, said, score=lowest, formats=("json", "csv", "ply", "html"))
        assert not outcome.failed and outcome.boxes == expected
        assert len(json.loads((output / "a.json").read_text())["scans"][0]["boxes"]) == expected
        assert read_ply_columns(output / "a_points.ply")["score"].max(initial=0) == 0 or expected
        assert len((output / "boxes.csv").read_text().splitlines()) == expected + 1
        page = (output / "a.html").read_text()
        told = re.search(r'"scores": ?\[([^]]*)\]', page)
        assert told is not None and len(told[1].split(",")) == len(scores)
    none = f"a: no box has a score of 0.99 or more, the best has {scores[-1]:.3f}: --score lowers the bound."
    assert none in said


def bad_files(root: Path) -> list[str]:
    """Everything that is damaged or odd, in one folder; names of the files that cannot be predicted."""
    kinds = {**FILES, "laz": (".laz", b"LASF" + bytes(300), ""), "las": (".las", b"LASF", "")}
    failing = []
    for i, (suffix, content, _) in enumerate(kinds.values()):
        path = root / f"bad{i:02}{suffix}"
        if content is None or suffix in (".xyzw", ".fbx") or (suffix == ".txt" and b"once" in content):
            continue  # no file of points to a search in a folder
        path.write_bytes(content(root.parent / "made") if callable(content) else content)
        failing.append(path.name)
    (root / "self.ply").symlink_to("self.ply")
    (root / "gone.pcd").symlink_to("nowhere")
    (root / "round").symlink_to(root)
    os.mkfifo(root / "pipe.npy")
    np.save(root / "colours.npy", np.concatenate([POINTS, POINTS * 3], axis=1))
    np.save(root / "far.npy", np.concatenate([POINTS, POINTS + 3e4]))
    with open(os.path.join(os.fsencode(root), b"caf\xe9.ply"), "wb") as file:
        file.write(b"no ply")
    failing += ["self.ply", "gone.pcd", "pipe.npy", "colours.npy", "far.npy", "caf?.ply"]
    if os.geteuid():
        np.save(root / "closed.npy", POINTS)
        (root / "closed.npy").chmod(0)
        failing.append("closed.npy")
    return failing


def test_bad_files_stop_nothing_and_are_named(predictor, tmp_path, monkeypatch):
    root, said = tmp_path / "scans", []
    root.mkdir()
    failing = bad_files(root)
    np.save(root / "a_good.npy", POINTS)
    np.save(root / "m_point.npy", POINTS[:1])
    np.save(root / "n_same.npy", np.tile(POINTS[:1], (5000, 1)))
    np.save(root / "o_line.npy", np.stack([np.linspace(0, 3, 500), np.zeros(500), np.zeros(500)], axis=1))
    np.save(root / "p_far.npy", POINTS + 1e6)
    np.save(root / "z_nan.npy", np.concatenate([np.full((9, 3), np.nan), POINTS]))
    monkeypatch.setattr(input_files, "TILED_ABOVE", 1500)
    monkeypatch.setattr(input_files, "available_memory", lambda: 0)  # which thins every file
    outcome = predict(predictor, root, said=said)
    assert len(failing) >= 30
    assert sorted(Path(name).name for name in outcome.failed) == sorted(failing)
    for sentence in outcome.failed.values():
        assert sentence.endswith(".") and "unexpected" not in sentence and "Traceback" not in sentence, sentence
        assert "\n" not in sentence and len(sentence) < 600 and sentence.encode("utf-8")
    told = [sentence.removeprefix("failed: ") for sentence in said if sentence.startswith("failed: ")]
    assert len(told) >= 30
    for name, sentence in outcome.failed.items():
        (named,) = (line for line in told if line.endswith(sentence))
        assert named.startswith(name) and not named.startswith(f"{name}: {name}")
    assert "colours reach" in outcome.failed[str(root / "colours.npy")] and "--colors" in str(outcome.failed)
    good = ["a_good", "m_point", "n_same", "o_line", "p_far", "z_nan"]
    assert [entry["name"] for entry in outcome.entries] == good
    left = {path.name for path in (tmp_path / "scans_boxes").iterdir()}
    assert left == {".lock", "predictions.json", "predictions.jsonl", *(f"{name}.json" for name in good)}
    assert any(" points with NaN or infinite values" in sentence for sentence in said)
    assert any(f"{len(POINTS) - 1500:,} points left out of a large file" in sentence for sentence in said)
    (far,) = (scan for scan in read_predicted_scans({"version": 1, "scans": outcome.entries}) if scan.name == "p_far")
    assert np.abs(far.corners - 1e6).max() < 20


def test_a_correction_is_offered(predictor, tmp_path):
    root, said = tmp_path / "scans", []
    root.mkdir()
    np.save(root / "a.npy", 1000 * POINTS @ UP_Y.T)
    outcome = predict(predictor, root, said=said, up="z", unit="m")
    (sentence,) = outcome.failed.values()
    assert "points beyond 250 m" in sentence and "looks as if the unit is mm" in sentence
    assert "add --unit=mm" in sentence
    np.save(root / "a.npy", POINTS @ UP_Y.T)
    assert not predict(predictor, root, said=said).failed
    assert any(
        "does not show which axis points up" in sentence and "--up=z confirms it" in sentence for sentence in said
    )


def test_a_remark_of_many_scans_is_printed_three_times_and_kept_for_each(predictor, tmp_path):
    root, said = tmp_path / "scans", []
    root.mkdir()
    for i in range(6):
        np.save(root / f"{i}.npy", POINTS + np.array([0, 0, 0.2 + 0.1 * i]))
    outcome = predict(predictor, root, said=said)
    lines = [line for line in said if "has its floor at" in line]
    assert len(lines) == 4 and lines[0].startswith("0: has its floor at 0.2") and lines[2].startswith("2: ")
    assert lines[3].startswith("3 more scans (3, 4, 5), much as 0: has its floor at 0.2")
    kept = [remark for entry in outcome.entries for remark in entry["remarks"] if "has its floor at" in remark]
    assert len(kept) == 6 and kept[5].startswith("has its floor at 0.7")
    assert len(read_predicted_scans({"version": 1, "scans": outcome.entries})) == 6


def test_scans_that_leave_open_what_most_show_are_named():
    shown = [{"name": str(i), "up": "y", "boxes": []} for i in range(3)]
    unshown = {"name": "wall", "boxes": [], "remarks": ["does not show which axis points up (a wall): z is assumed"]}
    (line, *_) = _closing(Outcome(4, [*shown, unshown], elapsed=1.0), Path("out"))
    assert line.startswith("1 scan (wall) taken with up z for want of signs; 3 others show y")
    assert line.endswith("if all files are alike, add --up=y.")
    upright = [{"name": "a", "boxes": []}, unshown]
    assert not any("for want of signs" in line for line in _closing(Outcome(2, upright, elapsed=1.0), Path("out")))


class Stopped(Predictor):
    """A predictor that the user stops at the second scan."""

    planned = 0

    def plan(self, scans, seconds=None):
        self.planned += 1
        if self.planned == 2:
            raise KeyboardInterrupt
        return super().plan(scans, seconds)


def test_results_until_a_stop_are_kept(predictor, tmp_path, monkeypatch):
    root = tmp_path / "scans"
    root.mkdir()
    for name in "abc":
        np.save(root / f"{name}.npy", POINTS)
    monkeypatch.setattr(predictor, "__class__", Stopped)
    outcome = predict(predictor, root)
    assert outcome.interrupted and not outcome.failed
    document = json.loads((tmp_path / "scans_boxes" / "predictions.json").read_text())
    assert [scan["name"] for scan in document["scans"]] == ["a"]
    left = {path.name for path in (tmp_path / "scans_boxes").iterdir()}
    assert left == {".lock", "predictions.json", "predictions.jsonl", "a.json"}
    monkeypatch.undo()
    said = []
    outcome = predict(predictor, root, said=said, overwrite=False)
    assert [entry["name"] for entry in outcome.entries] == ["b", "c"] and outcome.asked == 2
    assert "1 of 3 scans is done already and skipped." in said
    document = json.loads((tmp_path / "scans_boxes" / "predictions.json").read_text())
    assert [scan["name"] for scan in document["scans"]] == ["a", "b", "c"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"cannot be written to .*: choose another folder with --output"):
            check_output(folder, ["a"], ("json",))
    (tmp_path / "a.json").write_text('{"version": 1}')
    with pytest.raises(InputError, match=r"a\.json is there already and is no result of a prediction"):
        check_output(tmp_path, ["a"], ("json",))
    check_output(tmp_path, ["a"], ("csv", "ply", "html"))  # no such file has this name
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "a.png").write_bytes(b"a photograph")
    with pytest.raises(InputError, match=r"a\.png is there already and is no result of a prediction"):
        check_output(tmp_path, ["a"], ("png",))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a display is always there")
def test_without_a_display_boxes_are_written_all_the_same(predictor, tmp_path, monkeypatch):
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    root, said = tmp_path / "scans", []
    root.mkdir()
    np.save(root / "a.npy", POINTS)
    outcome = predict(predictor, root, said=said, show=True)
    assert not outcome.failed and any(sentence.startswith("a: is not shown: ") for sentence in said)


def test_another_dataset(predictor, tmp_path):
    request = PredictRequest(("a",), tmp_path, dataset="scannet")
    with pytest.raises(InputError, match="--dataset is 'scannet'; expected is one of sunrgbd, s3dis, auto"):
        predict_files(predictor, FoundInputs((), {}), request, tmp_path)
    request = PredictRequest(("a",), tmp_path, classes=("chairs",))
    with pytest.raises(InputError, match=r"no class 'chairs' .did you mean chair"):
        predict_files(predictor, FoundInputs((), {}), request, tmp_path)


def test_pages_have_an_index_with_totals_and_failures(predictor, tmp_path):
    root, output = tmp_path / "scans", tmp_path / "out"
    root.mkdir()
    np.save(root / "a.npy", POINTS)
    (root / "bad.ply").write_text("no ply")
    outcome = predict(predictor, root, output, formats=("csv", "html"))
    page = (output / "index.html").read_text()
    assert (output / "thumbnails" / "a.jpg").stat().st_size > 1000 and "a.html" in page
    assert f"{outcome.boxes} boxes" in page and "bad.ply" in page and "thumbnails/a.jpg" in page


def test_a_scan_in_tiles_labels_every_point(predictor, tmp_path):
    root, output = tmp_path / "scans", tmp_path / "out"
    root.mkdir()
    points = np.concatenate([POINTS, np.full((3, 3), np.nan), POINTS + np.array([6.4, 0, 0])])
    np.save(root / "a.npy", points)
    outcome = predict(predictor, root, output, formats=("ply",), tile=6.0)
    columns = read_ply_columns(output / "a_points.ply")
    np.testing.assert_array_equal(columns["index"], np.flatnonzero(np.isfinite(points[:, 0])))
    assert not outcome.failed and outcome.boxes > 10


def test_work_behind_is_done_in_order_and_its_error_is_raised():
    done, release = [], threading.Event()
    with WorkBehind() as behind:
        behind.put(lambda: release.wait(10))
        behind.put(lambda: done.append(1))
        assert not done
        release.set()
        behind.put(lambda: done.append(2))
    assert done == [1, 2]

    def fail():
        raise OSError("full")

    with pytest.raises(OSError, match="full"), WorkBehind() as behind:
        behind.put(fail)
        behind.put(lambda: done.append(3))
    assert done == [1, 2]
    with pytest.raises(KeyError), WorkBehind() as behind:
        behind.put(fail)
        raise KeyError


def test_the_next_is_read_while_one_is_worked_on():
    begun, release = [], threading.Event()

    def load(i):
        begun.append(i)
        if i == 1:
            assert release.wait(10)
        if i == 2:
            raise InputError("two")
        return i

    results = read_ahead([lambda i=i: load(i) for i in range(3)])
    assert next(results).result() == 0
    release.set()  # the second one began while the first is worked on, or this would wait for ever
    assert next(results).result() == 1
    with pytest.raises(InputError, match="two"):
        next(results).result()
    assert begun == [0, 1, 2] and next(results, None) is None
    assert list(read_ahead([])) == []


def test_weights_of_other_shapes_are_refused_before_any_file(tmp_path, monkeypatch):
    from h2a2_jax.inference.predict_folder import predict_inputs
    from tests.pretrained.detectors import stored_detector

    monkeypatch.setenv("H2A2_CACHE", "off")
    np.save(tmp_path / "a.npy", POINTS)
    detector = stored_detector()
    exclusive = dict.fromkeys(detector.parts[0], np.zeros((2, 3), np.float32))
    damaged = dataclasses.replace(detector, parts=(exclusive, *detector.parts[1:]))
    request = PredictRequest((str(tmp_path / "a.npy"),), formats=("json",))
    with pytest.raises(InputError, match="is of another model"):
        predict_inputs(lambda: damaged, request, tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
