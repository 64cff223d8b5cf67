"""Up and the directions of walls are found in rooms of known tilt; one wall alone leaves the tilt open."""

import math

import numpy as np
import pytest

from h2a2_jax.scans.formats.point_cloud import read_point_cloud
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.scans.surfaces import MAX_TILT, Gravity, estimate_gravity, estimate_walls, surface_normals
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.untrusted.restricted_pickle import load_plain_pickle

UP = np.array([0.0, 0.0, 1.0])


def turn(axis, degrees):
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = math.radians(degrees)
    return np.eye(3) + math.sin(angle) * skew + (1 - math.cos(angle)) * skew @ skew


def between(a, b):
    return math.degrees(math.acos(min(1.0, float(a @ b))))


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def room(request):
    """A procedural scan, its floor level, at the scale of the demo."""
    return SyntheticSource(request.param, "val", 1, scale="demo")[0].points


@pytest.mark.parametrize(("tilt", "toward"), [(0, 10), (4, 200), (17, 75), (31, 320)])
def test_up_of_a_tilted_room(room, tilt, toward):
    toward = math.radians(toward)
    rotation = turn([math.cos(toward), math.sin(toward), 0], tilt) @ turn(UP, 20)
    gravity = estimate_gravity(surface_normals(room @ rotation.T.astype(np.float32)))
    assert gravity.sure and between(gravity.up, rotation @ UP) < 0.5
    assert math.degrees(gravity.tilt) == pytest.approx(tilt, abs=0.5)
    np.testing.assert_allclose(gravity.rotation @ gravity.up, UP, atol=1e-12)
    np.testing.assert_allclose(gravity.rotation @ gravity.rotation.T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("degrees", [-40, -9, 0, 23, 44])
def test_walls_of_a_turned_room(room, degrees):
    as_it_is = estimate_walls(surface_normals(room))
    turned = estimate_walls(surface_normals(room @ turn(UP, degrees).T.astype(np.float32)))
    off = math.degrees(turned.angle - as_it_is.angle) - degrees
    assert as_it_is.sure and turned.sure and abs((off + 45) % 90 - 45) < 0.5
    assert -math.pi / 4 <= turned.angle < math.pi / 4
    np.testing.assert_allclose(
        turned.rotation @ [math.cos(turned.angle), math.sin(turned.angle), 0], [1, 0, 0], atol=1e-9
    )


def test_one_wall_leaves_the_tilt_open():
    rng = np.random.default_rng(0)
    wall = rng.uniform([0, 0, 0], [4, 0.005, 3], (4000, 3)).astype(np.float32)
    gravity = estimate_gravity(surface_normals(wall @ turn([0, 1, 0], 10).T.astype(np.float32)))
    assert not gravity.sure
    assert abs(float(gravity.up @ [0, 1, 0])) < 0.02  # across the wall all the same


def test_points_without_surfaces():
    rng = np.random.default_rng(0)
    for points in (np.zeros((0, 3)), np.zeros((1, 3)), np.zeros((500, 3)), rng.normal(size=(3000, 3))):
        normals = surface_normals(points.astype(np.float32))
        gravity, walls = estimate_gravity(normals), estimate_walls(normals)
        assert not gravity.sure and gravity.tilt <= MAX_TILT + 1e-6 and not walls.sure
    np.testing.assert_array_equal(Gravity(UP, 0.0, True).rotation, np.eye(3))


def test_a_real_scan_stands_as_its_annotation_says(scans_dir):
    points = read_point_cloud(scans_dir / "scene0000_00.bin").points
    matrix = np.array(load_plain_pickle(scans_dir / "scannet_infos.pkl")["data_list"][0]["axis_align_matrix"])
    normals = surface_normals(points)
    gravity, walls = estimate_gravity(normals), estimate_walls(normals)
    assert gravity.sure and math.degrees(gravity.tilt) < 2
    off = math.degrees(walls.angle + math.atan2(matrix[1, 0], matrix[0, 0]))
    assert walls.sure and abs((off + 45) % 90 - 45) < 2
