"""Whether the data of a config are there."""

from collections.abc import Sequence

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.scans.sources import build_source


def check_data(config: ExperimentConfig, datasets: Sequence[int] | None = None) -> None:
    """Both splits, of all datasets or those at some places, before anything is written or compiled."""
    for d in range(len(config.datasets)) if datasets is None else datasets:
        for split in ("train", "val"):
            build_source(config.datasets[d], split)
