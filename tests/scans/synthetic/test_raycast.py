import math

import numpy as np
import pytest

from h2a2_jax.scans.specs import S3DIS
from h2a2_jax.scans.synthetic.furniture import Primitive, join_solids, make_solids
from h2a2_jax.scans.synthetic.raycast import DepthCamera, PinholeGrid, SphericalGrid, look
from h2a2_jax.scans.synthetic.rooms import Room, furnish_room, programme

SIZE = np.array([6, 8, 3], np.float32)


def room_of(*objects):
    """A room of 6 x 8 x 3 m with one object per list of primitives."""
    parts = [make_solids(primitives).place(np.zeros(3), 0.0, owner) for owner, primitives in enumerate(objects)]
    boxes = np.zeros((len(objects), 7), np.float32)
    return Room(
        SIZE,
        np.full((6, 3), 0.5, np.float32),
        join_solids([*parts, make_solids([])]),
        boxes,
        np.zeros(len(boxes), np.int32),
    )


def sphere(origin, rows=60, cols=120):
    elevations = (math.radians(-80), math.radians(80))
    return SphericalGrid(np.array(origin, np.float32), rows, cols, elevations, np.random.default_rng(0))


def camera(origin, yaw, pitch):
    return DepthCamera(np.array(origin, np.float32), yaw, pitch, (math.radians(57), math.radians(45)))


RED = (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "grid", [sphere((3, 4, 1.5)), PinholeGrid(camera((3, 4, 1.5), 0.4, -0.2), 40, 50, np.random.default_rng(0))]
)
def test_directions_are_unit_vectors(grid):
    np.testing.assert_allclose(np.linalg.norm(grid.directions, axis=0), 1, atol=1e-6)


def test_an_empty_room_shows_its_shell():
    view = look(room_of(), sphere((2, 3, 1)))
    on_face = np.minimum(np.abs(view.points), np.abs(view.points - SIZE)).min(axis=-1)
    assert on_face.max() < 1e-4
    assert (view.owners == -1).all()
    np.testing.assert_array_equal(view.is_ceiling, view.points[..., 2] > 3 - 1e-4)
    assert (view.facing <= 1 + 1e-6).all()


def test_a_cuboid_is_hit_on_its_near_side_and_hides_what_is_behind():
    near = [Primitive((3.0, 3.0, 0.5), (4.0, 5.0, 2.5), RED)]
    behind = [Primitive((4.5, 3.5, 1.0), (5.0, 4.5, 2.0), RED)]
    view = look(room_of(near, behind), sphere((1, 4, 1.5), 200, 400))
    hits = view.points[view.owners == 0]
    assert len(hits) > 500
    np.testing.assert_allclose(hits[:, 0], 3.0, atol=1e-4)
    assert hits[:, 1].min() >= 3 - 1e-4 and hits[:, 1].max() <= 5 + 1e-4
    assert (view.owners != 1).all()
    assert view.unoccluded[0] == len(hits) and view.unoccluded[1] > 50


def test_a_cylinder_is_hit_on_its_mantle_and_its_top():
    column = [Primitive((3.0, 3.0, 0.0), (4.0, 5.0, 1.0), RED, is_round=True)]
    view = look(room_of(column), sphere((1, 2, 1.8), 300, 600))
    x, y, z = view.points[view.owners == 0].T
    radius = np.hypot((x - 3.5) / 0.5, (y - 4) / 1.0)
    top = np.abs(z - 1) < 1e-4
    assert top.sum() > 100 and (~top).sum() > 100
    np.testing.assert_allclose(radius[~top], 1, atol=1e-3)
    assert radius[top].max() <= 1 + 1e-3


@pytest.mark.parametrize("is_round", [False, True])
@pytest.mark.parametrize("lean", [-0.6, 0.35])
def test_leaning_primitives_are_hit_where_marching_along_the_rays_enters_them(is_round, lean):
    parts = make_solids([Primitive((-0.7, -0.5, 0.0), (0.7, 0.5, 1.2), RED, is_round, lean)]).place(
        np.array([3.2, 4.1, 0.3]), 0.7, 0
    )
    room = Room(SIZE, np.full((6, 3), 0.5, np.float32), parts, np.zeros((1, 7), np.float32), np.zeros(1, np.int32))
    grid = sphere((1.2, 3.0, 1.4), 40, 80)
    view = look(room, grid)
    steps = np.arange(0.5, 4.0, 0.005, dtype=np.float32)
    rays = grid.directions.reshape(3, -1).T
    marched = (grid.origin + rays[:, None] * steps[:, None]).reshape(-1, 3)
    local = np.abs(parts.to_local(np.zeros(len(marched), int), marched) / parts.halves[0])
    flat = np.hypot(local[:, 0], local[:, 1]) if is_round else local[:, :2].max(axis=1)
    inside = ((flat <= 1) & (local[:, 2] <= 1)).reshape(len(rays), len(steps))
    hit = view.owners.ravel() == 0
    assert inside.any(axis=1).sum() > 50
    assert (inside.any(axis=1) & ~hit).sum() == 0  # rays that only graze an edge may pass between two steps
    assert (hit & ~inside.any(axis=1)).sum() < 20
    both = hit & inside.any(axis=1)
    np.testing.assert_allclose(view.distances.ravel()[both], steps[inside[both].argmax(axis=1)], atol=0.006)


