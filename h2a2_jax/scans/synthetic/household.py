"""Furniture that ScanNet, SUN RGB-D and S3DIS do not annotate and other datasets do: appliances, and small things.

Builders as those of `furniture`: primitives that fill exactly the size, centred on the z axis, standing on z = 0, the
front along +x. The order of the random draws is part of every builder.
"""

from itertools import pairwise

import numpy as np

from h2a2_jax.scans.synthetic.furniture import (
    DARK,
    FABRICS,
    LINENS,
    METAL,
    PAINTS,
    WOODS,
    Primitive,
    Size,
    legs,
    pick,
    shade,
)


def appliance(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A body with a dark window and a handle on its front: stove, oven, washer, dishwasher, microwave, printer."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    body = pick([*PAINTS, METAL, DARK], rng)
    return [
        Primitive((-x, -y, 0.0), (0.88 * x, y, height), body),
        Primitive((0.88 * x, -0.7 * y, 0.2 * height), (0.94 * x, 0.7 * y, 0.7 * height), pick([DARK, METAL], rng)),
        Primitive((0.88 * x, -0.6 * y, 0.8 * height), (x, 0.6 * y, 0.86 * height), shade(body, 0.7)),
    ]


def stool(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A round or square seat on four legs."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    seat = Primitive((-x, -y, 0.88 * height), (x, y, height), pick(FABRICS + WOODS, rng), bool(rng.random() < 0.5))
    return [seat, *legs(size, 0.88 * height, 0.04, pick([*WOODS, METAL], rng))]


def fireplace(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Two pillars and a mantel around a dark opening."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    stone = pick([*PAINTS, (0.55, 0.35, 0.28), (0.4, 0.4, 0.42)], rng)
    return [
        Primitive((-x, -0.5 * y, 0.0), (-0.2 * x, 0.5 * y, 0.7 * height), DARK),
        Primitive((-x, -0.95 * y, 0.0), (0.8 * x, -0.5 * y, 0.9 * height), stone),
        Primitive((-x, 0.5 * y, 0.0), (0.8 * x, 0.95 * y, 0.9 * height), stone),
        Primitive((-x, -0.95 * y, 0.7 * height), (0.8 * x, 0.95 * y, 0.9 * height), stone),
        Primitive((-x, -y, 0.9 * height), (x, y, height), shade(stone, 1.1)),
    ]


def screen(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A thin dark panel on a foot."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    body = pick([DARK, METAL], rng)
    return [
        Primitive((-0.3 * x, -y, 0.2 * height), (0.3 * x, y, height), DARK),
        Primitive((-0.1 * x, -0.1 * y, 0.03), (0.1 * x, 0.1 * y, 0.2 * height), body),
        Primitive((-x, -0.4 * y, 0.0), (x, 0.4 * y, 0.03), body),
    ]


def heater(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Upright ribs side by side between two rails."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    paint = pick(PAINTS, rng)
    edges = np.linspace(-y, y, max(4, round(2 * y / 0.08)) + 1).tolist()
    rails = [(-0.5 * x, low, low + 0.05) for low in (0.06 * height, 0.86 * height)]
    return [
        *(Primitive((depth, -y, low), (-depth, y, high), shade(paint, 0.9)) for depth, low, high in rails),
        *(Primitive((-x, low + 0.01, 0.0), (x, high - 0.01, height), paint) for low, high in pairwise(edges)),
        Primitive((-0.4 * x, -y, 0.1 * height), (0.4 * x, y, 0.8 * height), shade(paint, 0.8)),
    ]


def rack(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Boards between four posts, with a carton here and there."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood = pick([*WOODS, METAL], rng)
    levels = np.linspace(0.08, height, max(2, round(height / 0.4)) + 1).tolist()
    parts = [*legs(size, height, 0.03, shade(wood, 0.8))]
    parts += [Primitive((-x, -y, level - 0.03), (x, y, level), wood) for level in levels]
    for bottom, top in pairwise(levels):
        if rng.random() < 0.6:
            start = rng.uniform(-y, 0.2 * y)
            end = (0.7 * x, start + 0.7 * y, bottom + 0.7 * (top - bottom))
            parts.append(Primitive((-0.7 * x, start, bottom), end, pick(FABRICS + LINENS, rng)))
    return parts


def case(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A body with a pocket in front and a handle on top: a suitcase, a backpack."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    cloth = pick(FABRICS, rng)
    return [
        Primitive((-x, -y, 0.0), (0.6 * x, y, 0.9 * height), cloth),
        Primitive((0.6 * x, -0.7 * y, 0.1 * height), (x, 0.7 * y, 0.6 * height), shade(cloth, 1.2)),
        Primitive((-0.2 * x, -0.3 * y, 0.9 * height), (0.1 * x, 0.3 * y, height), DARK),
    ]


def slab(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """One flat body of any colour: a book, a keyboard, a pillow."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [Primitive((-x, -y, 0.0), (x, y, height), pick([*LINENS, *FABRICS, DARK], rng))]


def laptop(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """An open laptop: keys in front, a leaning screen behind."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [
        Primitive((-x, -y, 0.0), (x, y, 0.02), METAL),
        Primitive((-x, -y, 0.02), (-0.7 * x, y, height), pick([DARK, METAL], rng)),
    ]


def bottle(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A round body with a narrower neck."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    glass = pick([(0.2, 0.4, 0.25), (0.6, 0.75, 0.85), (0.75, 0.3, 0.2), *PAINTS], rng)
    neck = Primitive((-0.5 * x, -0.5 * y, 0.75 * height), (0.5 * x, 0.5 * y, height), shade(glass, 0.9), is_round=True)
    return [Primitive((-x, -y, 0.0), (x, y, 0.75 * height), glass, is_round=True), neck]


def table_lamp(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """A shade on a stem and a foot."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    return [
        Primitive((-0.6 * x, -0.6 * y, 0.0), (0.6 * x, 0.6 * y, 0.03), METAL, is_round=True),
        Primitive((-0.1 * x, -0.1 * y, 0.03), (0.1 * x, 0.1 * y, 0.55 * height), METAL, is_round=True),
        Primitive((-x, -y, 0.55 * height), (x, y, height), pick(LINENS, rng), is_round=True),
    ]
