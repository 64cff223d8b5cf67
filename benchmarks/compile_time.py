"""Compile time of a training step, and the length of its program.

    python -m benchmarks.compile_time [--model minkunet34|tr3d] [--stem 5|3] [--tile-size 64] [--repeats 3]

The step of "minkunet34" starts from points: it voxelises them, builds all its sites and kernel maps inside jit, and
updates a MinkUNet34 (Choy et al. 2019) by SGD with momentum. The step of "tr3d" is that of the detector at full width
on padded maps from the host, as in training, by AdamW and a stand-in loss.

Every repeat is a fresh process without a persistent compilation cache; medians count. Seconds are CPU time of the
process. Neither they nor the lines depend on the numbers of rows, which are small. A line is one operation of the
program before XLA ("StableHLO") or after it ("optimised"). Compile time follows the fusions: XLA makes a function of
machine code of each. Origins are

    maps        operations of `h2a2_jax.sparse.in_jit`
    backward    operations of transposed derivatives
    optimizer   operations of optax, but for its losses
    forward     the rest with a source
    none        operations of computations in which XLA notes no source

Operations without a source count as those around them; XLA joins operations of several sources to one fusion. So the
lines of an origin after XLA are an estimate.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.timing import report
from h2a2_jax import sparse
from h2a2_jax.layers import ConvNorm, DatasetContext, ForwardContext, ResidualBlock, SparseConv, concatenate, relu
from h2a2_jax.models import TR3D, DetectorConfig, HeadConfig, PlanLayout, detector_tables, pad_plan
from h2a2_jax.sparse import KernelMap, SparseTensor

MODELS = ("minkunet34", "tr3d")
POINTS = 4096
CAPACITIES = (4096, 2048, 1024, 512, 256)
"""Rows of the levels of MinkUNet34; all differ, as in practice, so that no two levels share a shape."""
SCANS = 2
CLASSES = 20
ORIGINS = ("maps", "forward", "backward", "optimizer", "none")
Maps = dict[str, list[KernelMap]]


# ---------------------------------------------------------------- MinkUNet34


def unet_maps(
    points: jax.Array, scan: jax.Array, n: jax.Array, stem: int, tile_size: int | None
) -> tuple[Maps, jax.Array, jax.Array]:
    """Maps of a U-Net of five levels; the first point of each voxel; the number of sites and points left out."""
    sites, first, lost = sparse.voxelize_points(points, scan, n, 0.05, CAPACITIES[0], SCANS)
    levels = [sites]
    for capacity in CAPACITIES[1:]:
        sites, more = sparse.downsample_sites(sites, 2, capacity)
        levels, lost = [*levels, sites], lost + more
    down = [sparse.strided_map(a, b, 2, tile_size=tile_size) for a, b in pairwise(levels)]
    maps = {
        "stem": [sparse.submanifold_map(levels[0], stem, tile_size=tile_size)],
        "same": [sparse.submanifold_map(level, 3, tile_size=tile_size) for level in levels],
        "down": down,
        "up": [sparse.inverse_map(there, tile_size=tile_size) for there in down],
    }
    return maps, first, lost


class MinkUNet34(nnx.Module):
    """U-Net of residual blocks: 2, 3, 4, 6 on the way down, two a level on the way up."""

    WIDTHS = (32, 64, 128, 256)
    UP_WIDTHS = (256, 128, 96, 96)
    BLOCKS = (2, 3, 4, 6)
    UP_BLOCKS = 2

    def __init__(self, stem: int, rngs: nnx.Rngs):
        """Layers start as those of `h2a2_jax.layers`; `stem` is the kernel size of the first convolution."""

        def blocks(count: int, channels: int, width: int) -> nnx.List:
            return nnx.List([ResidualBlock(channels if i == 0 else width, width, rngs=rngs) for i in range(count)])

        width = self.WIDTHS[0]
        self.stem = ConvNorm(3, width, stem, rngs=rngs)
        skips = [width, *self.WIDTHS[:-1]]
        down, encoder, up, decoder = [], [], [], []
        for count, channels in zip(self.BLOCKS, self.WIDTHS, strict=True):
            down.append(ConvNorm(width, width, 2, rngs=rngs))
            encoder.append(blocks(count, width, channels))
            width = channels
        for skip, channels in zip(reversed(skips), self.UP_WIDTHS, strict=True):
            up.append(ConvNorm(width, channels, 2, rngs=rngs))
            decoder.append(blocks(self.UP_BLOCKS, channels + skip, channels))
            width = channels
        self.down, self.encoder = nnx.List(down), nnx.List(encoder)
        self.up, self.decoder = nnx.List(up), nnx.List(decoder)
        self.head = SparseConv(width, CLASSES, 1, use_bias=True, rngs=rngs)

    def __call__(self, features: jax.Array, maps: Maps, context: ForwardContext) -> SparseTensor:
        """Logits [N, classes] on the voxels."""
        x = SparseTensor(features, maps["stem"][0].inputs)
        x = relu(self.stem(x, maps["stem"][0], context))
        skips = []
        for level, (conv, blocks) in enumerate(zip(self.down, self.encoder, strict=True)):
            skips.append(x)
            x = relu(conv(x, maps["down"][level], context))
            for block in blocks:
                x = block(x, maps["same"][level + 1], context)
        for conv, blocks in zip(self.up, self.decoder, strict=True):
            level = len(skips) - 1
            x = concatenate(relu(conv(x, maps["up"][level], context)), skips.pop())
            for block in blocks:
                x = block(x, maps["same"][level], context)
        return self.head(x)


def unet_step(stem: int, tile_size: int | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Training step of MinkUNet34 from points, and the shapes of its arguments."""
    graph, *states = nnx.split(nnx.eval_shape(lambda: MinkUNet34(stem, nnx.Rngs(0))), nnx.Param, nnx.BatchStat)
    params, stats = states
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params: Any, stats: Any, state: Any, points: Any, scan: Any, n: Any, labels: Any) -> Any:
        maps, first, lost = unet_maps(points, scan, n, stem, tile_size)
        sites = maps["same"][0].inputs
        rows = jnp.minimum(first, POINTS - 1)
        features, classes = jnp.where(sites.valid[:, None], points[rows], 0), labels[rows]

        def loss(params: Any) -> Any:
            model = nnx.merge(graph, params, stats, copy=True)
            logits = model(features, maps, ForwardContext(training=True)).features
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
            return jnp.where(sites.valid, losses, 0).sum() / sites.n, nnx.state(model, nnx.BatchStat)

        (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), new_stats, state, value, lost

    shape = jax.ShapeDtypeStruct
    points = shape((POINTS, 3), jnp.float32)
    scan, n, labels = shape((POINTS,), jnp.int32), shape((), jnp.int32), shape((POINTS,), jnp.int32)
    return step, (params, stats, jax.eval_shape(optimizer.init, params), points, scan, n, labels)


