"""Evaluate a detector on the scans of its datasets."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.checkpoint.store import checkpoint_place, restore_checkpoint
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, is_main, say, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.average_precision import distance_from, scan_origin
from h2a2_jax.evaluation.cross import CommonClasses, common_classes, cross_table
from h2a2_jax.evaluation.documents import JSON_FILE, write_evaluation
from h2a2_jax.evaluation.matches import MATCHES_FILE, Matches, write_matches
from h2a2_jax.evaluation.scores import Evaluation, evaluate_detections
from h2a2_jax.inference.augmentation import TestTimeAugmented, views
from h2a2_jax.inference.predictor import Predicts, build_predictor, predict_scans, skipped_lines
from h2a2_jax.inference.writers import check_results_folder
from h2a2_jax.scans.label_space import UNION, head_specs
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder
from h2a2_jax.scans.scan import ScanSource
from h2a2_jax.scans.scan_folder import ScanFolder
from h2a2_jax.scans.sources import SourceConfig, build_source, holds_dataset, summed_notes
from h2a2_jax.scans.specs import DatasetSpec


@dataclass(frozen=True)
class EvalRequest:
    """Choices of an evaluation; without any, the validation scans of all datasets as a config describes them.

    Attributes:
        split: split of the scans.
        dataset: the one whose head and scans are evaluated; None: each. "union" is the head of one label space, with
            `data` of any dataset whose classes it knows by name.
        data: folder of scans that is evaluated instead of the dataset's own; of any kind that a config may name.
        tta: test-time augmentation: "flip_x", "flip_y", "scales", "turns" (`augmentation.views`).
        cross: True to evaluate heads on the scans of the other datasets too, over the classes of both.
        output: folder of the results; None: the workdir, or a folder in it if anything else is asked for.
        step: step of the checkpoint; None: the last.
    """

    split: Literal["train", "val"] = "val"
    dataset: str | None = None
    data: str | None = None
    tta: tuple[str, ...] = ()
    cross: bool = False
    output: Path | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError if the split or a test-time augmentation does not exist."""
        views(self.tta)
        if self.split not in ("train", "val"):
            raise InputError(f"There is no split {self.split!r}: use train or val.")

    @property
    def is_plain(self) -> bool:
        """True for the evaluation that training does at its end."""
        return self == EvalRequest(output=self.output)

    @property
    def results_folder(self) -> str:
        """Folder of the results in a workdir: "." for a plain evaluation, else one named after the choices."""
        if self.is_plain:
            return "."
        parts = [self.split, self.dataset, self.data and Path(self.data).resolve().name, *self.tta]
        parts += ["cross" if self.cross else None, f"step{self.step}" if self.step is not None else None]
        return "evaluation_" + "_".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """The split, and the choices that differ from a plain evaluation, for JSON."""
        choices = {"dataset": self.dataset, "data": self.data, "tta": list(self.tta), "step": self.step}
        return {"split": self.split, **{name: value for name, value in choices.items() if value}}


_PLAIN = EvalRequest()
_NO_BOXES = "boxes found that are not finite or have no size, left out"


def evaluate_checkpoint(workdir: Path, request: EvalRequest = _PLAIN, config: ExperimentConfig | None = None) -> None:
    """Restore a checkpoint, evaluate it; write evaluation.json, evaluation.csv and evaluation.html.

    The results of a plain evaluation go into the workdir, as at the end of training; those of any other request go into
    a folder of its own there (`EvalRequest.results_folder`). The checkpoint must agree with `config`, whose data and
    `eval` are used; None is the config that the checkpoint holds.

    Raises:
        InputError: there is no checkpoint, it is of another architecture, other datasets or classes than the config,
            scans are missing, or the request does not fit the config.
    """
    place = checkpoint_place(workdir)
    if request.step is None and place.step is not None:
        request = replace(request, step=place.step)
    model, stored = restore_checkpoint(workdir, request.step, config)
    config = stored if config is None else config
    _check_classes(stored, config)
    sources = chosen_sources(config, request).values()
    folder = request.output or place.run / request.results_folder
    results = evaluate(config, build_predictor(model, config.specs, config.eval), folder, request=request)
    if is_main():
        from h2a2_jax.evaluation.evaluation_page import write_evaluation_page

        say(f"The page is {write_evaluation_page(results, folder, _subtitle(sources, workdir, request))}.")


