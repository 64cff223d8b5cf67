"""The detector that a command works with."""

from pathlib import Path

from h2a2_jax.models import Detector
from h2a2_jax.training.checkpoint import CheckpointStore
from h2a2_jax.training.config import ExperimentConfig


def restore(config: ExperimentConfig, workdir: Path) -> Detector:
    """The detector of the newest checkpoint, if it is the config's.

    Raises:
        InputError: there is none, or it is of another architecture or of other datasets; the sentence says how.
    """
    with CheckpointStore(workdir / "checkpoints") as store:
        return store.restore_model(expected=config)[0]
