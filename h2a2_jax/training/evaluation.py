"""Evaluation of a run: at the end of training, and on its own from a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.document import JSON_FILE, write_evaluation
from h2a2_jax.inference.cross import common_classes
from h2a2_jax.inference.evaluate import EvalRequest, Found, build_predictor, predict_source
from h2a2_jax.inference.test_time import Predicts, TestTimeAugmented
from h2a2_jax.inference.writers import check_results_folder
from h2a2_jax.inputs.scan import ScanSource
from h2a2_jax.inputs.scan_folder import ScanFolder
from h2a2_jax.inputs.sources import SourceConfig, build_source, holds_dataset, summed_notes
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.models import Detector
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.distributed import MeshDivision, is_main, say
from h2a2_jax.training.mesh import train_mesh

_PLAIN = EvalRequest()


def evaluate(
    config: ExperimentConfig,
    model: Detector,
    folder: Path,
    division: MeshDivision | None = None,
    request: EvalRequest = _PLAIN,
) -> dict[str, Any]:
    """Evaluate a detector; see `evaluate_predictor`, which has the other arguments.

    Args:
        config: of the run.
        model: the detector; in a run of several processes, the same in all.
        folder: of the results.
        division: which datasets each process evaluates.
        request: which scans, and how.
    """
    return evaluate_predictor(config, build_predictor(model, config.specs, config.eval), folder, division, request)


def evaluate_predictor(
    config: ExperimentConfig,
    predictor: Predicts,
    folder: Path,
    division: MeshDivision | None = None,
    request: EvalRequest = _PLAIN,
    *,
    draw: int = 0,
    datasets: Sequence[str] | None = None,
    tables: bool = True,
) -> dict[str, Any]:
    """Evaluate on the scans of every dataset, or what is asked for; print tables, write evaluation.json and .csv.

    Args:
        config: of the run.
        predictor: of the datasets of the config.
        folder: of the results.
        division: which datasets each process evaluates; by default that of all devices.
        request: which scans, and how.
        draw: number of the drawing of points, where the test protocol of a dataset draws some.
        datasets: of those that the request is for, the ones evaluated; None: all.
        tables: whether the results are printed.

    Returns:
        What evaluation.json holds (`h2a2_jax.evaluation.document`).

    Raises:
        InputError: scans are missing, the request does not fit the config, or the folder cannot be written to.
    """
    specs = config.specs
    if division is None:
        division = MeshDivision(train_mesh(len(specs)), len(specs))
    chosen = {
        d: source
        for d, source in chosen_sources(config, request).items()
        if datasets is None or source.name in datasets
    }

    def opened() -> dict[int, ScanSource]:
        sources = {d: build_source(chosen[d], request.split) for d in division.evaluated if d in chosen}
        if is_main():  # rather now than when all is evaluated
            check_results_folder(folder)
        return sources

    own = division.together(opened, "open the scans to evaluate")
    say_warnings({specs[d].name: source for d, source in own.items()})
    if request.tta:
        predictor = TestTimeAugmented(predictor, request.tta, specs, config.eval.iou_threshold)

    def evaluated() -> dict[str, Any]:
        return {
            specs[d].name: _evaluated(config, predictor, source, specs[d], request, draw) for d, source in own.items()
        }

    found = merged(division.gather(division.together(evaluated, "evaluate")))
    found = {specs[d].name: found[specs[d].name] for d in sorted(chosen)}
    results = {name: one["values"] for name, one in found.items()}
    if is_main():  # before it is told: who reads along may go away
        write_evaluation(folder, results)
    for name, values in results.items():
        say_skipped({f"{name}/{scan}": reason for scan, reason in values["skipped"].items()})
    say_notes({f"{name}/{scan}": notes for name, one in found.items() for scan, notes in one["notes"].items()}, specs)
    for name, one in found.items() if tables else ():
        say(f"\n{name}, {results[name]['scans']} scans\n{one['text']}")
    if request.cross:
        say("\n" + cross_table(results))
    if tables:
        say(f"\nWritten to {folder / JSON_FILE}")
    return results


def chosen_sources(config: ExperimentConfig, request: EvalRequest) -> dict[int, SourceConfig]:
    """The sources that a request evaluates, by the place of the dataset.

    Raises:
        InputError: the request names a dataset that the config does not have, a folder without saying whose head is
            to be used, or heads to compare where there is only one.
    """
    names = config.dataset_names
    listed = ", ".join(names)
    if request.dataset is not None and request.dataset not in names:
        raise InputError(f"The model was trained on {listed}, not on {request.dataset!r}: choose one of them.")
    if request.cross and len(names) < 2:
        raise InputError(f"Heads are compared across datasets, and the model was trained on {listed} alone.")
    if request.data is None:
        return {d: source for d, source in enumerate(config.datasets) if request.dataset in (None, source.name)}
    dataset = request.dataset or (names[0] if len(names) == 1 else None)
    if dataset is None:
        raise InputError(f"The model has heads for {listed}: say whose classes {request.data} has (--dataset).")
    if not Path(request.data).is_dir():
        raise InputError(f"There is no folder {request.data}: give one with scans and their boxes.")
    if not holds_dataset(Path(request.data)):
        raise InputError(
            f"Nothing in {request.data} says where the boxes are: --mode=check --data={request.data} tells what is "
            f"missing, and --mode=predict --input={request.data} finds boxes without scoring them."
        )
    place = names.index(dataset)
    return {place: replace(config.datasets[place], kind="auto", root=request.data, train_infos=(), val_infos=())}


def cross_table(results: Mapping[str, Any]) -> str:
    """A text table of mAP in per cent: heads by rows, scans by columns, over the classes that both have.

    Args:
        results: what evaluation.json holds, of an evaluation across datasets.
    """
    heads = list(dict.fromkeys(head for data, values in results.items() for head in (data, *values["cross"])))
    levels = next(iter(results.values()))["thresholds"]
    lines = [["head \\ scans", *results]]
    for head in heads:
        cells = []
        for data, values in results.items():
            of = values if head == data else values["cross"][head]
            scores = "/".join(_per_cent(level["mAP"]) for level in of["thresholds"])
            if head != data:
                own = "/".join(_per_cent(level["own_mAP"]) for level in of["thresholds"])
                scores += f" (own {own}, {len(of['classes'])} classes)"
            cells.append(scores)
        lines.append([head, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = "/".join(f"{level['iou']:g}" for level in levels)
    missing = [
        f"{head} on {data}: without counterpart are {', '.join(entry['without_counterpart']) or 'none'}."
        for data, values in results.items()
        for head, entry in values["cross"].items()
    ]
    heading = f"Across datasets, mAP@{title} over common classes (own: the scans' own head, over the same):"
    return "\n".join([heading, *rows, *missing])


def say_warnings(sources: Mapping[str, ScanSource]) -> None:
    """Say, by dataset, what holds for all scans of a source and who reads its results should know."""
    for name, source in sources.items():
        for warning in source.warnings if isinstance(source, ScanFolder) else ():
            print(f"{name}: {warning}", flush=True)  # in the process that opened it


def say_skipped(skipped: Mapping[str, str]) -> None:
    """Name the scans that were left out, and why."""
    for name, reason in skipped.items():
        say(f"Skipped {name}: {reason}")
    if skipped:
        say(f"{len(skipped)} scan(s) skipped.")


def say_notes(notes: Mapping[str, Mapping[str, int]], specs: Sequence[DatasetSpec]) -> None:
    """Say, by dataset, how much of the scans could not be used or was repaired; `notes` by "dataset/scan"."""
    for spec in specs:
        sentence = summed_notes({name: each for name, each in notes.items() if name.startswith(f"{spec.name}/")})
        if sentence:
            say(f"{spec.name}: {sentence}")


def merged(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What processes told, by name."""
    return {name: value for each in told for name, value in each.items()}


