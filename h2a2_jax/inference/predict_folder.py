"""Predict files of points, and write the boxes: a job that can be stopped and goes on (`job`).

An error in one file stops no other. While the network runs on a scan, the next one is read and the results of the one
before are written.
"""

import contextlib
import json
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from h2a2_jax.boxes.nms import Detections
from h2a2_jax.checkpoint.store import StoredDetector
from h2a2_jax.compilation import default_cache
from h2a2_jax.config import EvalConfig
from h2a2_jax.errors import INTERRUPTED, InputError
from h2a2_jax.files import whole_file
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.background import WorkBehind, read_ahead
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.input_files import (
    FORMATS,
    FileScan,
    FoundInputs,
    InputFile,
    PredictRequest,
    find_inputs,
    load_file,
    printable,
)
from h2a2_jax.inference.job import FileIdentity, Job, open_job
from h2a2_jax.inference.placement import AUTO
from h2a2_jax.inference.predictor import PlannedPass, Predictor, build_predictor
from h2a2_jax.inference.scan_prediction import BoxChoice, plan_scan, predict_scan, present_names, renamed_specs
from h2a2_jax.inference.writers import check_output, write_scan
from h2a2_jax.pretrained.folder import weights_digest
from h2a2_jax.scans.file_frame import OPEN
from h2a2_jax.scans.formats.folders import describe_unread
from h2a2_jax.scans.scan import some
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.viewer.image import write_thumbnail
from h2a2_jax.viewer.index_page import write_index

FAINT_SCORE = 0.05
"""Boxes down to this score, or to that of the request if it is lower, are on the page behind its slider."""
INDEX = "index.html"
REPEATED = 3
"""Remarks of one kind that are printed one by one; a last line counts the others."""
_DETAIL = re.compile(r", by its [^;]*|\([^)]*\)|-?\d[\d.,]*")
"""Reasons and numbers, which make no other kind of remark."""
_SHOWN = 20  # names of files that are passed over
_NO_MATTER = ("inputs", "output", "show", "step", "overwrite")
"""Fields of a request that no result depends on; the step is in the weights."""


