"""ScanNet v2, SUN RGB-D and S3DIS as people download them."""

from h2a2_jax.inputs.raw.dataset import PUBLISHED, PublishedCounts, RawDataset

__all__ = ["PUBLISHED", "PublishedCounts", "RawDataset"]
