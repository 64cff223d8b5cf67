"""The weights that have a name: where they are published, what they detect, their scores and their licence."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from h2a2_jax.errors import InputError
from h2a2_jax.scans.specs import DatasetSpec, dataset_spec
from h2a2_jax.user_cache import user_cache

MIRROR_VARIABLE = "H2A2_WEIGHTS_MIRROR"
"""Environment variable with an address that stands in for `PUBLISHER`: a mirror with the same paths."""
PUBLISHER = "https://download.openmmlab.com/mmdetection3d"
"""Beginning of the addresses of the published files."""
PACKAGED = Path(__file__).parent
"""Folder of the weights that come with the package, each in a folder of its name."""

_TERMS = {
    "scannet": "ScanNet v2 is given out under the ScanNet Terms of Use (non-commercial research and education)",
    "sunrgbd": "SUN RGB-D states no licence and asks to cite its authors and those of the data that it is made of",
    "s3dis": "S3DIS is given out under the terms of its request form (research)",
}


@dataclass(frozen=True)
class CatalogEntry:
    """Weights that have a name.

    Attributes:
        name: the name.
        summary: a line on the detector.
        datasets: built-in datasets that the detector was trained on, one head each; empty where the packaged folder
            says so.
        path: path of the published file below `PUBLISHER`; "" for weights that come with the package.
        scores: published mAP (%) at the IoU thresholds 0.25 and 0.5, by dataset.
        license: a sentence on the licence of code, weights and data.
    """

    name: str
    summary: str
    license: str
    datasets: tuple[str, ...] = ()
    path: str = ""
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def specs(self) -> tuple[DatasetSpec, ...]:
        """Specs of the datasets."""
        return tuple(map(dataset_spec, self.datasets))

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """The published mAP as shares, by dataset and IoU threshold, as model cards have them."""
        return {
            name: {"0.25": round(low / 100, 4), "0.5": round(high / 100, 4)}
            for name, (low, high) in self.scores.items()
        }

    @property
    def address(self) -> str:
        """Address of the published file, at the mirror if the environment names one; "" for packaged weights."""
        mirror = os.environ.get(MIRROR_VARIABLE, "") or PUBLISHER
        return f"{mirror.rstrip('/')}/{self.path}" if self.path else ""

    @property
    def file(self) -> Path:
        """Place of the published file in the cache of this user, where it may also be put by hand."""
        return weights_cache() / PurePosixPath(self.path).name

    @property
    def folder(self) -> Path:
        """Pretrained folder of the weights: in the cache of this user, or in the package."""
        return weights_cache() / self.name if self.path else PACKAGED / self.name


_PAPERS = {"TR3D": "arXiv 2302.02858", "FCAF3D": "arXiv 2112.00322"}


def _published(detector: str, dataset: str, path: str, *scores: float) -> CatalogEntry:
    """Entry of a detector on a dataset as mmdetection3d publishes it, in a file below `PUBLISHER`."""
    spec = dataset_spec(dataset)
    return CatalogEntry(
        name=f"{detector.lower()}-{dataset}",
        summary=f"{detector} ({_PAPERS[detector]}) of mmdetection3d, {spec.num_classes} classes of {dataset}",
        license=(
            f"The code of mmdetection3d is under Apache-2.0; its weights were trained on data under terms of their "
            f"own, which apply to you: {_TERMS[dataset]}."
        ),
        datasets=(dataset,),
        path=path,
        scores={dataset: (scores[0], scores[1])},
    )


def _tr3d(name: str) -> str:
    return f"v1.1.0_models/tr3d/{name}/{name}.pth"


def _fcaf3d(name: str, day: str) -> str:
    return f"v1.0.0_models/fcaf3d/{name}/{name}_{day}.pth"


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        name="rooms",
        summary="a small detector that comes with the package, trained on its procedural rooms",
        license="The weights are under Apache-2.0, as the package is: the rooms that they have seen are procedural.",
    ),
    _published("TR3D", "scannet", _tr3d("tr3d_1xb16_scannet-3d-18class"), 72.9, 59.3),
    _published("TR3D", "sunrgbd", _tr3d("tr3d_1xb16_sunrgbd-3d-10class"), 67.1, 50.4),
    _published("TR3D", "s3dis", _tr3d("tr3d_1xb16_s3dis-3d-5class"), 74.5, 51.7),
    _published("FCAF3D", "scannet", _fcaf3d("fcaf3d_8x2_scannet-3d-18class", "20220805_084956"), 69.7, 55.2),
    _published("FCAF3D", "sunrgbd", _fcaf3d("fcaf3d_8x2_sunrgbd-3d-10class", "20220805_165017"), 63.8, 47.3),
    _published("FCAF3D", "s3dis", _fcaf3d("fcaf3d_8x2_s3dis-3d-5class", "20220805_121957"), 67.4, 45.7),
)
"""The weights that have a name."""


def weights_cache() -> Path:
    """Folder of downloaded weights, which may be missing: "weights" in the user's cache (`user_cache`).

    Raises:
        InputError: nothing names a folder, and the user has no home folder.
    """
    try:
        return user_cache() / "weights"
    except RuntimeError as error:
        raise InputError("This user has no home folder for weights: set H2A2_CACHE to a folder.") from error


def find_entry(name: str) -> CatalogEntry | None:
    """Return the entry of a name; None if there is none."""
    return next((entry for entry in CATALOG if entry.name == name), None)


def unknown_name(name: str) -> InputError:
    """Return the error of a name that is in no catalog, with similar names."""
    names = [entry.name for entry in CATALOG]
    near = difflib.get_close_matches(name.lower(), names, 2, 0.5)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return InputError(
        f"There are no weights {name!r}{hint}: expected is one of {', '.join(names)}, an existing folder (of a run, or "
        "written by save_pretrained), a .pth file of TR3D or FCAF3D, or org/name on the Hugging Face hub."
    )
