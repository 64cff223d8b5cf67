"""Simpler forms of some furniture, of fewer parts: what the small rooms of the demo hold.

Small scans cannot show more, and a training recipe is tuned on them: they stay as they are.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from h2a2_jax.scans.synthetic.furniture import DARK, FABRICS, METAL, PAINTS, WOODS, Builder, Size, legs, pick, shade
from h2a2_jax.scans.synthetic.shapes import Primitive


def chair(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """Seat, back, and legs or a swivel foot; sometimes arms."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    seat = height * 0.54
    fabric = pick(FABRICS + WOODS[:2], rng)
    swivel, arms = rng.random() < 0.4, rng.random() < 0.35
    thickness = 0.07 if swivel else 0.045
    inset = 0.06 if arms else 0.0
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


def sofa(size: Size, rng: np.random.Generator) -> list[Primitive]:
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
    edges = np.linspace(-y + arm, y - arm, seats + 1).tolist()
    for low, high in pairwise(edges):
        parts.append(Primitive((-x + back, low + 0.01, seat - 0.14), (x, high - 0.01, seat), cushion))
    return parts


def bookshelf(size: Size, rng: np.random.Generator) -> list[Primitive]:
    """An open shelf with books and other things on its boards."""
    x, y, height = size[0] / 2, size[1] / 2, size[2]
    wood, board = pick(WOODS + PAINTS[:1], rng), 0.03
    parts = [
        Primitive((-x, -y, 0.0), (-x + 0.015, y, height), shade(wood, 0.8)),
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


BUILDERS: Mapping[str, Builder] = {"chair": chair, "sofa": sofa, "bookshelf": bookshelf}
"""By the name of the kind."""
