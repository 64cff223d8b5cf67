"""Random sampling and motion of a scan, boxes with the points.

The order is TR3D's: sample, flip, rotate, scale, translate. All motion is about the origin of the scan's frame.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32

from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import Augmentation, CountSampling, FractionSampling, Sampling


def sample_points(scan: Scan, sampling: Sampling, rng: np.random.Generator) -> Scan:
    """Draw points of a scan, in random order.

    The order matters: the first point in a voxel gives the voxel its colour.

    Args:
        scan: a scan with at least one point.
        sampling: a fraction, a count (with replacement only if the scan has fewer points), or None for all points in
            their order.
        rng: source of randomness.
    """
    count = len(scan.points)
    match sampling:
        case None:
            return scan
        case FractionSampling(low, high):
            # A fraction of a tiny scan must not become no point at all.
            size = min(count, max(1, int(rng.uniform(low, high) * count)))
            chosen = rng.choice(count, size, replace=False)
        case CountSampling(size):
            chosen = rng.choice(count, size, replace=size > count)
    return dataclasses.replace(scan, points=scan.points.take(chosen, 0), colors=scan.colors.take(chosen, 0))


def augment(scan: Scan, augmentation: Augmentation, rng: np.random.Generator, *, has_yaw: bool) -> Scan:
    """Flip, rotate, scale and translate a scan at random.

    Args:
        scan: the scan; sample its points first.
        augmentation: probabilities and ranges.
        rng: source of randomness; the same state gives the same result.
        has_yaw: True if boxes may turn; if not, a rotated box becomes the axis-aligned box that encloses it.

    Returns:
        The moved scan; its `transform` includes the motion.
    """
    # All draws are made whatever the ranges, so that the stream does not depend on the recipe.
    flip_x, flip_y = rng.random(2) < (augmentation.flip_x, augmentation.flip_y)
    angle = rng.uniform(-augmentation.rotation, augmentation.rotation)
    factor = rng.uniform(*augmentation.scale)
    shift = rng.normal(0.0, augmentation.translation_std, 3)
    # The boxes move step by step; the many points move once, by the motion that results.
    none = scan.points[:0]
    moved = dataclasses.replace(scan, points=none, colors=none, transform=np.eye(4, dtype=np.float32))
    if flip_x:
        moved = mirror(moved, axis=0)
    if flip_y:
        moved = mirror(moved, axis=1)
    moved = translate(rescale(rotate(moved, angle, has_yaw=has_yaw), factor), shift)
    motion = moved.transform
    points = _transform(scan.points, motion[:3, :3], motion[:3, 3])
    return dataclasses.replace(scan, points=points, boxes=moved.boxes, transform=motion @ scan.transform)


def mirror(scan: Scan, axis: int) -> Scan:
    """Mirror a scan: x -> -x and yaw -> pi - yaw (axis 0), or y -> -y and yaw -> -yaw (axis 1)."""
    sign = np.ones(3, np.float32)
    sign[axis] = -1
    boxes = scan.boxes.copy()
    boxes[:, :3] *= sign
    turned = boxes[:, 6] != 0  # an axis-aligned box stays at yaw 0: turning it by pi changes nothing
    boxes[turned, 6] = (np.float32(np.pi) if axis == 0 else np.float32(0)) - boxes[turned, 6]
    return _move(scan, np.diag(sign), np.zeros(3, np.float32), boxes)


def rotate(scan: Scan, angle: float, *, has_yaw: bool) -> Scan:
    """Rotate a scan by `angle` (rad, counter-clockwise) about z.

    Args:
        scan: the scan.
        angle: radians.
        has_yaw: if False, each box becomes the axis-aligned box that encloses its rotated self.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32)
    boxes = scan.boxes.copy()
    boxes[:, :3] = boxes[:, :3] @ matrix.T
    if has_yaw:
        boxes[:, 6] += np.float32(angle)
    else:
        boxes[:, 3:5] = boxes[:, 3:5] @ np.abs(matrix[:2, :2]).T
    return _move(scan, matrix, np.zeros(3, np.float32), boxes)


def rescale(scan: Scan, factor: float) -> Scan:
    """Multiply all coordinates and box sizes by `factor`."""
    boxes = scan.boxes.copy()
    boxes[:, :6] *= np.float32(factor)
    return _move(scan, np.eye(3, dtype=np.float32) * np.float32(factor), np.zeros(3, np.float32), boxes)


def translate(scan: Scan, shift: np.ndarray) -> Scan:
    """Add `shift` (3 numbers, m) to all coordinates."""
    shift = shift.astype(np.float32)
    boxes = scan.boxes.copy()
    boxes[:, :3] += shift
    return _move(scan, np.eye(3, dtype=np.float32), shift, boxes)


def _move(
    scan: Scan, matrix: Float32[np.ndarray, "3 3"], shift: Float32[np.ndarray, " 3"], boxes: Float32[np.ndarray, "g 7"]
) -> Scan:
    """The scan with points at matrix @ p + shift, the given boxes, and the motion appended to its transform."""
    motion = np.eye(4, dtype=np.float32)
    motion[:3, :3], motion[:3, 3] = matrix, shift
    points = _transform(scan.points, matrix, shift)
    return dataclasses.replace(scan, points=points, boxes=boxes, transform=motion @ scan.transform)


def _transform(
    points: Float32[np.ndarray, "m 3"], matrix: Float32[np.ndarray, "3 3"], shift: Float32[np.ndarray, " 3"]
) -> Float32[np.ndarray, "m 3"]:
    # einsum, not @: waking the threads of a BLAS for a 3 x 3 matrix takes longer than the product.
    return np.add(moved := np.einsum("mj,ij->mi", points, matrix), shift, out=moved)
