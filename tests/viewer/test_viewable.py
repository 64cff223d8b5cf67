"""One object in place of a scan, detections and class names; pages and pictures without a file."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

import h2a2_jax.viewer
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import Scan
from h2a2_jax.viewer import Viewable, draw_image, show, viewer_html, write_image, write_thumbnail, write_viewer
from tests.viewer.scenes import NAMES, found, room, scan_of


@dataclass(frozen=True)
class RoomWithBoxes:
    scan: Scan
    detections: Detections
    class_names: tuple[str, ...] = NAMES


BOXES = RoomWithBoxes(room(), found())


def test_an_object_with_boxes_is_viewable_and_a_scan_is_not():
    assert isinstance(BOXES, Viewable) and not isinstance(BOXES.scan, Viewable)


def test_a_page_is_the_same_from_three_parts_from_one_and_as_text(tmp_path):
    write_viewer(tmp_path / "three.html", BOXES.scan, BOXES.detections, NAMES, score=0.5)
    write_viewer(tmp_path / "one.html", BOXES, score=0.5)
    page = (tmp_path / "one.html").read_bytes()
    assert page == (tmp_path / "three.html").read_bytes() == viewer_html(BOXES, score=0.5).encode()


def test_a_picture_is_the_same_from_three_parts_from_one_and_without_a_file(tmp_path):
    write_image(tmp_path / "three.png", BOXES.scan, BOXES.detections, NAMES, size=(420, 300))
    write_image(tmp_path / "one.png", BOXES, size=(420, 300))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "three.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(draw_image(BOXES, size=(420, 300))))


def test_a_scan_alone_is_enough(tmp_path):
    assert '"boxes": []' in viewer_html(room(50), still=False)
    write_image(tmp_path / "scan.png", room(50), size=(420, 300))


@pytest.mark.parametrize("beside", [(found(), ()), (None, NAMES)])
def test_boxes_beside_an_object_that_has_its_own_are_refused(beside):
    with pytest.raises(InputError, match="A RoomWithBoxes has boxes and class names of its own"):
        viewer_html(BOXES, *beside)


def test_a_window_takes_the_object(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(InputError, match=r'pip install "h2a2_jax\[visual\]"'):
        show(BOXES)


@pytest.mark.parametrize("scan", [room(30_000), scan_of([]), scan_of([1, 2, 3])])
def test_thumbnails_are_small_pictures_of_the_size_asked_for(tmp_path, scan):
    write_thumbnail(tmp_path / "scan.jpg", scan, size=(160, 110))
    with Image.open(tmp_path / "scan.jpg") as picture:
        assert picture.size == (160, 110) and picture.format == "JPEG"
    assert (tmp_path / "scan.jpg").stat().st_size < 20_000


def test_a_thumbnail_shows_boxes_from_the_score_on_and_no_ceiling(tmp_path):
    def drawn(scan, **options):
        file = tmp_path / "scan.jpg"
        write_thumbnail(file, RoomWithBoxes(scan, BOXES.detections), **options)
        with Image.open(file) as picture:
            return np.asarray(picture, float)

    scan = room(6000)
    scan.colors[:] = [0, 0, 1]
    none, some, every = (drawn(scan, score=score) for score in (1.1, 0.5, 0.0))
    assert 0 < np.abs(some - none).sum() < np.abs(every - none).sum()
    scan.points[::3, 2] = 2.6
    scan.colors[::3] = [0, 1, 0]
    picture = drawn(scan, score=1.1)
    assert not (picture[..., 1] > picture[..., 2] + 60).any()


def test_names_of_the_viewer_are_found_on_demand():
    code = (
        "import sys, h2a2_jax.viewer as v; assert 'PIL' not in sys.modules; v.write_image; assert 'PIL' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in h2a2_jax.viewer.__all__:
        assert getattr(h2a2_jax.viewer, name).__name__ == name
    with pytest.raises(AttributeError, match=r"'h2a2_jax\.viewer' has no attribute 'write_film'"):
        _ = h2a2_jax.viewer.write_film
