"""Damage to every file of a run and of a pretrained folder: part of `benchmarks.faults`.

    python -m benchmarks.faults.files RUN STOPPED SCRATCH SEED

A child process damages one file at a time in a copy of RUN, a finished training, or of STOPPED, the same training
before its end, and reads what a user or a resumed run reads of it. It prints a line of JSON for each damage and reader,
which `files` counts by kind of file:

    sentence    an InputError of one line
    reported    what was damaged is left out or set aside, and a line is printed; all else is as before
    missing     what a removed file held, or one of another step, counts as never written
    beginning   the first lines of a file that was cut, as a kill leaves it
    unchecked   another number in a line of metrics or selection, which have no checksums
    equal       the bits that the undamaged files give
    fault       another number, a traceback, no end, or something left out or removed without a word
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.faults.children import Bench, saved_steps
from benchmarks.faults.compare import differences
from benchmarks.faults.damage import flipped
from h2a2_jax.checkpoint.store import CheckpointStore, StoredDetector, read_detector
from h2a2_jax.checkpoint.tree import host_arrays
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.documents import (
    CSV_FILE,
    JSON_FILE,
    best_step,
    damaged_evaluations,
    lasting_steps,
    read_evaluation,
    read_evaluations,
)
from h2a2_jax.evaluation.matches import MATCHES_FILE, read_matches
from h2a2_jax.initialization import build_detector
from h2a2_jax.pretrained.card import facts_of_run
from h2a2_jax.pretrained.folder import FILES, read_pretrained, write_pretrained
from h2a2_jax.training.build import build_trainer, restore_newest
from h2a2_jax.training.loop import doubtful_evaluations
from h2a2_jax.training.metrics import FILE_NAME, SELECTION_FILE, read_metrics, read_selection_log

FLIPS = 3
"""Bits that are flipped in a file, one after the other."""

REMOVED, OF_ANOTHER_STEP = "removed", "that of another step"
_LONGEST_S = 60
_LONGEST_SENTENCE = 700  # characters
_STEPS_PER_EPOCH = 4
_HASH = re.compile(r"[0-9a-f]{32}")


class Row(NamedTuple):
    """Outcome of one damage.

    Attributes:
        kind: kind of the file, as in "checkpoint: params/d/*".
        reader: name of what read it.
        way: what was done to the file.
        outcome: as in the head of this module.
        text: the sentence, the printed line, or the fault.
        file: the file, below the folder.
    """

    kind: str
    reader: str
    way: str
    outcome: str
    text: str
    file: str


# --- damage -----------------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """A way to damage a file: its new content, None for no file, a Path for a folder in its place."""

    name: str
    content: bytes | Path | None

    def do(self, path: Path) -> None:
        """Damage a file."""
        path.unlink()
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        elif self.content is not None:
            path.mkdir()


def damages(content: bytes, other: bytes | None, rng: np.random.Generator) -> Iterator[Damage]:
    """Ways to damage a file.

    Args:
        content: content of the file.
        other: content of a file of the same kind of another step; None leaves that way out.
        rng: chooses the bits.
    """
    for place in rng.integers(8 * len(content), size=FLIPS).tolist() if content else ():
        yield Damage(f"bit {place} flipped", flipped(content, place))
    if content.isascii() and (digits := [place for place, byte in enumerate(content) if chr(byte).isdigit()]):
        place = digits[rng.integers(len(digits))]
        yield Damage(f"digit {place} changed", flipped(content, 8 * place))
    if content:
        yield Damage("cut in half", content[: len(content) // 2])
        yield Damage("emptied", b"")
    yield Damage(REMOVED, None)
    yield Damage("a folder in its place", Path())
    if other not in (None, content):
        yield Damage(OF_ANOTHER_STEP, other)


# --- readers ----------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Digest of arrays and plain values in nested mappings and sequences, to the bit."""
    sha = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add(f"{name}/{key}", value[key])
        elif isinstance(value, np.ndarray) and value.dtype != object:
            sha.update(f"{name} {value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            for number, entry in enumerate(value):
                add(f"{name}/{number}", entry)
        else:
            sha.update(f"{name} {value!r}\n".encode())

    add("", value)
    return sha.hexdigest()


def _of_detector(detector: StoredDetector) -> dict[str, Any]:
    facts = {name: value for name, value in detector.origin.items() if name != "run"}
    return {"config": detector.config, "specs": detector.specs, "parts": detector.parts, "facts": facts}


class Readers:
    """What reads the files of a run, and the values of the undamaged ones.

    Args:
        config: config of the run.
    """

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self._layout = MeshLayout(train_mesh(len(config.datasets)), len(config.datasets))
        trainer = build_trainer(config, build_detector(config), self._layout, _STEPS_PER_EPOCH, config.train.steps)
        self._like = trainer.plain_start(self._layout)

    def detector(self, run: Path) -> dict[str, Any]:
        """The detector of the newest checkpoint."""
        return _of_detector(read_detector(run))

    def resumed(self, run: Path) -> dict[str, Any]:
        """The state that a resumed run starts from, and the names of the checkpoints that are left."""
        doubtful: dict[int, str] = {}

        def lasting(steps: Sequence[int]) -> set[int]:
            return lasting_steps(run, steps) | (doubtful.keys() & {*steps})

        with CheckpointStore(run / "checkpoints", self.config.train.keep_checkpoints, lasting) as store:
            state = restore_newest(store, self._like, self.config, self._layout)
            steps = [step for step in store.steps() if step < self.config.train.steps]
            doubtful |= doubtful_evaluations(run, self.config, steps)
            store.tidy()
        kept = sorted(str(path.relative_to(run)) for path in run.glob("checkpoints*/*/"))
        return {"state": host_arrays(state), "kept": kept}

    def state_of(self, run: Path, step: int) -> dict[str, np.ndarray]:
        """The training state of a step, as a resumed run starts from it."""
        with CheckpointStore(run / "checkpoints") as store:
            return host_arrays(store.restore_state(step, self._like, self.config.dataset_names))

    def history(self, run: Path) -> dict[str, Any]:
        """The evaluations of a run by step, and the best step; prints what is wrong with those left out."""
        print(*damaged_evaluations(run).values())
        return {"evaluations": read_evaluations(run), "best": best_step(run)}

    def matches(self, run: Path) -> dict[str, Any]:
        """Hits and misses of the evaluations of a run by step."""
        folders = sorted(run.glob("evaluations/*/"))
        found = {folder.name: read_matches(folder / MATCHES_FILE) for folder in folders}
        return {step: {name: vars(own) for name, own in matches.items()} for step, matches in found.items() if matches}

    def summary(self, run: Path) -> dict[str, Any]:
        """The evaluation of the end, as a report reads it."""
        return read_evaluation(run / JSON_FILE) if (run / JSON_FILE).exists() else {}

    def card(self, run: Path) -> dict[str, Any]:
        """Facts for the model card of the last step."""
        return facts_of_run(run, self.config.train.steps).to_json()

    def metrics(self, run: Path) -> list[Any]:
        """Lines of metrics."""
        return read_metrics(run)

    def selection(self, run: Path) -> dict[str, Any]:
        """The log of kernel selection."""
        steps, history = read_selection_log(run / SELECTION_FILE, self.config.dataset_names)
        return {"steps": steps, "history": {layer: vars(own) for layer, own in history.items()}}

    def pretrained(self, folder: Path) -> dict[str, Any]:
        """The detector of a pretrained folder."""
        detector = read_pretrained(folder)
        detector.shapes()
        return _of_detector(detector)


Reader = Callable[[Path], Any]
Verdict = tuple[str, str]
"""An outcome, and its text."""
Judge = Callable[[Any, Any, str], Verdict]
"""Judges what a reader gave: the expected value, the given one, which differs, and what was printed."""


def attempt(reader: Reader, folder: Path, expected: Any, judge: Judge) -> Verdict:
    """Read a damaged folder.

    Args:
        reader: reads the folder.
        folder: the folder.
        expected: what the reader gives for the undamaged folder.
        judge: judges another value.
    """

    def too_late(*_: object) -> None:
        raise TimeoutError(f"no end within {_LONGEST_S} s")

    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(_LONGEST_S)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("always")
            value = reader(folder)
    except InputError as error:
        text = str(error)
        is_sentence = "\n" not in text and len(text) <= _LONGEST_SENTENCE and text.endswith((".", ")"))
        return ("sentence", text) if is_sentence else ("fault", f"no sentence: {text!r}")
    except Exception as error:  # whatever else a reader raises is a fault
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]!r}"
    finally:
        signal.alarm(0)
    if digest(value) == digest(expected):
        return "equal", ""
    return judge(expected, value, " ".join(printed.getvalue().split()))


