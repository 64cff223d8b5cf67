"""The up axis is named by signs that agree, in every orientation, never by one plane; the unit by the size of rooms."""

import numpy as np
import pytest

from h2a2_jax.scans.file_frame import decide_frame, guess_unit
from h2a2_jax.scans.formats.point_cloud import PointCloud, read_point_cloud
from h2a2_jax.scans.frame import UPRIGHT
from h2a2_jax.scans.orientation import AXES, SIGNS, UpVotes, guess_up, up_votes
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD
from h2a2_jax.scans.surfaces import extents
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource


def turned(points, up, axis):
    """Points whose axis `up` points up, in a frame where `axis` does."""
    return points.astype(np.float64) @ np.array(UPRIGHT[up], float).T @ np.array(UPRIGHT[axis], float)


def named(points, declared="z"):
    return guess_up(declared, [up_votes(points)])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("spec", "scale"), [(SCANNET, "demo"), (SCANNET, "full"), (SUNRGBD, "demo"), (SUNRGBD, "full"), (S3DIS, "full")]
)
def test_up_is_found_in_every_orientation(spec, scale, axis):
    scan = SyntheticSource(spec, "val", 3, scale=scale, seed=3)[2 if scale == "full" else 1]
    guess = named(turned(scan.points, "z", axis))
    assert guess.guess == axis and guess.differs == (axis != "z")
    assert set(guess.evidence.replace(" and ", ", ").split(", ")) <= set(SIGNS)


def test_a_scan_that_stands_gets_no_advice():
    for spec in (SCANNET, SUNRGBD, S3DIS):
        source = SyntheticSource(spec, "train", 6, scale="demo", seed=1)
        for i in range(6):
            assert not named(source[i].points).differs


@pytest.mark.parametrize(
    ("file", "up"),
    [
        ("scene0000_00.bin", "z"),
        ("000017.bin", "z"),
        ("pcl_room_scan1.pcd", "z"),
        ("pcl_capture0001.pcd", "-y"),
        ("pcl_region_growing_rgb.pcd", "-y"),
        ("o3d_fragment.pcd", "-y"),
    ],
)
def test_real_scans_are_never_named_wrongly(scans_dir, file, up):
    points = read_point_cloud(scans_dir / file).points
    guess = named(points)
    assert guess.guess in (up, None)
    if file not in ("o3d_fragment.pcd", "pcl_room_scan1.pcd"):  # a wall alone; a room behind doors
        assert guess.guess == up
    if up == "z":
        assert all(named(turned(points, "z", axis)).guess in (axis, None) for axis in AXES)


@pytest.mark.parametrize("across", range(3))
def test_one_plane_names_no_axis(across):
    rng = np.random.default_rng(0)
    plane = rng.uniform(0, [4, 3, 3], (20_000, 3))
    plane[:, across] = 0.01 * rng.standard_normal(20_000)
    for points in (plane, plane + np.array([10, 20, 30])):
        guess = named(points)
        assert guess.guess is None and not guess.certain and "one plane" in guess.evidence


def test_a_floor_in_the_frame_of_a_camera_is_one():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1.2, 4.0, 60_000)
    points = np.stack(
        [depth * rng.uniform(-0.55, 0.55, depth.size), depth * rng.uniform(-0.2, 0.4, depth.size), depth], 1
    )
    points = points[points[:, 1] < 1.0]
    seen = points[:, 1] > 0.3
    floor = points[seen] * (1.0 / points[seen, 1])[:, None]  # carried along the rays to 1 m below the camera
    floor = floor[floor[:, 2] < 5]
    box = rng.uniform([-0.4, 0.4, 2.5], [0.4, 1.0, 3.0], (4000, 3))
    box[:2000, 2], box[2000:, 1] = 2.5, 0.4
    assert named(np.concatenate([floor, box])).guess == "-y"


def test_scans_are_surer_together():
    source = SyntheticSource(S3DIS, "val", 8, scale="demo", seed=2)
    votes = [up_votes(turned(source[i].points, "z", "y")) for i in range(8)]
    alone = [guess_up("z", [vote]) for vote in votes]
    assert all(guess.guess in ("y", None) for guess in alone)
    assert guess_up("z", votes).guess == "y"
    assert guess_up("z", []).guess is None


def test_points_that_show_nothing():
    rng = np.random.default_rng(0)
    for points in (
        np.zeros((0, 3)),
        np.ones((1, 3)),
        np.tile([1.0, 2.0, 3.0], (5000, 1)),
        rng.normal(size=(50, 3)),
        np.linspace([0, 0, 0], [3, 0, 0], 500),
        rng.uniform(0, 1e5, (5000, 3)),
    ):
        assert not named(points).differs


@pytest.mark.parametrize(
    ("sizes", "unit"),
    [
        ((6.0, 5.0, 2.6), "m"),
        ((600.0, 500.0, 260.0), "cm"),
        ((260.0, 6000.0, 5000.0), "mm"),
        ((3500.0, 2500.0, 4000.0), "mm"),
        ((0.8, 1.6, 0.75), "m"),
        ((12.0, 30.0, 4.0), "m"),
        ((2.2, 2.5, 1.1), "m"),
    ],
)
def test_the_unit_is_that_in_which_a_scan_is_a_room(sizes, unit):
    guess = guess_unit("m", [sizes])
    assert guess.guess == unit and guess.certain and guess.differs == (unit != "m")


