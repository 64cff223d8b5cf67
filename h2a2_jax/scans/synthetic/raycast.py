"""Ray casting in closed form: view of a room from one point on a grid of directions.

Every primitive is tested only against the rays of the window that it can appear in, and the nearest hit wins, as in a
depth buffer. Nothing is sampled on surfaces that cannot be seen.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64

from h2a2_jax.scans.synthetic.furniture import Solids, corners, rotate_each
from h2a2_jax.scans.synthetic.rooms import Room

_NEAREST = 0.05  # m; surfaces closer to the sensor are not seen
_STRIPS = np.array([1.0, 0.88, 1.06, 0.94, 1.1, 0.9, 1.02], np.float32)  # brightness of the strips of a floor
Window = tuple[slice, slice]


class SphericalGrid:
    """Rays all around from one origin (m), evenly spread over the sphere between two elevations.

    `directions` are unit vectors; their first index is x, y, z.
    """

    def __init__(
        self,
        origin: Float32[np.ndarray, " 3"],
        rows: int,
        cols: int,
        elevation: tuple[float, float],
        rng: np.random.Generator,
    ):
        """Make the rays, each at a random place in its cell of the grid.

        The rows are even in the sine of the elevation (lowest and highest, rad), the columns in the azimuth.
        """
        self.origin = origin
        self._shape = rows, cols
        self._low, self._high = math.sin(elevation[0]), math.sin(elevation[1])
        jitter = rng.random((2, rows, cols), np.float32)
        sine = self._low + (self._high - self._low) * (np.arange(rows, dtype=np.float32)[:, None] + jitter[0]) / rows
        azimuth = 2 * np.float32(np.pi) * (np.arange(cols, dtype=np.float32) + jitter[1]) / cols
        cosine = np.sqrt(np.maximum(1 - sine * sine, 0))
        self.directions = np.stack([cosine * np.cos(azimuth), cosine * np.sin(azimuth), sine]).astype(np.float32)

    def windows(self, parts: Solids) -> list[list[Window]]:
        """Rows between the elevations of the nearest and farthest point, columns between the corners' azimuths."""
        rows, cols = self._shape
        seen = corners(parts.boxes) - self.origin
        toward = parts.centers - self.origin
        bearing = np.arctan2(toward[:, 1], toward[:, 0])
        turn = np.arctan2(seen[..., 1], seen[..., 0]) - bearing[:, None]
        turn = (turn + np.pi) % (2 * np.pi) - np.pi
        start, stop = bearing + turn.min(axis=1), bearing + turn.max(axis=1)
        # Distances to the nearest and the farthest point of the footprint, in the plane.
        local = np.abs(rotate_each(toward, -parts.yaws)[:, :2]) - parts.boxes[:, 3:5] / 2
        near = np.hypot(*np.maximum(local, 0).T)
        far = np.hypot(seen[..., 0], seen[..., 1]).max(axis=1)
        top, bottom = toward[:, 2] + parts.halves[:, 2], toward[:, 2] - parts.halves[:, 2]
        high = _sine(top, np.where(top > 0, near, far))
        low = _sine(bottom, np.where(bottom < 0, near, far))
        per_sine = rows / (self._high - self._low)
        first_row = np.clip(np.floor((low - self._low) * per_sine), 0, rows).astype(int)
        last_row = np.clip(np.ceil((high - self._low) * per_sine), 0, rows).astype(int)
        first_col = np.floor(start * cols / (2 * np.pi)).astype(int)
        last_col = np.ceil(stop * cols / (2 * np.pi)).astype(int)
        found: list[list[Window]] = []
        for index in range(len(parts)):
            band, begin = slice(first_row[index], last_row[index]), first_col[index] % cols
            end = begin + last_col[index] - first_col[index]
            stripes = [slice(begin, min(end, cols)), slice(0, end - cols)]  # the second one beyond the full circle
            if near[index] == 0 or end - begin >= cols:
                stripes = [slice(0, cols)]
            found.append([(band, s) for s in stripes if band.start < band.stop and s.start < s.stop])
        return found


