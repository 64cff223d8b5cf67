"""Transfer: detectors that were trained without a dataset, evaluated on its scans at once and after fine-tuning.

At once (zero-shot), the head of a dataset that a detector knows predicts the classes that both datasets have. The
detector is conditioned on the head's dataset ("own": its embedding, statistics and exclusive kernels), or on the mean
of all datasets that it knows ("mean"), and then also with the shared kernels everywhere. A detector with one label
space predicts with all of its classes too (head "union"), conditioned on the mean.
"""

import json
import time
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
from h2a2_jax.evaluation.matches import read_matches, write_matches
from h2a2_jax.files import whole_file
from h2a2_jax.inference.predictor import build_predictor
from h2a2_jax.models import kind_of
from h2a2_jax.scans.label_space import UNION, head_specs
from h2a2_jax.scans.sources import SourceConfig, build_source
from h2a2_jax.sweeps.intervals import Sample, row_differences, samples_of, stored_matches
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, locate, naive_joint, restricted, seeded, selected_and_harmonized
from h2a2_jax.sweeps.sweep_results import (
    SEEDS,
    Column,
    Score,
    class_spreads,
    evaluation_scores,
    finished,
    metric_names,
    per_cent,
    read_evaluation,
    result_row,
    sweep_result,
)
from h2a2_jax.sweeps.sweep_runner import run_sweep

ZERO_SHOT_VERSION = 1
"""Version of zero_shot_<dataset>.json in the folder of a run."""
_WAY = ("head", "conditioning", "kernels")
"""Keys that tell the entries of zero_shot_<dataset>.json apart."""


def run_transfer(
    config: ExperimentConfig,
    workdir: Path,
    held_out: str,
    seeds: Sequence[int],
    tuning_steps: int | None = None,
    jobs: int | None = None,
    budget_minutes: float | None = None,
) -> int:
    """Train without a dataset, predict its scans, fine-tune to it; write the tables and results.json.

    Finished runs in the workdir are not repeated, nor runs of other sweeps that are the same experiment. Jobs, budget
    and exit status are those of `run_sweep`. The config has three datasets or more and kernel selection. Without
    `tuning_steps` the training on the dataset takes half of the config's steps.

    Raises:
        InputError: the config does not fit the sweep, data are missing, or the workdir holds other runs of the same
            names.
    """
    pretrained, tuned = pretraining_rows(config, held_out, seeds), list[Row]()
    before: dict[SweepRun, Path] = {}

    def located() -> dict[SweepRun, Path]:
        before.update(locate(pretrained, workdir))
        tuned.extend(tuning_rows(config, held_out, seeds, pretrained, before, tuning_steps))
        return {**before, **locate(tuned, workdir)}

    def predict(until: float) -> list[str]:
        source = next(source for source in config.datasets if source.name == held_out)
        failures = []
        missing = without_zero_shot(pretrained, before, source)
        for number, folder in enumerate(missing, 1):
            if time.monotonic() > until:
                left = len(missing) - number + 1
                print(f"The budget is used; {left} predictions of {held_out} are left, the same command does them.")
                break
            print(f"[{number}/{len(missing)}] {folder.name} predicts the scans of {held_out}.", flush=True)
            try:
                evaluate_zero_shot(folder, source)
            except InputError as error:
                failures.append(f"{folder.name} did not predict {held_out}: {error}")
        return failures

    return run_sweep(
        config,
        workdir,
        located,
        lambda folders: transfer_results(config, held_out, pretrained, tuned, folders),
        jobs,
        budget_minutes,
        then=predict,
    )


def pretraining_rows(base: ExperimentConfig, held_out: str, seeds: Sequence[int]) -> list[Row]:
    """The detector on each of the other datasets; naive joint training and H2A2 on all of them.

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
    kind, title = base.model.kind, kind_of(base.model).title
    rows = [Row(f"{title} on {name}", seeded(f"{kind}_{name}", restricted(naive, [name]), seeds)) for name in others]
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
    """Training on the dataset that was held out, from scratch and from each detector that was trained without it.

    A training that starts from a detector with kernel selection has kernel selection too; there is a row from scratch
    with it and one without. Without `steps` the training takes half of those of the base.

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


