"""`--mode=predict`."""

from pathlib import Path

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.inference.input_files import PredictRequest
from h2a2_jax.inference.predict_folder import predict_inputs, predict_validation_scans


def predict_files_command(workdir: Path, request: PredictRequest, config: ExperimentConfig | None = None) -> int:
    """Write the boxes of files of points; returns the exit status. `predict_inputs` has the arguments and errors."""
    return predict_inputs(workdir, request, config).status


def predict_command(config: ExperimentConfig | None, workdir: Path, request: PredictRequest | None = None) -> None:
    """Write the boxes of the validation scans; `predict_validation_scans` has the arguments and errors."""
    predict_validation_scans(workdir, request, config)
