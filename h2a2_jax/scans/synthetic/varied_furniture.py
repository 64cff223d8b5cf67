"""Forms of the varied rooms: rounder, thinner and more various than those of `furniture`, and things without a class.

Builders as those of `furniture`: primitives that fill the size, centred on the z axis, standing on z = 0, the front
along +x. The order of the random draws is part of every builder.
"""

import math
from collections.abc import Sequence

import numpy as np

from h2a2_jax.scans.synthetic.furniture import (
    CERAMIC,
    DARK,
    FABRICS,
    LINENS,
    METAL,
    PAINTS,
    WOODS,
    Builder,
    Color,
    Primitive,
    Size,
    legs,
    pick,
    shade,
)

_ANY: list[Color] = [*WOODS, *PAINTS, *FABRICS, *LINENS, METAL, DARK]


def any_color(rng: np.random.Generator) -> Color:
    """Draw a usual colour, one in three times one of the whole cube."""
    if rng.random() < 0.67:
        return pick(_ANY, rng)
    red, green, blue = rng.uniform(0.05, 0.95, 3).tolist()
    return red, green, blue


def _ball(center: Sequence[float], half: Sequence[float], color: Color) -> Primitive:
    """An ellipsoid by its centre and half axes (m)."""
    (x, y, z), (a, b, c) = center, half
    return Primitive((x - a, y - b, z - c), (x + a, y + b, z + c), color, is_ball=True)


def _fit(parts: list[Primitive], size: Size) -> list[Primitive]:
    """Stretch primitives so that together they fill exactly the size."""
    low, high = np.array([p.low for p in parts]), np.array([p.high for p in parts])
    middle, half = (low + high) / 2, (high - low) / 2
    turns = np.array([p.turn for p in parts])
    reach = half.copy()
    cos, sin = np.abs(np.cos(turns)), np.abs(np.sin(turns))
    reach[:, 0], reach[:, 1] = half[:, 0] * cos + half[:, 1] * sin, half[:, 0] * sin + half[:, 1] * cos
    bottom, top = (middle - reach).min(axis=0), (middle + reach).max(axis=0)
    target = np.array([-size[0] / 2, -size[1] / 2, 0.0])
    factor = np.array(size) / np.maximum(top - bottom, 1e-3)
    middle, half = (middle - bottom) * factor + target, half * factor
    lows, highs = (middle - half).tolist(), (middle + half).tolist()
    return [
        part._replace(low=tuple(a), high=tuple(b), lean=part.lean * factor[0] / factor[2])
        for part, a, b in zip(parts, lows, highs, strict=True)
    ]


