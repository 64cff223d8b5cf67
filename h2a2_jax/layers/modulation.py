"""Task-aware linear modulation (TLM): a channel-wise affine map that a dataset's embedding chooses (H²A², SF-KS)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.sparse.tensor import SparseTensor


class EmbeddingMLP(nnx.Module):
    """Linear [d] -> hidden, ReLU, linear -> out; the last layer starts at zero, kernel and bias: silent."""

    def __init__(self, embedding_dim: int, hidden: int, out: int, *, rngs: nnx.Rngs):
        """Linear layers with Flax's default start but for the zero last one."""
        self.hidden = nnx.Linear(embedding_dim, hidden, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.out = nnx.Linear(hidden, out, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, embedding: Float[Array, " d"]) -> Float[Array, " out"]:
        """Apply to one embedding."""
        return self.out(jax.nn.relu(self.hidden(embedding)))


class LinearModulation(nnx.Module):
    """x' = x * phi + theta with (phi - 1, theta) = MLP(embedding), on valid sites only; starts as the identity."""

    def __init__(self, channels: int, *, embedding_dim: int = 64, hidden: int = 64, rngs: nnx.Rngs):
        """Args: `channels` of the features it modulates."""
        self.mlp = EmbeddingMLP(embedding_dim, hidden, 2 * channels, rngs=rngs)

    def __call__(self, x: SparseTensor, embedding: Float[Array, " d"]) -> SparseTensor:
        """Modulate features [N, C] by an embedding [d]."""
        shift, theta = jnp.split(self.mlp(embedding), 2)
        valid = x.sites.valid[:, None]
        # Twice: what padding holds must not reach the gradient of the shift either.
        y = jnp.where(valid, x.features, 0) * (1 + shift) + theta
        return x.with_features(jnp.where(valid, y, 0).astype(x.features.dtype))
