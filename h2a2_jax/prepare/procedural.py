"""The procedural datasets as raw ones, so that they are prepared like the real ones."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from h2a2_jax.scans import synthetic
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import DatasetSpec, dataset_spec
from h2a2_jax.scans.synthetic.catalogue import Scale
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource


@dataclass(frozen=True)
class SyntheticRaw:
    """Procedural scans of one dataset, generated when they are loaded.

    Attributes:
        name: "scannet", "sunrgbd" or "s3dis".
        train_size: scans of the training split.
        val_size: scans of the validation split.
        seed: another one gives other scans.
        scale: "full", rooms like the real ones, or "demo", small ones.
    """

    name: str
    train_size: int
    val_size: int
    seed: int = 0
    scale: Scale = "full"

    def __post_init__(self) -> None:
        """Refuses what there are no scans of.

        Raises:
            InputError: dataset, size or scale are none that there are.
        """
        _ = self.splits

    @property
    def spec(self) -> DatasetSpec:
        """Classes and protocol of the dataset that is stood in for."""
        return dataset_spec(self.name)

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the scans by split."""
        return {"train": tuple(self._train.names), "val": tuple(self._val.names)}

    @property
    def notes(self) -> Mapping[str, int]:
        """Nothing is left out of what is generated."""
        return {}

    def load(self, name: str) -> Scan:
        """Generates a scan by its name; the same name always gives the same scan."""
        _, split, index = name.rsplit("/", 2)
        return (self._train if split == "train" else self._val)[int(index)]

    @property
    def _train(self) -> SyntheticSource:
        return SyntheticSource(self.spec, "train", self.train_size, seed=self.seed, scale=self.scale)

    @property
    def _val(self) -> SyntheticSource:
        return SyntheticSource(self.spec, "val", self.val_size, seed=self.seed, scale=self.scale)


def generator_digest() -> str:
    """Changes with the code of the generator: scans of different code must not be mixed."""
    files = sorted(Path(synthetic.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
