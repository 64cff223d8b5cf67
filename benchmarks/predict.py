"""Prediction of files: time by stage, and what becomes of boxes when the same scan is given in another way.

    python -m benchmarks.predict --workdir=runs/demo [--scans=FOLDER] [--moved=FILE] [--grey] [--beside=RUN,RUN]

- Each file of --scans (default: the folder H2A2_SCANS_DIR): reading, voxels and maps, network, boxes (decoding and
  suppression) in ms, medians of warm passes; and the first pass, which may compile.
- --moved: one file turned, shifted, in millimetres, with y up, shuffled, with every point twice, without colours, with
  half of its points. Boxes are transformed back and matched with those of the file as it is: the number of these (of at
  least the score .3) that have one of their class with an IoU of .5, their mean IoU and mean difference in score. The
  reason for a difference stands beside; `tests/inference/test_predict_folder.py` checks what is exact for a network on
  voxels.
- --grey: mean average precision on the validation scans of the run, with and without their colours.
- --beside: other runs, which take turns with this one on the validation scans of a dataset that all know: ms a scan by
  stage, medians over scans of warm passes, and the network's time as a multiple of the first run's.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from benchmarks.scans import ChangedScans
from benchmarks.timing import report
from h2a2_jax.boxes import Detections, pairwise_rotated_iou
from h2a2_jax.checkpoint.store import restore_checkpoint
from h2a2_jax.config import EvalConfig
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.evaluate import predict_source
from h2a2_jax.inference.input_files import FileScan, InputFile, PredictRequest, find_inputs, load_file
from h2a2_jax.inference.predictor import Predictor, build_predictor, prepare
from h2a2_jax.inference.results import boxes_in_input_frame
from h2a2_jax.initialization import count_parameters
from h2a2_jax.scans.formats.colors import GREY
from h2a2_jax.scans.formats.point_cloud import read_point_cloud
from h2a2_jax.scans.scan import Scan, load_or_skip
from h2a2_jax.scans.sources import build_source
from h2a2_jax.scans.specs import DatasetSpec

STAGES = ("load", "maps", "network", "boxes")
_LOWEST, _SURE, _HIT = 0.05, 0.3, 0.5
_COARSEST = 64  # voxels along one of the coarsest level


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run")
    parser.add_argument("--scans", default=os.environ.get("H2A2_SCANS_DIR"), help="files, a folder or a pattern")
    parser.add_argument("--dataset", help="whose head (default: the first of the model)")
    parser.add_argument("--repeats", type=int, default=5, help="warm passes of each scan (default 5)")
    parser.add_argument("--moved", type=Path, help="a file to give in other ways")
    parser.add_argument("--grey", action="store_true", help="evaluate with and without colours")
    parser.add_argument("--beside", help="other runs, with commas between, that take turns with this one")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if arguments.beside:
        if arguments.moved or arguments.grey:
            parser.error("--beside is measured alone, without --moved and --grey")
        workdirs = [arguments.workdir, *map(Path, arguments.beside.split(","))]
        try:
            for row in rows_in_turns(workdirs, arguments.dataset, arguments.repeats):
                print(row, flush=True)
        except InputError as error:
            parser.error(str(error))
        return
    model, config = restore_checkpoint(arguments.workdir)
    predictor = Predictor(model, config.specs, score_threshold=_LOWEST)
    spec = predictor.specs[0] if arguments.dataset is None else predictor.spec(arguments.dataset)
    if arguments.scans:
        files = find_inputs([arguments.scans]).files
        print(f"boxes by the head of {spec.name}, ms, median of {arguments.repeats} warm passes")
        print(f"{'scan':26}{'points':>9}{'boxes':>6}" + "".join(f"{stage:>9}" for stage in STAGES) + "    first pass")
        for file in files:
            print(time_file(predictor, file, spec, arguments.repeats), flush=True)
    if arguments.moved:
        print(f"{arguments.moved.name} given in other ways, boxes by the head of {spec.name}")
        print(f"{'':34}{'boxes':>6}{'found again':>13}{'IoU':>7}{'score off by':>14}")
        for row in moved_rows(predictor, arguments.moved, spec, _COARSEST * config.model.voxel_size):
            print(row, flush=True)
    if arguments.grey:
        evaluator = build_predictor(model, config.specs, EvalConfig())
        print("mAP@0.25 and mAP@0.5 of the validation scans, with colours and without")
        for dataset in config.datasets:
            source = build_source(dataset, "val")
            figures = [
                predict_source(evaluator, each, dataset.spec, progress=False)
                .evaluate(dataset.spec, EvalConfig().iou_thresholds)
                .mean_average_precision
                for each in (source, ChangedScans(source, _grey))
            ]
            shown = " -> ".join(" ".join(f"{value:.3f}" for value in figure) for figure in figures)
            print(f"  {dataset.name:10} {shown}", flush=True)


def time_file(predictor: Predictor, file: InputFile, spec: DatasetSpec, repeats: int) -> str:
    """A row of the table of times."""
    request = PredictRequest((str(file.path),))
    passes: list[dict[str, float]] = []
    boxes, points = 0, 0
    for _ in range(repeats + 1):
        seconds: dict[str, float] = {}
        scan = _timed(lambda: load_file(file, request, [spec]), seconds, "load").placed.scan
        (found,) = predictor.predict([prepare(scan, spec)], spec.name, seconds)
        boxes, points = int((found.scores >= _SURE).sum()), len(scan.points)
        passes.append(seconds)
    report(f"{file.name} done")
    warm = [1e3 * statistics.median(seconds[stage] for seconds in passes[1:]) for stage in STAGES]
    first = 1e3 * sum(passes[0].values())
    return (
        f"{file.name[:25]:26}{points:>9,}{boxes:>6}" + "".join(f"{value:>9.1f}" for value in warm) + f"{first:>14.0f}"
    )


def rows_in_turns(workdirs: Sequence[Path], dataset: str | None, repeats: int) -> Iterator[str]:
    """Rows of the table of runs that take turns."""
    restored = [restore_checkpoint(workdir) for workdir in workdirs]
    specs = [{spec.name: spec for spec in config.specs} for _, config in restored]
    common = [name for name, spec in specs[0].items() if all(spec == known.get(name) for known in specs)]
    if not common or (dataset is not None and dataset not in common):
        raise InputError(f"{', '.join(map(str, workdirs))} all know {', '.join(common) or 'no common dataset'}.")
    name = dataset or common[0]
    predictors = [build_predictor(model, config.specs, EvalConfig()) for model, config in restored]
    chosen = next(source for source in restored[0][1].datasets if source.name == name)
    source = build_source(chosen, "val")
    skipped: dict[str, str] = {}
    scans = [prepare(scan, chosen.spec) for scan in load_or_skip(source, skipped)]
    for left_out, reason in skipped.items():
        report(f"{left_out} is left out: {reason}")
    passes: list[dict[str, list[float]]] = [{stage: [] for stage in STAGES[1:]} for _ in predictors]
    for turn in range(repeats + 1):
        for scan in scans:
            for predictor, seconds in zip(predictors, passes, strict=True):
                taken: dict[str, float] = {}
                predictor.predict([scan], name, taken)
                for stage in seconds if turn else ():  # the first compiles
                    seconds[stage].append(taken[stage])
        report(f"{turn} of {repeats} warm passes done")
    yield f"{len(scans)} validation scans of {name}, ms a scan, medians of {repeats} warm passes in turns"
    yield f"{'run':26}{'parameters':>12}" + "".join(f"{stage:>9}" for stage in STAGES[1:]) + "  network, relatively"
    first = statistics.median(passes[0]["network"])
    for workdir, (_, config), seconds in zip(workdirs, restored, passes, strict=True):
        medians = {stage: statistics.median(values) for stage, values in seconds.items()}
        cells = "".join(f"{1e3 * value:>9.1f}" for value in medians.values())
        ratio = medians["network"] / first
        yield f"{workdir.name[:25]:26}{count_parameters(config) / 1e6:>10.2f} M{cells}{ratio:>9.2f}"


def _timed(function: Callable[[], FileScan], seconds: dict[str, float], stage: str) -> FileScan:
    started = time.perf_counter()
    result = function()
    seconds[stage] = time.perf_counter() - started
    return result


class Variant(NamedTuple):
    """The same scan, given in another way.

    Attributes:
        name: in words.
        points: in the frame of its file.
        colors: of its points.
        request: how the file is to be taken.
        motion: from the original file's frame to that of the scan, z up in metres.
        why: boxes may differ.
    """

    name: str
    points: Float[np.ndarray, "m 3"]
    colors: Float[np.ndarray, "m 3"] | None
    request: dict[str, Any]
    motion: Float[np.ndarray, "4 4"]
    why: str = ""


def variants(points: Float[np.ndarray, "n 3"], colors: Float[np.ndarray, "n 3"] | None, block: float) -> list[Variant]:
    """A scan as it is, and in other ways.

    Args:
        points: metres, z up.
        colors: of the points.
        block: metres, a voxel of the coarsest level.
    """
    rng = np.random.default_rng(0)
    points = points.astype(np.float64)
    still, quarter, shifted, by_blocks = (np.eye(4) for _ in range(4))
    quarter[:2, :2] = [[0, -1], [1, 0]]
    shifted[:3, 3] = [1.234, -0.777, 0.151]
    by_blocks[:3, 3] = np.array([10, -20, 1]) * block
    order, some = rng.permutation(len(points)), rng.random(len(points)) < 0.5
    upright = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])

    def at(motion: np.ndarray) -> np.ndarray:
        return points @ motion[:3, :3].T + motion[:3, 3]

    def pick(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return points[rows], None if colors is None else colors[rows]

    return [
        Variant("as it is", points, colors, {}, still),
        Variant("in millimetres", 1000 * points, colors, {"unit": "mm"}, still, "rounding"),
        Variant("y up", points @ upright.T, colors, {"up": "y"}, still, "rounding"),
        Variant(
            "moved by coarsest voxels", at(by_blocks), colors, {}, by_blocks, "rounding: points at the face of a voxel"
        ),
        Variant(
            "moved by other lengths", at(shifted), colors, {}, shifted, "other points share a voxel, at every level"
        ),
        Variant("turned by 90 degrees", at(quarter), colors, {}, quarter, "other voxels; a kernel has no symmetry"),
        Variant("points in another order", *pick(order), {}, still, "other points are drawn, or first in their voxel"),
        Variant("every point twice", *pick(np.repeat(np.arange(len(points)), 2)), {}, still, "other points are drawn"),
        Variant("half of the points", *pick(np.flatnonzero(some)), {}, still, "fewer voxels hold a point"),
        Variant("without colours", points, None, {}, still, "grey instead"),
    ]


def moved_rows(predictor: Predictor, path: Path, spec: DatasetSpec, block: float) -> list[str]:
    """A row for each way in which a scan can be given; see `variants`."""
    cloud = read_point_cloud(path)
    found, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants(cloud.points, cloud.colors, block):
            file = InputFile(Path(folder) / "scan.npz", "scan")  # one name: the points drawn depend on it
            colors: dict[str, Any] = {} if variant.colors is None else {"colors": variant.colors}
            np.savez(file.path, points=variant.points, **colors)
            scan = load_file(file, PredictRequest(("",), **variant.request), [spec]).placed.scan
            (boxes,) = predictor.predict([prepare(scan, spec)], spec.name)
            back = boxes_in_input_frame(boxes.boxes, variant.motion).astype(np.float32)
            found.append(Detections(back, boxes.scores, boxes.labels))
            rows.append(f"{_compared(variant.name, found[0], found[-1])}  {variant.why}".rstrip())
    return rows


def _compared(name: str, still: Detections, other: Detections) -> str:
    sure = np.flatnonzero(still.scores >= _SURE)
    count = int((other.scores >= _SURE).sum())
    if not len(sure) or not len(other):
        return f"{name:34}{count:>6}"
    overlaps = np.array(pairwise_rotated_iou(still.boxes[sure], other.boxes))
    overlaps[still.labels[sure][:, None] != other.labels[None]] = 0
    best, rows = overlaps.max(axis=1), overlaps.argmax(axis=1)
    hit = best >= _HIT
    again = f"{int(hit.sum())} of {len(sure)}"
    if not hit.any():
        return f"{name:34}{count:>6}{again:>13}"
    off = np.abs(still.scores[sure] - other.scores[rows])[hit].mean()
    return f"{name:34}{count:>6}{again:>13}{best[hit].mean():>7.3f}{off:>14.4f}"


def _grey(scan: Scan) -> Scan:
    """A scan that has lost its colours."""
    return dataclasses.replace(scan, colors=np.full_like(scan.colors, GREY))


if __name__ == "__main__":
    main()
