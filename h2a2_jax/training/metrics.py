"""Metrics of a run: gathered over steps, written as JSON lines, for TensorBoard and for Weights & Biases.

A line of metrics.jsonl, version 1, holds means over the batches since the line before; null stands for NaN:

    "step", "version"                                   optimiser steps done; version of the schema
    "loss/<dataset>", "loss_box/...", "loss_class/..."  losses of each dataset; of FCAF3D "loss_centerness/..." too
    "learning_rate", "gradient_norm"                    of the last step; the mean of the global norm before clipping
    "psi/mean", "psi/min", "psi/harmonized_share", "psi/cap_hits"     agreement of norms over tensors, last step
    "psi/<group>", "harmonized_share/<group>"           the same by group of parameters (`PLACES`, `KINDS`)
    "gradient_norm/<group>/<dataset>", "scale/<group>/<dataset>"      norms, and the factors of the balancer
    "exclusive_share/<dataset>"                         share of (scan, offset) pairs that take the exclusive kernel
    "exclusive_offsets"                                 share of (layer, offset) whose alpha is below one half
    "dropped_points", "skipped_scans", "skipped_steps"  points cropped; scans and steps left out so far
    "overflow"                                          FCAF3D: sites without a place since the line before
    "scans_per_second", "compilations"                  speed since the line before; programs compiled so far
    "mAP@<IoU>/<dataset>"                               of an evaluated step
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from h2a2_jax.balancers import recorded
from h2a2_jax.balancers.ngh import HarmonizationState
from h2a2_jax.balancers.packing import unpack
from h2a2_jax.checkpoint.parameter_groups import KINDS, PLACES
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.distributed import is_main, say
from h2a2_jax.errors import InputError
from h2a2_jax.files import JsonLinesWriter, read_json_lines
from h2a2_jax.loader.stream import JointStep
from h2a2_jax.training.callbacks import Callback, CompilationCounter, Progress, Training
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.training.step import StepMetrics
from h2a2_jax.training.wandb_writer import WandbWriter

FILE_NAME = "metrics.jsonl"
SCHEMA_VERSION = 1
TENSORBOARD = "tensorboard"
SELECTION_FILE = "selection.jsonl"
SELECTION_VERSION = 1
SELECTION_LINES = 200
_DIGITS = 4


class MetricsWriter(JsonLinesWriter, contextlib.AbstractContextManager):
    """Write `metrics.jsonl`, one JSON object a logged step; a resumed run appends to it.

    Schema, version 1. Each line is an object with:

    - "step": int, optimiser steps done; always the first key. Of two lines of one step the later one counts: an
      evaluation writes the line of its step again, with its scores.
    - "version": int, the version of this schema; always the second key.
    - any further key: the value of a metric, a number or null. A slash separates a metric from its subject, as in
      "loss/scannet". Null stands for a value that is not finite, which JSON cannot express.

    Every line is flushed when written, so that a killed run leaves its metrics behind. A resumed run drops a last line
    that a kill cut short.

    Args:
        workdir: folder of the run; made if missing.
    """

    def __init__(self, workdir: str | Path):
        super().__init__(Path(workdir) / FILE_NAME, SCHEMA_VERSION)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the metrics of one step.

        Args:
            step: optimiser steps done.
            values: numbers by name, None for an unknown one; arrays of one element count as numbers and are fetched
                from their device here.

        Raises:
            ValueError: a metric is no single number or is named as a key of the schema.
        """
        super().write(step, {name: _number(name, value) for name, value in values.items()})

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float | int | None]]:
    """Read the lines of a run's `metrics.jsonl` in the order of their steps (`MetricsWriter` has the schema).

    Raises:
        InputError: a line is damaged or of another version.
    """
    return read_json_lines(Path(workdir) / FILE_NAME, SCHEMA_VERSION)


def _number(name: str, value: Any) -> float | int | None:
    if value is None:
        return None
    array = np.asarray(value)
    # Kind V is bfloat16 and its like.
    if array.size != 1 or array.dtype.kind not in "iufV":
        raise ValueError(f"metric {name!r} is {value!r}, expected a single number; reduce or leave it out")
    number = array.item()
    return number if math.isfinite(number) else None


