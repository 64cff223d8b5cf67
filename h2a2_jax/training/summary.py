"""Results of a run for readers: a table of kernel selection, and summary.md in its workdir."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from h2a2_jax.config import ExperimentConfig, to_json
from h2a2_jax.files import whole_file
from h2a2_jax.host import duration
from h2a2_jax.layers import DatasetContext, SelectiveConv
from h2a2_jax.models import DetectorNetwork, selective_layers
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.typing import AnyArray

FILE_NAME = "summary.md"
CURVES = "curves.png"
"""The picture that the summary shows, in the same folder."""


@dataclass(frozen=True)
class CheckpointScores:
    """Scores of a checkpoint.

    Attributes:
        name: "last" or "best".
        step: step of the checkpoint.
        scores: mAP, 0 to 1, by dataset and IoU threshold; None if the mAP is not defined.
    """

    name: str
    step: int
    scores: Mapping[str, Mapping[float, float | None]]

    @classmethod
    def of(cls, name: str, step: int, documents: Mapping[str, Any]) -> "CheckpointScores":
        """Scores in the content of evaluation.json (`h2a2_jax.evaluation.documents`)."""
        scores = {
            dataset: {float(level["iou"]): level["mAP"] for level in document["thresholds"]}
            for dataset, document in documents.items()
        }
        return cls(name, step, scores)


@dataclass(frozen=True)
class RunFacts:
    """Facts of a finished run.

    Attributes:
        config: the run's configuration.
        num_scans: training scans by dataset.
        steps: optimiser steps done.
        epochs: passes through the largest dataset in these steps.
        results: scores of the checkpoints that were evaluated.
        seconds: time of this process, from its start to the last evaluation.
        scans_per_second: training scans of all devices per second, without compiling and evaluating; None: not known.
        resumed_after: steps done before this process; 0: it began the run.
        skipped_steps: steps that were skipped because a value was not finite.
        skipped_scans: scans that could not be used.
        compilations: programs that were compiled or loaded from the compilation cache.
        loaded_compilations: programs that were loaded from the compilation cache.
        compilation_seconds: time that compiling and loading took.
        devices: devices of the run (`describe_devices`).
        versions: versions of packages by name (`h2a2_jax.host.versions`).
        revision: revision of this package at the start of the run (`h2a2_jax.host.revision`).
    """

    config: ExperimentConfig
    num_scans: Mapping[str, int]
    steps: int
    epochs: float
    results: Sequence[CheckpointScores]
    seconds: float
    scans_per_second: float | None
    resumed_after: int
    skipped_steps: int
    skipped_scans: int
    compilations: int
    loaded_compilations: int
    compilation_seconds: float
    devices: str
    versions: Mapping[str, str]
    revision: str


def describe_devices(mesh: Mesh) -> str:
    """Name the devices of a mesh, as in "6 x H100 in 2 processes, mesh 3 dataset x 2 replica"."""
    devices = list(mesh.devices.flat)
    processes = len({device.process_index for device in devices})
    shared = f" in {processes} processes" if processes > 1 else ""
    axes = " x ".join(f"{count} {axis}" for axis, count in mesh.shape.items())
    return f"{len(devices)} x {devices[0].device_kind}{shared}, mesh {axes}"


def write_summary(workdir: Path, facts: RunFacts) -> Path:
    """Write <workdir>/summary.md, which shows `CURVES`, and return its path.

    Raises:
        OSError: the file cannot be written.
    """
    path = workdir / FILE_NAME
    with whole_file(path) as part:
        part.write_text(summary(workdir, facts), encoding="utf-8")
    return path


def summary(workdir: Path, facts: RunFacts) -> str:
    """Return the text of summary.md; its commands name the workdir as it is given."""
    nouns = {source.name: "procedural scan" if source.is_procedural else "scan" for source in facts.config.datasets}
    datasets = ", ".join(f"{name} ({_count(count, nouns[name])})" for name, count in facts.num_scans.items())
    epochs = f"{facts.epochs:.3g} epoch{'' if facts.epochs == 1 else 's'}"
    parts = [
        f"# {workdir.absolute().name}",
        f"Trained on {datasets}: {_count(facts.steps, 'step')}, {epochs} of the largest dataset.",
        "## Results",
        _results(facts.results) if facts.results else "Nothing was evaluated.",
        f"![Losses, learning rate, gradients and mAP over the steps]({CURVES})",
        "## The run",
        _table([("", ""), *_rows(facts)]),
        "## What next",
        "\n".join(["```bash", *next_commands(workdir, facts.config), "```"]),
        f"<details>\n<summary>Config</summary>\n\n```json\n{to_json(facts.config)}\n```\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _results(results: Sequence[CheckpointScores]) -> str:
    # The best checkpoint often is the last one: its numbers need not be there twice.
    columns: dict[int, list[CheckpointScores]] = {}
    for one in results:
        columns.setdefault(one.step, []).append(one)
    names = list(dict.fromkeys(name for one in results for name in one.scores))
    header, rows = ["dataset"], [[name] for name in names]
    mean = ["mean"]
    for step, same in columns.items():
        scores = same[0].scores
        title = f"{' and '.join(one.name for one in same)} (step {step})"
        for iou in sorted({iou for by_iou in scores.values() for iou in by_iou}):
            header.append(f"mAP@{iou:g}, {title}")
            values = [scores.get(name, {}).get(iou) for name in names]
            for row, value in zip(rows, values, strict=True):
                row.append(_per_cent(value))
            known = [value for value in values if value is not None]
            mean.append(_per_cent(sum(known) / len(known) if len(known) == len(values) else None))
    if len(names) > 1:
        rows.append(mean)
    return f"Mean average precision in per cent, on validation scans.\n\n{_table([header, *rows])}"


def _rows(facts: RunFacts) -> list[tuple[str, str]]:
    """Name and value of the facts in the table of the run."""
    resumed = f", going on after step {facts.resumed_after}" if facts.resumed_after else ""
    compiled = _count(facts.compilations, "program")
    loaded = f", {facts.loaded_compilations} of them from the cache" if facts.loaded_compilations else ""
    speed = "not known" if facts.scans_per_second is None else f"{facts.scans_per_second:.1f}"
    return [
        ("time", f"{duration(facts.seconds)}{resumed}"),
        ("scans per second", speed),
        ("skipped steps", str(facts.skipped_steps)),
        ("skipped scans", str(facts.skipped_scans)),
        ("compilations", f"{compiled}{loaded}, {facts.compilation_seconds:.0f} s"),
        ("devices", facts.devices),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("revision", facts.revision),
    ]


def next_commands(workdir: Path, config: ExperimentConfig) -> list[str]:
    """Return commands that use a trained run."""
    home, names = shlex.quote(str(workdir)), config.dataset_names
    head = f" --dataset={names[0]}" if len(names) > 1 else ""
    return [
        f"python run.py --mode=eval --workdir={home}",
        f"python run.py --mode=predict --workdir={home} --input=FOLDER --output=boxes{head}",
        f"python run.py --mode=report --workdir={home}",
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as Markdown; the first row is the header. All but the first of many columns are aligned right."""
    right = len(rows[0]) > 2
    rule = ["---", *["---:" if right else "---"] * (len(rows[0]) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [rows[0], rule, *rows[1:]]
    )


def _per_cent(score: float | None) -> str:
    return "\N{EN DASH}" if score is None else f"{100 * score:.1f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class LayerReport:
    """Kernel selection in one layer, and changes of its parameters since the start of training.

    Attributes:
        name: name of the layer.
        exclusive_share: share of (scan, offset) pairs that took the exclusive kernel in training, by dataset.
        lowest_score: smallest alpha * beta, by dataset.
        highest_score: largest alpha * beta, by dataset.
        offsets: number of offsets.
        exclusive_offsets: number of offsets whose alpha is below one half, for any dataset.
        disagreement: median and largest F of the offsets; None with the prior "learned".
        prior_moved: mean absolute change of O.
        prototypes_moved: mean angle (degrees) between a prototype and itself at the start.
        tau: threshold of alpha * beta in prediction.
    """

    name: str
    exclusive_share: np.ndarray
    lowest_score: np.ndarray
    highest_score: np.ndarray
    offsets: int
    exclusive_offsets: int
    disagreement: tuple[float, float] | None
    prior_moved: float
    prototypes_moved: float
    tau: float

    def explanation(self, datasets: Sequence[str]) -> str:
        """Explain datasets for which the layer predicts with one kernel everywhere; empty without such a dataset.

        By the scores, because training explores: its choices are not those of prediction.
        """
        exclusive, shared = self.highest_score < self.tau, self.lowest_score >= self.tau

        def names(chosen: np.ndarray) -> str:
            return "all" if chosen.all() else ", ".join(np.array(datasets)[chosen])

        parts = []
        if exclusive.any():
            most = self.highest_score[exclusive].max()
            parts.append(f"{names(exclusive)} exclusive everywhere: alpha*beta at most {most:.3f} < tau {self.tau}")
        if shared.any():
            least = self.lowest_score[shared].min()
            parts.append(f"{names(shared)} shared everywhere: alpha*beta at least {least:.3f} >= tau {self.tau}")
        return "; ".join(parts)


def selection_report(
    start: DetectorNetwork, end: DetectorNetwork, metrics: dict[str, SelectionMetrics]
) -> tuple[list[LayerReport], np.ndarray]:
    """Compare a model with itself at the start.

    Args:
        start: the detector before training.
        end: the trained detector.
        metrics: means over the last steps, by layer.

    Returns:
        One report a layer, and the relative distance |E - E at the start| / |E at the start| of each dataset's
        embedding.
    """
    before = selective_layers(start)
    reports = []
    for name, layer in selective_layers(end).items():
        seen = metrics[name]
        f = None if layer.disagreement is None else np.asarray(layer.disagreement[...], np.float64)
        reports.append(
            LayerReport(
                name,
                exclusive_share=np.asarray(1 - seen.gamma.mean(-1)),
                lowest_score=np.asarray(seen.lowest_score),
                highest_score=np.asarray(seen.highest_score),
                offsets=seen.alpha.shape[1],
                exclusive_offsets=int((np.asarray(seen.alpha) < 0.5).any(0).sum()),
                disagreement=None if f is None else (float(np.median(f)), float(f.max())),
                prior_moved=float(jnp.abs(layer.prior[...] - before[name].prior[...]).mean()),
                prototypes_moved=_mean_angle(_prototypes(layer), _prototypes(before[name])),
                tau=layer.selection.tau,
            )
        )
    if start.embedding is None or end.embedding is None:
        return reports, np.zeros(0)
    old, new = np.asarray(start.embedding[...]), np.asarray(end.embedding[...])
    return reports, np.linalg.norm(new - old, axis=1) / np.linalg.norm(old, axis=1)


def _prototypes(layer: SelectiveConv) -> AnyArray:
    """Prototypes of a layer's first dataset."""
    graph, state = nnx.split(layer)
    layer = nnx.merge(graph, jax.tree.map(jnp.asarray, state))  # the trained detector holds numpy arrays
    return layer.structure(DatasetContext.one(0, len(layer.exclusive[...]))).prototypes


def _mean_angle(first: AnyArray, second: AnyArray) -> float:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())


