"""Small scans with boxes, for all tests of the viewer."""

import numpy as np

from h2a2_jax.boxes.nms import Detections
from h2a2_jax.scans.scan import Scan

NAMES = ("chair", "table", "sofa")
BOXES = np.array(
    [[1, 1, 0.5, 1, 0.6, 1, 0.4], [3, 2, 0.4, 1.2, 0.8, 0.8, 0], [2, 3, 0.3, 0.5, 0.5, 0.6, 0]], np.float32
)


def scan_of(points, colors=None, name="room"):
    points = np.asarray(points, np.float32).reshape(-1, 3)
    colors = np.full_like(points, 0.5) if colors is None else np.asarray(colors, np.float32)
    return Scan(name, points, colors, np.zeros((0, 7), np.float32), np.zeros(0, np.int32))


def room(count=2000, shift=(0, 0, 0), seed=0):
    """A floor of 4 x 4 m with points above it, in any colours."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (count, 3)) * [4, 4, 1.5]
    points[::2, 2] = 0
    return scan_of(points + shift, rng.uniform(0, 1, (count, 3)))


def found(boxes=BOXES, scores=(0.9, 0.6, 0.1), labels=(0, 1, 2)):
    return Detections(np.asarray(boxes, np.float32), np.array(scores, np.float32), np.array(labels, np.int32))


def entry(name, counts, **more):
    """Entry of a scan with some boxes of each class in a document of predictions."""
    names = [label for label, count in counts.items() for _ in range(count)]
    boxes = [
        {"center": [0, 0, 0], "size": [1, 1, 1], "yaw": 0.0, "score": 0.5 + i / 100, "label": len(label), "name": label}
        for i, label in enumerate(names)
    ]
    return {"name": name, "boxes": boxes, **more}