@dataclass(frozen=True, eq=False)
class DepthCamera:
    """A pinhole camera whose image rows are level.

    Attributes:
        origin: optical centre (m).
        yaw: direction of the optical axis about z (rad).
        pitch: its elevation (rad); negative looks down.
        field: horizontal and vertical field of view (rad).
    """

    origin: Float32[np.ndarray, " 3"]
    yaw: float
    pitch: float
    field: tuple[float, float]

    @property
    def axes(self) -> Float32[np.ndarray, "3 3"]:
        """Unit vectors to the right, forward and up, as rows."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        level, rise = math.cos(self.pitch), math.sin(self.pitch)
        return np.array(
            [[sin, -cos, 0], [cos * level, sin * level, rise], [-cos * rise, -sin * rise, level]], np.float32
        )

    @property
    def reach(self) -> tuple[float, float]:
        """Half width and half height of the image at depth 1."""
        return math.tan(self.field[0] / 2), math.tan(self.field[1] / 2)

    def image(
        self, points: Float32[np.ndarray, "*n 3"]
    ) -> tuple[Float32[np.ndarray, "*n"], Float32[np.ndarray, "*n"], Float32[np.ndarray, "*n"]]:
        """Image coordinates of points, -1 to 1 across the image (right, down), and their depth (m)."""
        seen = (points - self.origin) @ self.axes.T
        depth = np.maximum(seen[..., 1], 1e-6)
        right = seen[..., 0] / depth / np.float32(self.reach[0])
        down = -seen[..., 2] / depth / np.float32(self.reach[1])
        return right, down, seen[..., 1]


class PinholeGrid:
    """Rays of a camera; `directions` are unit vectors, their first index is x, y, z."""

    def __init__(self, camera: DepthCamera, rows: int, cols: int, rng: np.random.Generator):
        """Make the rays, each at a random place in its pixel."""
        self.origin, self._camera, self._shape = camera.origin, camera, (rows, cols)
        jitter = rng.random((2, rows, cols), np.float32)
        reach = np.array(camera.reach, np.float32)
        u = (2 * (np.arange(cols, dtype=np.float32) + jitter[0]) / cols - 1) * reach[0]
        v = (1 - 2 * (np.arange(rows, dtype=np.float32)[:, None] + jitter[1]) / rows) * reach[1]
        right, forward, up = camera.axes[:, :, None, None]
        self.directions = (forward + u * right + v * up) / np.sqrt(1 + u * u + v * v)

    def windows(self, parts: Solids) -> list[list[Window]]:
        """Bounds of the corners' projections; the whole image if some corners lie behind the camera."""
        rows, cols = self._shape
        u, v, depth = self._camera.image(corners(parts.boxes))
        first_col = np.clip(np.floor((u.min(axis=1) + 1) / 2 * cols), 0, cols).astype(int)
        last_col = np.clip(np.ceil((u.max(axis=1) + 1) / 2 * cols), 0, cols).astype(int)
        first_row = np.clip(np.floor((v.min(axis=1) + 1) / 2 * rows), 0, rows).astype(int)
        last_row = np.clip(np.ceil((v.max(axis=1) + 1) / 2 * rows), 0, rows).astype(int)
        behind = depth < _NEAREST
        found: list[list[Window]] = []
        for index in range(len(parts)):
            window = slice(first_row[index], last_row[index]), slice(first_col[index], last_col[index])
            if behind[index].any():
                window = slice(0, rows), slice(0, cols)
            seen = not behind[index].all() and all(side.start < side.stop for side in window)
            found.append([window] if seen else [])
        return found


RayGrid = SphericalGrid | PinholeGrid


@dataclass(frozen=True, eq=False)
class DepthView:
    """First hits of the rays of a grid.

    Attributes:
        distances: along the rays (m).
        points: points hit (m), in the frame of the room.
        colors: colours of the lit surface, 0-1.
        owners: object hit; -1 = the shell or a thing that is no object.
        normals: unit normals of the surface, in the frame of the room.
        facing: cosine between the ray and the surface normal; 0 = grazing.
        unoccluded: for each object, the number of rays that would hit it if nothing else were there.
    """

    distances: Float32[np.ndarray, "rows cols"]
    points: Float32[np.ndarray, "rows cols 3"]
    colors: Float32[np.ndarray, "rows cols 3"]
    owners: Int32[np.ndarray, "rows cols"]
    is_ceiling: Bool[np.ndarray, "rows cols"]
    normals: Float32[np.ndarray, "rows cols 3"]
    facing: Float32[np.ndarray, "rows cols"]
    unoccluded: Int64[np.ndarray, " k"]


