"""Cost of balancing the datasets' gradients: steps of training with NGH and with the plain mean, in turns.

    python -m benchmarks.harmonize [--size demo|full] [--batch N] [--repeats N]

A step is the whole one, forward and backward over three datasets, balancing, clipping and AdamW, with kernel selection,
on procedural scans; the cost is the median over rounds of the ratio of two steps taken one after the other. The time of
the balancers alone, with the mean over datasets, for gradients of the same shapes, resolves a thousandth of a step.
"demo" is the demo of configs/joint.py; "full" has the widths of TR3D, on scans of the size of real ones.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from configs.joint import demo, paper
from h2a2_jax.balancers import build_balancer, recorded
from h2a2_jax.balancers.ngh import mean_over_datasets, plain_mean
from h2a2_jax.checkpoint.train_state import create_state, place_state
from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, SourceConfig
from h2a2_jax.distributed import DATASET, stack_batches, train_mesh
from h2a2_jax.host import available_cores
from h2a2_jax.initialization import build_detector
from h2a2_jax.loader.batching import collate, pad_batch
from h2a2_jax.models import DetectorConfig, DetectorNetwork, LevelSizes, PlanLayout
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.training.metrics import group_summary
from h2a2_jax.training.step import make_train_step

SIZES: dict[str, tuple[ExperimentConfig, Any]] = {"demo": (demo(), "demo"), "full": (paper(), "full")}
"""Run and size of the scans by name."""
_BLOCK = 64
_MAX_BOXES = 64


def run(size: str, *, batch: int, repeats: int, steps: bool = True) -> dict[str, Any]:
    """Measure; `--json` prints the result.

    Args:
        size: of `SIZES`.
        batch: scans of a dataset.
        repeats: rounds.
        steps: whether to take whole steps, or the balancers alone.
    """
    config, scale = SIZES[size]
    model = build_detector(config)
    shared = create_state(model, optax.identity(), plain_mean())[1].shared
    alone, host_ms = _alone(shared, repeats)
    result = {
        "size": size,
        "batch": batch,
        "repeats": repeats,
        "machine": {"device": jax.devices()[0].device_kind, "cores": available_cores(), "jax": jax.__version__},
        "shared_parameters": sum(leaf.size for leaf in jax.tree.leaves(shared)),
        "shared_tensors": len(jax.tree.leaves(shared)),
        "balancer_ms": alone,
        "group_summary_ms": host_ms,
    }
    if steps:
        rounds = _steps(model, config.model, scale, batch, repeats)
        ratios, control = (
            [other / mean for other, mean in zip(rounds[name], rounds["mean"], strict=True)]
            for name in ("ngh", "mean again")
        )
        step_ms = {name: statistics.median(values) * 1e3 for name, values in rounds.items()}
        result |= {
            "step_ms": step_ms,
            "ngh_over_mean": statistics.median(ratios),
            "ngh_over_mean_rounds": ratios,
            "mean_over_mean": statistics.median(control),
            "ngh_share_of_step": (alone["ngh"] - alone["plain mean"]) / step_ms["mean"],
        }
    return result


def _alone(shared: Any, repeats: int) -> tuple[dict[str, float], float]:
    """Median ms of the balancers with the mean that follows, on random gradients; and of the metrics on the host."""
    datasets = len(SPECS)
    present, losses = jnp.ones(datasets, bool), 1 + jnp.arange(datasets, dtype=jnp.float32)
    scales = np.array([0.02, 1.0, 7.0], np.float32)

    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        values = rng.standard_normal((datasets, *leaf.shape), np.float32)
        return jnp.asarray(values * scales.reshape(-1, *[1] * leaf.ndim))

    grads = jax.tree.map(draw, shared)
    balancers = {"plain mean": plain_mean()}
    for method in ("ngh", "mean", "pcgrad", "gradnorm"):
        balancers["recorded mean" if method == "mean" else method] = build_balancer(HarmonizeConfig(method), datasets)

    def step(balancer: optax.GradientTransformationExtraArgs, grads: Any, state: Any) -> Any:
        updates, state = balancer.update(grads, state, present=present, losses=losses)
        return mean_over_datasets(updates, present), state

    functions = {}
    for name, balancer in balancers.items():
        functions[name] = partial(jax.jit(partial(step, balancer)), grads, balancer.init(shared))
    ms = {name: seconds * 1e3 for name, seconds in timing.alternate(functions, max(repeats, 5)).items()}
    record = recorded(functions["ngh"]()[1])
    assert record is not None
    clock = []
    for _ in range(5):
        start = time.perf_counter()
        group_summary(record, [spec.name for spec in SPECS], 0.8)
        clock.append(time.perf_counter() - start)
    return ms, statistics.median(clock) * 1e3


def _steps(
    model: DetectorNetwork, config: DetectorConfig, scale: Any, batch: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each round's step by balancer."""
    mesh = train_mesh(len(SPECS), jax.devices()[:1])
    collated = [collate([source[i] for i in range(batch)], config) for source in _sources(scale, batch)]
    sizes = zip(*(row.tables.sizes for row in collated), strict=True)
    capacities = LevelSizes(*(-(-max(size) // _BLOCK) * _BLOCK for size in sizes))
    batches = stack_batches(
        [[pad_batch(row, capacities, _MAX_BOXES, PlanLayout.of(config, "any"))] for row in collated]
    )
    batches = jax.device_put(batches)
    experiment = ExperimentConfig(tuple(SourceConfig(spec.name, kind="synthetic") for spec in SPECS), model=config)
    functions: dict[str, Callable[[], object]] = {}
    balancers = {"mean": plain_mean(), "ngh": build_balancer(HarmonizeConfig("ngh"), len(SPECS), DATASET)}
    for name, balancer in balancers.items():
        optimizer = optax.adamw(1e-4)
        graph, state = create_state(model, optimizer, balancer)
        step = make_train_step(graph, state, experiment, optimizer, balancer, mesh)
        functions[name] = timing.thread_state(step, place_state(state, mesh), [batches])
        if name == "mean":
            functions["mean again"] = timing.thread_state(step, place_state(state, mesh), [batches])
        start = time.perf_counter()
        jax.block_until_ready(functions[name]())
        timing.report(f"step with {name}: first one after {time.perf_counter() - start:.0f} s")
    return timing.rounds(functions, repeats)


def _sources(scale: Any, batch: int) -> list[SyntheticSource]:
    return [SyntheticSource(spec, "train", batch, scale=scale) for spec in SPECS]


def table_of(result: dict[str, Any]) -> str:
    """Format the result as a table."""
    lines = [
        f"{result['size']}: {result['shared_parameters']:,} shared parameters in {result['shared_tensors']} tensors, "
        f"{len(SPECS)} datasets of {result['batch']} scans; {result['machine']['device']}, "
        f"{result['machine']['cores']} cores",
        "balancer alone, with the mean over datasets:",
        *(f"  {name:14}{ms:10.2f} ms" for name, ms in result["balancer_ms"].items()),
        f"metrics by groups, on the host at a logged step: {result['group_summary_ms']:.1f} ms",
    ]
    if "step_ms" in result:
        lines += [
            "step of training:",
            *(f"  {name:14}{ms:10.1f} ms" for name, ms in result["step_ms"].items()),
            f"NGH over the mean: {result['ngh_over_mean']:.4f} (median of {result['repeats']} rounds from "
            f"{min(result['ngh_over_mean_rounds']):.3f} to {max(result['ngh_over_mean_rounds']):.3f}); alone it is "
            f"{100 * result['ngh_share_of_step']:.2f} % of the step",
            f"the mean over itself, a measure of the noise: {result['mean_over_mean']:.4f}",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harmonize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="demo", help="default demo")
    parser.add_argument("--batch", type=int, default=1, help="scans of a dataset (default 1)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; the median counts (default 15)")
    parser.add_argument("--alone", action="store_true", help="the balancers alone, without steps of training")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    for name in ("repeats", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    result = run(options.size, batch=options.batch, repeats=options.repeats, steps=not options.alone)
    print(json.dumps(result, indent=1) if options.json else table_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
