"""Joint training from a config to a checkpoint, reading top to bottom."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from h2a2_jax.checkpoint.integrity import DamagedCheckpointError
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.compilation import compilation_cache
from h2a2_jax.config import ExperimentConfig, to_json
from h2a2_jax.distributed import DATASET, REPLICA, MeshLayout, described, is_main, say, train_mesh
from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.evaluation.documents import FOLDER as EVALUATIONS
from h2a2_jax.evaluation.documents import (
    JSON_FILE,
    best_step,
    damaged_evaluations,
    evaluation_folder,
    lasting_steps,
    read_evaluations,
    score_metrics,
    score_text,
    write_evaluation,
)
from h2a2_jax.evaluation.evaluate import evaluate, merged, say_notes, say_skipped
from h2a2_jax.files import alone_in, check_name, drop_lines_after, remedy, remove_parts, whole_file
from h2a2_jax.host import revision, shortage, versions
from h2a2_jax.inference.predictor import Predictor, build_predictor
from h2a2_jax.initialization import build_detector
from h2a2_jax.loader.stream import JointStep, JointStream
from h2a2_jax.loader.workers import WorkerDiedError
from h2a2_jax.models import DetectorNetwork
from h2a2_jax.training.build import (
    build_stream,
    build_trainer,
    check_frozen,
    check_init,
    initial_detector,
    restore_newest,
    steps_of_run,
)
from h2a2_jax.training.callbacks import (
    Callback,
    CompilationCounter,
    SaveCheckpoint,
    StepProfiler,
    Training,
)
from h2a2_jax.training.metrics import FILE_NAME, SELECTION_FILE, LogMetrics, line_of, read_metrics
from h2a2_jax.training.nonfinite import NonFiniteError, NonFiniteWatch, kept_batches
from h2a2_jax.training.step import StepMetrics
from h2a2_jax.training.stopping import KeepWorkdir, StopSignals
from h2a2_jax.training.summary import FILE_NAME as SUMMARY
from h2a2_jax.training.summary import (
    CheckpointScores,
    RunFacts,
    describe_devices,
    selection_report,
    selection_table,
    write_summary,
)
from h2a2_jax.training.wandb_writer import wandb_module

_OLD_CACHE = "cache"
"""In the workdir of a run of version 0.1: compiled programs, which are trusted no longer."""

_RESTARTS = 3
"""Restarts of worker processes in a run."""

_NOT_WRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
)


def train(
    config: ExperimentConfig,
    workdir: Path,
    devices: Sequence[jax.Device] | None = None,
    *,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Train, save and evaluate; resume from the newest checkpoint if there is one.

    Writes to the workdir: config.json, metrics.jsonl (`MetricsWriter`), selection.jsonl (`SelectionLog`), tensorboard/,
    checkpoints/, evaluations/, evaluation.json and summary.md; keeps compiled programs in the user's folder. In a run
    of several processes all call this function, with a workdir that all can read; the first one writes.

    SIGTERM, SIGHUP and Ctrl-C end the run after the step under way, which is saved, and while a step compiles at once,
    with the steps before it saved. A second Ctrl-C ends the run at once.

    Args:
        config: the run's configuration.
        workdir: folder of the run, made if missing.
        devices: devices to train on; None: all.
        accept_changes: True allows a run to resume with another config than it began with.

    Returns:
        Content of evaluation.json.

    Raises:
        InputError: data are missing; the workdir is in use, cannot be written to, vanishes, or holds a run of another
            config; too many steps in a row were skipped because a value was not finite.
        Stopped: a signal arrived.
    """
    began, code = time.monotonic(), revision()
    with StopSignals().handle() as signals, contextlib.ExitStack() as opened:
        try:
            keep = KeepWorkdir(workdir)
            opened.enter_context(keep.explain())
            signals.rescue = lambda save: _describe_saved(workdir)
            # Early: SIGUSR1, which asks for a profile, would end a process that does not handle it.
            profiler = StepProfiler(workdir, *config.train.profile)
            opened.callback(profiler.close)
            training, saver, compilations = set_up(config, workdir, devices, opened, accept_changes=accept_changes)
            signals.rescue = lambda save: _rescue(training, saver, save)
            opened.enter_context(described(lambda: _rescue(training, saver, False)))
            keep.begin()
            log = LogMetrics(training, compilations)
            opened.callback(log.close)
            evaluation = Evaluate(log, signals, keep)
            # The order matters: signals decide what is saved, what is saved is looked at and logged before.
            callbacks = [profiler, compilations, signals, keep, NonFiniteWatch(training), log, saver, evaluation]
            take_steps(training, callbacks, signals, saver)
            documents, skipped_scans = _finish(training, log, evaluation)
            if is_main():
                keep.check()
                _sum_up(training, log, compilations, documents, skipped_scans, time.monotonic() - began, code)
        except Stopped as stopped:
            with signals.defer():
                opened.close()  # wait for files on their way to the disk
            say(f"{stopped}; {_describe_saved(workdir)}.")
            raise
        return documents


