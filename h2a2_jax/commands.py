"""What `run.py` does, mode by mode."""

import json
from pathlib import Path

from h2a2_jax.inference.evaluate import evaluate_source
from h2a2_jax.inference.predictions import predictions_json
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.inputs.sources import CachedSource, build_source
from h2a2_jax.inputs.specs import dataset_spec
from h2a2_jax.models import Detector
from h2a2_jax.training.checkpoint import CheckpointStore
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.loop import evaluate, print_skipped, train


def train_command(config: ExperimentConfig, workdir: Path) -> None:
    """Train and evaluate; a workdir with checkpoints is gone on with.

    Raises:
        InputError: data are missing, or the workdir belongs to another architecture.
    """
    for source in config.datasets:  # both splits, before anything is written or compiled
        for split in ("train", "val"):
            build_source(source, split)
    train(config, workdir)
    print(
        f"Losses are in {workdir / 'metrics.jsonl'}, checkpoints in {workdir / 'checkpoints'}. Boxes as JSON: the same "
        "command with --mode=predict."
    )


def evaluate_command(config: ExperimentConfig, workdir: Path) -> None:
    """Restore the newest checkpoint and evaluate it on the validation scans of the config.

    Raises:
        InputError: there is no checkpoint, or it is of another architecture than the config.
    """
    evaluate(config, restore(config, workdir), workdir)


def predict_command(config: ExperimentConfig, workdir: Path) -> None:
    """Restore the newest checkpoint and write the boxes of the validation scans, <workdir>/predictions/<dataset>.json.

    Raises:
        InputError: there is no checkpoint, or it is of another architecture than the config.
    """
    specs = [dataset_spec(name) for name in config.dataset_names]
    model = restore(config, workdir)
    predictor = Predictor(
        model, specs, score_threshold=config.eval.score_threshold, iou_threshold=config.eval.iou_threshold
    )
    folder = workdir / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for spec, chosen in zip(specs, config.datasets, strict=True):
        source = CachedSource(build_source(chosen, "val"))
        _, detections, skipped = evaluate_source(predictor, source, spec, config.eval)
        print_skipped(skipped)
        scans = [source[i] for i, name in enumerate(source.names) if name not in skipped]
        path = folder / f"{spec.name}.json"
        path.write_text(json.dumps(predictions_json(scans, detections, spec), indent=1) + "\n")
        print(f"{path}: {sum(len(found.scores) for found in detections)} boxes in {len(scans)} scans", flush=True)


def restore(config: ExperimentConfig, workdir: Path) -> Detector:
    """The detector of the newest checkpoint, if it is the config's.

    Raises:
        InputError: there is none, or it is of another architecture or of other datasets; the sentence says how.
    """
    with CheckpointStore(workdir / "checkpoints") as store:
        return store.restore_model(expected=config)[0]