def test_normals_of_leaning_faces_are_across_them():
    parts = make_solids([Primitive((3.0, 2.0, 0.5), (4.0, 6.0, 2.5), RED, lean=0.3)]).place(np.zeros(3), 0.0, 0)
    room = Room(SIZE, np.full((6, 3), 0.5, np.float32), parts, np.zeros((1, 7), np.float32), np.zeros(1, np.int32))
    view = look(room, sphere((1, 4, 1.2)))
    front = (view.owners == 0) & (np.abs(view.normals[..., 0]) > 0.5)
    expected = np.array([-1, 0, 0.3]) / math.hypot(1, 0.3)
    assert front.sum() > 50
    np.testing.assert_allclose(view.normals[front], np.broadcast_to(expected, (front.sum(), 3)), atol=1e-5)
    # The front passes through the lower left and the upper right edge of the bounds, less the slant.
    x, _, z = view.points[front].T
    np.testing.assert_allclose(x, 3.0 + 0.3 * (z - 0.5), atol=1e-4)


def test_frames_of_primitives_and_back():
    rng = np.random.default_rng(0)
    parts = make_solids([Primitive((0.0, 0, 0), (1, 2, 3), RED, lean=0.2), Primitive((0.0, 0, 0), (1, 1, 1), RED)])
    parts = parts.place(np.array([1.0, 2.0, 0.5]), 1.1, 4)
    points, index = rng.normal(size=(40, 3)), rng.integers(2, size=40)
    np.testing.assert_allclose(parts.to_common(index, parts.to_local(index, points)), points, atol=1e-6)


def test_surfaces_are_seen_at_the_cosine_of_their_normal():
    wall = [Primitive((3.0, 0.0, 0.0), (4.0, 8.0, 3.0), RED)]
    grid = sphere((1, 4, 1.5))
    view = look(room_of(wall), grid)
    hit = view.owners == 0
    np.testing.assert_allclose(view.facing[hit], grid.directions[0][hit], atol=1e-5)


def test_image_coordinates():
    view = camera((1, 2, 1), math.pi / 2, 0.0)  # looks along +y, so +x is right
    ahead = np.array([[1, 5, 1], [1 + 4 * math.tan(math.radians(28.5)), 6, 1], [1, 0, 1]], np.float32)
    right, down, depth = view.image(ahead)
    np.testing.assert_allclose(right[:2], [0, 1], atol=1e-5)
    np.testing.assert_allclose(down[:2], 0, atol=1e-6)
    np.testing.assert_allclose(depth, [3, 4, -2], atol=1e-5)


class WithoutWindows(SphericalGrid):
    """The same rays, each tested against every primitive."""

    def __init__(self, grid):
        self.origin, self.directions = grid.origin, grid.directions

    def windows(self, parts):
        return [[(slice(None), slice(None))]] * len(parts)


@pytest.mark.parametrize("seed", range(6))
def test_windows_never_lose_a_hit(seed):
    rng = np.random.default_rng(seed)
    room = furnish_room(programme(S3DIS, "full"), S3DIS, rng)
    origin = np.array([*rng.uniform(0.3, 0.7, 2), 0.75], np.float32) * room.size
    pinhole = PinholeGrid(DepthCamera(origin, rng.uniform(-3, 3), -0.4, (1.0, 0.8)), 60, 70, rng)
    for grid in (sphere(origin), pinhole):
        view, reference = look(room, grid), look(room, WithoutWindows(grid))
        np.testing.assert_array_equal(view.distances, reference.distances)
        np.testing.assert_array_equal(view.owners, reference.owners)
        np.testing.assert_array_equal(view.unoccluded, reference.unoccluded)
