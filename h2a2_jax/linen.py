"""Layers for Flax Linen: the computation and the parameters of `h2a2_jax.layers`, in Linen's collections.

    conv = linen.SparseConv(3, 16)
    variables = conv.init(key, x, kernel_map)
    y = conv.apply(variables, x, kernel_map)

A layer takes the arguments of its namesake in `h2a2_jax.layers` and is called the same way. Parameters are in "params",
running statistics in "batch_stats", plain arrays under the names of the NNX attributes. Training updates statistics:

    context = ForwardContext(training=True)
    y, updates = model.apply(variables, x, kernel_map, context, mutable=["batch_stats"])

A norm built with `use_running_average=False` trains without a context, as `linen.BatchNorm(16,
use_running_average=not train)`; in a block, `norm=partial(layers.BatchNorm, use_running_average=not train)`.

Functions without parameters (`relu`, `max_pool`, `global_pool`, ...) serve both and are exported here too.
`docs/layers.md` trains a U-Net of these layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn
from flax.core import meta

from h2a2_jax import layers
from h2a2_jax.layers import (
    DatasetContext,
    ForwardContext,
    SelectionConfig,
    activate,
    add,
    average_pool,
    broadcast_add,
    broadcast_multiply,
    concatenate,
    from_dense,
    global_pool,
    interpolate,
    max_pool,
    prune,
    relu,
    to_dense,
    to_points,
    union_add,
)
from h2a2_jax.layers.context import Initializer
from h2a2_jax.sparse.conv import Algorithm
from h2a2_jax.sparse.sites import PerAxis

__all__ = [
    "AdapterConv",
    "BatchNorm",
    "ChannelGate",
    "ConvNorm",
    "DatasetContext",
    "ForwardContext",
    "InstanceNorm",
    "LayerNorm",
    "LinearModulation",
    "NeighborAttention",
    "PromptNorm",
    "ResidualBlock",
    "SelectionConfig",
    "SelectiveConv",
    "SparseConv",
    "SparseConvTranspose",
    "activate",
    "add",
    "average_pool",
    "broadcast_add",
    "broadcast_multiply",
    "concatenate",
    "from_dense",
    "global_pool",
    "interpolate",
    "max_pool",
    "prune",
    "relu",
    "to_dense",
    "to_points",
    "union_add",
]

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
"""Kind of NNX variable that each collection of Linen holds."""


class _Layer(nn.Module):
    """An NNX layer whose variables live in Linen's collections.

    Flax's bridge (`nnx.bridge.ToLinen`) initialises all parameters in every eager call, boxes those with metadata, and
    silently drops updates of statistics that are not mutable. This class builds the layer from shapes instead.
    """

    layer: ClassVar[Callable[..., nnx.Module]]

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the NNX layer on the variables of the collections.

        Raises:
            flax.errors.ScopeParamNotFoundError: a parameter is missing.
            flax.errors.ScopeParamShapeError: a parameter has another shape.
            flax.errors.ModifyScopeVariableError: training, but "batch_stats" is not mutable.
            ValueError: as raised by the NNX layer.
        """
        graph, *states = nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))), *_COLLECTIONS.values())
        before = self._variables(dict(zip(_COLLECTIONS, states, strict=True)))
        for state, values in zip(states, before.values(), strict=True):
            nnx.replace_by_pure_dict(state, values)
        module = nnx.merge(graph, *states)
        out = module(*args, **kwargs)
        if not self.is_initializing():
            self._remember(before["batch_stats"], nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
        return out

    def _build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The NNX layer with the fields of this one as its arguments."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("parent", "name")}
        if isinstance(options.get("conv"), type):
            options["conv"] = options["conv"].layer
        if self.name is not None and self.layer in (layers.SelectiveConv, layers.ConvNorm, layers.ResidualBlock):
            options["name"] = self.name
        return self.layer(**options, rngs=rngs)

    def _variables(self, shapes: Mapping[str, nnx.State]) -> dict[str, dict]:
        """Values by collection and name; missing ones are initialised if the collection is mutable."""
        wanted = {collection: nnx.to_pure_dict(state) for collection, state in shapes.items()}
        missing = [(c, name) for c, values in wanted.items() for name in values if not self.has_variable(c, name)]
        if any(self.is_mutable_collection(collection) for collection, _ in missing):
            initial = self._build(nnx.Rngs(self.make_rng("params")))
            for collection, name in missing:
                if self.is_mutable_collection(collection):
                    values = nnx.to_pure_dict(nnx.state(initial, _COLLECTIONS[collection]))
                    self.put_variable(collection, name, values[name])
        found: dict[str, dict] = {collection: {} for collection in wanted}
        for collection, values in wanted.items():
            for name, shape in values.items():
                if not self.has_variable(collection, name):
                    raise errors.ScopeParamNotFoundError(name, "/".join(self.path))
                value = meta.unbox(self.get_variable(collection, name))
                self._check_shape(name, value, shape)
                found[collection][name] = value
        return found

    def _check_shape(self, name: str, value: Any, wanted: Any) -> None:
        """Raise ScopeParamShapeError if a leaf of a value has another shape than the NNX layer wants."""
        has, wants = ({jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in
                       jax.tree_util.tree_leaves_with_path(tree)} for tree in (value, wanted))  # fmt: skip
        for path, shape in wants.items():
            if has.get(path) != shape:
                raise errors.ScopeParamShapeError(name + path, "/".join(self.path), has.get(path), shape)

    def _remember(self, before: dict, after: dict) -> None:
        """Store the statistics that the call changed."""
        for name, value in after.items():
            if all(old is new for old, new in zip(jax.tree.leaves(before[name]), jax.tree.leaves(value), strict=True)):
                continue
            if not self.is_mutable_collection("batch_stats"):
                raise errors.ModifyScopeVariableError("batch_stats", name, "/".join(self.path))
            self.put_variable("batch_stats", name, value)


class SparseConv(_Layer):
    """Linen version of `layers.SparseConv`: `SparseConv(3, 16)(x, kernel_map)`."""

    in_channels: int
    out_channels: int
    kernel_size: PerAxis = 3
    use_bias: bool = False
    groups: int = 1
    algorithm: Algorithm | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    exclusive_to: int | None = None
    layer = layers.SparseConv


class SparseConvTranspose(SparseConv):
    """Linen version of `layers.SparseConvTranspose`: `SparseConvTranspose(16, 8, 2)(x, kernel_map)`."""

    layer = layers.SparseConvTranspose


class AdapterConv(_Layer):
    """Linen version of `layers.AdapterConv`: `AdapterConv(16, 16, num_datasets=3)(x, kernel_map, context)`."""

    in_channels: int
    out_channels: int
    kernel_size: PerAxis = 3
    num_datasets: int = 1
    use_bias: bool = False
    algorithm: Algorithm | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    layer = layers.AdapterConv


class NeighborAttention(_Layer):
    """Linen version of `layers.NeighborAttention`: `NeighborAttention(64)(x, kernel_map)`."""

    channels: int
    num_heads: int = 4
    kernel_size: PerAxis = 3
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    layer = layers.NeighborAttention


class SelectiveConv(_Layer):
    """Linen version of `layers.SelectiveConv`; its values reach a tap under the name of the Linen module."""

    in_channels: int
    out_channels: int
    kernel_size: PerAxis = 3
    num_datasets: int = 1
    selection: SelectionConfig | None = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    layer = layers.SelectiveConv


class LinearModulation(_Layer):
    """Linen version of `layers.LinearModulation`: `LinearModulation(16)(x, embedding)`."""

    channels: int
    embedding_dim: int = 64
    hidden: int = 64
    start: Literal["zero", "random"] = "zero"
    layer = layers.LinearModulation


class ChannelGate(_Layer):
    """Linen version of `layers.ChannelGate`: `ChannelGate(16)(x, embedding)`."""

    channels: int
    embedding_dim: int = 64
    hidden: int = 64
    start: Literal["zero", "random"] = "zero"
    layer = layers.ChannelGate


class BatchNorm(_Layer):
    """Linen version of `layers.BatchNorm`: `BatchNorm(16)(x, context)`; mean and var are in "batch_stats"."""

    channels: int
    num_datasets: int = 1
    eps: float = 1e-5
    momentum: float = 0.9
    exclusive_affine: bool = False
    shared_statistics: bool = False
    use_running_average: bool = True
    param_dtype: Any = jnp.float32
    scale_init: Initializer | None = None
    bias_init: Initializer | None = None
    layer = layers.BatchNorm


class PromptNorm(_Layer):
    """Linen version of `layers.PromptNorm`: `PromptNorm(16)(x, context)`, with the embedding in the context."""

    channels: int
    embedding_dim: int = 64
    num_datasets: int = 1
    eps: float = 1e-5
    momentum: float = 0.9
    shared_statistics: bool = False
    use_running_average: bool = True
    param_dtype: Any = jnp.float32
    scale_init: Initializer | None = None
    bias_init: Initializer | None = None
    layer = layers.PromptNorm


class InstanceNorm(_Layer):
    """Linen version of `layers.InstanceNorm`: `InstanceNorm(16)(x)`."""

    channels: int
    eps: float = 1e-5
    param_dtype: Any = jnp.float32
    scale_init: Initializer | None = None
    bias_init: Initializer | None = None
    layer = layers.InstanceNorm


class LayerNorm(_Layer):
    """Linen version of `layers.LayerNorm`: `LayerNorm(16)(x)`."""

    channels: int
    eps: float = 1e-6
    param_dtype: Any = jnp.float32
    scale_init: Initializer | None = None
    bias_init: Initializer | None = None
    layer = layers.LayerNorm


class ConvNorm(_Layer):
    """Linen version of `layers.ConvNorm`; `conv` is a class of this module, `norm` one of `layers` or a partial."""

    in_channels: int
    out_channels: int
    kernel_size: PerAxis = 3
    conv: type[SparseConv] = SparseConv
    norm: Callable[..., layers.BatchNorm] = layers.BatchNorm
    selection: SelectionConfig | None = None
    num_datasets: int = 1
    layer = layers.ConvNorm


class ResidualBlock(_Layer):
    """Linen version of `layers.ResidualBlock`: `ResidualBlock(16, 16)(x, kernel_map, context)`."""

    in_channels: int
    out_channels: int
    downsample: bool = False
    norm: Callable[..., layers.BatchNorm] = layers.BatchNorm
    kernels: Literal["shared", "adapted", "exclusive"] = "shared"
    selection: SelectionConfig | None = None
    num_datasets: int = 1
    layer = layers.ResidualBlock
