"""Bitwise comparison of two trainings: part of `benchmarks.faults`."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from benchmarks.faults.children import half_saved, saved_steps
from h2a2_jax.evaluation.documents import best_step

_ITEMS = ("params", "batch_stats", "optimizer")
_TIMING_KEYS = ("scans_per_second", "compilations")
_SHOWN = 4
_IGNORED_FOLDERS = ("tensorboard", "cache", "checkpoints_damaged", "evaluations_damaged")
"""Folders whose file names contain times, processes and hashes."""


def differences(reference: Path, workdir: Path, *, files: bool = True) -> list[str]:
    """Compare the workdir of a training with that of the reference.

    Args:
        reference: workdir of the training without a fault.
        workdir: workdir of the other training.
        files: True compares the lines of metrics and selection and the names of all files, too. A run that was stopped
            at some step has a line and a checkpoint of that step, which the reference lacks.

    Returns:
        One phrase for each difference.
    """
    found = state_differences(reference, workdir)
    names = ["evaluation.json", "evaluation.csv", "config.json"]
    names += sorted(str(path.relative_to(reference)) for path in reference.glob("evaluations/*/*"))
    found += [name for name in names if _bytes(reference / name) != _bytes(workdir / name)]
    if best_step(reference) != best_step(workdir):
        found.append(f"the best step is {best_step(workdir)}, not {best_step(reference)}")
    if saved_steps(reference) != saved_steps(workdir):
        found.append(f"checkpoints are of {saved_steps(workdir)}, not {saved_steps(reference)}")
    if files:
        found += _line_differences(reference, workdir)
        if _bytes(reference / "selection.jsonl") != _bytes(workdir / "selection.jsonl"):
            found.append("selection.jsonl")
        expected, there = names_of(reference), names_of(workdir)
        found += [f"{name} is missing" for name in sorted(expected - there)]
        found += [f"{name} is stray" for name in sorted(there - expected)]
    return found


def state_differences(reference: Path, workdir: Path, step: int | None = None, other: int | None = None) -> list[str]:
    """Names of the arrays that differ between two checkpoints in any bit.

    Args:
        reference: workdir of one run.
        workdir: workdir of the other run.
        step: step of the checkpoint of `reference`; None: the last one.
        other: step of the checkpoint of `workdir`; None: the same step.
    """
    step = max(saved_steps(reference)) if step is None else step
    other = step if other is None else other
    if other not in saved_steps(workdir):
        return [f"there is no checkpoint of step {other}"]
    found = []
    for item in _ITEMS:
        expected, there = (
            arrays(folder / "checkpoints" / str(s), item) for folder, s in ((reference, step), (workdir, other))
        )
        found += [f"{item}/{name}" for name in {*expected, *there} if not _same(expected.get(name), there.get(name))]
    return found if len(found) <= _SHOWN else [*sorted(found)[:_SHOWN], f"and {len(found) - _SHOWN} arrays more"]


def arrays(checkpoint: Path, item: str) -> dict[str, np.ndarray]:
    """The arrays of an item of a checkpoint, by path."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.StandardCheckpointer() as checkpointer:
        return {
            name: np.asarray(value) for name, value in _leaves("", checkpointer.restore(checkpoint.absolute() / item))
        }


def names_of(workdir: Path) -> set[str]:
    """Names of the files in a workdir without those named by times and hashes; a checkpoint is one name."""
    names = set()
    for path in workdir.rglob("*"):
        parts = path.relative_to(workdir).parts
        if path.is_dir() or parts[0] in _IGNORED_FOLDERS:
            continue
        names.add("/".join(parts[:2]) if parts[0] == "checkpoints" else "/".join(parts))
    return names | {f"checkpoints/{name}" for name in half_saved(workdir)}


def metric_lines(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics in the order of the file, without the values that depend on time and restarts."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _TIMING_KEYS} for line in lines]


def _line_differences(reference: Path, workdir: Path) -> list[str]:
    expected, there = metric_lines(reference), metric_lines(workdir)
    steps, found = ([line["step"] for line in lines] for lines in (expected, there))
    if steps != found:
        return [f"metrics.jsonl has lines of {found}, not {steps}"]
    pairs = zip(expected, there, strict=True)
    other = {key: a["step"] for a, b in pairs for key in {*a, *b} if a.get(key) != b.get(key)}
    return [f"metrics.jsonl differs in {key}, last at step {step}" for key, step in sorted(other.items())[:_SHOWN]]


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(f"{name}/{key}", value)
    else:
        yield name, tree


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
