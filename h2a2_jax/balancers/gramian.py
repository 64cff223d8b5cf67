"""Balancers that need only the Gramian of the datasets' gradients: their dot products, K x K numbers.

Such a method makes one combination sum_k w_k g_k of the datasets' gradients, with weights that are a function of the
dot products. `gramian_balancer` turns that function into a transformation:

    gradients of the own datasets  ->  dot products of a share of the numbers, of all datasets  ->  sum over devices
    own gradients times own factors  <-  weights, on every device the same  <-  Gramian [K, K]

On n devices each one receives 1/n of every dataset's gradient (an all-to-all) and forms that part of the dot products.
A device sends and receives (n - 1) / n of the gradients that it holds, half of what an all-reduce of them moves, and no
gradient is gathered. With all datasets on one device the Gramian is a matrix product.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from h2a2_jax.balancers.dataset_axis import (
    SMALLEST_NORM,
    check_datasets,
    gather_datasets,
    keep_present,
    local_rows,
    nonzero,
)
from h2a2_jax.balancers.packing import Packed, count_tensors, name_tensors, scale_tensors

Scope = Literal["global", "group", "tensor"]
"""Gradients that a balancer takes as one vector: all shared parameters, those of a part of the network, or a tensor."""


class Situation(NamedTuple):
    """The facts by which a method weighs the gradients of one group in one step.

    Attributes:
        gramian: [K, K], dot products in units of the largest norm, so that the largest number on the diagonal is 1;
            zero for datasets that are not active.
        active: bool [K], True for the datasets that took part with a finite gradient of a norm of at least 1e-12.
        unit: [], the largest norm.
        key: random key of the step, the same for all groups.
        memory: the method's memory of this group, of the shape that it was created with; () for a method without.
    """

    gramian: Float[Array, "datasets datasets"]
    active: Bool[Array, " datasets"]
    unit: Float[Array, ""]
    key: Key[Array, ""]
    memory: Any


class GramianState(NamedTuple):
    """State of a balancer that needs the Gramian; equal on every device.

    Attributes:
        steps: number of steps done, int32; with the seed it gives the random numbers of the next step.
        scales: float32 [K], factors that the last step multiplied the gradients by, or [K, T] with T tensors in scopes
            other than "global"; 1 before the first step.
        memory: float32 [K, K] or, in scopes other than "global", [K, K, G], the memory of a method that has one, such
            as the similarities of GradVac; () otherwise.
    """

    steps: Int[Array, ""]
    scales: Float[Array, "datasets *tensors"]
    memory: Any = ()


Weigh = Callable[[Situation], Array]
"""Weights [K] of a situation; those of datasets that are not active do not count."""
Remember = Callable[[Situation], tuple[Array, Array]]
"""Weights [K] of a situation and the memory [K, K] for the next one."""


def gramian_balancer(
    weigh: Weigh | Remember,
    num_datasets: int,
    *,
    scope: Scope = "global",
    axis_name: str | None = None,
    group_of: Callable[[str], str] | None = None,
    sums: bool = False,
    remembers: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Transformation of a method that weighs gradients by their Gramian.

    It is called as `update(grads, state, params=None, *, present, losses=None)`, with leaves of `grads` [local, ...]
    and `present` bool [local], and returns the gradients times factors, those of absent datasets zero, with a
    `GramianState`. `mean_over_datasets` of the result is the combination sum_k w_k g_k. `init` takes the shared
    parameters, without the dataset axis.

    Choices that all methods share:

    - A dataset is active in a group if it took part in the step with a finite gradient of a norm of at least 1e-12. The
      method sees the active datasets only, the others keep their gradients, and with fewer than two active ones all
      do. So a gradient that is not finite reaches the check of the step.
    - A method whose weights have the sum 1 without conflicts gets factors of n w_k, n the number of active datasets,
      one that sums gradients up (`sums`) factors of w_k: gradients that nothing speaks against keep a factor of 1. A
      gradient of zero counts in the mean, as in NGH.
    - Norms, their squares and dot products are formed of gradients divided by each one's largest number, in at least
      float32 and with full precision; weights do not depend on the unit of the gradients.
    - Should a method find a weight that is not finite, the gradients of the group keep a factor of 1.

    Args:
        weigh: weights of a situation, with the new memory if it `remembers`; traced under `jax.vmap` over groups.
        num_datasets: number of datasets on all devices.
        scope: "global" weighs the gradients of all parameters as one vector, "tensor" those of each tensor for itself,
            "group" those of each part of the network.
        axis_name: mesh axis that further datasets are spread over; None if all are local.
        group_of: group of a parameter by its path, such as "backbone.stem.conv.kernel", for the scope "group"; the
            beginning of the path by default (`beginning_of`).
        sums: True if the method's combination is a sum of gradients rather than a mean.
        remembers: True if the method has a memory, zero at the start.
        seed: seed of the method's random numbers.

    Raises:
        ValueError: the scope is unknown, or gradients do not hold `num_datasets` datasets.
    """
    check_scope(scope)

    def init(params: PyTree) -> GramianState:
        whole = scope == "global"
        tensors = () if whole else (count_tensors(params),)
        memory: Any = ()
        if remembers:
            groups = () if whole else (_count(group_tensors(params, scope, group_of)),)
            memory = jnp.zeros((num_datasets, num_datasets, *groups), jnp.float32)
        return GramianState(jnp.zeros((), jnp.int32), jnp.ones((num_datasets, *tensors), jnp.float32), memory)

    def update(
        grads: PyTree[Float[Array, "local ..."]],
        state: GramianState,
        params: PyTree | None = None,
        *,
        present: Bool[Array, " local"],
        losses: Float[Array, " local"] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Float[Array, "local ..."]], GramianState]:
        del params, losses, extra_args
        check_datasets(grads, present, num_datasets, axis_name)
        if not count_tensors(grads):
            return grads, state
        groups = group_tensors(grads, scope, group_of)
        gramians, active, unit = relative_gramians(grads, present, groups, num_datasets, axis_name)
        key = jax.random.fold_in(jax.random.key(seed), state.steps)
        memory = state.memory
        if remembers:
            memory = jnp.moveaxis(jnp.reshape(memory, (num_datasets, num_datasets, -1)), -1, 0)

        # Accelerators would round the factors of small products, too.
        with jax.default_matmul_precision("highest"):
            found = jax.vmap(weigh, in_axes=(Situation(0, 0, 0, None, 0),))(  # type: ignore[arg-type]
                Situation(gramians, active, unit, key, memory)
            )
        weights: Any
        after: Any
        weights, after = found if remembers else (found, ())
        count = jnp.sum(active, axis=1, keepdims=True)
        factors = weights if sums else weights * count
        usable = (count >= 2) & jnp.all(jnp.isfinite(factors) | ~active, axis=1, keepdims=True)
        factors = jnp.where(active & usable, factors, 1)  # [G, K]
        if remembers:
            kept = jnp.where(usable[..., None] & active[:, None] & active[:, :, None], after, memory)
            after = jnp.moveaxis(kept, 0, -1).astype(jnp.float32).reshape(state.memory.shape)

        scales = factors.T[:, groups]
        own = local_rows(scales, present.shape[0], axis_name)
        updates = jax.tree.map(lambda leaf: keep_present(leaf, present), scale_tensors(grads, own))
        recorded = (scales[:, 0] if scope == "global" else scales).astype(jnp.float32)
        return updates, GramianState(state.steps + 1, recorded, after)

    return optax.GradientTransformationExtraArgs(init, update)


