"""The detector and its parts."""

from h2a2_jax.models.config import DetectorConfig
from h2a2_jax.models.detector import Detector, HeadConfig, Predictions
from h2a2_jax.models.layout import PlanLayout
from h2a2_jax.models.plan import (
    DetectorPlan,
    DetectorTables,
    LevelSizes,
    detector_tables,
    fits_layout,
    pad_plan,
    pyramid_sizes,
)

__all__ = [
    "Detector",
    "DetectorConfig",
    "DetectorPlan",
    "DetectorTables",
    "HeadConfig",
    "LevelSizes",
    "PlanLayout",
    "Predictions",
    "detector_tables",
    "fits_layout",
    "pad_plan",
    "pyramid_sizes",
]
