"""TFDS builder of ScanNet v2."""

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.scans.specs import SCANNET


class Builder(ScanDatasetBuilder):
    """ScanNet v2: 1,513 scans of rooms, fused from RGB-D video to coloured meshes.

    Points are the vertices of the meshes in the frame aligned with the walls; axis-aligned boxes of 18 classes enclose
    the vertices of each object.
    """

    spec = SCANNET
    homepage = "http://www.scan-net.org"
    citation = """
        @inproceedings{dai2017scannet,
          title = {{ScanNet}: Richly-annotated {3D} Reconstructions of Indoor Scenes},
          author = {Dai, Angela and Chang, Angel X. and Savva, Manolis and Halber, Maciej and Funkhouser, Thomas and
                    Nie{\\ss}ner, Matthias},
          booktitle = {CVPR},
          year = {2017},
        }"""
    licence = "ScanNet Terms of Use: non-commercial research and education; not to be passed on."
