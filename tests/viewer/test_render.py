"""Pixels of the renderer."""

from dataclasses import replace

import numpy as np

from h2a2_jax.viewer.render import Lines, camera_for, draw_lines, draw_points, shade

RED, GREEN, BLUE, GREY = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0.5, 0.5, 0.5)
TOP = camera_for(np.zeros(3), np.ones(3), "top", 200, 200)
OBLIQUE = camera_for(np.zeros(3), np.ones(3), "oblique", 200, 200)


def at(canvas, camera, place):
    x, y = camera.project(np.array([place], float))[0][0].astype(int)
    return canvas.colors[y, x]


def floor(color=RED, height=0.0):
    x, y = np.meshgrid(np.linspace(0, 1, 80), np.linspace(0, 1, 80))
    points = np.stack([x.ravel(), y.ravel(), np.full(6400, height)], axis=1)
    return points, np.tile(np.array(color, float), (6400, 1))


def test_near_points_cover_far_ones_whatever_their_order():
    points, colors = np.array([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1]]), np.array([GREEN, RED])
    for order in ([0, 1], [1, 0]):
        canvas = draw_points(TOP, points[order], colors[order], 0.05, GREY)
        assert at(canvas, TOP, (0.5, 0.5, 0)).tolist() == list(GREEN)
    np.testing.assert_allclose(np.unique(canvas.colors.reshape(-1, 3), axis=0), sorted([GREEN, GREY]))


def test_points_of_a_regular_grid_leave_no_gaps_and_near_ones_are_larger():
    canvas = draw_points(TOP, *floor(), 1.4 / 79, GREY)
    inside = np.abs(np.arange(200) - 100) < 80
    assert (canvas.colors[inside][:, inside] == RED).all()
    pair = np.array([[0.5, 0, 0.0], [0.5, 1, 0.0]])
    painted = draw_points(OBLIQUE, pair, np.array([RED, GREEN]), 0.06, GREY).colors
    assert (painted == RED).all(axis=2).sum() > (painted == GREEN).all(axis=2).sum() > 0


def test_points_beside_and_behind_the_eye_are_not_drawn():
    behind = (OBLIQUE.target + 3 * OBLIQUE.distance * OBLIQUE.axes[2])[None]
    aside = (OBLIQUE.target + 50 * OBLIQUE.axes[0])[None]
    canvas = draw_points(OBLIQUE, np.concatenate([behind, aside]), np.array([RED, RED]), 0.1, GREY)
    assert (canvas.colors == 0.5).all() and np.isinf(canvas.depth).all()


def test_no_points_are_a_background():
    canvas = shade(draw_points(TOP, np.zeros((0, 3)), np.zeros((0, 3)), 0.1, GREY), 2)
    assert (canvas.colors == 0.5).all()


def test_depth_is_the_distance_in_front_of_the_eye():
    point = np.array([[0.3, 0.6, 0.2]])
    canvas = draw_points(OBLIQUE, point, np.array([RED]), 0.02, GREY)
    (_, expected) = OBLIQUE.project(point)
    np.testing.assert_allclose(canvas.depth[np.isfinite(canvas.depth)], expected[0], rtol=1e-6)


def test_shading_darkens_steps_and_not_planes():
    points, _ = floor(GREY)
    raised = points[np.abs(points[:, 0] - 0.5) < 0.2] + [0, 0, 0.5]
    both = draw_points(TOP, np.concatenate([points, raised]), np.full((len(points) + len(raised), 3), 0.5), 0.03, GREY)
    shaded = shade(both, 2, TOP.distance)
    x, y = TOP.project(np.array([[0.3, 0.5, 0.0]]))[0][0].astype(int)
    assert shaded.colors[y, x - 6 : x + 6].min() < 0.45  # beside the step
    assert at(shaded, TOP, (0.1, 0.1, 0)).tolist() == [0.5] * 3 == at(shaded, TOP, (0.5, 0.5, 0.5)).tolist()


def line(start, end, **options):
    return Lines(np.array([[start, end]], float), np.array([BLUE]), 3.0, **options)


def test_what_points_hide_of_a_line_is_fainter():
    canvas = draw_points(OBLIQUE, *floor(RED), 0.04, GREY)
    draw_lines(canvas, OBLIQUE, line((0.5, 0.5, -0.4), (0.5, 0.5, 0.4)), visible=1.0, hidden=0.25)
    assert at(canvas, OBLIQUE, (0.5, 0.5, 0.3)).tolist() == list(BLUE)
    np.testing.assert_allclose(at(canvas, OBLIQUE, (0.5, 0.5, -0.2)), [0.75, 0, 0.25], atol=1e-6)


def test_depth_along_a_line_is_that_of_perspective():
    # A line through a wall: the pixel where it changes is that of the place where it meets the wall.
    wall = floor(RED)[0][:, [0, 2, 1]] * [3, 1, 2] + [-1, 0.5, -0.5]
    canvas = draw_points(OBLIQUE, wall, np.tile(RED, (6400, 1)), 0.06, GREY)
    draw_lines(canvas, OBLIQUE, line((0.5, -0.9, 0.4), (0.5, 0.9, 0.4)), visible=1.0, hidden=0.0)
    assert at(canvas, OBLIQUE, (0.5, 0.4, 0.4)).tolist() == list(BLUE)
    assert at(canvas, OBLIQUE, (0.5, 0.62, 0.4)).tolist() == list(RED)


def test_lines_have_their_width_dashes_gaps_and_those_behind_the_eye_nothing():
    empty = draw_points(TOP, np.zeros((0, 3)), np.zeros((0, 3)), 0.1, GREY)
    whole, dashed = (replace(empty, colors=empty.colors.copy()) for _ in range(2))
    draw_lines(whole, TOP, line((0, 0.5, 0), (1, 0.5, 0)), visible=1.0, hidden=1.0)
    painted = (whole.colors == BLUE).all(axis=2)
    assert set(painted.sum(axis=0)[20:180]) == {3}
    draw_lines(dashed, TOP, line((0, 0.5, 0), (1, 0.5, 0), dashed=True), visible=1.0, hidden=1.0)
    assert 0.5 < (dashed.colors == BLUE).all(axis=2).sum() / painted.sum() < 0.75
    behind = OBLIQUE.target + OBLIQUE.axes[2] * 2 * OBLIQUE.distance
    draw_lines(empty, OBLIQUE, line(behind, behind + 1.0), visible=1.0, hidden=1.0)
    assert (empty.colors == 0.5).all()
