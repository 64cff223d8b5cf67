"""Task-aware linear modulation (TLM): a channel-wise affine map that a dataset's embedding chooses (H²A², SF-KS)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers.checks import check_tensor
from h2a2_jax.sparse.sites import Sites, SparseTensor
from h2a2_jax.sparse.xla_cpu import recompute_if_narrow

Start = Literal["zero", "random"]
"""Initial last layer of an MLP; "zero" makes it silent."""


class EmbeddingMLP(nnx.Module):
    """Linear [d] -> hidden, ReLU, linear -> out."""

    def __init__(self, embedding_dim: int, hidden: int, out: int, *, start: Start = "zero", rngs: nnx.Rngs):
        """Linear layers with Flax's default start; with `start` "zero" the last one is zero.

        Args:
            embedding_dim: width d of the embedding.
            hidden: width of the hidden layer.
            out: width of the output.
            start: initial last layer.
            rngs: random streams.
        """
        self.hidden = nnx.Linear(embedding_dim, hidden, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        kernel_init = zeros if start == "zero" else nnx.initializers.lecun_normal()
        self.out = nnx.Linear(hidden, out, kernel_init=kernel_init, bias_init=zeros, rngs=rngs)

    def __call__(self, embedding: Float[Array, "*b d"]) -> Float[Array, "*b out"]:
        """Apply to one embedding, or to one per scan."""
        return self.out(jax.nn.relu(self.hidden(embedding)))


def per_site(values: Float[Array, "*b c"], sites: Sites) -> Float[Array, "*n c"]:
    """Values [C] of a dataset unchanged; values [B, C] of scans as rows [N, C] of their sites."""
    if values.ndim == 1:
        return values
    if len(values) == 1:
        return values[0]
    return values.at[jnp.asarray(sites.scan)].get(mode="fill", fill_value=0)


class LinearModulation(nnx.Module):
    """x' = x * phi + theta with (phi - 1, theta) = MLP(embedding), on valid sites only; starts as the identity."""

    def __init__(
        self, channels: int, *, embedding_dim: int = 64, hidden: int = 64, start: Start = "zero", rngs: nnx.Rngs
    ):
        """Modulate features of `channels` channels; with `start` "random" not the identity at first.

        Args:
            channels: channels C of the features.
            embedding_dim: width d of the embedding.
            hidden: width of the hidden layer of the MLP.
            start: initial last layer of the MLP.
            rngs: random streams.
        """
        self.mlp = EmbeddingMLP(embedding_dim, hidden, 2 * channels, start=start, rngs=rngs)

    def factors(self, embedding: Float[Array, "*b d"]) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
        """Phi and theta of an embedding, or of one per scan."""
        shift, theta = jnp.split(self.mlp(embedding), 2, axis=-1)
        return 1 + shift, theta

    def __call__(self, x: SparseTensor, embedding: Float[Array, "*b d"]) -> SparseTensor:
        """Modulate features [N, C] by an embedding [d], or by one per scan [B, d].

        Raises:
            ValueError: x is no sparse tensor.
        """
        check_tensor("LinearModulation", x)
        return recompute_if_narrow(modulate, x, *self.factors(embedding))


def modulate(x: SparseTensor, phi: Float[Array, "*b c"], theta: Float[Array, "*b c"]) -> SparseTensor:
    """Compute x * phi + theta on valid sites, zero on padding; phi and theta [C], or [B, C] of scans."""
    valid = x.sites.valid[:, None]
    # Masked twice: values on padding must not reach the gradient of phi either.
    y = jnp.where(valid, x.features, 0) * per_site(phi, x.sites) + per_site(theta, x.sites)
    return x.with_features(jnp.where(valid, y, 0).astype(x.features.dtype))
