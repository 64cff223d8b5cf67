"""Cost of buckets: `python -m benchmarks.buckets`.

A hundred procedural scans of mixed size in batches of one dataset; for each ratio of the ladder the number of
distinct shapes, which is the number of compilations, and the share of rows that are padding, by level and overall.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from benchmarks.timing import report
from h2a2_jax.loader.batching import scan_sizes
from h2a2_jax.models import DetectorConfig, LevelSizes
from h2a2_jax.scans.specs import dataset_spec
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.sparse import BucketLadder

DATASETS = ("scannet", "sunrgbd", "s3dis")
RATIOS = (1.1, 1.25, 1.5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=100, help="number of procedural scans (default 100)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="scans in a batch (default 1 4 16)")
    parser.add_argument("--voxel-size", type=float, default=0.01, help="metres (default 0.01)")
    parser.add_argument("--scale", choices=("full", "demo"), default="full", help="size of the rooms (default full)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    sizes = [
        sample_sizes(name, len(range(d, arguments.scans, len(DATASETS))), arguments.voxel_size, arguments.scale)
        for d, name in enumerate(DATASETS)
    ]
    rows = [
        {"scans in a batch": batch, "lowest": lowest, "ratio": ratio, **padding(sizes, batch, lowest, ratio)}
        for batch in arguments.batches
        for lowest in ("usual", "smallest")
        for ratio in RATIOS
    ]
    if arguments.json:
        print(json.dumps({"voxel_size": arguments.voxel_size, "scale": arguments.scale, "ladders": rows}))
        return
    voxels = np.array([s.voxels for dataset in sizes for s in dataset])
    print(f"{len(voxels)} scans of {voxels.min()} to {voxels.max()} voxels, median {int(np.median(voxels))}")
    print("share of rows that are padding:")
    print(f"{'batch':>6} {'lowest':>9} {'ratio':>6} {'shapes':>7} {'all':>6}", *(f"{n:>7}" for n in LevelSizes._fields))
    for row in rows:
        shares = (f"{row['padding by level'][name]:7.1%}" for name in LevelSizes._fields)
        print(
            f"{row['scans in a batch']:6} {row['lowest']:>9} {row['ratio']:6} {row['shapes']:7} {row['padding']:6.1%}",
            *shares,
        )


def sample_sizes(dataset: str, count: int, voxel_size: float, scale: str) -> list[LevelSizes]:
    """Sizes of every level for some procedural scans."""
    source = SyntheticSource(dataset_spec(dataset), "train", count, scale=scale)  # type: ignore[arg-type]
    report(f"{count} scans like {dataset}'s")
    return [scan_sizes([source[i]], DetectorConfig(voxel_size=voxel_size)) for i in range(count)]


def padding(sizes: Sequence[Sequence[LevelSizes]], batch: int, lowest: str, ratio: float) -> dict:
    """Shapes and shares of padding of one ladder.

    Batches of one scan are the scans; larger ones, as many as there are scans, are drawn from one dataset each.
    """
    rng = np.random.default_rng(0)
    totals = []
    for dataset in sizes:
        table = np.array(dataset)
        picks = [rng.choice(len(table), batch) for _ in table] if batch > 1 else np.arange(len(table))[:, None]
        totals += [LevelSizes(*table[pick].sum(0).tolist()) for pick in picks]
    ladder = BucketLadder.measured(sizes, batch, lowest=lowest, ratio=ratio)
    capacities = np.array([ladder.fit(total) for total in totals])
    used = np.array(totals).sum(0)
    rows = capacities.sum(0)
    return {
        "shapes": len({tuple(row) for row in capacities.tolist()}),
        "padding": float(1 - used.sum() / rows.sum()),
        "padding by level": dict(zip(LevelSizes._fields, (1 - used / rows).tolist(), strict=True)),
    }


if __name__ == "__main__":
    main()
