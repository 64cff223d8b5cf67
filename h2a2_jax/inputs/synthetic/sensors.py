"""Three ways to acquire a room, which differ as ScanNet, SUN RGB-D and S3DIS do."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax.inputs.synthetic.catalogue import Scale
from h2a2_jax.inputs.synthetic.raycast import Camera, PinholeGrid, SphericalGrid, View, look
from h2a2_jax.inputs.synthetic.rooms import Room
from h2a2_jax.inputs.synthetic.shapes import turned

_FIELD = (math.radians(57), math.radians(45))
_RANGE = (0.6, 8.0)  # m
_FRAMED = 0.4  # of a box, for the object to be in view


@dataclass(frozen=True, eq=False)
class Capture:
    """What a sensor delivers of a room.

    Attributes:
        points: x, y, z (m) in the sensor's convention of frames.
        colors: red, green, blue in 0-1.
        owners: object that a point lies on; -1 = none that the room lists.
        boxes: the whole boxes of all objects of the room, in the frame of the points.
        visible: fraction of each object's rays that nothing else blocks; 0 for objects out of view.
    """

    points: Float32[np.ndarray, "m 3"]
    colors: Float32[np.ndarray, "m 3"]
    owners: Int32[np.ndarray, " m"]
    boxes: Float32[np.ndarray, "k 7"]
    visible: Float32[np.ndarray, " k"]


def fused_mesh(room: Room, scale: Scale, rng: np.random.Generator) -> Capture:
    """A walk through the room with a depth camera, fused: ScanNet.

    Several viewpoints, no ceiling, one point per 2-3 cm (demo: 4.5 cm), 10-25 % of the surface missing in patches,
    corners and colours smoothed. The floor is z = 0 and the origin lies somewhere in the room.
    """
    views, rows, cols = (3, 80, 160) if scale == "demo" else (6, 170, 360)
    elevation = (math.radians(-80), math.radians(18))
    seen = [
        look(room, SphericalGrid(origin, rows, cols, elevation, rng))
        for origin in _free_points(room, views, (1.2, 1.7), 0.3, rng)
    ]
    points, colors, owners = _merged(seen, ~np.stack([view.is_ceiling for view in seen]))
    points += rng.normal(0.0, rng.uniform(0.005, 0.008), points.shape).astype(np.float32)
    spacing = 0.045 if scale == "demo" else rng.uniform(0.02, 0.028)
    points, colors, owners = _thinned(points, colors, owners, spacing)
    kept = _without_patches(points, rng.uniform(0.10, 0.25), rng)
    kept = _at_most(kept, 12_000 if scale == "demo" else 150_000, rng)
    shift = np.array([*(-rng.uniform(0.0, 1.0, 2) * room.size[:2]), 0.0], np.float32)
    return _capture(room, seen, points[kept] + shift, _noisy(colors[kept], 12 / 255, rng), owners[kept], shift)


def full_room(room: Room, scale: Scale, rng: np.random.Generator) -> Capture:
    """Tripod scans merged into one cloud: S3DIS.

    Several positions, the ceiling included, 2-5 % missing, 2 mm noise, a warm tint. The smallest x, y, z are 0.
    """
    views, rows, cols = (2, 84, 170) if scale == "demo" else (4, 250, 440)
    elevation = (math.radians(-75), math.radians(89))
    seen = [
        look(room, SphericalGrid(origin, rows, cols, elevation, rng))
        for origin in _free_points(room, views, (1.4, 1.7), 0.35, rng)
    ]
    points, colors, owners = _merged(seen, np.ones((views, rows, cols), bool))
    points += rng.normal(0.0, 0.002, points.shape).astype(np.float32)
    points, colors, owners = _thinned(points, colors, owners, 0.04 if scale == "demo" else 0.012)
    kept = _without_patches(points, rng.uniform(0.02, 0.05), rng)
    kept = _at_most(kept, 14_000 if scale == "demo" else 400_000, rng)
    tint = np.array([1.06, 1.0, 0.86], np.float32)
    shift = -points[kept].min(axis=0)
    return _capture(room, seen, points[kept] + shift, _noisy(colors[kept] * tint, 4 / 255, rng), owners[kept], shift)


def depth_frame(room: Room, scale: Scale, rng: np.random.Generator) -> Capture:
    """One RGB-D image: SUN RGB-D.

    A camera of 57 x 45 degrees at 0.6-8 m with noise that grows with the squared depth, quantised disparity, flying
    points at edges, and loss at random, at grazing angles and on dark surfaces. An object is in view if more than
    40 % of its box is framed. The camera is the origin, y is forward and level, z up.
    """
    rows, cols = (96, 124) if scale == "demo" else (232, 296)
    camera = _aimed_camera(room, rng)
    view = look(room, PinholeGrid(camera, rows, cols, rng))
    offset = view.points - camera.origin
    depth = offset @ camera.axes[1]
    measured, flying = _measured_depth(depth, rng)
    luminance = view.colors.mean(axis=-1)
    lost = rng.random(depth.shape) < rng.uniform(0.05, 0.15)
    lost |= (view.facing < 0.08) & (rng.random(depth.shape) < 0.7)
    lost |= (luminance < 0.13) & (rng.random(depth.shape) < 0.5)
    kept = ~lost & (measured > _RANGE[0]) & (measured < _RANGE[1])
    points = (offset * (measured / depth)[..., None])[kept]
    colors = (view.colors * (rng.uniform(0.5, 1.4) * _vignette(rows, cols))[..., None])[kept]
    owners = np.where(flying, -1, view.owners)[kept].astype(np.int32)

    turn = math.pi / 2 - camera.yaw
    boxes = room.boxes.copy()
    boxes[:, :3] = turned(boxes[:, :3] - camera.origin, turn)
    boxes[:, 6] = (boxes[:, 6] + turn + np.pi) % (2 * np.pi) - np.pi
    chosen = _at_most(np.arange(len(points)), 12_000 if scale == "demo" else 50_000, rng)
    return Capture(
        points=turned(points, turn)[chosen],
        colors=_noisy(colors, 5 / 255, rng)[chosen],
        owners=owners[chosen],
        boxes=boxes,
        visible=_visible([view], len(room.boxes)) * (_share_in_view(camera, room.boxes) > _FRAMED),
    )


def _free_points(
    room: Room, count: int, height: tuple[float, float], clearance: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Places for a sensor, apart from furniture and from one another as far as that goes."""
    found: list[np.ndarray] = []
    for attempt in range(count * 60):
        relaxed = clearance * (1 - attempt / (count * 60))
        x, y = (rng.uniform(0.35, extent - 0.35) for extent in room.size[:2].tolist())
        z = rng.uniform(*height)
        apart = min((math.hypot(x - p[0], y - p[1]) for p in found), default=math.inf)
        if apart > 3 * relaxed and room.is_free(x, y, z, relaxed):
            found.append(np.array([x, y, z], np.float32))
            if len(found) == count:
                return found
    # A crammed room: hang the sensor under the ceiling, above all furniture.
    while len(found) < count:
        found.append(np.append(rng.uniform(0.3, 0.7, 2) * room.size[:2], room.size[2] - 0.06).astype(np.float32))
    return found


