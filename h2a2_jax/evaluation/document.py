"""Results of an evaluation as files: evaluation.json and evaluation.csv.

Schema of evaluation.json, version 1, an entry per dataset; null stands for what is not defined, such as the AP of a
class without ground truth. Shares are from 0 to 1.

    {
      "scannet": {
        "version": 1,
        "thresholds": [                          one per IoU threshold
          {
            "iou": 0.25,
            "mAP": 0.71, "mAR": 0.88,            means over the classes with ground truth
            "AP": {"chair": 0.9, ...}, "AR": {...},
            "curves": {"chair": [1.0, ...]},     precision at recall 0, 0.01, ... 1: the best there or beyond
            "best_f1": {                         the score to keep boxes from for the greatest F1
              "chair": {"score": 0.4, "precision": 0.8, "recall": 0.7, "f1": 0.75}, ...
            },
            "best_f1_of_all": {...},             likewise, one score for all classes
            "calibration": [                     by tenths of the score
              {"score": 0.05, "precision": 0.02, "detections": 812}, ...
            ]
          }
        ],
        "num_ground_truth": {"chair": 1368, ...}, "num_detections": {...},
        "classes_left_out": ["counter"],         from the means, for want of ground truth
        "by_size": {                             by volume
          "bounds": [0.1, 0.5], "unit": "m3", "from": null,
          "bins": [{"name": "small", "num_ground_truth": {...}, "thresholds": [{"iou", "mAP", "AP"}]}, ...]
        },
        "by_distance": {..., "from": "sensor"},  likewise, horizontal, from the sensor or the centre of the scan
        "scans": 312, "skipped": {"scene0001_00": "why"},
        ["protocol": {"split": "val", ...},]     what was asked for
        ["cross": {                              by the dataset whose head predicted (`h2a2_jax.inference.cross`)
          "s3dis": {
            "classes": {"bookshelf": "bookcase"},          of this dataset: of the head
            "without_counterpart": ["bed", ...],           classes of this dataset that the head does not have
            "unused": ["board"],                           classes of the head that this dataset does not have
            "thresholds": [{"iou", "mAP", "own_mAP", "AP"}]   own: this dataset's head, over the same classes
          }
        }]
      }
    }

evaluation.csv has a row per dataset, threshold and class, and one of the means, called "(mean)".
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from h2a2_jax.files import whole_file

JSON_FILE = "evaluation.json"
CSV_FILE = "evaluation.csv"
MEAN = "(mean)"


def write_evaluation(folder: Path, documents: Mapping[str, Any]) -> None:
    """Write both files, each in one go; where evaluation.json is there, so is the other.

    Args:
        folder: Made if missing.
        documents: By dataset, see the schema.
    """
    for name, text in ((CSV_FILE, evaluation_csv(documents)), (JSON_FILE, evaluation_json(documents))):
        with whole_file(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="")


def evaluation_json(documents: Mapping[str, Any]) -> str:
    """The documents as JSON, lists of numbers on a line of their own."""
    text = json.dumps(documents, indent=2, allow_nan=False)
    return re.sub(r"\[\s+([-+.,\deE\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def evaluation_csv(documents: Mapping[str, Any]) -> str:
    """The documents as a table; cells are empty where a figure is not defined."""
    rows = [row for name, document in documents.items() for row in _rows(name, document)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _rows(dataset: str, document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    truth, detections = document["num_ground_truth"], document["num_detections"]
    for t, level in enumerate(document["thresholds"]):
        for name in (*truth, MEAN):
            is_mean = name == MEAN
            point = level["best_f1_of_all"] if is_mean else level["best_f1"][name]
            row = {
                "dataset": dataset,
                "iou": level["iou"],
                "class": name,
                "ground_truth": sum(truth.values()) if is_mean else truth[name],
                "detections": sum(detections.values()) if is_mean else detections[name],
                "AP": level["mAP"] if is_mean else level["AP"][name],
                "AR": level["mAR"] if is_mean else level["AR"][name],
            }
            for key, column in (
                ("score", "best_f1_score"),
                ("precision", "best_f1_precision"),
                ("recall", "best_f1_recall"),
                ("f1", "best_f1"),
            ):
                row[column] = None if point is None else point[key]
            for breakdown in (document["by_size"], document["by_distance"]):
                for one in breakdown["bins"] if breakdown else ():
                    found = one["thresholds"][t]
                    row[f"AP_{one['name']}"] = found["mAP"] if is_mean else found["AP"][name]
            yield row
