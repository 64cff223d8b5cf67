"""`--mode=transfer`."""

import time
from collections.abc import Sequence
from pathlib import Path

from h2a2_jax.commands.data import check_data
from h2a2_jax.commands.sweep import run_sweep
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, locate
from h2a2_jax.sweeps.sweep_runner import programs_folder
from h2a2_jax.sweeps.transfer import (
    evaluate_zero_shot,
    held_out_source,
    pretraining_rows,
    transfer_results,
    tuning_rows,
    without_zero_shot,
)


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
    check_data(config)  # the plan reads the sizes of the datasets
    pretrained, tuned = pretraining_rows(config, held_out, seeds), list[Row]()
    before: dict[SweepRun, Path] = {}

    def located() -> dict[SweepRun, Path]:
        before.update(locate(pretrained, workdir))
        tuned.extend(tuning_rows(config, held_out, seeds, pretrained, before, tuning_steps))
        return {**before, **locate(tuned, workdir)}

    def predict(until: float) -> list[str]:
        source, cache, failures = held_out_source(config, held_out), programs_folder(workdir / "cache"), []
        missing = without_zero_shot(pretrained, before, source)
        for number, folder in enumerate(missing, 1):
            if time.monotonic() > until:
                left = len(missing) - number + 1
                print(f"The budget is used; {left} predictions of {held_out} are left, the same command does them.")
                break
            print(f"[{number}/{len(missing)}] {folder.name} predicts the scans of {held_out}.", flush=True)
            try:
                evaluate_zero_shot(folder, source, cache)
            except InputError as error:
                failures.append(f"{folder.name} did not predict {held_out}: {error}")
        return failures

    return run_sweep(
        config,
        workdir,
        located,
        jobs,
        lambda folders: transfer_results(config, held_out, pretrained, tuned, folders),
        budget_minutes=budget_minutes,
        then=predict,
    )
