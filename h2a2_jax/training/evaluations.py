"""Evaluations of a run's checkpoints while it trains, and which of them was the best."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.document import JSON_FILE

FOLDER = "evaluations"
"""In the workdir: a folder a step, with the files that the workdir itself has of the last step."""

BEST, LAST = "best", "last"


def evaluation_folder(workdir: Path, step: int) -> Path:
    """Where the evaluation of a step is kept."""
    return workdir / FOLDER / str(step)


def read_evaluations(workdir: Path) -> dict[int, dict[str, Any]]:
    """What evaluation.json holds, by step; those that a kill cut short are left out."""
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
    """The step that a user asks for; None for the last one.

    Args:
        workdir: folder of a run.
        text: a number, "best", "last", or None.

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
    """MAP in per cent in a line, as in "mAP@0.25/0.5 scannet 51.3/20.1, s3dis 49.0/-"."""
    levels = "/".join(f"{level['iou']:g}" for level in next(iter(documents.values()))["thresholds"])

    def per_cent(score: float | None) -> str:
        return "-" if score is None else f"{100 * score:.1f}"

    scores = [
        f"{name} {'/'.join(per_cent(level['mAP']) for level in own['thresholds'])}" for name, own in documents.items()
    ]
    return f"mAP@{levels} {', '.join(scores)}"


def score_metrics(documents: Mapping[str, Any]) -> dict[str, float | None]:
    """MAP as a line of metrics has it: by "mAP@<IoU>/<dataset>", 0 to 1."""
    return {
        f"mAP@{level['iou']:g}/{name}": level["mAP"]
        for name, document in documents.items()
        for level in document["thresholds"]
    }
