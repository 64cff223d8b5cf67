"""`--mode=train`."""

from pathlib import Path

from h2a2_jax.commands.data import check_data
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.distributed import MeshDivision, is_main, say
from h2a2_jax.training.loop import train
from h2a2_jax.training.mesh import train_mesh
from h2a2_jax.training.metrics import FILE_NAME
from h2a2_jax.training.summary import next_commands


def train_command(config: ExperimentConfig, workdir: Path, *, accept_changes: bool = False) -> None:
    """Train, evaluate and draw the curves; a workdir with checkpoints is gone on with (`train` has the arguments).

    Raises:
        InputError: see `train`.
        Stopped: likewise.
    """
    division = MeshDivision(train_mesh(len(config.datasets)), len(config.datasets))
    division.together(lambda: check_data(config, division.datasets), "open its data")
    train(config, workdir, accept_changes=accept_changes)
    curves = ""
    if is_main() and (workdir / FILE_NAME).exists():
        from h2a2_jax.report.curves import draw_curves  # matplotlib takes a while to load

        curves = f", drawn in {draw_curves(workdir)}"
    say(f"Losses are in {workdir / FILE_NAME}{curves}; checkpoints in {workdir / 'checkpoints'}. What may come next:")
    for command in next_commands(workdir, config):
        say(f"    {command}")