def selection_table(reports: Sequence[LayerReport], embedding_moved: np.ndarray, datasets: Sequence[str]) -> str:
    """Format the reports as a table."""
    width = max(len(report.name) for report in reports)
    lines = [
        "Kernel selection: share of exclusive kernels in training by dataset; offsets that prefer them (alpha < 1/2); "
        "median and largest F, the disagreement of the datasets' gradients; how far O (mean change) and the prototypes "
        "P (mean angle) moved",
        f"{'layer':{width}s} "
        + " ".join(f"{name:>9s}" for name in datasets)
        + "   prefer      F  largest       O        P",
    ]
    dash = "\N{EN DASH}"
    for report in reports:
        shares = " ".join(f"{share:9.2f}" for share in report.exclusive_share)
        why = report.explanation(datasets)
        prefer = f"{report.exclusive_offsets:3d} of {report.offsets:<2d}"
        f = "{:6.2f} {:8.2f}".format(*report.disagreement) if report.disagreement else f"{dash:>6s} {dash:>8s}"
        moved = f"{report.prior_moved:8.4f} {report.prototypes_moved:7.2f}\N{DEGREE SIGN}"
        lines.append(f"{report.name:{width}s} {shares} {prefer} {f} {moved}" + (f"   {why}" if why else ""))
    moves = ", ".join(f"{name} {100 * moved:.1f} %" for name, moved in zip(datasets, embedding_moved, strict=True))
    return "\n".join([*lines, f"Embeddings E moved by: {moves} of their length"])
