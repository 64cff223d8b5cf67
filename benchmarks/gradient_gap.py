"""F of the gradients of shared kernels between procedural datasets, by the gap between them.

    python -m benchmarks.gradient_gap [--gaps=0,1,2] [--seeds=0-9] [--steps=60] [--json=FILE]

Each run trains the demo with every kernel shared and the mean of the datasets' gradients. Then it takes each dataset's
gradient on batches of new scans, and compares them, for each 3^3 kernel and for each of its offsets:

    F = between / within = sum_k M |m_k - m|^2 / (D - 1)  /  (sum_k,b |g_kb - m_k|^2 / (D (M - 1)))

with D datasets of M batches, g_kb the gradient of batch b of dataset k, m_k the mean of a dataset and m that of all.
Where the datasets are one distribution, F is distributed as it is after its batches are dealt to the datasets at
random: the null.

The gradients are taken twice. "own": each dataset's through its own head, as a training step sees them. Heads differ
by their start and by the noise of training even where the data do not, most in the layers next to them, so that F is
above the null at gap 0 after a short training. "first": all through the first dataset's head, with the classes that it
knows, so that only the data differ: at gap 0 the null holds exactly.

The table has F, the 95 % interval of the null, both as means over seeds, the runs that lie inside their own interval,
and the share of offsets above the null's 97.5 % quantile, 0.025 where there is nothing. Below it are the rises from gap
to gap, paired over seeds, with intervals by bootstrap. A run takes about a minute on two cores. Cells that FILE has
already are not computed again.

`--against=RUN,RUN` asks whether the choices of runs with kernel selection go with this F: the rank correlation, over
the offsets of the layers that select, of F (mean over seeds) with the share of exclusive kernels in the last line of a
run's selection.jsonl, and its mean within layers. The gap is that of the run.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
from scipy import stats

from benchmarks.planted import numbers as whole_numbers
from benchmarks.timing import report
from configs.joint import get_config
from h2a2_jax.balancers.packing import unpack
from h2a2_jax.checkpoint.train_state import TrainState
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, experiment_config, from_json
from h2a2_jax.distributed import DATASET, REPLICA, MeshLayout, train_mesh
from h2a2_jax.initialization import build_detector
from h2a2_jax.loader.batching import Batch
from h2a2_jax.models import Targets
from h2a2_jax.scans.scan import enclosing_boxes
from h2a2_jax.scans.specs import DatasetSpec, class_label
from h2a2_jax.sparse.xla_cpu import compiler_options
from h2a2_jax.training.build import Trainer, build_stream, build_trainer
from h2a2_jax.training.gradients import dataset_gradients, targets_of
from h2a2_jax.training.metrics import SELECTION_FILE, read_selection_log

OFFSETS = 27
MEANS = {"backbone": "mean over the backbone", "": "mean over all layers"}
"""Lines of the table by the beginning of the names of their layers."""
PERMUTATIONS = 199
TRAIN_SCANS = 48
"""Training scans of a dataset."""
_NEW_SCANS = 10_000
"""Added to the seed of the scans that gradients are taken on."""


def f_statistics(gram: Float[np.ndarray, "*v n n"], groups: Int[np.ndarray, "r n"]) -> Float[np.ndarray, "*v r"]:
    """F of vectors in groups of one size, by the inner products of the vectors.

    Args:
        gram: inner products.
        groups: number of the group of each vector, for each of r ways of grouping them.
    """
    vectors, number = groups.shape[1], groups.max() + 1
    member = (groups[:, None] == np.arange(number)[:, None]).astype(float)  # [r, number, n]
    squares = np.trace(gram, axis1=-2, axis2=-1)
    total = squares - gram.sum((-2, -1)) / vectors
    of_means = np.einsum("rkn,...nm,rkm->...r", member, gram, member, optimize=True) * number / vectors
    within = squares[..., None] - of_means
    return (total[..., None] - within) / (number - 1) / (within / (vectors - number))


def groupings(datasets: int, batches: int, seed: int) -> Int[np.ndarray, "r n"]:
    """Return the dataset of each batch as it is (first row) and permuted at random."""
    true = np.repeat(np.arange(datasets), batches)
    rng = np.random.default_rng(seed)
    return np.stack([true, *(rng.permutation(true) for _ in range(PERMUTATIONS))])


def compare(gradients: Float[np.ndarray, "d m v p"], seed: int) -> dict[str, Any]:
    """F of one kernel and of each of its offsets, and F of the permuted batches.

    Args:
        gradients: gradient of each batch of each dataset, by offset.
        seed: of the permutations.
    """
    datasets, batches, offsets, _ = gradients.shape
    rows = gradients.reshape(datasets * batches, offsets, -1).astype(np.float64)
    rows = rows - rows.mean(0)
    gram = np.einsum("nvp,mvp->vnm", rows, rows, optimize=True)
    groups = groupings(datasets, batches, seed)
    whole, each = f_statistics(gram.sum(0), groups), f_statistics(gram, groups)
    above = each[:, 0] > np.quantile(each[:, 1:], 0.975, axis=1)
    return {
        "f": float(whole[0]),
        "permuted": np.round(whole[1:], 4).tolist(),
        "offsets": np.round(each[:, 0], 4).tolist(),
        "offsets_above": float(above.mean()),
    }


def gradient_function(config: ExperimentConfig, trainer: Trainer, mesh: Mesh) -> Callable[..., Any]:
    """Compile (shared, exclusive, stats, batch, targets) -> gradients of the shared parameters, by dataset."""

    def gradients(shared: Any, exclusive: Any, stats: Any, batch: Batch, targets: Targets) -> Any:
        def one_dataset(part: tuple) -> Any:
            exclusive, stats, batch, targets = part
            return dataset_gradients(trainer.graph, shared, exclusive, stats, batch, targets, (), config.train)[0]

        own = jax.tree.map(lambda leaf: leaf[:, None], (exclusive, stats))
        return lax.map(one_dataset, (*own, jax.tree.map(lambda leaf: leaf[:, 0], batch), targets))

    own = P(DATASET)
    specs = (P(), own, own, P(DATASET, REPLICA), own)
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
    return jax.jit(sharded, compiler_options=compiler_options())


def for_first_head(batch: Batch, specs: Sequence[DatasetSpec]) -> Batch:
    """Annotate the scans of all datasets as the first one: its labels, and axis-aligned boxes if it has no yaw.

    A box of a class that the first dataset does not have is no box.
    """
    labels, boxes = np.array(batch.labels), np.array(batch.boxes)
    for dataset, spec in enumerate(specs):
        # The label -1 of padding finds the last entry.
        table = [*(class_label(name.replace("bookcase", "bookshelf"), specs[0]) for name in spec.classes), -1]
        labels[dataset] = np.array(table, np.int32)[labels[dataset]]
    if not specs[0].has_yaw:
        boxes = enclosing_boxes(boxes.reshape(-1, 7)).reshape(boxes.shape)
    return replace(batch, labels=labels, boxes=boxes)


def train(config: ExperimentConfig, ladder: Any) -> tuple[Trainer, TrainState, MeshLayout, Any]:
    """Train a run of the config, in the shapes of a bucket ladder (None: its own, which is returned)."""
    layout = MeshLayout(train_mesh(len(config.datasets), jax.devices()[:1]), len(config.datasets))
    stream = build_stream(config, layout)
    stream.ladder = ladder or stream.ladder
    trainer = build_trainer(config, build_detector(config), layout, stream.steps_per_epoch, config.train.steps)
    state = trainer.start
    for item in stream.steps(0, config.train.steps):
        # Waited for, so that the batches of steps to come do not pile up in memory.
        state, _ = jax.block_until_ready(trainer.take_step(state, item.batch))
    return trainer, unpack(layout.fetch(state)), layout, stream.ladder


def run(config: ExperimentConfig, batches: int, ladder: Any) -> tuple[list[dict[str, Any]], Any]:
    """Train one run and compare the gradients of its kernels, through both kinds of heads; also the bucket ladder."""
    trainer, state, layout, ladder = train(config, ladder)
    new = [replace(s, seed=s.seed + _NEW_SCANS, train_size=batches * config.train.batch_size) for s in config.datasets]
    stream = build_stream(replace(config, datasets=tuple(new)), layout)
    stream.ladder = ladder
    gradients, targets = gradient_function(config, trainer, layout.mesh), targets_of(config.specs, config.model)

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[:1], len(leaf), axis=0), tree)

    names = flat_names(state.shared)
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for item in stream.steps(0, batches):
        passes = {
            "own": (state.exclusive, state.stats, item.batch, targets),
            "first": (first(state.exclusive), state.stats, for_first_head(item.batch, config.specs), first(targets)),
        }
        for heads, arguments in passes.items():
            leaves = jax.tree.leaves(gradients(state.shared, *arguments))
            for name, leaf in zip(names, leaves, strict=True):
                if leaf.ndim == 4 and leaf.shape[1] == OFFSETS:
                    found.setdefault((heads, name), []).append(np.asarray(leaf).reshape(*leaf.shape[:2], -1))
    cells = [
        {"heads": heads, "layer": name.removesuffix(".kernel"), **compare(np.stack(parts, 1), config.train.seed)}
        for (heads, name), parts in found.items()
    ]
    return cells, ladder


def config_of(gap: float, seed: int, steps: int) -> ExperimentConfig:
    """Config of a run: the demo at a gap, every kernel shared, new scans for every seed."""
    config = experiment_config(get_config(f"demo,no_sfks,gap{gap:g}"))
    return replace(
        config,
        datasets=tuple(replace(source, seed=seed, train_size=TRAIN_SCANS) for source in config.datasets),
        harmonize=HarmonizeConfig("mean"),
        train=replace(config.train, steps=steps, seed=seed),
    )


def table_of(cells: Sequence[dict[str, Any]]) -> str:
    """Format F by heads, gap and layer, means over seeds; the last lines of a gap are means over layers."""
    lines = [f"{'heads':<7}{'gap':<5}{'layer':<35}{'F':>6}   {'null, 95 %':<14}{'':8}runs inside  offsets above"]
    for heads, gap in sorted({(cell["heads"], cell["gap"]) for cell in cells}):
        here = [cell for cell in cells if (cell["heads"], cell["gap"]) == (heads, gap)]
        layers = {cell["layer"]: [c for c in here if c["layer"] == cell["layer"]] for cell in here}
        rows = {**layers, **{line: _mean_over_layers(here, start) for start, line in MEANS.items()}}
        for layer, chosen in rows.items():
            f = np.mean([cell["f"] for cell in chosen])
            low, high = _interval(np.mean([cell["permuted"] for cell in chosen], axis=0))
            verdict = "below" if f < low else "above" if f > high else "inside"
            inside = sum(low <= cell["f"] <= high for cell in chosen for low, high in [_interval(cell["permuted"])])
            above = np.mean([cell["offsets_above"] for cell in chosen])
            lines.append(
                f"{heads:<7}{gap:<5g}{layer:<35}{f:6.3f}   {low:.3f}-{high:.3f}   {verdict:<8}"
                f"{inside:>4} of {len(chosen):<5}{above:12.3f}"
            )
    return "\n".join(lines)


def rises_of(cells: Sequence[dict[str, Any]]) -> str:
    """Format the rise of F, mean over layers, from each gap to the next, over the seeds that both have."""
    lines = []
    gaps = itertools.pairwise(sorted({cell["gap"] for cell in cells}))
    for heads, (low, high), start in itertools.product(("first", "own"), gaps, MEANS):
        parts = [[c for c in cells if (c["heads"], c["gap"]) == (heads, gap)] for gap in (low, high)]
        before, after = ({mean["seed"]: mean["f"] for mean in _mean_over_layers(part, start)} for part in parts)
        rise = np.array([after[seed] - before[seed] for seed in before if seed in after])
        if len(rise):
            means = np.random.default_rng(0).choice(rise, (10_000, len(rise))).mean(1)
            lines.append(
                f"{heads} heads, gap {low:g} to {high:g}, {MEANS[start]}: F rises by {rise.mean():.3f} "
                f"({np.quantile(means, 0.025):.3f} to {np.quantile(means, 0.975):.3f}, {len(rise)} seeds)"
            )
    return "\n".join(lines)


def correlation(run: Path, cells: Sequence[dict[str, Any]]) -> str:
    """Format the rank correlation of F with the exclusive share of a run's offsets."""
    config = from_json((run / "config.json").read_text())
    gap = config.datasets[0].gap
    _, history = read_selection_log(run / SELECTION_FILE, config.dataset_names)
    lines = []
    for heads in ("first", "own"):
        pairs = []
        for name, layer in history.items():
            stage, block, conv = map(int, re.findall(r"\d+", name))
            path = f"backbone.stages.{stage - 1}.{block}.{('first', 'second')[conv - 1]}.conv"
            found = [c["offsets"] for c in cells if (c["heads"], c["gap"], c["layer"]) == (heads, gap, path)]
            pairs.append((np.mean(found, axis=0), 1 - layer.gamma[-1].mean(0)))
        f, share = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        within = np.nanmean([stats.spearmanr(*pair).statistic if np.ptp(pair[1]) else np.nan for pair in pairs])
        whole = stats.spearmanr(f, share)
        lines.append(
            f"{run.name}, gap {gap:g}, {heads} heads: rank correlation {whole.statistic:.2f} (p {whole.pvalue:.1g}), "
            f"within layers {within:.2f}; F of exclusive offsets {np.mean(f[share > 0.5]):.2f}, of shared ones "
            f"{np.mean(f[share <= 0.5]):.2f}, {np.sum(share > 0.5)} of {len(f)} exclusive"
        )
    return "\n".join(lines)


