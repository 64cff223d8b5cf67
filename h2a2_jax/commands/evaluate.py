"""`--mode=eval`."""

from pathlib import Path

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.evaluation.evaluate import EvalRequest, evaluate_checkpoint


def evaluate_command(config: ExperimentConfig | None, workdir: Path, request: EvalRequest | None = None) -> None:
    """Evaluate a checkpoint; `evaluate_checkpoint` has the arguments and errors."""
    evaluate_checkpoint(workdir, request or EvalRequest(), config)