def set_up(
    config: ExperimentConfig,
    workdir: Path,
    devices: Sequence[jax.Device] | None,
    opened: contextlib.ExitStack,
    *,
    accept_changes: bool = False,
) -> tuple[Training, SaveCheckpoint, CompilationCounter]:
    """The run before its first step, or at its newest checkpoint, with the callbacks that count from here on."""
    mesh = train_mesh(len(config.datasets), devices)
    process_layout = MeshLayout(mesh, len(config.datasets))
    check_frozen(config)
    check_name(workdir)
    check_init(config, workdir)
    if "wandb" in config.train.loggers:
        wandb_module()  # in every process, before anything is compiled
    stream = build_stream(config, process_layout)
    steps_per_epoch, total = steps_of_run(config, stream.steps_per_epoch)

    opened.enter_context(_explain_shortage(workdir))
    process_layout.all_or_raise(
        lambda: is_main() and opened.enter_context(alone_in(workdir, "training run")), "have the workdir for itself"
    )
    if config.train.compilation_cache:
        opened.enter_context(compilation_cache(say))  # before anything is compiled
    compilations = opened.enter_context(CompilationCounter(config.train.max_bucket + 1))

    doubtful: dict[int, str] = {}

    def lasting(steps: Sequence[int]) -> set[int]:
        return lasting_steps(workdir, steps) | (doubtful.keys() & {*steps})

    store = opened.enter_context(CheckpointStore(workdir / "checkpoints", config.train.keep_checkpoints, lasting))
    is_new = store.latest_step() is None
    start = initial_detector(config, is_new)
    detector = start or build_detector(config)
    trainer = build_trainer(config, detector, process_layout, steps_per_epoch, total, stream.num_scans)
    state = trainer.start
    if not is_new:
        like = trainer.plain_start(process_layout)
        found = restore_newest(store, like, config, process_layout, stream.num_scans, accept_changes=accept_changes)
        state = state if found is None else trainer.packed(found, process_layout)
    first = int(state.step)
    if len(set(process_layout.exchange(np.array([first], np.int32)).result()[:, 0].tolist())) > 1:
        raise InputError(f"The processes find different checkpoints in {workdir}: give a folder that all share.")
    if is_main():  # only now: a workdir of another run stays as it is
        drop_lost_steps(workdir, first, config.optim.accumulate_steps)
        for folder in (workdir, *(workdir / EVALUATIONS).glob("*/")):
            remove_parts(folder)
        doubtful |= doubtful_evaluations(workdir, config, [step for step in store.steps() if step < total])
        store.tidy()
        with whole_file(workdir / "config.json") as part:
            part.write_text(to_json(config) + "\n")
    if not is_new:
        say(f"Resuming {workdir} after step {first} of {total}{', the last: it is evaluated' * (first >= total)}.")
        if (workdir / _OLD_CACHE).is_dir():
            say(f"{workdir / _OLD_CACHE} holds compiled programs of an earlier version; nothing reads them: remove it.")
    if first < total:
        _say_start(config, stream, total)
    training = Training(
        config, workdir, process_layout, stream, trainer, store, total, start, state, first, first, doubtful
    )
    return training, SaveCheckpoint(None if is_new else first), compilations


