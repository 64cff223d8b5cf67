"""`--mode=eval`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from h2a2_jax.checkpoint.store import checkpoint_place, restore_checkpoint
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import is_main, say
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.evaluate import EvalRequest, chosen_sources, evaluate
from h2a2_jax.inference.augmentation import views


def evaluate_command(config: ExperimentConfig | None, workdir: Path, request: EvalRequest | None = None) -> None:
    """Restore a checkpoint, evaluate it; write evaluation.json, evaluation.csv and evaluation.html.

    The validation scans of all datasets are evaluated into the workdir, as at the end of training; what is asked for
    otherwise has a folder of its own in it.

    Args:
        config: that the checkpoint must agree with, and whose data and evaluation are used; None: the stored one.
        workdir: folder of the run, the checkpoints in it, or that of one step.
        request: which scans, and how; by default the validation scans.

    Raises:
        InputError: there is no checkpoint, it is of another architecture, other datasets or classes than the config,
            scans are missing, or the request makes no sense.
    """
    request = request or EvalRequest()
    views(request.tta)  # what is misspelt is said at once
    if request.split not in ("train", "val"):
        raise InputError(f"There is no split {request.split!r}: use train or val.")
    place = checkpoint_place(workdir)
    if request.step is None and place.step is not None:
        request = replace(request, step=place.step)
    model, stored = restore_checkpoint(workdir, request.step, config)
    if config is not None:
        _check_classes(stored, config)
    config = stored if config is None else config
    chosen_sources(config, request)
    folder = request.output or place.run / results_folder(request)
    results = evaluate(config, model, folder, request=request)
    if is_main():
        from h2a2_jax.evaluation.evaluation_page import write_evaluation_page

        say(f"The page is {write_evaluation_page(results, folder, _subtitle(config, workdir, request))}.")


def results_folder(request: EvalRequest) -> str:
    """Where in a workdir the results of a request are kept."""
    if request.is_plain:
        return "."
    parts = [request.split, request.dataset, request.data and Path(request.data).resolve().name, *request.tta]
    parts += ["cross" if request.cross else None, f"step{request.step}" if request.step is not None else None]
    return "evaluation_" + "_".join(part for part in parts if part)


def _check_classes(stored: ExperimentConfig, config: ExperimentConfig) -> None:
    saved: Mapping[str, Any] = {spec.name: spec for spec in stored.specs}
    for spec in config.specs:
        theirs = saved[spec.name]
        if theirs.classes != spec.classes:
            raise InputError(
                f"The checkpoint's {spec.name} has the classes {', '.join(theirs.classes)}, the config's "
                f"{', '.join(spec.classes)}: give those it was trained with, in their order."
            )
        if theirs.has_yaw != spec.has_yaw:
            words = {True: "turned", False: "axis-aligned"}
            raise InputError(
                f"The checkpoint's {spec.name} has {words[theirs.has_yaw]} boxes, the config's "
                f"{words[spec.has_yaw]} ones: set has_yaw as it was trained with."
            )


def _subtitle(config: ExperimentConfig, workdir: Path, request: EvalRequest) -> str:
    chosen = chosen_sources(config, request).values()
    procedural = [source.name for source in chosen if source.is_procedural]
    parts = [f"{workdir}, split {request.split}"]
    if request.step is not None:
        parts.append(f"step {request.step}")
    if request.data:
        parts.append(f"scans of {request.data}")
    if request.tta:
        parts.append(f"test-time augmentation {', '.join(request.tta)}")
    text = "; ".join(parts) + "."
    if procedural:
        text += (
            f" The scans of {', '.join(procedural)} are procedural stand-ins: these numbers say nothing about the "
            "benchmarks of these names."
        )
    return text
