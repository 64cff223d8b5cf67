"""Whether two trainings came to the same, bit by bit: part of `benchmarks.faults`."""

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
_OF_THE_CLOCK = ("scans_per_second", "compilations")
_SHOWN = 4
_FOLDED = ("tensorboard", "cache", "checkpoints_damaged")
"""Folders whose files are named by times, processes and hashes."""


def differences(reference: Path, workdir: Path, *, files: bool = True) -> list[str]:
    """What a training left behind that the reference did not, or otherwise.

    Args:
        reference: workdir of a training that nothing happened to.
        workdir: of the other.
        files: whether the lines of metrics and selection and the names of all files count too: a run that was told to
            stop at some step has a line and a checkpoint of that step.

    Returns:
        A phrase each.
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
    """Arrays of two checkpoints that are not the same, bit by bit.

    Args:
        reference: workdir of one run.
        workdir: of the other.
        step: of the checkpoint; None: the last of the reference.
        other: step of the checkpoint of `workdir`; None: the same.
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
    """Files of a workdir, but for those named by times and hashes; a checkpoint is one name."""
    names = set()
    for path in workdir.rglob("*"):
        parts = path.relative_to(workdir).parts
        if path.is_dir() or parts[0] in _FOLDED:
            continue
        names.add("/".join(parts[:2]) if parts[0] == "checkpoints" else "/".join(parts))
    return names | {f"checkpoints/{name}" for name in half_saved(workdir)}


def metric_lines(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics as they lie there, without what a clock or a start tells."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _OF_THE_CLOCK} for line in lines]


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
