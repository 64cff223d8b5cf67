"""Runs of a sweep in worker processes, several at once.

`run_all` starts the workers. A worker is this module as a command:

    python -m h2a2_jax.sweeps.sweep_runner <config.json> <workdir> [<evaluations>]

A worker ends when its standard input closes. The system closes that pipe however the parent process ends, so a killed
sweep leaves no process behind.
"""

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import h2a2_jax
from h2a2_jax.checkpoint.store import restore_checkpoint
from h2a2_jax.compilation import compilation_cache
from h2a2_jax.config import ExperimentConfig, from_json, to_json
from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.evaluation.evaluate import evaluate
from h2a2_jax.files import alone_in, whole_file
from h2a2_jax.host import core_numbers, quiet_command_line, sigterm_raises
from h2a2_jax.inference.predictor import build_predictor
from h2a2_jax.report.figures_training import draw_curves
from h2a2_jax.scans.sources import build_source
from h2a2_jax.sweeps.sweep_plan import SweepRun, sampled_datasets
from h2a2_jax.sweeps.sweep_results import (
    FILE,
    TABLES,
    evaluation_folder,
    evaluation_scores,
    finished,
    last_metrics,
    read_evaluation,
    write_results,
)
from h2a2_jax.training.loop import train

LOG = "log.txt"
"""File with the output of a run, in its folder."""

_MOST_JOBS = 4
_SECONDS_BETWEEN_LOOKS = 0.2
_GRACE_SECONDS = 30.0
"""Time in which a run that gets SIGTERM finishes and saves its step."""


@dataclass(frozen=True)
class Share:
    """One run's share of the machine.

    Attributes:
        cores: Numbers of the processor cores; empty: all, as the system schedules them.
        memory: Fraction of an accelerator's memory; None: JAX's default.
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

    def close_input(self) -> None:
        """Close the worker's standard input, which ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()


