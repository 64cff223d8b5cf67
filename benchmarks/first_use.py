"""First use: seconds from the start of a process to boxes, with an empty cache of programs and with a full one.

    python -m benchmarks.first_use --scan=FILE                     a detector of full width that was not trained
    python -m benchmarks.first_use --scan=FILE --workdir=runs/joint

Every figure is that of a child process; all of them share a cache folder of their own, which is empty at first:

- `predict`: the command `h2a2 predict FILE`, "cold" with the empty folder, then "warm";
- `first_call`: importing, `Detector.restore`, the first call of the detector, a later one (median of five);
- `folder`: `h2a2 predict FOLDER --formats=json` of 50 procedural scans of the demo's size, cold and warm; the sum of 50
  warm calls of the detector on the same scans; and the ratio of the second to the third.

Seconds are of the clock, "cpu" of all cores. The result is one JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

_SCANS = 50
_CALLS = 5


def main() -> None:
    """Measure and print, or measure one thing as a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, required=True, help="a file of points")
    parser.add_argument("--workdir", type=Path, help="folder of a run (default: a detector that was not trained)")
    parser.add_argument("--scans", type=int, default=_SCANS, help="scans of the folder")
    parser.add_argument("--child", choices=["make", "calls", "folder"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        children = {"make": make_inputs, "calls": time_calls, "folder": time_folder}
        print(json.dumps(children[given.child](given.scan, given.workdir, given.scans)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(given.scan, given.workdir, Path(folder), given.scans), indent=1))


def measure(scan: Path, workdir: Path | None, folder: Path, scans: int) -> dict[str, Any]:
    """Run the children and return their figures; `folder` is for caches, results and inputs."""
    run, made = workdir or folder / "run", folder / "scans"
    _child("make", made, run, scans)

    def predict(name: str, *arguments: str) -> dict[str, float]:
        output = f"--output={folder / name}"
        return _run([sys.executable, "-m", "h2a2_jax", "predict", *arguments, f"--workdir={run}", output], folder)[0]

    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "predict": {state: predict(state, str(scan)) for state in ("cold", "warm")},
        "first_call": _child("calls", scan, run, scans, folder),
    }
    parts = {state: predict(f"folder_{state}", str(made), "--formats=json") for state in ("cold", "warm")}
    calls = _child("folder", made, run, scans, folder)
    result["folder"] = {**parts, **calls, "ratio": round(parts["warm"]["seconds"] / calls["warm_calls"], 2)}
    return result


def make_inputs(folder: Path, run: Path, scans: int) -> dict[str, Any]:
    """Make the folder of scans, and the run of a detector that was not trained if there is none."""
    from h2a2_jax.scans.sources import SourceConfig, build_source

    folder.mkdir()
    source = SourceConfig("scannet", kind="synthetic", train_size=scans, val_size=1, scale="demo", repeats=1)
    for i, scan in enumerate(map(build_source(source, "train").__getitem__, range(scans))):
        np.savez(folder / f"{i:03}.npz", points=scan.points, colors=scan.colors)
    if run.exists():
        return {}
    from h2a2_jax.balancers import build_balancer
    from h2a2_jax.checkpoint.store import CheckpointStore
    from h2a2_jax.checkpoint.train_state import create_state
    from h2a2_jax.config import ExperimentConfig
    from h2a2_jax.distributed import DATASET
    from h2a2_jax.initialization import build_detector
    from h2a2_jax.layers.kernel_selection import SelectionConfig
    from h2a2_jax.models import DetectorConfig
    from h2a2_jax.optimizer import build_optimizer, learning_rate
    from h2a2_jax.scans.specs import SPECS

    sources = tuple(SourceConfig(spec.name, root=f"data/{spec.name}") for spec in SPECS)
    config = ExperimentConfig(sources, DetectorConfig(selection=SelectionConfig()))
    optimizer = build_optimizer(config.optim, learning_rate(config.optim, steps_per_epoch=1, total_steps=1))
    balancer = build_balancer(config.harmonize, len(SPECS), DATASET, 0)
    _, state = create_state(build_detector(config), optimizer, balancer)
    run.mkdir(parents=True)
    with CheckpointStore(run / "checkpoints") as store:
        store.save(0, state, config, config.dataset_names)
    return {}


def time_calls(scan: Path, run: Path, scans: int) -> dict[str, Any]:
    """Seconds to import, to restore a detector, of its first call and of a later one; programs it compiled."""
    times = [time.perf_counter()]
    from h2a2_jax.inference.detector import Detector
    from h2a2_jax.scans.formats.point_cloud import read_point_cloud

    cloud = read_point_cloud(scan)
    times.append(time.perf_counter())
    detector = Detector.restore(run)
    times.append(time.perf_counter())
    for _ in range(1 + _CALLS):
        detector(cloud.points, cloud.colors, dataset=detector.datasets[0])
        times.append(time.perf_counter())
    imports, restore, first, *later = np.diff(times).round(3).tolist()
    return {"import": imports, "restore": restore, "first_call": first, "later_call": statistics.median(later)}


def time_folder(folder: Path, run: Path, scans: int) -> dict[str, Any]:
    """Seconds of a warm call of the detector for each scan of a folder, summed."""
    from h2a2_jax.inference.detector import Detector
    from h2a2_jax.scans.formats.point_cloud import read_point_cloud

    detector, seconds = Detector.restore(run), 0.0
    for path in sorted(folder.iterdir()):
        cloud = read_point_cloud(path)
        for is_warm in (False, True):
            started = time.perf_counter()
            detector(cloud.points, cloud.colors, dataset=detector.datasets[0])
            seconds += is_warm * (time.perf_counter() - started)
    return {"scans": scans, "warm_calls": round(seconds, 3)}


def _child(name: str, scan: Path, run: Path, scans: int, folder: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.first_use", f"--child={name}", f"--scan={scan}", f"--workdir={run}"]
    return json.loads(_run([*command, f"--scans={scans}"], folder or scan.parent)[1].splitlines()[-1])


def _run(command: Sequence[str], folder: Path) -> tuple[dict[str, float], str]:
    """Run a command with the cache of programs in a folder; return its times and what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(
        command,
        env={**environment, "H2A2_CACHE": str(folder / "cache")},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(seconds, 2), "cpu": round(cpu, 2)}, done.stdout


def _processor() -> str:
    from h2a2_jax.host import available_cores, cpu_features

    names = [line.partition(":")[2].strip() for line in cpu_features().splitlines() if line.startswith("model name")]
    return f"{next(iter(names), 'unknown')}, {available_cores()} cores"


if __name__ == "__main__":
    main()
