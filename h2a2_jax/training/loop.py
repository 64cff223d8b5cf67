"""Joint training from a config to a checkpoint, reading top to bottom."""

import contextlib
import errno
import platform
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.compilation import CompilationCounter, compilation_cache
from h2a2_jax.config import ExperimentConfig, to_json
from h2a2_jax.distributed import DATASET, REPLICA, MeshLayout, is_main, say, train_mesh
from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.evaluation.documents import best_step, read_evaluations
from h2a2_jax.evaluation.evaluate import merged, say_notes, say_skipped
from h2a2_jax.files import alone_in, whole_file
from h2a2_jax.host import revision, versions
from h2a2_jax.loader.stream import JointStream
from h2a2_jax.training.build import build_detector, build_stream, build_trainer, check_frozen, steps_of_run
from h2a2_jax.training.metrics import Watch
from h2a2_jax.training.nonfinite import NonFiniteError, NonFiniteWatch
from h2a2_jax.training.profiler import StepProfiler
from h2a2_jax.training.resume import check_init, drop_lost_steps, initial_detector, restore_newest
from h2a2_jax.training.run import Run
from h2a2_jax.training.selection_log import SelectionLog, selection_report, selection_table
from h2a2_jax.training.step import tensor_names
from h2a2_jax.training.stopping import StopSignals
from h2a2_jax.training.summary import FILE_NAME as SUMMARY
from h2a2_jax.training.summary import CheckpointScores, RunDevices, RunFacts, write_summary

CACHE = "cache"
"""In the workdir: compiled programs, in a folder a machine."""

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


