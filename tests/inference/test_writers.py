"""Points carry the class and number of the box they are in; frames of boxes lie along its edges; files are whole."""

import json

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.inference.input_files import FORMATS
from h2a2_jax.inference.results import scan_entry
from h2a2_jax.inference.writers import (
    check_output,
    point_labels,
    write_box_frames,
    write_points,
    write_scan,
    write_table,
)
from h2a2_jax.scans.formats.ply import read_ply_columns
from h2a2_jax.scans.scan import Scan, points_in_box
from h2a2_jax.scans.specs import SUNRGBD
from h2a2_jax.viewer.content import class_color

BOXES = np.array([[0, 0, 0, 2, 1, 1, 0.5], [0.5, 0.2, 0.3, 1, 1, 2, -0.2], [9, 9, 9, 1, 1, 1, 0]], np.float32)
FOUND = Detections(BOXES, np.array([0.4, 0.9, 0.5], np.float32), np.array([3, 1, 0], np.int32))
NONE = Detections(BOXES[:0], FOUND.scores[:0], FOUND.labels[:0])
POINTS = np.random.default_rng(0).uniform(-2, 2, (3000, 3)).astype(np.float32)
SCAN = Scan("a", POINTS, np.full(POINTS.shape, 0.2, np.float32), BOXES[:0], FOUND.labels[:0])
MATRIX = np.array([[0.001, 0, 0, 5], [0, 0, -0.001, 1], [0, 0.001, 0, 0], [0, 0, 0, 1]])  # y up, in mm


def test_a_point_belongs_to_the_best_box_that_holds_it():
    labels, instances, scores = point_labels(POINTS, FOUND)
    first, second = points_in_box(POINTS, BOXES[0]), points_in_box(POINTS, BOXES[1])
    assert (first & second).any() and (first & ~second).any()
    np.testing.assert_array_equal(instances, np.where(second, 1, np.where(first, 0, -1)))
    np.testing.assert_array_equal(labels, np.where(second, 1, np.where(first, 3, -1)))
    np.testing.assert_allclose(scores, np.where(second, 0.9, np.where(first, 0.4, 0)), atol=1e-6)
    assert (point_labels(POINTS, NONE)[1] == -1).all() and not len(point_labels(POINTS[:0], FOUND)[0])


@pytest.mark.parametrize("found", [FOUND, NONE], ids=["boxes", "none"])
def test_points_and_frames_in_the_frame_of_the_file(tmp_path, found):
    write_points(tmp_path / "points.ply", SCAN, MATRIX, found)
    columns = read_ply_columns(tmp_path / "points.ply")
    places = np.stack([columns[axis] for axis in "xyz"], axis=1)
    np.testing.assert_allclose(places @ MATRIX[:3, :3].T + MATRIX[:3, 3], POINTS, atol=1e-5)
    assert (columns["red"] == 51).all() and columns["x"].dtype == np.float32
    np.testing.assert_array_equal(columns["instance"], point_labels(POINTS, found)[1])
    write_box_frames(tmp_path / "boxes.ply", MATRIX, found)
    columns = read_ply_columns(tmp_path / "boxes.ply")
    places = np.stack([columns[axis] for axis in "xyz"], axis=1) @ MATRIX[:3, :3].T + MATRIX[:3, 3]
    bars = places.reshape(len(found), 12 * 8, 3)
    for i, corners in enumerate(box_corners(found.boxes)):
        # The bars' ends lie around the corners, half a bar beyond.
        np.testing.assert_allclose(bars[i].min(0), corners.min(0), atol=0.011)
        np.testing.assert_allclose(bars[i].max(0), corners.max(0), atol=0.011)
        assert columns["green"][96 * i] == round(255 * class_color(int(found.labels[i]))[1])


def test_other_programs_read_the_frames(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    write_box_frames(tmp_path / "boxes.ply", MATRIX, FOUND)
    content = plyfile.PlyData.read(tmp_path / "boxes.ply")
    faces = np.stack(content["face"]["vertex_indices"])
    vertices = np.stack([content["vertex"][axis] for axis in "xyz"], axis=1)
    assert faces.shape == (3 * 12 * 12, 3) and faces.max() == len(vertices) - 1
    # A closed surface that is seen from outside has the volume of its bars, in cubic millimetres.
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    volume = np.einsum("ni,ni->", np.cross(a, b), c) / 6
    edges = 4 * (BOXES[:, 3:6].sum() + 3 * 3 * 0.012)
    assert volume == pytest.approx(1e9 * 0.012**2 * edges, rel=2e-2)


def test_page_picture_and_table(tmp_path):
    entry = scan_entry("below/a.b", MATRIX, FOUND, SUNRGBD)
    write_scan(tmp_path, ("json", "ply", "html", "png"), entry, SCAN, MATRIX, FOUND, SUNRGBD)
    ends = (".html", ".json", ".png", "_boxes.ply", "_points.ply")
    assert {path.name for path in (tmp_path / "below").iterdir()} == {f"a.b{end}" for end in ends}
    assert json.loads((tmp_path / "below" / "a.b.json").read_text())["scans"] == [entry]
    write_table(tmp_path / "boxes.csv", [entry], SUNRGBD)
    check_output(tmp_path, ["below/a.b"], FORMATS)  # all may be written again
    assert "Numbers on this page are in metres" in (tmp_path / "below" / "a.b.html").read_text()  # the file's are not
    lines = (tmp_path / "boxes.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith("below/a.b,,chair,3,0.4,") and ",1,y,mm," in lines[1]
