"""`--mode=train`."""

from pathlib import Path

from h2a2_jax.commands.data import check_data
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.distributed import MeshDivision, say
from h2a2_jax.training.loop import train
from h2a2_jax.training.mesh import train_mesh


def train_command(config: ExperimentConfig, workdir: Path) -> None:
    """Train and evaluate; a workdir with checkpoints is gone on with.

    Raises:
        InputError: data are missing, or the workdir belongs to another architecture.
    """
    division = MeshDivision(train_mesh(len(config.datasets)), len(config.datasets))
    division.together(lambda: check_data(config, division.datasets), "open its data")
    train(config, workdir)
    say(
        f"Losses are in {workdir / 'metrics.jsonl'}, checkpoints in {workdir / 'checkpoints'}. Boxes of point clouds: "
        f"python run.py --mode=predict --workdir={workdir} --input=FOLDER"
    )