def take_steps(training: Training, callbacks: Sequence[Callback], signals: StopSignals, saver: SaveCheckpoint) -> None:
    """Take all steps that are left.

    Args:
        training: the run; its state and step change.
        callbacks: called beside the steps, in their order.
        signals: one of the callbacks; its signals wait for the end of a step.
        saver: one of the callbacks; saves the state if an error ends the steps.

    Raises:
        InputError: too many steps in a row were not finite, or the input failed; the state is saved.
        Stopped: a signal arrived; the state is saved.
    """
    batches_per_step = training.config.optim.accumulate_steps
    for callback in callbacks:
        callback.before_steps(training)
    with signals.defer(), contextlib.closing(read_batches(training, saver)) as batches:
        try:
            for item in batches:
                for callback in callbacks:
                    callback.before_batch(training, item)
                training.state, metrics = training.trainer.take_step(training.state, item.batch)
                for callback in callbacks:
                    callback.after_batch(training, item, metrics)
                if (item.step + 1) % batches_per_step:
                    continue
                training.step += 1
                for callback in callbacks:
                    callback.after_step(training, metrics)
                if training.stopping:
                    raise signals.stopped()
        except NonFiniteError as error:
            training.step = int(training.state.step)  # which counts no steps beyond the limit
            saver.save(training)
            raise InputError(str(error)) from error
    for callback in callbacks:
        callback.after_steps(training)


def read_batches(training: Training, saver: SaveCheckpoint) -> Generator[JointStep]:
    """Yield the batches that are left.

    Dead worker processes are started again, a few times. An error that ends the input is raised after the state is
    saved.
    """
    each, restarts = training.config.optim.accumulate_steps, 0
    while training.step < training.total:
        try:
            yield from training.stream.steps(training.step * each, training.total * each)
            return
        except WorkerDiedError as error:
            # The state has seen the first batches of a step under way, which would be seen again.
            if restarts == _RESTARTS or not training.process_layout.alone or each > 1:
                saver.save(training)
                raise
            restarts += 1
            say(f"{error} They are started again ({restarts} of {_RESTARTS} times).")
        except InputError:
            saver.save(training)
            raise


