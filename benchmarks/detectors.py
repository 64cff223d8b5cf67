"""TR3D beside FCAF3D on one scan: boxes and a training step, in seconds, memory and time to compile.

    python -m benchmarks.detectors --scan scan.bin [--width full|small] [--rounds N] [--kinds tr3d fcaf3d]
    python -m benchmarks.detectors --scan one.bin --other two.bin       does a second scan compile anything?
    python -m benchmarks.detectors --scan scan.bin --memory             peak memory too, each in its own process

"predict" is what a detector does for a scan: maps on the host, the folded network and suppression, each as one program
(`Predictor`); the network's share stands beside it. "step" is a training step (`make_train_step`) with the real loss on
the scan with procedural boxes: targets, loss, gradients, AdamW. The detectors take turns in one process after a
warm-up; a figure is the median, and the ratio the median of the ratios of the rounds. Compiling is timed from an empty
cache. Parameters are drawn, not trained: FCAF3D prunes by the scores of these, which takes as long.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.scans import load_points
from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, SourceConfig, TrainConfig
from h2a2_jax.distributed import MeshLayout, stack_batches, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.initialization import build_detector, count_parameters
from h2a2_jax.loader.batching import collate, pad_batch
from h2a2_jax.models import DetectorConfig, PlanLayout, kind_of
from h2a2_jax.scans.scan import Scan
from h2a2_jax.sparse import BucketLadder
from h2a2_jax.training.build import build_trainer

SMALL: dict[str, Any] = {"depth": 10, "stem_channels": 16, "neck_channels": 32, "voxel_size": 0.02}
MODELS: dict[tuple[str, str], DetectorConfig] = {
    ("tr3d", "full"): DetectorConfig(),
    ("tr3d", "small"): DetectorConfig(stage_channels=(16, 32, 32, 32), **SMALL),
    ("fcaf3d", "full"): DetectorConfig(kind="fcaf3d", stage_channels=(64, 128, 256, 512)),
    ("fcaf3d", "small"): DetectorConfig(kind="fcaf3d", stage_channels=(16, 32, 32, 32), prune_threshold=2000, **SMALL),
}
"""Architectures by detector and width; full ones are as published."""
PASSES = ("predict", "step")
_BOXES = 16


def make_scan(path: Path | None) -> Scan:
    """The points of a scan, grey, with boxes of furniture's size at places of the scan.

    Raises:
        InputError: the scan cannot be read.
    """
    name, points = load_points(path)
    rng = np.random.default_rng(0)
    centers = points[rng.choice(len(points), _BOXES)]
    sizes = rng.uniform(0.4, 1.5, (_BOXES, 3))
    boxes = np.concatenate([centers, sizes, np.zeros((_BOXES, 1))], 1).astype(np.float32)
    labels = rng.integers(0, 18, _BOXES).astype(np.int32)
    return Scan(name, points.astype(np.float32), np.full((len(points), 3), 0.5, np.float32), boxes, labels)


def config_of(model: DetectorConfig) -> ExperimentConfig:
    """A run of the detector on ScanNet alone, of which only the shapes matter."""
    return ExperimentConfig(
        datasets=(SourceConfig("scannet", kind="synthetic", train_size=1, val_size=1),),
        model=model,
        harmonize=HarmonizeConfig(method="mean"),
        train=TrainConfig(batch_size=1, steps=1000),
    )


class Subject:
    """A detector with its passes on a scan, each compiled at its first call."""

    def __init__(self, model: DetectorConfig, scan: Scan):
        self.config = config_of(model)
        self.scan = scan
        self.detector = build_detector(self.config)
        self.seconds: dict[str, float] = {}
        self._predictor: Predictor | None = None
        self._state: Any = None
        self._batch: Any = None
        self._take_step: Callable[..., Any] | None = None

    def predict(self) -> int:
        """Predict, and return the number of boxes; `seconds` has the time of each stage."""
        if self._predictor is None:
            self._predictor = Predictor(self.detector, self.config.specs)
        self.seconds = {}
        return len(self._predictor.predict([self.scan], "scannet", self.seconds)[0])

    def step(self) -> float:
        """Take a training step, and return its loss."""
        if self._take_step is None:
            model, mesh = self.config.model, MeshLayout(train_mesh(1, jax.devices()[:1]), 1)
            trainer = build_trainer(self.config, self.detector, mesh, 1000, 1000)
            host, kind = collate([self.scan], model), kind_of(model)
            layout, capacities = PlanLayout.of(model), BucketLadder(host.tables.sizes).capacities(0)
            if not kind.fits(host.tables, capacities, layout):
                layout = replace(layout, machine="any")
            batch = stack_batches([[pad_batch(host, capacities, _BOXES, layout)]])
            self._state, self._take_step, self._batch = trainer.start, trainer.take_step, jax.device_put(batch)
        self._state, metrics = self._take_step(self._state, self._batch)
        return float(metrics.box_loss[0] + metrics.class_loss[0])


def measure(
    scan: Path | None, other: Path | None, width: str, kinds: Sequence[str], passes: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Compile and run the passes of the detectors in turns; the result is what `--json` prints."""
    first = make_scan(scan)
    subjects = {kind: Subject(MODELS[kind, width], first) for kind in kinds}
    result: dict[str, Any] = {
        "scan": {"name": first.name, "points": len(first.points)},
        "machine": {"device": jax.devices()[0].device_kind, "cores": available_cores(), "jax": jax.__version__},
        "width": width,
        "rounds": rounds,
        "detectors": {},
    }
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for kind, subject in subjects.items():
        sizes = collate([first], subject.config.model).tables.sizes
        entry = {"parameters": count_parameters(subject.config), "sites": sizes._asdict(), "first_call_s": {}}
        for name in passes:
            call = getattr(subject, name)
            started = time.perf_counter()
            call()
            entry["first_call_s"][name] = time.perf_counter() - started
            timing.report(f"{kind} {name}: first call {entry['first_call_s'][name]:.1f} s")
            calls[kind, name] = call
        result["detectors"][kind] = entry
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    network: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds):
        timing.report(f"round {turn + 1} of {rounds}")
        for (kind, name), call in calls.items():
            started = time.perf_counter()
            call()
            seconds[kind, name].append(time.perf_counter() - started)
            if name == "predict":
                network[kind].append(subjects[kind].seconds["network"])
    for kind in kinds:
        entry = result["detectors"][kind]
        entry["seconds"] = {name: statistics.median(seconds[kind, name]) for name in passes}
        if "predict" in passes:
            entry["seconds"]["network"] = statistics.median(network[kind])
    if len(kinds) == 2:
        one, two = kinds
        result["ratios"] = {
            f"{name}, {two} over {one}": statistics.median(
                b / a for a, b in zip(seconds[one, name], seconds[two, name], strict=True)
            )
            for name in passes
        }
    if other is not None and "predict" in passes:
        result["second_scan"] = {kind: _second(subject, make_scan(other)) for kind, subject in subjects.items()}
    return result


