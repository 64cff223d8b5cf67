"""A step of some balancers over the devices of three processes; run as a program, it is one of the processes."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from h2a2_jax.balancers import build_balancer
from h2a2_jax.config import HarmonizeConfig
from h2a2_jax.distributed import processes

METHODS = ("upgrad", "gradvac", "famo", "ngh")
GRADS = {
    "kernel": np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32),
    "bias": np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32),
}
LOSSES = np.array([1.0, 3.0, 2.0], np.float32)
PRESENT = np.array([True, True, True])


def take_step(axis: str | None, grads: Any, losses: jax.Array, present: jax.Array) -> Any:
    """Updates and states of every method."""
    found = []
    for method in METHODS:
        balancer = build_balancer(HarmonizeConfig(method, weight_lr=0.2), 3, axis)
        state = balancer.init(jax.tree.map(lambda leaf: leaf[0], grads))
        found.append(balancer.update(grads, state, present=present, losses=losses))
    return [updates for updates, _ in found], [state for _, state in found]


def run_step(devices: Any) -> tuple[Any, Any]:
    """Updates of the first of these devices' datasets, and states, with the datasets spread over three devices."""
    mesh = jax.make_mesh((3,), ("dataset",), axis_types=(AxisType.Auto,), devices=devices)
    each, same = PartitionSpec("dataset"), PartitionSpec()
    step = jax.shard_map(partial(take_step, "dataset"), mesh=mesh, in_specs=(each, each, each), out_specs=(each, same))

    def placed(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, each), lambda index: array[index])

    updates, states = jax.jit(step)(*jax.tree.map(placed, (GRADS, LOSSES, PRESENT)))
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), (updates, states))


def main(coordinator: str, process: str, folder: str) -> None:
    with processes(coordinator, 3, int(process)):
        leaves = jax.tree.leaves(run_step(jax.devices()))
    np.savez(Path(folder, f"process{process}.npz"), *leaves)


if __name__ == "__main__":
    main(*sys.argv[1:])
