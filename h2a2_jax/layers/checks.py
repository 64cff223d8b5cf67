"""Refusal of inputs that do not fit a layer, each in one sentence."""

from typing import Any

import jax.numpy as jnp

from h2a2_jax.layers.context import ForwardContext
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.neighbors import NeighborTable
from h2a2_jax.sparse.sites import Sites, SparseTensor, check_same_sites


def check_tensor(layer: str, x: Any) -> None:
    """Check that the input of a layer is a sparse tensor with float features.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(x, SparseTensor):
        raise ValueError(f"{layer} takes a SparseTensor, given {_name(x)}: make it by SparseTensor(features, sites).")
    if not isinstance(x.sites, Sites):
        raise ValueError(
            f"{layer} takes features on padded Sites, given {_name(x.sites)}: take the sites of a map (map.inputs), or "
            "pad a set with sparse.pad_sites."
        )
    rows = x.features
    if not hasattr(rows, "dtype"):
        raise ValueError(
            f"{layer} takes features as an array [N, C], given {_name(rows)}: convert it with jnp.asarray."
        )
    if len(rows.shape) != 2 or len(rows) != x.sites.capacity:
        raise ValueError(
            f"{layer} takes a row of features for each of the {x.sites.capacity} rows of the sites, padding included, "
            f"given {_name(rows)}: pad the rows with sparse.pad_rows."
        )
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"{layer} takes float features, given {rows.dtype}: convert with .astype(jnp.float32).")


def check_context(layer: str, context: Any) -> None:
    """Check that the context of a layer is one, or None.

    Raises:
        ValueError: it is anything else.
    """
    if context is not None and not isinstance(context, ForwardContext):
        raise ValueError(
            f"{layer} takes a ForwardContext as its context, given {_name(context)}: the context is the last argument, "
            "and norms take no map."
        )


def check_map(layer: str, kernel_map: Any) -> None:
    """Check that the map of a layer is a padded one.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(kernel_map, KernelMap):
        return
    help_ = "build one from a table with sparse.pad_tables."
    if isinstance(kernel_map, NeighborTable):
        help_ = "pad it with sparse.pad_tables."
    elif isinstance(kernel_map, ForwardContext):
        help_ = "the map comes before the context, as in layer(x, kernel_map, context)."
    elif isinstance(kernel_map, dict | list | tuple):
        help_ = "give one of them."
    raise ValueError(f"{layer} takes a KernelMap, given {_name(kernel_map)}: {help_}")


def check_channels(layer: str, x: SparseTensor, channels: int) -> None:
    """Check the number of channels of the input.

    Raises:
        ValueError: it is another one.
    """
    if x.features.shape[1] != channels:
        raise ValueError(f"{layer} takes {channels} channels, given features of {x.features.shape[1]}.")


def check_input(
    layer: str,
    x: SparseTensor,
    kernel_map: KernelMap,
    kernel: tuple[int, ...],
    kernel_size: tuple[int, ...] | None = None,
    *,
    groups: int = 1,
) -> None:
    """Check that features and map fit a layer.

    Args:
        layer: name of the layer for messages.
        x: input.
        kernel_map: map.
        kernel: shape [V, Cin / groups, Cout] of the kernel.
        kernel_size: size of the kernel along each axis; None if it is not known.
        groups: number of groups of channels.

    Raises:
        ValueError: type, channels, offsets or sites do not fit.
    """
    check_map(layer, kernel_map)
    check_tensor(layer, x)
    volume, channels, _ = kernel
    check_channels(layer, x, channels * groups)
    if kernel_map.kernel_volume != volume:
        raise ValueError(
            f"{layer} has a kernel of {volume} slices, given a map of {kernel_map.kernel_volume} offsets: "
            "build the map with the layer's kernel size."
        )
    size = kernel_map.kernel_size
    if kernel_size is not None and size is not None and volume > 1 and size != kernel_size:
        raise ValueError(
            f"{layer} has a kernel of size {kernel_size}, given a map of size {size}: build the map with the layer's "
            "kernel size."
        )
    check_same_sites(f"{layer} was given features and a map", x.sites, kernel_map.inputs)


def _name(value: Any) -> str:
    """Type of a value in words, with the shape of an array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array {value.dtype}{list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
