"""Norm-based gradient harmonisation (NGH), and the mean and the clipping of the datasets' gradients.

A balancer is an optax transformation whose gradients have one leading axis more than the parameters: entry `i` is the
gradient of the `i`-th dataset that this device works on. The balancer changes or drops gradients, and
`mean_over_datasets` makes one gradient of them. Where the datasets are spread over a mesh axis, with dataset `k` as
entry `k % local` of the device with index `k // local`, all functions run inside `jax.shard_map` and know of devices
that axis name only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from h2a2_jax.balancers.dataset_axis import (
    SMALLEST_NORM,
    check_datasets,
    dataset_norms,
    gather_datasets,
    keep_present,
    local_rows,
    nonzero,
)
from h2a2_jax.balancers.gramian import check_scope, group_tensors
from h2a2_jax.balancers.packing import count_tensors, scale_tensors, tensor_norms, tensor_values


class HarmonizationState(NamedTuple):
    """Record of the last step of `norm_gradient_harmonization`; the next step does not depend on it.

    `psi`, `norms` and `scales` are trees of the structure of the parameters for the scopes "tensor" and "group", where
    the tensors of a group have the same `psi` and `scales`, and single arrays for the scope "global". All are float32
    and equal on every device; K counts the datasets on all devices.

    Attributes:
        psi: agreement of the gradient norms in (0, 1], a scalar each; 1 where fewer than two datasets were active and
            before the first step.
        norms: gradient norms [K] before scaling, 0 for a dataset that took no part in the step.
        scales: factors [K] that the gradients were multiplied by.
        cap_hits: number of factors that the cap limited, int32.
    """

    psi: PyTree[Float[Array, ""]]
    norms: PyTree[Float[Array, " datasets"]]
    scales: PyTree[Float[Array, " datasets"]]
    cap_hits: Int[Array, ""]


def norm_gradient_harmonization(
    num_datasets: int,
    threshold: float = 0.8,
    scope: str = "tensor",
    cap: float = 100.0,
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Norm-based gradient harmonisation (NGH): bring the gradients of a tensor to one norm where their norms disagree.

    With n_k the norm of dataset k's gradient and K datasets, the paper computes

        Psi = 1 / (K (K - 1)) * sum over i != j of 2 n_i n_j / (n_i^2 + n_j^2 + eps)

    and, where Psi < threshold, multiplies gradient k by M / (n_k + eps), M being the mean norm. Choices:

    - A dataset is active for a tensor if it took part in the step and n_k >= 1e-12. K, Psi and M are over the active
      ones; the others, and all of them where fewer than two are active, keep their gradients. A norm that is not finite
      makes its dataset inactive, so that such a gradient reaches the check of the step.
    - The pair term is 2 r / (1 + r^2), r = min / max, which is the term for eps -> 0. With an eps of fixed size three
      equal norms of 1e-7 would read as disagreement.
    - The factor is min(M / n_k, cap), for a nearly zero gradient is mostly noise.
    - With the default threshold two datasets whose norms differ by a factor of 2 keep their gradients, just.

    A threshold of 0 changes no gradient and still records the norms, for runs without harmonisation.

    The transformation is called as `update(grads, state, params=None, *, present, losses=None)`, with leaves of `grads`
    [local, ...] and `present` bool [local], and returns updates of the same shapes, those of absent datasets zero, with
    a `HarmonizationState`. `init` takes the shared parameters themselves, without the dataset axis.

    Args:
        num_datasets: number of datasets on all devices.
        threshold: Psi below which gradients are scaled.
        scope: "tensor" for norms per parameter tensor, "group" for norms per part of the network, "global" for one norm
            over the whole tree.
        cap: largest factor.
        axis_name: mesh axis that further datasets are spread over; None if all are local.
        group_of: group of a parameter by its path, for the scope "group"; the beginning of the path by default
            (`h2a2_jax.balancers.gramian.beginning_of`).

    Raises:
        ValueError: the scope is unknown, or gradients do not hold `num_datasets` datasets.

    References:
        Xie et al., H2A2: Homogeneity-Aware and Heterogeneity-Aware Feature Perception for Unified Indoor 3D Object
        Detection, CVPR 2026.
    """
    check_scope(scope)

    def init(params: PyTree) -> HarmonizationState:
        def full(shape: tuple[int, ...], value: float) -> PyTree:
            if scope == "global":
                return jnp.full(shape, value, jnp.float32)
            return tensor_values(params, jnp.full((count_tensors(params), *shape), value, jnp.float32))

        return HarmonizationState(
            psi=full((), 1.0),
            norms=full((num_datasets,), 0.0),
            scales=full((num_datasets,), 1.0),
            cap_hits=jnp.zeros((), jnp.int32),
        )

    def update(
        grads: PyTree[Float[Array, "local ..."]],
        state: HarmonizationState,
        params: PyTree | None = None,
        *,
        present: Bool[Array, " local"],
        losses: Float[Array, " local"] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Float[Array, "local ..."]], HarmonizationState]:
        del state, params, losses, extra_args
        check_datasets(grads, present, num_datasets, axis_name)
        tensors = count_tensors(grads)
        if not tensors:
            return grads, init(grads)
        own_norms = tensor_norms(grads)
        if scope == "global":
            own_norms = dataset_norms(own_norms)[:, None]
        norms = gather_datasets(jnp.where(present[:, None], own_norms, 0), num_datasets, axis_name)
        groups = group_tensors(grads, scope, group_of)

        compared = norms
        if scope == "group":
            members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
            compared = jnp.stack([dataset_norms(norms[:, own]) for own in members], axis=1)
        psi, scales, capped = _harmonize(compared, threshold, cap)
        if scope == "group":
            psi, scales = psi[groups], scales[:, groups]

        own_scales = local_rows(scales, present.shape[0], axis_name)
        own_scales = jnp.broadcast_to(own_scales, (present.shape[0], tensors))
        updates = jax.tree.map(lambda leaf: keep_present(leaf, present), scale_tensors(grads, own_scales))

        def split(rows: Float[Array, "*shape tensors"]) -> PyTree:
            rows = rows.astype(jnp.float32)
            return rows[..., 0] if scope == "global" else tensor_values(grads, jnp.moveaxis(rows, -1, 0))

        new_state = HarmonizationState(split(psi), split(norms), split(scales), jnp.sum(capped, dtype=jnp.int32))
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def plain_mean() -> optax.GradientTransformationExtraArgs:
    """Leave gradients as they are, but zero those of datasets that took no part in the step.

    The baseline of `benchmarks/harmonize.py`: no state, no norms, no mesh axis.
    """

    def update(
        grads: PyTree[Float[Array, "local ..."]],
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        present: Bool[Array, " local"],
        losses: Float[Array, " local"] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Float[Array, "local ..."]], optax.EmptyState]:
        del params, losses, extra_args
        return jax.tree.map(lambda leaf: keep_present(leaf, present), grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def mean_over_datasets(
    grads: PyTree[Float[Array, "local ..."]], present: Bool[Array, " local"], axis_name: str | None = None
) -> PyTree[Float[Array, "..."]]:
    """Mean of the gradients of the datasets that took part in a step, the same on all devices.

    A dataset that took part counts even if its gradient for a tensor is zero. With none the mean is zero.

    Args:
        grads: gradients with a leading axis of local datasets.
        present: True for the datasets that took part in the step.
        axis_name: mesh axis that further datasets are spread over; None if all are local.

    Returns:
        Gradients without the leading axis.
    """
    count = jnp.sum(present)
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    count = jnp.maximum(count, 1)

    def mean(leaf: Float[Array, "local ..."]) -> Float[Array, "..."]:
        total = jnp.sum(keep_present(leaf, present), axis=0)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        return total / count.astype(total.dtype)

    return jax.tree.map(mean, grads)


def clip_by_global_norm_sharded(
    shared: PyTree[Float[Array, "..."]],
    exclusive: PyTree[Float[Array, "local ..."]],
    max_norm: Float[Array, ""] | float,
    axis_name: str | None = None,
) -> tuple[PyTree[Float[Array, "..."]], PyTree[Float[Array, "local ..."]], Float[Array, ""]]:
    """Scale gradients down to a global norm over the shared ones and the exclusive ones of all datasets.

    As in optax's clipping, a norm that is not finite makes every gradient so.

    Args:
        shared: gradients of shared parameters, the same on all devices.
        exclusive: gradients of the parameters of the local datasets, with a leading dataset axis.
        max_norm: norm above which all gradients are divided by norm / max_norm.
        axis_name: mesh axis that the exclusive gradients are spread over; None if all are local.

    Returns:
        Shared gradients, exclusive gradients, and the norm before clipping.
    """
    shared_norm = _flat_norm([_flat_norm([leaf]) for leaf in jax.tree.leaves(shared)])
    exclusive_norm = _flat_norm([_flat_norm([leaf]) for leaf in jax.tree.leaves(exclusive)])
    if axis_name is not None:
        largest = nonzero(jax.lax.pmax(exclusive_norm, axis_name))
        exclusive_norm = largest * jnp.sqrt(jax.lax.psum((exclusive_norm / largest) ** 2, axis_name))
    norm = _flat_norm([shared_norm, exclusive_norm])
    scale = max_norm / jnp.maximum(norm, max_norm)

    def clip(leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        return leaf * scale.astype(leaf.dtype)

    return jax.tree.map(clip, shared), jax.tree.map(clip, exclusive), norm


def _harmonize(
    norms: Float[Array, "datasets tensors"], threshold: float, cap: float
) -> tuple[Float[Array, " tensors"], Float[Array, "datasets tensors"], Bool[Array, "datasets tensors"]]:
    """Psi and the factor of every gradient, tensor by tensor, and True where the cap limited the factor."""
    active = norms >= SMALLEST_NORM
    norms = jnp.where(active, norms, 1)
    count = jnp.sum(active, axis=0)

    ratio = jnp.minimum(norms[:, None], norms) / jnp.maximum(norms[:, None], norms)
    pairs = active[:, None] & active & ~jnp.eye(norms.shape[0], dtype=bool)[..., None]
    agreement = jnp.sum(jnp.where(pairs, 2 * ratio / (1 + ratio**2), 0), axis=(0, 1))
    psi = jnp.where(count < 2, 1, agreement / jnp.maximum(count * (count - 1), 1))

    mean = jnp.sum(jnp.where(active, norms, 0), axis=0) / jnp.maximum(count, 1)
    harmonized = active & (count >= 2) & (psi < threshold)
    wanted = mean / norms
    return psi, jnp.where(harmonized, jnp.minimum(wanted, cap), 1), harmonized & (wanted > cap)


def _flat_norm(parts: list[Array]) -> Float[Array, ""]:
    """Norm over all numbers of a list of arrays, in at least float32."""
    if not parts:
        return jnp.zeros((), jnp.float32)
    return dataset_norms(jnp.concatenate([part.reshape(1, -1) for part in parts], axis=1))[0]
