"""Run the jobs of a sweep, several beside each other.

One run of a sweep, in a process of its own.

python -m h2a2_jax.sweeps.sweep_runner <config.json> <workdir> [<evaluations>]

It ends when its standard input closes, and that happens however the process that started it ends.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import h2a2_jax
from h2a2_jax.checkpoint.store import restore_checkpoint
from h2a2_jax.compilation import remove_damaged_entries
from h2a2_jax.config import ExperimentConfig, from_json, to_json
from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.evaluation.evaluate import evaluate
from h2a2_jax.files import whole_file
from h2a2_jax.host import core_numbers, quiet_command_line
from h2a2_jax.inference.predictor import build_predictor
from h2a2_jax.report.figures_training import draw_curves
from h2a2_jax.sweeps.sweep_plan import SweepRun, drawn_datasets
from h2a2_jax.training.loop import train
from h2a2_jax.training.metrics import FILE_NAME, read_metrics

LOG = "log.txt"
"""What a run prints, in its folder."""

_MOST_JOBS = 4
_SECONDS_BETWEEN_LOOKS = 0.2
_GRACE_SECONDS = 30.0
"""For a run that is told to end: the step under way is finished and saved."""


@dataclass(frozen=True)
class Share:
    """What a run may use of the machine.

    Attributes:
        cores: numbers of processor cores; empty: as the system schedules it.
        memory: share of an accelerator's memory; None: as JAX does.
    """

    cores: tuple[int, ...] = ()
    memory: float | None = None


@dataclass
class _Job:
    run: SweepRun
    folder: Path
    process: subprocess.Popen
    share: Share
    started: float

    def end(self) -> None:
        """Let go of the process's standard input, at whose end it ends too."""
        assert self.process.stdin is not None
        self.process.stdin.close()


