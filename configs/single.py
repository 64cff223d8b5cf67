"""TR3D (Rukhovich et al., arXiv 2302.02858) on one dataset: no kernel selection, no gradients to harmonise.

    python run.py --config=configs/single.py:scannet --workdir=runs/scannet         or :sunrgbd, :s3dis, :arkitscenes,
                                                                                    :multiscan, :3rscan, :scannetpp

Published, mAP@0.25 / mAP@0.5: ScanNet 72.9 / 59.3, SUN RGB-D 67.1 / 50.4, S3DIS 74.5 / 51.7; TR3D's authors published
nothing on the others. These numbers are the paper's; none of them was measured here. The prepared folder is
data/scannet, data/sun_rgbd, data/s3dis, data/arkitscenes, data/multiscan/bins, data/3rscan or data/scannetpp/bins;
another one is set with `--config.datasets.scannet.root=/data/scannet`.
"""

from ml_collections import ConfigDict

from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, SourceConfig, config_dict
from h2a2_jax.errors import InputError
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.sources import ROOTS
from h2a2_jax.scans.specs import ALL_SPECS


def get_config(variant: str | None = None) -> ConfigDict:
    """The config for the dataset called `variant`."""
    names = [spec.name for spec in ALL_SPECS]
    if variant not in names:
        given = "no variant was given" if variant is None else f"there is no variant {variant!r}"
        raise InputError(
            f"configs/single.py trains on one dataset and {given}; choose it as in --config=configs/single.py:scannet "
            f"from {', '.join(names)}."
        )
    return config_dict(
        ExperimentConfig(
            datasets=(SourceConfig(variant, root=ROOTS[variant]),),
            model=DetectorConfig(selection=None),
            harmonize=HarmonizeConfig(method="mean"),
        )
    )
