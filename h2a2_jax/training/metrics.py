"""Metrics of a run: gathered over steps, written as JSON lines and for TensorBoard."""

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm

from h2a2_jax.balancers import recorded
from h2a2_jax.balancers.ngh import HarmonizationState
from h2a2_jax.checkpoint.parameter_groups import KINDS, PLACES
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.files import JsonLinesWriter, read_json_lines
from h2a2_jax.host import duration
from h2a2_jax.loader.stream import JointStep, JointStream
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.training.selection_log import SelectionLog
from h2a2_jax.training.step import StepMetrics

FILE_NAME = "metrics.jsonl"
SCHEMA_VERSION = 1


class MetricsWriter:
    """Writes `metrics.jsonl`, one JSON object a logged step, and appends to it when a run goes on.

    Schema, version 1. Each line is an object of its own:

    - "step": int, optimiser steps done; always the first key. Of two lines of one step the later one counts: where an
      evaluation follows, the line is written once more with its scores.
    - "version": int, the version of this schema; always the second key.
    - any further key: the value of a metric, a number or null. A slash parts a metric from what it is of, as in
      "loss/scannet". Null stands for a value that is not finite, which JSON cannot express.

    Every line is flushed when written, so that a killed run leaves its metrics behind. A last line that a kill cut
    short is dropped when the run goes on.

    Args:
        workdir: folder of the run; made if missing.
    """

    def __init__(self, workdir: str | Path):
        self._lines = JsonLinesWriter(Path(workdir) / FILE_NAME, SCHEMA_VERSION)
        self.path = self._lines.path

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of one step.

        Args:
            step: optimiser steps done.
            metrics: numbers by name, None for one that is not known; arrays of one element count as numbers and
                are fetched from their device here.

        Raises:
            ValueError: if a metric is no single number or is named as a key of the schema.
        """
        self._lines.write(step, {name: _number(name, value) for name, value in metrics.items()})

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._lines.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float | int | None]]:
    """The lines of a run's `metrics.jsonl` in the order of their steps, as `MetricsWriter` describes them.

    Raises:
        InputError: a line is damaged or of another version.
    """
    return read_json_lines(Path(workdir) / FILE_NAME, SCHEMA_VERSION)


class Progress:
    """A line of progress on standard error: step of total, loss, scans per second, time taken and time left.

    In a terminal the line is updated in place; in a log a new line is printed at most every `interval` seconds, and
    always for the last step. Time left extrapolates from the steps of this process, so a run that goes on from step 900
    of 1000 is not thought fast.

    Args:
        total_steps: steps of the whole run.
        first_step: steps done before this process, for a run that goes on.
        interval: seconds between two lines of a log.
    """

    def __init__(self, total_steps: int, first_step: int = 0, interval: float = 30.0):
        self._total, self._first, self._interval = total_steps, first_step, interval
        self._scans = 0
        self._start = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if terminal else None

    def update(self, step: int, loss: float, scans: int) -> None:
        """Report a step.

        Args:
            step: steps done, this one included.
            loss: the loss to show.
            scans: scans that were trained on since the last call.
        """
        self._scans += scans
        now = time.monotonic()
        elapsed = now - self._start
        rate = self._scans / max(elapsed, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} scans/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= self._total or now - self._last_line >= self._interval:
            self._last_line = now
            left = elapsed / max(step - self._first, 1) * (self._total - step)
            print(
                f"step {step}/{self._total}  loss {loss:.4f}  {rate:.1f} scans/s  "
                f"elapsed {duration(elapsed)}  left {duration(left)}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _number(name: str, value: Any) -> float | int | None:
    if value is None:
        return None
    array = np.asarray(value)
    # Kind V is bfloat16 and its like.
    if array.size != 1 or array.dtype.kind not in "iufV":
        raise ValueError(f"metric {name!r} is {value!r}, expected a single number; reduce or leave it out")
    number = array.item()
    return number if math.isfinite(number) else None


FOLDER = "tensorboard"
"""In the workdir of a run."""


class TensorBoardWriter:
    """Writes scalars to an event file of its own; `tensorboard --logdir=<folder>` shows those of all files as one run.

    Every line is on the disk when `write` returns, so that a killed run leaves its metrics behind. A run that goes on
    tells TensorBoard to forget the steps after its checkpoint, which it takes again: none is shown twice.

    Args:
        folder: of the event files, <workdir>/tensorboard; made if missing.
        first_step: optimiser steps done before this process; 0 for a new run.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    # tensorboardX's own writers hand events to a thread, which a kill ends with what it holds, and name the file by the
    # second, so that a run which goes on within one overwrites it: here are its records and messages alone.
    def __init__(self, folder: str | Path, first_step: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: ten digits of seconds first, as all writers have them.
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{os.getpid()}"
        self.path = folder / name
        self._records = RecordWriter(str(self.path))
        self._write(file_version="brain.Event:2")
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write the scalars of one step; what is None or not finite is left out.

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

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_MEANS = ("alpha", "beta", "gamma")


@dataclass
class Watch:
    """Gathers what steps report between two lines of metrics.

    Attributes:
        config: of the run.
        specs: of its datasets.
        schedule: learning rate by the number of steps applied.
        stream: of the scans.
        selection_log: is told of kernel selection with every summary.
        scans_since_summary: scans of the steps that the last summary was of.
        selection: of the last steps.
    """

    config: ExperimentConfig
    specs: Sequence[DatasetSpec]
    schedule: optax.Schedule
    stream: JointStream
    selection_log: SelectionLog | None = None
    scans_since_summary: int = 0
    selection: list[dict[str, SelectionMetrics]] = field(default_factory=list)
    _pending: list[StepMetrics] = field(default_factory=list)
    _dropped: int = 0
    _since: float = field(default_factory=time.monotonic)
    _scans: int = 0
    _step: int = 0
    _summaries: int = 0
    _timed_scans: int = 0
    _timed_seconds: float = 0.0

    _REMEMBERED = 50

    def see(self, item: JointStep, metrics: StepMetrics) -> None:
        """Take note of a batch; what it computes stays on the device until the summary."""
        self._pending.append(metrics)
        self._scans += item.num_scans
        self._dropped += item.dropped_points
        self._step = item.step // self.config.optim.accumulate_steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place inside is no part of the scans per second."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    @property
    def scans_per_second(self) -> float | None:
        """Of all steps but those before the first summary, of which one compiled; None where there are no others."""
        return self._timed_scans / self._timed_seconds if self._timed_seconds else None

    def summary(self, balancer: Any) -> dict[str, float]:
        """Means since the last summary, as one line of metrics.jsonl."""
        steps = jax.device_get(self._pending)
        self._pending = []
        self.selection = (self.selection + [metrics.selection for metrics in steps])[-self._REMEMBERED :]
        if self.selection_log is not None:
            self.selection_log.add(self._step + 1, [metrics.selection for metrics in steps])
        now = time.monotonic()
        good = np.array([not metrics.nonfinite.any() for metrics in steps])
        present = np.stack([metrics.present for metrics in steps]) & good[:, None]
        skipped = int(steps[-1].skipped)
        box, classification = (
            mean_known(np.where(present, np.stack([getattr(metrics, part) for metrics in steps]), np.nan))
            for part in ("box_loss", "class_loss")
        )
        values: dict[str, float] = {}
        for d, spec in enumerate(self.specs):
            values[f"loss/{spec.name}"] = float(box[d] + classification[d])
            values[f"loss_box/{spec.name}"] = float(box[d])
            values[f"loss_class/{spec.name}"] = float(classification[d])
        values["learning_rate"] = float(self.schedule(max(self._step - skipped, 0)))
        norms = [float(metrics.gradient_norm) for metrics in steps if metrics.gradient_norm > 0]
        values["gradient_norm"] = sum(norms) / len(norms) if norms else math.nan
        values |= self._harmonization(balancer)
        shares = [layer.exclusive_share for metrics in steps for layer in metrics.selection.values()]
        for d, spec in enumerate(self.specs if shares else ()):
            values[f"exclusive_share/{spec.name}"] = float(mean_known(np.array([share[d] for share in shares])))
        values["dropped_points"] = self._dropped
        values["skipped_scans"] = len(self.stream.skipped)
        values["skipped_steps"] = skipped
        seconds = max(now - self._since, 1e-9)
        values["scans_per_second"] = self._scans / seconds
        if self._summaries:
            self._timed_scans, self._timed_seconds = self._timed_scans + self._scans, self._timed_seconds + seconds
        self._summaries += 1
        self.scans_since_summary, self._scans, self._dropped, self._since = self._scans, 0, 0, now
        return values

    @property
    def has_news(self) -> bool:
        """Whether steps were seen since the last summary."""
        return bool(self._pending)

    def _harmonization(self, balancer: Any) -> dict[str, float]:
        """Agreement, norms and factors of the last step."""
        record = jax.device_get(recorded(balancer))
        if record is None:
            return {}
        threshold = self.config.harmonize.threshold
        psi = np.array(jax.tree.leaves(record.psi))
        harmonized = psi < threshold
        return {
            "psi/mean": float(psi.mean()),
            "psi/min": float(psi.min()),
            "psi/harmonized_share": float(harmonized.mean()),
            "psi/cap_hits": int(record.cap_hits),
            **group_summary(record, self.config.dataset_names, threshold),
        }

    def mean_selection(self) -> dict[str, SelectionMetrics]:
        """Kernel selection over the last steps: mean share, extreme scores."""
        return {
            layer: SelectionMetrics(
                **{
                    part: mean_known(np.stack([getattr(step[layer], part) for step in self.selection]))
                    for part in _MEANS
                },
                lowest_score=np.fmin.reduce([step[layer].lowest_score for step in self.selection]),
                highest_score=np.fmax.reduce([step[layer].highest_score for step in self.selection]),
            )
            for layer in self.selection[0]
        }


def mean_known(values: np.ndarray) -> Any:
    """Mean over the first axis of what is not NaN, as absent datasets are; NaN where there is nothing else."""
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

    On the host; the record is fetched at once. With a record of scope "global" there is one group, "all".

    Args:
        record: of a balancer (`recorded`).
        dataset_names: in the order of the dataset axis.
        threshold: Psi below which NGH scales the gradients of a tensor.
        groups: pattern of the parameters' paths by name of the group; groups without a parameter are left out. By
            default `PLACES` and `KINDS`.

    Returns:
        For each group: "psi/<group>", the mean of Psi over its tensors; "harmonized_share/<group>", the share of its
        tensors whose Psi is below the threshold, whether the method scales them or not; and for each dataset
        "gradient_norm/<group>/<dataset>", the norm over all its tensors, 0 for an absent dataset, and
        "scale/<group>/<dataset>", the geometric mean of the factors.
    """
    record = jax.device_get(record)
    is_global = jax.tree_util.treedef_is_leaf(jax.tree.structure(record.psi))
    members = {"all": [0]} if is_global else _members(flat_names(record.psi), groups or {**PLACES, **KINDS})
    psi, norms, scales = (np.array(jax.tree.leaves(part), np.float64) for part in record[:3])
    values: dict[str, float] = {}
    for group, rows in members.items():
        values[f"psi/{group}"] = float(psi[rows].mean())
        values[f"harmonized_share/{group}"] = float((psi[rows] < threshold).mean())
        norm = np.sqrt((norms[rows] ** 2).sum(0))
        scale = np.exp(np.log(scales[rows]).mean(0))
        for k, dataset in enumerate(dataset_names):
            values[f"gradient_norm/{group}/{dataset}"] = float(norm[k])
            values[f"scale/{group}/{dataset}"] = float(scale[k])
    return values


def _members(names: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[int]]:
    """Rows of each group's tensors."""
    rows = {group: [i for i, name in enumerate(names) if re.search(pattern, name)] for group, pattern in groups.items()}
    return {group: found for group, found in rows.items() if found}
