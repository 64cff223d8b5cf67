"""What kernel selection by agreement costs: train step and prediction beside those of the prior "learned", in turns.

    python -m benchmarks.selection [--config=demo] [--batches=4] [--rounds=15]

Both detectors have the same parameters, and train on the same batches, which lie on the device. A round takes every
step once, in an order that turns from round to round, and the same step of the "learned" prior once more ("again"),
which measures the noise. Prediction is one folded network pass over a batch of each dataset. Medians of the rounds'
ratios.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from benchmarks.timing import rounds, thread_state
from configs.joint import get_config
from h2a2_jax.config import ExperimentConfig, experiment_config
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.inference.folding import fold
from h2a2_jax.initialization import build_detector
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.layers.kernel_selection import READING_0_1_0
from h2a2_jax.sparse.xla_cpu import compiler_options
from h2a2_jax.training.build import build_stream, build_trainer


def rivals(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """The config's selection and that of the prior "learned"."""
    selection = config.model.selection
    assert selection is not None
    old = replace(selection, **READING_0_1_0)
    return {"learned": replace(config, model=replace(config.model, selection=old)), "agreement": config}


def prepare(config: ExperimentConfig, count: int) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Calls of a train step, which pass their state on, and of a prediction, by name."""
    layout = MeshLayout(train_mesh(len(config.datasets), jax.devices()[:1]), len(config.datasets))
    stream = build_stream(config, layout)
    batches = [jax.device_put(item.batch) for item in stream.steps(0, count)]
    steps: dict[str, Callable[[], Any]] = {}
    passes: dict[str, Callable[[], Any]] = {}
    for name, rival in rivals(config).items():
        detector = build_detector(rival)
        trainer = build_trainer(rival, detector, layout, 100, 10_000, stream.num_scans)
        for label in (name, *(["again"] if name == "learned" else [])):
            steps[label] = thread_state(
                trainer.take_step, jax.tree.map(lambda leaf: leaf.copy(), trainer.start), batches
            )
        passes[name] = _prediction(detector, batches[0])
    passes["again"] = passes["learned"]
    for call in (*steps.values(), *passes.values()):
        jax.block_until_ready(call())
    return steps, passes


def _prediction(detector: Any, batch: Any) -> Callable[[], Any]:
    count = len(detector.heads_config)
    folded = [fold(detector, DatasetContext.one(d, count), d) for d in range(count)]
    parts = [jax.tree.map(lambda leaf, d=d: leaf[d, 0], (batch.features, batch.plan)) for d in range(count)]

    @jax.jit
    def every(models: Any, parts: Any) -> Any:
        context = ForwardContext(DatasetContext.one(0, 1), training=False)
        return [model(*part, context).logits for model, part in zip(models, parts, strict=True)]

    compiled = every.lower(folded, parts).compile(compiler_options())
    return lambda: compiled(folded, parts)


def line_of(what: str, seconds: dict[str, list[float]]) -> str:
    """Medians, and ratios to the prior "learned"."""
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["learned"], strict=True))
        for name in ("agreement", "again")
    }
    return (
        f"{what}: learned {ms['learned']:.1f} ms, agreement {ms['agreement']:.1f} ms, ratio {ratios['agreement']:.3f}; "
        f"learned over itself {ratios['again']:.3f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="demo", help="variant of configs/joint.py with procedural scans")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    steps, passes = prepare(experiment_config(get_config(options.config)), options.batches)
    print(line_of("train step", rounds(steps, options.rounds)))
    print(line_of("prediction, a batch of each dataset", rounds(passes, options.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