class TensorBoardWriter(contextlib.AbstractContextManager):
    """Write scalars to a new event file; `tensorboard --logdir=<folder>` shows those of all files as one run.

    Every line is on the disk when `write` returns, so that a killed run leaves its metrics behind. A resumed run tells
    TensorBoard to forget the steps after its checkpoint, which it takes again: no step is shown twice.

    Args:
        folder: folder of the event files, <workdir>/tensorboard; made if missing.
        first_step: optimiser steps done before this process; 0 for a new run.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    # tensorboardX's own writers hand events to a thread, which a kill ends with what it holds, and name the file by the
    # second, so that a run which resumes within one overwrites it: here are its records and messages alone.
    def __init__(self, folder: str | Path, first_step: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: ten digits of seconds first, as all writers have them.
        self.path = folder / f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{os.getpid()}"
        self._records = RecordWriter(str(self.path))
        self._write(file_version="brain.Event:2")
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write the scalars of one step, without values that are None or not finite.

        Args:
            step: optimiser steps done.
            values: numbers by name; a slash groups them, as in "loss/scannet".

        Raises:
            ValueError: the writer was closed.
            OSError: the disk is full, or the folder is gone.
        """
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._write(step=int(step), summary=Summary(value=scalars))
        self._records.flush()

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())

    def __exit__(self, *exception: object) -> None:
        self.close()


class SelectionLog:
    """Write means of alpha, beta and gamma over many steps to `selection.jsonl`.

    Schema, version 1. Each line is an object with:

    - "step": int, optimiser steps done; always the first key. Of two lines of one step the later one counts.
    - "version": int, the version of this schema.
    - "steps": int, number of steps that the values are means over: those since the line before, of this process. The
      values of a dataset are means over the steps that it took part in.
    - "datasets": names, in the order of the dataset axis D.
    - "layers": by name of the layer, an object with "alpha" [D][V], offset validity prior, the same for all datasets
      unless each has its own; "beta" [D][V], structural consistency, mean over scans; "gamma" [D][V], share of scans
      that took the shared kernel. V offsets, x fastest. Rounded to four digits; null if a dataset took no part.

    A line is written after every `every` steps and after the last one; a run without kernel selection writes no file.

    Args:
        workdir: folder of the run.
        datasets: names, in the order of the dataset axis.
        total_steps: steps of the run.
        log_every: steps from one call of `add` to the next.

    Attributes:
        every: steps from one line to the next, a multiple of `log_every`.
    """

    def __init__(self, workdir: str | Path, datasets: Sequence[str], total_steps: int, log_every: int):
        self.path = Path(workdir) / SELECTION_FILE
        self.every = log_every * max(1, math.ceil(total_steps / SELECTION_LINES / log_every))
        self._datasets, self._total = list(datasets), total_steps
        self._sums: dict[str, tuple[Any, Any]] = {}
        self._steps = 0

    def add(self, step: int, selections: Sequence[Mapping[str, SelectionMetrics]]) -> None:
        """Add the metrics of steps, and write a line if one is due.

        Args:
            step: steps done, with those of `selections`.
            selections: metrics of each step, by layer; arrays on the host.
        """
        for selection in selections:
            self._steps += 1
            for layer, seen in selection.items():
                values = np.stack([seen.alpha, seen.beta, seen.gamma]).astype(np.float64)
                known = np.isfinite(values)  # NaN: the dataset took no part in the step
                total, count = self._sums.get(layer, (0.0, 0))
                self._sums[layer] = (total + np.where(known, values, 0), count + known)
        if self._sums and (step % self.every == 0 or step >= self._total):
            layers = {}
            for layer, (total, count) in self._sums.items():
                means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
                rounded = np.round(means, _DIGITS).astype(object)
                rounded[~np.isfinite(means)] = None
                layers[layer] = dict(zip(("alpha", "beta", "gamma"), rounded.tolist(), strict=True))
            # Opened for each line: there are few, and nothing is left to close.
            with contextlib.closing(JsonLinesWriter(self.path, SELECTION_VERSION)) as writer:
                writer.write(step, {"steps": self._steps, "datasets": self._datasets, "layers": layers})
            self._sums, self._steps = {}, 0


