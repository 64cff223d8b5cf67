"""Trainings of `configs/joint.py:tiny` in child processes: part of `benchmarks.faults`."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from h2a2_jax.evaluation.documents import best_step
from h2a2_jax.host import duration

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/joint.py:tiny"
STEPS, CHECKPOINT_EVERY = 40, 8
"""Values of that config."""
SHORT = ("--config.train.steps=24", "--config.train.log_every=1", "--config.train.evaluate_every=0")
"""Flags of a shorter training that logs every step."""

_KEEP_ALL = f"--config.train.keep_checkpoints={STEPS // CHECKPOINT_EVERY}"
_POLL_S = 0.005
_PATIENCE_S = 900
_CELL = 400
"""Characters of a text in the table."""


class Fault(Exception):
    """Something did not happen as it should."""


class Child:
    """A program of this repository in a process of its own.

    Args:
        command: arguments of the interpreter.
        environment: environment variables of the process.
        prefix: a program that starts the interpreter, with its arguments.

    Attributes:
        process: the process.
        lines: lines that it printed so far, to standard output and standard error.
    """

    def __init__(self, command: Sequence[str | bytes], environment: Mapping[str, str], prefix: Sequence[str] = ()):
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def line_with(self, text: str) -> str | None:
        """The first printed line that contains a text."""
        return next((line for line in self.lines.copy() if text in line), None)

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Wait until a condition holds; return False if the program ends first."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                self.kill()
                command = " ".join(map(str, self.process.args))  # type: ignore[arg-type]
                raise Fault(f"no progress in {_PATIENCE_S} s of {command}: {self.lines[-3:]}")
            time.sleep(_POLL_S)
        self.end()
        return bool(condition())

    def wait(self, seconds: float) -> bool:
        """Wait for some time; return False if the program ends first."""
        deadline = time.monotonic() + seconds
        return self.wait_for(lambda: time.monotonic() >= deadline) and self.process.poll() is None

    def end(self) -> int:
        """Wait for the end; return the exit status, negative after a signal that the program did not handle."""
        status = self.process.wait(_PATIENCE_S)
        self._reader.join()
        return status

    def signal(self, number: int) -> int:
        """Send a signal and wait for the end; return the exit status."""
        self.process.send_signal(number)
        return self.end()

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.signal(signal.SIGKILL)

    def expect(self, status: int, *phrases: str) -> str:
        """Wait for the end and check the exit status and the output.

        Args:
            status: expected exit status.
            phrases: expected together in one line of the output.

        Returns:
            The line with the phrases; the last line if there are no phrases.

        Raises:
            Fault: another status, a traceback, not exactly one error message with status 2, or no such line.
        """
        found = self.end()
        if found != status:
            raise Fault(f"exit status {found}, expected {status}; it printed: {' / '.join(self.lines[-12:])}")
        if any("Traceback" in line for line in self.lines):
            raise Fault(f"there is a traceback: {' / '.join(self.lines[-12:])}")
        if status == 2 and sum(line.startswith("run.py: ") for line in self.lines) != 1:
            raise Fault(f"expected one error message of run.py, it printed: {' / '.join(self.lines[-12:])}")
        line = next((line for line in self.lines if all(phrase in line for phrase in phrases)), None)
        if line is None:
            raise Fault(f"no line has {' and '.join(map(repr, phrases))}; it printed: {' / '.join(self.lines[-12:])}")
        return line if phrases else self.lines[-1]


class Outcome(NamedTuple):
    """A row of the table of faults.

    Attributes:
        scenario: name of the scenario.
        fault: what was done, in a few words.
        outcome: "survived": the result is that of a run without the fault; "sentence": the program ended with one
            sentence that names what to do; "fault": neither.
        text: the sentence, or what was seen.
    """

    scenario: str
    fault: str
    outcome: Literal["survived", "sentence", "fault"]
    text: str


@dataclass
class Report:
    """Prints progress and collects outcomes and failures.

    Attributes:
        planned: number of trainings that are still to be started, by scenario.
        outcomes: rows of the table of faults.
        failures: error messages.
        scenario: name of the scenario that runs.
    """

    planned: dict[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    scenario: str = ""
    _began: float = field(default_factory=time.monotonic)
    _starts: int = 0

    def started(self) -> None:
        """Count the start of a training, for the time left."""
        self._starts += 1
        self.planned[self.scenario] = max(self.planned.get(self.scenario, 0) - 1, 0)

    def event(self, text: str) -> None:
        """Print a line: the time taken, the scenario, the event, the time left."""
        taken = time.monotonic() - self._began
        left = taken / max(self._starts, 1) * sum(self.planned.values())
        print(f"{duration(taken)} {self.scenario:8} {text} [left {duration(left)}]", flush=True)

    def survived(self, fault: str, text: str = "") -> None:
        """Print a fault that changed nothing, and add it to the table."""
        self.outcomes.append(Outcome(self.scenario, fault, "survived", text))
        self.event(f"survived: {fault}{': ' * bool(text)}{text}")

    def sentence(self, fault: str, text: str) -> None:
        """Print a fault that ended the program with one sentence, and add it to the table."""
        self.outcomes.append(Outcome(self.scenario, fault, "sentence", text))
        self.event(f"sentence: {fault}: {text}")

    def failed(self, text: str, fault: str = "") -> None:
        """Print a failure, remember it and add it to the table."""
        self.outcomes.append(Outcome(self.scenario, fault, "fault", text))
        self.failures.append(f"{self.scenario}: {fault}{': ' * bool(fault)}{text}")
        self.event(f"FAILED: {fault}{': ' * bool(fault)}{text}")

    @contextlib.contextmanager
    def attempt(self, fault: str = "") -> Iterator[None]:
        """Turn a `Fault` inside into a failure; what comes after goes on."""
        try:
            yield
        except Fault as seen:
            self.failed(str(seen), fault)

    def equal(self, what: str, differences: Sequence[str], fault: str = "") -> None:
        """Print the result of a comparison, a failure if there are differences; a fault that is named survived."""
        if differences:
            self.failed(f"{what} differs: {'; '.join(differences)}", fault)
        elif fault:
            self.survived(fault, f"{what} is equal")
        else:
            self.event(f"{what} is equal")

    def table(self) -> str:
        """The outcomes as a table in Markdown, and their numbers."""
        counts = Counter(row.outcome for row in self.outcomes)
        rows = [f"| {row.scenario} | {row.fault} | {row.outcome} | {_cell(row.text)} |" for row in self.outcomes]
        numbers = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("survived", "sentence", "fault"))
        return "\n".join(["| scenario | fault | outcome | seen |", "|---|---|---|---|", *rows, "", numbers])


def _cell(text: str) -> str:
    """A text as the cell of a table, cut to one line."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= _CELL else f"{line[:_CELL]}..."