def print_line(text: str) -> None:
    """Print a line above the progress bar that may be on the terminal."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def predict_inputs(
    open_detector: Callable[[], StoredDetector],
    request: PredictRequest,
    output: Path,
    settings: EvalConfig | None = None,
    say: Callable[[str], None] = print_line,
) -> "Outcome":
    """Write the boxes of files of points to the folder `output`.

    Compiled programs are kept for the next time (`h2a2_jax.compilation.default_folder`). The detector is opened when
    the inputs are found and the folder can be written to. `settings` are those of the predictor; None: those that the
    detector was trained with.

    Returns:
        Results and failures by file; also after Ctrl-C, with the files done until then.

    Raises:
        InputError: nothing can be predicted at all: no input is found, the results cannot be written, or the folder
            holds those of another request; there is no detector, or it has no such dataset or class.
    """
    found, was_there = find_inputs(request.inputs, output), output.exists()
    check_output(output, (file.name for file in found.files), request.formats)
    try:
        detector = open_detector()
        settings = replace(settings or detector.config.eval, score_threshold=min(request.score, FAINT_SCORE))
        predictor = build_predictor(
            detector, renamed_specs(detector.specs, request.names), settings, default_cache(say), say
        )
        _checked_choice(request, predictor.heads)
        predictor.check_weights()  # else every file would fail for it
    except InputError:
        if not was_there:
            with contextlib.suppress(OSError):
                output.rmdir()
        raise
    for line in _opening(found, request, predictor, output):
        say(line)
    if all(source.is_procedural for source in detector.config.datasets):
        say("The detector has seen procedural scans only. For real rooms: --weights=tr3d-scannet.")
    passes = {f"--config.eval.{name}": getattr(settings, name) for name in ("iou_threshold", "conditioning", "kernels")}
    what = {"weights": weights_digest(detector), **passes}
    return predict_files(predictor, found, request, output, say, what=what)


def _opening(found: FoundInputs, request: PredictRequest, predictor: Predictor, output: Path) -> Iterator[str]:
    """Lines on the files found, the heads that predict and the frame that the files are taken to be in."""
    files = _count(found.files, "file")
    yield f"{files}; boxes of score {request.score:g} and more go to {printable(output)}."
    specs, automatic = predictor.specs, request.dataset == AUTO
    room = next((spec for spec in specs if not spec.faces_y), None)
    view = next((spec for spec in specs if spec.faces_y), None)
    if automatic and room and view:
        names = ", ".join(spec.name for spec in predictor.heads)
        heads = f"Rooms are predicted by the head of {room.name}, single views by that of {view.name}"
        yield f"{heads}; --dataset chooses one for all ({names})."
    else:
        spec = specs[0] if automatic else predictor.spec(request.dataset)
        yield f"Boxes are predicted by the head of {spec.name}: {_kind_of(spec)}."
    shown = "unless they say or show otherwise"
    frame = {
        (True, True): f"z up and in m, {shown}",
        (True, False): f"in {request.unit}, and z up {shown}",
        (False, True): f"{request.up} up, and in m {shown}",
        (False, False): f"{request.up} up and in {request.unit}",
    }
    yield f"Files are taken as {frame[request.up == 'auto', request.unit == 'auto']}."
    if found.passed_over:
        shown = ", ".join(printable(path) for path in found.passed_over[:_SHOWN])
        shown += ", ..." * (len(found.passed_over) > _SHOWN)
        yield f"Passed over, for they hold no points: {_count(found.passed_over, 'text file')}, {shown}."
    if found.results:
        shown = ", ".join(printable(path) for path in found.results[:3]) + ", ..." * (len(found.results) > 3)
        yield f"Passed over, for they are results of a prediction: {_count(found.results, 'file')}, {shown}."
    yield from map(printable, describe_unread(found.unread))
    yield from found.problems.values()


def _kind_of(spec: DatasetSpec) -> str:
    kind = "boxes turned about the vertical" if spec.has_yaw else "axis-aligned boxes"
    return f"{len(spec.classes)} classes, {kind}{', of single views' * spec.faces_y}"


def _closing(outcome: "Outcome", output: Path, has_pages: bool = False) -> Iterator[str]:
    """Lines on remarks that were not printed one by one, boxes, time and failures."""
    for remark, names in outcome.remarks.values():
        if len(names) > REPEATED:
            more = "1 more scan" if len(names) == REPEATED + 1 else f"{len(names) - REPEATED} more scans"
            alike = f"{'much ' * bool(_DETAIL.search(remark))}as {names[0]}"
            yield f"{more} ({some(names[REPEATED:], 8)}), {alike}: {printable(remark)}."
    yield from _left_open(outcome.entries)
    boxes = "1 box" if outcome.boxes == 1 else f"{outcome.boxes} boxes"
    scans = "1 scan" if outcome.asked == 1 else f"{outcome.asked} scans"
    done = f"{boxes} in {len(outcome.entries)} of {scans}: {printable(output / INDEX if has_pages else output)}"
    yield f"Stopped. Until then: {done}; the same command goes on." if outcome.interrupted else done
    if outcome.entries:
        spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in outcome.seconds.items())
        speed, network = "", f"network and boxes {statistics.median(outcome.passes or [0.0]):.2f} s"
        if (count := len(outcome.entries)) > 1:
            speed = f" ({count / max(outcome.elapsed, 1e-9):.2f} scans a second)"
            network += " a scan (median)"
        yield f"{outcome.elapsed:.1f} s{speed}; {network}. Seconds by stage, which overlap: {spent}."
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
        asked: number of files that were to be predicted, without those that were done before.
        entries: `results.entry_of` of each scan that was predicted.
        failed: by file, the sentence that says why it could not be predicted.
        remarks: by kind, the first remark and the names of all scans that have one that differs in details only.
        seconds: time by stage: "load" and "maps" (in a thread of their own), "network", "boxes", "write" (in a thread).
        passes: seconds of each scan in the network and its boxes.
        elapsed: seconds from the first scan to the last result.
        interrupted: True if the user stopped the prediction.
    """

    asked: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    passes: list[float] = field(default_factory=list)
    elapsed: float = 0.0
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
    predictor: Predictor,
    found: FoundInputs,
    request: PredictRequest,
    output: Path,
    say: Callable[[str], None] = print,
    *,
    what: Mapping[str, Any] | None = None,
) -> Outcome:
    """Predict files and write the results to a folder; files that were done before are skipped.

    The lowest score of the predictor is that of the request, or `FAINT_SCORE` if this is lower. `say` is called with
    remarks as they come up, `REPEATED` times for each kind, with failures, and with a summary. `what` identifies the
    detector by names and values: results of other detectors or flags are not mixed in one folder.

    Returns:
        Results and failures; also after Ctrl-C, with the files done until then.

    Raises:
        InputError: the detector has no such dataset or class, or the folder holds results of another kind.
    """
    choice = _checked_choice(request, predictor.heads)
    flags = {f"--{key}": value for key, value in asdict(request).items() if key not in _NO_MATTER}
    flags |= {"--formats": [kind for kind in FORMATS if kind in request.formats], "--classes": sorted(request.classes)}
    identity = json.loads(json.dumps({**(what or {}), **flags}))
    with open_job(output, identity, has_table="csv" in request.formats, overwrite=request.overwrite) as job:
        named = job.named(found.files)
        check_output(output, (file.name for file in named), request.formats)
        job.start()
        files = [file for file in named if not job.is_done(file)]
        if done := len(named) - len(files):
            say(f"{done} of {_count(named, 'scan')} {'is' if done == 1 else 'are'} done already and skipped.")
        run = _Run(predictor, request, choice, output, job, say, Outcome(len(files), failed=dict(found.problems)))
        run.predict(files)
    for line in _closing(run.outcome, output, "html" in request.formats):
        say(line)
    return run.outcome


