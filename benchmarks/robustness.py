"""What changes of scans cost: `python -m benchmarks.robustness --weights rooms --scans 40`.

mAP at IoU .25 and .5 on held-out varied procedural scans that are changed as other sensors and other users would, given
to `Detector` as arrays, and the points of mAP lost against the same scans unchanged. Boxes of axis-aligned datasets are
annotated anew around the points that the annotation held, where a scan is turned.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np

import h2a2_jax
from benchmarks.scans import detections_of
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation.scores import evaluate_detections
from h2a2_jax.scans.scan import Scan, points_in_box
from h2a2_jax.scans.specs import DatasetSpec, dataset_spec
from h2a2_jax.scans.synthetic.furniture import rotate
from h2a2_jax.scans.synthetic.sensors import thin
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource


def _turned(scan: Scan, spec: DatasetSpec, rng: np.random.Generator) -> Scan:
    turn = rng.uniform(0, 2 * np.pi)
    boxes = scan.boxes.copy()
    boxes[:, :3] = rotate(boxes[:, :3], turn)
    boxes[:, 6] += np.float32(turn)
    if not spec.has_yaw:
        for box, before in zip(boxes, scan.boxes, strict=True):
            inside = rotate(scan.points[points_in_box(scan.points, before)], turn)
            low, high = inside.min(axis=0), inside.max(axis=0)
            box[:] = (*((low + high) / 2), *(high - low), 0.0)
    return replace(scan, points=rotate(scan.points, turn), boxes=boxes)


def _raised(by: float) -> Callable[[Scan, DatasetSpec, np.random.Generator], Scan]:
    def change(scan: Scan, spec: DatasetSpec, rng: np.random.Generator) -> Scan:
        rise = np.array([0, 0, by], np.float32)
        boxes = scan.boxes.copy()
        boxes[:, :3] += rise
        return replace(scan, points=scan.points + rise, boxes=boxes)

    return change


def _kept(share: float) -> Callable[[Scan, DatasetSpec, np.random.Generator], Scan]:
    def change(scan: Scan, spec: DatasetSpec, rng: np.random.Generator) -> Scan:
        chosen = rng.random(len(scan.points)) < share
        return replace(scan, points=scan.points[chosen], colors=scan.colors[chosen])

    return change


def _thinned(spacing: float) -> Callable[[Scan, DatasetSpec, np.random.Generator], Scan]:
    def change(scan: Scan, spec: DatasetSpec, rng: np.random.Generator) -> Scan:
        points, colors, _ = thin(scan.points, scan.colors, np.zeros(len(scan.points), np.int32), spacing)
        return replace(scan, points=points.astype(np.float32), colors=colors.astype(np.float32))

    return change


def _noisy(sigma: float) -> Callable[[Scan, DatasetSpec, np.random.Generator], Scan]:
    def change(scan: Scan, spec: DatasetSpec, rng: np.random.Generator) -> Scan:
        noise = rng.standard_normal(scan.points.shape, np.float32) * np.float32(sigma)
        return replace(scan, points=scan.points + noise)

    return change


CHANGES: dict[str, Callable[[Scan, DatasetSpec, np.random.Generator], Scan] | None] = {
    "unchanged": None,
    "any yaw": _turned,
    "floor at +0.5 m": _raised(0.5),
    "floor at -1.2 m": _raised(-1.2),
    "half of the points": _kept(0.5),
    "a quarter of the points": _kept(0.25),
    "no colours": None,
    "a point every 5 cm": _thinned(0.05),
    "a point every 7 cm": _thinned(0.07),
    "1 cm of noise": _noisy(0.01),
    "2 cm of noise": _noisy(0.02),
}


def main() -> None:
    """Predict and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="rooms", help="name, pretrained folder or run (default rooms)")
    parser.add_argument("--scans", type=int, default=40, help="scans of each dataset (default 40)")
    parser.add_argument("--scale", choices=("varied", "full", "demo"), default="varied", help="rooms (default varied)")
    parser.add_argument("--changes", choices=CHANGES, nargs="+", default=list(CHANGES), help="which (default all)")
    arguments = parser.parse_args()
    detector = h2a2_jax.Detector.from_pretrained(arguments.weights)
    datasets = detector.datasets
    found = {
        name: [_score(detector, dataset, name, arguments) for dataset in datasets]
        for name in {"unchanged": 0, **dict.fromkeys(arguments.changes)}
    }
    print("| change | " + " | ".join(datasets) + " | mean | lost |\n|---|" + "---|" * (len(datasets) + 2))
    base = np.mean(found["unchanged"], axis=0)
    for name, rows in found.items():
        mean = np.mean(rows, axis=0)
        cells = [f"{100 * low:.1f} / {100 * high:.1f}" for low, high in (*rows, mean, base - mean)]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _score(detector: h2a2_jax.Detector, dataset: str, name: str, arguments: argparse.Namespace) -> np.ndarray:
    """Score the changed scans of one dataset: mAP at .25 and .5."""
    spec = dataset_spec(dataset)
    source, change = SyntheticSource(spec, "val", arguments.scans, scale=arguments.scale), CHANGES[name]
    predicted, truth = [], []
    for index in range(arguments.scans):
        scan = source[index]
        scan = change(scan, spec, np.random.default_rng(index)) if change else scan
        colors = None if name == "no colours" else scan.colors
        boxes = detector(scan.points, colors, dataset, score=0.01, up="z")
        predicted.append(detections_of(boxes))
        truth.append(GroundTruth(scan.boxes, scan.labels))
    return np.array(evaluate_detections(predicted, truth, spec.classes, rotated=spec.has_yaw).mean_average_precision)


if __name__ == "__main__":
    main()