def check_scope(scope: str) -> None:
    """Check a scope.

    Raises:
        ValueError: it is unknown.
    """
    if scope not in ("tensor", "group", "global"):
        raise ValueError(
            f'scope is {scope!r}; choose "tensor" (each parameter tensor for itself), "group" (each part of the'
            ' network) or "global" (all shared parameters together)'
        )


def beginning_of(path: str) -> str:
    """Beginning of a parameter's path that names a part of the network: two names, and a number behind them.

    "backbone.stages.0.1.conv.kernel" gives "backbone.stages.0", "head.weight" gives "head", "weight" itself.
    """
    names = path.split(".")
    end = 3 if len(names) > 3 and names[2].isdecimal() else 2
    return ".".join(names[: min(end, max(len(names) - 1, 1))])


def group_tensors(tree: PyTree, scope: str, group_of: Callable[[str], str] | None = None) -> np.ndarray:
    """Group of each tensor of a plain or packed tree, int32 [T], counted in the order of their first tensors."""
    tensors = count_tensors(tree)
    if scope != "group":
        return np.zeros(tensors, np.int32) if scope == "global" else np.arange(tensors, dtype=np.int32)
    numbers: dict[str, int] = {}
    names = [(group_of or beginning_of)(name) for name in name_tensors(tree)]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)


