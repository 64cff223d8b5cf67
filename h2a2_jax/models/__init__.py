"""Detection networks: architecture, maps of a batch, backbone, necks and heads, and the protocol of their kinds."""

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
from h2a2_jax.models.fcaf3d import FCAF3D
from h2a2_jax.models.fcaf3d_maps import (
    FCAF3DPlan,
    FCAF3DSizes,
    FCAF3DTables,
    fcaf3d_sizes,
    fcaf3d_tables,
    fits_fcaf3d,
    pad_fcaf3d,
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
    "FCAF3D",
    "KINDS",
    "TR3D",
    "DetectorConfig",
    "DetectorKind",
    "DetectorNetwork",
    "DetectorPlan",
    "DetectorTables",
    "FCAF3DPlan",
    "FCAF3DSizes",
    "FCAF3DTables",
    "HeadChoice",
    "HeadConfig",
    "LevelSizes",
    "PlanLayout",
    "Predictions",
    "Targets",
    "build_network",
    "detector_tables",
    "fcaf3d_sizes",
    "fcaf3d_tables",
    "fits_fcaf3d",
    "fits_layout",
    "kind_of",
    "pad_fcaf3d",
    "pad_plan",
    "pyramid_sizes",
    "selective_layers",
]
