"""TFDS builder of procedural scans as ScanNet's."""

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import SCANNET


class Builder(ScanDatasetBuilder):
    """Procedural rooms as fused from a hand-held depth camera: a stand-in for ScanNet without a licence.

    The 18 classes of ScanNet, axis-aligned boxes of the visible points, floor at z = 0. Numbers measured on these scans
    say nothing about ScanNet.
    """

    spec = SCANNET
    homepage = "https://arxiv.org/abs/1702.04405"
    citation = ""
    licence = "Apache-2.0"
