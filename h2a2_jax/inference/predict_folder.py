"""Predict files of points, or the validation scans of a run, and write the boxes.

An error in one file stops no other, and the results of a file are on disk as soon as it is predicted.
"""

import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.checkpoint.store import checkpoint_place, read_detector, restore_checkpoint
from h2a2_jax.compilation import default_cache
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import INTERRUPTED, InputError
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.input_files import (
    FileScan,
    FoundInputs,
    InputFile,
    PredictRequest,
    find_inputs,
    load_file,
    printable,
)
from h2a2_jax.inference.predictor import PlannedPass, Predictor, build_predictor, predict_scans, prepare, skipped_lines
from h2a2_jax.inference.results import document_of, scan_entry
from h2a2_jax.inference.writers import ALL_BOXES, TABLE, check_output, write_document, write_scan, write_table
from h2a2_jax.scans.file_frame import OPEN
from h2a2_jax.scans.formats.folders import describe_unread
from h2a2_jax.scans.sources import build_source, some
from h2a2_jax.scans.specs import DatasetSpec

FAINT_SCORE = 0.05
"""Boxes down to this score, or to that of the request if it is lower, are on the page behind its slider."""
REPEATED = 3
"""Remarks of one kind that are printed one by one; a last line counts the others."""
_DETAIL = re.compile(r", by its [^;]*|\([^)]*\)|-?\d[\d.,]*")
"""Reasons and numbers, which make no other kind of remark."""
_SHOWN = 20  # names of files that are passed over

Item = TypeVar("Item")