# ---------------------------------------------------------------- TR3D


def detector_step() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Training step of the detector at full width by a stand-in loss, and the shapes of its arguments."""
    config, heads = DetectorConfig(), [HeadConfig("scan", 18, 6)]
    model = nnx.eval_shape(lambda: TR3D(config, heads, rngs=nnx.Rngs(0)))
    graph, *states = nnx.split(model, nnx.Param, nnx.Variable)
    params, rest = states
    optimizer = optax.adamw(1e-3)
    cloud = np.random.default_rng(0).uniform(0, 1, (POINTS, 3)).astype(np.float32)
    tables = detector_tables(sparse.voxelize([cloud], config.voxel_size).sites)
    plan = pad_plan(tables, sparse.BucketLadder(tables.sizes).capacities(0), PlanLayout.of(config))

    def step(params: Any, rest: Any, state: Any, features: Any, plan: Any) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            out = model(features, plan, ForwardContext(DatasetContext.one(0, 1), training=True))
            return (out.logits**2).mean() + (out.boxes**2).mean(), nnx.state(model, nnx.BatchStat)

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    shapes = jax.eval_shape(lambda plan: plan, plan)
    features = jax.ShapeDtypeStruct((plan.voxels.capacity, config.in_channels), jnp.float32)
    return step, (params, rest, jax.eval_shape(optimizer.init, params), features, shapes)


# ---------------------------------------------------------------- measuring


def measure(model: str, stem: int = 5, tile_size: int | None = 64) -> dict[str, Any]:
    """Lower and compile the step of a model once in this process: lines by origin and CPU seconds."""
    jax.config.update("jax_enable_compilation_cache", False)
    step, arguments = unet_step(stem, tile_size) if model == "minkunet34" else detector_step()
    clock = [time.process_time()]
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments)
    clock.append(time.process_time())
    program = lowered.compile()
    clock.append(time.process_time())
    before, after = lowered.as_text(debug_info=True), program.as_text() or ""
    return {
        "StableHLO": count_stablehlo(before),
        "optimised": count_optimised(after),
        "fusions": after.count(" fusion("),
        "lower_s": clock[1] - clock[0],
        "compile_s": clock[2] - clock[1],
    }


def origin(name: str, files: str) -> str:
    """Origin of an operation with a name of JAX's scopes and the source files of its call stack."""
    if "in_jit.py" in files:
        return "maps"
    if "transpose(" in name:
        return "backward"
    if "/optax/" in files and "/losses/" not in files:
        return "optimizer"
    return "forward" if name or files else "none"


