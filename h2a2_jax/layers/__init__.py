"""Flax NNX layers for sparse tensors; `docs/layers.md` builds and trains networks of them."""

from h2a2_jax.layers import weights
from h2a2_jax.layers.adapter_conv import AdapterConv
from h2a2_jax.layers.agreement_tracking import AgreementLayers
from h2a2_jax.layers.attention import NeighborAttention
from h2a2_jax.layers.channel_gate import ChannelGate
from h2a2_jax.layers.context import DatasetContext, ForwardContext
from h2a2_jax.layers.functional import (
    activate,
    add,
    average_pool,
    broadcast_add,
    broadcast_multiply,
    concatenate,
    max_pool,
    relu,
)
from h2a2_jax.layers.kernel_selection import SelectionConfig, SelectiveConv, binarize, structural_consistency
from h2a2_jax.layers.modulation import EmbeddingMLP, LinearModulation
from h2a2_jax.layers.norm import BatchNorm, InstanceNorm, LayerNorm, instance_norm, layer_norm
from h2a2_jax.layers.prompt_norm import PromptNorm
from h2a2_jax.layers.residual import ConvNorm, ResidualBlock
from h2a2_jax.layers.sparse_conv import SparseConv, SparseConvTranspose
from h2a2_jax.layers.table import tabulate
from h2a2_jax.sparse.points import interpolate, to_points
from h2a2_jax.sparse.pool import global_pool
from h2a2_jax.sparse.tensors import from_dense, prune, to_dense, union_add

__all__ = [
    "AdapterConv",
    "AgreementLayers",
    "BatchNorm",
    "ChannelGate",
    "ConvNorm",
    "DatasetContext",
    "EmbeddingMLP",
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
    "binarize",
    "broadcast_add",
    "broadcast_multiply",
    "concatenate",
    "from_dense",
    "global_pool",
    "instance_norm",
    "interpolate",
    "layer_norm",
    "max_pool",
    "prune",
    "relu",
    "structural_consistency",
    "tabulate",
    "to_dense",
    "to_points",
    "union_add",
    "weights",
]