def _evaluated(
    config: ExperimentConfig,
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    request: EvalRequest,
    draw: int,
) -> dict[str, Any]:
    """What one dataset's scans say: figures, text, and notes on the scans."""
    thresholds, size = config.eval.iou_thresholds, config.eval.batch_size
    found = predict_source(predictor, source, spec, size, draw=draw)
    evaluation = found.evaluate(spec, thresholds)
    values = {
        **evaluation.to_dict(),
        "scans": evaluation.num_scans,
        "skipped": found.log.skipped,
    }
    if not request.is_plain:
        values["protocol"] = request.to_dict()
    if request.cross:
        values["cross"] = {}
        for head in (head for head in config.specs if head.name != spec.name):
            theirs = predict_source(predictor, source, spec, size, head=head.name, draw=draw)
            values["cross"][head.name] = _crossed(found, head, spec, thresholds, theirs)
    return {"values": values, "text": f"{evaluation.table()}\n{evaluation.summary()}", "notes": found.log.notes}


def _crossed(
    own: Found, head: DatasetSpec, data: DatasetSpec, thresholds: Sequence[float], found: Found
) -> dict[str, Any]:
    """How the head of another dataset does, and the scans' own one over the same classes."""
    common, same = common_classes(head, data), common_classes(data, data)
    same = replace(same, pairs=tuple((label, label) for label, _ in common.pairs))
    theirs, ours = found.evaluate_common(common, thresholds), own.evaluate_common(same, thresholds)
    levels = [
        {"iou": level["iou"], "mAP": level["mAP"], "own_mAP": by_own["mAP"], "AP": level["AP"]}
        for level, by_own in zip(theirs.to_dict()["thresholds"], ours.to_dict()["thresholds"], strict=True)
    ]
    return {
        "classes": {name: head.classes[label] for name, (_, label) in zip(common.names, common.pairs, strict=True)},
        "without_counterpart": list(common.without_counterpart),
        "unused": list(common.unused),
        "thresholds": levels,
    }


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