@dataclass
class Bench:
    """A folder for trainings, and the means to start them.

    Attributes:
        folder: folder of all workdirs.
        kills: number of kills in the scenario "kills".
        rng: random generator of the moments.
        report: prints the events.
    """

    folder: Path
    kills: int
    rng: np.random.Generator
    report: Report

    @property
    def cache(self) -> Path:
        """Cache of compiled programs that the trainings share."""
        return self.folder / "compiled"

    @property
    def own_cache(self) -> Path:
        """Cache of compiled programs of the trainings that are to have one of their own."""
        return self.folder / "own_compiled"

    @property
    def reference(self) -> Path:
        """Workdir of the training without a fault."""
        return self.folder / "reference"

    @property
    def every(self) -> Path:
        """Workdir of the same training with all of its checkpoints."""
        return self.folder / "every"

    def make_reference(self) -> None:
        """Train `reference` and `every`, unless they are finished already."""
        for workdir, flags in ((self.reference, ()), (self.every, (_KEEP_ALL,))):
            if not (workdir / "summary.md").exists():
                started = time.monotonic()
                self.train(workdir, *flags).expect(0)
                self.report.event(f"{STEPS} steps without a fault in {time.monotonic() - started:.0f} s")

    def start(
        self,
        command: Sequence[str | bytes],
        *,
        devices: int = 1,
        own_cache: bool = False,
        changed: Mapping[str, str | None] = MappingProxyType({}),
        prefix: Sequence[str] = (),
    ) -> Child:
        """Start a program on the given number of CPU devices.

        Args:
            command: arguments of the interpreter.
            devices: number of CPU devices.
            own_cache: True leaves the cache of compiled programs to the program.
            changed: other environment variables; None takes one out.
            prefix: a program that starts the interpreter, with its arguments.
        """
        self.report.started()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for name in ("JAX_COMPILATION_CACHE_DIR", "H2A2_CACHE"):
            environment.pop(name, None)
        name = "H2A2_CACHE" if own_cache else "JAX_COMPILATION_CACHE_DIR"
        environment[name] = str(self.own_cache if own_cache else self.cache)
        if devices > 1:
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        kept = {name: value for name, value in (environment | {**changed}).items() if value is not None}
        return Child(command, kept, prefix)

    def train(self, workdir: Path, *flags: str, **how: Any) -> Child:
        """Start or resume a training; `how` is of `start`."""
        return self.start(["run.py", CONFIG, f"--workdir={workdir}", *flags], **how)

    def empty(self, name: str) -> Path:
        """Path of a workdir for a new training; an older one is removed."""
        workdir = self.folder / name
        shutil.rmtree(workdir, ignore_errors=True)
        return workdir

    def rewound(self, name: str, step: int) -> Path:
        """Copy the reference as if it had been killed right after the checkpoint of a step."""
        workdir = self.empty(name)
        shutil.copytree(self.reference, workdir, ignore=shutil.ignore_patterns("checkpoints"))
        for later in workdir.glob("evaluations/*"):
            if int(later.name) >= step:
                shutil.rmtree(later)
        for kept in {step, step - CHECKPOINT_EVERY, best_step(workdir) or step}:
            shutil.copytree(self.every / "checkpoints" / str(kept), workdir / "checkpoints" / str(kept))
        for path in [*workdir.glob("evaluation.*"), workdir / "summary.md", workdir / "curves.png"]:
            path.unlink()
        return workdir


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints on disk, by the names of their folders."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


def newest(workdir: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return max(saved_steps(workdir), default=0)


def half_saved(workdir: Path) -> list[str]:
    """Names of the folders of unfinished checkpoints."""
    return [path.name for path in (workdir / "checkpoints").glob("*") if not path.name.isdecimal()]


def logged_step(workdir: Path) -> int:
    """Step of the last whole line of metrics; 0 if there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0
