"""Detection networks: architecture, maps of a batch, backbone, necks and heads, and what the house asks of a kind."""

from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.detector import (
    DetectorKind,
    DetectorNetwork,
    HeadChoice,
    HeadConfig,
    Predictions,
    Targets,
    selective_layers,
)
from h2a2_jax.models.kinds import KINDS, build_network, kind_of
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
from h2a2_jax.models.tr3d import TR3D

__all__ = [
    "KINDS",
    "TR3D",
    "DetectorConfig",
    "DetectorKind",
    "DetectorNetwork",
    "DetectorPlan",
    "DetectorTables",
    "HeadChoice",
    "HeadConfig",
    "LevelSizes",
    "PlanLayout",
    "Predictions",
    "Targets",
    "build_network",
    "detector_tables",
    "fits_layout",
    "kind_of",
    "pad_plan",
    "pyramid_sizes",
    "selective_layers",
]
