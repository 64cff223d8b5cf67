"""TFDS builder of procedural rooms as those of S3DIS."""

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import S3DIS


class Builder(ScanDatasetBuilder):
    """Procedural rooms as a laser scanner sees them, ceiling included: a stand-in for S3DIS without a licence.

    The 5 classes of S3DIS, axis-aligned boxes of the visible points, the room's minimum at the origin. Numbers measured
    on these rooms say nothing about S3DIS.
    """

    spec = S3DIS
    homepage = "http://buildingparser.stanford.edu/dataset.html"
    citation = ""
    licence = "Apache-2.0"
