"""Cases of `ops_*` files: sparse convolutions, pooling, norms, unions, voxelisation, with their gradients."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from h2a2_jax import sparse
from h2a2_jax.layers import norm
from h2a2_jax.sparse.kernel_map import fits_blocks
from tests.parity_case import CaseResult, guarded

TOLERANCE = 1e-5
WINOGRAD_TOLERANCE = 2e-5
"""Winograd's transforms add numbers larger than the result: 4e-6 to 7e-6 were measured on a layer of real scans."""
"""Largest error allowed, as a fraction of the largest value."""

Case = dict[str, np.ndarray]


def run_ops_file(path: Path) -> Iterator[CaseResult]:
    """Run every case of an ops file; a case of unknown shape is reported as not run."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
        cases: dict[str, Case] = {}
        for key in stored.files:
            case, name = key.split(".", 1)
            cases.setdefault(case, {})[name] = stored[key]
    for name, case in cases.items():
        runner = _runner(case)
        if runner is None:
            yield CaseResult(f"{name} (not run)", float("inf"), 0.0, False)
        else:
            yield from guarded(name, runner(name, case))


def _runner(case: Case) -> Callable[[str, Case], Iterator[CaseResult]] | None:
    if "points" in case:
        return _voxelization
    if "kernel_size" in case and "kernel" in case:
        return _convolution
    if "kernel_size" in case:
        return _pooling
    if "a_coords" in case:
        return _union
    if "running_mean_before" in case:
        return _batch_norm
    return _instance_norm if "weight" in case else None


def compare(name: str, got: object, expected: np.ndarray, tolerance: float = TOLERANCE) -> CaseResult:
    """Largest error as a fraction of the largest expected value."""
    got = np.asarray(got)
    if got.shape != expected.shape:
        return CaseResult(f"{name} {got.shape} for {expected.shape}", float("inf"), tolerance, False)
    if expected.size == 0:
        return CaseResult(name, 0.0, tolerance, True)
    scale = max(float(np.abs(expected).max()), 1e-30)
    error = float(np.abs(got.astype(np.float64) - expected).max()) / scale
    return CaseResult(name, error, tolerance, bool(error <= tolerance))


def _sorted(case: Case, prefix: str = "in") -> tuple[sparse.SiteSet, np.ndarray, np.ndarray]:
    """Sites of a stored tensor, its features in their order, and where each stored row went."""
    coords = case[f"{prefix}_coords"]
    sites = sparse.site_set(coords, stride=int(case.get(f"{prefix}_tensor_stride", 1)))
    rows = sites.lookup(coords)
    feats = np.zeros_like(case[f"{prefix}_feats"])
    feats[rows] = case[f"{prefix}_feats"]
    return sites, feats, rows


def _table(case: Case, sites: sparse.SiteSet) -> sparse.NeighborTable:
    size, stride = int(case["kernel_size"]), int(case["stride"])
    if int(case.get("is_transpose", 0)):
        return sparse.generative_neighbors(sites, sparse.generate(sites, size, stride), size)
    outputs = sites if stride == 1 else sparse.downsample(sites, stride)
    if "kernel" not in case:
        return sparse.pool_neighbors(sites, outputs, size)
    return sparse.submanifold_neighbors(sites, size) if stride == 1 else sparse.strided_neighbors(sites, outputs, size)


def _padded(table: sparse.NeighborTable, more_in: int, more_out: int) -> sparse.KernelMap:
    inputs = sparse.pad_sites(table.inputs, len(table.inputs) + more_in)
    same = table.inputs is table.outputs
    outputs = inputs if same else sparse.pad_sites(table.outputs, len(table.outputs) + more_out)
    blocks = "always" if fits_blocks(table) else None
    return sparse.pad_map(table, inputs, outputs, tile_size=64, blocks=blocks)


def _convolution(name: str, case: Case) -> Iterator[CaseResult]:
    sites, feats, rows = _sorted(case)
    table = _table(case, sites)
    kernel = case["kernel"].reshape(-1, *case["kernel"].shape[-2:])
    bias = jnp.asarray(case.get("bias", np.zeros((1, kernel.shape[-1]), np.float32)))
    kmap = _padded(table, 13, 7)
    x = jnp.asarray(sparse.pad_rows(feats, kmap.in_capacity))
    weight = jnp.asarray(sparse.pad_rows(case["loss_weight"], kmap.out_capacity))
    valid = jnp.arange(kmap.out_capacity)[:, None] < kmap.n_out
    stride = np.asarray(table.outputs.stride)
    yield compare(f"{name}.out_coords", table.outputs.coords, case["out_coords"], 0.0)
    yield compare(f"{name}.out_tensor_stride", stride, case["out_tensor_stride"], 0.0)
    if "offsets" in case:
        yield compare(f"{name}.offsets", sparse.kernel_offsets(int(case["kernel_size"])), case["offsets"], 0.0)
    if "pairs_per_offset" in case:
        yield compare(f"{name}.pairs_per_offset", table.pairs_per_offset, case["pairs_per_offset"], 0.0)
    algorithms = ["segment_sum", "gather", "tiles", "im2col", "pairs", "implicit"]
    algorithms += ["native"] if sparse.has_native() else []
    algorithms += [] if kmap.blocks is None else ["winograd"]

    @jax.jit
    def by_algorithm(x: jax.Array, w: jax.Array, b: jax.Array) -> list[tuple[jax.Array, ...]]:
        """Outputs and gradients, in one program."""
        results = []
        for how in algorithms:
            forward = partial(_convolve_and_add, kmap, valid, how)
            out, pull = jax.vjp(forward, x, w, b)
            results.append((out, *pull(weight)))
        return results

    for algorithm, result in zip(algorithms, by_algorithm(x, jnp.asarray(kernel), bias), strict=True):
        by_blocks = algorithm == "winograd" or (algorithm == "native" and kmap.blocks is not None)
        tolerance = WINOGRAD_TOLERANCE if by_blocks else TOLERANCE
        out, grad_x, grad_w, grad_b = result
        yield compare(f"{name}.out_feats[{algorithm}]", out[: len(table.outputs)], case["out_feats"], tolerance)
        yield compare(f"{name}.grad_in[{algorithm}]", np.asarray(grad_x)[rows], case["grad_in"], tolerance)
        grad_w = grad_w.reshape(case["kernel"].shape)
        yield compare(f"{name}.grad_kernel[{algorithm}]", grad_w, case["grad_kernel"], tolerance)
        if "grad_bias" in case:
            yield compare(f"{name}.grad_bias[{algorithm}]", grad_b, case["grad_bias"], tolerance)


def _convolve_and_add(
    kmap: sparse.KernelMap, valid: jax.Array, how: Any, x: jax.Array, w: jax.Array, b: jax.Array
) -> jax.Array:
    return jnp.where(valid, sparse.convolve(x, w[None], kmap, algorithm=how) + b, 0)


def _value_and_pull(function: Callable[..., Any], weight: jax.Array, *arguments: jax.Array) -> tuple[Any, Any, Any]:
    """Outputs, gradients of their weighted sum, and what else the function returns; in one program."""

    @jax.jit
    def both(*arguments: jax.Array) -> tuple[Any, Any, Any]:
        out, pull, others = jax.vjp(function, *arguments, has_aux=True)
        return out, pull(weight), others

    return both(*arguments)


def _pooling(name: str, case: Case) -> Iterator[CaseResult]:
    sites, feats, rows = _sorted(case)
    table = _table(case, sites)
    kmap = _padded(table, 5, 3)
    x = jnp.asarray(sparse.pad_rows(feats, kmap.in_capacity))
    weight = jnp.asarray(sparse.pad_rows(case["loss_weight"], kmap.out_capacity))
    out, (grad,), _ = _value_and_pull(lambda x: (sparse.max_pool(x, kmap), None), weight, x)
    yield compare(f"{name}.out_coords", table.outputs.coords, case["out_coords"], 0.0)
    yield compare(f"{name}.out_feats", out[: len(table.outputs)], case["out_feats"])
    yield compare(f"{name}.grad_in", np.asarray(grad)[rows], case["grad_in"])


def _union(name: str, case: Case) -> Iterator[CaseResult]:
    generated = "kernel" in case
    a, a_feats, a_rows = _sorted(case | {"a_tensor_stride": np.asarray(2 if generated else 1)}, "a")
    b, b_feats, b_rows = _sorted(case | {"b_tensor_stride": np.asarray(4 if generated else 1)}, "b")
    up = sparse.generate(b, 3) if generated else b
    whole = sparse.unite(a, up)
    rows = [sparse.union_rows(part, whole, len(part), len(whole)) for part in (a, up)]
    kmap = _padded(sparse.generative_neighbors(b, up, 3), 0, 0) if generated else None

    def forward(xa: jax.Array, xb: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_up = sparse.convolve(xb, w[None], kmap) if kmap is not None else xb
        return sum(x.at[r].get(mode="fill", fill_value=0) for x, r in zip((xa, x_up), rows, strict=True)), x_up

    kernel = jnp.asarray(case.get("kernel", np.zeros((1, 1, 1), np.float32)))
    out, (grad_a, grad_b, grad_w), up_feats = _value_and_pull(
        forward, jnp.asarray(case["loss_weight"]), jnp.asarray(a_feats), jnp.asarray(b_feats), kernel
    )
    yield compare(f"{name}.out_coords", whole.coords, case["out_coords"], 0.0)
    yield compare(f"{name}.out_feats", out, case["out_feats"])
    yield compare(f"{name}.grad_a", np.asarray(grad_a)[a_rows], case["grad_a"])
    yield compare(f"{name}.grad_b", np.asarray(grad_b)[b_rows], case["grad_b"])
    if kmap is not None:
        yield compare(f"{name}.up_coords", up.coords, case["up_coords"], 0.0)
        yield compare(f"{name}.up_feats", up_feats, case["up_feats"])
        yield compare(f"{name}.grad_kernel", grad_w, case["grad_kernel"])


def _voxelization(name: str, case: Case) -> Iterator[CaseResult]:
    clouds = np.split(case["points"], np.cumsum(case["num_points"])[:-1])
    voxels = sparse.voxelize(clouds, float(case["voxel_size"]))
    coords = [sparse.voxel_coordinates(cloud, float(case["voxel_size"])) for cloud in clouds]
    batch = np.repeat(np.arange(len(clouds)), case["num_points"])
    rows = voxels.sites.lookup(case["out_coords"])
    inverse = np.empty(len(rows), np.int64)
    inverse[rows] = np.arange(len(rows))
    everything = np.concatenate([batch[:, None], np.concatenate(coords)], 1)
    yield compare(f"{name}.coords_all", everything, case["coords_all"], 0.0)
    yield compare(f"{name}.sites", np.sort(rows), np.arange(len(voxels.sites)), 0.0)
    yield compare(f"{name}.first_index", voxels.first_point[rows], case["first_index"], 0.0)
    first = case["colors"][voxels.first_point[rows]]
    yield compare(f"{name}.out_feats_first", first, case["out_feats_first"], 0.0)
    row_of_point = inverse[voxels.sites.lookup(everything.astype(np.int32))]
    yield compare(f"{name}.inverse", row_of_point, case["inverse"], 0.0)
    sums = jax.ops.segment_sum(jnp.asarray(case["colors"]), jnp.asarray(row_of_point), len(rows))
    counts = np.bincount(row_of_point)[:, None]
    yield compare(f"{name}.out_feats_sum", sums, case["out_feats_sum"])
    yield compare(f"{name}.out_feats_average", np.asarray(sums) / counts, case["out_feats_average"])


def _batch_norm(name: str, case: Case) -> Iterator[CaseResult]:
    training = "train" in name
    x = jnp.asarray(sparse.pad_rows(case["in_feats"], len(case["in_feats"]) + 9))
    weight = jnp.asarray(sparse.pad_rows(case["loss_weight"], len(x)))
    valid = jnp.arange(len(x)) < len(case["in_feats"])
    before = norm.Statistics(jnp.asarray(case["running_mean_before"]), jnp.asarray(case["running_var_before"]))
    eps, momentum = float(case["eps"]), float(case["momentum"])

    def forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, norm.Statistics]:
        batch = norm.batch_statistics(x, valid)
        used = batch.statistics if training else before
        return norm.normalize(x, valid, used, scale, bias, eps), norm.update_running(before, batch, momentum)

    out, grads, after = _value_and_pull(forward, weight, x, jnp.asarray(case["weight"]), jnp.asarray(case["bias"]))
    after = after if training else before
    rows = len(case["in_feats"])
    yield compare(f"{name}.out_feats", out[:rows], case["out_feats"])
    yield compare(f"{name}.grad_in", grads[0][:rows], case["grad_in"])
    yield compare(f"{name}.grad_weight", grads[1], case["grad_weight"])
    yield compare(f"{name}.grad_bias", grads[2], case["grad_bias"])
    yield compare(f"{name}.running_mean_after", after.mean, case["running_mean_after"])
    yield compare(f"{name}.running_var_after", after.var, case["running_var_after"])


def _instance_norm(name: str, case: Case) -> Iterator[CaseResult]:
    sites, feats, rows = _sorted(case)
    padded = sparse.pad_sites(sites, len(sites) + 11)
    weight = np.zeros_like(feats)
    weight[rows] = case["loss_weight"]

    def forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        tensor = sparse.SparseTensor(x, padded)
        return norm.instance_norm(tensor, scale, bias, float(case["eps"])).features, None

    x = jnp.asarray(sparse.pad_rows(feats, padded.capacity))
    padded_weight = jnp.asarray(sparse.pad_rows(weight, padded.capacity))
    out, grads, _ = _value_and_pull(forward, padded_weight, x, jnp.asarray(case["weight"]), jnp.asarray(case["bias"]))
    yield compare(f"{name}.out_feats", np.asarray(out)[rows], case["out_feats"])
    yield compare(f"{name}.grad_in", np.asarray(grads[0])[rows], case["grad_in"])
    yield compare(f"{name}.grad_weight", grads[1], case["grad_weight"])
    yield compare(f"{name}.grad_bias", grads[2], case["grad_bias"])
