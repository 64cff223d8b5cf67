"""The commands of `run.py`, by mode."""

from h2a2_jax.commands.evaluate import evaluate_command
from h2a2_jax.commands.predict import predict_command, predict_files_command
from h2a2_jax.commands.replay import replay_command
from h2a2_jax.commands.report import report_command
from h2a2_jax.commands.train import train_command
from h2a2_jax.sweeps.ablation import run_ablation as ablation_command
from h2a2_jax.sweeps.ablation import run_tau_sweep as tau_sweep_command
from h2a2_jax.sweeps.protocol import run_protocol as protocol_command
from h2a2_jax.sweeps.transfer import run_transfer as transfer_command

__all__ = [
    "ablation_command",
    "evaluate_command",
    "predict_command",
    "predict_files_command",
    "protocol_command",
    "replay_command",
    "report_command",
    "tau_sweep_command",
    "train_command",
    "transfer_command",
]
