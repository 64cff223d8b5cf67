"""Task-aware channel gating: y * (1 + g), g = sigmoid(MLP(embedding)) (H²A², SF-KS)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers.modulation import EmbeddingMLP
from h2a2_jax.sparse.tensor import SparseTensor


class ChannelGate(nnx.Module):
    """Soft choice of channels by the dataset; g starts at one half.

    Its place is after the normalisation that follows the convolution: g depends on the dataset only, so in front of a
    batch norm with that dataset's own statistics it would cancel.
    """

    def __init__(self, channels: int, *, embedding_dim: int = 64, hidden: int = 64, rngs: nnx.Rngs):
        """Args: `channels` of the features it gates."""
        self.mlp = EmbeddingMLP(embedding_dim, hidden, channels, rngs=rngs)

    def __call__(self, x: SparseTensor, embedding: Float[Array, " d"]) -> SparseTensor:
        """Gate features [N, C]; padding rows stay zero."""
        gate = jax.nn.sigmoid(self.mlp(embedding))
        return x.with_features((x.features * (1 + gate)).astype(x.features.dtype))
