"""Furniture from cuboids, elliptic cylinders, upright or leaning, and ellipsoids.

Every builder takes the size (depth along x, width along y, height along z; m) and a generator, and returns primitives
that fill exactly that size, centred on the z axis and standing on z = 0. The front looks along +x, the back (such as a
headboard) is at -x. A builder whose name ends in `_plain` makes the simpler form for the small rooms of scale "demo".

The order of the random draws is part of every builder: a change gives other scans for the same seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

Color = tuple[float, float, float]
"""Red, green, blue in 0-1."""


class Primitive(NamedTuple):
    """One primitive in the frame of its object, given by its bounds.

    Attributes:
        low: smallest x, y, z (m); `high` has the largest.
        is_round: an elliptic cylinder about z that fills the bounds, rather than a cuboid.
        lean: shift of the top along x relative to the bottom, per metre of height; all horizontal sections are equal,
            and the bounds enclose the whole primitive.
        is_ball: an ellipsoid that fills the bounds.
        turn: rotation (rad) about the vertical through the middle of the bounds, which are those before it.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    color: Color
    is_round: bool = False
    lean: float = 0.0
    is_ball: bool = False
    turn: float = 0.0

    def shift(self, y: float = 0.0, z: float = 0.0) -> "Primitive":
        """Move sideways and up (m)."""
        (x0, y0, z0), (x1, y1, z1) = self.low, self.high
        return self._replace(low=(x0, y0 + y, z0 + z), high=(x1, y1 + y, z1 + z))


