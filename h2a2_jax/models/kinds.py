"""The kinds of detectors by the words of `DetectorConfig.kind`."""

from collections.abc import Mapping, Sequence

from flax import nnx

from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.detector import DetectorKind, DetectorNetwork, HeadConfig
from h2a2_jax.models.fcaf3d import FCAF3DKind
from h2a2_jax.models.tr3d import TR3DKind

KINDS: Mapping[str, DetectorKind] = {"tr3d": TR3DKind(), "fcaf3d": FCAF3DKind()}
"""Every kind by its word."""


def kind_of(config: DetectorConfig) -> DetectorKind:
    """Return the kind of detector of an architecture."""
    return KINDS[config.kind]


def build_network(config: DetectorConfig, heads: Sequence[HeadConfig], *, rngs: nnx.Rngs) -> DetectorNetwork:
    """Build the network of an architecture with random parameters, for heads in the order of the dataset axis."""
    return kind_of(config).build(config, heads, rngs=rngs)
