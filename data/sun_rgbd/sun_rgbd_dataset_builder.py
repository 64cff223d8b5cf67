"""TFDS builder of SUN RGB-D."""

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import SUNRGBD


class Builder(ScanDatasetBuilder):
    """SUN RGB-D: 10,335 frames of four depth cameras, each as 50,000 points of the upright camera's frame.

    Boxes of 10 classes enclose whole objects, hidden parts included, and turn about the vertical.
    """

    spec = SUNRGBD
    homepage = "https://rgbd.cs.princeton.edu"
    citation = """
        @inproceedings{song2015sunrgbd,
          title = {{SUN RGB-D}: A {RGB-D} Scene Understanding Benchmark Suite},
          author = {Song, Shuran and Lichtenberg, Samuel P. and Xiao, Jianxiong},
          booktitle = {CVPR},
          year = {2015},
        }"""
    licence = "No licence is stated; its authors ask to cite them and those of the data it is made of."
