"""TR3D, the detection network: architecture, maps of a batch, backbone, neck and heads."""

from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.maps import (
    DetectorPlan,
    DetectorTables,
    LevelSizes,
    PlanLayout,
    detector_tables,
    fits_layout,
    pad_plan,
    pyramid_sizes,
)
from h2a2_jax.models.tr3d import TR3D, HeadChoice, HeadConfig, Predictions

__all__ = [
    "TR3D",
    "DetectorConfig",
    "DetectorPlan",
    "DetectorTables",
    "HeadChoice",
    "HeadConfig",
    "LevelSizes",
    "PlanLayout",
    "Predictions",
    "detector_tables",
    "fits_layout",
    "pad_plan",
    "pyramid_sizes",
]