def count_stablehlo(text: str) -> dict[str, int]:
    """Lines of a StableHLO module by origin, without its table of locations."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    known: dict[str, tuple[str, str]] = {}

    def resolve(location: str) -> tuple[str, str]:
        """Outermost scope name and all files of a location."""
        if location not in known:
            parts = [resolve(inner) for inner in re.findall(r"#loc\d+", locations[location])]
            strings = re.findall(r'"([^"]*)"', locations[location])
            files = [s for s in strings if s.endswith(".py")]
            names = [s for s in strings if not s.endswith(".py")] + [name for name, _ in parts]
            known[location] = "/".join(filter(None, names)), "/".join(files + [below for _, below in parts])
        return known[location]

    counts: Counter[str] = Counter()
    callers: dict[str, str] = {}  # origin of the first call of each function; callers come before the called
    function = ""
    for line in text.splitlines():
        if not re.match(r"\s+%\S+ = ", line):
            opened = re.search(r"func\.func \w+ @(\w+)", line)
            function = opened[1] if opened else function
            continue
        location = re.search(r"loc\((#loc\d+)\)$", line)
        name, files = resolve(location[1]) if location else ("", "")
        found = callers.get(function, origin(name, files)) if not files else origin(name, files)
        called = re.search(r"call @(\w+)", line)
        if called:
            callers.setdefault(called[1], found)
        counts[found] += 1
    return _with_total(counts)


def count_optimised(text: str) -> dict[str, int]:
    """Lines of an optimised HLO module by origin, without its tables of sources."""
    sections = re.split(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n", text)
    tables = dict(zip(sections[1::2], (section.split("\n\n", 1)[0] for section in sections[2::2]), strict=True))
    body = sections[0] + "".join(part.split("\n\n", 1)[-1] for part in sections[2::2] if "\n\n" in part)
    files = dict(re.findall(r'^(\d+) "(.*)"', tables.get("FileNames", ""), re.MULTILINE))
    places = dict(re.findall(r"^(\d+) \{.*?file_name_id=(\d+)", tables.get("FileLocations", ""), re.MULTILINE))
    frames = {
        frame: (place, parent)
        for frame, place, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", tables.get("StackFrames", ""), re.MULTILINE
        )
    }

    def sources(frame: str) -> str:
        names = []
        while frame in frames:
            place, parent = frames[frame]
            names.append(files[places[place]])
            frame = str(int(parent) - 1) if parent else ""  # XLA prints one more than the parent's number
        return "/".join(names)

    counts: Counter[str] = Counter()
    for computation in body.split("\n\n"):
        here: Counter[str] = Counter()
        for line in filter(re.compile(r"\s+(ROOT )?%\S+ = ").match, computation.splitlines()):
            name = re.search(r'op_name="([^"]*)"', line)
            frame, file = re.search(r"stack_frame_id=(\d+)", line), re.search(r'source_file="([^"]*)"', line)
            source = sources(frame[1]) if frame else file[1] if file else ""
            here[origin(name[1] if name else "", source)] += 1
        if len(here) > 1:  # parameters and constants have no source: they belong to what reads them
            unknown = here.pop("none", 0)
            here[here.most_common(1)[0][0]] += unknown
        counts += here
    return _with_total(counts)


def _with_total(counts: Counter[str]) -> dict[str, int]:
    return {"all": counts.total(), **{name: counts[name] for name in ORIGINS}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default minkunet34")
    parser.add_argument(
        "--stem", type=int, default=5, choices=(3, 5), help="kernel size of the U-Net's stem (default 5)"
    )
    parser.add_argument("--tile-size", type=int, default=64, help="pairs in a tile of the U-Net's maps; 0: no tiles")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes; the median counts (default 3)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--here", action="store_true", help="measure once, in this process")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected 1 or more")
    if options.here:
        results = [measure(options.model, options.stem, options.tile_size or None)]
    else:
        command = [sys.executable, "-m", "benchmarks.compile_time", "--here", "--json"]
        command += ["--model", options.model, "--stem", str(options.stem), "--tile-size", str(options.tile_size)]
        results = []
        for turn in range(options.repeats):
            report(f"process {turn + 1} of {options.repeats}")
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            results.append(json.loads(output))
    result = {
        "model": options.model,
        **results[0],
        **{key: statistics.median(one[key] for one in results) for key in ("lower_s", "compile_s")},
    }
    print(json.dumps(result) if options.json else table_of(result))
    return 0


def table_of(result: dict[str, Any]) -> str:
    """Format the result as a table."""
    rows = [f"{kind:12}" + "".join(f"{n:11,}" for n in result[kind].values()) for kind in ("StableHLO", "optimised")]
    return "\n".join(
        [
            f"{result['model']}: a training step",
            f"{'lines':12}" + "".join(f"{key:>11}" for key in result["StableHLO"]),
            *rows,
            f"{result['fusions']:,} fusions",
            f"CPU seconds: {result['lower_s']:.1f} to trace and lower, {result['compile_s']:.1f} to compile",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
