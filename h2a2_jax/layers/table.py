"""Table of a model's layers, with what each takes and returns."""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from flax import nnx

from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import SparseTensor


def tabulate(model: nnx.Module, *args: Any, row_filter: Callable[[Any], bool] | None = None, **options: Any) -> str:
    """Table of the layers of a model that is called on sparse tensors and maps, by `nnx.tabulate`.

    Flax lays out lists, tuples and dictionaries; at several arguments of which one is a dataclass it stops with an
    AssertionError. Here a tensor is written as "float32[512,16] at stride 2", a map as "strided, 27 offsets, stride
    1 to 2". Linen's own `tabulate` needs no such help.

    Args:
        model: model, or a layer.
        args: arguments of its call.
        row_filter: rows to show, as in `nnx.tabulate`; None for the calls of modules without their other methods.
        options: keyword arguments of `nnx.tabulate` or of the call.

    Returns:
        The table as text.
    """
    paths = {path for path, _ in nnx.iter_modules(model)}
    classes = {type(part): dict(vars(type(part))) for _, part in nnx.iter_graph(model) if isinstance(part, nnx.Pytree)}
    shown = row_filter or (lambda row: row.path in paths)
    private = "_maybe_pytree_to_dict"
    outline = getattr(nnx.summary, private)
    setattr(nnx.summary, private, _outline)
    try:
        return nnx.tabulate(model, *args, row_filter=shown, **options)
    finally:
        setattr(nnx.summary, private, outline)
        for cls, own in classes.items():  # after an error Flax leaves its wrappers in place of all methods
            for name, value in list(vars(cls).items()):
                if name not in own:
                    delattr(cls, name)
                elif value is not own[name]:
                    setattr(cls, name, own[name])


def _outline(tree: Any) -> Any:
    """Lists, dictionaries and texts of a pytree whose leaves Flax has made texts."""
    if isinstance(tree, SparseTensor):
        return f"{tree.features} at stride {tree.sites.stride}"
    if isinstance(tree, KernelMap):
        volume = str(tree.neighbors).partition("][")[2].partition(",")[0]
        return f"{tree.kind}, {volume} offsets, stride {tree.inputs.stride} to {tree.outputs.stride}"
    if isinstance(tree, dict):
        return {key: _outline(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_outline(value) for value in tree]
    return type(tree).__name__ if is_dataclass(tree) else tree
