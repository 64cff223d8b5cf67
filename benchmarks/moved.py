"""mAP of a run's detector on its validation scans in other frames, units and colour scales.

    python -m benchmarks.moved --run runs/demo [--scans 16] [--moves ...]

Each procedural validation scan is changed as a file of a user's might be and given to `Detector` as arrays; the boxes
come back in the changed frame and are compared in that of the scan, by the protocol of the dataset. "raw" are the
untouched scans without any of the decisions, "raw, z +0.25 m" the same moved; "untouched" are those with them. More
scans than the run validates on are made of the same kind: means of 16 scans differ by several points from one voxel
grid to another.
"""

import argparse
import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

import h2a2_jax
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.checkpoint.store import read_detector
from h2a2_jax.evaluation.scores import evaluate_detections
from h2a2_jax.inference.predictor import prepare
from h2a2_jax.scans.frame import UPRIGHT
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.sources import build_source
from h2a2_jax.scans.specs import DatasetSpec


@dataclass(frozen=True)
class Move:
    """A frame of a file: turned about z (degrees), shifted (m), with another axis up, in another unit (m)."""

    turn: float = 0.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    up: str = "z"
    unit: float = 1.0
    wide_colors: bool = False

    @property
    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Rotation from the frame of the file to that of the scan."""
        angle = math.radians(self.turn)
        cos, sin = round(math.cos(angle), 12), round(math.sin(angle), 12)
        return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) @ np.array(UPRIGHT[self.up], np.float64)

    def file_points(self, points: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
        """Points of the file."""
        return (points.astype(np.float64) @ self.axes + self.shift) / self.unit

    def scan_boxes(self, boxes: h2a2_jax.Boxes) -> Detections:
        """Boxes in the frame of the scan."""
        centers = (boxes.centers * self.unit - self.shift) @ self.axes.T
        sizes, yaws = boxes.sizes * self.unit, boxes.yaws
        if self.turn and np.any(yaws):
            yaws = yaws - math.radians(self.turn)  # sizes are along the sides of the box
        else:
            sizes = sizes @ np.abs(self.axes).T.round()
        rows = np.concatenate([centers, sizes, yaws[:, None]], axis=1).astype(np.float32)
        return Detections(rows, boxes.scores.astype(np.float32), boxes.labels.astype(np.int32))


RAW = {"raw": 0.0, "raw, z +0.25 m": 0.25}
MOVES = {
    "untouched": Move(),
    **{f"z {z:+g} m": Move(shift=(0.0, 0.0, z)) for z in (0.1, 0.25, 0.48, -1.35, 110.0)},
    "UTM": Move(shift=(448262.25, 5411932.5, 110.2)),
    **{f"turned by {angle:g}": Move(turn=angle) for angle in (90.0, 180.0, 270.0)},
    "y up": Move(up="y"),
    "mm": Move(unit=0.001),
    "16-bit colours": Move(wide_colors=True),
}


def evaluate(
    detector: h2a2_jax.Detector, scans: list[Scan], spec: DatasetSpec, name: str, up: str
) -> tuple[np.ndarray, int]:
    """Mean AP at IoU .25 and .5 of the moved scans, and the number of boxes of score .3 and more."""
    found, truth = [], []
    for scan in scans:
        if name in RAW:
            rise = np.array([0, 0, RAW[name]], np.float32)
            same = prepare(replace(scan, name="scan", points=scan.points + rise), spec)
            (raw,) = detector.predictor.predict([same], spec.name)
            raw.boxes[:, :3] -= rise
            found.append(raw)
        else:
            move = MOVES[name]
            colors = (scan.colors * 65535).astype(np.uint16) if move.wide_colors else scan.colors
            axis = up or move.up
            boxes = detector(move.file_points(scan.points), colors, spec.name, score=0.01, up=axis)
            found.append(move.scan_boxes(boxes))
        known = scan.labels >= 0
        truth.append(GroundTruth(scan.boxes[known], scan.labels[known]))
    result = evaluate_detections(found, truth, spec.classes, rotated=spec.has_yaw)
    return np.array(result.mean_average_precision), sum(int((each.scores >= 0.3).sum()) for each in found)


def main() -> None:
    """Print a line for each move of each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a run on procedural scans")
    parser.add_argument("--scans", type=int, default=16, help="scans of each dataset")
    parser.add_argument(
        "--up", choices=("", "auto"), default="", help="auto: let the up axis be found; else it is given"
    )
    parser.add_argument("--moves", nargs="*", default=[*RAW, *MOVES])
    options = parser.parse_args()
    detector = h2a2_jax.Detector.restore(options.run)
    print(f"{'dataset':10}{'frame':18}{'mAP@.25':>9}{'mAP@.5':>9}{'boxes':>7}")
    for settings in read_detector(options.run).config.datasets:
        source, spec = (
            build_source(replace(settings, val_size=options.scans), "val"),
            detector.predictor.spec(settings.name),
        )
        scans = [source[i] for i in range(options.scans)]
        for name in options.moves:
            scores, count = evaluate(detector, scans, spec, name, options.up)
            print(f"{spec.name:10}{name:18}{scores[0]:>9.3f}{scores[1]:>9.3f}{count:>7}", flush=True)


if __name__ == "__main__":
    main()
