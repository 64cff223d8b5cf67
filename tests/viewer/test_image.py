"""Pictures without a display."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from h2a2_jax.boxes.codec import BOX_EDGES, box_corners
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.viewer.content import class_color, make_content, view_limits
from h2a2_jax.viewer.image import _HEADER, _LEGEND, _MARGIN, draw, write_image
from h2a2_jax.viewer.render import camera_for
from tests.viewer.scenes import BOXES, NAMES, found, room, scan_of

SIZE = (700, 500)


def drawn(shown, **options):
    return np.asarray(draw(shown, size=SIZE, **options), float) / 255


def on_picture(shown, places, view):
    """Pixels of the file at which places lie."""
    width, height = SIZE[0] - _LEGEND - 2 * _MARGIN, SIZE[1] - _HEADER - _MARGIN
    pixels, _ = camera_for(*view_limits(shown), view, width, height).project(places)
    return np.floor(pixels + np.array([_MARGIN, _HEADER])).astype(int)


def has_color(picture, pixels, label):
    """Mask of the places with the colour of a class in the pixels around them."""
    wanted = np.array(class_color(label))
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    near = np.stack([picture[pixels[:, 1] + j, pixels[:, 0] + i] for i, j in around])
    return (np.abs(near - wanted).max(axis=2) < 0.1).any(axis=0)


@pytest.mark.parametrize("view", ["oblique", "top"])
def test_edges_of_boxes_are_where_they_belong(view):
    shown = make_content(scan_of(np.zeros((0, 3))), found(), NAMES, None, 100)
    picture = drawn(shown, view=view, score=0.0)
    for box, label in zip(BOXES, range(3), strict=True):
        corners = box_corners(box[None])[0]
        bottom = [edge for edge in BOX_EDGES if max(edge) < 4]
        middles = np.stack([(corners[a] + corners[b]) / 2 for a, b in bottom])
        assert has_color(picture, on_picture(shown, middles, view), label).sum() >= 3  # one may lie under a name


def test_low_scores_are_not_drawn():
    shown = make_content(scan_of(np.zeros((0, 3))), found(), NAMES, None, 100)
    picture = drawn(shown, score=0.5)
    corners = box_corners(BOXES[2:])[0]
    assert not has_color(picture, on_picture(shown, corners, "oblique"), 2).any()


def test_the_ceiling_is_cut_off():
    scan = room(6000)
    scan.points[::3, 2] = 2.6
    scan.colors[::3] = [1, 0, 0]
    scan.colors[1::3] = scan.colors[2::3] = [0, 0, 1]
    picture = drawn(make_content(scan, None, NAMES, None, 10_000), view="top")
    red = (picture[..., 0] > 0.5) & (picture[..., 2] < 0.3)
    blue = (picture[..., 2] > 0.5) & (picture[..., 0] < 0.3)
    assert not red.any() and blue.sum() > 5000


def test_truth_is_beside_or_over_the_detections():
    truth = GroundTruth(BOXES[1:2], np.array([1], np.int32))
    shown = make_content(room(), found(), NAMES, truth, 10_000)
    alone = drawn(replace(shown, truth=None))
    over, beside = drawn(shown), drawn(shown, beside=True)
    inside = np.s_[_HEADER:, : SIZE[0] - _LEGEND]
    assert (over[inside] != alone[inside]).any() and (beside[inside] != over[inside]).any()


def test_files_have_the_size_asked_for(tmp_path):
    for i, scan in enumerate((room(), scan_of([]), scan_of([1, 2, 3]))):
        for view in ("oblique", "top"):
            path = tmp_path / f"{i}_{view}.png"
            write_image(path, scan, found() if i else None, NAMES, view=view, size=(420, 300), title="long " * 40)
            with Image.open(path) as picture:
                assert picture.size == (420, 300) and picture.format == "PNG"
