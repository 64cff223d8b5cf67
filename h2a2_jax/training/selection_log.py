"""Kernel selection over a run: a log, and a report at its end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.files import JsonLinesWriter, read_json_lines
from h2a2_jax.models import TR3D
from h2a2_jax.models.tr3d import selective_layers
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.typing import AnyArray

FILE_NAME = "selection.jsonl"
SCHEMA_VERSION = 1
MAX_LINES = 200
_DIGITS = 4


class SelectionLog:
    """Gathers alpha, beta and gamma of every step and writes their means to `selection.jsonl` now and then.

    Schema, version 1. Each line is an object of its own:

    - "step": int, optimiser steps done; always the first key. Of two lines of one step (a killed run that went on) the
      later one counts.
    - "version": int, the version of this schema.
    - "steps": int, how many steps the values are means over: those since the line before, of this process. The values
      of a dataset are means over those of them that it took part in.
    - "datasets": names, in the order of the dataset axis D.
    - "layers": by name of the layer, an object with "alpha" [D][V], offset validity prior, the same for all datasets
      unless each has its own; "beta" [D][V], structural consistency, mean over scans; "gamma" [D][V], share of scans
      that took the shared kernel. V offsets, x fastest. Rounded to four digits; null where a dataset took no part.

    A line is written after every `every` steps and after the last one; a run without kernel selection writes no file.

    Attributes:
        every: steps from one line to the next, a multiple of `log_every`.
    """

    def __init__(self, workdir: str | Path, datasets: Sequence[str], total_steps: int, log_every: int):
        """Opens nothing yet.

        Args:
            workdir: folder of the run.
            datasets: names, in the order of the dataset axis.
            total_steps: of the run.
            log_every: steps from one call of `add` to the next.
        """
        self.path = Path(workdir) / FILE_NAME
        self.every = log_every * max(1, math.ceil(total_steps / MAX_LINES / log_every))
        self._datasets, self._total = list(datasets), total_steps
        self._sums: dict[str, tuple[Any, Any]] = {}
        self._steps = 0

    def add(self, step: int, selections: Sequence[Mapping[str, SelectionMetrics]]) -> None:
        """Take note of what steps reported, and write a line if one is due.

        Args:
            step: steps done, those of `selections` included.
            selections: of each step, by layer; arrays on the host.
        """
        for selection in selections:
            self._steps += 1
            for layer, seen in selection.items():
                values = np.stack([seen.alpha, seen.beta, seen.gamma]).astype(np.float64)
                known = np.isfinite(values)  # NaN: the dataset took no part in the step
                total, count = self._sums.get(layer, (0.0, 0))
                self._sums[layer] = (total + np.where(known, values, 0), count + known)
        if self._sums and (step % self.every == 0 or step >= self._total):
            self._write(step)

    def _write(self, step: int) -> None:
        layers = {}
        for layer, sums in self._sums.items():
            alpha, beta, gamma = (_rounded(mean) for mean in _mean(*sums))
            layers[layer] = {"alpha": alpha, "beta": beta, "gamma": gamma}
        # Opened for each line: there are few, and nothing is left to close.
        writer = JsonLinesWriter(self.path, SCHEMA_VERSION)
        writer.write(step, {"steps": self._steps, "datasets": self._datasets, "layers": layers})
        writer.close()
        self._sums, self._steps = {}, 0


@dataclass(frozen=True)
class SelectionHistory:
    """One layer over training.

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
    """The steps of the lines and what they say of each layer.

    Args:
        path: of `selection.jsonl`.
        datasets: names; sets the order of the dataset axis.

    Raises:
        InputError: the file is damaged, of another version, of other datasets, or its lines differ in their layers.
    """
    lines = read_json_lines(path, SCHEMA_VERSION)
    if not lines:
        return np.zeros(0, np.int64), {}
    names = list(lines[-1]["layers"])
    for line in lines:
        if set(line["datasets"]) != set(datasets) or list(line["layers"]) != names:
            raise InputError(
                f"The line of step {line['step']} in {path} is of other datasets or layers than the run: expected are "
                f"{', '.join(datasets)} and the layers of the last line; remove lines of another run."
            )

    def of_datasets(layer: str, part: str) -> np.ndarray:
        told = [(line["layers"][layer][part], line["datasets"]) for line in lines]
        return np.array([[values[order.index(name)] for name in datasets] for values, order in told], np.float64)

    history = {
        layer: SelectionHistory(*(of_datasets(layer, part) for part in ("alpha", "beta", "gamma"))) for layer in names
    }
    return np.array([line["step"] for line in lines], np.int64), history


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _rounded(values: np.ndarray) -> list:
    rounded = np.round(values, _DIGITS).astype(object)
    rounded[~np.isfinite(values)] = None
    return rounded.tolist()


