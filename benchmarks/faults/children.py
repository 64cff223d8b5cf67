"""Trainings of `configs/joint.py:tiny` in child processes, to be killed and looked at: part of `benchmarks.faults`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from h2a2_jax.compilation import remove_damaged_entries
from h2a2_jax.evaluation.documents import best_step
from h2a2_jax.host import duration

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/joint.py:tiny"
STEPS, CHECKPOINT_EVERY = 40, 8
"""Of that config."""
SHORT = ("--config.train.steps=24", "--config.train.log_every=1", "--config.train.evaluate_every=0")
"""Flags of a shorter training that tells of every step."""

_KEEP_ALL = f"--config.train.keep_checkpoints={STEPS // CHECKPOINT_EVERY}"
_POLL_S = 0.005
_PATIENCE_S = 900


class Fault(Exception):
    """Something did not happen as it should."""


class Child:
    """A program of this repository in a process of its own.

    Args:
        command: behind the name of the interpreter.
        environment: of the process.

    Attributes:
        process: it.
        lines: what it printed so far, on both of its streams.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, *command],
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

    def said(self, text: str) -> str | None:
        """The first line that contains a text."""
        return next((line for line in self.lines.copy() if text in line), None)

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Waits until something holds; False where the program ends first."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                self.kill()
                raise Fault(f"nothing came of {' '.join(map(str, self.process.args))}: {self.lines[-3:]}")  # type: ignore[arg-type]
            time.sleep(_POLL_S)
        self.end()
        return bool(condition())

    def wait(self, seconds: float) -> bool:
        """Waits for some time; False where the program ends first."""
        deadline = time.monotonic() + seconds
        return self.wait_for(lambda: time.monotonic() >= deadline) and self.process.poll() is None

    def end(self) -> int:
        """Waits for its end; the exit status, negative after a signal that it did not handle."""
        status = self.process.wait(_PATIENCE_S)
        self._reader.join()
        return status

    def signal(self, number: int) -> int:
        """Sends a signal and waits for its end; the exit status."""
        self.process.send_signal(number)
        return self.end()

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    def expect(self, status: int, *phrases: str) -> str:
        """Waits for its end, which is to be of this status, without a traceback and with these phrases in one line.

        Returns:
            That line; the last one where no phrase is asked for.

        Raises:
            Fault: it is not so.
        """
        found = self.end()
        if found != status:
            raise Fault(f"exit status {found}, expected {status}; it said: {' / '.join(self.lines[-12:])}")
        if any("Traceback" in line for line in self.lines):
            raise Fault(f"there is a traceback: {' / '.join(self.lines[-12:])}")
        if status == 2 and sum(line.startswith("run.py: ") for line in self.lines) != 1:
            raise Fault(f"expected one sentence of run.py, it said: {' / '.join(self.lines[-12:])}")
        line = next((line for line in self.lines if all(phrase in line for phrase in phrases)), None)
        if line is None:
            raise Fault(f"no line has {' and '.join(map(repr, phrases))}; it said: {' / '.join(self.lines[-12:])}")
        return line if phrases else self.lines[-1]


@dataclass
class Report:
    """Lines of progress, and what failed.

    Attributes:
        planned: starts of a child that are still to come, by scenario.
        failures: sentences.
    """

    planned: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    scenario: str = ""
    _began: float = field(default_factory=time.monotonic)
    _starts: int = 0

    def started(self) -> None:
        """Another child ran, or is about to."""
        self._starts += 1
        self.planned[self.scenario] = max(self.planned.get(self.scenario, 0) - 1, 0)

    def event(self, text: str) -> None:
        """A line: the time taken, the scenario, what happened, the time left."""
        taken = time.monotonic() - self._began
        left = taken / max(self._starts, 1) * sum(self.planned.values())
        print(f"{duration(taken)} {self.scenario:8} {text} [left {duration(left)}]", flush=True)

    def failed(self, text: str) -> None:
        """A line that counts."""
        self.failures.append(f"{self.scenario}: {text}")
        self.event(f"FAILED: {text}")

    def equal(self, what: str, differences: Sequence[str]) -> None:
        """A line on a comparison, which fails where there are differences."""
        if differences:
            self.failed(f"{what} differs: {'; '.join(differences)}")
        else:
            self.event(f"{what} is equal")


@dataclass
class Bench:
    """Where trainings take place.

    Attributes:
        folder: of everything.
        kills: how often to kill.
        rng: of the moments.
        report: is told what happens.
    """

    folder: Path
    kills: int
    rng: np.random.Generator
    report: Report

    @property
    def cache(self) -> Path:
        """Of compiled programs, shared by the trainings."""
        return self.folder / "compiled"

    @property
    def reference(self) -> Path:
        """The workdir of a training that nothing happened to."""
        return self.folder / "reference"

    @property
    def every(self) -> Path:
        """The workdir of the same training with all of its checkpoints."""
        return self.folder / "every"

    def make_reference(self) -> None:
        """Trains it, and once more to keep all checkpoints, where they are not there yet."""
        for workdir, flags in ((self.reference, ()), (self.every, (_KEEP_ALL,))):
            if not (workdir / "summary.md").exists():
                started = time.monotonic()
                self.train(workdir, *flags).expect(0)
                self.report.event(f"{STEPS} steps without a fault in {time.monotonic() - started:.0f} s")

    def start(self, command: Sequence[str], *, devices: int = 1, own_cache: bool = False) -> Child:
        """Starts a program on some CPU devices."""
        self.report.started()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if not own_cache:
            remove_damaged_entries(self.cache)  # which a kill left
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self.cache)
        if devices > 1:
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        return Child(command, environment)

    def train(self, workdir: Path, *flags: str, devices: int = 1, own_cache: bool = False) -> Child:
        """Starts a training, or goes on with it."""
        return self.start(["run.py", CONFIG, f"--workdir={workdir}", *flags], devices=devices, own_cache=own_cache)

    def empty(self, name: str) -> Path:
        """A workdir that is not there, for a training to begin in."""
        workdir = self.folder / name
        shutil.rmtree(workdir, ignore_errors=True)
        return workdir

    def rewound(self, name: str, step: int) -> Path:
        """A copy of the reference as if it had been killed right after a checkpoint."""
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
    """Step of the newest checkpoint; 0 without one."""
    return max(saved_steps(workdir), default=0)


def half_saved(workdir: Path) -> list[str]:
    """Folders of checkpoints that are being written, or were when the program ended."""
    return [path.name for path in (workdir / "checkpoints").glob("*") if not path.name.isdecimal()]


def logged_step(workdir: Path) -> int:
    """Step of the last whole line of metrics; 0 without one."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0