def relative_gramians(
    grads: PyTree[Float[Array, "local ..."]],
    present: Bool[Array, " local"],
    groups: np.ndarray,
    num_datasets: int,
    axis_name: str | None = None,
) -> tuple[Float[Array, "groups datasets datasets"], Bool[Array, "groups datasets"], Float[Array, " groups"]]:
    """Gramians of the groups, the active datasets and the unit of each, as `Situation` describes them.

    Args:
        grads: plain or packed tree of gradients.
        present: True for the datasets that took part in the step.
        groups: group of each tensor (`group_tensors`).
        num_datasets: number of datasets on all devices.
        axis_name: mesh axis that further datasets are spread over; None if all are local.
    """
    count = _count(groups)
    parts = [(keep_present(part, present), rows) for part, rows in _parts(grads, groups)]
    dtype = jnp.result_type(jnp.float32, *[part for part, _ in parts])
    # Squares of gradients near 1e-20 vanish in float32 and those near 1e20 overflow.
    largest = jnp.concatenate([jnp.max(jnp.abs(part), axis=2, initial=0).astype(dtype) for part, _ in parts], axis=1)
    largest = jax.ops.segment_max(largest.T, np.concatenate([rows for _, rows in parts]), count).T
    largest = gather_datasets(largest, num_datasets, axis_name)
    divisor = nonzero(largest)

    dots, places = [], []
    for part, rows in parts:
        if len(rows) == 1:  # one group: a matrix product of all its numbers
            numbers = _share(part[:, 0], axis_name).astype(dtype) / divisor[:, rows[0], None]
            dots.append(jnp.matmul(numbers, numbers.T, precision=jax.lax.Precision.HIGHEST)[None])
            places.append(jnp.asarray(rows))
            continue
        numbers, own = _share(part, axis_name).astype(dtype), _share_of_rows(rows, axis_name)
        numbers = numbers / divisor[:, own, None]
        dots.append(jnp.einsum("irc,jrc->rij", numbers, numbers, precision=jax.lax.Precision.HIGHEST))
        places.append(own)
    gramians = jax.ops.segment_sum(jnp.concatenate(dots), jnp.concatenate(places), count)
    if axis_name is not None:
        gramians = jax.lax.psum(gramians, axis_name)

    relative = jnp.sqrt(jnp.diagonal(gramians, axis1=1, axis2=2))
    norms = relative * largest.T
    active = (norms >= SMALLEST_NORM) & jnp.isfinite(norms)
    unit = jnp.max(jnp.where(active, norms, 0), axis=1)
    # Cosines first: neither squares of norms nor their products leave the range.
    relative = jnp.where(active, relative, 1)
    cosines = gramians / (relative[:, :, None] * relative[:, None])
    ratios = jnp.where(active, norms, 0) / nonzero(unit)[:, None]
    products = cosines * ratios[:, :, None] * ratios[:, None]
    return jnp.where(active[:, :, None] & active[:, None], products, 0), active, unit


def _count(groups: np.ndarray) -> int:
    return int(groups.max(initial=-1)) + 1


def _parts(grads: PyTree, groups: np.ndarray) -> list[tuple[Array, np.ndarray]]:
    """Gradients as arrays [local, rows, columns], with the group of each row; one row where there is one group."""
    if not isinstance(grads, Packed):
        leaves = jax.tree.leaves(grads)
        return [(leaf.reshape(len(leaf), 1, -1), groups[i : i + 1]) for i, leaf in enumerate(leaves)]
    packing, parts = grads.packing, []
    for key, members in packing.members.items():
        array, own = grads.arrays[key], groups[np.array(members)]
        if len(np.unique(own)) == 1:
            parts.append((array.reshape(len(array), 1, -1), own[:1]))
        else:
            parts.append((array, own[packing.rows(key)]))
    return parts


def _share(part: Float[Array, "local rows ..."], axis_name: str | None) -> Float[Array, "datasets share ..."]:
    """This device's share of the second axis, of all datasets; the axis is padded with zeros to equal shares."""
    if axis_name is None:
        return part
    padding = -part.shape[1] % jax.lax.axis_size(axis_name)
    part = jnp.pad(part, [(0, 0), (0, padding), *[(0, 0)] * (part.ndim - 2)])
    return jax.lax.all_to_all(part, axis_name, split_axis=1, concat_axis=0, tiled=True)


def _share_of_rows(rows: np.ndarray, axis_name: str | None) -> Int[Array, " share"]:
    """Groups of the rows that `_share` gives to this device; rows of padding, which are zero, count for the last."""
    if axis_name is None:
        return jnp.asarray(rows)
    share = -(-len(rows) // jax.lax.axis_size(axis_name))
    padded = np.pad(rows, (0, share * jax.lax.axis_size(axis_name) - len(rows)), mode="edge")
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(padded), jax.lax.axis_index(axis_name) * share, share)