def _mean_over_layers(cells: Sequence[dict[str, Any]], start: str) -> list[dict[str, Any]]:
    """One cell for each seed, of the layers whose names begin with `start`.

    All layers of a run are permuted alike, so that their permuted values can be averaged.
    """
    seeds: dict[int, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["layer"].startswith(start):
            seeds.setdefault(cell["seed"], []).append(cell)
    keys = ("f", "permuted", "offsets_above")
    return [
        {"seed": seed, **{key: np.mean([cell[key] for cell in own], axis=0) for key in keys}}
        for seed, own in seeds.items()
    ]


def _interval(permuted: Any) -> tuple[float, float]:
    low, high = np.quantile(permuted, (0.025, 0.975))
    return float(low), float(high)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_gap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = partial(str.split, sep=",")
    parser.add_argument("--gaps", type=numbers, default="0,1,2", help="default 0,1,2")
    parser.add_argument("--seeds", type=whole_numbers, default="0-9", help="default 0-9")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default 60)")
    parser.add_argument("--batches", type=int, default=8, help="batches of a dataset to compare (default 8)")
    parser.add_argument("--json", type=Path, help="file of the cells; those in it are kept")
    parser.add_argument("--against", type=numbers, default=[], help="folders of runs with kernel selection")
    options = parser.parse_args(arguments)
    cells = json.loads(options.json.read_text())["cells"] if options.json and options.json.exists() else []
    for gap in map(float, options.gaps):
        ladder = None
        for seed in options.seeds:
            if any((cell["gap"], cell["seed"]) == (gap, seed) for cell in cells):
                continue
            new, ladder = run(config_of(gap, seed, options.steps), options.batches, ladder)
            cells += [{"gap": gap, "seed": seed, **cell} for cell in new]
            report(f"gap {gap:g}, seed {seed}: mean F {np.mean([cell['f'] for cell in new]):.3f}")
            if options.json:
                options.json.write_text(json.dumps({"cells": cells}))
    print(table_of(cells))
    print(rises_of(cells))
    for folder in options.against:
        print(correlation(Path(folder), cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
