"""Transfer: detectors that were trained without a dataset, on its scans as they are and after fine-tuning.

As they are (zero-shot), the head of a dataset that a detector knows predicts, over the classes that both have. The
scans are seen with the embedding, statistics and exclusive kernels of the head's dataset ("own"), or with the mean of
all that the detector knows ("mean"), and then also with the shared kernels everywhere.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from h2a2_jax.checkpoint.store import restore_checkpoint
from h2a2_jax.compilation import compilation_cache
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import say
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.cross import common_classes
from h2a2_jax.evaluation.evaluate import predict_source, say_skipped
from h2a2_jax.files import whole_file
from h2a2_jax.inference.predictor import build_predictor
from h2a2_jax.scans.sources import SourceConfig, build_source
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, naive_joint, restricted, seeded, selected_and_harmonized
from h2a2_jax.sweeps.sweep_runner import finished, read_evaluation
from h2a2_jax.sweeps.tables import markdown_table, per_cent, spread, spread_cell

ZERO_SHOT_VERSION = 1
"""Of zero_shot_<dataset>.json in the folder of a run."""


def pretraining_rows(base: ExperimentConfig, held_out: str, seeds: Sequence[int]) -> list[Row]:
    """TR3D on each of the other datasets; naive joint training and H2A2 on them together.

    Args:
        base: joint config with kernel selection.
        held_out: the dataset left out.
        seeds: each once.

    Raises:
        InputError: the base has no such dataset, fewer than two others or no kernel selection, or a seed makes no
            sense.
    """
    names = base.dataset_names
    if held_out not in names:
        raise InputError(f"--held_out is {held_out!r}; expected one of {', '.join(names)}, the datasets of the config.")
    if len(names) < 3:
        raise InputError(f"Transfer is from joint training, and the config has only {' and '.join(names)}: give 3+.")
    if base.model.selection is None:
        raise InputError("Transfer compares with kernel selection: give a config that has model.selection.")
    others = [name for name in names if name != held_out]
    naive, both = naive_joint(base), selected_and_harmonized(base)
    rows = [Row(f"TR3D on {name}", seeded(f"tr3d_{name}", restricted(naive, [name]), seeds)) for name in others]
    for label, name, config in (("naive joint", "naive", naive), ("H2A2", "h2a2", both)):
        rows.append(Row(label, seeded(f"{name}_without_{held_out}", restricted(config, others), seeds)))
    return rows


def tuning_rows(
    base: ExperimentConfig,
    held_out: str,
    seeds: Sequence[int],
    pretrained: Sequence[Row],
    folders: Mapping[SweepRun, Path],
    steps: int | None = None,
) -> list[Row]:
    """Training on the dataset that was held out, from scratch and from what was trained without it.

    What starts with a detector that selects its kernels selects them too; there is a row from scratch for both.

    Args:
        base: joint config with kernel selection.
        held_out: the dataset.
        seeds: each once.
        pretrained: `pretraining_rows`.
        folders: of their runs.
        steps: of the training; None: half of those of the base.

    Raises:
        InputError: the number of steps makes no sense.
    """
    if steps is None:
        steps = max(1, restricted(base, [held_out]).train.steps // 2)
    if steps < 1:
        raise InputError(f"--tuning_steps is {steps}; expected 1 or more.")
    plain, selected = (
        restricted(config, [held_out], steps) for config in (naive_joint(base), selected_and_harmonized(base))
    )
    rows = [
        Row("from scratch", seeded(f"{held_out}_from_scratch", plain, seeds)),
        Row("from scratch, SF-KS", seeded(f"{held_out}_from_scratch_sfks", selected, seeds)),
    ]

    def tuned(run: SweepRun) -> SweepRun:
        config = plain if run.config.model.selection is None else selected
        train = replace(config.train, seed=run.seed, init_from=str(folders[run].absolute()))
        return SweepRun(f"{held_out}_from_{run.name}", run.seed, replace(config, train=train), after=run)

    return rows + [Row(f"from {row.label}", tuple(tuned(run) for run in row.runs)) for row in pretrained]


def evaluate_zero_shot(folder: Path, source: SourceConfig, cache: Path) -> None:
    """Writes zero_shot_<dataset>.json into the folder of a run that was trained without a dataset.

    What of the dataset's scans could not be used, and which heads have no class in common with it, is said.

    Args:
        folder: of the run.
        source: of the dataset, whose validation scans are predicted.
        cache: folder of compiled programs.

    Raises:
        InputError: the run's checkpoint cannot be read, or the scans are not there.
    """
    model, config = restore_checkpoint(folder)
    several = len(config.specs) > 1
    ways = [replace(config.eval, conditioning="own", kernels="selected")]
    if several:
        ways.append(replace(ways[0], conditioning="mean"))
    if several and config.model.selection is not None:
        ways.append(replace(ways[1], kernels="shared"))
    common_with = {head.name: common_classes(head, source.spec) for head in config.specs}
    if strangers := [name for name, common in common_with.items() if not common.pairs]:
        say(f"{', '.join(strangers)} and {source.name} have no class in common.")
    scans, entries = build_source(source, "val"), []
    skipped: dict[str, str] = {}
    with compilation_cache(cache):
        for way in ways:
            predictor = build_predictor(model, config.specs, way)
            for head in (head for head in config.specs if head.name not in strangers):
                common = common_with[head.name]
                found = predict_source(predictor, scans, source.spec, way.batch_size, head=head.name)
                skipped |= found.skipped
                levels = found.evaluate_common(common, way.iou_thresholds).to_dict()["thresholds"]
                entries.append(
                    {
                        "head": head.name,
                        "conditioning": way.conditioning,
                        "kernels": way.kernels,
                        "classes": list(common.names),
                        "mAP": [level["mAP"] for level in levels],
                    }
                )
    say_skipped(skipped)
    document = {
        "version": ZERO_SHOT_VERSION,
        "source": _identity(source),
        "skipped": skipped,
        "entries": entries,
    }
    with whole_file(_zero_shot_file(folder, source.name)) as part:
        part.write_text(json.dumps(document, indent=2) + "\n")


def read_zero_shot(folder: Path, source: SourceConfig) -> list[dict[str, Any]] | None:
    """The entries of zero_shot_<dataset>.json; None where it is not there, or of other scans or another version."""
    try:
        document = json.loads(_zero_shot_file(folder, source.name).read_text())
    except FileNotFoundError:
        return None
    same = (document.get("version"), document.get("source")) == (ZERO_SHOT_VERSION, _identity(source))
    return document["entries"] if same else None


def without_zero_shot(pretrained: Sequence[Row], folders: Mapping[SweepRun, Path], source: SourceConfig) -> list[Path]:
    """Folders of the finished runs that were not evaluated yet on the scans of a dataset."""
    of_runs = [folders[run] for row in pretrained for run in row.runs]
    return [folder for folder in of_runs if finished(folder) and read_zero_shot(folder, source) is None]


def transfer_figures(
    base: ExperimentConfig,
    held_out: str,
    pretrained: Sequence[Row],
    tuned: Sequence[Row],
    folders: Mapping[SweepRun, Path],
) -> dict[str, Any]:
    """What transfer comes to, of the runs that are finished.

    Returns:
        "held_out"; "zero_shot", a list of "trained", "head", "conditioning", "kernels", "classes" and "mAP"; "tuned", a
        list of "start" and "mAP". MAP is on the validation scans of the dataset held out, in per cent, a list by
        threshold of "mean", "std" (sample standard deviation over seeds) and "n".
    """
    thresholds = range(len(base.eval.iou_thresholds))
    source = held_out_source(base, held_out)
    zero_shot = []
    for row in pretrained:
        entries: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for run in row.runs:
            for entry in read_zero_shot(folders[run], source) or ():
                entries.setdefault((entry["head"], entry["conditioning"], entry["kernels"]), []).append(entry)
        for (head, conditioning, kernels), found in entries.items():
            levels = [spread([per_cent(entry["mAP"][t]) for entry in found]) for t in thresholds]
            zero_shot.append(
                {
                    "trained": row.label,
                    "head": head,
                    "conditioning": conditioning,
                    "kernels": kernels,
                    "classes": found[0]["classes"],
                    "mAP": levels,
                }
            )
    rows = []
    for row in tuned:
        done = [evaluation for run in row.runs if (evaluation := read_evaluation(folders[run])) is not None]
        levels = [spread([per_cent(one[held_out]["thresholds"][t]["mAP"]) for one in done]) for t in thresholds]
        rows.append({"start": row.label, "mAP": levels})
    return {"held_out": held_out, "zero_shot": zero_shot, "tuned": rows}


def transfer_table(result: Mapping[str, Any]) -> str:
    """Two Markdown tables of what results.json holds of transfer, and the note on what the numbers are."""
    held_out = result["held_out"]
    levels = [f"mAP@{threshold:g}" for threshold in result["iou_thresholds"]]
    titles = [f"{level} of these" for level in levels]
    zero_shot = [[f"without {held_out}", "head", "conditioning", "kernels", "classes", *titles, "seeds"]]
    for entry in result["zero_shot"]:
        cells = [entry["trained"], entry["head"], entry["conditioning"], entry["kernels"], str(len(entry["classes"]))]
        zero_shot.append([*cells, *map(spread_cell, entry["mAP"]), _seeds(entry)])
    tuned = [[f"on {held_out}", *levels, "seeds"]]
    tuned += [[entry["start"], *map(spread_cell, entry["mAP"]), _seeds(entry)] for entry in result["tuned"]]
    return f"{markdown_table(zero_shot)}\n\n{markdown_table(tuned)}\n\n{result['note']}\n"


def held_out_source(base: ExperimentConfig, held_out: str) -> SourceConfig:
    """The dataset of that name."""
    return next(source for source in base.datasets if source.name == held_out)


def _identity(source: SourceConfig) -> dict[str, Any]:
    """What says which scans of a source are predicted, as JSON gives it back."""
    return json.loads(json.dumps(asdict(source)))


def _zero_shot_file(folder: Path, held_out: str) -> Path:
    return folder / f"zero_shot_{held_out}.json"


def _seeds(entry: Mapping[str, Any]) -> str:
    return str(max((level["n"] for level in entry["mAP"] if level is not None), default=0))
