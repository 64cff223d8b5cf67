"""Devices as a mesh of ('dataset', 'replica')."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

DATASET, REPLICA = "dataset", "replica"


def train_mesh(num_datasets: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a training run: as many devices along 'dataset' as divide the datasets evenly.

    With D datasets on N devices the axes are gcd(D, N) and N / gcd(D, N): 3 datasets on 1, 3 and 6 devices are
    3 datasets a device, one each, and one each on two replicas.

    Args:
        num_datasets: D.
        devices: all of them by default.
    """
    devices = list(devices) if devices is not None else jax.devices()
    rows = math.gcd(num_datasets, len(devices))
    grid = np.array(devices).reshape(rows, len(devices) // rows)
    return Mesh(grid, (DATASET, REPLICA), axis_types=(jax.sharding.AxisType.Auto,) * 2)
