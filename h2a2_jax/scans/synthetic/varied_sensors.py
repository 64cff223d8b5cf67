"""Sensors of the varied rooms: version 2 of the captures, with what real scans suffer from.

Views see only so far, drift against one another (walls become double), measure flying points at edges, lose dark and
grazing surfaces and what windows let through, and differ in exposure. Fused surfaces are bent, bumpy and rounded at
corners; floors lean a little, and rooms have any height and, one in four, any direction.
"""

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float32
from numpy.random import Generator

from h2a2_jax.scans.synthetic.furniture import rotate
from h2a2_jax.scans.synthetic.homes import Home, Zone
from h2a2_jax.scans.synthetic.raycast import DepthCamera, DepthView, PinholeGrid, SphericalGrid, look
from h2a2_jax.scans.synthetic.sensors import (
    FRAMED,
    RANGE,
    Capture,
    add_noise,
    measure_depth,
    share_in_view,
    smooth_field,
    thin,
)

_FEWEST_RAYS = 25  # of a view that an object must be worth for the view to count for its visibility


def walked_mesh(home: Home, rng: Generator) -> Capture:
    """A walk through the rooms with a depth camera, fused to a mesh: ScanNet.

    Up to eight views of 20,000 rays each, points every 2.5 to 5 cm.
    """
    views, drifted, kept = _views(
        home, rng, per_zone=(1.0, 9.0), most=8, elevation=(-80.0, rng.uniform(0.0, 50.0)), drift=0.05
    )
    if rng.random() < 0.85:
        kept &= ~np.stack([view.is_ceiling for view in views])
    reach = rng.uniform(3.0, 6.5)
    kept &= np.stack([view.distances < reach * rng.uniform(0.8, 1.2) for view in views])
    facing = np.stack([view.facing for view in views])
    kept &= facing > rng.uniform(0.0, 0.15)
    return _fused(home, views, drifted, kept, rng, spacing=(0.025, 0.05), bump=(0.002, 0.022), holes=(0.0, 0.3))


def merged_stations(home: Home, rng: Generator) -> Capture:
    """Scans from a tripod, merged: S3DIS. The ceiling is there; the smallest x, y, z are near 0."""
    views, drifted, kept = _views(home, rng, per_zone=(1.0, 18.0), most=5, elevation=(-76.0, 89.0), drift=0.005)
    if rng.random() < 0.25:
        kept &= ~np.stack([view.is_ceiling for view in views])
    capture = _fused(home, views, drifted, kept, rng, spacing=(0.025, 0.045), bump=(0.001, 0.008), holes=(0.0, 0.12))
    shift = np.array([*(-capture.points[:, :2].min(axis=0)), 0.0], np.float32)
    boxes = capture.boxes.copy()
    boxes[:, :3] += shift
    return replace(capture, points=capture.points + shift, boxes=boxes)


