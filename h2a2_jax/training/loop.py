"""Joint training from a config to a checkpoint, reading top to bottom."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from h2a2_jax.evaluation import Evaluation
from h2a2_jax.inference.evaluate import evaluate_source
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.inputs.pipeline import JointStream, StreamConfig, StreamDataset
from h2a2_jax.inputs.scan import ScanSource
from h2a2_jax.inputs.sources import CachedSource, build_source, left_out, permuted_boxes
from h2a2_jax.inputs.specs import dataset_spec
from h2a2_jax.models import Detector, HeadConfig, PlanLayout
from h2a2_jax.training.balancers import build_balancer
from h2a2_jax.training.checkpoint import CheckpointStore
from h2a2_jax.training.config import ExperimentConfig, to_json
from h2a2_jax.training.mesh import DATASET, REPLICA, train_mesh
from h2a2_jax.training.metrics import MetricsWriter, Progress
from h2a2_jax.training.selection_log import SelectionLog
from h2a2_jax.training.selection_report import selection_report, selection_table
from h2a2_jax.training.state import create_state, merge_model, place_state
from h2a2_jax.training.step import StepConfig, make_train_step
from h2a2_jax.training.watch import Watch

CACHED_SCANS = 2000
"""Sources of up to this many scans are kept in memory."""


def build_detector(config: ExperimentConfig) -> Detector:
    """The detector of a config with the parameters that its seed draws."""
    specs = [dataset_spec(name) for name in config.dataset_names]
    heads = [HeadConfig(spec.name, spec.num_classes, spec.num_outputs) for spec in specs]

    def build() -> Detector:
        return Detector(config.model, heads, rngs=nnx.Rngs(config.train.seed))

    # Drawn in one program: hundreds of small ones would be compiled otherwise.
    graph, _ = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(build()))())


def build_stream(config: ExperimentConfig, replicas: int) -> JointStream:
    """The training stream of a config.

    Raises:
        InputError: a dataset is missing or has no usable scan.
    """
    datasets = []
    for chosen in config.datasets:
        source = build_source(chosen, "train")
        if config.train.permute_boxes:
            source = permuted_boxes(source, config.train.seed)
        if len(source) <= CACHED_SCANS:
            source = CachedSource(source)
        spec = dataset_spec(chosen.name)
        datasets.append(StreamDataset(spec, source, chosen.repeats, chosen.sample, chosen.augment))
    return JointStream(
        datasets,
        StreamConfig(
            batch_size=config.train.batch_size,
            replicas=replicas,
            voxel_size=config.model.voxel_size,
            seed=config.train.seed,
            max_rung=config.train.max_rung,
            layout=PlanLayout.of(config.model),
        ),
    )


def learning_rate(config: ExperimentConfig, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up, then steps down after the epochs that the config names."""
    optim = config.optim
    decays = {epoch * steps_per_epoch: optim.decay_factor for epoch in optim.decay_epochs}
    steps = optax.piecewise_constant_schedule(optim.lr, decays)

    def schedule(count: Any) -> Any:
        if not optim.warmup_steps:
            return steps(count)
        return steps(count) * jax.numpy.minimum(1.0, (count + 1) / optim.warmup_steps)

    return schedule


