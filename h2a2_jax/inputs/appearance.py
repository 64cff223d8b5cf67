"""How scans and boxes look, whatever draws them: colours of points and classes, where the ceiling is cut off."""

import colorsys

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps

from h2a2_jax.inputs.examine import spread
from h2a2_jax.inputs.scan import Scan

# Vivid ones first: datasets of few classes get the most distinct colours.
_CLASS_COLORS = (
    "#e6194b #2f7ff0 #f58231 #2fa84a #b13fd6 #12b5c9 #f032c8 #b8860b #7a5cff #86b300 "
    "#a8323e #0f8a7a #ff8fa3 #5b7fa6 #c9643b #6b8e23 #d19ae6 #7fc8f8 #d4b106 #8c6d5a"
).split()
_IGNORED = (0.5, 0.5, 0.5)
_GOLDEN = 0.618034
_HEIGHT_MAP = "cividis"
_CEILING = 0.25
"""m below the highest points."""


def class_color(label: int) -> tuple[float, float, float]:
    """Colour of a class, red, green, blue in 0-1: always the same for a label, grey for -1.

    The first 20 are chosen to be told apart on light and on dark; hues of later ones go round by the golden section.
    """
    if label < 0:
        return _IGNORED
    if label < len(_CLASS_COLORS):
        red, green, blue = bytes.fromhex(_CLASS_COLORS[label][1:])
        return red / 255, green / 255, blue / 255
    return colorsys.hls_to_rgb(label * _GOLDEN % 1, (0.45, 0.6)[label % 2], 0.7)


def has_colors(scan: Scan) -> bool:
    """Whether the points' colours differ: those of files without colour are all the same."""
    return len(scan.colors) > 1 and bool(np.ptp(scan.colors, axis=0).max() > 0.02)


def height_colors(height: Float[np.ndarray, " m"]) -> Float[np.ndarray, "m 3"]:
    """Colours for heights that run from 0 to 1, dark blue to yellow; those beyond take the colour of the end."""
    return colormaps[_HEIGHT_MAP](0.15 + 0.8 * np.clip(height, 0, 1))[:, :3]


def height_limits(points: Float[np.ndarray, "m 3"]) -> tuple[float, float]:
    """Lowest and highest z (m) but for a few strays; 0 and 1 without points."""
    if not len(points):
        return 0.0, 1.0
    low, high = np.percentile(points[:, 2], [1, 99])
    return float(low), float(max(high, low + 1e-6))


def display_colors(scan: Scan) -> Float[np.ndarray, "m 3"]:
    """The scan's own colours; by height where it has none."""
    if has_colors(scan):
        return scan.colors
    low, high = height_limits(scan.points)
    return height_colors((scan.points[:, 2] - low) / (high - low))


def ceiling_cut(points: Float[np.ndarray, "m 3"]) -> float | None:
    """Height (m) above which points would hide the room from above; None where there is no ceiling."""
    if not len(points):
        return None
    low, high = np.percentile(points[:, 2], [0.2, 99.8])
    if spread(points)[2].high < 0.08 or high - low < 2:
        return None
    return float(high - _CEILING)


def below_ceiling(points: Float[np.ndarray, "m 3"]) -> Bool[np.ndarray, " m"]:
    """Tells the points below the ceiling; all where there is none."""
    cut = ceiling_cut(points)
    return np.ones(len(points), bool) if cut is None else points[:, 2] < cut
