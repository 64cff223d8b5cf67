"""The sheet of scans: which are chosen, and how their pictures lie."""

import matplotlib.image
import numpy as np

from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import S3DIS
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.viewer.contact_sheet import draw_contact_sheet


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


def test_a_scan_of_two_splits_is_drawn_once(tmp_path):
    room = SyntheticSource(S3DIS, "train", 1, scale="demo")
    draw_contact_sheet(
        {"train": room, "val": room}, [("train", room.names[0]), ("val", room.names[0])], S3DIS, tmp_path / "sheet.png"
    )
    height, width, _ = matplotlib.image.imread(tmp_path / "sheet.png").shape
    assert 1.7 < width / height < 2  # one pair of views
