"""Detectors to write and to compare."""

import dataclasses
import functools

import numpy as np
from flax import nnx

from h2a2_jax.checkpoint.store import StoredDetector
from h2a2_jax.checkpoint.train_state import head_configs, split_model
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.models import TR3D
from h2a2_jax.scans.sources import ROOTS
from tests.checkpoint.test_store import experiment

CONFIG = dataclasses.replace(
    experiment(),
    datasets=tuple(
        dataclasses.replace(source, root=ROOTS.get(source.name, "") if source.root else "")
        for source in experiment().datasets
    ),
)


@functools.cache
def _shapes() -> list[dict[str, tuple[int, ...]]]:
    model = nnx.eval_shape(lambda: TR3D(CONFIG.model, head_configs(CONFIG.specs, CONFIG.model), rngs=nnx.Rngs(0)))
    parts = ((flat_names(part), nnx.to_flat_state(part)) for part in split_model(model)[1:])
    return [{name: leaf.shape for name, (_, leaf) in zip(names, leaves, strict=True)} for names, leaves in parts]


def stored_detector(seed: int = 1) -> StoredDetector:
    """A tiny detector of three datasets with arrays of random numbers."""
    rng = np.random.default_rng(seed)
    exclusive, shared, stats = ({n: rng.random(s, np.float32) for n, s in part.items()} for part in _shapes())
    return StoredDetector(CONFIG, CONFIG.specs, (exclusive, shared, stats), "The checkpoint")


def assert_same(found: StoredDetector, expected: StoredDetector) -> None:
    """Config, datasets and every array, with its dtype, are the same."""
    assert (found.config, found.specs) == (expected.config, expected.specs)
    for ours, theirs in zip(found.parts, expected.parts, strict=True):
        assert set(ours) == set(theirs)
        for path, array in theirs.items():
            assert (ours[path].dtype, ours[path].shape) == (array.dtype, array.shape), path
            assert ours[path].tobytes() == np.ascontiguousarray(array).tobytes(), path
