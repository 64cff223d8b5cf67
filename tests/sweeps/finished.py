"""Folders of runs, as training leaves them."""

import json
from collections.abc import Sequence
from pathlib import Path

from h2a2_jax.config import ExperimentConfig, to_json

LEVELS = (0.25, 0.5)
"""Thresholds of IoU."""


def write_run(folder: Path, config: ExperimentConfig, scores: dict[str, Sequence[float | None]] | None) -> None:
    """Write the files of a finished run, or of a stopped one if there are no scores."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config) + "\n")
    if scores is not None:
        levels = {n: [{"iou": iou, "mAP": x} for iou, x in zip(LEVELS, s, strict=True)] for n, s in scores.items()}
        (folder / "evaluation.json").write_text(json.dumps({n: {"thresholds": t} for n, t in levels.items()}))
