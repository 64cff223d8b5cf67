"""A layer on the CPU in spconv, the sparse convolution library for PyTorch: `pip install h2a2_jax[benchmark]`."""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from h2a2_jax.sparse import NeighborTable
from h2a2_jax.sparse.kernel_map import fits_blocks

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what spconv imports calls deprecated functions
        import spconv as spconv_package
        import spconv.pytorch as spconv
        import torch
        from spconv.core import ConvAlgo
        from spconv.pytorch import ops

    MISSING = ""
except ImportError as error:
    MISSING = f"spconv is not installed ({error}): pip install 'h2a2_jax[benchmark]'"


def version() -> str:
    """Versions of spconv and PyTorch.

    Raises:
        ImportError: spconv is not installed.
    """
    if MISSING:
        raise ImportError(MISSING)
    return f"{spconv_package.__version__} (torch {torch.__version__})"


class SpconvLayer:
    """One convolution, its index of pairs built beforehand.

    Submanifold layers of 3^3 run as a user's would, as SubMConv3d with an indice_key. spconv makes more output sites
    for a strided convolution than MinkowskiEngine's rule, which this package follows, and has no generative one: other
    layers run spconv's operator on our pairs, so that both libraries multiply the same ones.

    On several threads the CPU code of spconv 2.3.8 gets a few rows wrong, others in each run: its scatter keeps two
    pointers that all threads share. So results are compared on one thread; times are taken on one and on all.
    """

    def __init__(
        self,
        table: NeighborTable,
        features: Float[np.ndarray, "n c_in"],
        kernels: Float[np.ndarray, "v c_in c_out"],
    ):
        """Args: `features` on the input sites, without padding."""
        self._outputs = len(table.outputs)
        self._features = torch.from_numpy(features)
        if fits_blocks(table):
            self._run = self._submanifold(table, kernels)
        else:
            self._run = self._from_pairs(table, kernels)

    def __call__(self, threads: int) -> Float[np.ndarray, "n_out c_out"]:
        """Features of the output sites, in the order of ours; computed on so many threads."""
        torch.set_num_threads(threads)
        with torch.no_grad():
            return self._run().numpy()

    def _submanifold(self, table: NeighborTable, kernels: np.ndarray) -> Any:
        # Axes z, y, x: then spconv's kernel [Cout, 3, 3, 3, Cin] lists offsets as ours does, x fastest.
        coords = table.inputs.coords[:, [0, 3, 2, 1]].astype(np.int64)
        grid = coords[:, 1:] // table.inputs.stride
        grid = grid - grid.min(0, initial=0)
        # spconv reads memory and ignores strides: C order throughout.
        indices = torch.from_numpy(np.ascontiguousarray(np.concatenate([coords[:, :1], grid], 1), np.int32))
        shape = [int(n) + 1 for n in grid.max(0, initial=0)]
        c_in, c_out = kernels.shape[1:]
        layer = spconv.SubMConv3d(c_in, c_out, 3, bias=False, indice_key="map")
        layer.weight.data = torch.from_numpy(kernels.reshape(3, 3, 3, c_in, c_out).transpose(4, 0, 1, 2, 3).copy())
        layer.eval()
        index = layer(spconv.SparseConvTensor(self._features, indices, shape, table.inputs.num_scans)).indice_dict

        def run() -> Any:
            x = spconv.SparseConvTensor(self._features, indices, shape, table.inputs.num_scans, indice_dict=index)
            return layer(x).features

        return run

    def _from_pairs(self, table: NeighborTable, kernels: np.ndarray) -> Any:
        volume = len(table.rows)
        pairs = np.full((2, volume, len(table.outputs)), -1, np.int32)
        for k, rows in enumerate(table.rows):
            hits = np.flatnonzero(rows >= 0)
            pairs[0, k, : len(hits)], pairs[1, k, : len(hits)] = rows[hits], hits
        listed, counts = torch.from_numpy(pairs), torch.from_numpy(table.pairs_per_offset.astype(np.int32))
        weight = kernels.transpose(2, 0, 1)[:, :, None, None].copy()  # [Cout, V, 1, 1, Cin]
        filters = torch.from_numpy(weight)

        def run() -> Any:
            return ops.indice_conv(
                self._features, filters, listed, counts, self._outputs, inverse=False, subm=False, algo=ConvAlgo.Native
            )

        return run
