"""Sensors: positions in a room, and the points that a depth camera or a laser scanner measures from there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Int32
from numpy.random import Generator

from h2a2_jax.scans.synthetic.furniture import rotate
from h2a2_jax.scans.synthetic.raycast import DepthCamera, DepthView, PinholeGrid, SphericalGrid, look
from h2a2_jax.scans.synthetic.rooms import Room, Scale

Limits = tuple[float, float]  # smallest and largest value
FIELD = (math.radians(57), math.radians(45))  # horizontal and vertical field of view of the depth camera
RANGE = (0.6, 8.0)  # smallest and largest depth (m) that it measures
FRAMED = 0.4  # share of a box that must lie in the image for its object to be in view


def choose_positions(
    room: Room, count: int, height: Limits, clearance: float, rng: Generator
) -> list[Float32[np.ndarray, " 3"]]:
    """Choose positions for a sensor away from furniture and from one another, as far as the room allows."""
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


def aim_camera(room: Room, rng: Generator) -> DepthCamera:
    """Choose the one of several random cameras that sees most annotated objects."""
    boxes = room.boxes[room.labels >= 0]
    targets = boxes[:, :3]
    best, best_score = None, -1.0
    for origin in choose_positions(room, 8, (0.9, 1.5), 0.3, rng):
        for _ in range(2):
            aim = room.size / 2
            if len(targets):
                aim = targets[rng.integers(len(targets), size=min(2, len(targets)))].mean(axis=0)
            toward = aim - origin
            yaw = math.atan2(toward[1], toward[0]) + rng.normal(0.0, 0.1)
            pitch = float(np.clip(math.atan2(toward[2], math.hypot(toward[0], toward[1])), -0.6, -0.1))
            camera = DepthCamera(origin, yaw, pitch, FIELD)
            shares = share_in_view(camera, boxes)
            score = shares[shares > FRAMED].sum() + 0.5 * rng.random()
            if score > best_score:
                best, best_score = camera, score
    assert best is not None
    return best


def share_in_view(camera: DepthCamera, boxes: Float32[np.ndarray, "k 7"]) -> Float[np.ndarray, " k"]:
    """Share of each box in the image and within the range of the camera, on a lattice of points in the box."""
    ticks = np.linspace(-0.9, 0.9, 4, dtype=np.float32)
    lattice = np.stack(np.meshgrid(ticks, ticks, ticks[::3]), axis=-1).reshape(-1, 3)
    offsets = lattice * boxes[:, None, 3:6] / 2
    placed = [
        rotate(offset, yaw) + center
        for offset, yaw, center in zip(offsets, boxes[:, 6].tolist(), boxes[:, :3], strict=True)
    ]
    right, down, depth = camera.image(np.array(placed, np.float32).reshape(-1, 3))
    framed = (np.abs(right) < 1) & (np.abs(down) < 1) & (depth > RANGE[0]) & (depth < RANGE[1])
    return framed.reshape(len(boxes), len(lattice)).mean(axis=1)


_CELL = (0.0245, 0.0335)  # m; smallest and largest cell of a fused surface


@dataclass(frozen=True, eq=False)
class Capture:
    """Points that a sensor measures in a room.

    Attributes:
        points: x, y, z (m) in the frame that the dataset uses.
        owners: object that a point lies on; -1 = none that the room lists.
        boxes: boxes of all objects of the room as a whole, in the frame of the points.
        visible: fraction of each object's rays that nothing else blocks; 0 for objects out of view.
        losses: share of the seen points that is missing, by cause.
    """

    points: Float32[np.ndarray, "m 3"]
    colors: Float32[np.ndarray, "m 3"]
    owners: Int32[np.ndarray, " m"]
    boxes: Float32[np.ndarray, "k 7"]
    visible: Float32[np.ndarray, " k"]
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Surface:
    """Quality of a fused mesh or of merged laser scans, relative to ScanNet's or S3DIS's.

    Attributes:
        holes: share of the surface that is missing.
        spacing: factor of the distance between points.
        noise: factor of the standard deviation of bumps.
        tint: factors of red, green and blue; None: those of the sensor.
    """

    holes: Limits
    spacing: float = 1.0
    noise: float = 1.0
    tint: tuple[float, float, float] | None = None


_SCANNET = Surface((0.10, 0.25))
_S3DIS = Surface((0.02, 0.05))


def fused_mesh(room: Room, scale: Scale, rng: Generator, surface: Surface = _SCANNET) -> Capture:
    """A walk through the room with a depth camera, fused: ScanNet, and with other surfaces MultiScan and 3RScan.

    Several viewpoints, no ceiling, 50,000-150,000 points every 2-3 cm (demo: 4.5 cm), 10-25 % of the surface missing
    in patches, corners and colours smoothed, bumps of 5-8 mm. The floor is z = 0 and the origin lies somewhere in the
    room.
    """
    is_demo = scale == "demo"
    views, rows, cols, highest = (3, 80, 160, 18.0) if is_demo else (8, 190, 380, 30.0)
    seen = _look_around(room, views, (rows, cols), (-80.0, highest), (1.2, 1.7), 0.3, rng)
    kept_rays = ~np.stack([view.is_ceiling for view in seen])
    points, colors, owners = _merge(seen, kept_rays)
    sigma = surface.noise * (rng.uniform(0.005, 0.008) if is_demo else rng.uniform(0.0053, 0.0075))
    if is_demo:
        points += rng.normal(0.0, sigma, points.shape).astype(np.float32)
        points, colors, owners = thin(points, colors, owners, 0.045 * surface.spacing)
        fraction = rng.uniform(*surface.holes)
    else:
        fraction = rng.uniform(*surface.holes)
        normals = np.stack([view.normals for view in seen])[kept_rays]
        spacing = surface.spacing * _spacing(points, 1 - fraction, rng)
        points, means, owners = thin(points, np.concatenate([colors, normals], axis=1), owners, spacing)
        colors, normals = means[:, :3], means[:, 3:]
        normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
        points += normals * _bumps(points, sigma, rng)
    kept = (_cut_patches if is_demo else _cut_holes)(points, fraction, rng)
    losses = {"holes": 1 - len(kept) / len(points)}
    kept = rng.permutation(kept)[: 12_000 if is_demo else 150_000]
    shift = np.array([*(-rng.uniform(0.0, 1.0, 2) * room.size[:2]), 0.0], np.float32)
    colors = add_noise(colors[kept], 12 / 255, rng)
    return _capture(room, seen, points[kept] + shift, colors, owners[kept], shift, losses)


def tablet_mesh(room: Room, scale: Scale, rng: Generator, surface: Surface) -> Capture:
    """A walk through the room with the LiDAR of a tablet, fused: ARKitScenes.

    A coarser mesh than `fused_mesh`, with more holes, and bent by the drift of the tablet: 1.5 cm along x and y, half
    of that along z, in the mean, nearly the same at neighbouring places. The origin is where the walk began, 1.2-1.6 m
    above the floor, and x looks where the tablet looked then, so that walls have any direction.
    """
    capture = fused_mesh(room, scale, rng, surface)
    places = np.concatenate([capture.points, capture.boxes[:, :3]])
    drift = np.stack([smooth_field(places, (4.0, 10.0), rng) for _ in range(3)], axis=1)
    turn, height = rng.uniform(-math.pi, math.pi), rng.uniform(1.2, 1.6)
    places = rotate(places + drift * np.array([0.015, 0.015, 0.0075], np.float32), turn)
    places[:, 2] -= np.float32(height)
    boxes = capture.boxes.copy()
    boxes[:, :3] = places[len(capture.points) :]
    boxes[:, 6] = (boxes[:, 6] + turn + np.pi) % (2 * np.pi) - np.pi
    return replace(capture, points=places[: len(capture.points)], boxes=boxes)


def full_room(room: Room, scale: Scale, rng: Generator, surface: Surface = _S3DIS) -> Capture:
    """Tripod scans merged into one cloud: S3DIS, and with another surface ScanNet++.

    Several positions, the ceiling included, 200,000 points and more (demo: 14,000), 2-5 % missing, 2 mm noise, a warm
    tint. The smallest x, y, z are 0.
    """
    is_demo = scale == "demo"
    views, rows, cols = (2, 84, 170) if is_demo else (5, 240, 420)
    seen = _look_around(room, views, (rows, cols), (-75.0, 89.0), (1.4, 1.7), 0.35, rng)
    points, colors, owners = _merge(seen, np.ones((views, rows, cols), bool))
    if is_demo:
        points += rng.normal(0.0, 0.002 * surface.noise, points.shape).astype(np.float32)
        points, colors, owners = thin(points, colors, owners, 0.04 * surface.spacing)
    else:
        points, colors, owners = thin(points, colors, owners, 0.012 * surface.spacing)
        points += np.float32(0.002 * surface.noise) * rng.standard_normal(points.shape, np.float32)
    kept = (_cut_patches if is_demo else _cut_holes)(points, rng.uniform(*surface.holes), rng)
    losses = {"holes": 1 - len(kept) / len(points)}
    kept = rng.permutation(kept)[: 14_000 if is_demo else 1_000_000]
    tint = np.array(surface.tint or (1.06, 1.0, 0.86), np.float32)
    shift = -points[kept].min(axis=0)
    colors = add_noise(colors[kept] * tint, 4 / 255, rng)
    return _capture(room, seen, points[kept] + shift, colors, owners[kept], shift, losses)


def _look_around(
    room: Room, views: int, shape: tuple[int, int], elevation: Limits, height: Limits, clearance: float, rng: Generator
) -> list[DepthView]:
    """Views all around from several positions; elevation in degrees, height and clearance in metres."""
    low, high = math.radians(elevation[0]), math.radians(elevation[1])
    positions = choose_positions(room, views, height, clearance, rng)
    return [look(room, SphericalGrid(origin, *shape, (low, high), rng)) for origin in positions]


def depth_frame(room: Room, scale: Scale, rng: Generator) -> Capture:
    """One RGB-D image: SUN RGB-D.

    A camera of 57 x 45 degrees at 0.6-8 m with noise that grows with the squared depth, quantised disparity, flying
    points at edges, and loss at random, at grazing angles and on dark surfaces. An object is in view if more than
    40 % of its box is framed. 50,000 points (demo: 12,000). The camera is the origin, y is forward and level, z up.
    """
    is_demo = scale == "demo"
    rows, cols = (96, 124) if is_demo else (300, 380)
    camera = aim_camera(room, rng)
    view = look(room, PinholeGrid(camera, rows, cols, rng))
    offset = view.points - camera.origin
    depth = offset @ camera.axes[1]
    measured, flying = measure_depth(depth, rng)
    luminance = view.colors.mean(axis=-1)
    dropped = rng.random(depth.shape) < rng.uniform(0.05, 0.15)
    grazing = (view.facing < 0.08) & (rng.random(depth.shape) < 0.7)
    dark = (luminance < 0.13) & (rng.random(depth.shape) < 0.5)
    losses = {"dropout": dropped.mean(), "grazing or dark": (grazing | dark).mean(), "flying": flying.mean()}
    kept = ~(dropped | grazing | dark) & (measured > RANGE[0]) & (measured < RANGE[1])
    points = (offset * (measured / depth)[..., None])[kept]
    v, u = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, cols)
    vignette = (1 - 0.15 * (u * u + v * v)).astype(np.float32)  # 1 in the middle, 0.7 in the corners
    colors = (view.colors * (rng.uniform(0.5, 1.4) * vignette)[..., None])[kept]
    owners = np.where(flying, -1, view.owners)[kept].astype(np.int32)

    turn = math.pi / 2 - camera.yaw
    boxes = room.boxes.copy()
    boxes[:, :3] = rotate(boxes[:, :3] - camera.origin, turn)
    boxes[:, 6] = (boxes[:, 6] + turn + np.pi) % (2 * np.pi) - np.pi
    chosen = rng.permutation(len(points))[: 12_000 if is_demo else 50_000]
    return Capture(
        points=rotate(points, turn)[chosen],
        colors=add_noise(colors, 5 / 255, rng)[chosen],
        owners=owners[chosen],
        boxes=boxes,
        visible=_visible_shares([view], len(room.boxes)) * (share_in_view(camera, room.boxes) > FRAMED),
        losses={cause: float(share) for cause, share in losses.items()},
    )


def measure_depth(depth: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Depth (m) as a structured-light camera measures it, and a mask of the pixels that fly between two surfaces."""
    sigma = 0.0012 + 0.0019 * (depth - 0.4) ** 2
    measured = depth + rng.normal(0.0, 1.0, depth.shape).astype(np.float32) * sigma
    step = 0.00285  # 1/m per disparity unit: 2.85 mm at 1 m, growing with the squared depth
    measured = 1 / np.maximum(np.round(1 / measured / step) * step, step)
    jump = np.diff(depth, axis=1, append=depth[:, -1:])
    flying = (np.abs(jump) > 0.1) & (rng.random(depth.shape) < 0.3)
    measured = np.where(flying, measured + jump * rng.random(depth.shape), measured)
    return measured.astype(np.float32), flying


