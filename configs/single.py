"""TR3D (arXiv 2302.02858) or FCAF3D (arXiv 2112.00322) on one dataset: no kernel selection, no gradients to harmonise.

    python run.py --config=configs/single.py:scannet --workdir=runs/scannet         or :sunrgbd, :s3dis, :arkitscenes,
                                                                                    :multiscan, :3rscan, :scannetpp
    python run.py --config=configs/single.py:scannet,fcaf3d --workdir=runs/fcaf3d   FCAF3D in place of TR3D

Published, mAP@0.25 / mAP@0.5: TR3D has ScanNet 72.9 / 59.3, SUN RGB-D 67.1 / 50.4, S3DIS 74.5 / 51.7; FCAF3D, by the
weights that mmdetection3d publishes, has 69.7 / 55.2, 63.8 / 47.3, 67.4 / 45.7. The authors of neither published
anything on the others. These numbers are theirs; none of them was measured here. The prepared folder is data/scannet,
data/sun_rgbd, data/s3dis, data/arkitscenes, data/multiscan/bins, data/3rscan or data/scannetpp/bins; another one is set
with `--config.datasets.scannet.root=/data/scannet`.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, SourceConfig, config_dict
from h2a2_jax.errors import InputError
from h2a2_jax.models import DetectorConfig
from h2a2_jax.models.architecture import FCAF3D_STAGES
from h2a2_jax.scans.sources import ROOTS
from h2a2_jax.scans.specs import ALL_SPECS


def get_config(variant: str | None = None) -> ConfigDict:
    """The config of a variant: the name of a dataset, and after a comma the word fcaf3d for the other detector.

    Raises:
        InputError: an unknown word, none or two datasets.
    """
    words = [word for word in (variant or "").split(",") if word]
    names = [spec.name for spec in ALL_SPECS]
    chosen = [word for word in words if word != "fcaf3d"]
    if len(chosen) != 1 or chosen[0] not in names:
        given = "no variant was given" if variant is None else f"there is no variant {variant!r}"
        raise InputError(
            f"configs/single.py trains on one dataset and {given}; choose it as in --config=configs/single.py:scannet "
            f"or --config=configs/single.py:scannet,fcaf3d from {', '.join(names)}."
        )
    source, model = SourceConfig(chosen[0], root=ROOTS[chosen[0]]), DetectorConfig()
    if "fcaf3d" in words:
        source = replace(source, recipe="fcaf3d")
        model = DetectorConfig(kind="fcaf3d", stage_channels=FCAF3D_STAGES)
    return config_dict(ExperimentConfig(datasets=(source,), model=model, harmonize=HarmonizeConfig(method="mean")))