class Evaluate(Callback):
    """Evaluate checkpoints on the way, each into a folder of its step, and the last step into the workdir.

    Args:
        log: takes the scores into the line of metrics of the step.
        signals: raise at once while a checkpoint is evaluated, for everything is saved then.
        keep: looks for the workdir before results are written.
    """

    def __init__(self, log: LogMetrics, signals: StopSignals, keep: KeepWorkdir):
        self._log, self._signals, self._keep = log, signals, keep
        self._predictor: Predictor | None = None

    def before_steps(self, training: Training) -> None:
        """Evaluate what cannot be relied on, and the step of a resumed run, if a kill or a signal prevented it."""
        for step in training.process_layout.gather([*training.doubtful])[0]:
            self._evaluate_again(training, step)
        training.doubtful.clear()
        if 0 < training.step < training.total and training.is_due(training.config.train.evaluate_every):
            found = False
            if is_main() and (documents := read_evaluations(training.workdir).get(training.step)) is not None:
                found = score_metrics(documents).keys() <= line_of(training.workdir, training.step).keys()
            if not training.process_layout.exchange_flag(found).result().any():
                self._evaluate_checkpoint(training)

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Evaluate if an evaluation is due; the last step is evaluated when the run ends."""
        due = training.is_due(training.config.train.evaluate_every) and training.step < training.total
        if due and not training.stopping:
            with self._signals.immediate():
                self._evaluate_checkpoint(training)

    def evaluate_end(self, training: Training, detector: DetectorNetwork) -> dict[str, Any]:
        """Evaluate the detector of the last step, into the workdir, and beside other evaluations if there are some.

        Returns:
            Content of evaluation.json.
        """
        documents = self._evaluate(training, detector, training.workdir, tables=True)
        self._log.summarize(documents)
        if is_main() and training.config.train.evaluate_every:
            write_evaluation(evaluation_folder(training.workdir, training.step), documents)
        return documents

    def _evaluate_checkpoint(self, training: Training) -> None:
        say(f"Evaluating step {training.step}.")
        with self._log.pause():
            detector = training.trainer.detector(training.state, training.process_layout)
            folder = evaluation_folder(training.workdir, training.step)
            documents = self._evaluate(training, detector, folder, tables=False)
        best = best_step(training.workdir)
        say(f"Step {training.step}: {score_text(documents)}; the best so far is step {best}.")

    def _evaluate_again(self, training: Training, step: int) -> None:
        layout, detector = training.process_layout, None
        say(f"Evaluating step {step} again.")
        with contextlib.suppress(DamagedCheckpointError):
            detector, _ = training.store.restore_model(step, training.config)
        if layout.exchange_flag(detector is None).result().any() or detector is None:
            say(f"The checkpoint of step {step} cannot be read: it stays without an evaluation.")
            return
        self._evaluate(training, detector, evaluation_folder(training.workdir, step), tables=False, step=step)

    def _evaluate(
        self, training: Training, detector: DetectorNetwork, folder: Path, *, tables: bool, step: int | None = None
    ) -> dict[str, Any]:
        if self._predictor is None:
            self._predictor = build_predictor(detector, training.config.specs, training.config.eval)
        else:
            self._predictor.take_over(detector)
        documents = evaluate(
            training.config,
            self._predictor,
            folder,
            training.process_layout,
            tables=tables,
            before_writing=self._keep.check,
        )
        self._log.add_scores(training, training.step if step is None else step, score_metrics(documents))
        return documents


def _finish(training: Training, log: LogMetrics, evaluation: Evaluate) -> tuple[dict[str, Any], dict[str, str]]:
    """Print what happened and evaluate, after the last step.

    Returns:
        Content of evaluation.json; reasons why scans were skipped, by scan.
    """
    config, layout, stream = training.config, training.process_layout, training.stream
    training.store.wait()  # an evaluation is of a checkpoint that is there
    skipped_scans = merged(layout.gather(stream.log.skipped))
    say_skipped(skipped_scans)
    say_notes(merged(layout.gather(stream.log.notes)), config.specs)
    if stream.log.scans:
        say(input_summary(stream))
    if (skipped := int(training.state.skipped)) > 0:
        say(f"{skipped} of {training.step} steps were skipped, for something in them was not finite.")
    end = training.trainer.detector(training.state, layout)
    if any(log.selection) and training.start is not None:
        reports, moved = selection_report(training.start, end, log.mean_selection())
        say("\n" + selection_table(reports, moved, config.dataset_names))
    return evaluation.evaluate_end(training, end), skipped_scans


def _sum_up(
    training: Training,
    log: LogMetrics,
    compilations: CompilationCounter,
    documents: dict[str, Any],
    skipped_scans: dict[str, str],
    seconds: float,
    code: str,
) -> None:
    """Write summary.md, unless this process took no step: then the summary that is there has the steps."""
    training.store.tidy()  # the last evaluation may have found another best one
    workdir, config = training.workdir, training.config
    results = [CheckpointScores.of("last", training.step, documents)]
    best = best_step(workdir, training.store.steps())
    if config.train.evaluate_every and best is not None:
        results.append(CheckpointScores.of("best", best, read_evaluations(workdir)[best]))
    facts = RunFacts(
        config=config,
        num_scans=dict(zip(config.dataset_names, training.stream.num_scans, strict=True)),
        steps=training.step,
        epochs=training.step / steps_of_run(config, training.stream.steps_per_epoch)[0],
        results=results,
        seconds=seconds,
        scans_per_second=log.scans_per_second,
        resumed_after=training.first_step,
        skipped_steps=int(training.state.skipped),
        skipped_scans=len(skipped_scans),
        compilations=compilations.count,
        loaded_compilations=compilations.loaded,
        compilation_seconds=compilations.seconds,
        devices=describe_devices(training.process_layout.mesh),
        versions=versions(),
        revision=code,
    )
    path = workdir / SUMMARY
    if training.first_step < training.total or not path.exists():
        write_summary(workdir, facts)
    say(f"What the run did is summed up in {path}.")


def input_summary(stream: JointStream) -> str:
    """Describe how fast scans were prepared, by task; the stream has yielded some."""
    rate, scans = stream.scans_per_second_per_core, stream.log.scans
    parts = ", ".join(f"{part} {1000 * seconds / scans:.0f}" for part, seconds in stream.log.seconds.items())
    # The loop waits, not the device, which works on the steps that it was given.
    waited = f"the loop waited {stream.waited:.1f} s for it"
    return f"Input: {rate:.1f} scans per second per core ({parts} ms a scan); {waited}."


def doubtful_evaluations(workdir: Path, config: ExperimentConfig, steps: Sequence[int]) -> dict[int, str]:
    """Find and print evaluations of checkpoints that are damaged, missing, or not of this run.

    Those of steps without a checkpoint, and folders in place of a file, are moved to the folder "evaluations_damaged".

    Args:
        workdir: folder of the run.
        config: the run's configuration.
        steps: steps with a checkpoint, without the last one of the run, which is evaluated in any case.

    Returns:
        What is wrong, by step with a checkpoint.
    """
    path = workdir / FILE_NAME
    lines = {int(line["step"] or 0): line for line in (read_metrics(workdir) if path.exists() else ())}
    found = damaged_evaluations(workdir, config.dataset_names, lines)
    for step in steps:
        file, every = evaluation_folder(workdir, step) / JSON_FILE, config.train.evaluate_every
        if every and step % every == 0 and any(key.startswith("mAP@") for key in lines.get(step, ())):
            if not os.path.lexists(file):
                found[step] = f"{file} is missing."
    for step, problem in found.items():
        action, folder = "It is evaluated anew.", evaluation_folder(workdir, step)
        if step not in steps or (folder / JSON_FILE).is_dir():  # a file cannot take the place of a folder
            place = workdir / f"{EVALUATIONS}_damaged" / str(step)
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)  # one that was set aside before
            what = "It" if step in steps else "It has no checkpoint and"
            action = f"{what} is set aside in {folder.rename(place)}{', and evaluated anew' * (step in steps)}."
        say(f"{problem} {action}")
    return {step: problem for step, problem in found.items() if step in steps}


def drop_lost_steps(workdir: Path, step: int, batches: int = 1) -> None:
    """Drop metrics, evaluations and kept batches after the step that a run resumes from, for it takes them again.

    Args:
        workdir: folder of the run.
        step: last step to keep.
        batches: batches in a step.
    """
    for name in (FILE_NAME, SELECTION_FILE):
        drop_lines_after(workdir / name, step)
    for folder in (workdir / EVALUATIONS).glob("*/"):
        if folder.name.isdecimal() and int(folder.name) > step:
            if folder.is_symlink():  # what it leads to is not of the run alone
                folder.unlink()
            else:
                shutil.rmtree(folder)
    for number, paths in kept_batches(workdir).items():
        for path in paths if number >= step * batches else ():
            path.unlink()


@contextlib.contextmanager
def _explain_shortage(workdir: Path) -> Iterator[None]:
    """Turn want of space, memory and the like, and every error in the workdir, into an `InputError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (found := shortage(error)) is None:
            raise
        raise InputError(f"{found}; {_describe_saved(workdir)}.") from error
    except OSError as error:
        place = workdir if (found := error.filename2 or error.filename) is None else Path(os.fsdecode(found))
        if error.errno not in _NOT_WRITABLE and not (found and place.absolute().is_relative_to(workdir.absolute())):
            raise
        raise InputError(
            f"{place} cannot be written ({error.strerror}): {remedy(error.strerror)}; {_describe_saved(workdir)}."
        ) from error


def _say_start(config: ExperimentConfig, stream: JointStream, total: int) -> None:
    mesh, batches = stream.process_layout.mesh, config.optim.accumulate_steps
    kinds = ["procedural scans" if source.is_procedural else "scans" for source in config.datasets]
    counted = zip(config.dataset_names, stream.num_scans, kinds, strict=True)
    datasets = ", ".join(f"{name} ({count} {kind})" for name, count, kind in counted)
    sizes = [str(size) for size in stream.batch_sizes]
    size = f"{sizes[0]} scans a dataset" if len(set(sizes)) == 1 else f"{', '.join(sizes)} scans"
    several = f"{batches} batches of " if batches > 1 else ""
    processes = f" of {jax.process_count()} processes" if mesh.is_multi_process else ""
    say(
        f"Training on {datasets}; {total} steps of {several}{size} on "
        f"{mesh.size} {jax.devices()[0].platform} device(s){processes}, {mesh.shape[DATASET]} x {mesh.shape[REPLICA]} "
        "(dataset x replica). The first step compiles, which takes up to a minute."
    )


def _rescue(training: Training, saver: SaveCheckpoint, save: bool) -> str:
    """Describe how the same command would continue, once the checkpoint that is on its way to the disk is there.

    Args:
        training: the run.
        saver: saves the state, if `save` is True and one process can; a step must not have begun to change it.
        save: True saves the steps since the newest checkpoint first.
    """
    if save and training.process_layout.alone and training.step > training.first_step:
        saver.save(training)
    if not is_main():  # the one that saves may not have finished
        return f"the same command goes on from the newest checkpoint in {training.workdir}"
    with contextlib.suppress(InputError):  # the error of a save is no news beside the one that ends the run
        training.store.wait()
    return _describe_saved(training.workdir)


def _describe_saved(workdir: Path) -> str:
    """Describe how the same command would continue."""
    with CheckpointStore(workdir / "checkpoints") as store:
        newest = store.latest_step()
    if newest is None:
        return "nothing was saved before, so that the same command begins anew"
    return f"step {newest} is saved in {workdir}, and the same command goes on from there"
