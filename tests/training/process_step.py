"""One training step over the devices of one or several processes; run as a program, it is one of the processes."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from h2a2_jax.balancers.ngh import norm_gradient_harmonization
from h2a2_jax.balancers.packing import unpack
from h2a2_jax.checkpoint.train_state import create_state, place_state
from h2a2_jax.distributed import MeshLayout, processes, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.layers.agreement import explored_threshold
from h2a2_jax.loader.batching import BucketLadder, collate, no_scan, pad_batch
from h2a2_jax.models import TR3D, LevelSizes, PlanLayout
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.sparse import SparseTensor
from h2a2_jax.training.step import make_train_step
from tests.models.scenes import MODEL, SELECTION, room, short_detector, short_plan
from tests.training.configs import joint_config

SEED = 2
STEM_ONLY = replace(SELECTION, convolutions=("stem",), prior="agreement", consistency="centered_cosine")
"""Selects kernels in one layer, so that what every process compiles is small."""
SCANS = [[room(10 * d + i, points=1500, boxes=8 - 2 * i, size=8.0 + d) for i in range(2 if d else 1)] for d in range(3)]
"""By dataset; one scan of the first, two of the others."""


def double_detector() -> TR3D:
    """Every parameter in float64."""
    model = short_detector(STEM_ONLY, SEED)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(model)))
    return model


def smallest_margin() -> float:
    """How near alpha * beta of any scan and offset comes to the threshold."""
    model, margins = double_detector(), []
    hosts = [collate([*scans, no_scan()][:2], MODEL) for scans in SCANS]
    capacities = LevelSizes(*(max(sizes) for sizes in zip(*(host.tables.sizes for host in hosts), strict=True)))

    @jax.jit
    def distances(batch: Any, dataset: Any) -> list[Any]:
        x = SparseTensor(batch.features.astype(float), batch.plan.voxels)
        seen: dict[str, Any] = {}
        context = ForwardContext(
            dataset, training=True, tap=seen.__setitem__, embedding=dataset.pick(model.embedding[...])
        )
        nnx.merge(*nnx.split(model.backbone.stem), copy=True)(x, batch.plan, context)
        names = [name.removesuffix(".beta") for name in seen if name.endswith(".beta")]
        taus = [explored_threshold(STEM_ONLY.tau, jnp.int32(0), 27, name, STEM_ONLY.exploration) for name in names]
        return [abs(seen[f"{name}.alpha"] * seen[f"{name}.beta"] - tau) for name, tau in zip(names, taus, strict=True)]

    for d, host in enumerate(hosts):
        dataset = DatasetContext(np.eye(len(SPECS))[d])
        margins += [float(at[: len(SCANS[d])].min()) for at in distances(pad_batch(host, capacities, 8), dataset)]
    assert len(margins) == len(SCANS)
    return min(margins)


def run_step(devices: Any) -> tuple[Any, Any, MeshLayout]:
    """State and metrics after one step on these devices, each process loading what its devices work on."""
    mesh = train_mesh(len(SPECS), devices)
    process_layout = MeshLayout(mesh, len(SPECS))
    model = double_detector()
    optimizer = optax.sgd(1e-3)
    balancer = norm_gradient_harmonization(len(SPECS), axis_name="dataset")
    graph, state = create_state(model, optimizer, balancer, kind=lambda _: "any")
    step = make_train_step(graph, state, joint_config(SPECS), optimizer, balancer, mesh, keep_gradients=True)

    rows = 2 // process_layout.replicas
    grid = {
        (d, r): collate((SCANS[d] + [no_scan()] * 2)[r * rows : (r + 1) * rows], MODEL)
        for d, r in process_layout.shards
    }
    # One bucket, agreed upon.
    sizes = np.max([shard.tables.sizes for shard in grid.values()], axis=0).astype(np.int32)
    most = process_layout.exchange(sizes).result().max(0)
    capacities = BucketLadder(LevelSizes(*most.tolist())).capacities(0)

    def padded(shard: Any) -> Any:
        batch = short_plan(pad_batch(shard, capacities, 8, PlanLayout("any")))  # which compiles in less time
        return replace(batch, features=batch.features.astype(float), boxes=batch.boxes.astype(float))

    batch = process_layout.assemble({key: padded(shard) for key, shard in grid.items()})
    return *unpack(process_layout.fetch(step(place_state(state, mesh), batch))), process_layout


def tree_by_name(state: Any, metrics: Any, process_layout: MeshLayout) -> dict[str, np.ndarray]:
    """What layouts must agree on, as arrays by dotted name."""
    parts = {
        "gradients": metrics.gradients[0],
        "exclusive": metrics.gradients[1],
        "stats": state.stats,
        "losses": (metrics.box_loss, metrics.class_loss, metrics.num_positives, metrics.gradient_norm),
        "norms": state.balancer.norms,
        "psi": state.balancer.psi,
        "scales": state.balancer.scales,
        "selection": metrics.selection,
        "agreement": state.agreement,
    }
    return {
        f"{part}.{jax.tree_util.keystr(path)}": np.asarray(leaf)
        for part, tree in parts.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def main(coordinator: str, count: str, process: str, folder: str, *options: str) -> None:
    numbers = () if coordinator == "auto" else (int(count), int(process))
    with processes(coordinator, *numbers), jax.enable_x64(True):
        if "fail" in options:

            def opened() -> None:
                if process == "1":
                    raise InputError("the disk of process 1 is gone.")

            MeshLayout(train_mesh(2), 2).all_or_raise(opened, "open its scans")
        state, metrics, process_layout = run_step(jax.devices())
        told = {"loaded": process_layout.datasets, "values": tree_by_name(state, metrics, process_layout)}
        Path(folder, f"process{process}.pickle").write_bytes(pickle.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
