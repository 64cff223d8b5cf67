"""The balancers of gradients: their error, the bytes that they exchange, and their cost in a step.

    python -m benchmarks.balancers --fixtures                        largest error of each method against TorchJD
    python -m benchmarks.balancers --bytes [--size S]                bytes exchanged in a step, of compiled programs
    python -m benchmarks.balancers --cost [--size S] [--repeats N]   time of a step, in turns with the plain mean

Errors are relative to the longest gradient of a case; `benchmarks.balancer_fixtures` says where the numbers come from.
Bytes are those of the demo's step on three virtual devices, a dataset each: the sizes of the results of all collective
operations, and what a device sends in a ring or all-to-all, (n - 1) / n of them and twice that for an all-reduce. Costs
are medians over rounds of the ratio of two steps taken one after the other, with the quartiles, on one device and on
procedural scans.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.balancer_fixtures import FIXTURES
from configs.joint import demo, tiny
from h2a2_jax.balancers import (
    GRAMIAN_METHODS,
    aligned_mtl_weights,
    build_balancer,
    cagrad_weights,
    conflict_free_weights,
    dual_proj_weights,
    gradvac_weights,
    imtl_g_weights,
    mgda_weights,
    nash_mtl_weights,
    pcgrad_weights,
    upgrad_weights,
)
from h2a2_jax.checkpoint.train_state import create_state, place_state
from h2a2_jax.config import ExperimentConfig, HarmonizeConfig
from h2a2_jax.distributed import DATASET, stack_batches, train_mesh
from h2a2_jax.host import available_cores
from h2a2_jax.initialization import build_detector
from h2a2_jax.loader.batching import collate, pad_batch
from h2a2_jax.models import LevelSizes, PlanLayout
from h2a2_jax.optimizer import packing_kind
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.training.step import make_train_step

METHODS: tuple[str, ...] = get_args(HarmonizeConfig.__annotations__["method"])
SIZES: dict[str, Callable[[], ExperimentConfig]] = {"demo": demo, "tiny": tiny}
"""Runs of configs/joint.py by name."""
_BLOCK = 64
_MAX_BOXES = 64

WEIGHTS: dict[str, Callable[..., Any]] = {
    "mgda": mgda_weights,
    "mgda_exact": mgda_weights,
    "cagrad0.4": partial(cagrad_weights, c=0.4),
    "cagrad1.2": partial(cagrad_weights, c=1.2),
    "imtl_g": imtl_g_weights,
    "nash_mtl": partial(nash_mtl_weights, max_norm=0.0),
    "aligned_mtl": aligned_mtl_weights,
    "aligned_mtl_median": partial(aligned_mtl_weights, scale_mode="median"),
    "aligned_mtl_rmse": partial(aligned_mtl_weights, scale_mode="rmse"),
    "upgrad": upgrad_weights,
    "dual_proj": dual_proj_weights,
    "conflict_free": conflict_free_weights,
    "pcgrad": pcgrad_weights,
    "gradvac": gradvac_weights,
}
"""Weights of each method of the fixtures."""


_MOST = 7
"""Largest number of gradients of a case."""


def fixture_errors(method: str, path: Path = FIXTURES) -> dict[str, tuple[float, float]]:
    """Error of a method in each case of the fixtures, and what TorchJD's own solver left, both over the longest row.

    To be called with `jax.enable_x64`.
    """
    with np.load(path) as stored:
        names = [key.removeprefix(f"{method}.") for key in stored.files if key.startswith(f"{method}.")]
        matrices = [stored[f"matrix.{name}"] for name in names]
        ours = combine(method, matrices, [stored[f"orders.{name}"] for name in names])
        errors = {}
        for name, matrix, combined in zip(names, matrices, ours, strict=True):
            longest = max(np.linalg.norm(matrix, axis=1).max(), np.finfo(float).tiny)
            left = float(stored[f"left.mgda.{name}"]) if method == "mgda" else 0.0
            errors[name] = float(np.abs(combined - stored[f"{method}.{name}"]).max() / longest), left / longest
        return errors


def combine(method: str, matrices: Sequence[np.ndarray], orders: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Combinations of gradients [K, n] by a method; of GradVac, those of three steps, [3, n].

    All cases are one compiled program, as seven datasets of which K are active.

    Args:
        method: of `WEIGHTS`.
        matrices: gradients of each case, K up to 7.
        orders: [3, K, K] of each case, in which datasets go through the others.
    """
    active = jnp.asarray([np.arange(_MOST) < len(matrix) for matrix in matrices])
    weigh = jax.jit(jax.vmap(WEIGHTS[method]))
    turned = [_steps_of(method, matrix) for matrix in matrices]
    steps: list[list[np.ndarray]] = [[] for _ in matrices]
    targets = jnp.zeros((len(matrices), _MOST, _MOST), matrices[0].dtype)
    for step in range(len(turned[0])):
        gramians = jnp.asarray([_padded(rows[step] @ rows[step].T, 0) for rows in turned])
        order = jnp.asarray([_padded(own[step], np.arange(_MOST)) for own in orders])
        if method == "gradvac":
            weights, targets = weigh(gramians, order, targets, active)
        elif method == "pcgrad":
            weights = weigh(gramians, order, active)
        else:
            weights = weigh(gramians, active)
        for case, rows in enumerate(turned):
            steps[case].append(np.asarray(weights[case])[: len(rows[step])] @ rows[step])
    return [np.stack(own) if method == "gradvac" else own[0] for own in steps]