@dataclass(frozen=True)
class SelectionHistory:
    """Kernel selection of one layer over training.

    Attributes:
        alpha: [T, D, V].
        beta: [T, D, V].
        gamma: [T, D, V].
    """

    alpha: Float[np.ndarray, "t d v"]
    beta: Float[np.ndarray, "t d v"]
    gamma: Float[np.ndarray, "t d v"]


def read_selection_log(
    path: Path, datasets: Sequence[str]
) -> tuple[Int[np.ndarray, " t"], dict[str, SelectionHistory]]:
    """Read the steps of the lines, and the history of each layer.

    Args:
        path: the file `selection.jsonl`.
        datasets: names; sets the order of the dataset axis.

    Raises:
        InputError: the file is damaged, of another version, of other datasets, or its lines differ in their layers.
    """
    lines = read_json_lines(path, SELECTION_VERSION)
    if not lines:
        return np.zeros(0, np.int64), {}
    for line in lines:
        layers, order = line.get("layers"), line.get("datasets")
        if not isinstance(layers, dict) or not isinstance(order, list) or not all(isinstance(n, str) for n in order):
            raise _not_of_selection(path, line["step"])
    names = list(lines[-1]["layers"])
    for line in lines:
        if set(line["datasets"]) != set(datasets) or list(line["layers"]) != names:
            raise InputError(
                f"The line of step {line['step']} in {path} is of other datasets or layers than the run: expected are "
                f"{', '.join(datasets)} and the layers of the last line; remove lines of another run."
            )

    def history(layer: str, part: str) -> np.ndarray:
        rows: list[np.ndarray] = []
        for line in lines:
            try:
                own = np.array(line["layers"][layer][part], np.float64)
            except (KeyError, TypeError, ValueError) as error:
                raise _not_of_selection(path, line["step"]) from error
            if own.ndim != 2 or len(own) != len(line["datasets"]) or (rows and own.shape != rows[0].shape):
                raise _not_of_selection(path, line["step"])
            rows.append(own[[line["datasets"].index(name) for name in datasets]])
        return np.array(rows)

    found = {layer: SelectionHistory(*(history(layer, part) for part in ("alpha", "beta", "gamma"))) for layer in names}
    return np.array([line["step"] for line in lines], np.int64), found


def _not_of_selection(path: Path, step: Any) -> InputError:
    return InputError(
        f"The line of step {step} in {path} is no line of kernel selection: expected are its datasets, and for each "
        "layer alpha, beta and gamma [datasets, offsets]; remove the line."
    )


