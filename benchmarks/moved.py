"""mAP of a run's detector on its validation scans in other frames, units and colour scales.

    python -m benchmarks.moved --run runs/demo [--scans 16] [--moves ...]

Each procedural validation scan is changed as a file of a user's might be and given to `Detector` as arrays; the boxes
come back in the changed frame and are compared there, by the protocol of the dataset. "raw" are the untouched scans
without any of the decisions, "untouched" are those with them.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float

import h2a2_jax
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.evaluation.scores import evaluate_detections
from h2a2_jax.inference.predictor import prepare
from h2a2_jax.scans.frame import UPRIGHT
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.sources import build_source
from h2a2_jax.scans.specs import DatasetSpec

Change = Callable[[Float[np.ndarray, "m 3"]], Float[np.ndarray, "m 3"]]
"""A function from the frame of a scan (m, z up) to another frame."""


def shifted(*offset: float) -> Change:
    """A frame whose origin lies elsewhere."""
    return lambda points: points + np.array(offset)


def turned(degrees: float) -> Change:
    """A frame turned about z."""
    cos, sin = np.round([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 12)
    return lambda points: points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


MOVES: dict[str, Change] = {
    "untouched": shifted(0, 0, 0),
    **{f"z {z:+g} m": shifted(0, 0, z) for z in (0.1, 0.25, 0.48, -1.35, 110)},
    "UTM": shifted(448262.25, 5411932.5, 110.2),
    **{f"turned by {angle:g}": turned(angle) for angle in (90, 180, 270)},
    "y up": lambda points: points @ np.array(UPRIGHT["y"], np.float64),
    "mm": lambda points: points * 1000,
    "16-bit colours": shifted(0, 0, 0),
}


def evaluate(detector: h2a2_jax.Detector, scans: list[Scan], spec: DatasetSpec, name: str) -> tuple[np.ndarray, int]:
    """MAP at IoU .25 and .5 of the moved scans, and the number of boxes of score .3 and more."""
    found, truth, count = [], [], 0
    for scan in scans:
        if name == "raw":
            (boxes,) = detector.predictor.predict([prepare(replace(scan, name="scan"), spec)], spec.name)
            found.append(boxes)
        else:
            change = MOVES[name]
            colors = (scan.colors * 65535).astype(np.uint16) if name == "16-bit colours" else scan.colors
            moved = detector(change(scan.points.astype(np.float64)), colors, spec.name, score=0.01)
            found.append(_back(moved, change))
        count += int((found[-1].scores >= 0.3).sum())
        known = scan.labels >= 0
        truth.append(GroundTruth(scan.boxes[known], scan.labels[known]))
    result = evaluate_detections(found, truth, spec.classes, rotated=spec.has_yaw)
    return np.array(result.mean_average_precision), count


def _back(boxes: h2a2_jax.Boxes, change: Change) -> Detections:
    """Boxes in the frame of the untouched scan."""
    origin, axes = change(np.zeros((1, 3)))[0], change(np.eye(3)) - change(np.zeros((1, 3)))
    unit = np.linalg.norm(axes[0])
    centers = (boxes.centers - origin) @ axes.T / unit**2
    # Boxes stand upright: their sizes go with the axes of the file, their yaw with the turn about the vertical.
    sizes = boxes.sizes @ (np.abs(axes) > unit / 2).T / unit
    angle = np.arctan2(axes[0, 1], axes[0, 0]) if abs(axes[2, 2]) > unit / 2 else 0.0
    yaws = boxes.yaws
    if angle:
        yaws, sizes = boxes.yaws - angle, boxes.sizes / unit
        if not np.any(boxes.yaws):  # axis-aligned in both frames
            yaws, sizes = boxes.yaws, boxes.sizes @ (np.abs(axes) > unit / 2).T / unit
    rows = np.c_[centers, sizes, yaws].astype(np.float32)
    return Detections(rows, boxes.scores.astype(np.float32), boxes.labels.astype(np.int32))


def main() -> None:
    """Print a line for each move of each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a run on procedural scans")
    parser.add_argument("--scans", type=int, default=16, help="validation scans of each dataset")
    parser.add_argument("--moves", nargs="*", default=["raw", *MOVES])
    options = parser.parse_args()
    detector = h2a2_jax.Detector.restore(options.run)
    from h2a2_jax.checkpoint.store import read_detector

    print(f"{'dataset':10}{'frame':18}{'mAP@.25':>9}{'mAP@.5':>9}{'boxes':>7}")
    for settings in read_detector(options.run).config.datasets:
        source = build_source(settings, "val")
        spec = source.spec if hasattr(source, "spec") else detector.predictor.spec(settings.name)
        scans = [source[i] for i in range(min(options.scans, len(source)))]
        for name in options.moves:
            scores, count = evaluate(detector, scans, spec, name)
            print(f"{spec.name:10}{name:18}{scores[0]:>9.3f}{scores[1]:>9.3f}{count:>7}", flush=True)


if __name__ == "__main__":
    main()