def single_frame(home: Home, rng: Generator) -> Capture:
    """One image of a depth camera of any make: SUN RGB-D. The camera is the origin, y is forward, z up.

    30,000 to 45,000 rays; vertical and horizontal differ a little from true ones, as gravity is estimated.
    """
    camera = _aim(home, rng)
    rows = int(rng.integers(145, 180))
    view = look(home, PinholeGrid(camera, rows, round(rows * 1.3), rng))
    offset = view.points - camera.origin
    depth = offset @ camera.axes[1]
    measured, flying = measure_depth(depth, rng)
    smooth = rng.uniform(0.0, 1.0)  # some cameras are far better than the first Kinect
    measured = depth + (measured - depth) * np.where(flying, 1.0, smooth).astype(np.float32)
    flying &= rng.random(depth.shape) < rng.uniform(0.2, 1.0)
    lost = rng.random(depth.shape) < rng.uniform(0.0, 0.2)
    lost |= (view.facing < rng.uniform(0.02, 0.2)) & (rng.random(depth.shape) < 0.8)
    luminance = view.colors.mean(axis=-1)
    lost |= (luminance < rng.uniform(0.0, 0.18)) & (rng.random(depth.shape) < 0.6)
    flat = offset[::2, ::2].reshape(-1, 3)
    blotch = smooth_field(flat / np.linalg.norm(flat, axis=1, keepdims=True), (0.15, 0.6), rng)
    patchy = blotch > np.quantile(blotch, 1 - rng.uniform(0.0, 0.15))
    whole = np.repeat(np.repeat(patchy.reshape(offset[::2, ::2].shape[:2]), 2, 0), 2, 1)
    lost |= whole[: depth.shape[0], : depth.shape[1]]
    lost |= _through_glass(view, rng)
    farthest = rng.uniform(3.5, 8.0)
    kept = ~lost & (measured > RANGE[0]) & (measured < farthest)
    points = (offset * (measured / np.maximum(depth, 1e-3))[..., None])[kept]
    owners = np.where(flying, -1, view.owners)[kept].astype(np.int32)
    turn = math.pi / 2 - camera.yaw
    boxes = home.boxes.copy()
    boxes[:, :3] = rotate(boxes[:, :3] - camera.origin, turn)
    boxes[:, 6] = (boxes[:, 6] + turn + np.pi) % (2 * np.pi) - np.pi
    visible = _most_visible([view], len(home.boxes)) * (share_in_view(camera, home.boxes) > FRAMED)
    return Capture(
        points=_leaning(rotate(points, turn), np.radians(1.5), rng),
        colors=_exposed(add_noise(view.colors[kept], rng.uniform(0.0, 0.03), rng), rng),
        owners=owners,
        boxes=boxes,
        visible=visible.astype(np.float32),
        losses={"lost": float(lost.mean()), "flying": float(flying.mean())},
    )


def _station(home: Home, zone: Zone, height: tuple[float, float], rng: Generator) -> Float32[np.ndarray, " 3"] | None:
    """Choose a place for a sensor in a zone, away from everything; None if the zone is full."""
    for attempt in range(40):
        margin = min(0.3, 0.3 * zone.width, 0.3 * zone.length)
        x, y = rng.uniform(margin, zone.width - margin), rng.uniform(margin, zone.length - margin)
        place = np.array([x + zone.x, y + zone.y, rng.uniform(*height)], np.float32)
        if home.is_clear(place, 0.3 * (1 - attempt / 40) + 0.03):
            return place
    return None


def _views(
    home: Home,
    rng: Generator,
    *,
    per_zone: tuple[float, float],
    most: int,
    elevation: tuple[float, float],
    drift: float = 0.02,
) -> tuple[list[DepthView], list[np.ndarray], np.ndarray]:
    """Views from places in the zones, their points with the drift of each, and the rays that measured something.

    `per_zone` is the fewest views of a zone and the area (m2) that one more is for.
    """
    origins = []
    zones = [zone for zone in home.zones if len(home.zones) == 1 or rng.random() < 0.92] or list(home.zones)
    for zone in zones:
        count = int(per_zone[0] + round(rng.uniform(0.7, 1.5) * zone.area / per_zone[1]))
        origins += [_station(home, zone, (1.1, 1.8), rng) for _ in range(count)]
    found = [origin for origin in origins if origin is not None]
    if not found:
        found = [np.append(home.size[:2] / 2, home.size[2] - 0.06).astype(np.float32)]
    chosen = [found[index] for index in rng.permutation(len(found))[:most]]
    low, high = math.radians(elevation[0]), math.radians(elevation[1])
    views = [look(home, SphericalGrid(origin, 100, 200, (low, high), rng)) for origin in chosen]
    size, flying = rng.uniform(0.0, drift), rng.uniform(0.0, 0.2)
    drifted, kept = [], []
    for view, origin in zip(views, chosen, strict=True):
        points = view.points
        jump = np.diff(view.distances, axis=1, append=view.distances[:, :1])
        edge = (np.abs(jump) > 0.15) & (rng.random(jump.shape) < flying)
        ahead = np.roll(points, -1, axis=1)
        points = np.where(edge[..., None], points + (ahead - points) * rng.random((*jump.shape, 1), np.float32), points)
        view.owners[edge] = -1
        turned = rotate((points - origin).reshape(-1, 3).astype(np.float32), rng.normal(0.0, 0.4 * size))
        drifted.append(
            turned.reshape(points.shape) + origin + rng.normal(0.0, size * np.array([1, 1, 0.5])).astype(np.float32)
        )
        kept.append(~_through_glass(view, rng) & (rng.random(jump.shape) < rng.uniform(0.7, 1.0)))
    return views, drifted, np.stack(kept)