def _aimed_camera(room: Room, rng: np.random.Generator) -> Camera:
    """Of several random cameras, the one that sees most annotated objects."""
    boxes = room.boxes[room.labels >= 0]
    targets = boxes[:, :3]
    best, best_score = None, -1.0
    for origin in _free_points(room, 8, (0.9, 1.5), 0.3, rng):
        for _ in range(2):
            aim = room.size / 2
            if len(targets):
                aim = targets[rng.integers(len(targets), size=min(2, len(targets)))].mean(axis=0)
            toward = aim - origin
            yaw = math.atan2(toward[1], toward[0]) + rng.normal(0.0, 0.1)
            pitch = float(np.clip(math.atan2(toward[2], math.hypot(toward[0], toward[1])), -0.6, -0.1))
            camera = Camera(origin, yaw, pitch, _FIELD)
            shares = _share_in_view(camera, boxes)
            score = shares[shares > _FRAMED].sum() + 0.5 * rng.random()
            if score > best_score:
                best, best_score = camera, score
    assert best is not None
    return best


def _share_in_view(camera: Camera, boxes: np.ndarray) -> np.ndarray:
    """Which part of each box the camera frames and reaches, on a lattice of points in it."""
    ticks = np.linspace(-0.9, 0.9, 4, dtype=np.float32)
    lattice = np.stack(np.meshgrid(ticks, ticks, ticks[::3]), axis=-1).reshape(-1, 3)
    offsets = lattice * boxes[:, None, 3:6] / 2
    placed = [
        turned(offset, yaw) + center
        for offset, yaw, center in zip(offsets, boxes[:, 6].tolist(), boxes[:, :3], strict=True)
    ]
    right, down, depth = camera.image(np.array(placed, np.float32).reshape(-1, 3))
    framed = (np.abs(right) < 1) & (np.abs(down) < 1) & (depth > _RANGE[0]) & (depth < _RANGE[1])
    return framed.reshape(len(boxes), len(lattice)).mean(axis=1)


