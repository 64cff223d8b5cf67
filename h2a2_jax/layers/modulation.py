"""Task-aware linear modulation (TLM): a channel-wise affine map that a dataset's embedding chooses (H²A², SF-KS)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers.rematerialize import recomputed_if_narrow
from h2a2_jax.sparse.sites import Sites, SparseTensor

Start = Literal["zero", "random"]


class EmbeddingMLP(nnx.Module):
    """Linear [d] -> hidden, ReLU, linear -> out."""

    def __init__(self, embedding_dim: int, hidden: int, out: int, *, start: Start = "zero", rngs: nnx.Rngs):
        """Linear layers with Flax's default start; with `start` "zero" the last one is zero: silent."""
        self.hidden = nnx.Linear(embedding_dim, hidden, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        kernel_init = zeros if start == "zero" else nnx.initializers.lecun_normal()
        self.out = nnx.Linear(hidden, out, kernel_init=kernel_init, bias_init=zeros, rngs=rngs)

    def __call__(self, embedding: Float[Array, "*b d"]) -> Float[Array, "*b out"]:
        """Apply to one embedding, or to one a scan."""
        return self.out(jax.nn.relu(self.hidden(embedding)))


def per_site(values: Float[Array, "*b c"], sites: Sites) -> Float[Array, "*n c"]:
    """Values [C] of a dataset as they are, values [B, C] of scans as rows [N, C] of their sites."""
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
        """Args: `channels` of the features it modulates; with `start` "random" it does not start as the identity."""
        self.mlp = EmbeddingMLP(embedding_dim, hidden, 2 * channels, start=start, rngs=rngs)

    def factors(self, embedding: Float[Array, "*b d"]) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
        """Phi and theta."""
        shift, theta = jnp.split(self.mlp(embedding), 2, axis=-1)
        return 1 + shift, theta

    def __call__(self, x: SparseTensor, embedding: Float[Array, "*b d"]) -> SparseTensor:
        """Modulate features [N, C] by an embedding [d], or by one a scan [B, d]."""
        return recomputed_if_narrow(modulate, x, *self.factors(embedding))


def modulate(x: SparseTensor, phi: Float[Array, "*b c"], theta: Float[Array, "*b c"]) -> SparseTensor:
    """X * phi + theta on valid sites, zero on padding; phi and theta [C], or [B, C] of scans."""
    valid = x.sites.valid[:, None]
    # Twice: what padding holds must not reach the gradient of phi either.
    y = jnp.where(valid, x.features, 0) * per_site(phi, x.sites) + per_site(theta, x.sites)
    return x.with_features(jnp.where(valid, y, 0).astype(x.features.dtype))
