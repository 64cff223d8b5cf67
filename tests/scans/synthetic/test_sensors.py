import numpy as np
import pytest

from h2a2_jax.scans.specs import S3DIS, SCANNET, SPECS, SUNRGBD
from h2a2_jax.scans.synthetic import sensors
from h2a2_jax.scans.synthetic.furniture import Primitive, join_solids, make_solids
from h2a2_jax.scans.synthetic.raycast import SphericalGrid, look
from h2a2_jax.scans.synthetic.rooms import Room, furnish_room, programme

STEP = 0.00285  # 1/m per unit of disparity


@pytest.mark.parametrize("depth", [0.7, 1.5, 3.0, 6.0])
def test_depth_noise_has_the_deviation_of_the_formula(depth):
    true = np.full((300, 300), depth, np.float32)
    measured, flying = sensors.measure_depth(true, np.random.default_rng(0))
    assert not flying.any()
    formula = np.hypot(0.0012 + 0.0019 * (depth - 0.4) ** 2, STEP * depth**2 / np.sqrt(12))
    assert abs(measured.std() / formula - 1) < 0.03
    assert abs(measured.mean() - depth) < 0.05 * formula + 1e-3 * depth


def test_depth_comes_in_steps_of_disparity():
    true = np.full((100, 100), 4.0, np.float32)
    measured, _ = sensors.measure_depth(true, np.random.default_rng(0))
    units = 1 / measured / STEP
    np.testing.assert_allclose(units, np.round(units), atol=1e-3)
    assert 3 < len(np.unique(measured)) < 40


def test_points_fly_only_at_edges_and_between_the_two_surfaces():
    true = np.full((200, 200), 2.0, np.float32)
    true[:, 100:] = 3.0
    measured, flying = sensors.measure_depth(true, np.random.default_rng(0))
    assert (np.flatnonzero(flying.any(axis=0)) == 99).all() and 0.2 < flying[:, 99].mean() < 0.4
    assert 1.9 < measured[flying].min() and measured[flying].max() < 3.1
    assert ((measured[flying] > 2.1) & (measured[flying] < 2.9)).mean() > 0.6


def test_holes_take_the_fraction_and_are_holes():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 4, (40_000, 2)), np.zeros((40_000, 1))], axis=1).astype(np.float32)
    kept = sensors._cut_holes(points, 0.2, rng)
    assert abs(1 - len(kept) / len(points) - 0.2) < 1e-3
    lost = np.ones(len(points), bool)
    lost[kept] = False
    cell = (points[:, :2] / 0.08).astype(int) @ (1, 100)
    share = np.bincount(cell, lost) / np.maximum(np.bincount(cell), 1)
    assert (share[np.bincount(cell) > 0] > 0.95).mean() > 0.07  # single points lost at random would empty no cell


def test_patches_take_at_least_the_fraction_and_leave_the_rest():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 4, (20_000, 3)).astype(np.float32)
    kept = sensors._cut_patches(points, 0.1, rng)
    assert 0.88 < len(kept) / len(points) <= 0.9 and (np.diff(kept) > 0).all()


def test_bumps_have_their_deviation_and_are_partly_smooth():
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 5, (50_000, 3)).astype(np.float32)
    bumps = sensors._bumps(points, 0.006, rng)[:, 0]
    assert abs(bumps.std() / 0.006 - 1) < 0.05
    close = sensors._bumps(np.repeat(points, 2, axis=0), 0.006, rng).reshape(-1, 2)
    assert 0.4 < np.corrcoef(close.T)[0, 1] < 0.6


def test_thinning_leaves_the_mean_of_every_cell():
    points = np.array([[0.0, 0, 0], [0.01, 0, 0], [0.31, 0, 0]], np.float32)
    colors = np.array([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]], np.float32)
    thin, means, owners = sensors.thin(points, colors, np.array([3, 3, 7], np.int32), 0.1)
    np.testing.assert_allclose(thin, [[0.005, 0, 0], [0.31, 0, 0]], atol=1e-7)
    np.testing.assert_allclose(means, [[0.5] * 3, [0.5] * 3])
    assert owners.tolist() == [3, 7]


def test_the_visible_share_is_what_nothing_blocks():
    """From one point a slab hides the lower half of a board behind it."""
    board = [Primitive((5.0, 2.0, 0.5), (5.1, 6.0, 2.5), (0.5, 0.5, 0.5))]
    slab = [Primitive((3.0, 0.0, 0.0), (3.1, 8.0, 1.5), (0.5, 0.5, 0.5))]
    parts = [make_solids(part).place(np.zeros(3), 0.0, owner) for owner, part in enumerate((board, slab))]
    room = Room(
        np.array([6, 8, 3], np.float32),
        np.full((6, 3), 0.5, np.float32),
        join_solids(parts),
        np.zeros((2, 7), np.float32),
        np.zeros(2, np.int32),
    )
    grid = SphericalGrid(np.array([1, 4, 1.5], np.float32), 400, 800, (-1.4, 1.4), np.random.default_rng(0))
    shares = sensors._visible_shares([look(room, grid)], 2)
    assert abs(shares[0] - 0.5) < 0.02 and shares[1] == 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_points_lie_on_what_they_belong_to(spec):
    rng = np.random.default_rng(3)
    room = furnish_room(programme(spec, "full"), spec, rng)
    sensor = {SCANNET: sensors.fused_mesh, SUNRGBD: sensors.depth_frame, S3DIS: sensors.full_room}[spec]
    capture = sensor(room, "full", rng)
    own = capture.owners >= 0
    box = capture.boxes[capture.owners[own]]
    offset = capture.points[own] - box[:, :3]
    cos, sin = np.cos(box[:, 6]), np.sin(box[:, 6])
    local = np.stack([offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin, offset[:, 2]])
    beyond = (np.abs(local) - box[:, 3:6].T / 2).max(axis=0)
    assert np.quantile(beyond, 0.99) < 0.06 and beyond.max() < (0.5 if spec.has_yaw else 0.06)
    assert (capture.visible <= 1).all() and (capture.visible > 0.15).sum() >= 2
    assert capture.colors.min() >= 0 and capture.colors.max() <= 1
