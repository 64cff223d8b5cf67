"""Camera and renderer of points and lines in NumPy."""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

VIEWS = {"oblique": (-1.99, 0.88, False), "top": (-math.pi / 2, math.pi / 2, True)}
"""Yaw and pitch (rad) of the direction from the target to the eye, and True for parallel projection."""

_HALF_HEIGHT = math.tan(math.radians(20))  # of the picture at distance 1: a vertical field of view of 40 degrees
_ROUNDS = 6
_AIR = 1.03
_NEAREST = 1e-3  # m
_NEAR = 0.05  # m
_LARGEST = 28  # pixels
_ROUND = 0.3  # of a point's squared width: between a disc and a square, so that a regular grid shows no gaps
_SHADING = 9.0
_STEEPEST = 0.03  # of the depth, per neighbour
_NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
_TOLERANCE = 0.02  # m by which a line may lie behind points and still count as visible
_DASH, _PERIOD = 6.0, 10.0  # pixels, for lines one pixel wide and more


@dataclass(frozen=True)
class Camera:
    """Camera that looks at a target; z points up in the picture."""

    axes: Float[np.ndarray, "3 3"]  # unit vectors as rows: right, up in the picture, towards the eye
    target: Float[np.ndarray, " 3"]  # m, in the middle of the picture
    distance: float  # from the target to the eye (m); sets only the scale in parallel projection
    parallel: bool
    width: int  # pixels
    height: int

    @property
    def pixels_per_metre(self) -> float:
        """Scale at the distance of the target."""
        return self.height / (2 * self.distance * _HALF_HEIGHT)

    def project(self, points: Float[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
        """Project points (m) to pixels from the left and from the top, meaningless for points behind the eye.

        The second result is the distance (m) in front of the eye along the optical axis.
        """
        right, up, towards = ((points - self.target) @ self.axes.T).T
        depth = self.distance - towards
        scale = self.pixels_per_metre
        if not self.parallel:
            scale = scale * self.distance / np.maximum(depth, _NEAREST)
        return np.stack([self.width / 2 + right * scale, self.height / 2 - up * scale], axis=1), depth


def camera_for(
    low: Float[np.ndarray, " 3"], high: Float[np.ndarray, " 3"], view: str, width: int, height: int
) -> Camera:
    """Place the nearest camera of a view (a key of `VIEWS`) that sees the whole of an axis-aligned box.

    The box is given by its lowest and its highest corner (m), the size of the picture in pixels.
    """
    yaw, pitch, parallel = VIEWS[view]
    east, north, level, rise = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    axes = np.array([[-north, east, 0], [-rise * east, -rise * north, level], [level * east, level * north, rise]])
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(-1, 3).astype(np.float64)
    camera = Camera(axes, corners.mean(axis=0), 1.0, parallel, width, height)
    half = np.array([_HALF_HEIGHT * width / height, _HALF_HEIGHT])
    for _ in range(_ROUNDS):
        seen = (corners - camera.target) @ axes.T
        reach = np.abs(seen[:, :2]) / half + (0 if parallel else seen[:, 2:])
        camera = replace(camera, distance=float(_AIR * reach.max()))
        # In perspective the middle of the box is not the middle of its picture.
        pixels, _ = camera.project(corners)
        off = ((pixels.min(axis=0) + pixels.max(axis=0)) / 2 - [width / 2, height / 2]) / camera.pixels_per_metre
        camera = replace(camera, target=camera.target + off[0] * axes[0] - off[1] * axes[1])
    return camera


@dataclass(frozen=True)
class Canvas:
    """Unfinished picture."""

    colors: Float[np.ndarray, "h w 3"]  # 0-1
    depth: Float[np.ndarray, "h w"]  # distance in front of the eye (m); infinite where there is no point


def draw_points(
    camera: Camera,
    points: Float[np.ndarray, "m 3"],
    colors: Float[np.ndarray, "m 3"],
    diameter: float,
    background: tuple[float, float, float],
) -> Canvas:
    """Draw points (m) as discs of a diameter (m), near ones over far ones; colours are 0-1."""
    pixels, depth = camera.project(points)
    seen = (depth > _NEAR) | camera.parallel
    seen &= ((pixels > -_LARGEST) & (pixels < np.array([camera.width, camera.height]) + _LARGEST)).all(axis=1)
    order = np.flatnonzero(seen)
    order = order[np.argsort(-depth[order], kind="stable")]  # the last one wins
    pixels, depth = pixels[order], depth[order]
    scale = camera.pixels_per_metre * (np.ones_like(depth) if camera.parallel else camera.distance / depth)
    width = np.clip(np.ceil(diameter * scale), 1, _LARGEST).astype(np.int64)
    corner = np.floor(pixels - (width[:, None] - 1) / 2).astype(np.int64)
    winner = np.full(camera.width * camera.height, -1)
    for size in np.unique(width):
        _stamp(winner, camera, corner[width == size], np.flatnonzero(width == size), int(size))
    found = winner >= 0
    picture = np.full((len(winner), 3), background, np.float32)
    picture[found] = colors[order[winner[found]]]
    far = np.full(len(winner), np.inf, np.float32)
    far[found] = depth[winner[found]]
    return Canvas(picture.reshape(camera.height, camera.width, 3), far.reshape(camera.height, camera.width))


def _stamp(winner: np.ndarray, camera: Camera, corner: np.ndarray, ranks: np.ndarray, size: int) -> None:
    """Write the ranks of points of one width, in ascending order, into pixels that hold no higher rank."""
    steps = np.arange(size) - (size - 1) / 2
    whole = ((corner >= 0) & (corner + size <= [camera.width, camera.height])).all(axis=1)
    first = corner[whole, 1] * camera.width + corner[whole, 0]
    cut, ranks, ranks_cut = corner[~whole], ranks[whole], ranks[~whole]

    def write(cells: np.ndarray, own: np.ndarray) -> None:
        nearer = winner[cells] < own
        winner[cells[nearer]] = own[nearer]  # of several the last is kept, which is the nearest

    for step in np.argwhere(steps[:, None] ** 2 + steps**2 <= _ROUND * max(size, 2) ** 2):
        write(first + (step[1] * camera.width + step[0]), ranks)
        if len(cut):
            cells, inside = _pixel_index(camera, cut + step)
            write(cells[inside], ranks_cut[inside])


def shade(canvas: Canvas, radius: int, reference: float | None = None) -> Canvas:
    """Darken pixels that lie behind their neighbours at a radius in pixels (eye-dome lighting, Boucheny 2009).

    Steps in depth are relative to the reference (m), by default to the depth of each pixel.
    """
    depth = np.where(np.isfinite(canvas.depth), canvas.depth, np.float32(1e9))
    scale = depth if reference is None else np.float32(reference)
    height, width = depth.shape
    padded = np.pad(depth, radius, mode="edge")
    step = np.zeros_like(depth)
    for i, j in _NEIGHBOURS:
        y, x = radius * (1 + i), radius * (1 + j)
        step += np.clip((depth - padded[y : y + height, x : x + width]) / scale, 0, _STEEPEST)
    dark = np.where(np.isfinite(canvas.depth), np.exp(-_SHADING * step), 1).astype(np.float32)
    return Canvas(canvas.colors * dark[..., None], canvas.depth)


@dataclass(frozen=True)
class Lines:
    """Lines of one width and style, in the order in which they are drawn: later ones cover earlier ones."""

    ends: Float[np.ndarray, "k 2 3"]  # m
    colors: Float[np.ndarray, "k 3"]  # 0-1
    width: float  # pixels
    dashed: bool = False


def draw_lines(
    canvas: Canvas,
    camera: Camera,
    lines: Lines,
    *,
    visible: float,
    hidden: float,
    halo: tuple[float, float, float] | None = None,
) -> None:
    """Draw lines into a picture, whose colours are changed in place.

    `visible` is the opacity of the parts in front of the points, `hidden` that of the others. The halo is the colour of
    a seam on either side of the visible parts; None for no seam.
    """
    pixels, depth, line, side, along = _samples(camera, lines.ends)
    if lines.dashed:
        drawn = along % (_PERIOD * lines.width) < _DASH * lines.width
        pixels, depth, line, side = (values[drawn] for values in (pixels, depth, line, side))
    cells, inside = _pixel_index(camera, pixels)
    before = np.zeros(len(depth), bool)
    before[inside] = depth[inside] <= canvas.depth.reshape(-1)[cells[inside]] * 1.003 + _TOLERANCE
    flat = canvas.colors.reshape(-1, 3)

    def brush(chosen: np.ndarray, colors: np.ndarray, width: float, opacity: float) -> None:
        """Paint samples with a brush as wide as the line; where lines meet, the last one paints once."""
        painted = np.full(len(flat), -1, np.int32)
        middles, across, own = pixels[chosen], side[chosen], line[chosen]
        for off in np.linspace(-(width - 1) / 2, (width - 1) / 2, max(1, int(np.ceil(width * 1.3)))):
            cells, inside = _pixel_index(camera, middles + off * across)
            painted[cells[inside]] = own[inside]
        found = np.flatnonzero(painted >= 0)
        flat[found] += opacity * (colors[painted[found]].astype(np.float32) - flat[found])

    if halo is not None:
        brush(before, np.broadcast_to(np.array(halo), lines.colors.shape), 1.8 * lines.width, 0.5 * visible)
    brush(~before, lines.colors, lines.width, hidden)
    brush(before, lines.colors, lines.width, visible)


def _samples(camera: Camera, ends: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sample lines at every pixel: pixels, depth, line, unit vector across the line, pixels from its start."""
    (start, from_depth), (end, to_depth) = camera.project(ends[:, 0]), camera.project(ends[:, 1])
    if not camera.parallel:
        ends, kept = _clip_at_eye(ends, from_depth, to_depth)
        (start, from_depth), (end, to_depth) = camera.project(ends[:, 0]), camera.project(ends[:, 1])
    else:
        kept = np.arange(len(ends))
    # Lines that leave the picture far behind are sampled over a few of its widths only.
    length = np.minimum(np.linalg.norm(end - start, axis=1), 4.0 * (camera.width + camera.height))
    counts = np.ceil(1.3 * length).astype(np.int64) + 2
    row = np.repeat(np.arange(len(ends)), counts)
    share = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) / (counts[row] - 1)
    pixels = start[row] + share[:, None] * (end - start)[row]
    if camera.parallel:
        depth = from_depth[row] + share * (to_depth - from_depth)[row]
    else:  # in perspective the inverse of the depth is linear in the picture
        depth = 1 / (1 / from_depth[row] + share * (1 / to_depth - 1 / from_depth)[row])
    across = (end - start)[:, ::-1] * [-1, 1] / np.maximum(np.linalg.norm(end - start, axis=1, keepdims=True), 1e-9)
    return pixels, depth, kept[row], across[row], share * length[row]


def _clip_at_eye(ends: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, Int[np.ndarray, " k"]]:
    """Cut lines where they come too near the eye; returns their ends and the rows of the lines that are left."""
    kept = np.flatnonzero(np.maximum(first, second) > _NEAR)
    ends, first, second = ends[kept].astype(np.float64), first[kept], second[kept]
    for own, depth, other in ((0, first, second), (1, second, first)):
        near = depth < _NEAR
        share = (_NEAR - depth[near]) / (other[near] - depth[near])
        ends[near, own] += share[:, None] * (ends[near, 1 - own] - ends[near, own])
    return ends, kept


def _pixel_index(camera: Camera, pixels: np.ndarray) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Flat index of each pixel, and a mask of the pixels inside of the picture."""
    x, y = np.floor(pixels).astype(np.int64).T
    inside = (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
    return y * camera.width + x, inside