def _checked_choice(request: PredictRequest, specs: Sequence[DatasetSpec]) -> BoxChoice:
    """Return the boxes that a request asks for; raise InputError if no head is of its dataset or has its classes."""
    request.frame_among([spec.name for spec in specs])
    choice = BoxChoice(present_names(request.classes, request.names), request.agnostic_nms)
    choice.check(specs)
    return choice


@dataclass(frozen=True)
class _LoadedFile:
    """A file that was read, the maps of its pass if it takes one, and the seconds that each took."""

    identity: FileIdentity
    file: FileScan
    planned: PlannedPass | None
    seconds: dict[str, float]


class _Run:
    """Prediction of files, with what its threads share."""

    def __init__(
        self,
        predictor: Predictor,
        request: PredictRequest,
        choice: BoxChoice,
        output: Path,
        job: Job,
        say: Callable[[str], None],
        outcome: Outcome,
    ):
        self.predictor, self.request, self.choice, self.output = predictor, request, choice, output
        self.job, self.say, self.outcome = job, say, outcome
        self._writes_pages = "html" in request.formats

    def predict(self, files: Sequence[InputFile]) -> None:
        """Predict files; Ctrl-C ends it when what the network is done with is written."""
        started = time.perf_counter()
        loads = [partial(self._load, file) for file in files]
        with (
            tqdm(total=len(files), unit="scan", mininterval=progress_interval(), disable=None) as bar,
            WorkBehind() as behind,
        ):
            try:
                for file, pending in zip(files, read_ahead(loads), strict=True):
                    self._predict_file(file, pending, behind)
                    bar.update()
            except KeyboardInterrupt:
                self.outcome.interrupted = True
        try:
            self._write_overview()
        except OSError as error:
            self.outcome.failed[printable(self.output)] = f"{error.filename or self.output}: {error.strerror or error}."
        self.outcome.elapsed = time.perf_counter() - started

    def _load(self, file: InputFile) -> _LoadedFile:
        """Read a file and make its maps, while the network runs on the file before."""
        identity = FileIdentity.of(file.path)
        loaded = load_file(file, self.request, self.predictor.heads)
        seconds = {"load": loaded.seconds}
        planned = plan_scan(self.predictor, loaded.placed, self.request.tile, seconds)
        return _LoadedFile(identity, loaded, planned, seconds)

    def _predict_file(self, file: InputFile, pending: Future[_LoadedFile], behind: WorkBehind) -> None:
        """Predict one file, and have its results written."""
        with self._failures_of(file):
            read, request, seconds = pending.result(), self.request, self.outcome.seconds
            loaded, spec = read.file, read.file.placed.spec
            for stage, spent in read.seconds.items():
                seconds[stage] += spent
            remarks = list(loaded.remarks)
            for remark in remarks:
                self._remark(loaded, remark)
            started = time.perf_counter()
            found = predict_scan(
                self.predictor, loaded.placed, read.planned, request.tile, request.floor, seconds=seconds
            )
            self.outcome.passes.append(time.perf_counter() - started)
            every = self.choice.of(found, spec)
            if not len(boxes := every.of_score(request.score)):
                best = f"the best has {every.scores[0]:.3f}: --score lowers the bound" if len(every) else "nor near it"
                remarks.append(f"no box has a score of {request.score:g} or more, {best}")
                self._remark(loaded, remarks[-1])
            behind.put(partial(self._write, read, every, boxes, remarks))
            if request.show:
                self._show(loaded, boxes)

    def _write(self, read: _LoadedFile, every: Detections, boxes: Detections, remarks: Sequence[str]) -> None:
        """Write the results of a scan, then note it in the job."""
        file, placed, started = read.file.file, read.file.placed, time.perf_counter()
        with self._failures_of(file):
            result = Boxes.of(
                boxes,
                placed.scan,
                placed.matrix,
                placed.spec,
                file=file.path,
                remarks=tuple(remarks),
                rows=placed.rows,
            )
            write_scan(self.output, self.request.formats, result, shown=self.request.score, every=every)
            if self._writes_pages:
                with whole_file(self.output / "thumbnails" / f"{file.name}.jpg") as part:
                    write_thumbnail(part, result, score=self.request.score)
            entry = result.to_entry()
            self.job.add(file, read.identity, entry)
            self.outcome.entries.append(entry)
        with contextlib.suppress(OSError):  # a full disk: the last writing says so
            self.job.refresh(self._write_overview)
        self.outcome.seconds["write"] += time.perf_counter() - started

    def _write_overview(self) -> None:
        """Write what shows all scans."""
        self.job.complete_table()
        entries, failed = self.job.state()
        heads = ", ".join(dict.fromkeys(entry["dataset"] for entry in entries.values() if entry.get("dataset")))
        if "json" in self.request.formats:
            self.job.write_document(heads)
        if self._writes_pages:
            shown = [
                {**entry, "page": f"{name}.html", "thumbnail": f"thumbnails/{name}.jpg"}
                for name, entry in entries.items()
            ]
            facts = [("heads", heads), ("lowest score", f"{self.request.score:g}")]
            failures = {printable(path): sentence for path, sentence in failed.items()}
            write_index(self.output / INDEX, shown, failures, title="Boxes", facts=facts)

    @contextlib.contextmanager
    def _failures_of(self, file: InputFile) -> Iterator[None]:
        """Note what goes wrong with a file; the others are predicted."""
        try:
            yield
            return
        except InputError as error:
            sentence = printable(error)
        except OSError as error:
            sentence = printable(f"{error.filename or self.output}: {error.strerror or error}.")
        except MemoryError as error:
            sentence = printable(f"There is not enough memory for it ({error}): thin it out or split it.")
        except Exception as error:  # whatever goes wrong with one file, the others are predicted
            what = " ".join(str(error).split())[:300]
            sentence = printable(f"Something unexpected went wrong ({type(error).__name__}: {what}).")
        name = printable(file.path)
        self.outcome.failed[name] = sentence
        self.say(f"failed: {_after_name(name, sentence)}")
        with contextlib.suppress(OSError):  # a full disk has its own failure; the job tries the file again
            self.job.fail(file, FileIdentity.of(file.path), sentence)

    def _show(self, loaded: FileScan, boxes: Detections) -> None:
        from h2a2_jax.viewer.window import show

        placed = loaded.placed
        try:
            show(placed.scan, boxes, placed.spec.classes, title=loaded.file.name, score=self.request.score)
        except InputError as error:  # no window is no failure: the boxes are written
            self._remark(loaded, f"is not shown: {error}".removesuffix("."))

    def _remark(self, loaded: FileScan, remark: str) -> None:
        """Note a remark; print it unless there were enough of its kind."""
        kind = _DETAIL.sub("#", remark.replace(loaded.file.path.name, "it"))
        _, names = self.outcome.remarks.setdefault(kind, (remark, []))
        names.append(loaded.file.name)
        if len(names) <= REPEATED:
            self.say(f"{loaded.file.name}: {printable(remark)}.")
