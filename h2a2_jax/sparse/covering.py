"""Output sites of padded strided convolutions, those of spconv and of Torch's dense convolution."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.sites import PerAxis, SiteSet, check_set, pack_keys, per_axis, shorten, sorted_unique


def cover(
    sites: SiteSet,
    kernel_size: PerAxis,
    stride: PerAxis,
    *,
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    shape: PerAxis | None = None,
) -> SiteSet:
    """Sites of a padded strided convolution, as spconv makes them: every output whose kernel covers an input site.

    Slice i of output o reads the input (o * stride + i * dilation - padding) * sites.stride. The table is
    `strided_neighbors(sites, outputs, kernel_size, dilation, padding=padding)`. `downsample` makes fewer sites: those
    whose own cell holds an input.

    Args:
        sites: input sites.
        kernel_size: size of the kernel.
        stride: ratio of the strides of outputs and inputs.
        padding: inputs before the output's own place that the kernel covers.
        dilation: distance of neighbouring slices, in strides of the inputs.
        shape: size of the grid, in strides of the inputs, whose sites are 0..shape-1 along each axis. Outputs are those
            of Torch's convolution, 0..floor((shape + 2 * padding - dilation * (kernel_size - 1) - 1) / stride).
            Default: no grid, outputs on all sides.

    Raises:
        ValueError: numbers are not one per axis, or the kernel is larger than the padded grid.
        InputError: a site lies outside of `shape`, or an output is out of the range of a key.
    """
    check_set("cover", sites)
    window = Window.of(sites.strides, kernel_size, stride, padding, dilation, shape)
    coords = sites.coords
    if shape is not None and not (inside := window.inside(coords)).all():
        raise InputError(
            f"site {coords[~inside][0].tolist()} lies outside of a grid of shape {shape} and stride {sites.stride}; "
            "give a larger shape, or none for an unbounded grid."
        )
    outputs, covered = window.outputs(coords)
    keys = sorted_unique(pack_keys(outputs[covered]))
    lineage = (window.identity("{}"), sites.lineage)
    return SiteSet(keys, shorten(window.coarse_strides), sites.num_scans, sites.axes, lineage)


@dataclass(frozen=True)
class Window:
    """Window of a padded strided convolution; one number an axis in every field.

    Attributes:
        strides: strides of the input sites.
        size: size of the kernel.
        step: ratio of the strides of outputs and inputs.
        padding: inputs before the output's own place that the kernel covers.
        dilation: distance of neighbouring slices, in strides of the inputs.
        shape: size of the grid of inputs; None for an unbounded one.
    """

    strides: tuple[int, ...]
    size: tuple[int, ...]
    step: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    shape: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        strides: tuple[int, ...],
        kernel_size: PerAxis,
        stride: PerAxis,
        padding: PerAxis,
        dilation: PerAxis,
        shape: PerAxis | None,
    ) -> "Window":
        """Window of the arguments of `cover`.

        Raises:
            ValueError: numbers are not one per axis, or the kernel is larger than the padded grid.
        """
        axes = len(strides)
        window = cls(
            strides,
            per_axis(kernel_size, axes, name="kernel_size"),
            per_axis(stride, axes, name="stride"),
            per_axis(padding, axes, name="padding", least=0),
            per_axis(dilation, axes, name="dilation"),
            None if shape is None else per_axis(shape, axes, name="shape"),
        )
        if window.shape is not None and min(window._last) < 0:
            raise ValueError(
                f"a kernel of size {kernel_size} and dilation {dilation} is larger than a grid of shape {shape} with "
                f"padding {padding}; give a smaller kernel or more padding."
            )
        return window

    @property
    def coarse_strides(self) -> tuple[int, ...]:
        """Strides of the output sites."""
        return tuple(a * b for a, b in zip(self.strides, self.step, strict=True))

    @property
    def _last(self) -> tuple[int, ...]:
        """Last output of the grid along each axis."""
        parts = zip(self.shape or (), self.padding, self.dilation, self.size, self.step, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s for n, p, d, k, s in parts)

    def identity(self, inputs: str) -> str:
        """Identity of the output sites, of that of the inputs."""
        numbers = [self.size, self.step, self.padding, self.dilation, *([] if self.shape is None else [self.shape])]
        return f"cover({', '.join([inputs, *(str(shorten(n)) for n in numbers)])})"

    def inside(self, coords: Any) -> Any:
        """True [n] for the rows (scan, x, y, z) inside the grid of `shape`; numpy or JAX arrays."""
        extent = np.array(self.shape, np.int32) * np.array(self.strides, np.int32)
        return ((coords[:, 1:] >= 0) & (coords[:, 1:] < extent)).all(1)

    def outputs(self, coords: Any) -> tuple[Any, Any]:
        """Outputs that may cover each input; numpy or JAX arrays.

        Args:
            coords: int32 [n, d], rows (scan, x, y, z) of the inputs.

        Returns:
            Rows [v, n, d] of v outputs for each input; True [v, n] for those whose kernel covers it.
        """
        size, step, padding, dilation, strides, coarse = (
            np.array(numbers, np.int32)
            for numbers in (self.size, self.step, self.padding, self.dilation, self.strides, self.coarse_strides)
        )
        # Output o covers input u where o * step + i * dilation - padding = u for a slice i: the last such o is known,
        # and so is the number of those before it.
        counts = -(-(dilation * (size - 1) + 1) // step)
        before = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).astype(np.int32)
        before = before.reshape(-1, 1, len(size))
        place = coords[:, 1:] // strides + padding
        last = place // step
        outputs, reach = last - before, (place - last * step) + before * step
        covered = ((reach % dilation == 0) & (reach // dilation < size)).all(-1)
        if self.shape is not None:
            covered &= ((outputs >= 0) & (outputs <= np.array(self._last, np.int32))).all(-1)
        xp = np if isinstance(coords, np.ndarray) else jnp
        scan = xp.broadcast_to(coords[:, :1], (*outputs.shape[:2], 1))
        return xp.concatenate([scan, outputs * coarse], -1), covered