def shares(jobs: int | None) -> list[Share]:
    """Divide the machine among the runs at once.

    Small models gain little from more cores, so on a CPU the default is a run a core, at most four at once; an
    accelerator is not divided by default.

    Raises:
        InputError: less than 1, or more than there are cores.
    """
    cores = core_numbers()
    if jobs is not None and not 1 <= jobs <= len(cores):
        raise InputError(f"--jobs is {jobs}; expected 1 to {len(cores)}, the processor cores here.")
    if jobs == 1:
        return [Share()]
    # Asked in a process of its own: this one must not take memory of an accelerator.
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    if subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() != "cpu":
        return [Share(memory=0.9 / jobs if jobs else None)] * (jobs or 1)
    jobs = jobs or min(_MOST_JOBS, len(cores))
    if not hasattr(os, "sched_setaffinity"):
        return [Share()] * jobs
    bounds = [len(cores) * j // jobs for j in range(jobs + 1)]
    return [Share(tuple(cores[a:b])) for a, b in itertools.pairwise(bounds)]


def run_sweep(
    config: ExperimentConfig,
    workdir: Path,
    located: Callable[[], Mapping[SweepRun, Path]],
    results: Callable[[Mapping[SweepRun, Path]], list[dict[str, Any]]],
    jobs: int | None,
    budget_minutes: float | None,
    evaluations: int = 1,
    then: Callable[[float], list[str]] = lambda until: [],
) -> int:
    """Do the runs of a sweep that are not finished, write its results and print its tables.

    `located` returns the runs and their folders, `results` the results (`sweep_result`) of the runs in these folders.
    `then` is called between the runs and the results with the time at which the budget ends (`time.monotonic`), and
    returns error messages. Jobs and budget are those of `run_all`; after the budget the table has the finished runs.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the user stopped the sweep.

    Raises:
        InputError: data are missing, or the workdir holds other runs of the same names.
    """
    for source in config.datasets:
        for split in ("train", "val"):
            build_source(source, split)
    until = math.inf if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    with alone_in(workdir, "sweep"):
        folders = located()
        try:
            with sigterm_raises(KeyboardInterrupt):
                runs = run_all(folders, jobs, evaluations, budget_minutes)
                failures = [*runs.values(), *then(until)]
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from the last checkpoint of every run.", file=sys.stderr)
            return 130
        text = write_results(results(folders), workdir)
        endings = ", ".join(f".{ending}" for ending in TABLES)
        print(f"\n{text}\nWritten to {workdir / 'table'} ({endings}) and {workdir / FILE}", flush=True)
    if failures:
        print("\n".join([*failures, "The same command tries again what failed."]), file=sys.stderr)
    return 1 if failures else 0


def run_all(
    folders: Mapping[SweepRun, Path],
    jobs: int | None = None,
    evaluations: int = 1,
    budget_minutes: float | None = None,
) -> dict[SweepRun, str]:
    """Train and evaluate the runs that are not finished, each in a process, with its output in <folder>/log.txt.

    `folders` has every run that another one waits for. The runs share compiled programs
    (`h2a2_jax.compilation.compilation_cache`). Evaluations after the first sample other points. When the budget is
    used, running workers save their step and end, and no other begins.

    Returns:
        An error message for each run that failed; the others are finished, or left for the next call.

    Raises:
        InputError: see `shares`; the budget is not positive.
        KeyboardInterrupt: after all processes were ended.
    """
    if budget_minutes is not None and not budget_minutes > 0:
        raise InputError(f"--budget_minutes is {budget_minutes:g}; expected a number above 0.")
    end = math.inf if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    wanted = {run: evaluations if sampled_datasets(run.config) else 1 for run in folders}
    waiting = runs_to_do(folders, wanted)
    free = shares(jobs) if waiting else []
    total, at_once = len(folders), len(free)
    print(f"{total - len(waiting)} of {total} runs are finished; {len(waiting)} to do, {at_once} at once.", flush=True)
    running: list[_Job] = []
    failures: dict[SweepRun, str] = {}
    progress = _Progress(total, len(waiting), at_once)
    try:
        while (waiting or running) and time.monotonic() < end:
            while free and (run := next((run for run in waiting if _may_begin(run, folders)), None)):
                waiting.remove(run)
                running.append(_start(run, folders[run], free.pop(0), wanted[run]))
            for run in [run for run in waiting if run.after in failures and not _may_begin(run, folders)]:
                waiting.remove(run)
                failures[run] = f"{run.folder} was not begun: it waits for a run that failed."
                progress.print_end(failures[run])
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for job in [job for job in running if job.process.poll() is not None]:
                job.close_input()
                running.remove(job)
                free.insert(0, job.share)
                if job.process.returncode or not finished(job.folder, wanted[job.run]):
                    failures[job.run] = text = _failure(job)
                else:
                    *_, mean = evaluation_scores(read_evaluation(job.folder) or {}, job.run.config, job.run.seed)
                    scores = [f"{name} {'-' if v is None else f'{v:.1f}'}" for name, v in mean.metrics.items()]
                    took = _minutes(time.monotonic() - job.started)
                    text = f"{job.run.folder}: {took}, {', '.join(scores)}"
                progress.print_end(text)
            progress.show(running)
    finally:
        progress.bar.close()
        _stop(running)
    # Workers that were still running at the end of the budget have finished, were stopped, or failed just now.
    failures |= {job.run: _failure(job) for job in running if job.process.returncode > 0}
    left = [run for run, folder in folders.items() if run not in failures and not finished(folder, wanted[run])]
    if left:
        runs = "1 run is" if len(left) == 1 else f"{len(left)} runs are"
        print(f"The budget of {budget_minutes:g} minutes is used; {runs} left, the same command goes on.", flush=True)
    return failures


def runs_to_do(folders: Mapping[SweepRun, Path], evaluations: Mapping[SweepRun, int]) -> list[SweepRun]:
    """Runs that lack evaluations, in the order in which they begin: all of the first seed before any of the second.

    So a sweep that is stopped has whole seeds of every row, which is what paired differences are made of, and a
    setting's second seed finds the compiled programs of its first one.
    """
    left = [run for run, folder in folders.items() if not finished(folder, evaluations[run])]
    return sorted(left, key=lambda run: run.seed)


def _may_begin(run: SweepRun, folders: Mapping[SweepRun, Path]) -> bool:
    return run.after is None or finished(folders[run.after])


def _start(run: SweepRun, folder: Path, share: Share, evaluations: int) -> _Job:
    path = folder / "config.json"
    with whole_file(path) as part:
        part.write_text(to_json(run.config) + "\n")
    command = [sys.executable, "-m", "h2a2_jax.sweeps.sweep_runner", str(path), str(folder), str(evaluations)]
    with (folder / LOG).open("ab") as log, _on_cores(share.cores):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=_environment(share),
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )  # fmt: skip
    return _Job(run, folder, process, share, time.monotonic())


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Bind the processes that are started inside to cores; JAX and numpy make as many threads as there are cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _environment(share: Share) -> dict[str, str]:
    # The package as this process found it, wherever it was started.
    root = str(Path(h2a2_jax.__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    ours = {} if share.memory is None else {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share.memory:.3f}"}
    return {**ours, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _stop(running: Sequence[_Job]) -> None:
    """Stop workers; each saves its step if it does so within the grace period."""
    for job in running:
        job.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        for job in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also after a second Ctrl-C
        for job in running:
            job.process.kill()  # before its input closes: the exit status of that would look like a failure
            job.close_input()
            job.process.wait()


def _failure(job: _Job) -> str:
    text = (job.folder / LOG).read_text(errors="replace").replace("\r", "\n")
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "its log is empty")
    code = job.process.returncode
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else "failed"
    return f"{job.run.folder} {how}: {last.strip()} (all of it: {job.folder / LOG})"


class _Progress:
    """Progress of a sweep: a line for each run that ended; on a terminal also a bar with the running ones."""

    def __init__(self, total: int, todo: int, at_once: int):
        self._total, self._todo, self._at_once, self._ended = total, todo, at_once, 0
        self._started = time.monotonic()
        self.bar = tqdm(total=total, initial=total - todo, unit="run", disable=not (sys.stderr.isatty() and todo))

    def print_end(self, text: str) -> None:
        """Count one more run as over, and print its outcome and the time left."""
        self._ended += 1
        left = self._todo - self._ended
        # Runs take about the same time: each running one counts as half done.
        pace = (time.monotonic() - self._started) / max(self._ended + 0.5 * min(self._at_once - 1, left), 1)
        self.bar.write(f"[{self._total - left}/{self._total}] {text}; {left} left, about {_minutes(pace * left)}")
        sys.stdout.flush()
        self.bar.update()

    def show(self, running: Sequence[_Job]) -> None:
        """Show the steps of the running workers."""
        if not self.bar.disable:
            steps = [f"{job.run.folder} step {last_metrics(job.folder).get('step', 0)}" for job in running]
            self.bar.set_postfix_str(", ".join(steps))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def main(config: str, workdir: str, evaluations: str = "1") -> None:
    """Train and evaluate one run as a worker process, or resume it; `config` is a file of JSON."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_command_line()
    try:
        experiment = from_json(Path(config).read_text())
        with compilation_cache(print) if experiment.train.compilation_cache else contextlib.nullcontext():
            run(experiment, Path(workdir), int(evaluations))
    except InputError as error:
        sys.exit(str(error))
    except Stopped as stopped:
        sys.exit(stopped.status)
    except Exception as error:
        traceback.print_exc()
        # Repeated as the last line of the log, which the sweep prints: JAX ends its tracebacks with a remark.
        sys.exit(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def run(config: ExperimentConfig, workdir: Path, evaluations: int = 1) -> None:
    """Do what is missing of a training and its evaluations.

    Evaluations after the first are of the datasets whose test protocol samples points, with other points.
    """
    if not finished(workdir):
        train(config, workdir)
        draw_curves(workdir)  # summary.md shows them
    missing = [number for number in range(1, evaluations) if read_evaluation(workdir, number) is None]
    if not missing:
        return
    model, _ = restore_checkpoint(workdir, expected=config)
    predictor = build_predictor(model, config.specs, config.eval)
    for number in missing:
        print(f"Evaluation {number + 1} of {evaluations}, with other points.", flush=True)
        folder = evaluation_folder(workdir, number)
        evaluate(config, predictor, folder, draw=number, datasets=sampled_datasets(config))


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written to the pipe: the read returns when it closes
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
