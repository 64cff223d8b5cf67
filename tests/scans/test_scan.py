import dataclasses

import numpy as np

from h2a2_jax.scans.scan import Scan, ScanError, load_or_skip, points_in_box, validate_scan


def make_scan(points=((0.0, 0.0, 0.0),), boxes=((0, 0, 0, 1, 1, 1, 0),), labels=(0,)):
    points = np.array(points, np.float32).reshape(-1, 3)
    return Scan(
        "room",
        points,
        np.full_like(points, 0.5),
        np.array(boxes, np.float32).reshape(-1, 7),
        np.array(labels, np.int32),
    )


class Rooms:
    names = ("a", "b", "c")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise ScanError("b", "Scan b is cut off.")
        return dataclasses.replace(make_scan(), name=self.names[index])


def test_unusable_scans_are_skipped_and_named():
    skipped = {}
    assert [scan.name for scan in load_or_skip(Rooms(), skipped)] == ["a", "c"]
    assert skipped == {"b": "Scan b is cut off."}


def test_scans_are_loaded_in_the_order_asked_for():
    assert [scan.name for scan in load_or_skip(Rooms(), {}, [2, 0, 2])] == ["c", "a", "c"]


def test_points_in_box_that_turns_counter_clockwise():
    box = np.array([1, 2, 0, 4, 1, 1, np.pi / 4], np.float32)
    along = np.array([np.cos(np.pi / 4), np.sin(np.pi / 4), 0])
    points = box[:3] + np.array([1.9, 2.1, -1.9])[:, None] * along
    across = box[:3] + 1.9 * np.array([1, -1, 0]) / np.sqrt(2)
    inside = points_in_box(np.vstack([points, across]).astype(np.float32), box)
    assert inside.tolist() == [True, False, True, False]


def test_a_good_scan_has_no_problem():
    assert validate_scan(make_scan(), num_classes=1) == []
    assert validate_scan(make_scan(boxes=(), labels=())) == []


def test_problems_are_named():
    def has(scan, words):
        return any(words in problem for problem in validate_scan(scan, num_classes=3))

    assert has(make_scan(points=()), "no points")
    assert has(make_scan(points=((np.nan, 0, 0),)), "coordinates are NaN")
    assert has(make_scan(boxes=((0, 0, 0, 1, 0, 1, 0),)), "not positive")
    assert has(make_scan(boxes=((0, 0, np.inf, 1, 1, 1, 0),)), "boxes are NaN")
    assert has(make_scan(labels=(3,)), "labels are outside")
    assert has(make_scan(labels=(-2,)), "labels are outside")
    assert not has(make_scan(labels=(-1,)), "labels are outside")
    dark = make_scan()
    assert has(dataclasses.replace(dark, colors=dark.colors - 1), "outside 0-1")