def _second(subject: Subject, scan: Scan) -> dict[str, float]:
    """Seconds and compiled programs of the first and second prediction of another scan."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    subject.scan, times = scan, []
    for _ in range(2):
        started = time.perf_counter()
        subject.predict()
        times.append(time.perf_counter() - started)
    return {"first_s": times[0], "again_s": times[1], "programs_compiled": len(compiled)}


def peak_memory(scan: Path | None, width: str, kind: str, name: str) -> float:
    """Peak resident memory (MB) of a process that runs a pass of a detector twice; on a GPU that of the device."""
    command = [sys.executable, "-m", "benchmarks.detectors", "--width", width, "--only", kind, name]
    command += [] if scan is None else ["--scan", str(scan)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table_of(result: dict[str, Any]) -> str:
    """Format the result as a table."""
    scan, machine = result["scan"], result["machine"]
    lines = [
        f"{scan['name']}: {scan['points']:,} points; {result['width']} width; {machine['device']}, "
        f"{machine['cores']} cores, JAX {machine['jax']}; medians of {result['rounds']} rounds",
        "",
        f"{'':10}{'parameters':>12}" + "".join(f"{column:>16}" for column in _columns(result)),
    ]
    for kind, entry in result["detectors"].items():
        cells = [entry["seconds"].get(name) for name in ("predict", "network", "step")]
        cells += [entry["first_call_s"].get(name) for name in PASSES]
        cells += [entry.get("peak_mb", {}).get(name) for name in PASSES]
        shown = "".join(f"{'-' if cell is None else f'{cell:,.2f}':>16}" for cell in cells)
        lines.append(f"{kind:10}{entry['parameters']:12,}{shown}")
    lines += ["", *(f"{name}: {ratio:.2f} times" for name, ratio in result.get("ratios", {}).items())]
    for kind, entry in result["detectors"].items():
        lines.append(f"{kind} sites: " + ", ".join(f"{level} {count:,}" for level, count in entry["sites"].items()))
    for kind, entry in result.get("second_scan", {}).items():
        lines.append(
            f"{kind}, another scan: {entry['first_s']:.2f} s, again {entry['again_s']:.2f} s, "
            f"{entry['programs_compiled']} programs compiled"
        )
    return "\n".join(lines)


def _columns(result: dict[str, Any]) -> list[str]:
    return ["predict s", "network s", "step s", "first predict s", "first step s", "predict MB", "step MB"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detectors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, help=".bin (float32 rows of six) or .ply; default a procedural room")
    parser.add_argument("--other", type=Path, help="a second scan, to see if it compiles anything")
    parser.add_argument("--width", choices=("full", "small"), default="full", help="default full, as published")
    kinds = ("tr3d", "fcaf3d")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="detectors (default both)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="only these")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts (default 5)")
    parser.add_argument("--memory", action="store_true", help="peak memory of each, in processes of their own")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "PASS"), help="print the peak memory of a pass")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected 1 or more")
    try:
        if options.only:
            call = getattr(Subject(MODELS[options.only[0], options.width], make_scan(options.scan)), options.only[1])
            call(), call()
            print(timing.peak_memory())
            return 0
        result = measure(options.scan, options.other, options.width, options.kinds, options.passes, options.rounds)
        if options.memory:
            for kind in options.kinds:
                timing.report(f"{kind}: peak memory")
                result["detectors"][kind]["peak_mb"] = {
                    name: peak_memory(options.scan, options.width, kind, name) for name in options.passes
                }
    except (InputError, FileNotFoundError) as error:
        timing.report(str(error))
        return 2
    print(json.dumps(result, indent=1) if options.json else table_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