def _merge(views: list[DepthView], kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, colours and owners of the kept rays of all views."""
    points, colors, owners = zip(*((view.points, view.colors, view.owners) for view in views), strict=True)
    return np.stack(points)[kept], np.stack(colors)[kept], np.stack(owners)[kept]


def thin(
    points: np.ndarray, colors: np.ndarray, owners: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replace the points, with colours (and more columns), in each cell of a grid of `spacing` (m) by their mean."""
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


def _spacing(points: np.ndarray, share: float, rng: Generator) -> float:
    """Edge (m) of the cells that thin a dense surface to the points of a scan, if `share` of the surface is left."""
    coarse = 0.05
    cells = np.floor(points / coarse).astype(np.int64)
    filled = len(np.unique((cells[:, 0] * 4096 + cells[:, 1]) * 4096 + cells[:, 2]))
    spacing = coarse * math.sqrt(filled * share / rng.uniform(60_000, 140_000))
    return float(np.clip(spacing, *_CELL))


def _bumps(points: np.ndarray, sigma: float, rng: Generator) -> np.ndarray:
    """Noise of a fused surface: half of its variance is smooth over 0.2-0.6 m, half independent at every point."""
    smooth = smooth_field(points, (0.2, 0.6), rng) + rng.standard_normal(len(points), np.float32)
    return (smooth * np.float32(sigma / math.sqrt(2)))[:, None]


def smooth_field(points: np.ndarray, length: tuple[float, float], rng: Generator) -> np.ndarray:
    """Random function of the place with variance 1, a sum of waves of a range of lengths (m)."""
    waves = 10
    direction = rng.normal(size=(3, waves))
    direction *= 2 * math.pi / rng.uniform(*length, waves) / np.linalg.norm(direction, axis=0)
    phase = rng.uniform(0, 2 * math.pi, waves).astype(np.float32)
    heights = np.float32(math.sqrt(2 / waves))  # the mean square of a cosine is 1/2
    return heights * np.cos(points @ direction.astype(np.float32) + phase).sum(axis=1)


def _cut_holes(points: np.ndarray, fraction: float, rng: Generator) -> np.ndarray:
    """Indices of the points left after `fraction` of them is cut out in holes of irregular shape."""
    field = smooth_field(points, (0.25, 1.0), rng)
    return np.flatnonzero(field < np.quantile(field, 1 - fraction))


def _cut_patches(points: np.ndarray, fraction: float, rng: Generator) -> np.ndarray:
    """Indices of the points left after about `fraction` of them is cut out in round patches."""
    order = np.argsort(points[:, 0], kind="stable")
    along, ordered = points[order, 0], points[order]
    alive = np.ones(len(points), bool)
    left = len(points)
    while left > (1 - fraction) * len(points):
        middle = points[np.flatnonzero(alive)[rng.integers(left)]]
        radius = rng.uniform(0.1, 0.4)
        # Only points in a slab about the patch can lie in it.
        first, last = np.searchsorted(along, (middle[0] - 1.01 * radius, middle[0] + 1.01 * radius))
        offset = ordered[first:last] - middle
        inside = np.einsum("ij,ij->i", offset, offset) <= radius * radius
        alive[order[first:last][inside]] = False
        left = int(np.count_nonzero(alive))
    return np.flatnonzero(alive)


def add_noise(colors: np.ndarray, sigma: float, rng: Generator) -> np.ndarray:
    """Add normal noise to colours, kept within 0-1."""
    noise = rng.standard_normal(colors.shape, np.float32) * np.float32(sigma)
    return np.clip(colors + noise, 0, 1).astype(np.float32)


def _visible_shares(views: list[DepthView], objects: int) -> np.ndarray:
    """Fraction of each object's rays, over all views, that nothing else blocks."""
    hits = sum(np.bincount(view.owners[view.owners >= 0], minlength=objects) for view in views)
    return (hits / np.maximum(sum(view.unoccluded for view in views), 1)).astype(np.float32)


def _capture(
    room: Room,
    views: list[DepthView],
    points: np.ndarray,
    colors: np.ndarray,
    owners: np.ndarray,
    shift: np.ndarray,
    losses: Mapping[str, float],
) -> Capture:
    boxes = room.boxes.copy()
    boxes[:, :3] += shift
    return Capture(points.astype(np.float32), colors, owners, boxes, _visible_shares(views, len(room.boxes)), losses)