def another_value(expected: Any, found: Any, text: str) -> Verdict:
    """Judge a value that has no parts: another one is a fault."""
    return "fault", f"another value; printed was {text!r}"


def entries_left_out(expected: Mapping[str, Any], found: Mapping[str, Any], text: str) -> Verdict:
    """Judge a mapping: entries may be left out, which must be printed."""
    other = [name for name in found if name not in expected or digest(found[name]) != digest(expected[name])]
    if other:
        return "fault", f"another {', '.join(map(str, other))}; printed was {text!r}"
    missing = ", ".join(str(name) for name in expected if name not in found)
    return ("reported", text) if text else ("silent", f"{missing} left out")


def last_lines_left_out(expected: Sequence[Any], found: Sequence[Any], text: str) -> Verdict:
    """Judge lines: the last ones may be missing, as a kill leaves the file."""
    if len(found) == len(expected):
        return "unchecked", f"another value in one of {len(found)} lines"
    if digest(found) != digest(expected[: len(found)]):
        return another_value(expected, found, text)
    return "beginning", f"the first {len(found)} of {len(expected)} lines"


def last_steps_left_out(expected: Mapping[str, Any], found: Mapping[str, Any], text: str) -> Verdict:
    """Judge the log of kernel selection as `last_lines_left_out` judges lines."""
    before, after = (value["steps"].tolist() for value in (expected, found))
    return last_lines_left_out(before, after, text)


