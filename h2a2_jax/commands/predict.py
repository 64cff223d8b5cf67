"""`--mode=predict`."""

import json
from pathlib import Path

from h2a2_jax.commands.restore import restore
from h2a2_jax.inference.evaluate import build_predictor, evaluate_source
from h2a2_jax.inference.predictions import predictions_json
from h2a2_jax.inputs.sources import CachedSource, build_source
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.distributed import MeshDivision
from h2a2_jax.training.loop import say_skipped
from h2a2_jax.training.mesh import train_mesh


def predict_command(config: ExperimentConfig, workdir: Path) -> None:
    """Restore the newest checkpoint and write the boxes of the validation scans, <workdir>/predictions/<dataset>.json.

    Raises:
        InputError: there is no checkpoint, or it is of another architecture than the config.
    """
    specs = config.specs
    model = restore(config, workdir)
    predictor = build_predictor(model, specs, config.eval)
    folder = workdir / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for d in MeshDivision(train_mesh(len(specs)), len(specs)).evaluated:
        spec, source = specs[d], CachedSource(build_source(config.datasets[d], "val"))
        _, detections, log = evaluate_source(predictor, source, spec, config.eval)
        say_skipped(log.skipped)
        scans = [source[i] for i, name in enumerate(source.names) if name not in log.skipped]
        path = folder / f"{spec.name}.json"
        path.write_text(json.dumps(predictions_json(scans, detections, spec), indent=1) + "\n")
        print(f"{path}: {sum(len(found.scores) for found in detections)} boxes in {len(scans)} scans", flush=True)