class LogMetrics(Callback):
    """Write a line of metrics, with means since the line before, wherever one is due; show progress.

    Only the main process writes.

    Args:
        training: the run, at its first step.
        compilations: counts compiled programs.

    Attributes:
        selection: kernel selection of the last steps, by layer.
    """

    _REMEMBERED = 50

    def __init__(self, training: Training, compilations: CompilationCounter):
        config = training.config
        self.selection: list[dict[str, SelectionMetrics]] = []
        self._compilations = compilations
        self._selection_log = SelectionLog(
            training.workdir, config.dataset_names, training.total, config.train.log_every
        )
        self._pending: list[StepMetrics] = []
        self._scans, self._dropped, self._lines = 0, 0, 0
        self._opened = self._since = time.monotonic()
        self._timed_scans, self._timed_seconds = 0, 0.0
        self._progress: Progress | None = None
        self._writers: list[MetricsWriter | TensorBoardWriter | WandbWriter] | None = None
        if is_main():
            self._writers = [MetricsWriter(training.workdir)]
            if "tensorboard" in config.train.loggers:
                self._writers.append(TensorBoardWriter(training.workdir / TENSORBOARD, training.step))
            if "wandb" in config.train.loggers:
                self._writers.append(WandbWriter(training.workdir, config))

    def after_batch(self, training: Training, item: JointStep, metrics: StepMetrics) -> None:
        """Keep the metrics of a batch, whose arrays stay on the device until the line is written."""
        if self._writers is not None:
            self._pending.append(metrics)
            self._scans += item.num_scans
            self._dropped += item.dropped_points

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Write the line of the step, if one is due."""
        if self._writers is None:
            return
        if self._progress is None:  # begins after the first step, for compiling says nothing of the time left
            jax.block_until_ready(metrics)
            say(f"First step done after {time.monotonic() - self._opened:.0f} s.")
            self._progress = Progress(training.total, training.step)
        if training.is_logged:
            scans = self._scans
            values = self._summarize(training)
            self.write(training.step, values)
            losses = np.array([values[f"loss/{name}"] for name in training.config.dataset_names])
            self._progress.update(training.step, float(mean_known(losses)), scans)
            training.store.check()

    def after_steps(self, training: Training) -> None:
        """Leave the line of progress."""
        if self._progress is not None:
            self._progress.close()

    def close(self) -> None:
        """Close the files."""
        if self._progress is not None:
            self._progress.close()
        for writer in self._writers or ():
            writer.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of `metrics.jsonl` and for the loggers of the config."""
        for writer in self._writers or ():
            writer.write(step, values)

    def add_scores(self, training: Training, step: int, scores: Mapping[str, float | None]) -> None:
        """Write the line of a step again with further values, unless it has them already."""
        if self._writers is not None and not scores.items() <= (line := line_of(training.workdir, step)).items():
            values = {name: value for name, value in line.items() if name not in ("step", "version")}
            self.write(step, {**values, **scores})

    def summarize(self, documents: Mapping[str, Any]) -> None:
        """Give the evaluation of the last step to the loggers that sum up a run."""
        for writer in self._writers or ():
            if isinstance(writer, WandbWriter):
                writer.summarize(documents)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of the scans per second."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    @property
    def scans_per_second(self) -> float | None:
        """Scans per second of all steps after the first line, for which a program compiled; None without such steps."""
        return self._timed_scans / self._timed_seconds if self._timed_seconds else None

    def mean_selection(self) -> dict[str, SelectionMetrics]:
        """Kernel selection over the last steps: mean shares, extreme scores."""
        means = ("alpha", "beta", "gamma")
        return {
            layer: SelectionMetrics(
                **{part: mean_known(np.stack([getattr(s[layer], part) for s in self.selection])) for part in means},
                lowest_score=np.fmin.reduce([step[layer].lowest_score for step in self.selection]),
                highest_score=np.fmax.reduce([step[layer].highest_score for step in self.selection]),
            )
            for layer in self.selection[0]
        }

    def _summarize(self, training: Training) -> dict[str, float]:
        """Means since the last line, by name of the metric."""
        steps, self._pending = jax.device_get(self._pending), []
        names, selections = training.config.dataset_names, [metrics.selection for metrics in steps]
        self.selection = (self.selection + selections)[-self._REMEMBERED :]
        self._selection_log.add(training.step, selections)
        now = time.monotonic()
        good = np.array([not metrics.nonfinite.any() for metrics in steps])
        present = np.stack([metrics.present for metrics in steps]) & good[:, None]
        skipped = int(steps[-1].skipped)
        terms = {
            term: mean_known(np.where(present, np.stack([getattr(step, f"{term}_loss") for step in steps]), np.nan))
            for term in ("box", "class", "centerness")
            if getattr(steps[0], f"{term}_loss") is not None
        }
        values: dict[str, float] = {}
        for d, name in enumerate(names):
            values[f"loss/{name}"] = float(sum(term[d] for term in terms.values()))
            values |= {f"loss_{term}/{name}": float(mean[d]) for term, mean in terms.items()}
        values["learning_rate"] = float(training.trainer.schedule(max(training.step - 1 - skipped, 0)))
        norms = [float(metrics.gradient_norm) for metrics in steps if metrics.gradient_norm > 0]
        values["gradient_norm"] = sum(norms) / len(norms) if norms else math.nan
        values |= self._harmonization(training)
        shares = [1 - layer.gamma.mean(-1) for selection in selections for layer in selection.values()]
        for d, name in enumerate(names if shares else ()):
            values[f"exclusive_share/{name}"] = float(mean_known(np.array([share[d] for share in shares])))
        if shares:
            alphas = np.array([layer.alpha for selection in selections for layer in selection.values()])
            values["exclusive_offsets"] = float((alphas < 0.5).mean())
        values["dropped_points"] = self._dropped
        if steps[0].overflow is not None:
            values["overflow"] = int(sum(metrics.overflow.sum() for metrics in steps))
        values["skipped_scans"] = len(training.stream.log.skipped)
        values["skipped_steps"] = skipped
        seconds = max(now - self._since, 1e-9)
        values["scans_per_second"] = self._scans / seconds
        values["compilations"] = self._compilations.count
        if self._lines:
            self._timed_scans, self._timed_seconds = self._timed_scans + self._scans, self._timed_seconds + seconds
        self._lines += 1
        self._scans, self._dropped, self._since = 0, 0, now
        return values

    def _harmonization(self, training: Training) -> dict[str, float]:
        """Agreement, norms and factors of the last step."""
        record = unpack(jax.device_get(recorded(training.state.balancer)))
        if record is None:
            return {}
        threshold = training.config.harmonize.threshold
        psi = np.array(jax.tree.leaves(record.psi))
        return {
            "psi/mean": float(psi.mean()),
            "psi/min": float(psi.min()),
            "psi/harmonized_share": float((psi < threshold).mean()),
            "psi/cap_hits": int(record.cap_hits),
            **group_summary(record, training.config.dataset_names, threshold),
        }