def evaluate(
    config: ExperimentConfig,
    predictor: Predicts,
    folder: Path,
    process_layout: MeshLayout | None = None,
    request: EvalRequest = _PLAIN,
    *,
    draw: int = 0,
    datasets: Sequence[str] | None = None,
    tables: bool = True,
    before_writing: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluate on the scans of every dataset or of those requested; print tables, write evaluation.json and .csv.

    Hits and misses by scan go to matches.npz (`h2a2_jax.evaluation.matches`).

    Args:
        config: configuration whose data and `eval` are used.
        predictor: predictor of the datasets of the config; in a run of several processes, the same in all.
        folder: folder of the results.
        process_layout: datasets that each process evaluates; None: by the layout of all devices.
        request: choice of scans, augmentation and heads.
        draw: number of the drawing of points, where the test protocol of a dataset draws some.
        datasets: of those that the request is for, the ones evaluated; None: all.
        tables: True to print the results.
        before_writing: called in the process that writes the results; may raise to prevent it.

    Returns:
        The content of evaluation.json (`h2a2_jax.evaluation.documents`).

    Raises:
        InputError: scans are missing, the request does not fit the config, or the folder cannot be written to.
    """
    if process_layout is None:
        process_layout = MeshLayout(train_mesh(len(config.datasets)), len(config.datasets))
    requested = chosen_sources(config, request)
    chosen = {d: source for d, source in requested.items() if datasets is None or source.name in datasets}
    specs = {d: source.spec for d, source in chosen.items()}

    def open_sources() -> dict[int, ScanSource]:
        sources = {d: build_source(chosen[d], request.split) for d in process_layout.evaluated if d in chosen}
        if is_main():  # rather now than when all is evaluated
            check_results_folder(folder)
        return sources

    opened = process_layout.all_or_raise(open_sources, "open the scans to evaluate")
    say_warnings({specs[d].name: source for d, source in opened.items()})
    if request.tta:
        predictor = TestTimeAugmented(
            predictor, request.tta, [*config.specs, *specs.values()], config.eval.iou_threshold
        )

    def evaluate_datasets() -> dict[str, Any]:
        return {
            specs[d].name: _evaluate_dataset(config, predictor, source, specs[d], request, draw)
            for d, source in opened.items()
        }

    by_name = merged(process_layout.gather(process_layout.all_or_raise(evaluate_datasets, "evaluate")))
    evaluated = {specs[d].name: by_name[specs[d].name] for d in sorted(chosen)}
    results = {name: one["values"] for name, one in evaluated.items()}
    if is_main():  # before anything is printed: a closed pipe at the other end must not cost the results
        before_writing()
        matches = {name: Matches.from_dict(one["matches"]) for name, one in evaluated.items()}
        write_matches(folder / MATCHES_FILE, matches)
        write_evaluation(folder, results)
    for name, values in results.items():
        say_skipped({f"{name}/{scan}": reason for scan, reason in values["skipped"].items()})
    notes = {f"{name}/{scan}": each for name, one in evaluated.items() for scan, each in one["notes"].items()}
    say_notes(notes, [*specs.values()])
    for name, one in evaluated.items() if tables else ():
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
    as_union = config.model.label_space == "union" and request.dataset == UNION
    if request.dataset is not None and request.dataset not in names and not as_union:
        raise InputError(f"The model was trained on {listed}, not on {request.dataset!r}: choose one of them.")
    if request.cross and len(names) < 2:
        raise InputError(f"Heads are compared across datasets, and the model was trained on {listed} alone.")
    if request.data is None:
        if as_union:
            raise InputError(
                "The union of classes has no scans of its own: name a folder of scans with boxes with --data."
            )
        return {d: source for d, source in enumerate(config.datasets) if request.dataset in (None, source.name)}
    if request.dataset is None and len(names) > 1:
        raise InputError(f"The model has heads for {listed}: say whose classes {request.data} has (--dataset).")
    if not Path(request.data).is_dir():
        raise InputError(f"There is no folder {request.data}: give one with scans and their boxes.")
    if not holds_dataset(Path(request.data)):
        raise InputError(
            f"Nothing in {request.data} says where the boxes are: --mode=check --data={request.data} tells what is "
            f"missing, and --mode=predict --input={request.data} finds boxes without scoring them."
        )
    place = 0 if as_union else names.index(request.dataset or names[0])
    source = replace(config.datasets[place], kind="auto", root=request.data, train_infos=(), val_infos=())
    if as_union:
        spec = head_specs(config.specs, config.model.label_space)[-1]
        source = replace(source, name=UNION, classes=spec.classes, has_yaw=spec.has_yaw, large_classes=None)
    return {place: source}


@dataclass
class PredictedSource:
    """Boxes found and annotated in the scans of a source that can be used, in the order of the scans, by `names`.

    Distances in a scan are measured from its origin x, y. By name of the scan, `skipped` has the reason for each that
    was left out, and `notes` counts of points and boxes that loading left out or repaired.
    """

    names: list[str] = field(default_factory=list)
    detections: list[Detections] = field(default_factory=list)
    truth: list[GroundTruth] = field(default_factory=list)
    origins: list[np.ndarray] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def evaluate(
        self, spec: DatasetSpec, iou_thresholds: Sequence[float], common: CommonClasses | None = None
    ) -> Evaluation:
        """Scores, by the protocol of the dataset of the scans; of another head over the classes in common with it."""
        evaluation = evaluate_detections(
            [common.detections(found) for found in self.detections] if common else self.detections,
            [common.truth(there) for there in self.truth] if common else self.truth,
            common.names if common else spec.classes,
            iou_thresholds,
            rotated=spec.has_yaw,
            origins=np.array(self.origins, np.float64).reshape(-1, 2),
            measured_from=distance_from(spec.name),
        )
        return replace(evaluation, matches=replace(evaluation.matches, names=tuple(self.names)))


def predict_source(
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    batch_size: int = 1,
    progress: bool = True,
    *,
    head: str | None = None,
    draw: int = 0,
) -> PredictedSource:
    """Predict every annotated scan of a source; see `predict_scans` for the arguments."""
    result = PredictedSource()
    arguments = (predictor, source, spec, result.skipped, result.notes)
    for _, scan, found in predict_scans(*arguments, batch_size=batch_size, progress=progress, head=head, draw=draw):
        known = scan.labels >= 0
        is_box = np.isfinite(found.boxes).all(axis=1) & (found.boxes[:, 3:6] > 0).all(axis=1)
        if not is_box.all():
            found = Detections(found.boxes[is_box], found.scores[is_box], found.labels[is_box])
            result.notes[scan.name] = {**result.notes.get(scan.name, {}), _NO_BOXES: int((~is_box).sum())}
        result.names.append(scan.name)
        result.detections.append(found)
        result.truth.append(GroundTruth(scan.boxes[known], scan.labels[known]))
        result.origins.append(scan_origin(scan.points, distance_from(spec.name)))
    return result


def _evaluate_dataset(
    config: ExperimentConfig,
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    request: EvalRequest,
    draw: int,
) -> dict[str, Any]:
    """Figures of one dataset as evaluation.json has them, their table as text, notes on the scans, and matches."""
    thresholds, size = config.eval.iou_thresholds, config.eval.batch_size
    own = predict_source(predictor, source, spec, size, draw=draw)
    evaluation = own.evaluate(spec, thresholds)
    values = {**evaluation.to_dict(), "scans": evaluation.num_scans, "skipped": own.skipped}
    if not request.is_plain:
        values["protocol"] = request.to_dict()
    if request.cross:
        values["cross"] = {}
        for head in (head for head in config.specs if head.name != spec.name):
            other = predict_source(predictor, source, spec, size, head=head.name, draw=draw)
            values["cross"][head.name] = _compare_heads(own, other, head, spec, thresholds)
    text = f"{evaluation.table()}\n{evaluation.summary()}"
    return {"values": values, "text": text, "notes": own.notes, "matches": evaluation.matches.to_dict()}


def _compare_heads(
    own: PredictedSource, other: PredictedSource, head: DatasetSpec, data: DatasetSpec, thresholds: Sequence[float]
) -> dict[str, Any]:
    """Scores of the head of another dataset, and of the scans' own head, over the classes that both have."""
    common = common_classes(head, data)
    same = CommonClasses(data, data, tuple((label, label) for label, _ in common.pairs))
    scores_of_other = other.evaluate(data, thresholds, common).to_dict()["thresholds"]
    scores_of_own = own.evaluate(data, thresholds, same).to_dict()["thresholds"]
    return {
        "classes": {name: head.classes[label] for name, (_, label) in zip(common.names, common.pairs, strict=True)},
        "without_counterpart": list(common.without_counterpart),
        "unused": list(common.unused),
        "thresholds": [
            {"iou": level["iou"], "mAP": level["mAP"], "own_mAP": by_own["mAP"], "AP": level["AP"]}
            for level, by_own in zip(scores_of_other, scores_of_own, strict=True)
        ],
    }


def say_warnings(sources: Mapping[str, ScanSource]) -> None:
    """Print, by dataset, warnings that hold for all scans of a source; in the process that opened it."""
    for name, source in sources.items():
        for warning in source.warnings if isinstance(source, ScanFolder | Mmdet3dFolder) else ():
            print(f"{name}: {warning}", flush=True)


def say_skipped(skipped: Mapping[str, str]) -> None:
    """Print the scans that were left out, and why."""
    for line in skipped_lines(skipped):
        say(line)


def say_notes(notes: Mapping[str, Mapping[str, int]], specs: Sequence[DatasetSpec]) -> None:
    """Print, by dataset, how much of the scans could not be used or was repaired; `notes` by "dataset/scan"."""
    for spec in specs:
        sentence = summed_notes({name: each for name, each in notes.items() if name.startswith(f"{spec.name}/")})
        if sentence:
            say(f"{spec.name}: {sentence}")


def merged(by_process: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of those that processes gathered."""
    return {name: value for each in by_process for name, value in each.items()}


def _check_classes(stored: ExperimentConfig, config: ExperimentConfig) -> None:
    saved = {spec.name: spec for spec in stored.specs}
    for spec in config.specs:
        trained = saved[spec.name]
        if trained.classes != spec.classes:
            raise InputError(
                f"The checkpoint's {spec.name} has the classes {', '.join(trained.classes)}, the config's "
                f"{', '.join(spec.classes)}: give those it was trained with, in their order."
            )
        if trained.has_yaw != spec.has_yaw:
            kind, other = ("turned", "axis-aligned") if trained.has_yaw else ("axis-aligned", "turned")
            raise InputError(
                f"The checkpoint's {spec.name} has {kind} boxes, the config's {other} ones: set has_yaw as it was "
                "trained with."
            )


def _subtitle(sources: Iterable[SourceConfig], workdir: Path, request: EvalRequest) -> str:
    parts = [f"{workdir}, split {request.split}"]
    if request.step is not None:
        parts.append(f"step {request.step}")
    if request.data:
        parts.append(f"scans of {request.data}")
    if request.tta:
        parts.append(f"test-time augmentation {', '.join(request.tta)}")
    text = "; ".join(parts) + "."
    if procedural := ", ".join(source.name for source in sources if source.is_procedural):
        text += f" The scans of {procedural} are procedural stand-ins: these numbers say nothing about the "
        text += "benchmarks of these names."
    return text
