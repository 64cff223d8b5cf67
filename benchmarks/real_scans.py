"""Boxes that a detector finds in the two labelled real scans: `python -m benchmarks.real_scans --weights rooms`.

scene0000_00 of ScanNet (27 boxes) and frame 17 of SUN RGB-D (2 boxes) lie in H2A2_SCANS_DIR, as the demo folder of
mmdetection3d has them. Of the first 30 boxes by score, those count as found that have the class and more than the
IoU of an annotated box. Nothing is trained on these scans, and nothing is chosen by them: look seldom.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

import numpy as np

import h2a2_jax
from benchmarks.scans import detections_of
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation.scores import evaluate_detections
from h2a2_jax.scans.specs import SCANNET, SUNRGBD
from h2a2_jax.untrusted.restricted_pickle import load_plain_pickle

FIRST = 30
_SCANS = (
    (SCANNET, "scene0000_00.bin", "scannet_infos.pkl", 255.0),
    (SUNRGBD, "000017.bin", "sunrgbd_000017_infos.pkl", 1.0),
)


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="rooms", help="name, pretrained folder or run (default rooms)")
    parser.add_argument(
        "--output", type=Path, help="folder for a page of each scan with the boxes of score .3 and more"
    )
    arguments = parser.parse_args()
    root = Path(os.environ["H2A2_SCANS_DIR"])
    detector = h2a2_jax.Detector.from_pretrained(arguments.weights)
    totals = np.zeros(4)
    for spec, file, infos, scale in _SCANS:
        rows = np.fromfile(root / file, "<f4").reshape(-1, 6)
        info = load_plain_pickle(root / infos)
        entry = (info["data_list"] if isinstance(info, dict) else info)[0]
        points, truth = rows[:, :3], _truth(entry)
        if "axis_align_matrix" in entry:
            matrix = np.array(entry["axis_align_matrix"], np.float32).reshape(4, 4)
            points = points @ matrix[:3, :3].T + matrix[:3, 3]
        boxes = detector(points, rows[:, 3:] / scale, spec.name, score=0.01, up="z")
        found = detections_of(boxes[:FIRST])
        matches = evaluate_detections([found], [truth], spec.classes, rotated=spec.has_yaw).matches
        hits = matches.is_hit.sum(axis=1)
        count = len(found.scores)
        totals += (*hits, len(truth.labels), count)
        print(f"{file}: {len(truth.labels)} boxes; of the first {count} found {hits[0]} at .25, {hits[1]} at .5")
        known = Counter(spec.classes[label] for label in truth.labels.tolist())
        right = Counter(spec.classes[label] for label in matches.labels[matches.is_hit[0]].tolist())
        right_half = Counter(spec.classes[label] for label in matches.labels[matches.is_hit[1]].tolist())
        given = Counter(spec.classes[label] for label in found.labels.tolist())
        for name, count in known.most_common():
            print(f"  {name:15} {count} annotated, {given[name]} given, {right[name]} at .25, {right_half[name]} at .5")
        others = {name: count for name, count in given.items() if name not in known}
        print(f"  given beside: {others}; scores {found.scores.min():.2f} to {found.scores.max():.2f}")
        sure = int((found.scores >= 0.3).sum())
        right_of_sure = int(matches.is_hit[0][matches.scores >= 0.3].sum())
        print(f"  of {sure} with a score of .3 and more {right_of_sure} are right")
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
            boxes[boxes.scores >= 0.3].save(arguments.output / f"{Path(file).stem}.html")
    share = totals[0] / totals[3]
    print(f"both: {totals[0]:.0f} and {totals[1]:.0f} of {totals[2]:.0f} at .25 and .5; precision at .25 {share:.2f}")


def _truth(entry: dict) -> GroundTruth:  # type: ignore[type-arg]
    """Annotated boxes of an info file of version 2, with a yaw of 0 where it has none."""
    known = [one for one in entry["instances"] if one["bbox_label_3d"] >= 0]
    boxes = np.zeros((len(known), 7), np.float32)
    for row, one in zip(boxes, known, strict=True):
        row[: len(one["bbox_3d"])] = one["bbox_3d"]
    return GroundTruth(boxes, np.array([one["bbox_label_3d"] for one in known], np.int32))


if __name__ == "__main__":
    main()
