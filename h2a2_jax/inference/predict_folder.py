"""Predicts file after file: what goes wrong with one stops no other, and what is done is on disk at once."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.input_files import (
    FileScan,
    FoundInputs,
    InputFile,
    Pending,
    PredictRequest,
    load_file,
    printable,
    read_ahead,
)
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.inference.results import document_of, scan_entry
from h2a2_jax.inference.writers import ALL_BOXES, TABLE, write_document, write_scan, write_table
from h2a2_jax.scans.specs import DatasetSpec

FAINT_SCORE = 0.05
"""Boxes down to this score, or to that of the request if it is lower, are on the page behind its slider."""
REPEATED = 3
"""How often remarks of one kind are said as they come up."""
_NUMBER = re.compile(r"-?\d[\d.,]*")


@dataclass
class Outcome:
    """What became of the files.

    Attributes:
        entries: of `predictions.scan_entry`, of the scans that were predicted.
        failed: by file, why it was not; one sentence.
        remarks: by kind, the first remark and the names of all scans that it is true of, numbers apart.
        seconds: by stage: "load" (in a thread of its own), "maps", "network", "boxes", "write".
        interrupted: whether the user stopped it.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def boxes(self) -> int:
        """How many were found."""
        return sum(len(entry["boxes"]) for entry in self.entries)


def predict_files(
    predictor: Predictor, found: FoundInputs, request: PredictRequest, output: Path, say: Callable[[str], None] = print
) -> Outcome:
    """Predicts files and writes the results, the next one being read meanwhile.

    Args:
        predictor: whose lowest score is that of the request, or `FAINT_SCORE` if this is lower.
        found: the files.
        request: how.
        output: folder of the results, which can be written to.
        say: is told remarks as they come up, each kind `REPEATED` times.

    Returns:
        What became of them; also after Ctrl-C, with what was done until then.

    Raises:
        InputError: the model was not trained on the dataset.
    """
    spec = predictor.specs[0] if request.dataset is None else predictor.spec(request.dataset)
    outcome = Outcome(failed=dict(found.problems))
    loads = [partial(_timed_load, file, request, spec) for file in found.files]
    with tqdm(total=len(found.files), unit="scan", mininterval=progress_interval(), disable=None) as bar:
        try:
            for file, pending in zip(found.files, read_ahead(loads), strict=True):
                failure = _predict_one(predictor, pending, request, spec, output, outcome, say)
                if failure is not None:
                    outcome.failed[printable(file.path)] = failure
                    say(f"failed: {after_name(printable(file.path), failure)}")
                bar.update()
        except KeyboardInterrupt:
            outcome.interrupted = True
    _write_together(output, request, spec, outcome)
    return outcome


def after_name(name: str, sentence: str) -> str:
    """The sentence behind the name of what it is about, unless it begins with that already."""
    return sentence if sentence.startswith(name) else f"{name}: {sentence}"


def _timed_load(file: InputFile, request: PredictRequest, spec: DatasetSpec) -> tuple[FileScan, float]:
    started = time.perf_counter()
    return load_file(file, request, spec), time.perf_counter() - started


def _predict_one(
    predictor: Predictor,
    pending: Pending[tuple[FileScan, float]],
    request: PredictRequest,
    spec: DatasetSpec,
    output: Path,
    outcome: Outcome,
    say: Callable[[str], None],
) -> str | None:
    """Why it failed; None if it did not."""
    try:
        loaded, seconds = pending.result()
        outcome.seconds["load"] = outcome.seconds.get("load", 0.0) + seconds
        for remark in loaded.remarks:
            _remark(loaded, remark, outcome, say)
        (every,) = predictor.predict([prepare(loaded.scan, spec)], spec.name, outcome.seconds)
        boxes = every.of_score(request.score)
        if not len(boxes):
            best = f"the best has {every.scores.max():.2f}: --score lowers the bound" if len(every) else "nor near it"
            _remark(loaded, f"no box has a score of {request.score:g} or more, {best}", outcome, say)
        started = time.perf_counter()
        entry = scan_entry(loaded.scan.name, loaded.matrix, boxes, spec, printable(loaded.file.path))
        write_scan(
            output, request.formats, entry, loaded.scan, loaded.matrix, boxes, spec, shown=request.score, every=every
        )
        outcome.seconds["write"] = outcome.seconds.get("write", 0.0) + time.perf_counter() - started
        outcome.entries.append(entry)
        if request.show:
            _show(loaded, boxes, request.score, spec, outcome, say)
    except InputError as error:
        return printable(error)
    except OSError as error:
        return printable(f"{error.filename or output}: {error.strerror or error}.")
    except MemoryError as error:
        return printable(f"There is not enough memory for it ({error}): thin it out or split it.")
    except Exception as error:  # whatever it is, the other scans go on
        what = " ".join(str(error).split())[:300]
        return printable(f"Something unexpected went wrong ({type(error).__name__}: {what}).")
    return None


def _remark(loaded: FileScan, remark: str, outcome: Outcome, say: Callable[[str], None]) -> None:
    kind = _NUMBER.sub("#", remark.replace(loaded.file.path.name, "it"))
    _, names = outcome.remarks.setdefault(kind, (remark, []))
    names.append(loaded.scan.name)
    if len(names) <= REPEATED:
        say(f"{loaded.scan.name}: {printable(remark)}.")


def _show(
    loaded: FileScan, boxes: Detections, score: float, spec: DatasetSpec, outcome: Outcome, say: Callable[[str], None]
) -> None:
    from h2a2_jax.viewer import show

    try:
        show(loaded.scan, boxes, spec.classes, title=loaded.scan.name, score=score)
    except InputError as error:  # no window is no reason to lose boxes
        _remark(loaded, f"is not shown: {error}".removesuffix("."), outcome, say)


def _write_together(output: Path, request: PredictRequest, spec: DatasetSpec, outcome: Outcome) -> None:
    try:
        if "json" in request.formats:
            write_document(output / ALL_BOXES, document_of(outcome.entries, spec))
        if "csv" in request.formats:
            write_table(output / TABLE, outcome.entries, spec)
    except OSError as error:
        outcome.failed[printable(output)] = f"{error.filename or output}: {error.strerror or error}."
