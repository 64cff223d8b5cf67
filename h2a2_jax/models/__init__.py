"""The detector and its parts."""

from h2a2_jax.models.config import DetectorConfig
from h2a2_jax.models.detector import Detector, HeadConfig, Predictions
from h2a2_jax.models.plan import DetectorPlan, DetectorTables, LevelSizes, detector_tables, pad_plan, pyramid_sizes

__all__ = [
    "Detector",
    "DetectorConfig",
    "DetectorPlan",
    "DetectorTables",
    "HeadConfig",
    "LevelSizes",
    "Predictions",
    "detector_tables",
    "pad_plan",
    "pyramid_sizes",
]