# --- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A folder whose files are damaged.

    Attributes:
        name: name in the table.
        folder: the undamaged folder; a copy of it is damaged.
        files: the files, relative to the folder.
        others: for each file, one of the same kind of another step; missing ones leave that damage out.
        readers: name, reader and judge.
    """

    name: str
    folder: Path
    files: Sequence[Path]
    others: Sequence[Path]
    readers: Sequence[tuple[str, Reader, Judge]]

    def rows(self, place: Path, rng: np.random.Generator) -> Iterator[Row]:
        """Damage and read, in a copy of the folder at `place`."""
        expected = {}
        for name, reader, _ in self.readers:
            with contextlib.redirect_stdout(io.StringIO()):
                expected[name] = reader(_copied(self.folder, place))
        for file, other in zip(self.files, self.others, strict=True):
            content = (self.folder / file).read_bytes()
            for damage in damages(content, other.read_bytes() if other.is_file() else None, rng):
                for name, reader, judge in self.readers:
                    damage.do(_copied(self.folder, place) / file)
                    outcome, text = attempt(reader, place, expected[name], judge)
                    if outcome == "silent":  # a file that is gone, or is not of this step, was perhaps never written
                        outcome = "missing" if damage.name in (REMOVED, OF_ANOTHER_STEP) else "fault"
                    yield Row(f"{self.name}: {kind_of(file)}", name, damage.name, outcome, text, str(file))


def _copied(folder: Path, place: Path) -> Path:
    """A copy that shares the files: a damage replaces its file, and nothing that reads writes into one."""
    shutil.rmtree(place, ignore_errors=True)
    return shutil.copytree(folder, place, copy_function=os.link)


def kind_of(file: Path) -> str:
    """Path of a file with stars for steps and hashes."""
    parts = ["*" if part.isdecimal() or _HASH.fullmatch(part) else part for part in file.parts]
    return "/".join(parts)


def _files_below(folder: Path, relative: str) -> list[Path]:
    return sorted(path.relative_to(folder) for path in (folder / relative).rglob("*") if path.is_file())


def subjects(run: Path, stopped: Path, scratch: Path) -> Iterator[Subject]:
    """The folders whose files are damaged.

    Args:
        run: a finished training.
        stopped: the same training before its end, with a best checkpoint that is older than those kept.
        scratch: folder for copies.
    """
    with CheckpointStore(run / "checkpoints") as store:
        earlier, last = store.steps()[-2:]
        config = store.stored_config(last)
    readers = Readers(config)
    before = readers.state_of(run, earlier)

    def judge_resumed(expected: Any, found: Any, text: str) -> Verdict:
        """Judge a resumed run: it may have set the damaged checkpoint aside."""
        if digest(found["state"]) not in (digest(expected["state"]), digest(before)):
            return "fault", f"another state; printed was {text!r}"
        aside = [name.replace(f"checkpoints/{last}", f"checkpoints_damaged/{last}") for name in expected["kept"]]
        if found["kept"] != aside:
            return "fault", f"left are {', '.join(found['kept'])}; printed was {text!r}"
        return ("reported", text) if text else ("fault", "set aside without a word")

    def judge_history(expected: Any, found: Any, text: str) -> Verdict:
        """Judge the evaluations: damaged ones may be left out."""
        verdict = entries_left_out(expected["evaluations"], found["evaluations"], text)
        if verdict[0] != "fault" and found["best"] not in (expected["best"], *found["evaluations"]):
            return "fault", f"the best step is {found['best']}"
        return verdict

    def judge_card(expected: Any, found: Any, text: str) -> Verdict:
        """Judge the facts of a card: scores may be left out."""
        others = [name for name in expected if name != "scores" and digest(found[name]) != digest(expected[name])]
        verdict = entries_left_out(expected["scores"], found["scores"], text)
        return ("fault", f"another {', '.join(others)}") if others else verdict

    checkpoint = _files_below(run, f"checkpoints/{last}")
    of_kind = defaultdict(list)
    for file in _files_below(run, f"checkpoints/{earlier}"):
        of_kind[kind_of(file)].append(run / file)
    taken: Counter[str] = Counter()
    others = []
    for file in checkpoint:
        kind = kind_of(file)
        others.append(of_kind[kind][taken[kind] % len(of_kind[kind])] if of_kind[kind] else run / "none")
        taken[kind] += 1
    yield Subject(
        "run",
        run,
        checkpoint,
        others,
        (("detector", readers.detector, another_value), ("resume", readers.resumed, judge_resumed)),
    )
    of_run: tuple[tuple[str, Reader, Judge], ...] = (
        ("history", readers.history, judge_history),
        ("matches", readers.matches, entries_left_out),
        ("card", readers.card, judge_card),
    )
    evaluations = _files_below(run, "evaluations")
    steps = sorted({file.parts[1] for file in evaluations}, key=int)
    following = dict(zip(steps, [*steps[1:], steps[0]], strict=True))
    others = [run / "evaluations" / following[file.parts[1]] / file.name for file in evaluations]
    # Matches do not say their step; whoever draws scans compares their scores with those of evaluation.json.
    others = [
        run / "none" if file.name == MATCHES_FILE else other for file, other in zip(evaluations, others, strict=True)
    ]
    yield Subject("run", run, evaluations, others, of_run)
    top = [Path(name) for name in ("evaluation.json", "evaluation.csv", "config.json")]
    of_top = (*of_run, ("report", readers.summary, entries_left_out))
    yield Subject("run", run, top, [run / "none"] * len(top), of_top)
    of_lines: tuple[tuple[str, Reader, Judge], ...] = (
        (FILE_NAME, readers.metrics, last_lines_left_out),
        (SELECTION_FILE, readers.selection, last_steps_left_out),
    )
    for of_file in of_lines:
        yield Subject("run", run, [Path(of_file[0])], [run / "none"], (of_file,))
    best = [Path("evaluations") / str(best_step(stopped)) / name for name in (JSON_FILE, CSV_FILE)]
    yield Subject("stopped", stopped, best, [run / "none"] * 2, (("resume", readers.resumed, another_value),))
    for step in (earlier, last):
        write_pretrained(read_detector(run, step), scratch / f"pretrained_{step}")
    names = [Path(name) for name in FILES]
    others = [scratch / f"pretrained_{earlier}" / name for name in FILES]
    exported = scratch / f"pretrained_{last}"
    yield Subject("pretrained", exported, names, others, (("detector", readers.pretrained, another_value),))


def main() -> None:
    """Damage and read everything; print a line for each outcome."""
    run, stopped, scratch, seed = map(Path, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    shutil.rmtree(scratch, ignore_errors=True)
    rng = np.random.default_rng(int(str(seed)))
    skipped = shutil.ignore_patterns("tensorboard", "cache", "lock")
    run, stopped = (shutil.copytree(folder, scratch / folder.name, ignore=skipped) for folder in (run, stopped))
    for subject in subjects(run, stopped, scratch):
        for row in subject.rows(scratch / "copy", rng):
            sys.stdout.write(f"{json.dumps(row)}\n")  # in one piece: TensorStore writes to the same pipe
            sys.stdout.flush()


# --- the scenario -----------------------------------------------------------------------------------------------------


def files(bench: Bench) -> None:
    """Damage every file of a run and of a pretrained folder and read it; resume some damaged runs."""
    report, scratch = bench.report, bench.empty("files_scratch")
    stopped = bench.rewound("files_stopped", 32)
    seed = int(bench.rng.integers(1 << 31))
    command = ["-m", "benchmarks.faults.files", str(bench.reference), str(stopped), str(scratch), str(seed)]
    child = bench.start(command)
    status = child.end()
    rows = [Row(*json.loads(line)) for line in child.lines if line.startswith("[")]
    if status != 0 or not rows:
        report.failed(f"exit status {status} after {len(rows)} damaged files: {' / '.join(child.lines[-3:])[:400]}")
    report.event(f"{len(rows)} damaged files were read (seed {seed})")
    groups = defaultdict(list)
    for row in rows:
        groups[row.kind, row.reader].append(row)
    for (kind, reader), group in groups.items():
        counts = Counter(row.outcome for row in group)
        for row in group:
            if row.outcome == "fault":
                report.failed(f"{row.reader} of {row.file}: {row.text}", f"{kind}: {row.way}")
        fault = f"{kind}, read by {reader}: {len(group)} damages"
        text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        said = next((f"{row.text}" for row in group if row.outcome in ("sentence", "reported")), "")
        if counts["sentence"] or counts["reported"]:
            report.sentence(fault, f"{text}, such as: {said}")
        elif not counts["fault"]:
            report.survived(fault, text)
    for name in sorted({row.outcome for row in rows}):
        report.event(f"{sum(row.outcome == name for row in rows)} {name}")
    shutil.rmtree(scratch, ignore_errors=True)


_ASIDE, _ANEW = ("is set aside in",), ("evaluation.json", "It is evaluated anew")
_RESUMED: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("evaluations/16/evaluation.json", "cut in half", 0, _ANEW),
    ("evaluations/16/evaluation.json", "digit", 0, _ANEW),
    ("evaluations/16/evaluation.json", "a folder in its place", 0, ("is set aside in", "and evaluated anew")),
    ("evaluations/16/evaluation.json", REMOVED, 0, _ANEW),
    ("checkpoints/32/_CHECKPOINT_METADATA", "emptied", 0, ("after step 32 of",)),
    ("checkpoints/32/config/metadata", OF_ANOTHER_STEP, 2, ("was saved as that of step 24",)),
    ("checkpoints/32/params/manifest.ocdbt", REMOVED, 0, _ASIDE),
    ("config.json", "emptied", 0, ("after step 32 of",)),
    ("selection.jsonl", "cut in half", 0, ("after step 32 of",)),
    ("metrics.jsonl", "a folder in its place", 2, ("metrics.jsonl",)),
    ("selection.jsonl", "a folder in its place", 2, ("selection.jsonl",)),
    ("lock", "a folder in its place", 2, ("lock",)),
)
"""File of a stopped run, damage, exit status of the run that resumes, and phrases of the line that it prints."""
_LINES = ("metrics.jsonl", "selection.jsonl")


def resumed_files(bench: Bench) -> None:
    """Resume runs with one damaged file, and compare their end with the reference."""
    for name, way, status, phrases in _RESUMED:
        fault = f"resume with {name}, {way}"
        workdir = bench.rewound("files_resumed", 32)
        file = workdir / name
        other = workdir / name.replace("/32/", "/24/")
        chosen = next(d for d in damages(file.read_bytes(), other.read_bytes(), bench.rng) if d.name.startswith(way))
        chosen.do(file)
        before = saved_steps(workdir)
        with bench.report.attempt(fault):
            line = bench.train(workdir).expect(status, *phrases)
            if status == 0:
                found = differences(bench.reference, workdir, files=name not in _LINES)
                bench.report.equal(f"the end, after the line {line!r},", found, fault)
            elif saved_steps(workdir) != before:
                bench.report.failed(f"there were checkpoints of {before}, there are {saved_steps(workdir)}", fault)
            else:
                bench.report.sentence(fault, line)


if __name__ == "__main__":
    main()
