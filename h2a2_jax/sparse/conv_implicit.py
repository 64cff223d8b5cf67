"""Convolution on NVIDIA GPUs by implicit matmul ("implicit"): two Triton kernels, written in Pallas.

    y[o]  = sum_k x[neighbors[k, o]] @ W[k]            rows are read where they are multiplied
    dW[k] = sum_o x[neighbors[k, o]]^T g[o]

A program of the first kernel owns a tile of output rows of one scan and some of their channels. Offset after offset it
reads the rows that exist, multiplies them by the kernel that the scan uses, and sums in registers. The gradient of the
features is the same kernel on the inverse table. A program of the second kernel owns the gradient of one offset over a
part of the rows of one scan; XLA adds the parts. So no columns, no products of pairs and no copies of kernels exist in
memory, and nothing is added by atomics: results are the same in every run.

Products are taken in the compute type, sums are float32. Float32 products use TF32 unless the precision is
`jax.lax.Precision.HIGHEST`. Channels are padded with zeros to multiples of 16. On CPUs the kernels run in Pallas's
interpreter, which is for tests: it is slow, and float64 stays float64.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import ConvOptions, Gradients, inverse_table, kernel_index, split_by_kernel
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.pool import scan_bounds
from h2a2_jax.sparse.row_ranges import RowRanges, ranges_of_scans
from h2a2_jax.sparse.xla_cpu import vary_alike

TILE_ROWS = 128
"""Rows that a program multiplies at once."""
TILE_CHANNELS = 128
"""Most channels that a program writes, and most input channels of a block of the kernel's gradient."""
PART_PROGRAMS = 4 * 132
"""Programs from which on the gradient of the kernels is not split further: four for each core of an H200."""
_LEAST_CHANNELS = 16


def implicit_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "implicit"; see `conv_parts` for arguments and result."""
    tiles = _output_tiles(jnp.asarray(kmap.out_scan), kmap.num_scans, gamma is not None)
    return _multiply(x, w, gamma, kmap, jnp.asarray(kmap.neighbors), tiles, options)


def implicit_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "implicit"."""
    g = cotangent.astype(x.dtype)  # neither kernel reads a row of padding
    tiles = _output_tiles(jnp.asarray(kmap.in_scan), kmap.num_scans, gamma is not None)
    dx = _multiply(g, w.swapaxes(2, 3), gamma, kmap, inverse_table(kmap), tiles, options)
    dw, dgamma = _kernel_gradients(x, g, w, gamma, kmap, options)
    return dx.astype(x.dtype), dw.astype(options.kernel_type), dgamma