def print_line(text: str) -> None:
    """Print a line above the progress bar that may be on the terminal."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def predict_inputs(
    workdir: Path,
    request: PredictRequest,
    config: ExperimentConfig | None = None,
    say: Callable[[str], None] = print_line,
) -> "Outcome":
    """Restore a checkpoint and write the boxes of files of points.

    Compiled programs are kept for the next time (`h2a2_jax.compilation.default_folder`). The checkpoint must agree with
    `config`, whose `eval` is used; None is the config that the checkpoint holds.

    Returns:
        Results and failures by file; also after Ctrl-C, with the files done until then.

    Raises:
        InputError: nothing can be predicted at all: no input is found, the results cannot be written, there is no
            checkpoint, or the model was not trained on the dataset.
    """
    run = checkpoint_place(workdir).run
    output = run / "boxes" if request.output is None else request.output
    found = find_inputs(request.inputs, output)
    check_output(output, (file.name for file in found.files), request.formats)
    detector = read_detector(workdir, request.step, config)
    config = detector.config if config is None else config
    lowest = min(request.score, FAINT_SCORE)
    settings = replace(config.eval, score_threshold=lowest)
    predictor = build_predictor(detector, config.specs, settings, default_cache(say))
    for line in _opening(found, request, predictor, output):
        say(line)
    if all(source.is_procedural for source in detector.config.datasets):
        say("The model has seen procedural scans only: on others its boxes show how things work, no more.")
    outcome = predict_files(predictor, found, request, output, say)
    for line in _closing(outcome, found, output):
        say(line)
    return outcome


def predict_validation_scans(
    workdir: Path,
    request: PredictRequest | None = None,
    config: ExperimentConfig | None = None,
    say: Callable[[str], None] = print_line,
) -> None:
    """Restore a checkpoint and write the boxes of the validation scans, <workdir>/predictions/<dataset>.json.

    The request has no inputs; its formats "ply", "html" and "png" are written scan by scan to <output>/<dataset>/, with
    the annotated boxes beside those found. The checkpoint must agree with `config`, whose data are used; None is the
    config that the checkpoint holds.

    Raises:
        InputError: there is no checkpoint, it is of another architecture than the config, a table is asked for, or the
            results cannot be written.
    """
    request = request or PredictRequest((), formats=())
    if "csv" in request.formats:
        raise InputError("--formats=csv is for files of points (--input); scans of a config have json, ply, html, png.")
    model, stored = restore_checkpoint(workdir, request.step, config)
    config = stored if config is None else config
    predictor = build_predictor(model, config.specs, config.eval)
    output = checkpoint_place(workdir).run / "predictions" if request.output is None else request.output
    check_output(output, (), ())
    if request.dataset is not None:
        predictor.spec(request.dataset)  # an error for a dataset that the model does not know
    formats = tuple(name for name in request.formats if name != "json")  # all scans share one JSON file
    for d in MeshLayout(train_mesh(len(config.specs)), len(config.specs)).evaluated:
        spec = config.specs[d]
        if request.dataset not in (None, spec.name):
            continue
        folder, skipped, entries = output / spec.name, dict[str, str](), []
        for scan, _, found in predict_scans(predictor, build_source(config.datasets[d], "val"), spec, skipped):
            entry = scan_entry(scan.name, scan.transform, found, spec)
            entries.append(entry)
            if not formats:
                continue
            known = scan.labels >= 0
            truth, matrix = GroundTruth(scan.boxes[known], scan.labels[known]), scan.transform.astype(np.float64)
            try:
                write_scan(folder, formats, entry, scan, matrix, found, spec, truth)
            except OSError as error:
                problem = f"{error.filename or folder} cannot be written ({error.strerror})"
                raise InputError(f"{problem}: choose another --output.") from error
        for line in skipped_lines(skipped):
            say(line)
        path = output / f"{spec.name}.json"
        write_document(path, document_of(entries, spec))
        say(f"{path}: {sum(len(entry['boxes']) for entry in entries)} boxes in {len(entries)} scans")


def _opening(found: FoundInputs, request: PredictRequest, predictor: Predictor, output: Path) -> Iterator[str]:
    """Lines on the files found, the head that predicts and the frame that the files are taken to be in."""
    names = [spec.name for spec in predictor.specs]
    spec = predictor.specs[0] if request.dataset is None else predictor.spec(request.dataset)
    choice = ""
    if request.dataset is None and len(names) > 1:
        choice = f" (the first of {', '.join(names)}; choose with --dataset)"
    kind = "turned about the vertical" if spec.has_yaw else "axis-aligned"
    files = _count(found.files, "file")
    yield f"{files}, boxes by the head of {spec.name}{choice}: {len(spec.classes)} classes, {kind}."
    shown = " unless they say or show otherwise"
    up = f"z up{shown * (request.unit != 'auto')}" if request.up == "auto" else f"{request.up} up"
    unit = f"m{shown}" if request.unit == "auto" else request.unit
    yield f"Files are taken as {up}, in {unit}; boxes of score {request.score:g} and more go to {printable(output)}."
    if found.passed_over:
        shown = ", ".join(printable(path) for path in found.passed_over[:_SHOWN])
        shown += ", ..." * (len(found.passed_over) > _SHOWN)
        yield f"Passed over, as without points: {_count(found.passed_over, 'text file')}, {shown}."
    if found.results:
        shown = ", ".join(printable(path) for path in found.results[:3]) + ", ..." * (len(found.results) > 3)
        yield f"Passed over, as results of a prediction: {_count(found.results, 'file')}, {shown}."
    yield from map(printable, describe_unread(found.unread))
    yield from found.problems.values()


def _closing(outcome: "Outcome", found: FoundInputs, output: Path) -> Iterator[str]:
    """Lines on remarks that were not printed one by one, boxes, time and failures."""
    for remark, names in outcome.remarks.values():
        if len(names) > REPEATED:
            more = "1 more scan" if len(names) == REPEATED + 1 else f"{len(names) - REPEATED} more scans"
            alike = f"{'much ' * bool(_DETAIL.search(remark))}as {names[0]}"
            yield f"{more} ({some(names[REPEATED:], 8)}), {alike}: {printable(remark)}."
    yield from _left_open(outcome.entries)
    boxes = "1 box" if outcome.boxes == 1 else f"{outcome.boxes} boxes"
    done = f"{boxes} in {len(outcome.entries)} of {_count(found.files, 'scan')}: {printable(output)}"
    yield f"Stopped. Until then: {done}; the same command begins anew." if outcome.interrupted else done
    if outcome.entries:
        spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in outcome.seconds.items())
        yield f"Seconds by stage, the next scan being read meanwhile: {spent}."
    if outcome.failed:
        yield f"{len(outcome.failed)} failed:"
        yield from (f"  {_after_name(name, sentence)}" for name, sentence in outcome.failed.items())


def _left_open(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines on scans that leave their up axis or unit open, where most of the others have another than was assumed."""
    for key, usual, words in (("up", "z", OPEN["up"]), ("unit", "m", OPEN["unit"])):
        undecided = [entry for entry in entries if any(said.startswith(words) for said in entry.get("remarks", ()))]
        others = Counter(entry.get(key, usual) for entry in entries if entry not in undecided)
        value, count = others.most_common(1)[0] if others else (usual, 0)
        if undecided and value != usual:
            names = some([entry["name"] for entry in undecided], 8)
            scans = _count(undecided, "scan")
            yield (
                f"{scans} ({names}) taken with {key} {usual} for want of signs; {count} others show {value}: if all "
                f"files are alike, add --{key}={value}."
            )


