"""ScanNet v2, SUN RGB-D and S3DIS as people download them."""

from h2a2_jax.scans.raw.raw_files import PUBLISHED, PublishedCounts, RawDataset
from h2a2_jax.scans.raw.s3dis import S3dis
from h2a2_jax.scans.raw.scannet import ScanNet
from h2a2_jax.scans.raw.sunrgbd import SunRgbd

__all__ = ["PUBLISHED", "PublishedCounts", "RawDataset", "S3dis", "ScanNet", "SunRgbd"]