def train(
    config: ExperimentConfig,
    workdir: Path,
    devices: Sequence[jax.Device] | None = None,
    *,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Train, save, evaluate; go on from the newest checkpoint where there is one.

    Writes to the workdir: config.json, metrics.jsonl (`MetricsWriter`), selection.jsonl (`SelectionLog`), tensorboard/,
    checkpoints/, evaluations/, evaluation.json and summary.md; keeps compiled programs in cache/. In a run of several
    processes all call it, with a workdir that all can read; the first writes.

    SIGTERM and Ctrl-C end it after the step under way, which is saved. A second Ctrl-C ends it at once.

    Args:
        config: of the run.
        workdir: folder of the run, made if missing.
        devices: all of them by default.
        accept_changes: whether a run may go on with another config than it was begun with.

    Returns:
        What evaluation.json holds.

    Raises:
        InputError: data are missing; the workdir is in use, cannot be written to, or holds a run of another config; a
            step could not be taken, for its numbers were not finite many times in a row.
        Stopped: a signal came.
    """
    began, code = time.monotonic(), revision()
    with StopSignals().watched() as signals, contextlib.ExitStack() as opened:
        try:
            # First of all: the signal that asks for a profile would end a process that does not listen.
            profiler = opened.enter_context(StepProfiler(workdir, *config.train.profile))
            run = open_run(config, workdir, devices, opened, accept_changes)
            take_steps(run, signals, profiler)
            run.store.wait()  # an evaluation tells of a checkpoint that is there
            documents = _evaluated(run)
            if is_main():
                run.store.tidy()  # the last evaluation may have found another best one
                _sum_up(run, _facts(run, documents, began, code))
        except Stopped as stopped:
            with signals.deferred():
                opened.close()  # what is on its way to the disk arrives there
            _say_stopped(stopped, workdir)
            raise
        return documents


def open_run(
    config: ExperimentConfig,
    workdir: Path,
    devices: Sequence[jax.Device] | None,
    opened: contextlib.ExitStack,
    accept_changes: bool,
) -> Run:
    """The run at its beginning, or where its newest checkpoint is."""
    mesh = train_mesh(len(config.specs), devices)
    process_layout = MeshLayout(mesh, len(config.specs))
    check_frozen(config)
    check_init(config, workdir)
    stream = build_stream(config, process_layout)
    steps_per_epoch, total = steps_of_run(config, stream.steps_per_epoch)
    opened.enter_context(_naming_what_cannot_be_written(workdir))
    _have_alone(workdir, process_layout, opened)
    cache = workdir / CACHE / platform.node() if config.train.compilation_cache else None
    opened.enter_context(compilation_cache(cache))  # before anything is compiled
    compilations = opened.enter_context(CompilationCounter(config.train.max_bucket + 1))

    best = partial(best_step, workdir)
    store = opened.enter_context(CheckpointStore(workdir / "checkpoints", config.train.keep_checkpoints, best))
    is_new = store.latest_step() is None
    start = initial_detector(config, is_new)
    trainer = build_trainer(config, start or build_detector(config), process_layout, steps_per_epoch, total)
    state = restore_newest(store, trainer.start, config, process_layout, accept_changes=accept_changes) or trainer.start
    first = int(state.step)
    if len(set(process_layout.exchange(np.array([first], np.int32))()[:, 0].tolist())) > 1:
        raise InputError(f"The processes find different checkpoints in {workdir}: give a folder that all share.")
    if is_main():  # only now: a workdir of another run stays as it is
        store.tidy()
        with whole_file(workdir / "config.json") as part:
            part.write_text(to_json(config) + "\n")
        drop_lost_steps(workdir, first, config.optim.accumulate_steps)
    if not is_new:
        say(f"Resuming {workdir} after step {first} of {total}{', the last: it is evaluated' * (first >= total)}.")
    if first < total:
        _say_start(config, stream, mesh, total)

    log = SelectionLog(workdir, config.dataset_names, total, config.train.log_every)
    watch = Watch(config, config.specs, trainer.schedule, stream, log)
    saved = None if is_new else first
    run = Run(
        config, workdir, process_layout, stream, trainer, store, watch, compilations, total, start, state, first, saved
    )
    return opened.enter_context(run)


def take_steps(run: Run, signals: StopSignals, profiler: StepProfiler) -> None:
    """All that are left."""
    train, each = run.config.train, run.config.optim.accumulate_steps
    nonfinite = NonFiniteWatch(
        run.workdir, run.config.dataset_names, tensor_names(run.state), run.stream, train.max_skipped_steps
    )
    if 0 < run.step < run.total and run.is_due(train.evaluate_every) and not run.is_evaluated():
        run.evaluate()  # which a kill, or a signal, kept from being done
    with signals.deferred(), contextlib.closing(run.batches()) as batches, profiler.steps():
        for item in batches:
            step, place = divmod(item.step, each)
            if place == 0:
                profiler.before_step(step + 1)
            with run.compilations.step():
                run.state, metrics = run.trainer.take_step(run.state, item.batch)
            if is_main():  # in others nobody would look
                run.watch.see(item, metrics)
            with run.left_by(NonFiniteError):
                nonfinite.see(item, metrics)
            if place + 1 < each:
                continue
            run.step = step + 1
            profiler.after_step(run.step, metrics)
            run.show_progress(metrics)
            if warning := run.compilations.warning(run.step):
                say(warning)
            stopping, evaluates = run.is_stopping(signals), run.is_due(train.evaluate_every)
            saves = stopping or evaluates or run.is_due(train.checkpoint_every)
            if saves or run.is_due(train.log_every):
                with run.left_by(NonFiniteError):
                    nonfinite.look()
                run.log()
            if saves:
                run.save()
            if stopping:
                raise signals.stopped()
            if evaluates and run.step < run.total:
                with signals.immediate():  # all is saved
                    run.evaluate()
    run.close_progress()
    if run.was_told_to_stop(signals):
        raise signals.stopped()


def _evaluated(run: Run) -> dict[str, Any]:
    """What is said and evaluated when all steps are taken."""
    run.skipped_scans = merged(run.process_layout.gather(run.stream.skipped))
    say_skipped(run.skipped_scans)
    say_notes(merged(run.process_layout.gather(run.stream.log.notes)), run.config.specs)
    if run.stream.log.scans:
        say(input_summary(run.stream))
    if (skipped := int(run.state.skipped)) > 0:
        say(f"{skipped} of {run.step} steps were skipped, for something in them was not finite.")
    end = run.trainer.detector(run.state, run.process_layout)
    if run.config.model.selection is not None and run.watch.selection and run.start is not None:
        reports, moved = selection_report(run.start, end, run.watch.mean_selection())
        say("\n" + selection_table(reports, moved, run.config.dataset_names))
    return run.evaluate_end(end)


def input_summary(stream: JointStream) -> str:
    """How fast scans were prepared, and what for; the stream has given some."""
    rate, scans = stream.scans_per_second_per_core, stream.log.scans
    parts = ", ".join(f"{part} {1000 * seconds / scans:.0f}" for part, seconds in stream.log.seconds.items())
    # Not the device: it works on what it was given while the loop waits.
    waited = f"the loop waited {stream.waited:.1f} s for it"
    return f"Input: {rate:.1f} scans per second per core ({parts} ms a scan); {waited}."


def _facts(run: Run, documents: dict[str, Any], began: float, code: str) -> RunFacts:
    """What summary.md tells."""
    config, counter = run.config, run.compilations
    names = config.dataset_names
    results = [CheckpointScores.of("last", run.step, documents)]
    best = best_step(run.workdir)
    if config.train.evaluate_every and best is not None:
        results.append(CheckpointScores.of("best", best, read_evaluations(run.workdir)[best]))
    return RunFacts(
        config=config,
        num_scans=dict(zip(names, run.stream.num_scans, strict=True)),
        steps=run.step,
        epochs=run.step / steps_of_run(config, run.stream.steps_per_epoch)[0],
        results=results,
        seconds=time.monotonic() - began,
        scans_per_second=run.watch.scans_per_second,
        resumed_after=run.began_after,
        skipped_steps=int(run.state.skipped),
        skipped_scans=len(run.skipped_scans),
        compilations=counter.count,
        loaded_compilations=counter.loaded,
        compilation_seconds=counter.seconds,
        devices=RunDevices.of(run.process_layout.mesh),
        versions=versions(),
        revision=code,
    )


def _sum_up(run: Run, facts: RunFacts) -> None:
    """summary.md; that of a run which had taken all its steps already stays, for it tells of them."""
    path = run.workdir / SUMMARY
    if run.began_after < run.total or not path.exists():
        write_summary(run.workdir, facts)
    say(f"What the run did is summed up in {path}.")


def _have_alone(workdir: Path, process_layout: MeshLayout, opened: contextlib.ExitStack) -> None:
    """Keep other runs out of the workdir."""

    def locked() -> None:
        if is_main():
            opened.enter_context(alone_in(workdir, "training run"))

    process_layout.all_or_raise(locked, "have the workdir for itself")


@contextlib.contextmanager
def _naming_what_cannot_be_written(workdir: Path) -> Iterator[None]:
    """A full disk and its like, met anywhere in the run, as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise InputError(
            f"{error.filename or workdir} cannot be written ({error.strerror}): free space there or make it writable; "
            f"{_what_is_saved(workdir)}."
        ) from error


def _say_start(config: ExperimentConfig, stream: JointStream, mesh: Mesh, total: int) -> None:
    names, batches = config.dataset_names, config.optim.accumulate_steps
    kinds = ["procedural scans" if source.is_procedural else "scans" for source in config.datasets]
    counted = zip(names, stream.num_scans, kinds, strict=True)
    datasets = ", ".join(f"{name} ({count} {kind})" for name, count, kind in counted)
    sizes = [str(size) for size in stream.batch_sizes]
    size = f"{sizes[0]} scans a dataset" if len(set(sizes)) == 1 else f"{', '.join(sizes)} scans"
    several = f"{batches} batches of " if batches > 1 else ""
    processes = f" of {jax.process_count()} processes" if mesh.is_multi_process else ""
    say(
        f"Training on {datasets}; {total} steps of {several}{size} on "
        f"{mesh.size} {jax.devices()[0].platform} device(s){processes}, {mesh.shape[DATASET]} x {mesh.shape[REPLICA]} "
        "(dataset x replica). The first step compiles, which takes a minute or two."
    )


def _say_stopped(stopped: Stopped, workdir: Path) -> None:
    say(f"{stopped}; {_what_is_saved(workdir)}.")


def _what_is_saved(workdir: Path) -> str:
    """What the same command does after the run was left."""
    with CheckpointStore(workdir / "checkpoints") as store:
        newest = store.latest_step()
    if newest is None:
        return "nothing was saved before, so that the same command begins anew"
    return f"step {newest} is saved in {workdir}, and the same command goes on from there"
