"""Evaluate a detector on the scans of its datasets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.config import EvalConfig, ExperimentConfig
from h2a2_jax.distributed import MeshLayout, is_main, say, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation import Evaluation, distance_from, evaluate_detections, scan_origin
from h2a2_jax.evaluation.cross import CommonClasses, common_classes
from h2a2_jax.evaluation.documents import JSON_FILE, write_evaluation
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.augmentation import Predicts, TestTimeAugmented
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.inference.writers import check_results_folder
from h2a2_jax.loader.stream import Log
from h2a2_jax.models import TR3D
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource, load_or_skip
from h2a2_jax.scans.scan_folder import ScanFolder
from h2a2_jax.scans.sources import SourceConfig, build_source, holds_dataset, summed_notes
from h2a2_jax.scans.specs import DatasetSpec


def build_predictor(model: TR3D, specs: Sequence[DatasetSpec], config: EvalConfig) -> Predictor:
    """The predictor of a config; see `Predictor` for what is raised."""
    return Predictor(
        model,
        specs,
        score_threshold=config.score_threshold,
        iou_threshold=config.iou_threshold,
        conditioning=config.conditioning,
        kernels=config.kernels,
    )


@dataclass(frozen=True)
class EvalRequest:
    """What is evaluated, beside the validation scans of all datasets as a config describes them.

    Attributes:
        split: of the scans.
        dataset: the one whose head and scans are evaluated; None: each.
        data: folder of scans that is evaluated instead of the dataset's own; of any kind that a config may name.
        tta: test-time augmentation: "flip_x", "flip_y", "scales", "turns" (`test_time.views`).
        cross: whether heads are evaluated on the scans of the other datasets too, over the classes of both.
        output: folder of the results; None: the workdir, or a folder in it if anything else is asked for.
        step: of the checkpoint; None: the last.
    """

    split: Literal["train", "val"] = "val"
    dataset: str | None = None
    data: str | None = None
    tta: tuple[str, ...] = ()
    cross: bool = False
    output: Path | None = None
    step: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether this is what training evaluates at its end."""
        return self == EvalRequest(output=self.output)

    def to_dict(self) -> dict[str, Any]:
        """What differs from a plain evaluation and the split, for JSON."""
        choices = {"dataset": self.dataset, "data": self.data, "tta": list(self.tta), "step": self.step}
        return {"split": self.split, **{name: value for name, value in choices.items() if value}}


@dataclass
class Found:
    """Boxes of the scans of a source that can be used, in their order, and what is there.

    Attributes:
        detections: boxes found.
        truth: boxes annotated.
        origins: x, y of each scan that distances are measured from.
        log: by scan, why others were left out (`Log.skipped`) and what of these was (`Log.notes`).
    """

    detections: list[Detections] = field(default_factory=list)
    truth: list[GroundTruth] = field(default_factory=list)
    origins: list[np.ndarray] = field(default_factory=list)
    log: Log = field(default_factory=Log)

    def evaluate(self, spec: DatasetSpec, iou_thresholds: Sequence[float]) -> Evaluation:
        """Scores, by the protocol of the dataset of the scans."""
        return self._evaluate(self.detections, self.truth, spec.classes, spec, iou_thresholds)

    def evaluate_common(self, common: CommonClasses, iou_thresholds: Sequence[float]) -> Evaluation:
        """Scores of another dataset's head over the classes that both have."""
        detections = [common.detections(found) for found in self.detections]
        truth = [common.truth(there) for there in self.truth]
        return self._evaluate(detections, truth, common.names, common.data, iou_thresholds)

    def _evaluate(
        self,
        detections: Sequence[Detections],
        truth: Sequence[GroundTruth],
        classes: Sequence[str],
        spec: DatasetSpec,
        iou_thresholds: Sequence[float],
    ) -> Evaluation:
        return evaluate_detections(
            detections,
            truth,
            classes,
            iou_thresholds,
            rotated=spec.has_yaw,
            origins=np.array(self.origins, np.float64).reshape(-1, 2),
            measured_from=distance_from(spec.name),
        )


