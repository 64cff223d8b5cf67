"""Where a sensor stands in a room, and what a camera frames."""

import math

import numpy as np
from jaxtyping import Float, Float32

from h2a2_jax.inputs.synthetic.raycast import Camera
from h2a2_jax.inputs.synthetic.rooms import Room
from h2a2_jax.inputs.synthetic.shapes import turned

FIELD = (math.radians(57), math.radians(45))
"""Horizontal and vertical field of view of the depth camera."""

RANGE = (0.6, 8.0)
"""Depth (m) that it measures."""

FRAMED = 0.4
"""Share of a box that must be framed for its object to be in view."""


def free_points(
    room: Room, count: int, height: tuple[float, float], clearance: float, rng: np.random.Generator
) -> list[Float32[np.ndarray, " 3"]]:
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


def aimed_camera(room: Room, rng: np.random.Generator) -> Camera:
    """Of several random cameras, the one that sees most annotated objects."""
    boxes = room.boxes[room.labels >= 0]
    targets = boxes[:, :3]
    best, best_score = None, -1.0
    for origin in free_points(room, 8, (0.9, 1.5), 0.3, rng):
        for _ in range(2):
            aim = room.size / 2
            if len(targets):
                aim = targets[rng.integers(len(targets), size=min(2, len(targets)))].mean(axis=0)
            toward = aim - origin
            yaw = math.atan2(toward[1], toward[0]) + rng.normal(0.0, 0.1)
            pitch = float(np.clip(math.atan2(toward[2], math.hypot(toward[0], toward[1])), -0.6, -0.1))
            camera = Camera(origin, yaw, pitch, FIELD)
            shares = share_in_view(camera, boxes)
            score = shares[shares > FRAMED].sum() + 0.5 * rng.random()
            if score > best_score:
                best, best_score = camera, score
    assert best is not None
    return best


def share_in_view(camera: Camera, boxes: Float32[np.ndarray, "k 7"]) -> Float[np.ndarray, " k"]:
    """Which part of each box the camera frames and reaches, on a lattice of points in it."""
    ticks = np.linspace(-0.9, 0.9, 4, dtype=np.float32)
    lattice = np.stack(np.meshgrid(ticks, ticks, ticks[::3]), axis=-1).reshape(-1, 3)
    offsets = lattice * boxes[:, None, 3:6] / 2
    placed = [
        turned(offset, yaw) + center
        for offset, yaw, center in zip(offsets, boxes[:, 6].tolist(), boxes[:, :3], strict=True)
    ]
    right, down, depth = camera.image(np.array(placed, np.float32).reshape(-1, 3))
    framed = (np.abs(right) < 1) & (np.abs(down) < 1) & (depth > RANGE[0]) & (depth < RANGE[1])
    return framed.reshape(len(boxes), len(lattice)).mean(axis=1)