def _through_glass(view: DepthView, rng: Generator) -> np.ndarray:
    """Rays that hit bluish panes of glass and do not come back: in a third of the views none, half or nearly all."""
    red, green, blue = np.moveaxis(view.colors, -1, 0)
    glass = (blue > 1.1 * red) & (green > 1.03 * red) & (blue > 0.3) & (view.owners >= 0)
    return glass & (rng.random(glass.shape) < rng.choice([0.0, 0.5, 0.95]))


def _fused(
    home: Home,
    views: list[DepthView],
    drifted: list[np.ndarray],
    kept: np.ndarray,
    rng: Generator,
    *,
    spacing: tuple[float, float],
    bump: tuple[float, float],
    holes: tuple[float, float],
) -> Capture:
    """Merge views to one surface, bend, roughen and cut it, and move it to the frame of the scan."""
    gains = np.exp(rng.normal(0.0, rng.uniform(0.0, 0.2), (len(views), 1, 1, 1))).astype(np.float32)
    colors = (np.stack([view.colors for view in views]) * gains)[kept]
    normals = np.stack([view.normals for view in views])[kept]
    owners = np.stack([view.owners for view in views])[kept]
    fields, cell = np.concatenate([colors, normals], axis=1), float(rng.uniform(*spacing))
    points, fields, owners = thin(np.stack(drifted)[kept], fields, owners, cell)
    colors, normals = fields[:, :3], fields[:, 3:]
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    # Corners are rounded: along its normal each point moves towards the mean of a cell of some 10 cm.
    keys = np.floor((points + rng.uniform(0, 1, 3)) / rng.uniform(0.07, 0.14)).astype(np.int64)
    _, group = np.unique((keys[:, 0] * 4096 + keys[:, 1]) * 4096 + keys[:, 2], return_inverse=True)
    count = np.bincount(group)[:, None]
    mean = np.stack([np.bincount(group, points[:, axis]) for axis in range(3)], axis=1) / count
    outward = np.einsum("ij,ij->i", mean[group] - points, normals)[:, None]
    points = points + (normals * np.clip(outward, -0.05, 0.05) * rng.uniform(0.0, 0.8)).astype(np.float32)
    sigma = rng.uniform(*bump)
    own = rng.uniform(0.2, 0.9)  # share of the variance that neighbours do not share
    rough = math.sqrt(1 - own) * smooth_field(points, (0.1, 0.5), rng)
    rough = rough + np.float32(math.sqrt(own)) * rng.standard_normal(len(points), np.float32)
    points = points + normals * (rough * np.float32(sigma)).astype(np.float32)[:, None]
    bend = np.float32(rng.uniform(0.0, 0.02))
    places = np.concatenate([points, home.boxes[:, :3]])
    places = places + bend * np.stack([smooth_field(places, (4.0, 10.0), rng) for _ in range(3)], axis=1)
    share = rng.uniform(*holes)
    lost = smooth_field(points, (0.2, 1.0), rng)
    left = rng.permutation(np.flatnonzero(lost < np.quantile(lost, 1 - share)))
    turn = 0.0
    if rng.random() < 0.5:
        turn = rng.normal(0.0, 0.03) if rng.random() < 0.5 else rng.uniform(-math.pi, math.pi)
    turn += int(rng.integers(4)) * math.pi / 2
    shift = np.array([*(-rng.uniform(0.0, 1.0, 2) * home.size[:2]), rng.normal(0.0, 0.03)], np.float32)
    places = rotate((places + shift).astype(np.float32), turn)
    boxes = home.boxes.copy()
    boxes[:, :3] = places[len(points) :]
    boxes[:, 6] = (boxes[:, 6] + turn + np.pi) % (2 * np.pi) - np.pi
    return Capture(
        points=_leaning(places[: len(points)][left], np.radians(0.6), rng),
        colors=_exposed(add_noise(colors[left], rng.uniform(0.0, 0.06), rng), rng),
        owners=owners[left],
        boxes=boxes,
        visible=_most_visible(views, len(home.boxes)),
        losses={"holes": float(share)},
    )


