"""Task-aware channel gating: y * (1 + g), g = sigmoid(MLP(embedding)) (H²A², SF-KS)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers.checks import check_tensor
from h2a2_jax.layers.modulation import EmbeddingMLP, Start, per_site
from h2a2_jax.sparse.sites import SparseTensor
from h2a2_jax.sparse.xla_cpu import recompute_if_narrow


class ChannelGate(nnx.Module):
    """Soft choice of channels by the dataset; g starts at one half.

    Its place is after the normalisation that follows the convolution: g depends on the dataset only, so in front of a
    batch norm with that dataset's own statistics it would cancel.
    """

    def __init__(
        self, channels: int, *, embedding_dim: int = 64, hidden: int = 64, start: Start = "zero", rngs: nnx.Rngs
    ):
        """Gate features of `channels` channels; with `start` "random" g does not start at one half.

        Args:
            channels: channels C of the features.
            embedding_dim: width d of the embedding.
            hidden: width of the hidden layer of the MLP.
            start: initial last layer of the MLP.
            rngs: random streams.
        """
        self.mlp = EmbeddingMLP(embedding_dim, hidden, channels, start=start, rngs=rngs)

    def factor(self, embedding: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
        """Factor 1 + g of an embedding, or of one per scan."""
        return 1 + jax.nn.sigmoid(self.mlp(embedding))

    def __call__(self, x: SparseTensor, embedding: Float[Array, "*b d"]) -> SparseTensor:
        """Gate features [N, C] by an embedding [d], or by one per scan [B, d]; padding rows stay zero.

        Raises:
            ValueError: x is no sparse tensor.
        """
        check_tensor("ChannelGate", x)
        return recompute_if_narrow(_scale, x, self.factor(embedding))


def _scale(x: SparseTensor, factor: Float[Array, "*b c"]) -> SparseTensor:
    return x.with_features((x.features * per_site(factor, x.sites)).astype(x.features.dtype))
