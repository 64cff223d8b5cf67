"""Furniture from shared primitives.

Every builder takes the size (depth along x, width along y, height along z; m) and a generator, and returns
primitives that fill exactly that size, centred on the z axis and standing on z = 0. The front looks along +x, the
back (a headboard, a wall) is at -x. What looks alike in reality is built from the same parts here, whatever dataset
names it.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from h2a2_jax.inputs.synthetic.shapes import Color, Primitive

Size = tuple[float, float, float]
Builder = Callable[[Size, np.random.Generator], list[Primitive]]

_WOODS: list[Color] = [(0.55, 0.37, 0.22), (0.42, 0.27, 0.16), (0.72, 0.55, 0.36), (0.3, 0.2, 0.14), (0.8, 0.68, 0.5)]
_PAINTS: list[Color] = [(0.85, 0.84, 0.8), (0.75, 0.75, 0.76), (0.6, 0.62, 0.64), (0.9, 0.88, 0.84)]
_FABRICS: list[Color] = [
    (0.25, 0.3, 0.42),
    (0.5, 0.2, 0.18),
    (0.35, 0.36, 0.38),
    (0.62, 0.55, 0.45),
    (0.2, 0.38, 0.36),
    (0.15, 0.15, 0.17),
]
_LINENS: list[Color] = [(0.88, 0.86, 0.82), (0.65, 0.7, 0.8), (0.75, 0.55, 0.5), (0.45, 0.5, 0.62), (0.82, 0.78, 0.6)]
_METAL: Color = (0.55, 0.56, 0.58)
_DARK: Color = (0.14, 0.14, 0.15)
_CERAMIC: Color = (0.93, 0.93, 0.92)


def _pick(colors: list[Color], rng: np.random.Generator) -> Color:
    red, green, blue = np.clip(np.array(colors[rng.integers(len(colors))]) * rng.uniform(0.9, 1.1), 0, 1).tolist()
    return red, green, blue


def _shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(1.0, channel * factor) for channel in color)
    return red, green, blue


def _legs(size: Size, top: float, thickness: float, color: Color) -> list[Primitive]:
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
        Primitive((-x, -y, 0.0), (front - 0.02, y, bottom), _shade(body, 0.6)),
        Primitive((-x, -y, bottom), (front - 0.01, y, height), body),
        Primitive((-x, -y, height - 0.03), (x, y, height), _shade(body, 1.12)),
    ]
    rise, width = (height - 0.03 - bottom) / rows, 2 * y / columns
    for row in range(rows):
        for column in range(columns):
            low = (front - 0.01, -y + column * width + gap, bottom + row * rise + gap)
            high = (front, -y + (column + 1) * width - gap, bottom + (row + 1) * rise - gap)
            parts.append(Primitive(low, high, _shade(body, 0.92)))
            middle_y, middle_z = (low[1] + high[1]) / 2, (low[2] + high[2]) / 2
            handle = min(0.06, width / 5)
            parts.append(
                Primitive((front, middle_y - handle, middle_z - 0.012), (x, middle_y + handle, middle_z + 0.012), metal)
            )
    return parts


def chair(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Seat, back, and legs or a swivel foot; sometimes arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    seat = height * 0.54
    fabric = _pick(_FABRICS + _WOODS[:2], rng)
    swivel, arms = rng.random() < 0.4, rng.random() < 0.35
    thickness = 0.07 if swivel else 0.045
    inset = 0.06 if arms else 0.0
    parts = [
        Primitive((-x, -y + inset, seat - thickness), (x, y - inset, seat), fabric),
        Primitive((-x, -y + inset, seat if rng.random() < 0.6 else seat + 0.1), (-x + 0.06, y - inset, height), fabric),
    ]
    if swivel:
        parts += [
            Primitive((-0.03, -0.03, 0.06), (0.03, 0.03, seat - thickness), _METAL, is_round=True),
            Primitive((-x, -0.03, 0.0), (x, 0.03, 0.06), _DARK),
            Primitive((-0.03, -y, 0.0), (0.03, y, 0.06), _DARK),
        ]
    else:
        parts += _legs(size, seat - thickness, 0.04, _pick([*_WOODS, _METAL, _DARK], rng))
    if arms:
        arm = seat + 0.4 * (height - seat)
        for low in (-y, y - 0.05):
            parts.append(Primitive((-x + 0.06, low, arm - 0.03), (x * 0.8, low + 0.05, arm), _DARK))
            parts.append(Primitive((x * 0.3, low, seat - 0.05), (x * 0.3 + 0.04, low + 0.05, arm - 0.03), _DARK))
    return parts


def table(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A top on four legs, or a round top on a column."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood = _pick(_WOODS + _PAINTS[:2], rng)
    if rng.random() < 0.4 and max(x, y) < 1.5 * min(x, y):
        foot = min(x, y) * 0.6
        return [
            Primitive((-x, -y, height - 0.04), (x, y, height), wood, is_round=True),
            Primitive((-0.05, -0.05, 0.03), (0.05, 0.05, height - 0.04), _METAL, is_round=True),
            Primitive((-foot, -foot, 0.0), (foot, foot, 0.03), _METAL, is_round=True),
        ]
    top = Primitive((-x, -y, height - 0.04), (x, y, height), wood)
    return [top, *_legs(size, height - 0.04, 0.06, _shade(wood, 0.8))]


def desk(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A top with drawers under one end, a side panel at the other and a panel at the back."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood, side = _pick(_WOODS + _PAINTS[:2], rng), rng.choice([-1, 1])
    width = min(0.42, 0.6 * y)
    drawers = _fronts((2 * x - 0.04, width, height - 0.04), 3, 1, 0.05, _shade(wood, 0.9), _METAL)
    offset = side * (y - width / 2)
    moved = [
        part._replace(
            low=(part.low[0], part.low[1] + offset, part.low[2]),
            high=(part.high[0], part.high[1] + offset, part.high[2]),
        )
        for part in drawers
    ]
    end = (-side * y, -side * (y - 0.03))
    return [
        Primitive((-x, -y, height - 0.04), (x, y, height), wood),
        Primitive((-x, min(end), 0.0), (x - 0.04, max(end), height - 0.04), _shade(wood, 0.85)),
        Primitive((-x + 0.02, -y + 0.03, height * 0.4), (-x + 0.04, y - 0.03, height - 0.04), _shade(wood, 0.8)),
        *moved,
    ]


def sofa(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A base with cushions between a back and two arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    fabric = _pick(_FABRICS, rng)
    cushion, arm, back = _shade(fabric, 1.15), min(0.2, 0.25 * y), 0.28 * size[0]
    seat = height * 0.5
    parts = [
        Primitive((-x, -y, 0.04), (x, y, seat - 0.14), _shade(fabric, 0.85)),
        Primitive((-x, -y, 0.0), (-x + back, y, height), fabric),
        Primitive((-x, -y, 0.0), (x, -y + arm, height * 0.7), fabric),
        Primitive((-x, y - arm, 0.0), (x, y, height * 0.7), fabric),
    ]
    seats = max(1, round((2 * y - 2 * arm) / 0.7))
    edges = np.linspace(-y + arm, y - arm, seats + 1).tolist()
    for low, high in pairwise(edges):
        parts.append(Primitive((-x + back, low + 0.01, seat - 0.14), (x, high - 0.01, seat), cushion))
    return parts


def bed(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A frame, a mattress, a blanket over its lower part, pillows and a headboard."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood, linen, blanket = _pick(_WOODS, rng), _pick(_LINENS[:2], rng), _pick(_LINENS + _FABRICS, rng)
    top = height * 0.58
    parts = [
        Primitive((-x, -y, 0.0), (-x + 0.06, y, height), wood),
        Primitive((-x + 0.06, -y + 0.02, 0.06), (x - 0.02, y - 0.02, top * 0.5), wood),
        Primitive((-x + 0.06, -y + 0.03, top * 0.5), (x - 0.03, y - 0.03, top), linen),
        Primitive((-x * 0.3, -y, top * 0.45), (x, y, top + 0.02), blanket),
    ]
    pillows = 2 if y > 0.6 else 1
    edges = np.linspace(-y + 0.06, y - 0.06, pillows + 1).tolist()
    for low, high in pairwise(edges):
        parts.append(Primitive((-x + 0.1, low + 0.05, top), (-x + 0.5, high - 0.05, top + 0.13), _shade(linen, 1.1)))
    return parts


def cabinet(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A body with doors."""
    rows = 2 if size[2] > 1.2 else 1
    return _fronts(size, rows, max(1, round(size[1] / 0.5)), 0.06, _pick(_WOODS + _PAINTS, rng), _METAL)


