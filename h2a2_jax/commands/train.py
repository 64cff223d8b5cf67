"""`--mode=train`."""

from pathlib import Path

from h2a2_jax.commands.data import check_data
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, is_main, say, train_mesh
from h2a2_jax.training.loop import train
from h2a2_jax.training.metrics import FILE_NAME
from h2a2_jax.training.summary import next_commands


def train_command(config: ExperimentConfig, workdir: Path, *, accept_changes: bool = False) -> None:
    """Train, evaluate and draw the curves, or resume the run in the workdir; `train` has the arguments and errors."""
    process_layout = MeshLayout(train_mesh(len(config.datasets)), len(config.datasets))
    process_layout.all_or_raise(lambda: check_data(config, process_layout.datasets), "open its data")
    train(config, workdir, accept_changes=accept_changes)
    curves = ""
    if is_main() and (workdir / FILE_NAME).exists():
        from h2a2_jax.report.figures_training import draw_curves

        curves = f", drawn in {draw_curves(workdir)}"
    say(f"Losses are in {workdir / FILE_NAME}{curves}; checkpoints in {workdir / 'checkpoints'}. What may come next:")
    for command in next_commands(workdir, config):
        say(f"    {command}")
