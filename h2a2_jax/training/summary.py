"""What a run did and how well, as a page to read: summary.md in its workdir."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from h2a2_jax.config import ExperimentConfig, to_json
from h2a2_jax.files import whole_file
from h2a2_jax.host import duration

FILE_NAME = "summary.md"
CURVES = "curves.png"
"""The picture that the summary shows, in the same folder."""


@dataclass(frozen=True)
class CheckpointScores:
    """How well a checkpoint did.

    Attributes:
        name: "last" or "best".
        step: of the checkpoint.
        scores: mAP, 0 to 1, by dataset and IoU threshold; None where it is not defined.
    """

    name: str
    step: int
    scores: Mapping[str, Mapping[float, float | None]]

    @classmethod
    def of(cls, name: str, step: int, documents: Mapping[str, Any]) -> "CheckpointScores":
        """Those that evaluation.json holds (`h2a2_jax.evaluation.documents`)."""
        scores = {
            dataset: {float(level["iou"]): level["mAP"] for level in document["thresholds"]}
            for dataset, document in documents.items()
        }
        return cls(name, step, scores)


@dataclass(frozen=True)
class RunDevices:
    """What a run trained on.

    Attributes:
        kind: of device, as JAX names it.
        count: how many.
        processes: that share them.
        mesh: number of devices along each axis.
    """

    kind: str
    count: int
    processes: int
    mesh: Mapping[str, int]

    @classmethod
    def of(cls, mesh: Mesh) -> "RunDevices":
        """Those of a mesh."""
        devices = list(mesh.devices.flat)
        processes = len({device.process_index for device in devices})
        return cls(devices[0].device_kind, len(devices), processes, dict(mesh.shape))


@dataclass(frozen=True)
class RunFacts:
    """What a summary is made of.

    Attributes:
        config: of the run.
        num_scans: training scans by dataset.
        steps: optimiser steps done.
        epochs: passes through the largest dataset that these are.
        results: of the checkpoints that were evaluated.
        seconds: that this process took, from its start to the last evaluation.
        scans_per_second: trained on, all devices together, without what compiling and evaluating took; None: not known.
        resumed_after: step that this process went on after; 0: it began the run.
        skipped_steps: whose gradients were not finite, or that were left out for another reason.
        skipped_scans: that could not be used.
        compilations: programs that were compiled or loaded.
        loaded_compilations: those of them from the compilation cache.
        compilation_seconds: that these took.
        devices: trained on.
        versions: of packages, by name (`h2a2_jax.host.versions`).
        revision: of this package (`h2a2_jax.host.revision`), as the run began.
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
    devices: RunDevices
    versions: Mapping[str, str]
    revision: str


def write_summary(workdir: Path, facts: RunFacts) -> Path:
    """Write <workdir>/summary.md in one go; it shows `CURVES`, drawn before or after.

    Args:
        workdir: of the run.
        facts: of the run.

    Returns:
        Path of the file.

    Raises:
        OSError: it cannot be written.
    """
    path = workdir / FILE_NAME
    with whole_file(path) as part:
        part.write_text(summary(workdir, facts), encoding="utf-8")
    return path


def summary(workdir: Path, facts: RunFacts) -> str:
    """The text of summary.md.

    Args:
        workdir: of the run; its commands name it as it is given.
        facts: of the run.
    """
    nouns = {source.name: "procedural scan" if source.is_procedural else "scan" for source in facts.config.datasets}
    datasets = ", ".join(f"{name} ({_counted(count, nouns[name])})" for name, count in facts.num_scans.items())
    epochs = f"{facts.epochs:.3g} epoch{'' if facts.epochs == 1 else 's'}"
    parts = [
        f"# {workdir.absolute().name}",
        f"Trained on {datasets}: {_counted(facts.steps, 'step')}, {epochs} of the largest dataset.",
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
        for iou in sorted({iou for own in scores.values() for iou in own}):
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
    """What happened, a name and a value each."""
    devices = facts.devices
    went_on = f", going on after step {facts.resumed_after}" if facts.resumed_after else ""
    compiled = _counted(facts.compilations, "program")
    loaded = f", {facts.loaded_compilations} of them from the cache" if facts.loaded_compilations else ""
    shared = f" in {devices.processes} processes" if devices.processes > 1 else ""
    mesh = " x ".join(f"{count} {axis}" for axis, count in devices.mesh.items())
    speed = "not known" if facts.scans_per_second is None else f"{facts.scans_per_second:.1f}"
    return [
        ("time", f"{duration(facts.seconds)}{went_on}"),
        ("scans per second", speed),
        ("skipped steps", str(facts.skipped_steps)),
        ("skipped scans", str(facts.skipped_scans)),
        ("compilations", f"{compiled}{loaded}, {facts.compilation_seconds:.0f} s"),
        ("devices", f"{devices.count} x {devices.kind}{shared}, mesh {mesh}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("revision", facts.revision),
    ]


def next_commands(workdir: Path, config: ExperimentConfig) -> list[str]:
    """What may be done with a run that is trained, commands as they are typed.

    Args:
        workdir: of the run.
        config: of the run.
    """
    home, names = shlex.quote(str(workdir)), config.dataset_names
    head = f" --dataset={names[0]}" if len(names) > 1 else ""
    return [
        f"python run.py --mode=eval --workdir={home}",
        f"python run.py --mode=predict --workdir={home} --input=FOLDER --output=boxes{head}",
        f"python run.py --mode=report --workdir={home}",
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the header. Numbers are to the right, as is all but the first column."""
    right = len(rows[0]) > 2
    rule = ["---", *["---:" if right else "---"] * (len(rows[0]) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [rows[0], rule, *rows[1:]]
    )


def _per_cent(score: float | None) -> str:
    return "\N{EN DASH}" if score is None else f"{100 * score:.1f}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
