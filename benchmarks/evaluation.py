"""Time to score the detections of a dataset, without prediction.

    python -m benchmarks.evaluation [--scans N] [--repeats N]

Random boxes: 12 annotated ones a scan, and detections scattered about them, one in five of a wrong class. The numbers
of detections are those of boxes with a score above some 0.3 and above 0.01. The first run compiles.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation import evaluate_detections

CASES = (("axis-aligned", 18, 60), ("turned", 10, 60), ("turned", 10, 400))
"""Boxes, classes and detections a scan."""


def random_scans(
    scans: int, num_classes: int, detections: int, *, rotated: bool
) -> tuple[list[Detections], list[GroundTruth]]:
    """Detections and ground truth of scans of 6 m."""
    rng = np.random.default_rng(0)
    found, there = [], []
    for _ in range(scans):
        count = 1 + rng.poisson(11)
        yaw = rng.uniform(-np.pi, np.pi, (count, 1)) * rotated
        boxes = np.concatenate([rng.uniform(0, 6, (count, 3)), rng.uniform(0.2, 2, (count, 3)), yaw], axis=1)
        labels = rng.integers(0, num_classes, count)
        source = rng.integers(0, count, rng.poisson(detections))
        noise = rng.normal(0, 0.15, (len(source), 7)) * [1, 1, 1, 1, 1, 1, rotated]
        near = boxes[source] + noise
        near[:, 3:6] = np.abs(near[:, 3:6]) + 0.05
        guessed = np.where(rng.random(len(source)) < 0.8, labels[source], rng.integers(0, num_classes, len(source)))
        scores = rng.random(len(source), np.float32)
        found.append(Detections(near.astype(np.float32), scores, guessed.astype(np.int32)))
        there.append(GroundTruth(boxes.astype(np.float32), labels.astype(np.int32)))
    return found, there


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    for boxes, num_classes, detections in CASES:
        rotated = boxes == "turned"
        found, there = random_scans(options.scans, num_classes, detections, rotated=rotated)
        names = [f"class {label}" for label in range(num_classes)]
        seconds = []
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            evaluate_detections(found, there, names, rotated=rotated, origins=np.zeros((options.scans, 2)))
            seconds.append(time.perf_counter() - start)
        print(
            f"{options.scans} scans, {boxes} boxes, {num_classes} classes, {detections} detections a scan: "
            f"{statistics.median(seconds[1:]):.2f} s (first {seconds[0]:.2f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