def evaluate_zero_shot(folder: Path, source: SourceConfig) -> None:
    """Write zero_shot_<dataset>.json and .npz, the matches, into the folder of a run trained without a dataset.

    The validation scans of the source are predicted, with compiled programs that are kept. Scans that could not be
    used and heads without a class in common with the dataset are printed.

    Raises:
        InputError: the run's checkpoint cannot be read, or the scans are not there.
    """
    model, config = restore_checkpoint(folder)
    several = len(config.specs) > 1
    ways = [replace(config.eval, conditioning="own", kernels="selected")]
    if several:
        ways.append(replace(ways[0], conditioning="mean"))
    if several and config.model.selection is not None and config.model.selection.kernels != "exclusive":
        ways.append(replace(ways[1], kernels="shared"))
    heads = head_specs(config.specs, config.model.label_space)
    common_with = {head.name: common_classes(head, source.spec) for head in heads}
    if strangers := [name for name, common in common_with.items() if not common.pairs]:
        say(f"{', '.join(strangers)} and {source.name} have no class in common.")
    scans, entries, matches = build_source(source, "val"), [], {}
    skipped: dict[str, str] = {}
    with compilation_cache(say):
        for way in ways:
            predictor = build_predictor(model, config.specs, way)
            for head in (head for head in heads if head.name not in strangers):
                if head.name == UNION and several and way.conditioning == "own":
                    continue  # which is the mean for it
                common = common_with[head.name]
                found = predict_source(predictor, scans, source.spec, way.batch_size, head=head.name)
                skipped |= found.skipped
                evaluation = found.evaluate(common.data, way.iou_thresholds, common)
                levels, key = evaluation.to_dict()["thresholds"], (head.name, way.conditioning, way.kernels)
                matches["/".join(key)] = evaluation.matches
                facts = dict(zip(_WAY, key, strict=True))
                scores = {score: [level[score] for level in levels] for score in ("mAP", "AP")}
                entries.append({**facts, "classes": list(common.names), **scores})
    say_skipped(skipped)
    document = {"version": ZERO_SHOT_VERSION, "source": _identity(source), "skipped": skipped, "entries": entries}
    write_matches(_matches_file(folder, source), matches)
    with whole_file(folder / f"zero_shot_{source.name}.json") as part:
        part.write_text(json.dumps(document, indent=2) + "\n")


def read_zero_shot(folder: Path, source: SourceConfig) -> list[dict[str, Any]] | None:
    """The entries of zero_shot_<dataset>.json; None if it is missing, of other scans or of another version."""
    try:
        document = json.loads((folder / f"zero_shot_{source.name}.json").read_text())
    except FileNotFoundError:
        return None
    same = (document.get("version"), document.get("source")) == (ZERO_SHOT_VERSION, _identity(source))
    return document["entries"] if same else None


def without_zero_shot(pretrained: Sequence[Row], folders: Mapping[SweepRun, Path], source: SourceConfig) -> list[Path]:
    """Folders of the finished runs that are not yet evaluated on the scans of a dataset."""
    of_runs = (folders[run] for row in pretrained for run in row.runs)
    return [folder for folder in of_runs if finished(folder) and read_zero_shot(folder, source) is None]


