"""What a run keeps on disk while it steps: lines of metrics, checkpoints, evaluations; and how it is left."""

import contextlib
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import TrainState
from h2a2_jax.compilation import CompilationCounter
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, is_main, say
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.documents import (
    best_step,
    evaluation_folder,
    read_evaluations,
    score_metrics,
    score_text,
    write_evaluation,
)
from h2a2_jax.evaluation.evaluate import evaluate
from h2a2_jax.inference.predictor import Predictor, build_predictor
from h2a2_jax.loader.process_layout import Answer
from h2a2_jax.loader.stream import JointStep, JointStream
from h2a2_jax.loader.workers import WorkerDiedError
from h2a2_jax.models import TR3D
from h2a2_jax.training.build import Trainer
from h2a2_jax.training.metrics import (
    FOLDER,
    MetricsWriter,
    Progress,
    TensorBoardWriter,
    Watch,
    mean_known,
    read_metrics,
)
from h2a2_jax.training.step import StepMetrics
from h2a2_jax.training.stopping import StopSignals

_RESTARTS = 3
"""How often workers are started again in a run."""


@dataclass
class Run:
    """A run under way.

    Attributes:
        config: of the run.
        workdir: its folder.
        process_layout: of the processes.
        stream: of the training scans.
        trainer: takes its steps.
        store: of its checkpoints.
        watch: gathers what steps report.
        compilations: counts what is compiled.
        total: optimiser steps of the whole run.
        start: the detector before the first step; None where it is not known any more.
        state: the newest one.
        step: optimiser steps done.
        saved: step of the newest checkpoint on its way to the disk; None without one.
        began_after: steps done before this process.
        skipped_scans: of all processes, with why; known when all steps are taken.
    """

    config: ExperimentConfig
    workdir: Path
    process_layout: MeshLayout
    stream: JointStream
    trainer: Trainer
    store: CheckpointStore
    watch: Watch
    compilations: CompilationCounter
    total: int
    start: TR3D | None
    state: TrainState
    step: int
    saved: int | None
    began_after: int = field(init=False)
    skipped_scans: Mapping[str, str] = field(default_factory=dict)
    _progress: Progress | None = None
    _opened: float = field(default_factory=time.monotonic)
    _asked: Answer | None = None
    _predictor: Predictor | None = None
    _writers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _metrics: MetricsWriter | None = None
    _board: TensorBoardWriter | None = None

    def __post_init__(self) -> None:
        self.began_after = self.step

    def __enter__(self) -> "Run":
        """Opens the files of metrics, in the process that writes."""
        if is_main():
            self._metrics = self._writers.enter_context(MetricsWriter(self.workdir))
            self._board = self._writers.enter_context(TensorBoardWriter(self.workdir / FOLDER, self.step))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close_progress()
        self._writers.close()

    def batches(self) -> Generator[JointStep]:
        """The batches to come. Workers that die are started again; whatever ends the input, the state is saved."""
        each, restarts = self.config.optim.accumulate_steps, 0
        while self.step < self.total:
            try:
                yield from self.stream.steps(self.step * each, self.total * each)
                return
            except WorkerDiedError as error:
                # A batch of a step that was begun is seen already: the step begins anew only with its first.
                if restarts == _RESTARTS or not self.process_layout.alone or each > 1:
                    self.save()
                    raise
                restarts += 1
                say(f"{error} They are started again ({restarts} of {_RESTARTS} times).")
            except InputError:
                self.save()
                raise

    def log(self) -> None:
        """A line of metrics, and one of progress; nothing where there is no news."""
        if self._metrics is None or not self.watch.has_news:
            return
        values: dict[str, Any] = {
            **self.watch.summary(self.state.balancer),
            "compilations": self.compilations.count,
        }
        self._write(values)
        if self._progress is not None:
            losses = np.array([values[f"loss/{name}"] for name in self.config.dataset_names])
            self._progress.update(self.step, float(mean_known(losses)), self.watch.scans_since_summary)
        self.store.check()

    def save(self) -> None:
        """A checkpoint of the state, in the background; nothing where there is one of this step."""
        if self.saved == self.step:
            return
        whole = self.state if self.process_layout.alone else self.process_layout.fetch(self.state)
        if is_main():
            self.store.save(self.step, whole, self.config, self.config.dataset_names)
        self.saved = self.step

    def evaluate(self) -> None:
        """Evaluate the state, into a folder of its step; the scores join the metrics of the step."""
        say(f"Evaluating step {self.step}.")
        with self.watch.paused():
            detector = self.trainer.detector(self.state, self.process_layout)
            folder = evaluation_folder(self.workdir, self.step)
            documents = self._evaluated(detector, folder, tables=False)
        say(f"Step {self.step}: {score_text(documents)}; the best so far is step {best_step(self.workdir)}.")

    def evaluate_end(self, detector: TR3D) -> dict[str, Any]:
        """Evaluate the detector of the last step, into the workdir, and beside the others where there are others."""
        documents = self._evaluated(detector, self.workdir)
        if is_main() and self.config.train.evaluate_every:
            write_evaluation(evaluation_folder(self.workdir, self.step), documents)
        return documents

    def _evaluated(self, detector: TR3D, folder: Path, *, tables: bool = True) -> dict[str, Any]:
        """The evaluation of a detector of this step, whose scores join the metrics of the step."""
        if self._predictor is None:
            self._predictor = build_predictor(detector, self.config.specs, self.config.eval)
        else:
            self._predictor.take_over(detector)
        documents = evaluate(self.config, self._predictor, folder, self.process_layout, tables=tables)
        scores = score_metrics(documents)
        if self._metrics is not None and not scores.items() <= (before := self._line()).items():
            self._write({**before, **scores})
        return documents

    def is_evaluated(self) -> bool:
        """Whether the newest step has an evaluation, whose scores are among the metrics too; all processes agree."""
        found = False
        if is_main() and (documents := read_evaluations(self.workdir).get(self.step)) is not None:
            found = score_metrics(documents).keys() <= self._line().keys()
        return bool(self.process_layout.exchange(np.array([found], np.int32))().any())

    def is_due(self, every: int) -> bool:
        """Whether something that is done now and then is to be done after this step."""
        return self.step == self.total or (every > 0 and self.step % every == 0)

    def is_stopping(self, signals: StopSignals) -> bool:
        """Whether a process of the run was told to stop: one answer in all, a step later where there are several."""
        if self.process_layout.alone:
            return signals.requested
        before, self._asked = self._asked, self._asking(signals)
        return before is not None and self._noted(before, signals)

    def was_told_to_stop(self, signals: StopSignals) -> bool:
        """The same behind the last step, after which no other tells: the answer is waited for."""
        return self._noted(self._asking(signals), signals)

    def _asking(self, signals: StopSignals) -> Answer:
        return self.process_layout.exchange(np.array([signals.requested], np.int32))

    def _noted(self, answer: Answer, signals: StopSignals) -> bool:
        """Whether a process was told, which all then take note of."""
        told = bool(answer().any())
        if told and not signals.requested:
            signals.request(signal.SIGTERM)
        return told

    @contextlib.contextmanager
    def left_by(self, kind: type[Exception]) -> Iterator[None]:
        """An error of this kind ends the run with its sentence; the state, as it is then, is saved."""
        try:
            yield
        except kind as error:
            self.step = int(self.state.step)
            self.save()
            raise InputError(str(error)) from error

    def show_progress(self, metrics: StepMetrics) -> None:
        """Begin to tell how long it takes, once the first step is done: compiling says nothing of the time left."""
        if self._progress is None and is_main():
            jax.block_until_ready(metrics)
            say(f"First step done after {time.monotonic() - self._opened:.0f} s.")
            self._progress = Progress(self.total, self.step)

    def close_progress(self) -> None:
        """Leave the terminal's line."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def _line(self) -> Mapping[str, Any]:
        """The line of metrics of the newest step; empty where there is none."""
        return next((line for line in read_metrics(self.workdir) if line["step"] == self.step), {})

    def _write(self, values: Mapping[str, Any]) -> None:
        assert self._metrics is not None and self._board is not None
        numbers = {name: value for name, value in values.items() if name not in ("step", "version")}
        self._metrics.write(self.step, numbers)
        self._board.write(self.step, numbers)
