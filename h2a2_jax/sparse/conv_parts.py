"""Shared parts of the convolution algorithms: options of products, and the kernel of each scan and offset.

Every algorithm is a pair of functions on the same arguments, dispatched by `conv`:

    forward(x, w, gamma, kmap, options) -> y                             in the type of the sums
    backward(x, w, gamma, kmap, options, cotangent) -> dx, dw, dgamma

    x        features [N_in, Cin] in the compute type
    w        kernels in the compute type: [1, V, Cin / groups, Cout], or [2, V, Cin / groups, Cout] with gamma
    gamma    None; or with two kernels [B, V] of 0 and 1: kernel 0 where it is 1, kernel 1 where it is 0; or with one
             kernel any weights [B, V], which the derivatives need
    kmap     the kernel map
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from h2a2_jax.sparse.kernel_map import KernelMap

Gradients = tuple[Array, Array, Array | None]
"""Gradients of x, w and gamma; None for a gamma that is None."""
Platform = Literal["cpu", "any cpu", "accelerator"]
"""Kind of platform that a program is lowered for: this machine's CPU, a CPU of any machine, an accelerator."""
Algorithm = Literal["auto", "segment_sum", "gather", "tiles", "winograd", "native", "im2col", "pairs", "implicit"]
"""Algorithms of `convolve`."""


@dataclass(frozen=True)
class ConvOptions:
    """Algorithm of a convolution, types and precision of its products.

    Attributes:
        sum_type: type in which products are summed.
        precision: precision of the products, as in `jax.lax.dot_general`.
        kernel_type: type of the kernels as they were given, and of their gradient; products take kernels in the compute
            type.
        algorithm: algorithm, or "auto".
        groups: number of groups of channels that are convolved apart.
    """

    sum_type: Any
    precision: Any
    kernel_type: Any
    algorithm: Algorithm = "auto"
    groups: int = 1

    def dot(self, a: Array, b: Array) -> Array:
        """Matrix product, summed in `sum_type`; of each group of channels, [N, G*i] by [i, G*o], with groups."""
        if self.groups == 1:
            return jnp.matmul(a, b, precision=self.precision, preferred_element_type=self.sum_type)
        a, b = self._split(a), self._split(b)
        if a.shape[-1] == 1:  # depthwise: a product of numbers is no matter for a matmul
            out = a.astype(self.sum_type) * b[0].astype(self.sum_type)
        else:
            out = self.einsum("ngi,igo->ngo", a, b)
        return out.reshape(len(out), -1)

    def outer(self, a: Array, b: Array) -> Array:
        """Sum over the rows of the products of [N, G*i] and [N, G*o], [i, G*o], summed in `sum_type`."""
        if self.groups == 1:
            # The barrier keeps XLA from folding the transpose into a slower product.
            return self.dot(jax.lax.optimization_barrier(a.T), b)
        a, b = self._split(a), self._split(b)
        if a.shape[-1] == 1:
            out = (a.astype(self.sum_type) * b.astype(self.sum_type)).sum(0)[None]
        else:
            out = self.einsum("ngi,ngo->igo", a, b)
        return out.reshape(len(out), -1)

    def transpose(self, w: Array) -> Array:
        """Kernels [..., i, G*o] for the way back, [..., o, G*i]."""
        if self.groups == 1:
            return w.swapaxes(-1, -2)
        parts = self._split(w).swapaxes(-1, -3)
        return parts.reshape(*parts.shape[:-2], -1)

    def _split(self, rows: Array) -> Array:
        return rows.reshape(*rows.shape[:-1], self.groups, -1)

    def einsum(self, formula: str, a: Array, b: Array) -> Array:
        """Product by a formula, summed in `sum_type`."""
        return jnp.einsum(formula, a, b, precision=self.precision, preferred_element_type=self.sum_type)


def kernel_choice(gamma: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Kernel of the stack that gamma chooses: 0 or 1."""
    return jnp.where(gamma >= 0.5, 0, 1).astype(jnp.int32)


def kernel_index(gamma: Array | None, w: Array, kmap: KernelMap) -> Int[Array, "b v"]:
    """Kernel of each (scan, offset), as an index into the stack flattened over (kernel, offset)."""
    offsets = jnp.arange(kmap.kernel_volume, dtype=jnp.int32)
    if gamma is None or len(w) == 1:
        return jnp.broadcast_to(offsets, (kmap.num_scans, kmap.kernel_volume))
    return kernel_choice(gamma) * kmap.kernel_volume + offsets


def kernel_masks(gamma: Float[Array, "*s"], w: Array, dtype: Any) -> Float[Array, "*s s"]:
    """Weight of each kernel of the stack: 0 and 1 for two kernels, gamma itself for one."""
    if len(w) == 1:
        return gamma[..., None].astype(dtype)
    return jax.nn.one_hot(kernel_choice(gamma), 2, dtype=dtype)


def gain(w: Float[Array, "s *v c_in c_out"]) -> Float[Array, "*v c_in c_out"]:
    """Kernel that gamma multiplies: the difference of two kernels to choose from, or the one that it weighs."""
    return w[0] if len(w) == 1 else w[0] - w[1]


def split_by_kernel(
    dw: Float[Array, "b v c_in c_out"], w: Array, gamma: Array | None
) -> tuple[Float[Array, "s v c_in c_out"], Float[Array, "b v"] | None]:
    """Gradients of the kernels and of gamma, of those of the kernel that each scan used; one for all without gamma."""
    if gamma is None:
        return dw.sum(0, keepdims=True), None
    dgamma = (dw * gain(w).astype(dw.dtype)).sum((2, 3)).astype(gamma.dtype)
    masks = kernel_masks(gamma, w, dw.dtype)
    return jnp.stack([(masks[..., s, None, None] * dw).sum(0) for s in range(len(w))]), dgamma


def per_row(values: Num[Array, "b *c"], scan: Int[Array, " n"]) -> Num[Array, "n *c"]:
    """Values of each scan on the rows of its sites; zero on padding."""
    return values.at[scan].get(mode="fill", fill_value=0)


def mask_cotangent(cotangent: Float[Array, "n_out c_out"], kmap: KernelMap, dtype: Any) -> Float[Array, "n_out c_out"]:
    """A cotangent in the compute type, zero on padding, where it may hold anything."""
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    return jnp.where(valid, cotangent, 0).astype(dtype)


def inverse_table(kmap: KernelMap) -> Int[Array, "v n_in"]:
    """Output row that each input row reaches through each offset; N_out where there is none."""
    neighbors = jnp.asarray(kmap.neighbors)
    volume, n_out = neighbors.shape
    if kmap.is_mirror_image:
        return neighbors[::-1]
    outs = jnp.broadcast_to(jnp.arange(n_out, dtype=jnp.int32), neighbors.shape)
    rows = jnp.where(neighbors < kmap.in_capacity, neighbors, kmap.in_capacity + outs)  # distinct, also where dropped
    empty = jnp.full((volume, kmap.in_capacity), n_out, jnp.int32)
    return empty.at[jnp.arange(volume)[:, None], rows].set(outs, mode="drop", unique_indices=True)


def no_gradient(tree: Any) -> Any:
    """Cotangents of a pytree of integers."""
    return jax.tree.map(lambda a: np.zeros(np.shape(a), jax.dtypes.float0), tree)
