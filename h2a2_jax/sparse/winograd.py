"""Matrices of one-dimensional Winograd convolution F(m, r): y = A' [(G g) * (B' d)].

m outputs of a kernel of r taps from m + r - 1 inputs with as many products, by Toom and Cook: both polynomials are
evaluated at m + r - 2 points and at infinity, multiplied there, and the transpose of that scheme is a correlation.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(4, 3), Fraction(-4, 3))
"""Points for F(4, 3): a tenth of the rounding error of the textbook's 0, +-1, +-2."""


class Transforms(NamedTuple):
    """Matrices of F(m, r), float64.

    Attributes:
        output: A', [m, m + r - 1].
        kernel: G, [m + r - 1, r].
        input: B', [m + r - 1, m + r - 1].
    """

    output: np.ndarray
    kernel: np.ndarray
    input: np.ndarray


def winograd_transforms(m: int = 4, r: int = 3, points: tuple[Fraction, ...] = POINTS) -> Transforms:
    """Matrices of F(m, r), computed in exact fractions.

    Raises:
        ValueError: not m + r - 2 distinct points.
    """
    if len(set(points)) != m + r - 2:
        raise ValueError(f"F({m}, {r}) needs {m + r - 2} distinct points, given {points}.")
    infinity = [[Fraction(int(i == n - 1)) for i in range(n)] for n in (m, r)]
    output = [[p**i for i in range(m)] for p in points] + [infinity[0]]
    kernel, inputs = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        kernel.append([p**i / scale for i in range(r)])
        inputs.append([*_polynomial(others), Fraction(0)])
    kernel.append(infinity[1])
    inputs.append(_polynomial(points))
    return Transforms(_floats(output).T, _floats(kernel), _floats(inputs))


def _polynomial(roots: tuple[Fraction, ...] | list[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the product of (x - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def _floats(rows: list[list[Fraction]]) -> np.ndarray:
    return np.array([[float(value) for value in row] for row in rows])
