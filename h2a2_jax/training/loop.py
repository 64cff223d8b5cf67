"""Joint training from a config to a checkpoint, reading top to bottom."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.inputs.drawing import StreamDataset
from h2a2_jax.inputs.mmdet3d import Mmdet3dFolder
from h2a2_jax.inputs.pipeline import JointStream, StreamConfig
from h2a2_jax.inputs.scan import ScanSource
from h2a2_jax.inputs.sources import CachedSource, SourceConfig, build_source, permuted_boxes
from h2a2_jax.inputs.tfds_source import TfdsSource
from h2a2_jax.models import Detector, HeadConfig, PlanLayout
from h2a2_jax.training.balancers import build_balancer
from h2a2_jax.training.checkpoint import CheckpointStore
from h2a2_jax.training.config import ExperimentConfig, to_json
from h2a2_jax.training.distributed import MeshDivision, is_main, say
from h2a2_jax.training.evaluation import evaluate, merged, say_notes, say_skipped
from h2a2_jax.training.mesh import DATASET, REPLICA, train_mesh
from h2a2_jax.training.metrics import MetricsWriter, Progress
from h2a2_jax.training.selection_log import SelectionLog
from h2a2_jax.training.selection_report import selection_report, selection_table
from h2a2_jax.training.state import create_state, merge_model, place_state
from h2a2_jax.training.step import StepConfig, make_train_step
from h2a2_jax.training.watch import Watch, mean_known

CACHED_SCANS = 2000
"""Sources of up to this many scans are kept in memory, where a thread loads them and loading takes long."""


def build_detector(config: ExperimentConfig) -> Detector:
    """The detector of a config with the parameters that its seed draws."""
    specs = config.specs
    heads = [HeadConfig(spec.name, spec.num_classes, spec.num_outputs) for spec in specs]

    def build(key: PRNGKeyArray) -> Detector:
        return Detector(config.model, heads, rngs=nnx.Rngs(key))

    # Drawn in one program, for hundreds of small ones would be compiled otherwise; the same for all seeds.
    key = jax.random.key(config.train.seed)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(build, key)), jax.jit(lambda key: nnx.state(build(key)))(key))


def build_stream(config: ExperimentConfig, division: MeshDivision) -> JointStream:
    """The training stream of a config; a process opens the datasets that it loads.

    Raises:
        InputError: a dataset is missing or has no usable scan.
    """
    workers = _workers(config)

    def opened(chosen: SourceConfig) -> ScanSource:
        source = build_source(chosen, "train")
        # Prepared scans are read in milliseconds, and all of them fill gigabytes; workers would each keep some.
        is_quick = isinstance(source, Mmdet3dFolder | TfdsSource)
        if workers == 0 and not is_quick and len(source) <= CACHED_SCANS:
            source = CachedSource(source)
        return permuted_boxes(source, config.train.seed) if config.train.permute_boxes else source

    own = division.together(lambda: {d: opened(config.datasets[d]) for d in division.datasets}, "open its scans")
    return JointStream(
        [
            StreamDataset(
                chosen.spec,
                own.get(d),
                chosen.repeats,
                chosen.sample,
                chosen.augment,
                chosen.batch_size,
                chosen.weight,
            )
            for d, chosen in enumerate(config.datasets)
        ],
        StreamConfig(
            batch_size=config.train.batch_size,
            replicas=division.mesh.shape[REPLICA],
            voxel_size=config.model.voxel_size,
            seed=config.train.seed,
            max_rung=config.train.max_rung,
            layout=PlanLayout.of(config.model),
            workers=workers,
        ),
        division,
    )


def _workers(config: ExperimentConfig) -> int:
    """Processes that prepare scans."""
    if config.train.workers is not None:
        return config.train.workers
    if jax.default_backend() == "cpu":
        return 0  # the cores are busy already
    return max(1, available_cores() - 2)


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
    evaluation.json. In a run of several processes all call it, with a workdir that all can read; the first writes.

    Args:
        config: of the run.
        workdir: folder of the run, made if missing.
        devices: all of them by default.

    Returns:
        What evaluation.json holds.

    Raises:
        InputError: data missing, or the workdir holds checkpoints of another architecture.
    """
    specs = config.specs
    mesh = train_mesh(len(specs), devices)
    division = MeshDivision(mesh, len(specs))
    stream = build_stream(config, division)
    total = config.train.steps or config.train.epochs * stream.steps_per_epoch
    schedule = learning_rate(config, stream.steps_per_epoch)
    optimizer = optax.adamw(schedule, weight_decay=config.optim.weight_decay)
    balancer = build_balancer(config.harmonize, len(specs), DATASET, config.train.seed)
    graph, state = create_state(build_detector(config), optimizer, balancer)
    step_config = StepConfig(
        clip_norm=config.optim.clip_norm, average_statistics=config.model.running_statistics == "shared"
    )
    take_step = make_train_step(graph, state, specs, optimizer, balancer, mesh, step_config)
    state = place_state(state, mesh)

    workdir.mkdir(parents=True, exist_ok=True)
    with CheckpointStore(workdir / "checkpoints", keep=config.train.keep_checkpoints) as store:
        newest = store.latest_step()
        if newest is not None:
            state = store.restore_state(newest, state, config.dataset_names, config)
            say(f"Resuming {workdir} after step {newest} of {total}.")
        first = int(state.step)
        if len({row[0] for row in division.exchange(np.array([first], np.int32))().tolist()}) > 1:
            raise InputError(f"The processes find different checkpoints in {workdir}: give a folder that all share.")
        # Only now: a workdir of another run stays as it is.
        if is_main():
            (workdir / "config.json").write_text(to_json(config) + "\n")
        _say_start(config, stream, mesh, total)
        selection_log = SelectionLog(workdir, config.dataset_names, total, config.train.log_every)
        watch = Watch(config, specs, schedule, stream, selection_log)
        with MetricsWriter(workdir) if is_main() else nullcontext() as writer:
            started, progress = time.monotonic(), None
            for item in stream.steps(first, total):
                state, metrics = take_step(state, item.batch)
                step = item.step + 1
                if writer is not None:
                    watch.see(item, metrics)
                    if progress is None:  # what compiling takes says nothing of the time left
                        jax.block_until_ready(metrics)
                        say(f"First step done after {time.monotonic() - started:.0f} s.")
                        progress = Progress(total, step)
                    if step % config.train.log_every == 0 or step == total:
                        values = watch.summary(state.balancer)
                        writer.write(step, values)
                        loss = float(mean_known(np.array([values[f"loss/{spec.name}"] for spec in specs])))
                        progress.update(step, loss, watch.scans_since_summary)
                if step % config.train.checkpoint_every == 0 or step == total:
                    whole = state if division.alone else division.fetch(state)
                    if is_main():
                        store.save(step, whole, config, config.dataset_names)
            if progress is not None:
                progress.close()
    say_skipped(merged(division.gather(stream.skipped)))
    say_notes(merged(division.gather(stream.log.notes)), specs)
    if stream.log.scans:
        say(input_summary(stream))
    end = merge_model(graph, *division.fetch((state.exclusive, state.shared, state.stats)))
    if config.model.selection is not None and watch.selection:
        reports, moved = selection_report(build_detector(config), end, watch.mean_selection())
        say("\n" + selection_table(reports, moved, config.dataset_names))
    return evaluate(config, end, workdir, division)


