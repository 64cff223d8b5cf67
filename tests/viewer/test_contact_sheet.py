"""The picture of scans: what lies where, and over what."""

import matplotlib.image
import numpy as np

from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import S3DIS
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.viewer.contact_sheet import _free_place, _oblique, _raster, draw_contact_sheet


def test_the_oblique_view_is_a_rotation_from_above_and_before():
    view = _oblique()
    np.testing.assert_allclose(view @ view.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(view) > 0
    right, up, towards = view
    assert right[2] == 0 and up[2] > 0.5 and towards[1] < 0 < towards[2]


def test_near_points_cover_far_ones():
    points = np.array([[0.0, 0, 1], [0, 0, 2], [0, 0, 0]])
    colors = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    picture, _ = _raster(points, colors, (-1.0, 1.0, -1.0, 1.0), 20)
    assert picture[10, 10].tolist() == [0, 255, 0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 2  # the background is the other


def test_names_do_not_cover_each_other():
    placed = []
    for _ in range(5):
        _free_place(1.0, 1.0, placed, side=10.0)
    heights = sorted(y for _, y in placed)
    assert min(np.diff(heights)) > 0.9 * 10 / 32


def test_more_scans_than_fit_and_scans_without_colours_or_boxes(tmp_path):
    room = SyntheticSource(S3DIS, "train", 1, scale="demo")[0]
    grey = np.full((30, 3), 0.5, np.float32)
    bare = Scan("bare", grey, grey, np.zeros((0, 7), np.float32), np.zeros(0, np.int32))

    class Rooms:
        names = tuple(f"room{i}" for i in range(20))

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return bare if index else room

    usable = [("train", name) for name in Rooms.names]
    draw_contact_sheet({"train": Rooms()}, usable, S3DIS, tmp_path / "sheet.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "sheet.png").shape
    assert width > 2000 and 1.2 < width / height < 1.6  # six panels in a row, four rows
