"""`--mode=transfer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from h2a2_jax.commands.data import check_data
from h2a2_jax.commands.sweep import run_sweep
from h2a2_jax.sweeps.plan import Run, locate
from h2a2_jax.sweeps.results import write_transfer
from h2a2_jax.sweeps.runner import programs_folder
from h2a2_jax.sweeps.transfer import (
    evaluate_zero_shot,
    pretraining_rows,
    transfer_table,
    tuning_rows,
    without_zero_shot,
)
from h2a2_jax.training.config import ExperimentConfig


def transfer_command(
    config: ExperimentConfig,
    workdir: Path,
    held_out: str,
    seeds: Sequence[int],
    tuning_steps: int | None = None,
    jobs: int | None = None,
    budget_minutes: float | None = None,
) -> int:
    """Train without a dataset, predict it as it is, fine-tune to it; write table.md and results.json.

    Args:
        config: the base, of three datasets or more, with kernel selection.
        workdir: of the sweep; what is finished there is not done again, and runs of other sweeps there are used where
            they are the same experiment.
        held_out: the dataset that detectors are transferred to.
        seeds: of training.
        tuning_steps: of training on that dataset; None: half of those of the config.
        jobs: trainings at once; None for what suits the machine.
        budget_minutes: see `run_all`; the table is then of what is finished.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the user stopped it.

    Raises:
        InputError: the config is not fit for the sweep, data are missing, or the workdir holds other runs of the same
            names.
    """
    check_data(config)  # whose sizes the plan reads
    pretrained = pretraining_rows(config, held_out, seeds)
    before = locate(pretrained, workdir)
    tuned = tuning_rows(config, held_out, seeds, before, tuning_steps)
    source = next(source for source in config.datasets if source.name == held_out)

    def predict(folders: Mapping[Run, Path]) -> None:
        missing = without_zero_shot(before, held_out)
        for number, folder in enumerate(missing, 1):
            print(f"[{number}/{len(missing)}] {folder.name} predicts the scans of {held_out}.", flush=True)
            evaluate_zero_shot(folder, source, programs_folder(workdir / "cache"))

    return run_sweep(
        config,
        workdir,
        lambda: {**before, **locate(tuned, workdir)},
        jobs,
        lambda folders: transfer_table(write_transfer(config, held_out, pretrained, tuned, folders, workdir)),
        budget_minutes=budget_minutes,
        then=predict,
    )
