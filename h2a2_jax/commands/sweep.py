"""`--mode=tau_sweep` and `--mode=ablation`."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from h2a2_jax.commands.data import check_data
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.files import alone_in
from h2a2_jax.host import sigterm_raises
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, ablation_rows, default_taus, locate, tau_rows
from h2a2_jax.sweeps.sweep_results import draw_ablation, draw_tau, table, write_results
from h2a2_jax.sweeps.sweep_runner import run_all

_PICTURES = {"tau_sweep": (draw_tau, "tau.png"), "ablation": (draw_ablation, "ablation.png")}


def tau_sweep_command(
    config: ExperimentConfig,
    workdir: Path,
    taus: Sequence[float],
    seeds: Sequence[int],
    jobs: int | None,
    budget_minutes: float | None = None,
) -> int:
    """Train and evaluate the config with every tau and seed; write table.md, results.json and tau.png.

    Args:
        config: the base, with kernel selection.
        workdir: of the sweep; what is finished there is not done again.
        taus: thresholds; empty for the default ones.
        seeds: of training.
        jobs: runs at once; None for what suits the machine.
        budget_minutes: see `run_all`; the table is then of what is finished.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the user stopped it.

    Raises:
        InputError: the config is not fit for the sweep, or the workdir holds other runs of the same names.
    """
    rows = tau_rows(config, taus or default_taus(config), seeds)
    return _sweep("tau_sweep", config, workdir, rows, jobs, budget_minutes)


def ablation_command(
    config: ExperimentConfig,
    workdir: Path,
    seeds: Sequence[int],
    jobs: int | None,
    budget_minutes: float | None = None,
    rows: Sequence[str] = (),
) -> int:
    """Train and evaluate naive joint training, SF-KS, NGH, both, and TR3D alone.

    Written are table.md, results.json and ablation.png.

    Args:
        config: the base, with kernel selection.
        workdir: of the sweep; what is finished there is not done again.
        seeds: of training.
        jobs: runs at once; None for what suits the machine.
        budget_minutes: see `run_all`; the table is then of what is finished.
        rows: which, by the names of `ablation_rows`; empty: those named above.

    Returns:
        The exit status, as of `tau_sweep_command`.

    Raises:
        InputError: as there, or there is no such row.
    """
    check_data(config)  # whose sizes the plan reads
    return _sweep("ablation", config, workdir, ablation_rows(config, seeds, rows), jobs, budget_minutes)


def _sweep(
    sweep: str,
    config: ExperimentConfig,
    workdir: Path,
    rows: Sequence[Row],
    jobs: int | None,
    budget_minutes: float | None,
) -> int:
    def write(folders: Mapping[SweepRun, Path]) -> str:
        result = write_results(sweep, config, rows, folders, workdir)
        draw, picture = _PICTURES[sweep]
        draw(result, workdir / picture)
        print(f"Drawn in {workdir / picture}", flush=True)
        return table(result)

    return run_sweep(config, workdir, lambda: locate(rows, workdir), jobs, write, budget_minutes=budget_minutes)


def run_sweep(
    config: ExperimentConfig,
    workdir: Path,
    located: Callable[[], Mapping[SweepRun, Path]],
    jobs: int | None,
    write: Callable[[Mapping[SweepRun, Path]], str],
    evaluations: int = 1,
    budget_minutes: float | None = None,
    then: Callable[[float], list[str]] = lambda until: [],
) -> int:
    """Do the runs of a sweep that are not finished, and write its results.

    Args:
        config: the base, whose data must be there.
        workdir: of the sweep.
        located: the runs of the sweep and their folders.
        jobs: runs at once; None for what suits the machine.
        write: given the folders of the runs, writes the results and returns the table.
        evaluations: of each run.
        budget_minutes: see `run_all`.
        then: done after the runs, before the results are written; is told until when (`time.monotonic`), and tells what
            went wrong.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the user stopped it.

    Raises:
        InputError: data are missing, or the workdir holds other runs of the same names.
    """
    check_data(config)
    until = math.inf if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    with alone_in(workdir, "sweep"):
        folders = located()
        try:
            with sigterm_raises(KeyboardInterrupt):
                runs = run_all(folders, workdir / "cache", jobs, evaluations, budget_minutes)
                failures = [*runs.values(), *then(until)]
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from the last checkpoint of every run.", file=sys.stderr)
            return 130
        text = write(folders)
        print(f"\n{text}\nWritten to {workdir / 'table.md'} and {workdir / 'results.json'}", flush=True)
    if failures:
        print("\n".join([*failures, "The same command tries again what failed."]), file=sys.stderr)
    return 1 if failures else 0