def _steps_of(method: str, matrix: np.ndarray) -> list[np.ndarray]:
    return [matrix, 2 * matrix[:, ::-1], matrix] if method == "gradvac" else [matrix]


def _padded(values: np.ndarray, others: Any) -> np.ndarray:
    """Values [K, K] as the first of [7, 7], the rest of which are the others'."""
    whole = np.broadcast_to(np.asarray(others, values.dtype), (_MOST, _MOST)).copy()
    whole[: len(values), : len(values)] = values
    return whole


def fixtures_table() -> str:
    """Largest errors by method, as a table."""
    with jax.enable_x64(True):
        rows = {method: fixture_errors(method) for method in WEIGHTS}
    lines = [f"{'method':20}{'cases':>6}{'largest error':>15}  case"]
    for method, errors in rows.items():
        worst = max(errors, key=lambda name: errors[name][0])
        error, left = errors[worst]
        rest = f"; TorchJD's own iteration has up to {left:.1e} left there" if left else ""
        lines.append(f"{method:20}{len(errors):6}{error:15.1e}  {worst}{rest}")
    return "\n".join(lines)


_NUMBER_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of the collective operations of a compiled program by kind.

    Args:
        program: text of the program.

    Returns:
        For each kind that occurs, how many operations there are, and the bytes of their results on a device.
    """
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in _COLLECTIVE.findall(program):
        size = sum(
            _NUMBER_BYTES[dtype] * math.prod(int(length) for length in dims.split(",") if length)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + size
    return found


def sent(found: dict[str, tuple[int, int]], devices: int) -> int:
    """Bytes that a device sends: a share of (n - 1) / n of each result, twice for an all-reduce."""
    bytes_by_kind = {kind: size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in found.items()}
    return sum(bytes_by_kind.values()) * (devices - 1) // devices


def bytes_of_steps(size: str, methods: Sequence[str], batch: int) -> dict[str, Any]:
    """Collective operations of the step of each method, on as many devices as there are datasets."""
    config = SIZES[size]()
    devices = len(config.datasets)
    result: dict[str, Any] = {"size": size, "devices": devices, "methods": {}}
    for method in methods:
        step, state, batches, parameters = _step(config, method, batch, devices)
        program = step.lower(state, batches).compile().as_text()  # type: ignore[attr-defined]
        found = collectives(program)
        result["methods"][method] = {"collectives": found, "sent": sent(found, devices)}
        result["shared_bytes"] = parameters * 4
        timing.report(f"{method}: {found}")
    return result


def costs(size: str, methods: Sequence[str], batch: int, repeats: int) -> dict[str, Any]:
    """Time of a step of each method over that of the plain mean, on one device."""
    config = SIZES[size]()

    def compiled(method: str) -> Callable[[], object]:
        step, state, batches, _ = _step(config, method, batch, 1)
        function = timing.thread_state(step, state, [batches])
        jax.block_until_ready(function())
        return function

    mean = compiled("mean")
    seconds_of_mean, over_mean = list[float](), dict[str, list[float]]()
    for name in ("mean again", *methods):
        # One program beside that of the mean: all at once are more than a process may map.
        rounds = timing.rounds({"mean": mean, name: compiled(name.removesuffix(" again"))}, repeats)
        ratios = [own / plain for own, plain in zip(rounds[name], rounds["mean"], strict=True)]
        over_mean[name] = [float(value) for value in np.quantile(ratios, (0.5, 0.25, 0.75))]
        seconds_of_mean += rounds["mean"]
        timing.report(f"{name}: {over_mean[name][0]:.3f} times the mean")
    return {
        "size": size,
        "repeats": repeats,
        "machine": {"device": jax.devices()[0].device_kind, "cores": available_cores(), "jax": jax.__version__},
        "mean_ms": statistics.median(seconds_of_mean) * 1e3,
        "over_mean": over_mean,
    }


def _step(
    config: ExperimentConfig, method: str, batch: int, devices: int
) -> tuple[Callable[..., tuple], Any, Any, int]:
    """Step, state and batch of a run with a method, and the number of shared parameters."""
    datasets = len(config.datasets)
    harmonize = HarmonizeConfig(method, weights=tuple(range(1, datasets + 1)))  # type: ignore[arg-type]
    config = replace(config, harmonize=harmonize)
    optimizer = optax.adamw(1e-4)
    balancer = build_balancer(config.harmonize, datasets, DATASET)
    mesh = train_mesh(datasets, jax.devices()[:devices])
    graph, state = create_state(
        build_detector(config), optimizer, balancer, kind=partial(packing_kind, frozen=(), grouped={})
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.shared))
    step = make_train_step(graph, state, config, optimizer, balancer, mesh)
    sources = [SyntheticSource(s.spec, "train", batch, scale=s.scale) for s in config.datasets]
    rows = [collate([source[i] for i in range(batch)], config.model) for source in sources]
    sizes = zip(*(row.tables.sizes for row in rows), strict=True)
    capacities = LevelSizes(*(-(-max(size) // _BLOCK) * _BLOCK for size in sizes))
    layout = PlanLayout.of(config.model, "any")
    batches = stack_batches([[pad_batch(row, capacities, _MAX_BOXES, layout)] for row in rows])
    return step, place_state(state, mesh), batches, parameters


def bytes_table(result: dict[str, Any]) -> str:
    """Format bytes as a table."""
    shared, devices = result["shared_bytes"], result["devices"]
    lines = [
        f"{result['size']}: {shared:,} bytes of shared parameters, {devices} devices; collective operations in the "
        "compiled step, count and bytes of results",
        f"{'method':16}{'all-reduce':>22}{'all-to-all':>22}{'all-gather':>22}{'sent':>14}{'over mean':>12}",
    ]
    mean = result["methods"].get("mean", {}).get("sent")
    for method, row in result["methods"].items():
        cells = [row["collectives"].get(kind, (0, 0)) for kind in ("all-reduce", "all-to-all", "all-gather")]
        over = f"{row['sent'] - mean:+,}" if mean is not None else ""
        lines.append(
            f"{method:16}" + "".join(f"{count:6}{size:16,}" for count, size in cells) + f"{row['sent']:14,}{over:>12}"
        )
    return "\n".join(lines)


def costs_table(result: dict[str, Any]) -> str:
    """Format costs as a table."""
    machine = result["machine"]
    lines = [
        f"{result['size']} on {machine['device']}, {machine['cores']} cores: a step with the mean takes "
        f"{result['mean_ms']:.1f} ms; ratios over it, median of {result['repeats']} rounds and quartiles",
    ]
    for name, (median, low, high) in result["over_mean"].items():
        lines.append(f"  {name:16}{median:8.4f}  [{low:.4f}, {high:.4f}]")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.balancers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--fixtures", action="store_true", help="errors against TorchJD")
    wanted.add_argument("--bytes", action="store_true", help="bytes exchanged in a step")
    wanted.add_argument("--cost", action="store_true", help="time of a step")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="config words (default: mean, ngh, Gramian ones)")
    parser.add_argument("--size", choices=tuple(SIZES), default="demo", help="default demo")
    parser.add_argument("--batch", type=int, default=1, help="scans of a dataset (default 1)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of --cost (default 15)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    for name in ("repeats", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    if options.fixtures:
        print(fixtures_table())
        return 0
    if options.bytes:
        jax.config.update("jax_num_cpu_devices", len(SIZES[options.size]().datasets))
        methods = options.methods or ("mean", "ngh", *GRAMIAN_METHODS)
        result = bytes_of_steps(options.size, methods, options.batch)
        text = bytes_table(result)
    else:
        methods = [method for method in options.methods or METHODS if method != "mean"]
        result = costs(options.size, methods, options.batch, options.repeats)
        text = costs_table(result)
    print(json.dumps(result, indent=1) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
