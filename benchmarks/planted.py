"""Kernel selection where the truth is known: does it find the offsets that datasets share, and does that pay?

    python -m benchmarks.planted --seeds=0-9 --scans=2,6,24 --gap=0,.2,1 --json=planted.json

Three datasets of scans with random features on a few planes; the targets of a scan are a sparse 3^3 convolution of its
features and noise. The kernels of the datasets are equal at `--shared` of the 27 offsets; at the others they are
sqrt(1 - gap) of a common kernel and sqrt(gap) of one of the dataset's own. One `SelectiveConv` is trained on the
targets by the library's train step, balancer and all, and measured on other scans without noise. Rows:

    shared, exclusive   every offset shared, or exclusive
    partition           the planted offsets shared, the others exclusive: the best that a selection can do
    frozen, learned     the prior "learned", as version 0.1.0 had it, with O, P and A as they are drawn or trained
    default             the library's default
    half_cosine, pairs, kernels, sharp
                        the default but for one reading: beta without a centre, pooled over pairs of an offset,
                        prototypes from the kernels, no exploration
    rates               the prior "learned" with 30 times the learning rate for O, P and A

Test MSE is the mean over datasets. AUC is that of the share of steps and scans in which an offset took the shared
kernel, for telling the planted offsets from the others. "kept" is the share of choices that are those of the first
step. Differences between rows are paired over seeds, with 95 % intervals of Student's t.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float
from scipy import stats

from h2a2_jax.balancers import HarmonizeConfig, build_balancer
from h2a2_jax.checkpoint.parameter_groups import frozen_paths
from h2a2_jax.checkpoint.train_state import create_state, merge_model, place_state, split_model
from h2a2_jax.config import EvalConfig, ExperimentConfig, OptimConfig, ParameterGroup, SourceConfig, TrainConfig
from h2a2_jax.distributed import DATASET, train_mesh
from h2a2_jax.figures import COLORS, canvas
from h2a2_jax.layers import DatasetContext, ForwardContext, SelectionConfig, SelectiveConv
from h2a2_jax.layers.kernel_selection import READING_0_1_0
from h2a2_jax.losses import DetectionLoss
from h2a2_jax.models import DetectorConfig
from h2a2_jax.optimizer import build_optimizer, grouped_paths, learning_rate
from h2a2_jax.report.offsets import area_under_curve
from h2a2_jax.sparse import KernelMap, SparseTensor, kernel_offsets, pad_map, pad_sites, site_set, submanifold_neighbors
from h2a2_jax.training.gradients import Targets, Terms
from h2a2_jax.training.step import make_train_step

DATASETS = ("scannet", "sunrgbd", "s3dis")
OFFSETS, BOX, TEST_SCANS = 27, 12, 8
BASIC = SelectionConfig(projection_dim=8, embedding_dim=8, hidden=8)
OLD = replace(BASIC, **READING_0_1_0)
FIXED = replace(OLD, tau=0.01)
"""With O at +-20 every choice is O's."""


@dataclass(frozen=True)
class Row:
    """One way to choose kernels.

    Attributes:
        selection: configuration of the layer.
        fixed: "shared", "exclusive" or "partition" where the choices are given; else None.
        frozen: True for O, P and A that stay as drawn.
        factor: learning rate of O, P and A, in units of the others'.
    """

    selection: SelectionConfig
    fixed: str | None = None
    frozen: bool = False
    factor: float = 1.0


