"""Layout of a checkpoint: flat dicts of arrays by path, with each dataset's own arrays under its name.

    params        {"shared": {path: array}, "datasets": {name: {path: array}}}
    batch_stats   {name: {path: array}}
    optimizer     {"step": array, "skipped": array, "skipped_in_row": array,
                   "shared": {...}, "datasets": {name: {...}}, "scalars": {...}, "balancer": {...},
                   "agreement": {name: {path: array}}}, the last only where kernel selection measures it
    averages      {"params": {...}, "batch_stats": {...}}, as the first two; only of runs that average their parameters

A path is the array's place in the model, as in "backbone.stem.conv.kernel"; in the optimiser, the path of its state
comes first. A dataset's arrays are its slices, without the dataset axis, and those of its head have the dataset's own
number of outputs and classes. They depend neither on the order of the datasets nor on the other ones.
Gradients accumulated for a step of several batches are not stored: there are none between steps.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from h2a2_jax.balancers import dataset_axes
from h2a2_jax.balancers.packing import leaf_name
from h2a2_jax.checkpoint.train_state import TrainState
from h2a2_jax.models.head import NUM_OUTPUTS
from h2a2_jax.scans.specs import DatasetSpec

Arrays = dict[str, np.ndarray]
"""Arrays by path."""

COUNTERS = ("step", "skipped", "skipped_in_row")
"""Counters of a training state, which the item "optimizer" holds."""


def flat_names(tree: Any) -> list[str]:
    """Paths of the leaves of a tree, in its order."""
    return [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def stored_params(shared: Any, exclusive: Any, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    """The item "params"; the datasets in the order of the dataset axis of the exclusive parameters."""
    return {"shared": host_arrays(shared), "datasets": _by_dataset(host_arrays(exclusive), specs)}


def stored_statistics(stats: Any, specs: Sequence[DatasetSpec]) -> dict[str, Arrays]:
    """The item "batch_stats"."""
    return _by_dataset(host_arrays(stats), specs)


def stored_state(state: TrainState, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    """All items of a training state, by name."""
    exclusive = host_arrays(state.exclusive_optimizer)
    items: dict[str, Any] = {
        "params": stored_params(state.shared, state.exclusive, specs),
        "batch_stats": stored_statistics(state.stats, specs),
        "optimizer": {
            **{name: _host_array(getattr(state, name)) for name in COUNTERS},
            "shared": host_arrays(state.shared_optimizer),
            "datasets": _by_dataset({path: array for path, array in exclusive.items() if array.ndim}, specs),
            "scalars": {path: array for path, array in exclusive.items() if not array.ndim},
            "balancer": host_arrays(state.balancer),
        },
    }
    if state.agreement is not None:
        items["optimizer"]["agreement"] = _by_dataset(host_arrays(state.agreement), specs)
    if (averages := state.averages) is not None:
        items["averages"] = {
            "params": stored_params(averages.shared, averages.exclusive, specs),
            "batch_stats": stored_statistics(averages.stats, specs),
        }
    return items


def checksum(item: Any) -> int:
    """CRC-32 of the arrays of an item and of their names, dtypes and shapes."""

    def updated(value: int, name: str, item: Any) -> int:
        if isinstance(item, Mapping):
            for key in sorted(item):
                value = updated(value, f"{name}/{key}", item[key])
            return value
        array = np.asarray(item)
        value = zlib.crc32(f"{name} {describe_array(array)}".encode(), value)
        return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)

    return updated(0, "", item)


def describe_array(array: Any) -> str:
    """Dtype and shape of an array, as in "float32[27,3,4]"."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def stacked(stored: Mapping[str, Arrays], names: Sequence[str]) -> Arrays:
    """Stack the datasets' arrays on a leading axis; outputs of heads are padded with zeros to those of a model."""

    def padded(path: str) -> list[np.ndarray]:
        arrays = [stored[name][path] for name in names]
        if not _is_of_head(path):
            return arrays
        widest = NUM_OUTPUTS if _is_of_boxes(path) else max(array.shape[-1] for array in arrays)
        return [np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, widest - a.shape[-1])]) for a in arrays]

    return {path: np.stack(padded(path)) for path in stored[names[0]]}


def reordered_balancer(stored: Arrays, like: Any, saved: Sequence[str], names: Sequence[str]) -> Arrays:
    """Reorder the dataset axes of a balancer's arrays from the order `saved` to the order `names`.

    A balancer that does not declare which of its arrays have such axes starts anew.
    """
    if list(saved) == list(names):
        return stored
    axes = dataset_axes(like)
    if axes is None:
        return host_arrays(like)
    rows = [list(saved).index(name) for name in names]
    leading = dict(zip(flat_names(like), jax.tree.leaves(axes), strict=True))

    def moved(array: np.ndarray, axes: int) -> np.ndarray:
        for axis in range(axes):
            array = np.take(array, rows, axis)
        return array

    return {path: moved(array, leading.get(path, 0)) for path, array in stored.items()}


def differences(stored: Mapping[str, np.ndarray], like: Any) -> list[str]:
    """List the differences in name, shape or dtype between stored arrays and a tree, one phrase each."""
    ours = {path: describe_array(leaf) for path, leaf in zip(flat_names(like), jax.tree.leaves(like), strict=True)}
    theirs = {path: describe_array(array) for path, array in stored.items()}
    return [
        f"{path} is {theirs.get(path, 'nothing')} in the checkpoint and {ours.get(path, 'nothing')} here"
        for path in [*ours, *(path for path in theirs if path not in ours)]
        if theirs.get(path) != ours.get(path)
    ]


def filled(like: Any, stored: Arrays) -> Any:
    """Replace the leaves of a tree by the stored arrays, each on the devices of its leaf."""

    def place(array: np.ndarray, like: Any) -> jax.Array:
        sharding = getattr(like, "sharding", None)
        if sharding is None or not getattr(like, "committed", True):
            # Uncommitted, so that JAX may move it to where other arguments are; jnp.array would compile a program.
            return jax.device_put(np.asarray(array))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, map(place, [stored[name] for name in flat_names(like)], leaves))


def host_arrays(tree: Any) -> Arrays:
    """Copy the leaves of a tree to the host, by path."""
    return dict(zip(flat_names(tree), map(_host_array, jax.tree.leaves(tree)), strict=True))


def _host_array(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.array(multihost_utils.process_allgather(leaf, tiled=True))
    # A copy: on a CPU the array itself is a view of memory that the next step may reuse.
    return np.array(leaf)


def _by_dataset(arrays: Arrays, specs: Sequence[DatasetSpec]) -> dict[str, Arrays]:
    """Slices of stacked arrays by dataset name, without the padding of heads."""

    def unpadded(path: str, array: np.ndarray, spec: DatasetSpec) -> np.ndarray:
        if not _is_of_head(path):
            return array
        return array[..., : spec.num_outputs if _is_of_boxes(path) else spec.num_classes]

    return {
        spec.name: {path: unpadded(path, array[row], spec) for path, array in arrays.items()}
        for row, spec in enumerate(specs)
    }


def _is_of_head(path: str) -> bool:
    """Return True for a parameter of a head whose last axis the model pads: classes to the widest head's number."""
    *_, part, name = ["", *path.split(".")]
    return part == "heads" and name.startswith(("box_", "class_"))


def _is_of_boxes(path: str) -> bool:
    return path.split(".")[-1].startswith("box_")