def transfer_results(
    base: ExperimentConfig,
    held_out: str,
    pretrained: Sequence[Row],
    tuned: Sequence[Row],
    folders: Mapping[SweepRun, Path],
) -> list[dict[str, Any]]:
    """Results of the runs that are finished: at once on the scans of the dataset held out, and after training on it."""
    source = next(source for source in base.datasets if source.name == held_out)
    metrics = metric_names(base)
    zero_shot, gains_at_once = _zero_shot_rows(pretrained, folders, source, metrics)
    after_tuning, gains_after = _tuned_rows(tuned, folders, base, held_out)
    without, on_it = (rows[0].runs[0].config.train.steps for rows in (pretrained, tuned))
    note = "mAP in per cent on the validation scans of {}, over {}; mean ± sample standard deviation over seeds. "
    at_once = (
        note.format(held_out, "the classes that the head's dataset has too")
        + f"Trained without it for {without} steps of {base.train.batch_size} scans a dataset."
    )
    tuning = note.format(held_out, "all of its classes") + f"Trained on it for {on_it} steps."
    ways = [*(Column(key, (key,), "text") for key in _WAY), Column("classes", ("classes",), "length")]
    scores_at_once = [Column(f"{metric} of these", ("summary", held_out, metric)) for metric in metrics]
    columns = [Column(f"without {held_out}", ("name",), "text"), *ways, *scores_at_once, SEEDS]
    scores_after = [Column(metric, ("summary", held_out, metric)) for metric in metrics]
    columns_after = [Column(f"on {held_out}", ("name",), "text"), *scores_after, SEEDS]
    kinds = (f"transfer_to_{held_out}", f"Transfer to {held_out}"), (f"tuning_to_{held_out}", f"Training on {held_out}")
    return [
        sweep_result(*kinds[0], at_once, base, zero_shot, columns, gains_at_once),
        sweep_result(*kinds[1], tuning, base, after_tuning, columns_after, gains_after),
    ]


def _zero_shot_rows(
    pretrained: Sequence[Row], folders: Mapping[SweepRun, Path], source: SourceConfig, metrics: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of what detectors predict at once, and differences from the first way with the same head.

    Ways with another head have other classes, so that their scores are not compared.
    """
    rows, by_head = list[dict[str, Any]](), dict[str, dict[str, dict[int, Sample]]]()
    for row in pretrained:
        entries: dict[tuple[str, ...], list[tuple[SweepRun, dict[str, Any]]]] = {}
        for run in row.runs:
            for entry in read_zero_shot(folders[run], source) or ():
                entries.setdefault(tuple(entry[key] for key in _WAY), []).append((run, entry))
        matches = {run.seed: read_matches(_matches_file(folders[run], source)) for run in row.runs}
        for way, found in entries.items():
            scores = [
                Score(run.seed, source.name, dict(zip(metrics, map(per_cent, entry["mAP"]), strict=True)))
                for run, entry in found
            ]
            facts = dict(zip(_WAY, way, strict=True))
            new = result_row(row.label, scores, **facts, classes=found[0][1]["classes"])
            precisions = [
                (run.seed, source.name, metric.removeprefix("m"), own)
                for run, entry in found
                for metric, own in zip(metrics, entry.get("AP", ()), strict=False)  # earlier entries have none
            ]
            rows.append({**new, "class_scores": class_spreads(precisions)} if precisions else new)
            of_way = {seed: {source.name: own[key]} for seed, own in matches.items() if (key := "/".join(way)) in own}
            samples = by_head.setdefault(facts["head"], {})
            samples[", ".join((row.label, *way))] = samples_of(scores, metrics, of_way)
    compared = [row_differences(samples, [*samples][:1], [source.name], metrics) for samples in by_head.values()]
    return rows, [one for each in compared for one in each]


def _tuned_rows(
    tuned: Sequence[Row], folders: Mapping[SweepRun, Path], base: ExperimentConfig, held_out: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of what is trained on the dataset, and differences from the first."""
    rows, samples, metrics = list[dict[str, Any]](), dict[str, dict[int, Sample]](), metric_names(base)
    for row in tuned:
        done = [(run, evaluation) for run in row.runs if (evaluation := read_evaluation(folders[run])) is not None]
        found = [evaluation_scores(own, base, run.seed, folders[run].name) for run, own in done]
        scores = [score for of_run in found for score in of_run if score.dataset == held_out]
        matches = {run.seed: stored_matches([folders[run]]) for run, _ in done}
        rows.append(result_row(row.label, scores))
        samples[row.label] = samples_of(scores, metrics, matches)
    return rows, row_differences(samples, [*samples][:1], [held_out], metrics)


def _matches_file(folder: Path, source: SourceConfig) -> Path:
    return folder / f"zero_shot_{source.name}.npz"


def _identity(source: SourceConfig) -> dict[str, Any]:
    """The source as JSON gives it back: equal for the same scans."""
    return json.loads(json.dumps(asdict(source)))