def look(room: Room, grid: RayGrid) -> DepthView:
    """Cast the rays of a grid, whose origin lies in the room and in no primitive, into the room."""
    distances, faces = _shell(room, grid)
    parts = room.solids
    hit_part = np.full(distances.shape, -1, np.int32)
    unoccluded = np.zeros(len(room.boxes), np.int64)
    touched = np.zeros(distances.shape, bool)
    local_origins = parts.to_local(np.arange(len(parts)), np.broadcast_to(grid.origin, (len(parts), 3)))
    vertical = grid.directions[2]
    windows = grid.windows(parts)
    for index in range(len(parts)):
        cos, sin = math.cos(parts.yaws[index]), math.sin(parts.yaws[index])
        owner = int(parts.owners[index])
        for window in windows[index]:
            x, y = grid.directions[0][window], grid.directions[1][window]
            along, rise = x * np.float32(cos) + y * np.float32(sin), vertical[window]
            if parts.leans[index]:
                along = along - parts.leans[index] * rise
            rays = (along, y * np.float32(cos) - x * np.float32(sin), rise)
            if parts.is_ball[index]:
                enter = _enter_ball(local_origins[index], parts.halves[index], rays)
            else:
                enter = _enter(local_origins[index], parts.halves[index], rays, bool(parts.is_round[index]))
            if owner >= 0:
                touched[window] |= enter < np.inf
            nearer = enter < distances[window]
            distances[window][nearer] = enter[nearer]
            hit_part[window][nearer] = index
        if owner >= 0 and (index + 1 == len(parts) or parts.owners[index + 1] != owner):
            unoccluded[owner] = np.count_nonzero(touched)
            touched[:] = False
    points = grid.origin + np.moveaxis(grid.directions * distances, 0, -1)
    colors, owners, normals = _surface(room, points, faces, hit_part)
    facing = np.abs(np.einsum("rcx,xrc->rc", normals, grid.directions))
    return DepthView(distances, points, colors, owners, (hit_part < 0) & (faces == 5), normals, facing, unoccluded)


def _enter(origin: np.ndarray, half: np.ndarray, rays: tuple[np.ndarray, ...], is_round: bool) -> np.ndarray:
    """Distance at which rays enter a primitive, in the frame of the primitive; infinity where they miss it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / rays[2]
        middle, reach = -origin[2] * inverse, half[2] * np.abs(inverse)
        first, last = middle - reach, middle + reach
        if is_round:
            # In units of the half axes the cylinder is x^2 + y^2 <= 1.
            ox, oy = origin[0] / half[0], origin[1] / half[1]
            x, y = rays[0] / half[0], rays[1] / half[1]
            a, b = x * x + y * y, ox * x + oy * y
            root = np.sqrt(b * b - a * (ox * ox + oy * oy - 1))  # NaN where the ray passes by
            first, last = np.maximum(first, (-b - root) / a), np.minimum(last, (root - b) / a)
        else:
            for axis in (0, 1):
                inverse = 1 / rays[axis]
                middle, reach = -origin[axis] * inverse, half[axis] * np.abs(inverse)
                first, last = np.maximum(first, middle - reach), np.minimum(last, middle + reach)
        return np.where((first <= last) & (first > _NEAREST), first, np.float32(np.inf))


def _enter_ball(origin: np.ndarray, half: np.ndarray, rays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Distance at which rays enter an ellipsoid, in its frame; infinity where they miss it."""
    (x, y, z), (ox, oy, oz) = (ray / size for ray, size in zip(rays, half, strict=True)), origin / half
    a, b = x * x + y * y + z * z, ox * x + oy * y + oz * z
    with np.errstate(invalid="ignore"):
        first = (-b - np.sqrt(b * b - a * (ox * ox + oy * oy + oz * oz - 1))) / a  # NaN where the ray passes by
        return np.where(first > _NEAREST, first, np.float32(np.inf))


