"""TFDS builders of procedural scans as those of ARKitScenes, MultiScan, 3RScan and ScanNet++."""

from collections.abc import Mapping

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import dataset_spec

STAND_INS: Mapping[str, str] = {
    "arkitscenes": "as fused from the LiDAR of a tablet, bent by its drift, boxes of whole objects with yaw",
    "multiscan": "as fused from a hand-held depth camera, axis-aligned boxes of the visible points",
    "3rscan": "as fused from a hand-held depth camera, each room twice, axis-aligned boxes of the visible points",
    "scannetpp": "as laser scanners see them, small things included, axis-aligned boxes of the visible points",
}
"""Scans by the name of the dataset that they stand for."""


def make_builder(dataset: str) -> type[ScanDatasetBuilder]:
    """Make the builder of the stand-in of a dataset of `STAND_INS`."""

    class Builder(ScanDatasetBuilder):
        __doc__ = (
            f"Procedural rooms {STAND_INS[dataset]}: a stand-in for {dataset} without a licence.\n\n"
            f"Numbers measured on these scans say nothing about {dataset}."
        )
        name = f"synthetic_{dataset}"
        spec = dataset_spec(dataset)
        homepage = "https://arxiv.org/abs/2409.04234"
        citation = ""
        licence = "Apache-2.0"

    return Builder
