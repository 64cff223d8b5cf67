"""TFDS builder of S3DIS."""

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import S3DIS


class Builder(ScanDatasetBuilder):
    """S3DIS: 272 rooms of six building areas, scanned in full, ceilings included.

    Axis-aligned boxes of 5 classes enclose the points of each object; a room's smallest coordinates are its origin.
    """

    spec = S3DIS
    homepage = "http://buildingparser.stanford.edu/dataset.html"
    citation = """
        @inproceedings{armeni2016s3dis,
          title = {{3D} Semantic Parsing of Large-Scale Indoor Spaces},
          author = {Armeni, Iro and Sener, Ozan and Zamir, Amir R. and Jiang, Helen and Brilakis, Ioannis and
                    Fischer, Martin and Savarese, Silvio},
          booktitle = {CVPR},
          year = {2016},
        }"""
    licence = "Terms of the Stanford request form: research; not to be passed on."
