"""H2A2 in JAX: one indoor 3D object detector trained jointly on several datasets of point clouds.

`h2a2_jax.Detector` finds boxes in arrays of points with a trained model. The subpackages stand on each other in this
order, and each is usable without those after it: `sparse` (sparse tensors and convolutions), `layers`, `models`,
`training`; `boxes` stands on its own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2a2_jax.inference.detector import Detector
    from h2a2_jax.inference.found_boxes import Boxes
    from h2a2_jax.scans.formats.point_cloud import PointCloud, read_point_cloud

__version__ = "0.1.0"

_HOMES = {
    "Boxes": "h2a2_jax.inference.found_boxes",
    "Detector": "h2a2_jax.inference.detector",
    "PointCloud": "h2a2_jax.scans.formats.point_cloud",
    "read_point_cloud": "h2a2_jax.scans.formats.point_cloud",
}

__all__ = ["Boxes", "Detector", "PointCloud", "__version__", "read_point_cloud"]


def __getattr__(name: str) -> Any:
    # On demand: who imports the layers alone needs nothing of data and checkpoints.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'h2a2_jax' has no attribute {name!r}")