def predict_source(
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    batch_size: int = 1,
    progress: bool = True,
    *,
    head: str | None = None,
    draw: int = 0,
) -> Found:
    """Predicts every scan of a source; those that cannot be used are left out and named.

    Args:
        predictor: see `build_predictor`.
        source: of annotated scans.
        spec: of their dataset, by whose test protocol points are drawn.
        batch_size: scans in a pass.
        progress: whether to show scans done and time left on standard error.
        head: dataset whose head predicts; None: that of the scans.
        draw: number of the drawing of points.
    """
    found = Found()
    head = head or spec.name
    title = spec.name if head == spec.name else f"{spec.name}, head of {head}"
    with tqdm(total=len(source), desc=title, unit="scan", disable=not progress, mininterval=progress_interval()) as bar:
        for chunk in _chunks(load_or_skip(source, found.log.skipped), batch_size):
            found.log.notes |= {scan.name: scan.notes for scan in chunk if scan.notes}
            drawn = [prepare(scan, spec, draw) for scan in chunk]
            used, boxes = _predict_usable(predictor, drawn, head, found.log.skipped)
            found.detections += boxes
            found.truth += [GroundTruth(s.boxes[s.labels >= 0], s.labels[s.labels >= 0]) for s in used]
            found.origins += [scan_origin(s.points, distance_from(spec.name)) for s in used]
            bar.update(len(found.detections) + len(found.log.skipped) - bar.n)
        bar.update(len(source) - bar.n)
    return found


def evaluate_source(
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    eval_config: EvalConfig | None = None,
    progress: bool = True,
    *,
    draw: int = 0,
) -> tuple[Evaluation, list[Detections], Log]:
    """Predicts every scan of a source and scores the boxes against its annotation.

    Points are drawn by the dataset's test protocol. Scans that cannot be used are left out of the score and named.

    Args:
        predictor: see `build_predictor`.
        source: of annotated scans.
        spec: of their dataset.
        eval_config: IoU thresholds and scans in a pass.
        progress: whether to show scans done and time left on standard error.
        draw: number of the drawing of points.

    Returns:
        The scores; boxes of the scans that were used, in their order; by scan, why scans were left out (`Log.skipped`)
        and what of the others was (`Log.notes`).
    """
    config = eval_config or EvalConfig()
    found = predict_source(predictor, source, spec, config.batch_size, progress, draw=draw)
    return found.evaluate(spec, config.iou_thresholds), found.detections, found.log


def _predict_usable(
    predictor: Predicts, scans: list[Scan], head: str, skipped: dict[str, str]
) -> tuple[list[Scan], list[Detections]]:
    """Boxes of the scans that can be used, and these scans."""
    while scans:
        try:
            return scans, predictor.predict(scans, head)
        except ScanError as error:
            skipped[error.scan] = str(error)
            scans = [scan for scan in scans if scan.name != error.scan]
    return [], []


def _chunks(scans: Iterable[Scan], size: int) -> Iterator[list[Scan]]:
    chunk: list[Scan] = []
    for scan in scans:
        chunk.append(scan)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


_PLAIN = EvalRequest()


def evaluate(
    config: ExperimentConfig,
    model: TR3D,
    folder: Path,
    process_layout: MeshLayout | None = None,
    request: EvalRequest = _PLAIN,
) -> dict[str, Any]:
    """Evaluate a detector; see `evaluate_predictor`, which has the other arguments.

    Args:
        config: of the run.
        model: the detector; in a run of several processes, the same in all.
        folder: of the results.
        process_layout: which datasets each process evaluates.
        request: which scans, and how.
    """
    return evaluate_predictor(
        config, build_predictor(model, config.specs, config.eval), folder, process_layout, request
    )


def evaluate_predictor(
    config: ExperimentConfig,
    predictor: Predicts,
    folder: Path,
    process_layout: MeshLayout | None = None,
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
        process_layout: which datasets each process evaluates; by default that of all devices.
        request: which scans, and how.
        draw: number of the drawing of points, where the test protocol of a dataset draws some.
        datasets: of those that the request is for, the ones evaluated; None: all.
        tables: whether the results are printed.

    Returns:
        What evaluation.json holds (`h2a2_jax.evaluation.documents`).

    Raises:
        InputError: scans are missing, the request does not fit the config, or the folder cannot be written to.
    """
    specs = config.specs
    if process_layout is None:
        process_layout = MeshLayout(train_mesh(len(specs)), len(specs))
    chosen = {
        d: source
        for d, source in chosen_sources(config, request).items()
        if datasets is None or source.name in datasets
    }

    def opened() -> dict[int, ScanSource]:
        sources = {d: build_source(chosen[d], request.split) for d in process_layout.evaluated if d in chosen}
        if is_main():  # rather now than when all is evaluated
            check_results_folder(folder)
        return sources

    own = process_layout.all_or_raise(opened, "open the scans to evaluate")
    say_warnings({specs[d].name: source for d, source in own.items()})
    if request.tta:
        predictor = TestTimeAugmented(predictor, request.tta, specs, config.eval.iou_threshold)

    def evaluated() -> dict[str, Any]:
        return {
            specs[d].name: _evaluated(config, predictor, source, specs[d], request, draw) for d, source in own.items()
        }

    found = merged(process_layout.gather(process_layout.all_or_raise(evaluated, "evaluate")))
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
