"""What `run.py` does, mode by mode."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from h2a2_jax.inference.evaluate import build_predictor, evaluate_source
from h2a2_jax.inference.predictions import predictions_json
from h2a2_jax.inputs.sources import CachedSource, build_source
from h2a2_jax.models import Detector
from h2a2_jax.sweeps.picture import draw_tau
from h2a2_jax.sweeps.plan import Row, ablation_rows, default_taus, locate, tau_rows
from h2a2_jax.sweeps.results import table, write_results
from h2a2_jax.sweeps.runner import alone, run_all
from h2a2_jax.training.checkpoint import CheckpointStore
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.distributed import MeshDivision, say
from h2a2_jax.training.loop import evaluate, say_skipped, train
from h2a2_jax.training.mesh import train_mesh


def train_command(config: ExperimentConfig, workdir: Path) -> None:
    """Train and evaluate; a workdir with checkpoints is gone on with.

    Raises:
        InputError: data are missing, or the workdir belongs to another architecture.
    """
    division = MeshDivision(train_mesh(len(config.datasets)), len(config.datasets))
    division.together(lambda: _check_data(config, division.datasets), "open its data")
    train(config, workdir)
    say(
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


def report_command(config: ExperimentConfig, workdir: Path, singles: Sequence[Path]) -> None:
    """Write what a run learnt about its kernels as an HTML page with pictures.

    Args:
        config: of the run.
        workdir: of the run.
        singles: folders of runs on one dataset each, to compare with.

    Raises:
        InputError: there is no checkpoint, or it is of another architecture than the config.
    """
    from h2a2_jax.report import write_report  # draws, which no other command needs

    print(f"The report is {write_report(config, workdir, singles=singles)}.", flush=True)


def tau_sweep_command(
    config: ExperimentConfig, workdir: Path, taus: Sequence[float], seeds: Sequence[int], jobs: int | None
) -> int:
    """Train and evaluate the config with every tau and seed; write table.md, results.json and tau.png.

    Args:
        config: the base, with kernel selection.
        workdir: of the sweep; what is finished there is not done again.
        taus: thresholds; empty for the default ones.
        seeds: of training.
        jobs: runs at once; None for what suits the machine.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the user stopped it.

    Raises:
        InputError: the config is not fit for the sweep, or the workdir holds other runs of the same names.
    """
    return _sweep("tau_sweep", config, workdir, tau_rows(config, taus or default_taus(config), seeds), jobs)


def ablation_command(config: ExperimentConfig, workdir: Path, seeds: Sequence[int], jobs: int | None) -> int:
    """Train and evaluate naive joint training, SF-KS, NGH, both, and TR3D alone; see `tau_sweep_command`."""
    _check_data(config)  # whose sizes the plan reads
    return _sweep("ablation", config, workdir, ablation_rows(config, seeds), jobs)


def _sweep(sweep: str, config: ExperimentConfig, workdir: Path, rows: Sequence[Row], jobs: int | None) -> int:
    _check_data(config)
    with alone(workdir):
        folders = locate(rows, workdir)
        try:
            failures = run_all(folders, workdir / "cache", jobs)
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from the last checkpoint of every run.", file=sys.stderr)
            return 130
        result = write_results(sweep, config, rows, folders, workdir)
        print(f"\n{table(result)}\nWritten to {workdir / 'table.md'} and {workdir / 'results.json'}", flush=True)
        if sweep == "tau_sweep":
            draw_tau(result, workdir / "tau.png")
            print(f"Drawn in {workdir / 'tau.png'}", flush=True)
    if failures:
        print("\n".join([*failures.values(), "The same command tries again what failed."]), file=sys.stderr)
    return 1 if failures else 0


def _check_data(config: ExperimentConfig, datasets: Sequence[int] | None = None) -> None:
    """Both splits, of all datasets or those at some places, before anything is written or compiled."""
    for d in range(len(config.datasets)) if datasets is None else datasets:
        for split in ("train", "val"):
            build_source(config.datasets[d], split)


def restore(config: ExperimentConfig, workdir: Path) -> Detector:
    """The detector of the newest checkpoint, if it is the config's.

    Raises:
        InputError: there is none, or it is of another architecture or of other datasets; the sentence says how.
    """
    with CheckpointStore(workdir / "checkpoints") as store:
        return store.restore_model(expected=config)[0]
