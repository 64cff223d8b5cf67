"""Trees of many small arrays in a few large ones, and what is computed of each tensor in them.

A detector has hundreds of small parameters. XLA compiles the arithmetic of an update, and of the norms of gradients,
for each array apart, which takes most of a step's compile time; packed, the arrays of one kind are compiled as one.

    tree  ->  `Packed`, arrays by name:  "packed.<kind>"  [..., R, 128], all small arrays of a kind, each from a row on
                                         <path>           an array that is large, or of no kind, as it is

Rows end in zeros where an array does not fill them. The functions take plain trees as well as packed ones. Tensors are
counted in the order of the plain tree.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from h2a2_jax.balancers.dataset_axis import dataset_norms, nonzero, per_dataset

ROW = 128
"""Numbers in a row."""
LARGEST = 1 << 16
"""Numbers of the largest array that is packed: copying larger ones would take longer than compiling them does."""
Kind = Callable[[str], str | None]
"""Kind of the array of a name; arrays of one kind are packed together, those of None stay as they are."""


@dataclass(frozen=True)
class Packing:
    """Places of a tree's arrays in a packed tree.

    Attributes:
        structure: structure of the tree.
        shapes: shape of each array, without axes that all of them have in front.
        keys: name in the packed tree of each array, or of the one that it is packed into.
        alone: True for each array that is not packed.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    keys: tuple[str, ...]
    alone: tuple[bool, ...]

    @classmethod
    def of(cls, tree: PyTree, kind: Kind, axes: int = 0) -> "Packing":
        """Packing of a tree of arrays, the first `axes` axes of which all arrays have."""
        with_paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        keys, alone, shapes = [], [], []
        for path, leaf in with_paths:
            name, shape = leaf_name(path), tuple(leaf.shape[axes:])
            found = kind(name) if math.prod(shape) <= LARGEST else None
            # Arrays of several types are packed apart; the kind ends the name, as in that of a parameter.
            keys.append(name if found is None else f"packed.{leaf.dtype}.{found}")
            alone.append(found is None)
            shapes.append(shape)
        return cls(structure, tuple(shapes), tuple(keys), tuple(alone))

    @cached_property
    def members(self) -> dict[str, list[int]]:
        """Numbers of the tensors in each array of the packed tree, by its name."""
        found: dict[str, list[int]] = {}
        for i, key in enumerate(self.keys):
            found.setdefault(key, []).append(i)
        return found

    def rows(self, key: str) -> np.ndarray:
        """Tensor of each row of a packed array, counted within the array; int32 [R]."""
        counts = [-(-math.prod(self.shapes[i]) // ROW) for i in self.members[key]]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def is_alone(self, key: str) -> bool:
        """Return True for an array that is not packed."""
        return self.alone[self.members[key][0]]

    def pack(self, tree: PyTree) -> "Packed | PackedValues":
        """Pack a tree of this structure: arrays of its shapes behind any axes, or values of each tensor."""
        leaves = self.structure.flatten_up_to(tree)
        axes = {leaf.ndim - len(shape) for leaf, shape in zip(leaves, self.shapes, strict=True)}
        numpy = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        if len(axes) > 1 or any(leaf.shape[max(axes) :] != s for leaf, s in zip(leaves, self.shapes, strict=True)):
            return PackedValues(numpy.stack(leaves), self)
        lead = leaves[0].shape[: axes.pop()] if leaves else ()

        def packed(members: list[int]) -> Any:
            parts = []
            for i in members:
                size = math.prod(self.shapes[i])
                parts.append(leaves[i].reshape(*lead, size))
                if size % ROW:
                    parts.append(numpy.zeros((*lead, -size % ROW), leaves[i].dtype))
            return numpy.concatenate(parts, -1).reshape(*lead, -1, ROW)

        return Packed(
            {k: leaves[m[0]] if self.is_alone(k) else packed(m) for k, m in self.members.items()},
            self,
        )


@jax.tree_util.register_pytree_with_keys_class
class Packed:
    """A packed tree; itself a tree of arrays, whose names tell the kinds of what is packed.

    Attributes:
        arrays: arrays by name.
        packing: places in them.
    """

    def __init__(self, arrays: dict[str, Any], packing: Packing):
        self.arrays, self.packing = arrays, packing

    def unpack(self) -> PyTree:
        """The plain tree."""
        leaves: list[Any] = [None] * len(self.packing.shapes)
        for key, members in self.packing.members.items():
            array = self.arrays[key]
            if self.packing.is_alone(key):
                leaves[members[0]] = array
                continue
            lead, start = array.shape[:-2], 0
            flat = array.reshape(*lead, -1)
            for i in members:
                shape = self.packing.shapes[i]
                size = math.prod(shape)
                leaves[i] = flat[..., start : start + size].reshape(*lead, *shape)
                start += -(-size // ROW) * ROW
        return jax.tree.unflatten(self.packing.structure, leaves)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Packing]:
        """Arrays with their names."""
        return [(jax.tree_util.DictKey(key), self.arrays[key]) for key in self.packing.members], self.packing

    @classmethod
    def tree_unflatten(cls, packing: Packing, arrays: Any) -> "Packed":
        """Packed tree of arrays, or of anything in their place."""
        return cls(dict(zip(packing.members, arrays, strict=True)), packing)


@jax.tree_util.register_pytree_with_keys_class
class PackedValues:
    """A tree with a small array for each tensor, all of one shape, as one array.

    Attributes:
        values: [T, ...], values of each tensor.
        packing: packing of the tensors.
    """

    def __init__(self, values: Any, packing: Packing):
        self.values, self.packing = values, packing

    def unpack(self) -> PyTree:
        """The plain tree."""
        return jax.tree.unflatten(self.packing.structure, list(self.values))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Packing]:
        """The values."""
        return [(jax.tree_util.GetAttrKey("values"), self.values)], self.packing

    @classmethod
    def tree_unflatten(cls, packing: Packing, values: Any) -> "PackedValues":
        """Values, or anything in their place."""
        (array,) = values
        return cls(array, packing)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Path of a leaf, as in "backbone.stem.conv.kernel"."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path]
    return ".".join(keys[:-1] if keys[-1:] == ["value"] else keys)  # a Flax variable holds its array as `value`


def is_packed(node: Any) -> bool:
    """Return True for a packed tree or packed values."""
    return isinstance(node, Packed | PackedValues)


def unpack(tree: PyTree) -> PyTree:
    """Replace all that is packed in a tree by plain trees."""
    return jax.tree.map(lambda node: node.unpack() if is_packed(node) else node, tree, is_leaf=is_packed)


def pack_like(packed: PyTree, tree: PyTree) -> PyTree:
    """Pack the parts of a tree that are packed in another one of the same contents."""
    return jax.tree.map(
        lambda node, part: node.packing.pack(part) if is_packed(node) else part, packed, tree, is_leaf=is_packed
    )


def tensor_norms(grads: PyTree[Float[Array, "local ..."]]) -> Float[Array, "local tensors"]:
    """Norm of each dataset's gradient for each tensor, in at least float32 (`dataset_norms`)."""
    if not isinstance(grads, Packed):
        return jnp.stack([dataset_norms(leaf) for leaf in jax.tree.leaves(grads)], axis=1)
    packing, columns, order = grads.packing, [], []
    for key, members in packing.members.items():
        grad = grads.arrays[key]
        columns.append(
            dataset_norms(grad)[:, None] if packing.is_alone(key) else _norms_by_row(grad, packing.rows(key))
        )
        order += members
    return jnp.concatenate(columns, axis=1)[:, np.argsort(order)]


def _norms_by_row(grad: Float[Array, "local rows 128"], tensor: np.ndarray) -> Float[Array, "local tensors"]:
    """Norms of the tensors of a packed array, as `dataset_norms` computes them."""
    grad = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
    count = int(tensor[-1]) + 1
    largest = jax.ops.segment_max(jnp.abs(grad).max(-1).T, tensor, count, indices_are_sorted=True).T
    squares = ((grad / nonzero(largest)[:, tensor][..., None]) ** 2).sum(-1)
    return largest * jnp.sqrt(jax.ops.segment_sum(squares.T, tensor, count, indices_are_sorted=True).T)


def scale_tensors(
    grads: PyTree[Float[Array, "local ..."]], scales: Float[Array, "local tensors"]
) -> PyTree[Float[Array, "local ..."]]:
    """Multiply each dataset's gradient for each tensor by a factor."""
    if not isinstance(grads, Packed):
        leaves, structure = jax.tree.flatten(grads)
        scaled = [leaf * per_dataset(scales[:, i], leaf) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, scaled)
    packing, arrays = grads.packing, {}
    for key, members in packing.members.items():
        grad, own = grads.arrays[key], scales[:, np.array(members)]
        factors = per_dataset(own[:, 0], grad) if packing.is_alone(key) else own[:, packing.rows(key), None]
        arrays[key] = grad * factors.astype(grad.dtype)
    return Packed(arrays, packing)


def tensor_values(like: PyTree, values: Num[Array, "tensors ..."]) -> PyTree[Num[Array, "..."]]:
    """Values of each tensor as a tree like another one, packed where that is."""
    if isinstance(like, Packed):
        return PackedValues(values, like.packing)
    return jax.tree.unflatten(jax.tree.structure(like), [values[i] for i in range(len(values))])


def count_tensors(tree: PyTree) -> int:
    """Number of tensors in a plain or packed tree."""
    return len(tree.packing.shapes) if isinstance(tree, Packed) else len(jax.tree.leaves(tree))


def name_tensors(tree: PyTree) -> list[str]:
    """Paths of the tensors in a plain or packed tree."""
    plain = tree
    if isinstance(tree, Packed):
        plain = jax.tree.unflatten(tree.packing.structure, range(count_tensors(tree)))
    return [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(plain)[0]]


def with_tensors(tree: PyTree, tensors: Mapping[str, Array]) -> PyTree:
    """Replace tensors of a plain or packed tree, by their paths; packed arrays that hold none of them stay as they are.

    Raises:
        KeyError: the tree has no tensor of a name.
    """
    names = name_tensors(tree)
    if unknown := tensors.keys() - set(names):
        raise KeyError(f"no tensor {sorted(unknown)[0]!r}; there are {', '.join(names[:5])}, ...")
    leaves, structure = jax.tree.flatten(unpack(tree))
    replaced = [tensors.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    whole = jax.tree.unflatten(structure, replaced)
    if not isinstance(tree, Packed):
        return whole
    packed = tree.packing.pack(whole)
    assert isinstance(packed, Packed)
    touched = {key for key, name in zip(tree.packing.keys, names, strict=True) if name in tensors}
    return Packed({k: packed.arrays[k] if k in touched else tree.arrays[k] for k in tree.packing.members}, tree.packing)
