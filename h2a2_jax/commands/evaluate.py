"""`--mode=eval`."""

from pathlib import Path

from h2a2_jax.commands.restore import restore
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.loop import evaluate


def evaluate_command(config: ExperimentConfig, workdir: Path) -> None:
    """Restore the newest checkpoint and evaluate it on the validation scans of the config.

    Raises:
        InputError: there is no checkpoint, or it is of another architecture than the config.
    """
    evaluate(config, restore(config, workdir), workdir)