def train(config: ExperimentConfig, workdir: Path, devices: Sequence[jax.Device] | None = None) -> dict[str, Any]:
    """Train, save, evaluate; go on from the newest checkpoint where there is one.

    Writes to the workdir: config.json, metrics.jsonl (`MetricsWriter`), selection.jsonl (`SelectionLog`), checkpoints/,
    evaluation.json.

    Args:
        config: of the run.
        workdir: folder of the run, made if missing.
        devices: all of them by default.

    Returns:
        What evaluation.json holds.

    Raises:
        InputError: data missing, or the workdir holds checkpoints of another architecture.
    """
    specs = [dataset_spec(name) for name in config.dataset_names]
    mesh = train_mesh(len(specs), devices)
    stream = build_stream(config, mesh.shape[REPLICA])
    total = config.train.steps or config.train.epochs * stream.steps_per_epoch
    schedule = learning_rate(config, stream.steps_per_epoch)
    optimizer = optax.adamw(schedule, weight_decay=config.optim.weight_decay)
    balancer = build_balancer(config.harmonize, len(specs), DATASET, config.train.seed)
    graph, state = create_state(build_detector(config), optimizer, balancer)
    step_config = StepConfig(clip_norm=config.optim.clip_norm)
    take_step = make_train_step(graph, state, specs, optimizer, balancer, mesh, step_config)
    state = place_state(state, mesh)

    workdir.mkdir(parents=True, exist_ok=True)
    with CheckpointStore(workdir / "checkpoints", keep=config.train.keep_checkpoints) as store:
        newest = store.latest_step()
        if newest is not None:
            state = store.restore_state(newest, state, config.dataset_names, config)
            print(f"Resuming {workdir} after step {newest} of {total}.", flush=True)
        # Only now: a workdir of another run stays as it is.
        (workdir / "config.json").write_text(to_json(config) + "\n")
        _print_start(config, stream, mesh, total)
        selection_log = SelectionLog(workdir, config.dataset_names, total, config.train.log_every)
        watch = Watch(config, specs, schedule, stream, selection_log)
        first = int(state.step)
        with MetricsWriter(workdir) as writer:
            started, progress = time.monotonic(), None
            for item in stream.steps(first, total):
                state, metrics = take_step(state, item.batch)
                step = item.step + 1
                watch.see(item, metrics)
                if progress is None:  # what compiling takes says nothing of the time left
                    jax.block_until_ready(metrics)
                    print(f"First step done after {time.monotonic() - started:.0f} s.", flush=True)
                    progress = Progress(total, step)
                if step % config.train.log_every == 0 or step == total:
                    values = watch.summary(state.balancer)
                    writer.write(step, values)
                    loss = float(np.mean([values[f"loss/{spec.name}"] for spec in specs]))
                    progress.update(step, loss, watch.scans_since_summary)
                if step % config.train.checkpoint_every == 0 or step == total:
                    store.save(step, state, config, config.dataset_names)
            if progress is not None:
                progress.close()
    print_skipped(stream.skipped)
    for dataset in stream.datasets:
        print_left_out(dataset.spec.name, dataset.source)
    end = merge_model(graph, *jax.device_get((state.exclusive, state.shared, state.stats)))
    if config.model.selection is not None and watch.selection:
        reports, moved = selection_report(build_detector(config), end, watch.mean_selection())
        print("\n" + selection_table(reports, moved, config.dataset_names), flush=True)
    return evaluate(config, end, workdir)


def evaluate(config: ExperimentConfig, model: Detector, workdir: Path) -> dict[str, Any]:
    """Evaluate on the validation scans of every dataset; print the tables and write evaluation.json.

    Raises:
        InputError: the validation scans of a dataset are missing.
    """
    specs = [dataset_spec(name) for name in config.dataset_names]
    sources = [build_source(source, "val") for source in config.datasets]
    predictor = Predictor(
        model, specs, score_threshold=config.eval.score_threshold, iou_threshold=config.eval.iou_threshold
    )
    results: dict[str, Any] = {}
    tables: list[tuple[str, Evaluation]] = []
    for spec, source in zip(specs, sources, strict=True):
        evaluation, _, skipped = evaluate_source(predictor, source, spec, config.eval)
        results[spec.name] = {**evaluation.to_dict(), "scans": len(source) - len(skipped), "skipped": skipped}
        tables.append((spec.name, evaluation))
        print_skipped({f"{spec.name}/{name}": reason for name, reason in skipped.items()})
        print_left_out(spec.name, source)
    for name, evaluation in tables:
        print(f"\n{name}\n{evaluation.table()}")
    (workdir / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nWritten to {workdir / 'evaluation.json'}", flush=True)
    return results


def print_skipped(skipped: Mapping[str, str]) -> None:
    """Name the scans that were left out, and why."""
    for name, reason in skipped.items():
        print(f"Skipped {name}: {reason}")
    if skipped:
        print(f"{len(skipped)} scan(s) skipped.", flush=True)


def print_left_out(name: str, source: ScanSource) -> None:
    """Say how many points and objects of the scans could not be used."""
    sentence = left_out(source)
    if sentence:
        print(f"{name}: {sentence}", flush=True)


def _print_start(config: ExperimentConfig, stream: JointStream, mesh: Any, total: int) -> None:
    datasets = ", ".join(f"{d.spec.name} ({len(d.source)} scans)" for d in stream.datasets)
    print(
        f"Training on {datasets}; {total} steps of {config.train.batch_size} scans a dataset on "
        f"{mesh.size} {jax.devices()[0].platform} device(s), {mesh.shape[DATASET]} x {mesh.shape[REPLICA]} "
        "(dataset x replica). The first step compiles, which takes a minute or two.",
        flush=True,
    )
