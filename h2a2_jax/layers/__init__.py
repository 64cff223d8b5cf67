"""Flax NNX layers for sparse tensors: what other models import."""

from h2a2_jax.layers.channel_gate import ChannelGate
from h2a2_jax.layers.context import DatasetContext, ForwardContext
from h2a2_jax.layers.conv import SparseConv, SparseConvTranspose
from h2a2_jax.layers.kernel_selection import KernelSelection, SelectiveConv, binarize, structural_consistency
from h2a2_jax.layers.modulation import EmbeddingMLP, LinearModulation
from h2a2_jax.layers.norm import BatchNorm, instance_norm
from h2a2_jax.layers.residual import ConvNorm, ResidualBlock

__all__ = [
    "BatchNorm",
    "ChannelGate",
    "ConvNorm",
    "DatasetContext",
    "EmbeddingMLP",
    "ForwardContext",
    "KernelSelection",
    "LinearModulation",
    "ResidualBlock",
    "SelectiveConv",
    "SparseConv",
    "SparseConvTranspose",
    "binarize",
    "instance_norm",
    "structural_consistency",
]
