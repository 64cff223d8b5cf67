"""The detector of a config before training: parameters drawn from a seed, shapes alone, number of parameters."""

import math
from functools import cache, partial

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from h2a2_jax.checkpoint.train_state import head_configs
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.models import DetectorConfig, DetectorNetwork, HeadConfig, build_network


def build_detector(config: ExperimentConfig) -> DetectorNetwork:
    """Build the detector of a config with the parameters that its seed draws."""
    build = partial(draw_detector, config)
    key = jax.random.key(config.train.seed)
    # Drawn in one program, for hundreds of small ones would be compiled otherwise; the same for all seeds. With few
    # optimisations it compiles in two thirds of the time and draws the same.
    draw = jax.jit(lambda key: nnx.state(build(key)), compiler_options={"xla_backend_optimization_level": 1})
    return nnx.merge(nnx.graphdef(nnx.eval_shape(build, key)), draw(key))


def draw_detector(config: ExperimentConfig, key: PRNGKeyArray) -> DetectorNetwork:
    """Build the detector of a config with the parameters that a key draws; for use in jit or `nnx.eval_shape`."""
    return build_network(config.model, head_configs(config.specs, config.model), rngs=nnx.Rngs(key))


def count_parameters(config: ExperimentConfig) -> int:
    """Count the trained numbers of the detector of a config, over all datasets, without drawing them."""
    return _count_parameters(config.model, tuple(head_configs(config.specs, config.model)))


@cache
def _count_parameters(model: DetectorConfig, heads: tuple[HeadConfig, ...]) -> int:
    shapes = nnx.eval_shape(lambda: build_network(model, heads, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