def shares(jobs: int | None) -> list[Share]:
    """How the machine is divided among the runs at once.

    Small models gain little from more cores, so on a CPU the default is a run a core, at most four at once; an
    accelerator is not divided unless asked for.

    Args:
        jobs: runs at once; None for the default.

    Raises:
        InputError: less than 1, or more than there are cores.
    """
    cores = core_numbers()
    if jobs is not None and not 1 <= jobs <= len(cores):
        raise InputError(f"--jobs is {jobs}; expected 1 to {len(cores)}, the processor cores here.")
    if jobs == 1:
        return [Share()]
    if _platform() != "cpu":
        return [Share(memory=0.9 / jobs if jobs else None)] * (jobs or 1)
    jobs = jobs or min(_MOST_JOBS, len(cores))
    if not hasattr(os, "sched_setaffinity"):
        return [Share()] * jobs
    bounds = [len(cores) * j // jobs for j in range(jobs + 1)]
    return [Share(tuple(cores[a:b])) for a, b in itertools.pairwise(bounds)]


def finished(folder: Path, evaluations: int = 1) -> bool:
    """Whether a run's results are there and whole, those of its further evaluations too."""
    return all(read_evaluation(folder, draw) is not None for draw in range(evaluations))


def evaluation_folder(folder: Path, draw: int) -> Path:
    """Where a run keeps an evaluation, by the number of its drawing of points."""
    return folder / f"evaluation_draw{draw}" if draw else folder


def read_evaluation(folder: Path, draw: int = 0) -> dict[str, Any] | None:
    """What evaluation.json of a run holds; None where it is not there or was cut short by a kill."""
    try:
        return json.loads((evaluation_folder(folder, draw) / "evaluation.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics.jsonl; empty where there is none."""
    path = folder / FILE_NAME
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


def scans_per_second(folder: Path) -> float | None:
    """How many scans a run trained on in a second: the median over its logged steps; None where none tells.

    Raises:
        InputError: a line of the run's metrics is damaged or of another version.
    """
    lines = read_metrics(folder) if (folder / FILE_NAME).exists() else []
    known = [value for line in lines if (value := line.get("scans_per_second")) is not None]
    return statistics.median(known) if known else None


def run_all(
    folders: Mapping[SweepRun, Path],
    cache: Path,
    jobs: int | None = None,
    evaluations: int = 1,
    budget_minutes: float | None = None,
) -> dict[SweepRun, str]:
    """Train and evaluate what is not finished; every run in a process, its output in <folder>/log.txt.

    Args:
        folders: of the runs, those that others wait for included.
        cache: folder in which the runs share what they compile, unless JAX_COMPILATION_CACHE_DIR names another. It is
            kept apart by machine: a program compiled on one processor may not run on another.
        jobs: runs at once; None for the default of `shares`.
        evaluations: of each run, the first as it trains; the others draw other points.
        budget_minutes: after which runs under way save their step and end, and no other begins; None: no limit.

    Returns:
        What went wrong, a sentence each, by run; the others are finished, or left for another time.

    Raises:
        InputError: see `shares`; the budget is not positive.
        KeyboardInterrupt: after all processes were ended.
    """
    if budget_minutes is not None and not budget_minutes > 0:
        raise InputError(f"--budget_minutes is {budget_minutes:g}; expected a number above 0.")
    end = math.inf if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    # Seed by seed: a setting's second seed finds what its first one compiled, and the table of one seed is there early.
    wanted = {run: evaluations if drawn_datasets(run.config) else 1 for run in folders}
    waiting = [run for run, folder in folders.items() if not finished(folder, wanted[run])]
    waiting.sort(key=lambda run: run.seed)
    free = shares(jobs) if waiting else []
    total, at_once = len(folders), len(free)
    print(f"{total - len(waiting)} of {total} runs are finished; {len(waiting)} to do, {at_once} at once.", flush=True)
    running: list[_Job] = []
    failures: dict[SweepRun, str] = {}
    progress = _Progress(total, len(waiting), at_once)
    remove_damaged_entries(programs_folder(cache))  # of runs that were killed, before any run writes
    try:
        while (waiting or running) and time.monotonic() < end:
            while free and (run := _next(waiting, folders)):
                waiting.remove(run)
                running.append(_start(run, folders[run], free.pop(0), cache, wanted[run]))
            for run in [run for run in waiting if run.after in failures and not _may_begin(run, folders)]:
                waiting.remove(run)
                failures[run] = f"{run.folder} was not begun: it waits for a run that failed."
                progress.tell(failures[run])
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for job in [job for job in running if job.process.poll() is not None]:
                job.end()
                running.remove(job)
                free.insert(0, job.share)
                if job.process.returncode or not finished(job.folder, wanted[job.run]):
                    failures[job.run] = _failure(job)
                progress.ended(job, failures.get(job.run))
            progress.show(running)
    finally:
        progress.close()
        _stop(running)
    # Those that the end of the budget met: finished meanwhile, or stopped, or they failed just now.
    failures |= {job.run: _failure(job) for job in running if job.process.returncode > 0}
    left = [run for run, folder in folders.items() if run not in failures and not finished(folder, wanted[run])]
    if left:
        runs = "1 run is" if len(left) == 1 else f"{len(left)} runs are"
        print(f"The budget of {budget_minutes:g} minutes is used; {runs} left, the same command goes on.", flush=True)
    return failures


def score_line(evaluation: Mapping[str, Any]) -> str:
    """The mean over datasets of each mAP in per cent, as in "mAP@0.25 51.3, mAP@0.5 20.1"."""
    parts = []
    for row, threshold in enumerate(next(iter(evaluation.values()))["thresholds"]):
        scores = [found["thresholds"][row]["mAP"] for found in evaluation.values()]
        known = [score for score in scores if score is not None]
        mean = f"{100 * sum(known) / len(known):.1f}" if known else "-"
        parts.append(f"mAP@{threshold['iou']:g} {mean}")
    return ", ".join(parts)


def _next(waiting: Sequence[SweepRun], folders: Mapping[SweepRun, Path]) -> SweepRun | None:
    """The first run that may begin."""
    return next((run for run in waiting if _may_begin(run, folders)), None)


def _may_begin(run: SweepRun, folders: Mapping[SweepRun, Path]) -> bool:
    return run.after is None or finished(folders[run.after])


def _start(run: SweepRun, folder: Path, share: Share, cache: Path, evaluations: int) -> _Job:
    path = folder / "config.json"
    with whole_file(path) as part:  # what a kill leaves behind is always a whole config
        part.write_text(to_json(run.config) + "\n")
    command = [sys.executable, "-m", "h2a2_jax.sweeps.sweep_runner", str(path), str(folder), str(evaluations)]
    with (folder / LOG).open("ab") as log, _on_cores(share.cores):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(share, cache),
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )
    return _Job(run, folder, process, share, time.monotonic())


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """What is started inside runs on these cores: JAX and numpy make as many threads as they are."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def programs_folder(cache: Path) -> Path:
    """This machine's part of the cache of a sweep."""
    return (cache / platform.node()).absolute()


def _environment(share: Share, cache: Path) -> dict[str, str]:
    # The package as this process found it, wherever it was started.
    root = str(Path(h2a2_jax.__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    ours = {"JAX_COMPILATION_CACHE_DIR": str(programs_folder(cache))}
    if share.memory is not None:
        ours["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share.memory:.3f}"
    return {**ours, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _stop(running: Sequence[_Job]) -> None:
    """End runs; each saves the step under way if it does so in time."""
    for job in running:
        job.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        for job in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also where the user does not want to wait
        for job in running:
            job.process.kill()  # before it sees the end of its input, which would look like a failure of its own
            job.end()
            job.process.wait()


def _failure(job: _Job) -> str:
    text = (job.folder / LOG).read_text(errors="replace").replace("\r", "\n")
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "its log is empty")
    code = job.process.returncode
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else "failed"
    return f"{job.run.folder} {how}: {last.strip()} (all of it: {job.folder / LOG})"


class _Progress:
    """One line a run that ended; on a terminal also one for the runs under way."""

    def __init__(self, total: int, todo: int, at_once: int):
        self._total, self._todo, self._at_once, self._ended = total, todo, at_once, 0
        self._started = time.monotonic()
        self._bar = tqdm(total=total, initial=total - todo, unit="run") if sys.stderr.isatty() and todo else None

    def ended(self, job: _Job, failure: str | None) -> None:
        """Tell of a run that ended."""
        evaluation = read_evaluation(job.folder)
        self.tell(
            failure or f"{job.run.folder}: {_minutes(time.monotonic() - job.started)}, {score_line(evaluation or {})}"
        )

    def tell(self, what: str) -> None:
        """One more run of which nothing is to come, and what became of it."""
        self._ended += 1
        left = self._todo - self._ended
        # Runs of about one length in waves of as many as run at once: what is under way counts as half done.
        pace = (time.monotonic() - self._started) / max(self._ended + 0.5 * min(self._at_once - 1, left), 1)
        line = f"[{self._total - left}/{self._total}] {what}; {left} left, about {_minutes(pace * left)}"
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)
            self._bar.update()

    def show(self, running: Sequence[_Job]) -> None:
        if self._bar is not None:
            steps = [f"{j.run.folder} step {last_metrics(j.folder).get('step', 0)}" for j in running]
            self._bar.set_postfix_str(", ".join(steps), refresh=False)
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _platform() -> str:
    """Asked in a process of its own: this one must not take memory of an accelerator."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def main(config: str, workdir: str, evaluations: str = "1") -> None:
    """Train and evaluate, or go on with it.

    Args:
        config: file with the run's config as JSON.
        workdir: of the run.
        evaluations: how many; those after the first draw other points.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_command_line()
    try:
        run(from_json(Path(config).read_text()), Path(workdir), int(evaluations))
    except InputError as error:
        sys.exit(str(error))
    except Stopped as stopped:
        sys.exit(stopped.status)
    except Exception as error:
        traceback.print_exc()
        # Once more as the last line, which the sweep shows: JAX ends its tracebacks with a remark on them.
        sys.exit(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def run(config: ExperimentConfig, workdir: Path, evaluations: int = 1) -> None:
    """What is not there yet of a training and its evaluations.

    Args:
        config: of the run.
        workdir: of the run.
        evaluations: how many; the datasets whose test protocol draws points are evaluated again with other points.
    """
    if not finished(workdir):
        train(config, workdir)
        draw_curves(workdir)  # which its summary shows
    missing = [draw for draw in range(1, evaluations) if read_evaluation(workdir, draw) is None]
    if not missing:
        return
    model, _ = restore_checkpoint(workdir, expected=config)
    predictor = build_predictor(model, config.specs, config.eval)
    for draw in missing:
        print(f"Evaluation {draw + 1} of {evaluations}, with other points.", flush=True)
        folder = evaluation_folder(workdir, draw)
        evaluate(config, predictor, folder, draw=draw, datasets=drawn_datasets(config))


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written there: it returns at the end of the pipe
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
