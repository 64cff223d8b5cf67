"""Exact overlap of boxes by clipping polygons, in float64: slow, and independent of the library."""

import numpy as np


def footprint(box):
    """Corners [4, 2] of a box, counter-clockwise."""
    x, y, _, dx, dy, _, yaw = np.asarray(box, np.float64)
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [dx / 2, dy / 2]
    turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
    return corners @ turn + [x, y]


def clip_polygon(polygon, start, end):
    """Part of a polygon on the left of the line from start to end (Sutherland-Hodgman)."""
    direction = end - start
    side = [direction[0] * (p[1] - start[1]) - direction[1] * (p[0] - start[0]) for p in polygon]
    kept = []
    for i, (point, here) in enumerate(zip(polygon, side, strict=True)):
        following, there = polygon[(i + 1) % len(polygon)], side[(i + 1) % len(polygon)]
        if here >= 0:
            kept.append(point)
        if (here > 0 > there) or (here < 0 < there):
            kept.append(point + (following - point) * here / (here - there))
    return kept


def intersection_area(first, second):
    """Common area of two footprints."""
    polygon, clip = list(footprint(first)), footprint(second)
    for start, end in zip(clip, np.roll(clip, -1, axis=0), strict=True):
        if len(polygon) == 0:
            return 0.0
        polygon = clip_polygon(polygon, start, end)
    if len(polygon) < 3:
        return 0.0
    # Relative to one corner, so that a polygon of a few centimetres keeps its digits.
    x, y = (np.array(polygon) - polygon[0]).T
    return abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2


def iou_3d(first, second):
    """Volume IoU of two boxes."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    top = min(first[2] + first[5] / 2, second[2] + second[5] / 2)
    bottom = max(first[2] - first[5] / 2, second[2] - second[5] / 2)
    common = intersection_area(first, second) * max(top - bottom, 0.0)
    union = first[3:6].prod() + second[3:6].prod() - common
    return common / union if union > 0 else 0.0


def random_pairs(rng, count, spread=1.0):
    """Two tables of boxes [count, 7] that overlap more often than not, float32."""
    low, high = [-spread, -spread, -0.5, 0.1, 0.1, 0.1, -4], [spread, spread, 0.5, 2.5, 2.5, 2, 4]
    return rng.uniform(low, high, (2, count, 7)).astype(np.float32)


def special_pairs():
    """Pairs [m, 7] whose edges coincide, touch or vanish: where formulas divide zero by zero."""
    box = np.array([0.3, -0.2, 0.1, 1.0, 0.6, 0.8, 0.4])
    unit = np.array([0, 0, 0, 1, 1, 1, 0.0])

    def change(box, **columns):
        names = ("x", "y", "z", "dx", "dy", "dz", "yaw")
        return np.add(box, [columns.get(name, 0) for name in names])

    half = box * [1, 1, 1, 0.5, 0.5, 0.5, 1]
    flat, line, point = (box * mask for mask in ([1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0, 1]))
    pairs = [
        (box, box),
        (box, change(box, yaw=np.pi / 2)),
        (box, change(box, yaw=np.pi)),
        (box, half),
        (half, box),
        (unit, unit),
        (unit, change(unit, x=1)),
        (unit, change(unit, x=1, y=1)),
        (unit, change(unit, z=1)),
        (unit, change(unit, x=0.5)),
        (unit, change(unit, x=5)),
        (unit, change(unit, yaw=np.pi / 4)),
        (unit, change(unit, dx=1, dy=-0.5)),
        (unit, change(unit, yaw=1e-7)),
        (flat, box),
        (line, box),
        (point, box),
        (point, point),
        (box, point),
        (np.zeros(7), np.zeros(7)),
        (box * 1e-6, box * 1e-6),
        (change(box, x=100, y=-50), change(box, x=100.25, y=-50, yaw=0.3)),
    ]
    first, second = (np.stack(column).astype(np.float32) for column in zip(*pairs, strict=True))
    return first, second