def line_of(workdir: Path, step: int) -> Mapping[str, Any]:
    """The line of metrics of a step of a run; empty without one."""
    return next((line for line in read_metrics(workdir) if line["step"] == step), {})


def mean_known(values: np.ndarray) -> Any:
    """Mean over the first axis without NaN, which stands for absent datasets; NaN if there is nothing else."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def group_summary(
    record: HarmonizationState,
    dataset_names: Sequence[str],
    threshold: float,
    groups: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Agreement, norms and factors of the last step by groups of parameters, for a line of metrics.

    On the host; the record is fetched at once. A record of scope "global" has one group, "all".

    Args:
        record: a balancer's record (`recorded`).
        dataset_names: in the order of the dataset axis.
        threshold: Psi below which NGH scales the gradients of a tensor.
        groups: pattern of the parameters' paths by name of the group; groups without a parameter are left out. Default:
            `PLACES` and `KINDS`.

    Returns:
        For each group: "psi/<group>", the mean of Psi over its tensors; "harmonized_share/<group>", the share of its
        tensors whose Psi is below the threshold, for every method; and for each dataset
        "gradient_norm/<group>/<dataset>", the norm over all its tensors, 0 for an absent dataset, and
        "scale/<group>/<dataset>", the geometric mean of the factors, or their mean where one is not above zero.
    """
    record = jax.device_get(record)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(record.psi)):  # of scope "global"
        members = {"all": [0]}
    else:
        names, patterns = flat_names(record.psi), groups or {**PLACES, **KINDS}
        members = {group: [i for i, name in enumerate(names) if re.search(p, name)] for group, p in patterns.items()}
    psi, norms, scales = (np.array(jax.tree.leaves(part), np.float64) for part in record[:3])
    values: dict[str, float] = {}
    for group, rows in members.items():
        if not rows:
            continue
        values[f"psi/{group}"] = float(psi[rows].mean())
        values[f"harmonized_share/{group}"] = float((psi[rows] < threshold).mean())
        norm = np.sqrt((norms[rows] ** 2).sum(0))
        # Weights of methods such as MGDA and IMTL-G may be zero or negative.
        positive = (scales[rows] > 0).all(0)
        logarithms = np.log(np.where(positive, scales[rows], 1))
        scale = np.where(positive, np.exp(logarithms.mean(0)), scales[rows].mean(0))
        for k, dataset in enumerate(dataset_names):
            values[f"gradient_norm/{group}/{dataset}"] = float(norm[k])
            values[f"scale/{group}/{dataset}"] = float(scale[k])
    return values