@pytest.mark.parametrize("sizes", [(45.0, 60.0, 5.0), (80.0, 60.0, 70.0), (1e7, 1e7, 1e7), (1e-4, 1e-4, 1e-4)])
def test_a_unit_that_is_not_clear_is_not_named(sizes):
    guess = guess_unit("m", [sizes])
    assert guess.guess in (None, "cm") and (guess.guess is None or sizes == (80.0, 60.0, 70.0))


ROOM = SyntheticSource(SCANNET, "val", 2, scale="demo", seed=3)[1].points.astype(np.float64)


def decided(points, up="auto", unit="auto", **said):
    *frame, remarks = decide_frame(PointCloud(points, None, **said), up, unit)
    return (*frame, " | ".join(remarks))


def test_the_usual_frame_needs_no_word():
    assert decided(ROOM) == ("z", "m", "")


def test_what_the_points_show_is_taken_and_said():
    up, unit, said = decided(1000 * turned(ROOM, "z", "-y"))
    assert (up, unit) == ("-y", "mm")
    assert "-y is taken to point up, by its floor, " in said and said.endswith("; --up=-y confirms it")
    assert said.startswith("is taken to be in mm (extents 2,") and "; --unit=mm confirms it | " in said


def test_floors_above_one_another_are_not_laid_on_their_side():
    rng = np.random.default_rng(0)

    def plate(low, high, count):
        return rng.uniform(low, high, (count, 3))

    def box(low, high, count):
        ends = [
            np.where(np.arange(3) == axis, side, each)
            for axis in range(3)
            for side in (low, high)
            for each in (low, high)
        ]
        return np.concatenate([plate(a, b, count) for a, b in zip(ends[::2], ends[1::2], strict=True)])

    walls = [((0, 0, 0), (5, 0, 2.6)), ((0, 4, 0), (5, 4, 2.6)), ((0, 0, 0), (0, 4, 2.6)), ((5, 0, 0), (5, 4, 2.6))]
    things = [((1, 1, 0.68), (2.4, 1.8, 0.74)), ((3.8, 2.5, 0), (4.6, 3.9, 0.45)), ((0.1, 3.2, 0), (0.7, 3.9, 1.8))]
    parts = [
        plate((0, 0, 0), (5, 4, 0), 2800),
        *(plate(*ends, 880) for ends in walls),
        *(box(*ends, 180) for ends in things),
    ]
    storey, ceiling = np.concatenate(parts), plate((0, 0, 5.5), (5, 4, 5.5), 4000)
    up, _, said = decided(np.concatenate([storey, storey + np.array([0, 0, 2.9]), ceiling]))
    assert up == "z" and "does not show which axis points up" in said


def test_feet_and_inches_are_remarked_on():
    for scale, unit, taken, word in ((0.3048, "ft", "m", "feet"), (0.0254, "in", "cm", "inches")):
        _, found, said = decided(ROOM / scale)
        assert found == taken and f"as a room in {word} does: if it is one, add --unit={unit}" in said
        assert decided(ROOM / scale, unit=unit) == ("z", unit, "")
    assert "feet" not in decided(ROOM * [5, 5, 1])[2] and "inches" not in decided(100 * ROOM)[2]


def test_what_the_file_says_is_taken_and_contradicted():
    *frame, remarks = decide_frame(PointCloud(turned(ROOM, "z", "y"), None, up="y", unit="m"), "auto", "auto")
    assert frame == ["y", "m"] and remarks == ["y points up, as its format says"]
    *frame, remarks = decide_frame(PointCloud(ROOM, None, up="y", unit="m"), "auto", "auto")
    assert frame == ["y", "m"] and "z points up" in remarks[-1] and "add --up=z" in remarks[-1]


def test_what_the_user_says_is_taken_and_contradicted():
    up, unit, said = decided(100 * turned(ROOM, "z", "y"), up="z", unit="m")
    assert (up, unit) == ("z", "m")
    assert "the unit is cm" in said and "add --unit=cm" in said and "y points up" in said and "add --up=y" in said


def test_what_nothing_shows_is_assumed_and_said():
    rng = np.random.default_rng(0)
    up, unit, said = decided(rng.uniform(0, [3, 3, 3], (3000, 3)))
    assert (up, unit) == ("z", "m") and "nothing in it tells" in said and "z is assumed" in said
    assert decided(np.zeros((0, 3))) == ("z", "m", "")
    assert decided(np.full((9, 3), 1e300), up="y", unit="cm") == ("y", "cm", "")


def test_an_open_axis_has_a_plain_reason():
    nothing = dict.fromkeys(SIGNS, (0.0,) * 6)
    upright = nothing | {"floor": (3.0, 2.9, -1.0, -1.0, -1.0, -1.0), "walls": (2.0, 2.0, -1.0, -1.0, -1.0, -1.0)}
    weak = nothing | {"walls": (0.4, 0.4, 0.0, 0.0, 0.0, 0.0)}
    for votes, one_surface, reason in (
        (upright, False, "by its floor and walls it stands along z, but either end may be up"),
        (weak, False, "its signs are weak: walls"),
        (nothing, False, "nothing in it tells"),
        (upright, True, "one plane holds most of the points, a floor or a wall"),
    ):
        guess = guess_up("z", [UpVotes(votes, one_surface)])
        assert guess.guess is None and guess.evidence == reason


def test_extents_leave_out_strays():
    points = np.concatenate([ROOM, [[1e4, 0, 0]]])
    np.testing.assert_allclose(extents(points), extents(ROOM), rtol=0.01)