def dresser(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A body with drawers, wider than tall ones."""
    return _fronts(size, max(3, round(size[2] / 0.27)), 2 if size[1] > 0.8 else 1, 0.08, _pick(_WOODS, rng), _METAL)


def night_stand(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A small body with two drawers, on legs."""
    wood = _pick(_WOODS, rng)
    lift = 0.12
    body = _fronts((size[0], size[1], size[2] - lift), 2, 1, 0.02, wood, _DARK)
    raised = [
        part._replace(
            low=(part.low[0], part.low[1], part.low[2] + lift), high=(part.high[0], part.high[1], part.high[2] + lift)
        )
        for part in body
    ]
    return raised + _legs(size, lift, 0.04, _shade(wood, 0.8))


def refrigerator(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A tall body with a small door over a large one."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    body, split = _pick(_PAINTS[:3], rng), height * 0.68
    return [
        Primitive((-x, -y, 0.0), (x - 0.07, y, height), _shade(body, 0.9)),
        Primitive((x - 0.07, -y, 0.05), (x - 0.03, y, split - 0.01), body),
        Primitive((x - 0.07, -y, split + 0.01), (x - 0.03, y, height), body),
        Primitive((x - 0.03, y - 0.1, split - 0.4), (x, y - 0.07, split - 0.05), _METAL),
        Primitive((x - 0.03, y - 0.1, split + 0.05), (x, y - 0.07, height - 0.1), _METAL),
    ]


def bookshelf(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """An open shelf with books and other things on its boards."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood, board = _pick(_WOODS + _PAINTS[:1], rng), 0.03
    parts = [
        Primitive((-x, -y, 0.0), (-x + 0.015, y, height), _shade(wood, 0.8)),
        Primitive((-x, -y, 0.0), (x, -y + board, height), wood),
        Primitive((-x, y - board, 0.0), (x, y, height), wood),
        Primitive((-x, -y, height - board), (x, y, height), wood),
    ]
    levels = np.linspace(0.04, height, max(3, round(height / 0.36)) + 1).tolist()
    for bottom, top in pairwise(levels):
        parts.append(Primitive((-x, -y, bottom - board), (x, y, bottom), wood))
        start = -y + board
        for _ in range(2):
            length = rng.uniform(0.3, 0.6) * (2 * y - 2 * board)
            end = min(start + length, y - board)
            if end - start > 0.05 and rng.random() < 0.85:
                rise = rng.uniform(0.5, 0.85) * (top - board - bottom)
                red, green, blue = rng.uniform(0.1, 0.8, 3).tolist()
                books = Primitive(
                    (-x + 0.015, start, bottom), (x * rng.uniform(0.2, 0.8), end, bottom + rise), (red, green, blue)
                )
                parts.append(books)
            start = end
    return parts


def toilet(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A tank at the back, a round bowl with its lid on a narrower foot."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    bowl, back = height * 0.52, -x + 0.3 * size[0]
    return [
        Primitive((-x, -y, bowl), (back, y, height), _CERAMIC),
        Primitive((-x, -y * 0.9, bowl * 0.5), (0.0, y * 0.9, bowl), _CERAMIC),
        Primitive((-x * 0.6, -y * 0.95, bowl * 0.5), (x, y * 0.95, bowl), _CERAMIC, is_round=True),
        Primitive((-x * 0.5, -y * 0.9, bowl), (x * 0.95, y * 0.9, bowl + 0.03), _shade(_CERAMIC, 0.92), is_round=True),
        Primitive((-x, -y * 0.55, 0.0), (x * 0.5, y * 0.55, bowl * 0.5), _CERAMIC),
    ]


def _basin(size: Size, rim: float, depth: float, color: Color) -> list[Primitive]:
    """An open box: four walls of thickness `rim` and a bottom at `depth` below the top."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [
        Primitive((-x, -y, 0.0), (-x + rim, y, height), color),
        Primitive((x - rim, -y, 0.0), (x, y, height), color),
        Primitive((-x, -y, 0.0), (x, -y + rim, height), color),
        Primitive((-x, y - rim, 0.0), (x, y, height), color),
        Primitive((-x, -y, 0.0), (x, y, height - depth), _shade(color, 0.95)),
    ]


def sink(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A basin with a tap at its back."""
    x, _, height = size[0] / 2, size[1] / 2, size[2]
    rim = height * 0.65
    return [
        *_basin((size[0], size[1], rim), 0.04, 0.7 * rim, _pick([_CERAMIC, _METAL], rng)),
        Primitive((-x, -0.02, rim), (-x + 0.04, 0.02, height), _METAL),
        Primitive((-x + 0.04, -0.02, height - 0.04), (-x * 0.3, 0.02, height), _METAL),
    ]


def bathtub(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A large basin."""
    return _basin(size, 0.07, 0.7 * size[2], _pick([_CERAMIC, _PAINTS[0]], rng))


def door(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A leaf in a frame, with a handle."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    leaf, frame = _pick(_WOODS + _PAINTS[:1], rng), _pick(_PAINTS, rng)
    side = (y - 0.18) * rng.choice([-1.0, 1.0])
    return [
        Primitive((-x, -y + 0.06, 0.0), (x * 0.4, y - 0.06, height - 0.06), leaf),
        Primitive((-x, -y, 0.0), (x * 0.7, -y + 0.06, height), frame),
        Primitive((-x, y - 0.06, 0.0), (x * 0.7, y, height), frame),
        Primitive((-x, -y, height - 0.06), (x * 0.7, y, height), frame),
        Primitive((x * 0.4, side - 0.06, 0.95), (x, side + 0.06, 0.99), _METAL),
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
    frame = _pick(_PAINTS, rng)
    bar = Primitive((-x, -0.03, 0.0), (x, 0.03, height), frame)
    return [*_framed(size, 0.06, frame, _pick([(0.7, 0.8, 0.9), (0.55, 0.65, 0.75)], rng)), bar]


def picture(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A coloured panel in a frame."""
    red, green, blue = rng.uniform(0.15, 0.85, 3).tolist()
    return _framed(size, 0.03, _pick([*_WOODS, _DARK], rng), (red, green, blue))


def board(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A writing board: white, green or black, in a thin frame, with a tray."""
    x, y = size[0] / 2, size[1] / 2
    panel = _pick([(0.95, 0.95, 0.95), (0.95, 0.95, 0.95), (0.15, 0.3, 0.22), (0.12, 0.12, 0.13)], rng)
    return [*_framed(size, 0.03, _METAL, panel), Primitive((-x, -y * 0.5, 0.0), (x, y * 0.5, 0.04), _METAL)]


def counter(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A worktop with a splash board at the wall."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    top, stone = 0.4 * height, _pick([*_PAINTS, (0.3, 0.3, 0.32), (0.5, 0.42, 0.36)], rng)
    return [
        Primitive((-x, -y, 0.0), (x, y, top), stone),
        Primitive((-x, -y, top), (-x + 0.03, y, height), _shade(stone, 0.9)),
    ]


def curtain(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Upright folds side by side."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    cloth = _pick(_LINENS + _FABRICS, rng)
    edges = np.linspace(-y, y, max(4, round(2 * y / 0.14)) + 1).tolist()
    return [
        Primitive((-x, low, 0.0), (x, high, height), _shade(cloth, 1.0 + 0.1 * (index % 2)), is_round=True)
        for index, (low, high) in enumerate(pairwise(edges))
    ]


def garbage_bin(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A round or square bin with a dark mouth."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    color, is_round = _pick([*_FABRICS, *_PAINTS, _METAL], rng), bool(rng.random() < 0.5)
    return [
        Primitive((-x, -y, 0.0), (x, y, height - 0.02), color, is_round),
        Primitive((-x * 0.85, -y * 0.85, 0.0), (x * 0.85, y * 0.85, height), _DARK, is_round),
    ]


def carton(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A plain box: clutter of no class."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [Primitive((-x, -y, 0.0), (x, y, height), _pick([(0.65, 0.5, 0.35), *_PAINTS, *_FABRICS], rng))]


def plant(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A pot with leaves: clutter of no class."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [
        Primitive((-x * 0.6, -y * 0.6, 0.0), (x * 0.6, y * 0.6, height * 0.3), (0.6, 0.35, 0.25), is_round=True),
        Primitive((-x, -y, height * 0.45), (x, y, height * 0.8), (0.2, 0.42, 0.18), is_round=True),
        Primitive((-x * 0.6, -y * 0.6, height * 0.8), (x * 0.6, y * 0.6, height), (0.25, 0.5, 0.2), is_round=True),
        Primitive((-0.02, -0.02, height * 0.3), (0.02, 0.02, height * 0.45), (0.35, 0.3, 0.15), is_round=True),
    ]