@dataclass(frozen=True)
class LayerReport:
    """One layer with kernel selection.

    Attributes:
        name: of the layer.
        exclusive_share: by dataset, share of (scan, offset) pairs that took the exclusive kernel.
        lowest_score: by dataset, smallest alpha * beta.
        highest_score: by dataset, largest.
        prior_moved: mean |O - O at the start|.
        prototypes_moved: mean angle (degrees) between a prototype and itself at the start.
        tau: threshold of alpha * beta.
    """

    name: str
    exclusive_share: np.ndarray
    lowest_score: np.ndarray
    highest_score: np.ndarray
    prior_moved: float
    prototypes_moved: float
    tau: float

    def explanation(self, datasets: Sequence[str]) -> str:
        """Why the layer takes one kernel everywhere for a dataset; empty if it takes both."""
        parts = []
        for name, share, low, high in zip(
            datasets, self.exclusive_share, self.lowest_score, self.highest_score, strict=True
        ):
            if share >= 1:
                parts.append(f"{name} exclusive everywhere: alpha*beta at most {high:.3f} < tau {self.tau}")
            elif share <= 0:
                parts.append(f"{name} shared everywhere: alpha*beta at least {low:.3f} >= tau {self.tau}")
        return "; ".join(parts)


def selection_report(
    start: TR3D, end: TR3D, metrics: dict[str, SelectionMetrics]
) -> tuple[list[LayerReport], np.ndarray]:
    """Compare a model with itself at the start.

    Args:
        start: with the parameters at the start of training.
        end: the trained one.
        metrics: of the last steps (means over them).

    Returns:
        One report a layer, and the relative distance |E - E at the start| / |E at the start| of each dataset's
        embedding.
    """
    before = selective_layers(start)
    reports = []
    for name, layer in selective_layers(end).items():
        seen = metrics[name]
        reports.append(
            LayerReport(
                name,
                exclusive_share=np.asarray(seen.exclusive_share),
                lowest_score=np.asarray(seen.lowest_score),
                highest_score=np.asarray(seen.highest_score),
                prior_moved=float(jnp.abs(layer.prior[...] - before[name].prior[...]).mean()),
                prototypes_moved=_mean_angle(layer.prototypes[...], before[name].prototypes[...]),
                tau=layer.selection.tau,
            )
        )
    if start.embedding is None or end.embedding is None:
        return reports, np.zeros(0)
    old, new = np.asarray(start.embedding[...]), np.asarray(end.embedding[...])
    return reports, np.linalg.norm(new - old, axis=1) / np.linalg.norm(old, axis=1)


def _mean_angle(first: AnyArray, second: AnyArray) -> float:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())


def selection_table(reports: Sequence[LayerReport], embedding_moved: np.ndarray, datasets: Sequence[str]) -> str:
    """The report as text."""
    width = max(len(report.name) for report in reports)
    lines = [
        "Kernel selection: share of exclusive offsets by dataset; how far the validity priors O (mean change) and the "
        "prototypes P (mean angle) moved",
        f"{'layer':{width}s} " + " ".join(f"{name:>9s}" for name in datasets) + "       O        P",
    ]
    for report in reports:
        shares = " ".join(f"{share:9.2f}" for share in report.exclusive_share)
        why = report.explanation(datasets)
        moved = f"{report.prior_moved:8.4f} {report.prototypes_moved:7.2f}\N{DEGREE SIGN}"
        lines.append(f"{report.name:{width}s} {shares} {moved}" + (f"   {why}" if why else ""))
    moves = ", ".join(f"{name} {100 * moved:.1f} %" for name, moved in zip(datasets, embedding_moved, strict=True))
    return "\n".join([*lines, f"Embeddings E moved by: {moves} of their length"])