ROWS = {
    **{name: Row(FIXED, name, frozen=True) for name in ("shared", "exclusive", "partition")},
    "frozen": Row(OLD, frozen=True),
    "learned": Row(OLD),
    "default": Row(BASIC),
    "half_cosine": Row(replace(BASIC, consistency="half_cosine")),
    "pairs": Row(replace(BASIC, pooling="pairs")),
    "kernels": Row(replace(BASIC, prototypes="kernels")),
    "sharp": Row(replace(BASIC, exploration=1e-9, agreement_sharpness=1e3)),
    "rates": Row(OLD, factor=30.0),
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the test.

    Attributes:
        channels: channels in and out.
        sites: sites of a scan.
        shared: offsets at which the datasets' kernels are equal.
        noise: standard deviation of the noise of the targets; the targets have one near one.
        steps: training steps.
        lr: first learning rate of AdamW, which falls by half a cosine.
        method: balancer of the gradients.
    """

    channels: int = 4
    sites: int = 100
    shared: int = 14
    noise: float = 0.5
    steps: int = 400
    lr: float = 2e-2
    method: str = "ngh"


class Scan(NamedTuple):
    """Coordinates [N, 3], features [N, C], targets without noise [N, C] and with noise."""

    coords: np.ndarray
    features: np.ndarray
    clean: np.ndarray
    noisy: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Scans of each dataset, with leading axes of datasets and replicas."""

    features: Any
    kernel_map: KernelMap
    targets: Any
    present: Any


class Layer(nnx.Module):
    """One selective convolution, with embeddings of the datasets."""

    def __init__(self, selection: SelectionConfig, channels: int, rngs: nnx.Rngs):
        embedding = jax.random.normal(rngs.params(), (len(DATASETS), selection.embedding_dim))
        self.embedding = nnx.Param(embedding, dataset_axis=0)
        self.conv = SelectiveConv(
            channels, channels, num_datasets=len(DATASETS), selection=selection, name="layer", rngs=rngs
        )

    def __call__(self, batch: Batch, context: ForwardContext) -> Array:
        """Outputs [N, C] at the sites of a batch of the context's dataset."""
        assert context.dataset is not None
        context = replace(context, embedding=context.dataset.pick(self.embedding[...]))
        return self.conv(SparseTensor(batch.features, batch.kernel_map.inputs), batch.kernel_map, context).features


def draw_scan(rng: np.random.Generator, kernel: Float[np.ndarray, "v c_in c_out"], settings: Settings) -> Scan:
    """A scan on three planes of a box, one across each axis."""
    occupied = np.zeros((BOX, BOX, BOX), bool)
    for axis in range(3):
        np.moveaxis(occupied, axis, 0)[rng.integers(BOX)] = True
    cells = np.argwhere(occupied)
    coords = cells[np.sort(rng.choice(len(cells), settings.sites, replace=False))]
    features = rng.normal(size=(settings.sites, settings.channels))
    row_of = np.full((BOX + 2,) * 3, settings.sites)
    row_of[tuple(coords.T + 1)] = np.arange(settings.sites)
    padded = np.vstack([features, np.zeros(settings.channels)])
    neighbors = np.stack([row_of[tuple((coords + 1 + offset).T)] for offset in kernel_offsets(3)])
    clean = np.einsum("vnc,vco->no", padded[neighbors], kernel)
    return Scan(coords, features, clean, clean + settings.noise * rng.normal(size=clean.shape))


@dataclass(frozen=True)
class Planted:
    """Scans of each dataset for training and for testing, and the offsets whose kernels are equal."""

    training: list[list[Scan]]
    testing: list[list[Scan]]
    is_shared: np.ndarray


def plant(seed: int, scans: int, gap: float, settings: Settings) -> Planted:
    """Kernels and scans of a seed."""
    rng = np.random.default_rng([seed, 7])
    shape = (OFFSETS, settings.channels, settings.channels)
    common, own = rng.normal(size=shape), rng.normal(size=(len(DATASETS), *shape))
    is_shared = np.zeros(OFFSETS, bool)
    is_shared[rng.permutation(OFFSETS)[: settings.shared]] = True
    mixed = np.sqrt(1 - gap) * common + np.sqrt(gap) * own
    kernels = np.where(is_shared[:, None, None], common, mixed) / OFFSETS**0.5
    drawn = [[draw_scan(rng, kernel, settings) for _ in range(scans + TEST_SCANS)] for kernel in kernels]
    return Planted([found[:scans] for found in drawn], [found[scans:] for found in drawn], is_shared)


def make_batch(scans: Sequence[Scan], noisy: bool) -> Batch:
    """A batch of one dataset, without leading axes."""
    coords = np.concatenate([np.insert(scan.coords, 0, i, axis=1) for i, scan in enumerate(scans)])
    sites = site_set(coords, num_scans=len(scans))
    padded = pad_sites(sites, len(coords))
    targets = np.concatenate([scan.noisy if noisy else scan.clean for scan in scans])
    features = np.concatenate([scan.features for scan in scans])
    return Batch(
        features.astype(np.float32), pad_map(submanifold_neighbors(sites), padded, padded),
        targets.astype(np.float32), np.ones((), bool),
    )  # fmt: skip


def joint_batch(parts: Sequence[Batch]) -> Batch:
    """Batches of the datasets, stacked, with an axis of one replica."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves])[:, None], *parts)


def squared_error(model: Layer, batch: Batch, targets: Targets, context: ForwardContext) -> Terms:
    """Loss of the layer."""
    squares = (model(batch, context) - batch.targets) ** 2
    count = lax.psum(jnp.asarray(squares.size), context.axis_name)
    error = squares.sum() / count
    return Terms(DetectionLoss(error, jnp.zeros_like(error), count), batch.kernel_map.inputs)


def experiment(row: Row, scans: int, batch: int, seed: int, settings: Settings) -> ExperimentConfig:
    """Config of the training, of which the scans are not used."""
    groups: dict[str, Any] = {"freeze": ("selection",)} if row.frozen else {}
    if row.factor != 1:
        groups["groups"] = (ParameterGroup(("selection",), row.factor),)
    return ExperimentConfig(
        tuple(SourceConfig(name, kind="synthetic", train_size=scans, augment=False) for name in DATASETS),
        DetectorConfig(selection=row.selection),
        HarmonizeConfig(method=settings.method),  # type: ignore[arg-type]
        OptimConfig(lr=settings.lr, schedule="cosine", **groups),
        TrainConfig(batch_size=batch, steps=settings.steps, seed=seed),
        EvalConfig(),
    )


class Trained(NamedTuple):
    """Results of a run: test MSE, gamma [steps, D, V] of all steps."""

    mse: float
    gamma: np.ndarray


class Trainer:
    """Trains a row on planted scans; the compiled step is kept from run to run."""

    def __init__(self, row: Row, scans: int, settings: Settings):
        self.row, self.scans, self.settings = row, scans, settings
        self.batch = min(4, -(-scans // 3))
        self._step: Any = None
        self._predict = jax.jit(self._test_errors, static_argnums=0)

    def run(self, planted: Planted, seed: int) -> Trained:
        """Train with a seed, and test."""
        config = experiment(self.row, self.scans, self.batch, seed, self.settings)
        model = Layer(self.row.selection, self.settings.channels, nnx.Rngs(seed))
        if self.row.fixed is not None:
            chosen = {"shared": np.ones(OFFSETS, bool), "exclusive": np.zeros(OFFSETS, bool)}
            shared = chosen.get(self.row.fixed, planted.is_shared)
            model.conv.prior[...] = jnp.where(jnp.asarray(shared), 20.0, -20.0)
        _, exclusive, shared_parameters, _ = split_model(model)
        frozen = frozen_paths(shared_parameters, exclusive, config.optim.freeze)
        schedule = learning_rate(config.optim, steps_per_epoch=1, total_steps=self.settings.steps)
        grouped = grouped_paths(shared_parameters, exclusive, config.optim)
        optimizer = build_optimizer(config.optim, schedule, frozen, grouped)
        balancer = build_balancer(config.harmonize, len(DATASETS), DATASET, seed)
        mesh = train_mesh(len(DATASETS), jax.devices()[:1])
        graph, state = create_state(model, optimizer, balancer)
        if self._step is None:
            self._step = make_train_step(
                graph, state, config, optimizer, balancer, mesh, frozen,
                scans=(self.scans,) * len(DATASETS), objective=squared_error,
            )  # fmt: skip
        state = place_state(state, mesh)
        rng, seen, orders = np.random.default_rng([seed, 8]), [], [[] for _ in DATASETS]  # type: ignore[var-annotated]
        for _ in range(self.settings.steps):
            parts = []
            for dataset, order in enumerate(orders):
                while len(order) < self.batch:
                    order += rng.permutation(self.scans).tolist()
                chosen_scans = [planted.training[dataset][order.pop(0)] for _ in range(self.batch)]
                parts.append(make_batch(chosen_scans, noisy=True))
            state, metrics = self._step(state, joint_batch(parts))
            seen.append(metrics.selection["layer"].gamma)
        tests = [make_batch(scans, noisy=False) for scans in planted.testing]
        arrays = (state.exclusive, state.shared, state.stats)
        errors = [float(self._predict(graph, arrays, test, k)) for k, test in enumerate(tests)]
        return Trained(float(np.mean(errors)), np.stack(jax.device_get(seen)))

    @staticmethod
    def _test_errors(graph: nnx.GraphDef, arrays: tuple, batch: Batch, dataset: Array) -> Array:
        context = ForwardContext(DatasetContext.one(dataset, len(DATASETS)), training=False)
        return ((merge_model(graph, *arrays)(batch, context) - batch.targets) ** 2).mean()


def cell(trainer: Trainer, name: str, gap: float, seed: int) -> dict[str, Any]:
    """Train and describe one run."""
    planted = plant(seed, trainer.scans, gap, trainer.settings)
    mse, gamma = trainer.run(planted, seed)
    share = gamma.mean((0, 1))
    last = gamma[-max(1, len(gamma) // 10) :].mean(0) >= 0.5
    return {
        "scans": trainer.scans, "gap": gap, "row": name, "seed": seed, "mse": mse,
        "auc": area_under_curve(share, planted.is_shared),
        "kept": float((last == (gamma[0] >= 0.5)).mean()),
        "shared_of_shared": float(share[planted.is_shared].mean()),
        "shared_of_others": float(share[~planted.is_shared].mean()),
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and its 95 % interval by Student's t; infinite for a single seed."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("inf")
    return mean, mean - half, mean + half


def table(cells: Sequence[dict[str, Any]], rows: Sequence[str]) -> str:
    """Means of each row, and differences of "default" from the other rows."""
    lines = []
    for scans, gap in dict.fromkeys((c["scans"], c["gap"]) for c in cells):
        lines.append(f"{scans} scans a dataset, gap {gap:g}")
        found = {
            name: {c["seed"]: c for c in cells if (c["scans"], c["gap"], c["row"]) == (scans, gap, name)}
            for name in rows
        }
        for name, runs in found.items():
            if not runs:
                continue
            mse, auc, kept = (np.mean([c[key] for c in runs.values()]) for key in ("mse", "auc", "kept"))
            text = f"  {name:12s} MSE {mse:.4f}  AUC {auc:.2f}  kept {kept:.2f}"
            both = [seed for seed in runs if seed in found.get("default", {})]
            if name != "default" and both:
                mean, low, high = interval([found["default"][s]["mse"] - runs[s]["mse"] for s in both])
                told = "" if low > 0 or high < 0 else "  not told apart"
                text += f"  default - {name} {mean:+.4f} [{low:+.4f}, {high:+.4f}]{told}"
            lines.append(text)
    return "\n".join(lines)


def draw(cells: Sequence[dict[str, Any]], rows: Sequence[str], path: Path) -> None:
    """Draw test MSE (above) and AUC by gap, a column for each number of scans; a dot a seed, a line their mean."""
    counts = list(dict.fromkeys(c["scans"] for c in cells))
    figure, axes = canvas(2, len(counts), 3.2 * len(counts), 5.2, sharex=True, sharey="row")
    for column, scans in enumerate(counts):
        for name, color in zip(rows, itertools.cycle(COLORS)):
            style = {"color": "black", "linewidth": 2.5} if name == "default" else {"color": color}
            here = [c for c in cells if (c["scans"], c["row"]) == (scans, name)]
            gaps = sorted({c["gap"] for c in here})
            for ax, key in zip(axes[:, column], ("mse", "auc"), strict=True):
                if key == "auc" and ROWS[name].fixed is not None:
                    continue
                by_gap = [[c[key] for c in here if c["gap"] == gap] for gap in gaps]
                places = range(len(gaps))
                ax.plot(places, [np.mean(values) for values in by_gap], label=name, **style)
                for place, values in zip(places, by_gap, strict=True):
                    ax.plot([place] * len(values), values, ".", color=style["color"], alpha=0.35)
                ax.set_xticks(places, [f"{gap:g}" for gap in gaps])
                ax.grid(axis="y", alpha=0.3)
        axes[0, column].set_title(f"{scans} scans a dataset", fontsize="medium")
        axes[0, column].set_yscale("log")
        axes[1, column].set_xlabel("gap between the datasets' kernels")
    axes[0, 0].set_ylabel("test MSE")
    axes[1, 0].set_ylabel("AUC of the choices")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows))
    figure.savefig(path, dpi=110)


def numbers(text: str) -> list[int]:
    """Whole numbers of a list like "0,3-5"."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def run(
    seeds: Sequence[int], scans: Sequence[int], gaps: Sequence[float], rows: Sequence[str], settings: Settings
) -> list[dict[str, Any]]:
    """Cells of all combinations; a line of progress each."""
    cells = []
    total = len(seeds) * len(scans) * len(gaps) * len(rows)
    for count in scans:
        for name in rows:
            trainer = Trainer(ROWS[name], count, settings)
            for gap in gaps:
                for seed in seeds:
                    cells.append(cell(trainer, name, gap, seed))
                    done = cells[-1]
                    print(
                        f"{len(cells)} of {total}: {count} scans, gap {gap:g}, {name}, seed {seed}: MSE "
                        f"{done['mse']:.4f}, AUC {done['auc']:.2f}",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
    return cells


def main() -> None:
    """Run, print the table, and write the cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=numbers, default=numbers("0-9"))
    parser.add_argument("--scans", type=numbers, default=[2, 6, 24], help="training scans of each dataset")
    parser.add_argument("--gap", type=lambda text: [float(x) for x in text.split(",")], default=[0.0, 0.2, 1.0])
    default_rows = "shared,exclusive,frozen,partition,learned,default"
    parser.add_argument("--rows", type=lambda text: text.split(","), default=default_rows.split(","))
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--json", type=Path, help="file for the cells")
    parser.add_argument("--png", type=Path, help="file for a picture")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.rows if name not in ROWS]:
        sys.exit(f"There is no row {unknown[0]!r}; the rows are {', '.join(ROWS)}.")
    if not 0 < arguments.shared < OFFSETS:
        sys.exit(
            f"--shared is {arguments.shared}; expected 1 to {OFFSETS - 1}, so that there is something to tell apart."
        )
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    cells = run(arguments.seeds, arguments.scans, arguments.gap, arguments.rows, settings)
    print(table(cells, arguments.rows))
    if arguments.png:
        draw(cells, arguments.rows, arguments.png)
    if arguments.json:
        arguments.json.write_text(json.dumps({"settings": asdict(settings), "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
