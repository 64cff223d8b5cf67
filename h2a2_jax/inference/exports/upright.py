"""Points and boxes in metres, z up, near the origin: the frame of programs that compute in float32."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.scans.frame import UNITS, UPRIGHT

MOST_POINTS = 2_000_000
"""Points that a file for viewing holds; more are thinned evenly."""
_FAR = 1000.0  # m, beyond which a float32 loses a tenth of a millimetre


@dataclass(frozen=True, eq=False)
class Upright:
    """Points and boxes in the axes of their input, turned upright, in metres, relative to an origin.

    Attributes:
        origin: place of the origin (m), 0 unless the scan lies a kilometre and more away; whole metres.
        centers: middles of the boxes (m).
        sizes: sizes along the boxes' own axes (m).
        rotations: rotations of the boxes: a corner is center + rotation @ (+-dx/2, +-dy/2, +-dz/2).
        points: x, y, z (m).
        colors: red, green, blue; by height where the points have none.
    """

    origin: Float[np.ndarray, " 3"]
    centers: Float[np.ndarray, "n 3"]
    sizes: Float[np.ndarray, "n 3"]
    rotations: Float[np.ndarray, "n 3 3"]
    points: Float[np.ndarray, "m 3"]
    colors: UInt8[np.ndarray, "m 3"]


def upright(boxes: Boxes, most_points: int = MOST_POINTS) -> Upright:
    """Turn boxes and their points upright."""
    from h2a2_jax.viewer.content import display_colors  # here, for training loads this package and draws nothing

    metres, to_scan = UNITS[boxes.unit], boxes.to_scan
    turn = np.array(UPRIGHT[boxes.up], np.float64) if boxes.alignment is None else boxes.alignment
    centers = metres * boxes.centers @ turn.T
    from_scan = metres * turn @ np.linalg.inv(to_scan[:3, :3])
    shift = -from_scan @ to_scan[:3, 3]
    scan, every = boxes.scan, len(boxes.scan.points)
    if every > most_points:
        kept = np.arange(most_points) * every // most_points
        scan = replace(scan, points=scan.points[kept], colors=scan.colors[kept])
    places = scan.points.astype(np.float64) @ from_scan.T
    middle = np.median(places, axis=0) + shift if every else np.median(centers, axis=0) if len(boxes) else np.zeros(3)
    origin = np.round(middle) * bool(np.abs(middle).max() > _FAR)
    colors = np.round(255 * np.clip(display_colors(scan), 0, 1)).astype(np.uint8)
    return Upright(
        origin,
        centers - origin,
        metres * boxes.sizes.astype(np.float64),
        turn @ boxes.rotations,
        (places + (shift - origin)).astype(np.float32),
        colors,
    )


def plain_text(text: str) -> str:
    """Return a text in one line, without control characters and lone surrogates."""
    encoded = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else " " for letter in encoded)