def _output_tiles(scan: Int[Array, " n"], num_scans: int, by_scan: bool) -> RowRanges:
    """Tiles that cover all rows, padding included; of one scan each with `by_scan`."""
    if by_scan and num_scans > 1:
        return ranges_of_scans(scan, num_scans, TILE_ROWS)
    start = jnp.arange(-(-len(scan) // TILE_ROWS), dtype=jnp.int32) * TILE_ROWS
    return RowRanges(start, jnp.minimum(start + TILE_ROWS, len(scan)), jnp.zeros_like(start))


# ---------------------------------------------------------------- rows


def _multiply(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, table: Array, tiles: RowRanges, options: ConvOptions
) -> Float[Array, "n c_out"]:
    """sum_k x[table[k]] @ W[k] of the kernel that each scan uses."""
    n, channels = table.shape[1], w.shape[3]
    index = jnp.pad(kernel_index(gamma, w, kmap), ((0, 1), (0, 0)))  # padding has no pair: any kernel serves
    scalars = [*tiles, index]
    weighs = gamma is not None and len(w) == 1
    if gamma is not None and weighs:
        scalars.append(jnp.pad(gamma, ((0, 1), (0, 0))).astype(options.sum_type))
    stack = _pad_channels(w.astype(x.dtype).reshape(-1, *w.shape[2:]), (1, 2))
    x = _pad_channels(x, (1,))
    block = _block(stack.shape[2])
    kernel = partial(_rows_kernel, volume=w.shape[1], n=n, block=block, weighs=weighs, options=options)
    y = _call(
        kernel,
        "implicit_rows",
        (len(tiles.start), stack.shape[2] // block),
        ((n, stack.shape[2]), options.sum_type),
        (*scalars, table, x, stack),
    )
    return y[:, :channels]


def _rows_kernel(*refs: Any, volume: int, n: int, block: int, weighs: bool, options: ConvOptions) -> None:
    """A tile of output rows times a block of output channels."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    start_ref, end_ref, scan_ref, index_ref, *more, table_ref, x_ref, w_ref, out_ref = refs
    tile = pl.program_id(0)
    start, end, scan = (triton.load(ref.at[tile]) for ref in (start_ref, end_ref, scan_ref))
    rows = start + jnp.arange(TILE_ROWS, dtype=jnp.int32)
    own = rows < end
    outputs = pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)
    n_in, channels = x_ref.shape
    depth = _depth(channels, x_ref.dtype)
    parts = np.int32(channels // depth)

    def add_slice(turn: Array, total: Array) -> Array:
        turn = turn.astype(jnp.int32)
        k, part = lax.div(turn, parts), lax.rem(turn, parts)
        source = triton.load(table_ref.at[k, rows], mask=own, other=n_in)
        inputs = part * depth + jnp.arange(depth, dtype=jnp.int32)
        found = source < n_in
        # Whatever is masked is not read.
        a = triton.load(x_ref.at[source[:, None], inputs[None, :]], mask=found[:, None], other=0)
        b = triton.load(w_ref.at[triton.load(index_ref.at[scan, k]), inputs[:, None], outputs[None, :]])
        products = _dot(a, b, options)
        return total + (products * triton.load(more[0].at[scan, k]) if weighs else products)

    total = lax.fori_loop(0, volume * parts, add_slice, jnp.zeros((TILE_ROWS, block), options.sum_type))
    triton.store(out_ref.at[rows[:, None], outputs[None, :]], total, mask=own[:, None])


# ---------------------------------------------------------------- kernels


def _kernel_gradients(
    x: Array, g: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions
) -> tuple[Array, Array | None]:
    """Gradients of the kernels and of gamma."""
    volume, a, b = w.shape[1:]
    x, g = _pad_channels(x, (1,)), _pad_channels(g, (1,))
    c_in, c_out = x.shape[1], g.shape[1]
    blocks = _block(c_in), _block(c_out)
    programs = volume * (c_in // blocks[0]) * (c_out // blocks[1])
    num_scans = 1 if gamma is None else kmap.num_scans
    per_scan = min(-(-PART_PROGRAMS // (programs * num_scans)), -(-kmap.out_capacity // (num_scans * TILE_ROWS)))
    per_scan = max(1, per_scan)
    bounds = jnp.stack([jnp.zeros((), jnp.int32), jnp.asarray(kmap.n_out, jnp.int32)])
    if gamma is not None:
        bounds = scan_bounds(jnp.asarray(kmap.out_scan), num_scans)
    length = -(-jnp.diff(bounds) // per_scan)
    start = (bounds[:-1, None] + length[:, None] * jnp.arange(per_scan)).astype(jnp.int32)
    end = jnp.minimum(start + length[:, None], bounds[1:, None])
    parts = num_scans * per_scan
    kernel = partial(_kernels_kernel, blocks=blocks, options=options)
    dw = _call(
        kernel,
        "implicit_kernels",
        (volume, parts, programs // volume),
        ((parts, volume, c_in, c_out), options.sum_type),
        (start.reshape(-1), end.reshape(-1), jnp.asarray(kmap.neighbors), x, g),
    )
    dw = dw.reshape(num_scans, per_scan, volume, c_in, c_out).sum(1)[..., :a, :b]
    return split_by_kernel(dw, w, gamma)


def _kernels_kernel(
    start_ref: Any, end_ref: Any, table_ref: Any, x_ref: Any, g_ref: Any, out_ref: Any, *,
    blocks: tuple[int, int], options: ConvOptions,
) -> None:  # fmt: skip
    """Gradient of one offset over a range of rows, for a block of input and of output channels."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    # Programs of neighbouring offsets read the same rows at the same time.
    k, part, block = (pl.program_id(axis) for axis in range(3))
    across = np.int32(g_ref.shape[1] // blocks[1])
    inputs = lax.div(block, across) * np.int32(blocks[0]) + jnp.arange(blocks[0], dtype=jnp.int32)
    outputs = lax.rem(block, across) * np.int32(blocks[1]) + jnp.arange(blocks[1], dtype=jnp.int32)
    start, end = triton.load(start_ref.at[part]), triton.load(end_ref.at[part])
    n_in = x_ref.shape[0]
    step = _depth(TILE_ROWS, x_ref.dtype)

    def add_rows(turn: Array, total: Array) -> Array:
        rows = start + turn.astype(jnp.int32) * step + jnp.arange(step, dtype=jnp.int32)
        source = triton.load(table_ref.at[k, rows], mask=rows < end, other=n_in)
        found = (source < n_in)[:, None]
        a = triton.load(x_ref.at[source[:, None], inputs[None, :]], mask=found, other=0)
        b = triton.load(g_ref.at[rows[:, None], outputs[None, :]], mask=found, other=0)
        return total + _dot(a, b, options, trans_a=True)

    turns = lax.div(jnp.maximum(end - start + np.int32(step - 1), np.int32(0)), np.int32(step))
    total = lax.fori_loop(np.int32(0), turns, add_rows, jnp.zeros(blocks, options.sum_type))
    triton.store(out_ref.at[part, k, inputs[:, None], outputs[None, :]], total)


# ---------------------------------------------------------------- parts of both


def _dot(a: Array, b: Array, options: ConvOptions, trans_a: bool = False) -> Array:
    """Product of two blocks, summed in `sum_type`."""
    precision = options.precision
    if precision is None and a.dtype == jnp.float32:
        precision = lax.Precision.HIGH  # TF32, as XLA's default on these machines
    contract = (((0 if trans_a else 1,), (0,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=options.sum_type)


def _pad_channels(array: Array, axes: tuple[int, ...]) -> Array:
    """Zeros up to a power of two up to `TILE_CHANNELS` channels, and up to a multiple of these beyond."""

    def more(channels: int) -> int:
        if channels > TILE_CHANNELS:
            return -channels % TILE_CHANNELS
        return max(_LEAST_CHANNELS, 1 << (channels - 1).bit_length()) - channels

    ends = [(0, more(size) if axis in axes else 0) for axis, size in enumerate(array.shape)]
    return jnp.pad(array, ends) if any(end for _, end in ends) else array


def _block(channels: int) -> int:
    return min(channels, TILE_CHANNELS)


def _depth(length: int, dtype: Any) -> int:
    """Length of the sums of one product: a block of rows and of kernel takes 128 bytes a row at most."""
    return min(length, 128 // np.dtype(dtype).itemsize)


def _call(kernel: Any, name: str, grid: tuple[int, ...], out: tuple[tuple[int, ...], Any], arguments: tuple) -> Array:
    """Run a kernel: compiled on a GPU, interpreted on a CPU."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    arguments = tuple(vary_alike(arguments))
    kind: Any = jax.typeof(arguments[0])
    # Under shard_map a kernel must be told over which axes its result varies; versions of JAX name them differently.
    varies: dict[str, Any] = {"manual_axis_type": kind.mat} if hasattr(kind, "mat") else {"vma": kind.vma}
    shape = jax.ShapeDtypeStruct(*out, **varies)

    def run(interpret: bool, *arguments: Array) -> Array:
        params = triton.CompilerParams(num_warps=8, num_stages=3)
        call = pl.pallas_call(kernel, shape, grid=grid, name=name, interpret=interpret, compiler_params=params)
        return call(*arguments)

    return lax.platform_dependent(*arguments, cpu=partial(run, True), default=partial(run, False))
