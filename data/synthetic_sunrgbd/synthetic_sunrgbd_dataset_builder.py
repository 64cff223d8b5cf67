"""TFDS builder of procedural frames as those of SUN RGB-D."""

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import SUNRGBD


class Builder(ScanDatasetBuilder):
    """Procedural rooms in one frame of a depth camera: a stand-in for SUN RGB-D without a licence.

    The 10 classes of SUN RGB-D, boxes of whole objects with yaw, the camera at the origin looking along y. Numbers
    measured on these frames say nothing about SUN RGB-D.
    """

    spec = SUNRGBD
    homepage = "https://rgbd.cs.princeton.edu"
    citation = ""
    licence = "Apache-2.0"
