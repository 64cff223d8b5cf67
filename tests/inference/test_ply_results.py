"""Points carry the class and number of the box they are in, and their index; frames of boxes lie along their edges."""

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.inference import ply_results
from h2a2_jax.inference.ply_results import point_labels, write_box_frames, write_points
from h2a2_jax.scans.formats.ply import read_ply_columns
from h2a2_jax.scans.scan import Scan, points_in_box
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
    assert columns["index"].dtype == np.uint32 and (columns["index"] == np.arange(len(POINTS))).all()
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


@pytest.mark.parametrize("extent", [(40, 3, 2), (3, 900, 2), (0, 0, 0), (300, 300, 2)])
def test_every_point_of_many_boxes_is_marked_chunk_by_chunk(tmp_path, monkeypatch, extent):
    rng = np.random.default_rng(1)
    points = (rng.uniform(-0.5, 0.5, (5000, 3)) * extent).astype(np.float32)
    boxes = rng.uniform([-0.6, -0.6, -0.5, 0, 0, 0, -3], [0.6, 0.6, 0.5, 3, 3, 3, 3], (60, 7)).astype(np.float32)
    boxes[:, :3] *= np.maximum(extent, 0.1)
    boxes[:5, 3:5] *= 30  # larger than the scan
    boxes[5:8, :2] = 1e4  # beyond it
    found = Detections(boxes, rng.random(60).astype(np.float32).round(1), rng.integers(0, 4, 60).astype(np.int32))
    expected = np.full(len(points), -1)
    for i in np.argsort(found.scores, kind="stable"):
        expected[points_in_box(points.astype(np.float64), boxes[i].astype(np.float64))] = i
    monkeypatch.setattr(ply_results, "_CHUNK", 1999)
    np.testing.assert_array_equal(point_labels(points, found)[1], expected)
    rows = rng.permutation(10_000)[: len(points)]
    matrix = np.eye(4)
    matrix[:3, 3] = [-512_000, 3, 0]
    write_points(
        tmp_path / "points.ply", Scan("a", points, points * 0, BOXES[:0], FOUND.labels[:0]), matrix, found, rows
    )
    columns = read_ply_columns(tmp_path / "points.ply")
    assert columns["x"].dtype == np.float64 and (columns["index"] == rows).all()
    np.testing.assert_array_equal(columns["instance"], expected)
    np.testing.assert_allclose(columns["x"] - 512_000, points[:, 0], atol=1e-6)


def test_a_scan_without_points_is_an_empty_cloud(tmp_path):
    write_points(tmp_path / "points.ply", Scan("a", POINTS[:0], POINTS[:0], BOXES[:0], FOUND.labels[:0]), MATRIX, FOUND)
    assert len(read_ply_columns(tmp_path / "points.ply")["x"]) == 0
