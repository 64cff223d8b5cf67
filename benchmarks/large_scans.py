"""Large scans in tiles against the same rooms one by one: recall, boxes at seams, time, memory.

    python -m benchmarks.large_scans --workdir=runs/demo --points=4500000
    python -m benchmarks.large_scans --workdir=runs/demo --points=30000000 --storeys=3

Procedural rooms (validation scans of the generator, which no training has seen) are set beside one another, --wall
metres apart, in storeys of 3.3 m, until there are as many points. The building is written as a PLY file and predicted
as `h2a2 predict` does; --alone of the rooms are predicted by themselves. Printed for both: recall (%) of the annotated
boxes of their class at IoU .25 and .5 by boxes of at least --score, boxes in all, and annotated boxes that two boxes
hit. For the building: pairs of boxes of one class that overlap by half seen from above, as an object that is found
twice at a seam would be; seconds by stage and the peak of the memory.
"""

import argparse
import json
import math
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree

from benchmarks.timing import report
from h2a2_jax.boxes.nms import Detections, overlaps_of_pairs
from h2a2_jax.checkpoint.store import read_detector
from h2a2_jax.inference.input_files import InputFile, PredictRequest, load_file
from h2a2_jax.inference.ply_results import write_points
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.inference.scan_prediction import plan_scan, predict_scan
from h2a2_jax.pretrained.load import load_pretrained
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

