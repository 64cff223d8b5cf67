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
        }],
        "checksum": 1234567890                   CRC-32 of all of the above, the dataset's name, and the step of a file
                                                 in evaluations/<step>
      }
    }

evaluation.csv has a row per dataset, threshold and class, and one of the means, called "(mean)".
"""

import csv
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from h2a2_jax.checkpoint.integrity import CheckpointFiles
from h2a2_jax.errors import InputError
from h2a2_jax.files import read_sealed, sealed, whole_file
from h2a2_jax.inference.box_table import safe_cell

JSON_FILE = "evaluation.json"
CSV_FILE = "evaluation.csv"
MEAN = "(mean)"
_REMEDY = ": evaluate again with --mode=eval."
_VERSION = 1
_STEP = "0|[1-9][0-9]*"


def write_evaluation(folder: Path, documents: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all; evaluation.json last, so that it stands for both."""
    texts = {CSV_FILE: evaluation_csv(documents), JSON_FILE: evaluation_json(documents, _place(folder))}
    for name, text in texts.items():
        with whole_file(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="")


def evaluation_json(documents: Mapping[str, Any], place: str = "") -> str:
    """The documents as JSON, each with its checksum, lists of numbers on a line of their own.

    Args:
        documents: by dataset.
        place: the step that is evaluated, for a file in the folder of that step.
    """
    text = json.dumps(sealed(documents, place), indent=2, allow_nan=False)
    return re.sub(r"\[\s+([-+.,\deE\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def read_evaluation(file: Path) -> dict[str, Any]:
    """Read an evaluation.json: documents by dataset, without their checksums, which version 0.1.0 did not write.

    Raises:
        InputError: the file is missing, cannot be read, differs from what was written, or is no evaluation.
    """
    try:
        found = read_sealed(file, _place(file.parent))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}){_REMEDY}") from error
    except ValueError as error:
        raise _no_evaluation(file, str(error)) from error
    for name, document in found.items():
        if document.get("version", _VERSION) != _VERSION:
            raise _no_evaluation(file, f"it has version {document['version']!r:.80}, expected is {_VERSION}")
        if not _has_scores(document.get("thresholds")):
            raise _no_evaluation(file, f"{name!r:.80} has no mAP at IoU thresholds")
    return found


def _no_evaluation(file: Path, why: str) -> InputError:
    return InputError(f"{file} is damaged or no evaluation of this program ({why}){_REMEDY}")


