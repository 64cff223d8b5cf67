"""`Boxes` are numbers in the frame of the input, best first, and become whatever file or table people work with."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import h2a2_jax
from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.errors import InputError
from h2a2_jax.inference.box_table import CSV_COLUMNS
from h2a2_jax.inference.exports import EXPORTS
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.results import read_predicted_scans
from h2a2_jax.scans.formats.ply import read_ply_columns
from h2a2_jax.scans.frame import UNITS, UPRIGHT
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import SUNRGBD, own_spec

BOXES = np.array([[0, 0, 0, 2, 1, 1, 0.5], [0.5, 0.2, 0.3, 1, 1.5, 2, -0.2], [3, 3, 1, 1, 1, 1, 3]], np.float32)
FOUND = Detections(BOXES, np.array([0.4, 0.9, 0.4], np.float32), np.array([3, 1, 3], np.int32))
POINTS = np.random.default_rng(0).uniform(-2, 4, (300, 3)).astype(np.float32)
SCAN = Scan("room", POINTS, np.full(POINTS.shape, 0.2, np.float32), BOXES[:0], FOUND.labels[:0], notes={"odd": 2})
ORDER = [1, 0, 2]
TILT = np.array([[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])


def to_scan(up: str = "z", unit: str = "m", turn: np.ndarray | None = None, shift=(7, -3, 1)) -> np.ndarray:
    matrix = np.eye(4)
    cos, sin = np.cos(0.4), np.sin(0.4)
    yaw = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    matrix[:3, :3] = (yaw if turn is None else turn) @ np.array(UPRIGHT[up]) * UNITS[unit]
    matrix[:3, 3] = shift
    return matrix


FRAMES = {
    "plain": to_scan(),
    "y in mm": to_scan("y", "mm"),
    "-x in ft": to_scan("-x", "ft"),
    "on a map": to_scan(shift=(-512_000, -5_403_000, 0)),
    "tilted": to_scan("y", "cm", TILT),
}


@pytest.fixture
def boxes() -> Boxes:
    return Boxes.of(FOUND, SCAN, np.eye(4), SUNRGBD, file=Path("below/room.ply"), remarks=("has a floor",))


@pytest.mark.parametrize("matrix", FRAMES.values(), ids=FRAMES)
def test_corners_in_the_input_lead_to_those_in_the_scan_and_back(matrix: np.ndarray):
    boxes = Boxes.of(FOUND, SCAN, matrix, SUNRGBD)
    expected = box_corners(BOXES[ORDER])
    moved = boxes.corners @ matrix[:3, :3].T + matrix[:3, 3]
    # Sizes run along the axes of the input, so that a corner may have another number.
    distances = np.linalg.norm(moved[:, :, None] - expected[:, None], axis=-1)
    assert distances.min(axis=1).max() < 1e-6 and distances.min(axis=2).max() < 1e-6
    np.testing.assert_allclose(boxes.detections.boxes[:, :6], BOXES[ORDER][:, :6], atol=1e-6)
    np.testing.assert_allclose(np.cos(boxes.detections.boxes[:, 6] - BOXES[ORDER][:, 6]), 1, atol=1e-9)
    metres = UNITS[boxes.unit]
    np.testing.assert_allclose(boxes.volumes * metres**3, BOXES[ORDER, 3:6].prod(axis=1), rtol=1e-5)
    np.testing.assert_allclose(boxes.footprints * metres**2, BOXES[ORDER, 3:5].prod(axis=1), rtol=1e-5)
    np.testing.assert_allclose(boxes.dimensions * metres, [[1.5, 1, 2], [2, 1, 1], [1, 1, 1]], rtol=1e-5)
    _, _, y, z = boxes.quaternions.T
    np.testing.assert_allclose(1 - 2 * (y * y + z * z), boxes.rotations[:, 0, 0], atol=1e-9)
    (scan,) = read_predicted_scans(json.loads(boxes.to_json()))
    np.testing.assert_allclose(scan.corners * metres, boxes.corners * metres, atol=1e-5)


def test_best_first_of_equal_scores_in_order(boxes: Boxes):
    assert boxes.scores.tolist() == FOUND.scores[ORDER].tolist() and boxes.names == ("table", "chair", "chair")
    np.testing.assert_array_equal(boxes.centers, BOXES[ORDER, :3])
    assert boxes.class_names == SUNRGBD.classes and boxes.dataset == "sunrgbd" and boxes.file == "below/room.ply"
    assert boxes.notes == {"odd": 2} and boxes.counts == {"chair": 2, "table": 1}


def test_boxes_are_chosen_by_class_and_score(boxes: Boxes):
    assert boxes.of_class("Chair").names == ("chair", "chair") and len(boxes.of_class("night stand")) == 0
    assert (
        len(boxes.of_class("chair", "table")) == 3 and len(boxes.of_score(0.4)) == 3 and len(boxes.of_score(0.5)) == 1
    )
    one = boxes[2]
    assert one.scan is SCAN and one.remarks == boxes.remarks and one.file == boxes.file
    with pytest.raises(InputError, match=r"sunrgbd has no class 'chiar' \(did you mean chair\?\); it has bed, table"):
        boxes.of_class("chiar")
    with pytest.raises(InputError, match="No class is chosen"):
        boxes.of_class()


def test_overlapping_boxes_of_other_classes_are_suppressed():
    near = np.array([[0, 0, 0, 1, 1, 1, 0], [0.05, 0, 0, 1, 1, 1, 0], [3, 0, 0, 1, 1, 1, 0]], np.float32)
    boxes = Boxes.of(Detections(near, FOUND.scores, FOUND.labels), SCAN, FRAMES["on a map"], SUNRGBD)
    assert boxes.suppress_across_classes().scores.tolist() == boxes.scores[[0, 2]].tolist()
    assert len(boxes.suppress_across_classes(0.99)) == 3


def test_boxes_of_arrays():
    columns = BOXES[:, :3], BOXES[:, 3:6], BOXES[:, 6], FOUND.scores, FOUND.labels
    boxes = h2a2_jax.Boxes(*columns, ("chair", "table", "chair"), up="y", unit="cm")
    assert boxes.class_names == ("class 0", "table", "class 2", "chair")
    np.testing.assert_allclose(boxes.detections.boxes[0], [0, 0, 0, 0.02, 0.01, 0.01, 0.5], atol=1e-9)
    far = h2a2_jax.Boxes(BOXES[:, :3] + [5e5, 0, 0], *columns[1:], ("chair", "table", "chair"))
    np.testing.assert_allclose(far.detections.boxes[:, :3] - far.detections.boxes[0, :3], BOXES[:, :3], atol=1e-5)
    for wrong, sentence in (
        ({"names": ("chair",)}, "are 3, 3, 3, 3, 3, 1; expected are as many"),
        ({"up": "w"}, "'w' up in 'm'; expected is one of z, -z"),
        ({"class_names": ("a", "b")}, "The labels are 1 to 3; expected are 0 to 1"),
        ({"labels": -FOUND.labels}, "A label is -3"),
    ):
        with pytest.raises(InputError, match=sentence):
            replace(far, **{"class_names": (), **wrong})


def test_a_data_frame_has_the_columns_of_the_table_volume_and_footprint(boxes: Boxes, tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    frame = boxes.to_dataframe()
    assert tuple(frame.columns) == (*CSV_COLUMNS, "volume", "footprint")
    written = pandas.read_csv(boxes.save(tmp_path / "boxes.csv"))
    pandas.testing.assert_frame_equal(frame[list(CSV_COLUMNS)], written, check_dtype=False, atol=1e-6)
    assert len(boxes[:0].to_dataframe()) == 0


def test_without_pandas_one_sentence(boxes: Boxes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r'pip install "h2a2_jax\[table\]"'):
        boxes.to_dataframe()


def test_each_suffix_is_a_format(boxes: Boxes, tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    for suffix in ("csv", "json", "ply", "html", "PNG", "glb"):
        assert boxes.save(folder / f"a.{suffix}").stat().st_size > 100
    assert sorted(path.name for path in folder.iterdir()) == [
        f"a.{s}" for s in ("PNG", "csv", "glb", "html", "json", "ply")
    ]
    assert json.loads((folder / "a.json").read_text()) == boxes.to_dict()
    assert boxes.to_dict()["scans"][0]["remarks"] == ["has a floor"] and boxes.to_dict()["dataset"] == "sunrgbd"
    assert len(read_ply_columns(folder / "a.ply")["x"]) == 3 * 96 and b"room.ply" in (folder / "a.html").read_bytes()
    boxes[:1].save(folder / "a.csv")  # over the one that is there
    assert len((folder / "a.csv").read_text().splitlines()) == 2
    known = ", ".join(f".{kind}" for kind in ("csv", "json", "ply", "html", "png", *EXPORTS))
    for wrong in ("a.xlsx", "a"):
        with pytest.raises(InputError, match=f"boxes are saved as one of {known}"):
            boxes.save(tmp_path / wrong)


def test_the_points_with_the_numbers_of_the_boxes(boxes: Boxes, tmp_path: Path):
    rows = np.arange(300)[::-1].copy()
    columns = read_ply_columns(replace(boxes, rows=rows).save_points(tmp_path / "points.ply"))
    assert (columns["index"] == rows).all() and set(np.unique(columns["instance"])) <= {-1, 0, 1, 2}
    assert (columns["instance"] == 0).sum() == (columns["label"] == 1).sum() > 0
    with pytest.raises(InputError, match="no points to save"):
        replace(boxes, scan=Boxes.scan).save_points(tmp_path / "none.ply")


def test_a_picture_needs_no_display(boxes: Boxes):
    picture = boxes.plot("top", size=(500, 300))
    assert isinstance(picture, Image.Image) and picture.size == (500, 300)
    assert (np.ptp(np.asarray(picture).astype(int), axis=2) > 100).any()  # boxes in colour over grey points


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems always have a display")
def test_a_window_needs_a_display(boxes: Boxes, monkeypatch: pytest.MonkeyPatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="A window needs a display"):
        boxes.show()


def test_a_notebook_shows_the_viewer_apart_from_itself(boxes: Boxes):
    spec = own_spec("own", ('"><script>alert(1)</script>', "b", "c", "d"))
    hostile = Boxes.of(FOUND, SCAN, np.eye(4), spec)
    frame = hostile._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts"' in frame
    assert "<script>" not in frame and frame.count("<") == 2 and len(frame) < 600_000
    table = replace(hostile, scan=Boxes.scan)._repr_html_()
    assert "<script>" not in table and table.count("<tr>") == 4 and "0.90" in table
    many = replace(boxes, scan=Boxes.scan)[np.zeros(25, int)]
    assert "and 5 more" in many._repr_html_()


def test_a_short_name(boxes: Boxes):
    assert repr(boxes) == "Boxes(3: 2 chair, 1 table; best table 0.90)" and repr(boxes[:0]) == "Boxes(0)"
    many = Boxes.of(
        Detections(np.repeat(BOXES[:1], 6, 0), np.linspace(0, 1, 6, dtype=np.float32), np.arange(6, dtype=np.int32)),
        *(SCAN, np.eye(4), SUNRGBD),
    )
    assert repr(many) == "Boxes(6: 1 desk, 1 toilet, 1 chair, 1 sofa, ...; best desk 1.00)"