def _measured_depth(depth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Depth as a structured-light camera gives it, and which pixels fly between two surfaces."""
    sigma = 0.0012 + 0.0019 * (depth - 0.4) ** 2
    measured = depth + rng.normal(0.0, 1.0, depth.shape).astype(np.float32) * sigma
    step = 0.00285  # 1/m per disparity unit: 2.85 mm at 1 m, growing with the squared depth
    measured = 1 / np.maximum(np.round(1 / measured / step) * step, step)
    jump = np.diff(depth, axis=1, append=depth[:, -1:])
    flying = (np.abs(jump) > 0.1) & (rng.random(depth.shape) < 0.3)
    measured = np.where(flying, measured + jump * rng.random(depth.shape), measured)
    return measured.astype(np.float32), flying


def _vignette(rows: int, cols: int) -> np.ndarray:
    """Brightness over the image: 1 in the middle, 0.7 in the corners."""
    v, u = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, cols)
    return (1 - 0.15 * (u * u + v * v)).astype(np.float32)


def _merged(views: list[View], kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, colours and owners of the kept rays of all views."""
    points = np.stack([view.points for view in views])[kept]
    colors = np.stack([view.colors for view in views])[kept]
    owners = np.stack([view.owners for view in views])[kept]
    return points, colors, owners


def _thinned(
    points: np.ndarray, colors: np.ndarray, owners: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One point per cell of a grid of `spacing` (m): the mean of those in it, which rounds corners and blurs."""
    cells = np.floor((points - points.min(axis=0)) / spacing).astype(np.int64)
    extent = cells.max(axis=0) + 1
    keys = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]]))
    counts = np.diff(np.append(starts, len(keys)))[:, None].astype(np.float32)
    # Points and colours are summed together: one pass over memory.
    sums = np.add.reduceat(np.concatenate([points, colors], axis=1)[order], starts, axis=0) / counts
    return sums[:, :3], sums[:, 3:], owners[order[starts]]


def _without_patches(points: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of the points left after about `fraction` of them is cut out in round patches."""
    left = np.arange(len(points))
    wanted = (1 - fraction) * len(points)
    while len(left) > wanted:
        middle = points[left[rng.integers(len(left))]]
        radius = rng.uniform(0.1, 0.4)
        offset = points[left] - middle
        left = left[np.einsum("ij,ij->i", offset, offset) > radius * radius]
    return left


def _at_most(indices: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of the indices, in random order."""
    return rng.permutation(indices)[:count]


def _noisy(colors: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(colors.shape, np.float32) * np.float32(sigma)
    return np.clip(colors + noise, 0, 1).astype(np.float32)


def _visible(views: list[View], objects: int) -> np.ndarray:
    """Fraction of each object's rays, over all views, that nothing else blocks."""
    hits = sum(np.bincount(view.owners[view.owners >= 0], minlength=objects) for view in views)
    return (hits / np.maximum(sum(view.unoccluded for view in views), 1)).astype(np.float32)


def _capture(
    room: Room, views: list[View], points: np.ndarray, colors: np.ndarray, owners: np.ndarray, shift: np.ndarray
) -> Capture:
    boxes = room.boxes.copy()
    boxes[:, :3] += shift
    return Capture(points.astype(np.float32), colors, owners, boxes, _visible(views, len(room.boxes)))
