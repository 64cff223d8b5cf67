"""Results of evaluations as files, evaluation.json and evaluation.csv, and those of the checkpoints of a run.

Schema of evaluation.json, version 1, an entry per dataset; null stands for figures that are not defined, such as
the AP of a class without ground truth. Shares are from 0 to 1.

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
            "best_f1_of_all": {...},             the same with one score for all classes
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
        "by_distance": {..., "from": "sensor"},  horizontal, from the sensor or the centre of the scan
        "scans": 312, "skipped": {"scene0001_00": "reason"},
        ["protocol": {"split": "val", ...},]     the choices of the evaluation
        ["cross": {                              by the dataset whose head predicted (`h2a2_jax.evaluation.cross`)
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
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file

JSON_FILE = "evaluation.json"
CSV_FILE = "evaluation.csv"
MEAN = "(mean)"


def write_evaluation(folder: Path, documents: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all; evaluation.json last, so that it stands for both.

    Args:
        folder: folder of the files, made if missing.
        documents: content of evaluation.json, by dataset.
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


FOLDER = "evaluations"
"""Folder in the workdir with a folder a step, each with the files that the workdir itself has of the last step."""

BEST, LAST = "best", "last"


def evaluation_folder(workdir: Path, step: int) -> Path:
    """Folder of the evaluation of a step."""
    return workdir / FOLDER / str(step)


def read_evaluations(workdir: Path) -> dict[int, dict[str, Any]]:
    """Contents of evaluation.json by step, rising; files that a kill cut short are left out."""
    found = {}
    for path in (workdir / FOLDER).glob(f"*/{JSON_FILE}"):
        if path.parent.name.isdecimal():
            try:
                found[int(path.parent.name)] = json.loads(path.read_text())
            except json.JSONDecodeError:
                continue
    return dict(sorted(found.items()))


def mean_score(documents: Mapping[str, Any]) -> float:
    """The mean over datasets of mAP at the lowest IoU threshold, by which checkpoints are compared; NaN without any."""
    scores = [document["thresholds"][0]["mAP"] for document in documents.values()]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else math.nan


def best_step(workdir: Path) -> int | None:
    """Step of the best evaluation (`mean_score`), the later of equal ones; None before the first."""
    scores = {step: mean_score(documents) for step, documents in read_evaluations(workdir).items()}
    known = {step: score for step, score in scores.items() if not math.isnan(score)}
    return max(known, key=lambda step: (known[step], step), default=None)


def chosen_step(workdir: Path, text: str | None) -> int | None:
    """The step that a user chose; None for the last one.

    Args:
        workdir: folder of a run.
        text: a number, "best", "last", or None, which is the last.

    Raises:
        InputError: it is none of these, or no checkpoint of the run was evaluated.
    """
    if text is None or text == LAST:
        return None
    if text == BEST:
        step = best_step(workdir)
        if step is None:
            raise InputError(
                f"No checkpoint of {workdir} was evaluated, so that none is known as the best: train with "
                "--config.train.evaluate_every=STEPS, or give a number."
            )
        return step
    if not text.isdecimal():
        raise InputError(f"--step is {text!r}; expected a number, {BEST} or {LAST}.")
    return int(text)


def score_text(documents: Mapping[str, Any]) -> str:
    """One line of mAP in per cent, as in "mAP@0.25/0.5 scannet 51.3/20.1, s3dis 49.0/-"."""
    levels = "/".join(f"{level['iou']:g}" for level in next(iter(documents.values()))["thresholds"])

    def per_cent(score: float | None) -> str:
        return "-" if score is None else f"{100 * score:.1f}"

    scores = [
        f"{name} {'/'.join(per_cent(level['mAP']) for level in own['thresholds'])}" for name, own in documents.items()
    ]
    return f"mAP@{levels} {', '.join(scores)}"


def score_metrics(documents: Mapping[str, Any]) -> dict[str, float | None]:
    """Values of mAP (0 to 1) for a line of metrics, with keys "mAP@<IoU>/<dataset>"."""
    return {
        f"mAP@{level['iou']:g}/{name}": level["mAP"]
        for name, document in documents.items()
        for level in document["thresholds"]
    }
