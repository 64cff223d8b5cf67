"""TFDS builder of ARKitScenes."""

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import ARKITSCENES


class Builder(ScanDatasetBuilder):
    """ARKitScenes, the 3D object detection set: 5,047 scans of 1,661 rooms with the LiDAR of a tablet, as meshes.

    Points are the vertices of the meshes; boxes of 17 classes turn about the vertical and enclose whole objects.
    """

    spec = ARKITSCENES
    homepage = "https://github.com/apple/ARKitScenes"
    citation = """
        @inproceedings{dehghan2021arkitscenes,
          title = {{ARK}itScenes - A Diverse Real-World Dataset for {3D} Indoor Scene Understanding Using Mobile {RGB}-D
                   Data},
          author = {Baruch, Gilad and Chen, Zhuoyuan and Dehghan, Afshin and Dimry, Tal and Feigin, Yuri and
                    Fu, Peter and Gebauer, Thomas and Joffe, Brandon and Kurz, Daniel and Schwartz, Arik and
                    Shulman, Elad},
          booktitle = {NeurIPS Datasets and Benchmarks Track},
          year = {2021},
        }"""
    licence = (
        "Terms in the LICENSE file of https://github.com/apple/ARKitScenes, which have changed: read that of the day."
    )