def _leaning(points: np.ndarray, sigma: float, rng: Generator) -> np.ndarray:
    """Lean a scan: z changes with x and y by slopes of a standard deviation `sigma`."""
    slopes = np.clip(rng.normal(0.0, sigma, 2), -2 * sigma, 2 * sigma).astype(np.float32)
    leaning = points.astype(np.float32)
    leaning[:, 2] += leaning[:, :2] @ slopes
    return leaning


def _exposed(colors: np.ndarray, rng: Generator) -> Float32[np.ndarray, "m 3"]:
    """Colours as some camera has them: white balance, saturation, gamma, exposure up to where whites clip."""
    gray = colors.mean(axis=1, keepdims=True)
    colors = gray + (colors - gray) * np.float32(rng.uniform(0.2, 1.4))
    colors = colors * np.exp(rng.normal(0.0, 0.07, 3)) * np.exp(rng.normal(0.0, 0.3))
    colors = np.clip(colors, 0, 1) ** np.exp(rng.normal(0.0, 0.35))
    return colors.astype(np.float32)


def _aim(home: Home, rng: Generator) -> DepthCamera:
    """Choose the one of a few random cameras that sees most annotated objects."""
    boxes = home.boxes[home.labels >= 0]
    best, best_score = None, -1.0
    for _ in range(8):
        origin = _station(home, home.zones[rng.integers(len(home.zones))], (0.9, 1.7), rng)
        if origin is None:
            continue
        for _ in range(2):
            aim = home.size / 2
            if len(boxes):
                aim = boxes[rng.integers(len(boxes), size=min(2, len(boxes))), :3].mean(axis=0)
            toward = aim - origin
            yaw = math.atan2(toward[1], toward[0]) + rng.normal(0.0, 0.15)
            pitch = math.atan2(toward[2], math.hypot(toward[0], toward[1])) + rng.normal(0.0, 0.1)
            wide = math.radians(rng.uniform(54, 72))
            field = (wide, 2 * math.atan(math.tan(wide / 2) * rng.uniform(0.7, 0.78)))
            camera = DepthCamera(origin, yaw, float(np.clip(pitch, -0.7, 0.0)), field)
            shares = share_in_view(camera, boxes)
            score = shares[shares > FRAMED].sum() + 1.0 * rng.random()
            if score > best_score:
                best, best_score = camera, score
    if best is None:
        best = DepthCamera(np.append(home.size[:2] / 2, home.size[2] - 0.06).astype(np.float32), 0.0, -0.5, (1.0, 0.8))
    return best


def _most_visible(views: list[DepthView], objects: int) -> Float32[np.ndarray, " k"]:
    """For each object the largest fraction, over the views, of its rays that nothing else blocks."""
    best = np.zeros(objects, np.float32)
    for view in views:
        hits = np.bincount(view.owners[view.owners >= 0], minlength=objects)
        share = hits / np.maximum(view.unoccluded, _FEWEST_RAYS)
        best = np.maximum(best, share.astype(np.float32))
    return best
