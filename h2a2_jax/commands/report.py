"""`--mode=report`."""

from pathlib import Path

from h2a2_jax.checkpoint.store import restore_checkpoint
from h2a2_jax.config import ExperimentConfig


def report_command(config: ExperimentConfig | None, workdir: Path) -> None:
    """Write the report of a run: an HTML page with pictures of kernel selection, gradients and losses.

    Args:
        config: Config of the run; None: the one that its last checkpoint holds.
        workdir: Folder of the run.

    Raises:
        InputError: there is no checkpoint, or it is of another architecture than the config.
    """
    from h2a2_jax.report import write_report

    if config is None:
        config = restore_checkpoint(workdir)[1]
    print(f"The report is {write_report(config, workdir)}.", flush=True)
