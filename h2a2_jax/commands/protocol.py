"""`--mode=protocol`."""

from pathlib import Path

from h2a2_jax.commands.sweep import run_sweep
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.sweeps.protocol import protocol_result, protocol_rows
from h2a2_jax.sweeps.sweep_plan import locate


def protocol_command(
    config: ExperimentConfig,
    workdir: Path,
    trainings: int = 5,
    evaluations: int = 5,
    jobs: int | None = None,
    budget_minutes: float | None = None,
) -> int:
    """Train several times, evaluate each training several times; write table.md and results.json.

    Args:
        config: of all trainings but for the seed, which counts up from the config's.
        workdir: of the protocol; what is finished there is not done again, and runs of sweeps there are used where
            they are the same experiment.
        trainings: how many.
        evaluations: of each training, which differ in the points that are drawn.
        jobs: trainings at once; None for what suits the machine.
        budget_minutes: see `run_all`; the table is then of what is finished.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the user stopped it.

    Raises:
        InputError: a number makes no sense, data are missing, or the workdir holds other runs of the same names.
    """
    rows = protocol_rows(config, trainings, evaluations)
    return run_sweep(
        config,
        workdir,
        lambda: locate(rows, workdir),
        jobs,
        lambda folders: [protocol_result(config, rows, folders, evaluations)],
        evaluations,
        budget_minutes,
    )