def input_summary(stream: JointStream) -> str:
    """How fast scans were prepared, and what for; the stream has given some."""
    rate, scans = stream.scans_per_second_per_core, stream.log.scans
    parts = ", ".join(f"{part} {1000 * seconds / scans:.0f}" for part, seconds in stream.log.seconds.items())
    # Not the device: it works on what it was given while the loop waits.
    waited = f"the loop waited {stream.waited:.1f} s for it"
    return f"Input: {rate:.1f} scans per second per core ({parts} ms a scan); {waited}."


def _say_start(config: ExperimentConfig, stream: JointStream, mesh: Mesh, total: int) -> None:
    names = config.dataset_names
    datasets = ", ".join(f"{name} ({count} scans)" for name, count in zip(names, stream.num_scans, strict=True))
    sizes = [str(size) for size in stream.batch_sizes]
    size = f"{sizes[0]} scans a dataset" if len(set(sizes)) == 1 else f"{', '.join(sizes)} scans"
    processes = f" of {jax.process_count()} processes" if mesh.is_multi_process else ""
    say(
        f"Training on {datasets}; {total} steps of {size} on "
        f"{mesh.size} {jax.devices()[0].platform} device(s){processes}, {mesh.shape[DATASET]} x {mesh.shape[REPLICA]} "
        "(dataset x replica). The first step compiles, which takes a minute or two."
    )