def office_chair(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A star of five legs on castors, a cushioned seat, a leaning back, often arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    seat, fabric, frame = height * rng.uniform(0.46, 0.56), pick([*FABRICS, DARK, DARK], rng), pick([DARK, METAL], rng)
    radius, start = 0.95 * min(x, y), rng.uniform(0, 2 * math.pi)
    parts = []
    for angle in start + np.arange(5) * 2 * math.pi / 5:
        cx, cy, half = math.cos(angle) * radius / 2, math.sin(angle) * radius / 2, radius / 2
        low, high = (cx - half, cy - 0.02, 0.04), (cx + half, cy + 0.02, 0.09)
        parts += [
            Primitive(low, high, frame, turn=float(angle)),
            _ball((2 * cx, 2 * cy, 0.03), (0.03, 0.03, 0.03), DARK),
        ]
    parts += [
        Primitive((-0.03, -0.03, 0.08), (0.03, 0.03, seat - 0.07), METAL, is_round=True),
        Primitive((-0.75 * x, -0.8 * y, seat - 0.09), (0.85 * x, 0.8 * y, seat - 0.03), fabric),
        _ball((0.05 * x, 0.0, seat - 0.05), (0.85 * x, 0.85 * y, 0.06), fabric),
    ]
    slope, gap = rng.uniform(0.05, 0.25), rng.uniform(0.0, 0.12)
    behind = slope * (height - seat - gap)
    low = (-x, -0.75 * y, seat + gap)
    parts.append(Primitive(low, (-x + behind + 0.05, 0.75 * y, height), fabric, lean=-slope))
    parts.append(Primitive((-x + behind, -0.05, seat - 0.08), (-x + behind + 0.04, 0.05, seat + gap + 0.1), frame))
    if rng.random() < 0.7:
        rest = seat + 0.35 * (height - seat)
        for side in (-0.93 * y, 0.93 * y):
            parts.append(Primitive((-0.5 * x, side - 0.03, rest - 0.03), (0.4 * x, side + 0.03, rest), DARK))
            parts.append(Primitive((-0.1 * x, side - 0.02, seat - 0.05), (0.1 * x, side + 0.02, rest - 0.03), frame))
    return _fit(parts, size)


def armchair(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A soft seat between thick arms and a back with a cushion."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    fabric, seat = pick([*FABRICS, *LINENS], rng), height * rng.uniform(0.42, 0.52)
    arm, back = 0.3 * y, -x + 0.35 * x
    rest = seat + rng.uniform(0.3, 0.6) * (height - seat)
    parts = [
        Primitive((-x, -y, 0.06), (0.95 * x, y, seat - 0.12), shade(fabric, 0.85)),
        Primitive((-x, -0.95 * y, 0.06), (back, 0.95 * y, height - 0.05), fabric),
        _ball((back, 0.0, height - 0.25 * height), (0.15, 0.85 * y, 0.25 * height), fabric),
        _ball((0.25 * x, 0.0, seat - 0.07), (0.8 * x, y - 0.6 * arm, 0.11), shade(fabric, 1.1)),
        *legs((2 * x, 2 * y, 0.0), 0.08, 0.05, pick(WOODS, rng)),
    ]
    for low in (-y, y - arm):
        parts.append(Primitive((-x, low, 0.06), (0.9 * x, low + arm, rest - 0.05), fabric))
        parts.append(_ball((0.0, low + arm / 2, rest - 0.06), (0.95 * x, 0.6 * arm, 0.08), fabric))
    return _fit(parts, size)


def folding_chair(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A thin seat and back on thin legs: all that a coarse scan shows of it are two plates."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    color, seat = any_color(rng), height * 0.55
    lean = rng.uniform(0.1, 0.3)
    behind = lean * (height - seat)
    return _fit(
        [
            Primitive((-0.8 * x, -0.9 * y, seat - 0.03), (x, 0.9 * y, seat), color),
            Primitive((-x, -y, height * 0.72), (-x + 0.03 + behind / 2, y, height), color, lean=-lean),
            *legs((1.9 * x, 2 * y, 0.0), seat, 0.025, METAL),
            *(Primitive((-x, s * 0.93 * y - 0.012, seat), (-0.9 * x, s * 0.93 * y + 0.012, height), METAL)
              for s in (-1, 1)),
        ],
        size,
    )  # fmt: skip


def soft_sofa(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Round cushions on a base between arms; cushions that lie about."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    fabric = pick([*FABRICS, *LINENS, *WOODS[:2]], rng)
    seat, arm, back = height * rng.uniform(0.42, 0.55), rng.uniform(0.08, 0.25), -x + rng.uniform(0.15, 0.25)
    rest = seat + rng.uniform(0.1, 0.7) * (height - seat)
    lift = rng.uniform(0.0, 0.12)
    parts = [
        Primitive((-x, -y, lift), (0.96 * x, y, seat - 0.14), shade(fabric, 0.85)),
        Primitive((-x, -y + 0.02, lift), (back, y - 0.02, height * rng.uniform(0.85, 0.97)), fabric),
        *legs((2 * x, 2 * y, 0.0), max(lift, 0.01), 0.05, pick(WOODS, rng)),
    ]
    for low in (-y, y - arm):
        parts.append(Primitive((-x, low, lift), (0.94 * x, low + arm, rest), fabric))
        parts.append(_ball((0.0, low + arm / 2, rest), (0.97 * x, 0.65 * arm, 0.06), fabric))
    count = max(1, round((2 * y - 2 * arm) / rng.uniform(0.6, 0.9)))
    edges = np.linspace(-y + arm, y - arm, count + 1)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        middle, half = (low + high) / 2, (high - low) / 2
        parts.append(
            _ball(((back + x) / 2, middle, seat - 0.08), ((x - back) / 2, 1.05 * half, 0.1), shade(fabric, 1.1))
        )
        rise = (height - seat) * 0.55
        parts.append(_ball((back + 0.06, middle, seat + rise), (0.12, 1.02 * half, rise * 0.85), fabric))
    return _fit([*parts, *_cushions((back + 0.15, 0.6 * x), 0.8 * y, seat + 0.02, rng)], size)


def corner_sofa(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A sofa with a second seat along one side: an L."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    fabric, seat, deep = pick([*FABRICS, *LINENS], rng), height * rng.uniform(0.45, 0.55), rng.uniform(0.8, 0.95)
    side = rng.choice([-1.0, 1.0])
    inner = -x + min(deep, 1.2 * x)
    low_y, high_y = (-y, -y + deep) if side < 0 else (y - deep, y)
    outer = (-y, -y + 0.2) if side < 0 else (y - 0.2, y)
    end = (x if rng.random() < 0.6 else 0.0, outer[1], height * rng.uniform(0.7, 1.0))
    middle, half = ((inner + x) / 2, (low_y + high_y) / 2, seat - 0.08), ((x - inner) / 2, deep / 2, 0.1)
    parts = [
        Primitive((-x, -y, 0.03), (inner, y, seat - 0.1), shade(fabric, 0.85)),
        Primitive((inner, low_y, 0.03), (x, high_y, seat - 0.1), shade(fabric, 0.85)),
        Primitive((-x, -y, 0.03), (-x + 0.2, y, height), fabric),
        Primitive((-x, outer[0], 0.03), end, fabric),
        _ball(((inner - x) / 2 + 0.1, 0.0, seat - 0.08), ((inner + x) / 2, y, 0.1), shade(fabric, 1.1)),
        _ball(middle, half, shade(fabric, 1.1)),
    ]
    return _fit([*parts, *_cushions((-x + 0.25, inner - 0.2), 0.8 * y, seat + 0.02, rng)], size)


def _cushions(along: tuple[float, float], width: float, level: float, rng: np.random.Generator) -> list[Primitive]:
    """Up to four cushions on a seat, any way up."""
    found = []
    for _ in range(int(rng.integers(0, 5))):
        half = rng.uniform(0.15, 0.25), rng.uniform(0.15, 0.25), rng.uniform(0.05, 0.1)
        center = rng.uniform(*along) if along[1] > along[0] else along[0], rng.uniform(-width, width), level + half[2]
        found.append(_ball(center, half, any_color(rng)))
    return found


def made_bed(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A mattress under a rumpled duvet, pillows, a head board and often a foot board with posts."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood, linen, cover = pick([*WOODS, *PAINTS, *FABRICS], rng), pick(LINENS, rng), any_color(rng)
    top = min(rng.uniform(0.4, 0.65), 0.8 * height)
    foot = x - 0.05 if rng.random() < 0.5 else x
    parts = [
        Primitive((-x + 0.05, -0.97 * y, rng.uniform(0.0, 0.25)), (foot, 0.97 * y, top * 0.6), shade(wood, 0.8)),
        Primitive((-x + 0.05, -0.98 * y, top * 0.5), (foot, 0.98 * y, top), linen),
        Primitive((-x, -y, 0.0), (-x + 0.05, y, height if rng.random() < 0.8 else top + 0.02), wood),
    ]
    if foot < x:
        parts.append(Primitive((foot, -y, 0.0), (x, y, top + rng.uniform(-0.1, 0.35) * (height - top)), wood))
    if rng.random() < 0.85:  # the duvet, with folds; it hangs over the sides
        start = rng.uniform(-0.4, 0.3) * x
        parts.append(Primitive((start, -y, top * rng.uniform(0.3, 0.8)), (foot, y, top + 0.03), cover))
        for _ in range(int(rng.integers(2, 8))):
            half = rng.uniform(0.15, 0.6), rng.uniform(0.15, 0.6), rng.uniform(0.03, 0.12)
            spot = rng.uniform(start, 0.8 * foot), rng.uniform(-0.6, 0.6) * y, top + 0.02
            parts.append(
                _ball(spot, (min(half[0], x / 2), min(half[1], 0.6 * y), half[2]), shade(cover, rng.uniform(0.9, 1.1)))
            )
    for row in range(1 + int(rng.random() < 0.3)):
        for middle in [-0.5 * y, 0.5 * y] if y > 0.6 else [0.0]:
            color = pick(LINENS, rng) if rng.random() < 0.7 else any_color(rng)
            half = 0.2, min(0.35, 0.45 * y), rng.uniform(0.06, 0.12)
            parts.append(_ball((-x + 0.28 + 0.25 * row, middle, top + 0.06 + 0.04 * row), half, color))
    return _fit(parts, size)


def round_table(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A round top on a foot or four legs."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood = pick([*WOODS, *PAINTS, DARK], rng)
    top = Primitive((-x, -y, height - 0.04), (x, y, height), wood, is_round=True)
    if rng.random() < 0.6:
        foot = Primitive((-0.5 * x, -0.5 * y, 0.0), (0.5 * x, 0.5 * y, 0.04), shade(wood, 0.8), is_round=True)
        return [top, foot, Primitive((-0.05, -0.05, 0.0), (0.05, 0.05, height), shade(wood, 0.8), is_round=True)]
    return [top, *legs((1.3 * x, 1.3 * y, 0.0), height - 0.04, 0.05, wood)]


def low_table(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A thick or thin top with a board below, or a closed block."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood = pick([*WOODS, *PAINTS, DARK], rng)
    if rng.random() < 0.2:
        return [Primitive((-x, -y, 0.0), (x, y, height), pick([*FABRICS, *WOODS], rng))]
    return [
        Primitive((-x, -y, height - rng.uniform(0.02, 0.1)), (x, y, height), wood),
        Primitive((-0.9 * x, -0.9 * y, 0.3 * height), (0.9 * x, 0.9 * y, 0.3 * height + 0.03), shade(wood, 0.9)),
        *legs(size, height - 0.02, rng.uniform(0.03, 0.08), wood),
    ]


def desk_with_drawers(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A top on a block of drawers and a panel or legs, sometimes a shelf above it."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood = pick([*WOODS, *PAINTS, METAL], rng)
    top = height if rng.random() < 0.75 or height < 0.7 else height - 0.02
    side, wide = rng.choice([-1.0, 1.0]), min(0.45, 0.7 * y)
    block = (-y, -y + wide) if side < 0 else (y - wide, y)
    panel = (y - 0.04, y) if side < 0 else (-y, -y + 0.04)
    parts = [
        Primitive((-x, -y, top - 0.035), (x, y, top), wood),
        Primitive((-0.95 * x, block[0], 0.02), (0.93 * x, block[1], top - 0.035), shade(wood, 0.92)),
        Primitive((-0.95 * x, panel[0], 0.0), (0.95 * x, panel[1], top - 0.035), shade(wood, 0.95)),
    ]
    if rng.random() < 0.5:
        parts.append(Primitive((-0.95 * x, -y, 0.3 * top), (-0.95 * x + 0.02, y, top - 0.035), shade(wood, 0.9)))
    for level in (0.3, 0.55, 0.8):
        handle = (block[0] + block[1]) / 2
        parts.append(
            Primitive((0.93 * x, handle - 0.07, level * top), (0.97 * x, handle + 0.07, level * top + 0.02), METAL)
        )
    return _fit(parts, size)


def open_shelf(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Boards between posts, without a back, with a few things on them."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood = pick([*WOODS, *PAINTS, METAL, DARK], rng)
    levels = np.linspace(0.1, height, max(3, round(height / rng.uniform(0.3, 0.5)))).tolist()
    parts = [*legs(size, height, 0.03, wood)]
    for bottom, top in zip([*levels], [*levels[1:], None], strict=True):
        parts.append(Primitive((-x, -y, bottom - 0.02), (x, y, bottom), wood))
        for _ in range(int(rng.integers(0, 4)) if top else 0):
            half, middle = rng.uniform(0.05, min(0.2, y)), rng.uniform(-0.8, 0.8) * y
            rise = rng.uniform(0.2, 0.9) * (top - bottom - 0.02)
            low = (-0.9 * x, max(middle - half, -y), bottom)
            high = (rng.uniform(-0.2, 0.9) * x, min(middle + half, y), bottom + rise)
            parts.append(Primitive(low, high, any_color(rng), is_round=bool(rng.random() < 0.2)))
    return _fit(parts, size)


def soft_toilet(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A bowl like an egg, its lid down or up, and a tank."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    bowl = height * rng.uniform(0.5, 0.6)
    parts = [
        Primitive((-x, -y, bowl * 0.9), (-0.55 * x, y, height), CERAMIC),
        _ball((0.15 * x, 0.0, bowl * 0.75), (0.85 * x, 0.85 * y, bowl * 0.3), CERAMIC),
        Primitive((-0.5 * x, -0.85 * y, bowl - 0.03), (x, 0.85 * y, bowl + 0.02), shade(CERAMIC, 0.95), is_round=True),
        Primitive((-0.8 * x, -0.5 * y, 0.0), (0.5 * x, 0.5 * y, bowl * 0.7), CERAMIC, is_round=True),
    ]
    if rng.random() < 0.4:
        parts.append(Primitive((-0.5 * x, -0.8 * y, bowl), (-0.42 * x, 0.8 * y, 0.98 * height), shade(CERAMIC, 0.97)))
    return _fit(parts, size)


def vase_plant(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A pot with a bush of round clumps of leaves."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    parts = [Primitive((-0.4 * x, -0.4 * y, 0.0), (0.4 * x, 0.4 * y, 0.3 * height), any_color(rng), is_round=True)]
    for _ in range(int(rng.integers(3, 9))):
        green = rng.uniform(0.2, 0.6)
        half = rng.uniform(0.2, 0.5, 2) * (x, y)
        spot = rng.uniform(-0.5, 0.5, 2) * (x, y)
        center = (*spot.tolist(), height * rng.uniform(0.4, 0.85))
        parts.append(
            _ball(center, (*half.tolist(), height * rng.uniform(0.08, 0.2)), (0.5 * green, green, 0.4 * green))
        )
    return _fit(parts, size)


def floor_lamp(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A shade on a thin stem."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    color = pick([METAL, DARK, *WOODS], rng)
    return [
        Primitive((-0.6 * x, -0.6 * y, 0.0), (0.6 * x, 0.6 * y, 0.03), color, is_round=True),
        Primitive((-0.015, -0.015, 0.0), (0.015, 0.015, 0.8 * height), color, is_round=True),
        Primitive((-x, -y, 0.8 * height), (x, y, height), pick(LINENS, rng), is_round=True),
    ]


def bicycle(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Two thin wheels, a frame, a saddle and a handle bar."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    color = any_color(rng)
    wheel = 0.33 * height + 0.1
    parts = [_ball((0.0, side * (y - wheel), wheel), (0.02, wheel, wheel), DARK) for side in (-1, 1)]
    parts += [
        Primitive((-0.02, -0.5 * y, 0.6 * height), (0.02, 0.5 * y, 0.65 * height), color),
        Primitive((-0.02, -0.1 * y, 0.3 * height), (0.02, 0.0, 0.95 * height), color),
        Primitive((-0.08, -0.25 * y, 0.92 * height), (0.08, 0.0, 0.97 * height), DARK),
        Primitive((-x, 0.45 * y, 0.95 * height), (x, 0.5 * y, height), METAL),
    ]
    return _fit(parts, size)


def heap(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """One to five bodies of any form, turn and colour in a size: clothes, bags, parcels, what lies about."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    parts = []
    for _ in range(int(rng.integers(1, 6))):
        a, b, c = rng.uniform(0.35, 1.0, 3) * (x, y, height / 2)
        cx, cy = rng.uniform(-1, 1, 2) * (x - a, y - b)
        bottom = rng.uniform(0.0, 1.0) ** 2 * (height - 2 * c)
        form = rng.random()
        parts.append(
            Primitive(
                (cx - a, cy - b, bottom), (cx + a, cy + b, bottom + 2 * c), any_color(rng),
                is_round=bool(form < 0.25), is_ball=bool(form > 0.6), turn=rng.uniform(-math.pi, math.pi),
            )
        )  # fmt: skip
    return _fit(parts, size)


def pile(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Books or papers on one another, each turned a little."""
    x, y = size[0] / 2, size[1] / 2
    count = int(rng.integers(1, 6))
    parts = []
    for level in range(count):
        a, b = rng.uniform(0.7, 1.0, 2) * (x, y)
        low = (-a, -b, size[2] * level / count)
        parts.append(Primitive(low, (a, b, size[2] * (level + 1) / count), any_color(rng), turn=rng.normal(0.0, 0.3)))
    return _fit(parts, size)


def television(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A dark panel on a foot."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [
        Primitive((-0.3 * x, -y, 0.1 * height), (0.3 * x, y, height), shade(DARK, rng.uniform(0.6, 1.6))),
        Primitive((-x, -0.4 * y, 0.0), (x, 0.4 * y, 0.03), DARK),
        Primitive((-0.2 * x, -0.06, 0.0), (0.2 * x, 0.06, 0.2 * height), DARK),
    ]


def pillar(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A closed block of any colour: shafts, boilers, wardrobes that nobody annotates."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [Primitive((-x, -y, 0.0), (x, y, height), any_color(rng), bool(rng.random() < 0.15))]


def one_of(*builders: Builder) -> Builder:
    """Return a builder that draws one of some builders for each thing."""

    def build(size: Size, rng: np.random.Generator) -> list[Primitive]:
        return builders[rng.integers(len(builders))](size, rng)

    return build