_STOREY = 3.3  # m
_SEED = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="folder of a run; the weights rooms by default")
    parser.add_argument("--points", type=int, default=4_500_000)
    parser.add_argument("--storeys", type=int, default=1)
    parser.add_argument("--dataset", default="scannet")
    parser.add_argument("--scale", choices=("demo", "full"), default="demo", help="of the rooms")
    parser.add_argument("--wall", type=float, default=0.7, help="metres between rooms (.7)")
    parser.add_argument("--score", type=float, default=0.3)
    parser.add_argument("--alone", type=int, default=400, help="rooms that are predicted alone, of those there are")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    stored = load_pretrained("rooms") if given.workdir is None else read_detector(given.workdir)
    predictor = Predictor(stored, stored.specs, score_threshold=0.05)
    spec = predictor.spec(given.dataset)
    rooms = list(_rooms(SyntheticSource(spec, "val", 1 << 20, seed=_SEED, scale=given.scale), given.points))
    places = _places(rooms, given.storeys, given.wall)
    chosen = np.unique(np.linspace(0, len(rooms) - 1, given.alone).astype(int))
    alone = []
    for i in chosen:
        (found,) = predictor.predict([prepare(rooms[i], spec)], spec.name)
        alone.append(found)
        report(f"room {len(alone)} of {len(chosen)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "building.ply"
        _write(path, rooms, places)
        rooms = [_without_points(room) for room in rooms]
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        loaded = load_file(InputFile(path, "building"), PredictRequest((str(path),), dataset=spec.name), [spec])
        seconds["load"] = time.perf_counter() - started
        number = len(loaded.placed.scan.points)
        planned = plan_scan(predictor, loaded.placed, "auto", seconds)
        found = predict_scan(predictor, loaded.placed, planned, "auto", "auto", seconds=seconds)
        predicted = time.perf_counter() - started
        write_points(Path(folder) / "points.ply", loaded.placed.scan, loaded.placed.matrix, found, None)
        seconds["write"] = time.perf_counter() - started - predicted
        shift = loaded.placed.matrix[:3, 3]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    centers = found.boxes[:, :3].astype(np.float64) - shift
    tiled = []
    for i in chosen:
        inside = (np.abs(centers - places[i])[:, :2] < _half(rooms[i])[:2] + given.wall / 2).all(axis=1)
        inside &= np.abs(centers[:, 2] - places[i][2] - 1.2) < 1.6
        boxes = found.boxes[inside].astype(np.float64)
        boxes[:, :3] = centers[inside] - places[i]
        tiled.append(Detections(boxes.astype(np.float32), found.scores[inside], found.labels[inside]))
    figures: dict[str, object] = {"points": number, "rooms": len(rooms), "storeys": given.storeys}
    for name, every in (("alone", alone), ("tiles", tiled)):
        figures[name] = _figures(every, [rooms[i] for i in chosen], given.score)
    figures |= {"seconds": {k: round(v, 1) for k, v in seconds.items()}, "predicted_in": round(predicted, 1)}
    figures |= {"peak_gb": round(peak, 2), "boxes": len(found.of_score(given.score))}
    figures["overlapping_pairs"] = _overlapping_pairs(found.of_score(given.score))
    print(json.dumps(figures, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(figures) + "\n")


def _rooms(source: SyntheticSource, points: int) -> Iterator[Scan]:
    """Rooms about their middle, floors at 0, until they have as many points."""
    total = 0
    for i in range(len(source)):
        scan = source[i]
        middle = np.append((scan.points[:, :2].min(axis=0) + scan.points[:, :2].max(axis=0)) / 2, 0)
        boxes = scan.boxes.copy()
        boxes[:, :3] -= middle
        yield Scan(f"room {i}", (scan.points - middle).astype(np.float32), scan.colors, boxes, scan.labels)
        total += len(scan.points)
        report(f"{total:,} points made")
        if total >= points:
            return


def _half(room: Scan) -> Float[np.ndarray, " 3"]:
    return np.abs(room.points).max(axis=0).astype(np.float64)


def _places(rooms: Sequence[Scan], storeys: int, wall: float) -> list[Float[np.ndarray, " 3"]]:
    """Places of the middles of rooms: rows of rooms, and storeys of rows, as square as can be."""
    places, on_storey = [], math.ceil(len(rooms) / storeys)
    for first in range(0, len(rooms), on_storey):
        part = [_half(room) for room in rooms[first : first + on_storey]]
        width = math.sqrt(sum(4 * half[0] * half[1] for half in part)) * 1.2
        x = y = deepest = 0.0
        for half in part:
            if x and x + 2 * half[0] > width:
                x, y, deepest = 0.0, y + deepest + wall, 0.0
            places.append(np.array([x + half[0], y + half[1], _STOREY * (first // on_storey)]))
            x, deepest = x + 2 * half[0] + wall, max(deepest, 2 * half[1])
    return places


def _write(path: Path, rooms: Sequence[Scan], places: Sequence[np.ndarray]) -> None:
    """Write all points as one scan."""
    points = np.concatenate([room.points + place.astype(np.float32) for room, place in zip(rooms, places, strict=True)])
    colors = np.concatenate([room.colors for room in rooms])
    none = Detections(np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    scan = Scan("building", points, colors, np.zeros((0, 7), np.float32), np.zeros(0, np.int32))
    write_points(path, scan, np.eye(4), none, None)


def _without_points(room: Scan) -> Scan:
    """The corners of a room in place of its points."""
    corners = np.stack([-_half(room), _half(room)]).astype(np.float32)
    return Scan(room.name, corners, np.zeros_like(corners), room.boxes, room.labels)


def _figures(found: Sequence[Detections], rooms: Sequence[Scan], score: float) -> dict[str, float]:
    """Recall (%) of annotated boxes, boxes, and annotated boxes that several boxes hit."""
    total = hits25 = hits50 = twice = boxes = 0
    for every, room in zip(found, rooms, strict=True):
        kept = every.of_score(score)
        hit25, hit50 = (_hits(kept, room, iou) for iou in (0.25, 0.5))
        total, boxes = total + len(room.labels), boxes + len(kept)
        hits25, hits50 = hits25 + int(hit25.any(axis=0).sum()), hits50 + int(hit50.any(axis=0).sum())
        twice += int((hit25.sum(axis=0) > 1).sum())
    return {
        "annotated": total,
        "recall25": round(100 * hits25 / total, 2),
        "recall50": round(100 * hits50 / total, 2),
        "boxes": boxes,
        "hit_twice": twice,
    }


def _overlapping_pairs(found: Detections) -> int:
    """Number of pairs of boxes of one class that overlap by more than half, seen from above, at about one height."""
    first, second = cKDTree(found.boxes[:, :3]).query_pairs(2.0, output_type="ndarray").T
    same = found.labels[first] == found.labels[second]
    return int((overlaps_of_pairs(found.boxes[first[same]], found.boxes[second[same]]) > 0.5).sum())


def _hits(found: Detections, room: Scan, iou: float) -> Bool[np.ndarray, "n g"]:
    """Mark the annotated boxes that boxes of their class overlap by more than an IoU, seen from above and in height."""
    one, other = (grid.ravel() for grid in np.meshgrid(range(len(found)), range(len(room.labels)), indexing="ij"))
    if not len(one):
        return np.zeros((len(found), len(room.labels)), bool)
    a, b = found.boxes[one], room.boxes[other]
    flat = overlaps_of_pairs(a, b)
    area_a, area_b = a[:, 3] * a[:, 4], b[:, 3] * b[:, 4]
    shared = flat / (1 + flat) * (area_a + area_b)
    low = np.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
    high = np.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
    volume = shared * np.maximum(high - low, 0)
    overlap = volume / np.maximum(area_a * a[:, 5] + area_b * b[:, 5] - volume, 1e-9)
    same = found.labels[one] == room.labels[other]
    return ((overlap > iou) & same).reshape(len(found), len(room.labels))


if __name__ == "__main__":
    main()