def _shell(room: Room, grid: RayGrid) -> tuple[np.ndarray, np.ndarray]:
    """Distance at which rays leave the room, and the number of the face (0-5) that they hit there."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ahead = grid.directions > 0
        planes = np.where(ahead, room.size[:, None, None], np.float32(0))
        reach = (planes - grid.origin[:, None, None]) / grid.directions
    reach = np.where(reach > 0, reach, np.float32(np.inf))
    axis = reach.argmin(axis=0)
    positive = np.take_along_axis(ahead, axis[None], axis=0)[0]
    return reach.min(axis=0), 2 * axis + positive


def _surface(
    room: Room, points: np.ndarray, faces: np.ndarray, hit_part: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour, owner and normal where the rays hit."""
    parts = room.solids
    normals = np.zeros(points.shape, np.float32)
    np.put_along_axis(normals, (faces // 2)[..., None], np.where(faces % 2, -1, 1)[..., None].astype(np.float32), -1)
    colors = room.shell_colors[faces]
    owners = np.full(faces.shape, -1, np.int32)
    on_part = hit_part >= 0
    hit = hit_part[on_part]
    if len(hit):
        local = parts.to_local(hit, points[on_part]) / parts.halves[hit]
        own = np.zeros_like(local)
        axis = np.abs(local).argmax(axis=1)
        side = parts.is_round[hit] & (np.abs(local[:, 2]) < 0.999)
        rows = np.arange(len(hit))
        own[rows, axis] = np.sign(local[rows, axis])
        own[parts.is_round[hit]] = (0, 0, 1)
        radial = local[side, :2] / parts.halves[hit[side], :2]
        own[side, :2] = radial / np.maximum(np.linalg.norm(radial, axis=1, keepdims=True), 1e-6)
        own[side, 2] = 0
        balls = np.flatnonzero(parts.is_ball[hit])
        outward = local[balls] / parts.halves[hit[balls]]
        own[balls] = outward / np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-6)
        leaning = np.flatnonzero(parts.leans[hit])
        own[leaning, 2] -= parts.leans[hit[leaning]] * own[leaning, 0]
        own[leaning] /= np.linalg.norm(own[leaning], axis=1, keepdims=True)
        normals[on_part] = rotate_each(own, parts.yaws[hit])
        colors[on_part] = parts.colors[hit]
        if room.lamp is not None:
            colors[on_part] *= _grain(parts.colors, parts.halves, local, hit)[:, None]
        owners[on_part] = parts.owners[hit]
    light = 0.82 + 0.18 * normals[..., 2] + 0.08 * normals[..., 0] - 0.05 * normals[..., 1]
    if room.plank:
        floor = (hit_part < 0) & (faces == 4)
        strip = np.floor(points[floor, 0] / np.float32(room.plank)).astype(np.int64)
        colors[floor] *= _STRIPS[strip % len(_STRIPS), None]
    if room.lamp is not None:
        toward = room.lamp - points
        squared = np.einsum("rcx,rcx->rc", toward, toward)
        cosine = np.einsum("rcx,rcx->rc", toward, normals) / np.sqrt(squared + 1e-4)
        light = np.float32(0.65) * light + np.float32(1.6) * np.maximum(cosine, 0) / (1 + squared / 4)
    return np.clip(colors * light[..., None], 0, 1), owners, normals


def _grain(colors: np.ndarray, halves: np.ndarray, local: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Brightness of wavy stripes on the parts hit; the colour of a part decides their width and strength."""
    seed = colors @ np.array([37.7, 91.3, 53.9], np.float32)
    strength, density = 0.14 * (seed % 1), 20 + 100 * (2.7 * seed % 1)
    place = local * halves[hit]
    bent = place[:, 1] + 0.7 * place[:, 2] + np.float32(0.05) * np.sin(9 * place[:, 0] + 7 * place[:, 2])
    return (1 + strength[hit] * np.sin(density[hit] * bent)).astype(np.float32)


def _sine(rise: Float[np.ndarray, " n"], distance: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Sine of the elevation of a point at a height above the sensor and a horizontal distance from it."""
    return rise / np.maximum(np.hypot(rise, distance), 1e-6)
