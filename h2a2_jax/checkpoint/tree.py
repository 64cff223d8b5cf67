"""What is stored of a state, under which names: flat dicts of arrays, what is a dataset's own under its name.

    params        {"shared": {path: array}, "datasets": {name: {path: array}}}
    batch_stats   {name: {path: array}}
    optimizer     {"step": array, "skipped": array, "skipped_in_row": array,
                   "shared": {...}, "datasets": {name: {...}}, "scalars": {...}, "balancer": {...}}
    averages      {"params": {...}, "batch_stats": {...}}, as the first two; only of runs that average their parameters

A path is where the array is found in the model, as in "backbone.stem.conv.kernel"; in the optimiser, the path of its
state comes first. A dataset's arrays are its slices, without the dataset axis, and those of its head have the dataset's
own number of outputs and classes. So what is stored of a dataset depends neither on the order nor on the others.
Gradients on their way to a step of several batches are not stored: there are none between steps.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from h2a2_jax.balancers import has_dataset_axis
from h2a2_jax.checkpoint.train_state import Averages, TrainState
from h2a2_jax.scans.specs import DatasetSpec

Arrays = dict[str, np.ndarray]


def flat_names(tree: Any) -> list[str]:
    """Paths of the leaves of a tree, in its order."""
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def stored_params(shared: Any, exclusive: Any, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    """The item "params"; `specs` in the order of the dataset axis."""
    return {"shared": _host_arrays(shared), "datasets": _by_dataset(_host_arrays(exclusive), specs)}


def stored_statistics(stats: Any, specs: Sequence[DatasetSpec]) -> dict[str, Arrays]:
    """The item "batch_stats"."""
    return _by_dataset(_host_arrays(stats), specs)


def stored_optimizer(state: TrainState, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    """The item "optimizer"."""
    own = _host_arrays(state.exclusive_optimizer)
    return {
        "step": _host_array(state.step),
        "skipped": _host_array(state.skipped),
        "skipped_in_row": _host_array(state.skipped_in_row),
        "shared": _host_arrays(state.shared_optimizer),
        "datasets": _by_dataset({k: v for k, v in own.items() if v.ndim}, specs),
        "scalars": {k: v for k, v in own.items() if not v.ndim},
        "balancer": _host_arrays(state.balancer),
    }


def stored_averages(averages: Averages, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    """The item "averages"."""
    return {
        "params": stored_params(averages.shared, averages.exclusive, specs),
        "batch_stats": stored_statistics(averages.stats, specs),
    }


def checksum(item: Any) -> int:
    """CRC-32 of an item's arrays and their names: Orbax does not notice a bit that a disk turned."""
    value = 0
    for name, array in _arrays("", item):
        value = zlib.crc32(f"{name} {_form(array)}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value


def _arrays(name: str, item: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of nested dicts with their names, in the order of these."""
    if not isinstance(item, Mapping):
        yield name, np.asarray(item)
        return
    for key in sorted(item):
        yield from _arrays(f"{name}/{key}", item[key])


def stacked(stored: Mapping[str, Arrays], names: Sequence[str], like: Any) -> Arrays:
    """The datasets' arrays with a leading dataset axis in the order of `names`, outputs of heads padded with zeros.

    Args:
        stored: by dataset name.
        names: of the datasets.
        like: tree that has the padded shapes.
    """
    widths = {_name(path): leaf.shape[-1:] for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}

    def padded(path: str, array: np.ndarray) -> np.ndarray:
        if _head_part(path) is None or path not in widths:
            return array
        missing = max(widths[path][0] - array.shape[-1], 0)
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])

    return {path: np.stack([padded(path, stored[name][path]) for name in names]) for path in stored[names[0]]}


def reordered_balancer(stored: Arrays, like: Any, saved: Sequence[str], names: Sequence[str]) -> Arrays:
    """The balancer's arrays where the dataset axis has another order than when they were saved.

    A balancer of which it is not known which arrays have that axis starts anew.
    """
    if list(saved) == list(names):
        return stored
    marked = has_dataset_axis(like)
    if marked is None:
        return _host_arrays(like)
    rows = [list(saved).index(name) for name in names]
    moved = {path for path, has_axis in zip(flat_names(like), jax.tree.leaves(marked), strict=True) if has_axis}
    return {path: array[rows] if path in moved else array for path, array in stored.items()}


def differences(stored: Mapping[str, np.ndarray], like: Any) -> list[str]:
    """How stored arrays differ in name, shape or type from a tree's, one phrase each."""
    expected = dict(zip(flat_names(like), jax.tree.leaves(like), strict=True))
    found = []
    for path in [*expected, *(path for path in stored if path not in expected)]:
        ours = _form(expected[path]) if path in expected else "nothing"
        theirs = _form(stored[path]) if path in stored else "nothing"
        if ours != theirs:
            found.append(f"{path} is {theirs} in the checkpoint and {ours} here")
    return found


def filled(like: Any, stored: Arrays) -> Any:
    """The tree with the stored arrays in place of its leaves, each where the leaf lies."""
    leaves, structure = jax.tree.flatten(like)
    arrays = [_placed(stored[name], leaf) for name, leaf in zip(flat_names(like), leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jnp.array(array)  # where JAX puts it: left free to go with others
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _name(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path]
    return ".".join(keys[:-1] if keys[-1] == "value" else keys)  # a Flax variable holds its array as `value`


def _host_arrays(tree: Any) -> Arrays:
    return dict(zip(flat_names(tree), map(_host_array, jax.tree.leaves(tree)), strict=True))


def _host_array(leaf: Any) -> np.ndarray:
    """A copy: on a CPU the array itself is a view of memory that the next step may reuse."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.array(multihost_utils.process_allgather(leaf, tiled=True))
    return np.array(leaf)


def _by_dataset(arrays: Arrays, specs: Sequence[DatasetSpec]) -> dict[str, Arrays]:
    def own(path: str, array: np.ndarray, spec: DatasetSpec) -> np.ndarray:
        width = _head_part(path)
        return array if width is None else array[..., : width(spec)]

    return {
        spec.name: {path: own(path, array[row], spec) for path, array in arrays.items()}
        for row, spec in enumerate(specs)
    }


def _head_part(path: str) -> Callable[[DatasetSpec], int] | None:
    """For a parameter of a head, what gives its number of outputs; its last axis is padded in the model."""
    *_, module, parameter = ("", *path.split("."))
    if module != "heads":
        return None
    return (lambda spec: spec.num_outputs) if parameter.startswith("box_") else (lambda spec: spec.num_classes)


def _form(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
