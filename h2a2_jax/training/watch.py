"""What a run tells between two lines of metrics, gathered from its steps."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

from h2a2_jax.inputs.pipeline import JointStep, JointStream
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.training.balancers import recorded
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.training.parameter_groups import group_summary
from h2a2_jax.training.selection_log import SelectionLog
from h2a2_jax.training.step import StepMetrics

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
        self._step = item.step // self.config.optim.batches

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