def _count(things: Sequence[object], noun: str) -> str:
    return f"1 {noun}" if len(things) == 1 else f"{len(things)} {noun}s"


def _after_name(name: str, sentence: str) -> str:
    """The sentence behind the name of the file that it is about, unless it begins with that name."""
    return sentence if sentence.startswith(name) else f"{name}: {sentence}"


@dataclass
class Outcome:
    """Results and failures of a prediction of files.

    Attributes:
        entries: `results.scan_entry` of each scan that was predicted.
        failed: by file, the sentence that says why it could not be predicted.
        remarks: by kind, the first remark and the names of all scans that have one that differs in details only.
        seconds: time by stage: "load" and "maps" (in a thread of their own), "network", "boxes", "write".
        interrupted: True if the user stopped the prediction.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    interrupted: bool = False

    @property
    def boxes(self) -> int:
        """Number of boxes found."""
        return sum(len(entry["boxes"]) for entry in self.entries)

    @property
    def status(self) -> int:
        """Exit status: 0, 1 if a file could not be predicted, 130 if the user stopped it."""
        return INTERRUPTED if self.interrupted else 1 if self.failed else 0


def predict_files(
    predictor: Predictor, found: FoundInputs, request: PredictRequest, output: Path, say: Callable[[str], None] = print
) -> Outcome:
    """Predict files and write the results to a folder, the next file being read meanwhile.

    The lowest score of the predictor is that of the request, or `FAINT_SCORE` if this is lower. `say` is called with
    remarks as they come up, `REPEATED` times for each kind, and with failures.

    Returns:
        Results and failures; also after Ctrl-C, with the files done until then.

    Raises:
        InputError: the model was not trained on the dataset.
    """
    spec = predictor.specs[0] if request.dataset is None else predictor.spec(request.dataset)
    outcome = Outcome(failed=dict(found.problems))
    loads = [partial(_load, predictor, file, request, spec) for file in found.files]
    with tqdm(total=len(found.files), unit="scan", mininterval=progress_interval(), disable=None) as bar:
        try:
            for file, pending in zip(found.files, read_ahead(loads), strict=True):
                failure = _predict_file(predictor, pending, request, spec, output, outcome, say)
                if failure is not None:
                    outcome.failed[printable(file.path)] = failure
                    say(f"failed: {_after_name(printable(file.path), failure)}")
                bar.update()
        except KeyboardInterrupt:
            outcome.interrupted = True
    try:
        if "json" in request.formats:
            write_document(output / ALL_BOXES, document_of(outcome.entries, spec))
        if "csv" in request.formats:
            write_table(output / TABLE, outcome.entries, spec)
    except OSError as error:
        outcome.failed[printable(output)] = f"{error.filename or output}: {error.strerror or error}."
    return outcome


def read_ahead(functions: Iterable[Callable[[], Item]]) -> Iterator[Future[Item]]:
    """The results of functions in order; each begins while the result before is worked on, no earlier.

    They run in daemon threads, which unlike those of an executor do not keep the program from ending.
    """

    def start(function: Callable[[], Item]) -> Future[Item]:
        future: Future[Item] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # else nobody would ever see the end of the future
                future.set_exception(error)

        Thread(target=run, daemon=True).start()
        return future

    futures = map(start, functions)
    following = next(futures, None)
    while following is not None:
        current = following
        wait([current])
        following = next(futures, None)
        yield current


@dataclass(frozen=True)
class _LoadedFile:
    """A file that was read, the maps of its pass, and the seconds that each took."""

    file: FileScan
    planned: PlannedPass
    seconds: dict[str, float]


def _load(predictor: Predictor, file: InputFile, request: PredictRequest, spec: DatasetSpec) -> _LoadedFile:
    """Read a file and make its maps, while the network runs on the file before."""
    loaded = load_file(file, request, spec)
    seconds = {"load": loaded.seconds}
    return _LoadedFile(loaded, predictor.plan([prepare(loaded.scan, spec)], seconds), seconds)


def _predict_file(
    predictor: Predictor,
    pending: Future[_LoadedFile],
    request: PredictRequest,
    spec: DatasetSpec,
    output: Path,
    outcome: Outcome,
    say: Callable[[str], None],
) -> str | None:
    """Predict one file and write its results; returns the reason where that failed."""
    try:
        read = pending.result()
        loaded = read.file
        for stage, spent in read.seconds.items():
            outcome.seconds[stage] += spent
        remarks = list(loaded.remarks)
        for remark in remarks:
            _remark(loaded, remark, outcome, say)
        (every,) = predictor.run(read.planned, spec.name, outcome.seconds)
        boxes = every.of_score(request.score)
        if not len(boxes):
            best = f"the best has {every.scores.max():.3f}: --score lowers the bound" if len(every) else "nor near it"
            remarks.append(f"no box has a score of {request.score:g} or more, {best}")
            _remark(loaded, remarks[-1], outcome, say)
        started, scan, matrix = time.perf_counter(), loaded.scan, loaded.matrix
        entry = scan_entry(scan.name, matrix, boxes, spec, printable(loaded.file.path))
        if remarks:
            entry["remarks"] = [printable(remark) for remark in remarks]
        write_scan(output, request.formats, entry, scan, matrix, boxes, spec, shown=request.score, every=every)
        outcome.seconds["write"] += time.perf_counter() - started
        outcome.entries.append(entry)
        if request.show:
            from h2a2_jax.viewer.window import show

            try:
                show(scan, boxes, spec.classes, title=scan.name, score=request.score)
            except InputError as error:  # no window is no failure: the boxes are written
                _remark(loaded, f"is not shown: {error}".removesuffix("."), outcome, say)
    except InputError as error:
        return printable(error)
    except OSError as error:
        return printable(f"{error.filename or output}: {error.strerror or error}.")
    except MemoryError as error:
        return printable(f"There is not enough memory for it ({error}): thin it out or split it.")
    except Exception as error:  # whatever goes wrong with one file, the others are predicted
        what = " ".join(str(error).split())[:300]
        return printable(f"Something unexpected went wrong ({type(error).__name__}: {what}).")
    return None


def _remark(loaded: FileScan, remark: str, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Note a remark; print it unless there were enough of its kind."""
    kind = _DETAIL.sub("#", remark.replace(loaded.file.path.name, "it"))
    _, names = outcome.remarks.setdefault(kind, (remark, []))
    names.append(loaded.scan.name)
    if len(names) <= REPEATED:
        say(f"{loaded.scan.name}: {printable(remark)}.")
