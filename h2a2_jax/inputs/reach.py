"""How far a scan may reach: voxel keys are of 16 bits a coordinate, and what lies farther is no room."""

import numpy as np
from jaxtyping import Bool, Float

from h2a2_jax.inputs.scan import ScanError

MAX_REACH = 250.0
"""Largest distance of a point from the z axis and from the ground (m), and largest |number| of a box.

Voxels of 1 cm hold +-317 m; augmentation turns about z, stretches and shifts.
"""
FAR_POINTS = f"points beyond {MAX_REACH:g} m"
_STRAY_SHARE = 0.01


def within_reach(name: str, points: Float[np.ndarray, "m 3"]) -> Bool[np.ndarray, " m"]:
    """Tells which points can be used; a few stray ones do not condemn a scan, many say that its unit is another.

    Args:
        name: of the scan.
        points: metres, finite.

    Raises:
        ScanError: more than 1 % of the points lie beyond `MAX_REACH`.
    """
    with np.errstate(over="ignore"):
        near = (np.hypot(points[:, 0], points[:, 1]) <= MAX_REACH) & (np.abs(points[:, 2]) <= MAX_REACH)
    far = len(points) - int(near.sum())
    if far > _STRAY_SHARE * len(points):
        raise ScanError(
            name,
            f"Scan {name} has {far} of {len(points)} points beyond {MAX_REACH:g} m from the origin (up to "
            f"{float(np.abs(points).max()):.4g} m): check its unit (metres are expected) or centre it.",
        )
    return near


def usable_boxes(boxes: Float[np.ndarray, "g 7"]) -> tuple[Bool[np.ndarray, " g"], dict[str, int]]:
    """Tells which boxes can be learnt from.

    Args:
        boxes: centre, sizes (m), yaw (rad); any of them may be anything.

    Returns:
        Which are usable, and how many are not, by kind.
    """
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore"):
        positive = (boxes[:, 3:6] > 0).all(axis=1)
        near = (np.abs(boxes[:, :6]) <= MAX_REACH).all(axis=1)
    kinds = {
        "boxes with NaN or infinite values": ~finite,
        "boxes with a size that is not positive": finite & ~positive,
        f"boxes beyond {MAX_REACH:g} m": finite & positive & ~near,
    }
    return finite & positive & near, {kind: int(which.sum()) for kind, which in kinds.items() if which.any()}