def _has_scores(levels: Any) -> bool:
    """Return True for a list of {"iou", "mAP"} with numbers from 0 to 1, the mAP or None."""
    return (
        isinstance(levels, list)
        and len(levels) > 0
        and all(isinstance(level, dict) and {"iou", "mAP"} <= level.keys() for level in levels)
        and all(_is_share(level["iou"]) and (level["mAP"] is None or _is_share(level["mAP"])) for level in levels)
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _place(folder: Path) -> str:
    """The step of a folder in that of the evaluations of steps; empty for another folder."""
    is_of_step = folder.parent.name == FOLDER and re.fullmatch(_STEP, folder.name)
    return folder.name if is_of_step else ""


def evaluation_csv(documents: Mapping[str, Any]) -> str:
    """The documents as a table; cells are empty where a figure is not defined."""
    rows = [row for name, document in documents.items() for row in _rows(name, document)]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(column for row in rows for column in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _rows(dataset: str, document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    counts = [document[key] | {MEAN: sum(document[key].values())} for key in ("num_ground_truth", "num_detections")]
    bins = [one for key in ("by_size", "by_distance") for one in (document[key] or {"bins": ()})["bins"]]
    for t, level in enumerate(document["thresholds"]):
        points = level["best_f1"] | {MEAN: level["best_f1_of_all"]}
        scores = {"AP": level["AP"] | {MEAN: level["mAP"]}, "AR": level["AR"] | {MEAN: level["mAR"]}}
        in_bins = {f"AP_{one['name']}": one["thresholds"][t] for one in bins}
        for name in counts[0]:
            point = points[name] or {}
            yield {
                "dataset": safe_cell(dataset),
                "iou": level["iou"],
                "class": safe_cell(name),
                "ground_truth": counts[0][name],
                "detections": counts[1][name],
                **{column: of_classes[name] for column, of_classes in scores.items()},
                **{f"best_f1_{key}": point.get(key) for key in ("score", "precision", "recall")},
                "best_f1": point.get("f1"),
                **{column: one["mAP"] if name == MEAN else one["AP"][name] for column, one in in_bins.items()},
            }


FOLDER = "evaluations"
"""Folder in the workdir with a folder a step, each with the files that the workdir itself has of the last step."""

BEST, LAST = "best", "last"


def evaluation_folder(workdir: Path, step: int) -> Path:
    """Folder of the evaluation of a step."""
    return workdir / FOLDER / str(step)


def read_evaluations(workdir: Path) -> dict[int, dict[str, Any]]:
    """Documents by step, rising; evaluations that cannot be read are left out (`damaged_evaluations`)."""
    return _read_all(workdir)[0]


def damaged_evaluations(
    workdir: Path,
    names: Collection[str] | None = None,
    lines: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[int, str]:
    """Say of the evaluations of a run's steps what is wrong with them, by step, rising; a sentence each.

    Args:
        workdir: folder of the run.
        names: names of the run's datasets; given, an evaluation of others is foreign.
        lines: lines of the run's metrics by step; given, an evaluation with other scores than its line is foreign.
    """
    read, found = _read_all(workdir)
    for step, documents in read.items():
        file, logged = evaluation_folder(workdir, step) / JSON_FILE, (lines or {}).get(step, {})
        if names is not None and documents.keys() != set(names):
            given, own = (", ".join(sorted(map(str, some)))[:200] for some in (documents, names))
            found[step] = f"{file} is of the datasets {given}; those of this run are {own}."
        elif any(logged.get(key, score) != score for key, score in score_metrics(documents).items()):
            found[step] = f"{file} has other scores than the line of step {step} in metrics.jsonl."
    return dict(sorted(found.items()))


def _read_all(workdir: Path) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Documents of the evaluations that can be read, and what is wrong with the others, by step, rising."""
    read, damaged = {}, {}
    for step in sorted(int(path.name) for path in (workdir / FOLDER).glob("*/") if re.fullmatch(_STEP, path.name)):
        file = evaluation_folder(workdir, step) / JSON_FILE
        if os.path.lexists(file):
            try:
                read[step] = read_evaluation(file)
            except InputError as error:
                damaged[step] = f"{str(error).removesuffix(_REMEDY)}."
    return read, damaged


def mean_score(documents: Mapping[str, Any]) -> float:
    """The mean over datasets of mAP at the lowest IoU threshold, by which checkpoints are compared; NaN without any."""
    scores = [min(document["thresholds"], key=lambda level: level["iou"])["mAP"] for document in documents.values()]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else math.nan


def best_step(workdir: Path, among: Collection[int] | None = None) -> int | None:
    """Step of the best evaluation (`mean_score`), the later of equal ones; None before the first.

    Args:
        workdir: folder of the run.
        among: steps that count, such as those with a checkpoint; None: all.
    """
    return _best(read_evaluations(workdir), among)


def _best(read: Mapping[int, Mapping[str, Any]], among: Collection[int] | None) -> int | None:
    scores = {step: mean_score(documents) for step, documents in read.items()}
    counting = scores if among is None else scores.keys() & {*among}
    known = {step: scores[step] for step in counting if not math.isnan(scores[step])}
    return max(known, key=lambda step: (known[step], step), default=None)


def lasting_steps(workdir: Path, steps: Collection[int]) -> set[int]:
    """Those of the steps with a checkpoint that stay at any age: the best, and those that may be it.

    A step whose evaluation is there and cannot be read may be the best one.
    """
    read, damaged = _read_all(workdir)
    best = _best(read, steps)
    return {step for step in steps if step == best or step in damaged}


def chosen_step(workdir: Path, text: str | None) -> int | None:
    """The step that a user chose by a number, "best", "last", or None, which is the last; None for the last one.

    Raises:
        InputError: it is none of these, no checkpoint of the run was evaluated, or an evaluation cannot be read, so
            that it is not known which one is the best.
    """
    if text is None or text == LAST:
        return None
    if text == BEST:
        read, damaged = _read_all(workdir)
        step = _best(read, None)
        if damaged:
            # The best of the others may be an early one, whose checkpoint is gone.
            other = best_step(workdir, CheckpointFiles(workdir / "checkpoints").steps())
            of_others = "" if other is None else f"give --step={other}, the best of the others, or "
            raise InputError(
                f"The best checkpoint of {workdir} is not known: {next(iter(damaged.values()))} Or {of_others}start "
                "the training again, which mends this."
            )
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
    scores = [f"{name} {per_cent(document['thresholds'])}" for name, document in documents.items()]
    return f"mAP@{levels} {', '.join(scores)}"


def per_cent(levels: Sequence[Mapping[str, Any]], key: str = "mAP") -> str:
    """Scores at the IoU thresholds in per cent, as in "51.3/20.1"; a dash where a score is not defined."""
    return "/".join("-" if level[key] is None else f"{100 * level[key]:.1f}" for level in levels)


def score_metrics(documents: Mapping[str, Any]) -> dict[str, float | None]:
    """Values of mAP (0 to 1) for a line of metrics, with keys "mAP@<IoU>/<dataset>"."""
    return {
        f"mAP@{level['iou']:g}/{name}": level["mAP"]
        for name, document in documents.items()
        for level in document["thresholds"]
    }
