"""Which part of every step a process prepares, and how processes agree: here, for a run of one process."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int32

from h2a2_jax.loader.batching import Batch, stack_batches

Answer = Callable[[], Int32[np.ndarray, "processes n"]]
"""Waits for what all processes told; a row for each."""


class ProcessLayout:
    """All of a step is this process's; `h2a2_jax.distributed` has that of several processes.

    A step consists of cells (dataset, replica), the scans of one dataset on one device.
    """

    def owns(self, dataset: int, replica: int) -> bool:
        """Whether a cell is prepared by this process."""
        return True

    def exchange(self, values: Int32[np.ndarray, " n"]) -> Answer:
        """Tell the other processes some numbers; returns at once, and the answer waits.

        All processes call it in the same order and with as many numbers.
        """
        return lambda: values[None]

    def assemble(self, cells: Mapping[tuple[int, int], Batch]) -> Batch:
        """The batch of a step, with leading axes [D, replicas], from the cells of this process."""
        datasets, replicas = (max(axis) + 1 for axis in zip(*cells, strict=True))
        return stack_batches([[cells[d, r] for r in range(replicas)] for d in range(datasets)])
