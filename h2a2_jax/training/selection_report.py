"""What kernel selection did in a run: which share of offsets stayed exclusive, and how far its parameters moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from h2a2_jax.models import Detector
from h2a2_jax.models.detector import selective_layers
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.typing import AnyArray


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
    start: Detector, end: Detector, metrics: dict[str, SelectionMetrics]
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