@dataclass(frozen=True, eq=False)
class Solids:
    """Many primitives in one frame, as arrays.

    Attributes:
        centers: gravity centres (m).
        halves: half sizes along the primitive's axes (m); of a leaning one those of its horizontal section and height.
        yaws: rotation about z (rad, counter-clockwise).
        leans: shift along the primitive's x axis per metre of height.
        owners: object that a primitive belongs to; -1 = none that is annotated.
    """

    centers: Float32[np.ndarray, "n 3"]
    halves: Float32[np.ndarray, "n 3"]
    yaws: Float32[np.ndarray, " n"]
    colors: Float32[np.ndarray, "n 3"]
    is_round: Bool[np.ndarray, " n"]
    leans: Float32[np.ndarray, " n"]
    owners: Int32[np.ndarray, " n"]
    is_ball: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.yaws)

    @property
    def boxes(self) -> Float32[np.ndarray, "n 7"]:
        """Boxes around the primitives: centre, sizes, yaw."""
        sizes = 2 * self.halves
        sizes[:, 0] += 2 * np.abs(self.leans) * self.halves[:, 2]
        return np.concatenate([self.centers, sizes, self.yaws[:, None]], axis=1)

    def to_local(self, index: Int[np.ndarray, " m"], points: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
        """Transform points (m) into the frames of primitives, where each is upright and centred on the origin."""
        local = rotate_each(points - self.centers[index], -self.yaws[index])
        local[:, 0] -= self.leans[index] * local[:, 2]
        return local

    def to_common(self, index: Int[np.ndarray, " m"], local: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
        """Invert `to_local`."""
        leaning = local.copy()
        leaning[:, 0] += self.leans[index] * local[:, 2]
        return rotate_each(leaning, self.yaws[index]) + self.centers[index]

    def place(self, position: Float[np.ndarray, " 3"], yaw: float, owner: int) -> "Solids":
        """Rotate the primitives by `yaw` (rad) about the origin, move them to `position` (m) and set their owner."""
        return replace(
            self,
            centers=rotate(self.centers, yaw) + position.astype(np.float32),
            yaws=self.yaws + np.float32(yaw),
            owners=np.full(len(self), owner, np.int32),
        )


def rotate(points: Float32[np.ndarray, "m 3"], yaw: float) -> Float32[np.ndarray, "m 3"]:
    """Rotate points about z by `yaw` (rad, counter-clockwise)."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)


def rotate_each(vectors: Float[np.ndarray, "*m 3"], yaws: Float[np.ndarray, "*#m"]) -> Float[np.ndarray, "*m 3"]:
    """Rotate each vector about z by its own yaw (rad, counter-clockwise)."""
    cos, sin = np.cos(yaws), np.sin(yaws)
    x = vectors[..., 0] * cos - vectors[..., 1] * sin
    y = vectors[..., 1] * cos + vectors[..., 0] * sin
    return np.stack([x, y, vectors[..., 2]], axis=-1)


def make_solids(primitives: Sequence[Primitive]) -> Solids:
    """Turn a list of primitives into arrays, in the frame of their object and without owner."""
    low = np.array([p.low for p in primitives], np.float32).reshape(-1, 3)
    high = np.array([p.high for p in primitives], np.float32).reshape(-1, 3)
    leans = np.array([p.lean for p in primitives], np.float32)
    halves = (high - low) / 2
    halves[:, 0] -= np.abs(leans) * halves[:, 2]
    count = len(primitives)
    return Solids(
        centers=(low + high) / 2,
        halves=halves,
        yaws=np.array([p.turn for p in primitives], np.float32),
        colors=np.array([p.color for p in primitives], np.float32).reshape(-1, 3),
        is_round=np.array([p.is_round for p in primitives], bool),
        leans=leans,
        owners=np.full(count, -1, np.int32),
        is_ball=np.array([p.is_ball for p in primitives], bool),
    )


def join_solids(parts: Sequence[Solids]) -> Solids:
    """Concatenate sets of primitives that are given in one frame."""
    return Solids(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Solids)))


def corners(boxes: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, "n 8 3"]:
    """Corners of boxes given as centre, sizes, yaw."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], boxes.dtype)
    return rotate_each(signs * boxes[:, None, 3:6] / 2, boxes[:, 6, None]) + boxes[:, None, :3]


Size = tuple[float, float, float]
Builder = Callable[[Size, np.random.Generator], list[Primitive]]

WOODS: list[Color] = [(0.55, 0.37, 0.22), (0.42, 0.27, 0.16), (0.72, 0.55, 0.36), (0.3, 0.2, 0.14), (0.8, 0.68, 0.5)]
PAINTS: list[Color] = [(0.85, 0.84, 0.8), (0.75, 0.75, 0.76), (0.6, 0.62, 0.64), (0.9, 0.88, 0.84)]
FABRICS: list[Color] = [
    (0.25, 0.3, 0.42), (0.5, 0.2, 0.18), (0.35, 0.36, 0.38), (0.62, 0.55, 0.45), (0.2, 0.38, 0.36), (0.15, 0.15, 0.17),
]  # fmt: skip
LINENS: list[Color] = [(0.88, 0.86, 0.82), (0.65, 0.7, 0.8), (0.75, 0.55, 0.5), (0.45, 0.5, 0.62), (0.82, 0.78, 0.6)]
METAL: Color = (0.55, 0.56, 0.58)
DARK: Color = (0.14, 0.14, 0.15)
CERAMIC: Color = (0.93, 0.93, 0.92)


def pick(colors: list[Color], rng: np.random.Generator) -> Color:
    """Choose one of some colours and make it a little lighter or darker."""
    red, green, blue = np.clip(np.array(colors[rng.integers(len(colors))]) * rng.uniform(0.9, 1.1), 0, 1).tolist()
    return red, green, blue


def shade(color: Color, factor: float) -> Color:
    """Make a colour lighter or darker by a factor."""
    red, green, blue = (min(1.0, channel * factor) for channel in color)
    return red, green, blue


def legs(size: Size, top: float, thickness: float, color: Color) -> list[Primitive]:
    """Four legs under the corners of a footprint, from the floor to `top`."""
    x, y = size[0] / 2, size[1] / 2
    return [
        Primitive((x0, y0, 0.0), (x0 + thickness, y0 + thickness, top), color)
        for x0 in (-x, x - thickness)
        for y0 in (-y, y - thickness)
    ]


def _fronts(size: Size, rows: int, columns: int, bottom: float, body: Color, metal: Color) -> list[Primitive]:
    """A closed body with a grid of doors or drawers, each with a handle, on its front."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    gap, front = 0.012, x - 0.03
    parts = [
        Primitive((-x, -y, 0.0), (front - 0.02, y, bottom), shade(body, 0.6)),
        Primitive((-x, -y, bottom), (front - 0.01, y, height), body),
        Primitive((-x, -y, height - 0.03), (x, y, height), shade(body, 1.12)),
    ]
    rise, width = (height - 0.03 - bottom) / rows, 2 * y / columns
    for row in range(rows):
        for column in range(columns):
            low = (front - 0.01, -y + column * width + gap, bottom + row * rise + gap)
            high = (front, -y + (column + 1) * width - gap, bottom + (row + 1) * rise - gap)
            parts.append(Primitive(low, high, shade(body, 0.92)))
            y0, z0, handle = (low[1] + high[1]) / 2, (low[2] + high[2]) / 2, min(0.06, width / 5)
            parts.append(Primitive((front, y0 - handle, z0 - 0.012), (x, y0 + handle, z0 + 0.012), metal))
    return parts


def chair(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Seat and reclined back: a plain panel or slats between posts, on four legs or a swivel foot; sometimes arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    seat, fabric, frame = height * 0.54, pick(FABRICS + WOODS[:2], rng), pick([*WOODS, METAL, DARK], rng)
    swivel, arms, slats = rng.random() < 0.4, rng.random() < 0.35, rng.random() < 0.4
    thickness, inset = (0.08 if swivel else 0.045), (0.06 if arms else 0.0)
    slope, width = rng.uniform(0.08, 0.25), y - inset  # slope of the back: metres backwards per metre of height

    def upright(left: float, right: float, low: float, high: float, depth: float, color: Color) -> Primitive:
        behind = slope * (height - high), slope * (height - low)
        return Primitive((-x + behind[0], left, low), (-x + behind[1] + depth, right, high), color, lean=-slope)

    front = -x + slope * (height - seat)
    parts = [Primitive((min(front, -x + 0.1), -width, seat - thickness), (x, width, seat), fabric)]
    if slats and not swivel:
        parts += [upright(low, low + 0.04, seat, height, 0.04, frame) for low in (-width, width - 0.04)]
        for level in (0.3, 0.6, 0.88):
            low = seat + level * (height - seat)
            parts.append(upright(-width + 0.04, width - 0.04, low, low + 0.12 * (height - seat), 0.025, frame))
    else:
        parts.append(upright(-width, width, seat if rng.random() < 0.5 else seat + 0.1, height, 0.05, fabric))
        parts.append(upright(-0.04, 0.04, seat - thickness, seat + 0.12, 0.03, frame))
    if swivel:
        parts += [
            Primitive((-0.03, -0.03, 0.06), (0.03, 0.03, seat - thickness), METAL, is_round=True),
            Primitive((-x, -0.03, 0.03), (x, 0.03, 0.08), DARK),
            Primitive((-0.03, -y, 0.03), (0.03, y, 0.08), DARK),
        ]
        for a, b in ((-x, -0.03), (x - 0.06, -0.03), (-0.03, -y), (-0.03, y - 0.06)):
            parts.append(Primitive((a, b, 0.0), (a + 0.06, b + 0.06, 0.06), DARK, is_round=True))
    else:
        parts += legs(size, seat - thickness, 0.04, frame)
    if arms:
        arm = seat + 0.4 * (height - seat)
        for low in (-y, y - 0.05):
            parts.append(Primitive((-x + slope * (height - arm), low, arm - 0.03), (x * 0.8, low + 0.05, arm), DARK))
            parts.append(Primitive((x * 0.3, low, seat - 0.05), (x * 0.3 + 0.04, low + 0.05, arm - 0.03), DARK))
    return parts


def table(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A top on four legs, or a round top on a column."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood = pick(WOODS + PAINTS[:2], rng)
    if rng.random() < 0.4 and max(x, y) < 1.5 * min(x, y):
        foot = min(x, y) * 0.6
        return [
            Primitive((-x, -y, height - 0.04), (x, y, height), wood, is_round=True),
            Primitive((-0.05, -0.05, 0.03), (0.05, 0.05, height - 0.04), METAL, is_round=True),
            Primitive((-foot, -foot, 0.0), (foot, foot, 0.03), METAL, is_round=True),
        ]
    top = Primitive((-x, -y, height - 0.04), (x, y, height), wood)
    return [top, *legs(size, height - 0.04, 0.06, shade(wood, 0.8))]


def desk(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A top with drawers under one end, a side panel at the other and a panel at the back."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood, side = pick(WOODS + PAINTS[:2], rng), rng.choice([-1, 1])
    width = min(0.42, 0.6 * y)
    drawers = _fronts((2 * x - 0.04, width, height - 0.04), 3, 1, 0.05, shade(wood, 0.9), METAL)
    offset = side * (y - width / 2)
    end = (-side * y, -side * (y - 0.03))
    return [
        Primitive((-x, -y, height - 0.04), (x, y, height), wood),
        Primitive((-x, min(end), 0.0), (x - 0.04, max(end), height - 0.04), shade(wood, 0.85)),
        Primitive((-x + 0.02, -y + 0.03, height * 0.4), (-x + 0.04, y - 0.03, height - 0.04), shade(wood, 0.8)),
        *(part.shift(y=offset) for part in drawers),
    ]


def sofa(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A base on feet with cushions between a back, on which reclined cushions rest, and two arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    fabric = pick(FABRICS, rng)
    cushion, arm, back = shade(fabric, 1.15), min(rng.uniform(0.12, 0.24), 0.25 * y), 0.16 * size[0]
    seat, rest, pillow = height * 0.5, height * rng.uniform(0.62, 0.72), shade(pick(FABRICS + LINENS, rng), 1.1)
    parts = [
        Primitive((-x, -y + arm, 0.08), (x - 0.02, y - arm, seat - 0.14), shade(fabric, 0.85)),
        Primitive((-x, -y, 0.08), (-x + back, y, height), fabric),
        Primitive((-x, -y, 0.08), (x, -y + arm, rest), fabric),
        Primitive((-x, y - arm, 0.08), (x, y, rest), fabric),
        *legs(size, 0.08, 0.06, DARK),
    ]
    seats, slope = max(1, round((2 * y - 2 * arm) / 0.7)), 0.25
    depth = 0.12 * size[0] + slope * 0.45 * height
    for low, high in pairwise(np.linspace(-y + arm, y - arm, seats + 1).tolist()):
        parts.append(Primitive((-x + back, low + 0.01, seat - 0.14), (x, high - 0.01, seat), cushion))
        bottom, top = (-x + back - 0.02, low + 0.015, seat), (-x + back + depth, high - 0.015, 0.96 * height)
        parts.append(Primitive(bottom, top, cushion, lean=-slope))
    if rng.random() < 0.5:
        side = rng.choice([-1.0, 1.0]) * (y - arm - 0.22)
        start = -x + back + 0.6 * depth
        parts.append(Primitive((start, side - 0.2, seat), (start + 0.22, side + 0.2, seat + 0.32), pillow, lean=-0.4))
    return parts


def bed(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A frame, a mattress, a blanket over its lower part, pillows and a headboard."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood, linen, blanket = pick(WOODS, rng), pick(LINENS[:2], rng), pick(LINENS + FABRICS, rng)
    top = height * 0.58
    parts = [
        Primitive((-x, -y, 0.0), (-x + 0.06, y, height), wood),
        Primitive((-x + 0.06, -y + 0.02, 0.06), (x - 0.02, y - 0.02, top * 0.5), wood),
        Primitive((-x + 0.06, -y + 0.03, top * 0.5), (x - 0.03, y - 0.03, top), linen),
        Primitive((-x * 0.3, -y, top * 0.45), (x, y, top + 0.02), blanket),
    ]
    pillows = 2 if y > 0.6 else 1
    for low, high in pairwise(np.linspace(-y + 0.06, y - 0.06, pillows + 1).tolist()):
        parts.append(Primitive((-x + 0.1, low + 0.05, top), (-x + 0.5, high - 0.05, top + 0.13), shade(linen, 1.1)))
    return parts


def cabinet(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A body with doors."""
    rows = 2 if size[2] > 1.2 else 1
    return _fronts(size, rows, max(1, round(size[1] / 0.5)), 0.06, pick(WOODS + PAINTS, rng), METAL)


def dresser(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A body with drawers, wider than tall ones."""
    return _fronts(size, max(3, round(size[2] / 0.27)), 2 if size[1] > 0.8 else 1, 0.08, pick(WOODS, rng), METAL)


def night_stand(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A small body with two drawers, on legs."""
    wood = pick(WOODS, rng)
    lift = 0.12
    body = _fronts((size[0], size[1], size[2] - lift), 2, 1, 0.02, wood, DARK)
    return [*(part.shift(z=lift) for part in body), *legs(size, lift, 0.04, shade(wood, 0.8))]


def refrigerator(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A tall body with a small door over a large one, a dark seam around both and upright handles."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    body, split = pick(PAINTS[:3], rng), height * 0.68
    return [
        Primitive((-x, -y, 0.05), (x - 0.09, y, height), shade(body, 0.92)),
        Primitive((-x + 0.03, -y + 0.03, 0.0), (x - 0.07, y - 0.03, height - 0.02), DARK),
        Primitive((x - 0.08, -y, 0.07), (x - 0.04, y, split - 0.015), body),
        Primitive((x - 0.08, -y, split + 0.015), (x - 0.04, y, height), body),
        Primitive((x - 0.04, y - 0.12, split - 0.4 * split), (x, y - 0.08, split - 0.06), DARK),
        Primitive((x - 0.04, y - 0.12, split + 0.06), (x, y - 0.08, height - 0.08), DARK),
    ]


def _shelf_body(size: Size, board: float, wood: Color) -> tuple[list[Primitive], list[float]]:
    """Back, sides and top of a shelf, and the heights (m) of its boards and top."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    parts = [
        Primitive((-x, -y, 0.0), (-x + 0.015, y, height), shade(wood, 0.8)),
        Primitive((-x, -y, 0.0), (x, -y + board, height), wood),
        Primitive((-x, y - board, 0.0), (x, y, height), wood),
        Primitive((-x, -y, height - board), (x, y, height), wood),
    ]
    return parts, np.linspace(0.04, height, max(3, round(height / 0.36)) + 1).tolist()


def bookshelf(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """An open shelf with rows of books on its boards, here and there a gap."""
    x, y = size[0] / 2, size[1] / 2
    wood, board = pick(WOODS + PAINTS[:1], rng), 0.03
    parts, levels = _shelf_body(size, board, wood)
    for bottom, top in pairwise(levels):
        parts.append(Primitive((-x, -y, bottom - board), (x, y, bottom), wood))
        start, clear = -y + board, top - board - bottom
        front, full = x * rng.uniform(0.2, 0.7), rng.uniform(0.55, 0.9)
        while start < y - board - 0.06:
            end = min(start + rng.uniform(0.06, 0.2), y - board)
            if rng.random() < 0.8:
                red, green, blue = rng.uniform(0.1, 0.8, 3).tolist()
                rise = clear * min(full * rng.uniform(0.8, 1.1), 0.95)
                parts.append(Primitive((-x + 0.015, start, bottom), (front, end, bottom + rise), (red, green, blue)))
            start = end
    return parts


def toilet(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A tank at the back, a round bowl with its lid on a narrower foot."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    bowl, back = height * 0.52, -x + 0.3 * size[0]
    return [
        Primitive((-x, -y, bowl), (back, y, height), CERAMIC),
        Primitive((-x, -y * 0.9, bowl * 0.5), (0.0, y * 0.9, bowl), CERAMIC),
        Primitive((-x * 0.6, -y * 0.95, bowl * 0.5), (x, y * 0.95, bowl), CERAMIC, is_round=True),
        Primitive((-x * 0.5, -y * 0.9, bowl), (x * 0.95, y * 0.9, bowl + 0.03), shade(CERAMIC, 0.92), is_round=True),
        Primitive((-x, -y * 0.55, 0.0), (x * 0.5, y * 0.55, bowl * 0.5), CERAMIC),
    ]


def _basin(size: Size, rim: float, depth: float, color: Color) -> list[Primitive]:
    """An open box: four walls of thickness `rim` and a bottom at `depth` below the top."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [
        Primitive((-x, -y, 0.0), (-x + rim, y, height), color),
        Primitive((x - rim, -y, 0.0), (x, y, height), color),
        Primitive((-x, -y, 0.0), (x, -y + rim, height), color),
        Primitive((-x, y - rim, 0.0), (x, y, height), color),
        Primitive((-x, -y, 0.0), (x, y, height - depth), shade(color, 0.95)),
    ]


def sink(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A basin with a tap at its back."""
    x, _, height = size[0] / 2, size[1] / 2, size[2]
    rim = height * 0.65
    return [
        *_basin((size[0], size[1], rim), 0.04, 0.7 * rim, pick([CERAMIC, METAL], rng)),
        Primitive((-x, -0.02, rim), (-x + 0.04, 0.02, height), METAL),
        Primitive((-x + 0.04, -0.02, height - 0.04), (-x * 0.3, 0.02, height), METAL),
    ]


def bathtub(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A large basin with a sloping back rest at one end and a tap at the other."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    color, bottom = pick([CERAMIC, PAINTS[0]], rng), 0.3 * height
    return [
        *_basin(size, 0.07, 0.7 * height, color),
        Primitive((-0.03, -y + 0.02, bottom), (0.03, -y + 0.16, 0.92 * height), METAL),
        Primitive((-0.05, -y + 0.06, 0.6 * height), (0.05, -y + 0.1, 0.7 * height), METAL),
        *(
            Primitive(
                (-x + 0.07, y - 0.07 - step * 0.05, bottom), (x - 0.07, y - 0.06, height * (0.8 - 0.12 * step)), color
            )
            for step in (1, 2, 3)
        ),
    ]


def door(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A leaf in a frame, with a handle."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    leaf, frame = pick(WOODS + PAINTS[:1], rng), pick(PAINTS, rng)
    side = (y - 0.18) * rng.choice([-1.0, 1.0])
    return [
        Primitive((-x, -y + 0.06, 0.0), (x * 0.4, y - 0.06, height - 0.06), leaf),
        Primitive((-x, -y, 0.0), (x * 0.7, -y + 0.06, height), frame),
        Primitive((-x, y - 0.06, 0.0), (x * 0.7, y, height), frame),
        Primitive((-x, -y, height - 0.06), (x * 0.7, y, height), frame),
        Primitive((x * 0.4, side - 0.06, 0.95), (x, side + 0.06, 0.99), METAL),
    ]


def _framed(size: Size, bar: float, frame: Color, inner: Color) -> list[Primitive]:
    """A thin panel in a frame that stands out from it."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [
        Primitive((-x, -y, 0.0), (0.0, y, height), inner),
        Primitive((-x, -y, 0.0), (x, -y + bar, height), frame),
        Primitive((-x, y - bar, 0.0), (x, y, height), frame),
        Primitive((-x, -y, 0.0), (x, y, bar), frame),
        Primitive((-x, -y, height - bar), (x, y, height), frame),
    ]


def window(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Panes in a frame with a bar in the middle."""
    x, height = size[0] / 2, size[2]
    frame = pick(PAINTS, rng)
    bar = Primitive((-x, -0.03, 0.0), (x, 0.03, height), frame)
    return [*_framed(size, 0.06, frame, pick([(0.7, 0.8, 0.9), (0.55, 0.65, 0.75)], rng)), bar]


def picture(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A painting in a frame: ground, sky and something round."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    sky, ground, thing = (tuple(rng.uniform(0.15, 0.85, 3).tolist()) for _ in range(3))
    level, middle = height * rng.uniform(0.3, 0.55), rng.uniform(-0.4, 0.4) * y
    return [
        *_framed(size, min(0.03, 0.2 * y), pick([*WOODS, DARK], rng), sky),
        Primitive((-x, -0.9 * y, 0.02), (0.1 * x, 0.9 * y, level), ground),
        Primitive((-x, middle - 0.3 * y, level * 0.6), (0.2 * x, middle + 0.3 * y, level * 1.4), thing),
    ]


def board(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A writing board: white, green or black, in a thin frame, with a tray."""
    x, y = size[0] / 2, size[1] / 2
    panel = pick([(0.95, 0.95, 0.95), (0.95, 0.95, 0.95), (0.15, 0.3, 0.22), (0.12, 0.12, 0.13)], rng)
    return [*_framed(size, 0.03, METAL, panel), Primitive((-x, -y * 0.5, 0.0), (x, y * 0.5, 0.04), METAL)]


def counter(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A worktop with a splash board at the wall."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    top, stone = 0.4 * height, pick([*PAINTS, (0.3, 0.3, 0.32), (0.5, 0.42, 0.36)], rng)
    return [
        Primitive((-x, -y, 0.0), (x, y, top), stone),
        Primitive((-x, -y, top), (-x + 0.03, y, height), shade(stone, 0.9)),
    ]


def curtain(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Upright folds side by side."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    cloth = pick(LINENS + FABRICS, rng)
    edges = np.linspace(-y, y, max(4, round(2 * y / 0.14)) + 1).tolist()
    return [
        Primitive((-x, low, 0.0), (x, high, height), shade(cloth, 1.0 + 0.1 * (index % 2)), is_round=True)
        for index, (low, high) in enumerate(pairwise(edges))
    ]


def garbage_bin(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A round or square bin with a dark mouth."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    color, is_round = pick([*FABRICS, *PAINTS, METAL], rng), bool(rng.random() < 0.5)
    return [
        Primitive((-x, -y, 0.0), (x, y, height - 0.02), color, is_round),
        Primitive((-x * 0.85, -y * 0.85, 0.0), (x * 0.85, y * 0.85, height), DARK, is_round),
    ]


def carton(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A plain box: clutter of no class."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [Primitive((-x, -y, 0.0), (x, y, height), pick([(0.65, 0.5, 0.35), *PAINTS, *FABRICS], rng))]


def plant(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A pot with leaning leaves: clutter of no class."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    parts = [Primitive((-x * 0.6, -y * 0.6, 0.0), (x * 0.6, y * 0.6, height * 0.3), (0.6, 0.35, 0.25), is_round=True)]
    for index, (low, high) in enumerate(pairwise(np.linspace(-y, y, 6).tolist())):
        green, side = rng.uniform(0.35, 0.55), 1 if index % 2 else -1
        top = height * (1.0 if index < 2 else rng.uniform(0.75, 1.0))
        start, end = (0.0, x) if side > 0 else (-x, 0.0)
        lean, color = side * (x - 0.04) / (top - 0.3 * height), (0.4 * green, green, 0.35 * green)
        parts.append(Primitive((start, low, 0.3 * height), (end, high, top), color, lean=lean))
    return parts


def chair_plain(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Seat, back, and legs or a swivel foot; sometimes arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    seat, fabric = height * 0.54, pick(FABRICS + WOODS[:2], rng)
    swivel, arms = rng.random() < 0.4, rng.random() < 0.35
    thickness, inset = (0.07 if swivel else 0.045), (0.06 if arms else 0.0)
    parts = [
        Primitive((-x, -y + inset, seat - thickness), (x, y - inset, seat), fabric),
        Primitive((-x, -y + inset, seat if rng.random() < 0.6 else seat + 0.1), (-x + 0.06, y - inset, height), fabric),
    ]
    if swivel:
        parts += [
            Primitive((-0.03, -0.03, 0.06), (0.03, 0.03, seat - thickness), METAL, is_round=True),
            Primitive((-x, -0.03, 0.0), (x, 0.03, 0.06), DARK),
            Primitive((-0.03, -y, 0.0), (0.03, y, 0.06), DARK),
        ]
    else:
        parts += legs(size, seat - thickness, 0.04, pick([*WOODS, METAL, DARK], rng))
    if arms:
        arm = seat + 0.4 * (height - seat)
        for low in (-y, y - 0.05):
            parts.append(Primitive((-x + 0.06, low, arm - 0.03), (x * 0.8, low + 0.05, arm), DARK))
            parts.append(Primitive((x * 0.3, low, seat - 0.05), (x * 0.3 + 0.04, low + 0.05, arm - 0.03), DARK))
    return parts


def sofa_plain(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A base with cushions between a back and two arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    fabric = pick(FABRICS, rng)
    cushion, arm, back = shade(fabric, 1.15), min(0.2, 0.25 * y), 0.28 * size[0]
    seat = height * 0.5
    parts = [
        Primitive((-x, -y, 0.04), (x, y, seat - 0.14), shade(fabric, 0.85)),
        Primitive((-x, -y, 0.0), (-x + back, y, height), fabric),
        Primitive((-x, -y, 0.0), (x, -y + arm, height * 0.7), fabric),
        Primitive((-x, y - arm, 0.0), (x, y, height * 0.7), fabric),
    ]
    seats = max(1, round((2 * y - 2 * arm) / 0.7))
    for low, high in pairwise(np.linspace(-y + arm, y - arm, seats + 1).tolist()):
        parts.append(Primitive((-x + back, low + 0.01, seat - 0.14), (x, high - 0.01, seat), cushion))
    return parts


def bookshelf_plain(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """An open shelf with books and other things on its boards."""
    x, y = size[0] / 2, size[1] / 2
    wood, board = pick(WOODS + PAINTS[:1], rng), 0.03
    parts, levels = _shelf_body(size, board, wood)
    for bottom, top in pairwise(levels):
        parts.append(Primitive((-x, -y, bottom - board), (x, y, bottom), wood))
        start = -y + board
        for _ in range(2):
            length = rng.uniform(0.3, 0.6) * (2 * y - 2 * board)
            end = min(start + length, y - board)
            if end - start > 0.05 and rng.random() < 0.85:
                rise = rng.uniform(0.5, 0.85) * (top - board - bottom)
                red, green, blue = rng.uniform(0.1, 0.8, 3).tolist()
                corner = (x * rng.uniform(0.2, 0.8), end, bottom + rise)
                parts.append(Primitive((-x + 0.015, start, bottom), corner, (red, green, blue)))
            start = end
    return parts


PLAIN_BUILDERS: dict[str, Builder] = {"chair": chair_plain, "sofa": sofa_plain, "bookshelf": bookshelf_plain}
"""Simpler forms by the name of the kind: small scans cannot show more, and training recipes are tuned on them."""
