"""`--mode=tau_sweep` and `--mode=ablation`."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from h2a2_jax.commands.data import check_data
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.files import alone_in
from h2a2_jax.host import sigterm_raises
from h2a2_jax.sweeps.sweep_plan import SweepRun, ablation_rows, default_taus, locate, tau_rows
from h2a2_jax.sweeps.sweep_results import comparison_result, write_results
from h2a2_jax.sweeps.sweep_runner import run_all


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
        config: Base of the sweep, with kernel selection.
        workdir: Folder of the sweep; finished runs there are not repeated.
        taus: Thresholds; empty for the default ones.
        seeds: Seeds of training.
        jobs: Number of runs at once; None for the default of `shares`.
        budget_minutes: See `run_all`; the table then holds the finished runs.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the user stopped it.

    Raises:
        InputError: the config is not fit for the sweep, or the workdir holds other runs of the same names.
    """
    rows = tau_rows(config, taus or default_taus(config), seeds)
    return run_sweep(
        config,
        workdir,
        lambda: locate(rows, workdir),
        jobs,
        lambda folders: [comparison_result("tau_sweep", "Sweep of the threshold tau", config, rows, folders)],
        budget_minutes=budget_minutes,
    )


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
        config: Base of the sweep, with kernel selection.
        workdir: Folder of the sweep; finished runs there are not repeated.
        seeds: Seeds of training.
        jobs: Number of runs at once; None for the default of `shares`.
        budget_minutes: See `run_all`; the table then holds the finished runs.
        rows: Names of the rows, as `ablation_rows` takes them; empty: those named above.

    Returns:
        The exit status, as of `tau_sweep_command`.

    Raises:
        InputError: as there, or there is no such row.
    """
    check_data(config)  # the plan reads the sizes of the datasets
    settings = ablation_rows(config, seeds, rows)
    return run_sweep(
        config,
        workdir,
        lambda: locate(settings, workdir),
        jobs,
        lambda folders: [comparison_result("ablation", "Ablation", config, settings, folders)],
        budget_minutes=budget_minutes,
    )


def run_sweep(
    config: ExperimentConfig,
    workdir: Path,
    located: Callable[[], Mapping[SweepRun, Path]],
    jobs: int | None,
    results: Callable[[Mapping[SweepRun, Path]], list[dict[str, Any]]],
    evaluations: int = 1,
    budget_minutes: float | None = None,
    then: Callable[[float], list[str]] = lambda until: [],
) -> int:
    """Do the runs of a sweep that are not finished, and write its results.

    Args:
        config: Base of the sweep; its data must be there.
        workdir: Folder of the sweep.
        located: Returns the runs of the sweep and their folders.
        jobs: Number of runs at once; None for the default of `shares`.
        results: Returns the results (`sweep_result`) of the runs in these folders.
        evaluations: Number of evaluations of each run.
        budget_minutes: See `run_all`.
        then: Called between the runs and the results, with the time at which the budget ends (`time.monotonic`);
            returns error messages.

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
        text = write_results(results(folders), workdir)
        print(f"\n{text}\nWritten to {workdir / 'table.md'} and {workdir / 'results.json'}", flush=True)
    if failures:
        print("\n".join([*failures, "The same command tries again what failed."]), file=sys.stderr)
    return 1 if failures else 0
