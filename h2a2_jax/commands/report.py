"""`--mode=report`."""

from collections.abc import Sequence
from pathlib import Path

from h2a2_jax.checkpoint.store import restore_checkpoint
from h2a2_jax.config import ExperimentConfig


def report_command(config: ExperimentConfig | None, workdir: Path, singles: Sequence[Path]) -> None:
    """Write what a run learnt about its kernels as an HTML page with pictures.

    Args:
        config: of the run; None: the one that its last checkpoint holds.
        workdir: of the run.
        singles: folders of runs on one dataset each, to compare with.

    Raises:
        InputError: there is no checkpoint, or it is of another architecture than the config.
    """
    from h2a2_jax.report import write_report

    if config is None:
        config = restore_checkpoint(workdir)[1]
    print(f"The report is {write_report(config, workdir, singles=singles)}.", flush=True)
