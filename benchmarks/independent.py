"""Average precision and the overlap of turned boxes against implementations that share nothing with the library.

    python -m benchmarks.independent [--cases 10000] [--pairs 1000000] [--seed SEED]

Scores: random evaluations (scans, classes, boxes, equal scores, equal boxes, overlaps that are exactly a threshold,
empty scans, classes without boxes) are scored by the library and by the definition, in rational numbers: a curve is a
list of prefixes, and every question is asked of all of them. Overlaps: random pairs of boxes against shapely, which
intersects polygons in float64.

Without --seed the seed is a new one, which is printed. The program exits with status 1 if something differs by more
than `SCORE_TOLERANCE` or the tolerance of `GROUPS`. It needs shapely.
"""

import argparse
import itertools
import math
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import numpy as np
import shapely
from jaxtyping import Float

from benchmarks.overlaps import BEYOND, KINDS, ROOMS, Range, draw_pairs
from h2a2_jax.boxes import Detections, axis_aligned_iou, rotated_bev_iou, rotated_iou
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation import Evaluation, evaluate_detections
from h2a2_jax.evaluation.average_precision import DISTANCES, SIZES, Bins

SCORE_TOLERANCE = 1e-12
"""Largest difference of a score in float64 from the rational number."""
_NEAR = 1e-4
"""Overlaps of the library are float32: evaluations in which an overlap is nearer than this to a threshold or to the
next best one, and not equal to it, are drawn anew."""
_CONSISTENT = 1e-6
"""Share of the smaller area by which intersection and union of shapely may disagree."""
CHUNK = 25_000


# --- overlaps ---------------------------------------------------------------------------------------------------------


def footprints(boxes: Float[np.ndarray, "n 7"], centres: Float[np.ndarray, "n 2"]) -> np.ndarray:
    """Polygons of shapely, around given centres."""
    boxes = boxes.astype(np.float64)
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    corners = [
        np.stack([a * boxes[:, 3] * cos - b * boxes[:, 4] * sin, a * boxes[:, 3] * sin + b * boxes[:, 4] * cos], axis=1)
        for a, b in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))
    ]
    return shapely.polygons(np.stack(corners, axis=1) + centres[:, None])


def common_areas(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, " n"]:
    """Area of the intersection of pairs of polygons.

    GEOS 3.14 intersects some pairs of nearly equal polygons in points alone. Its union gives them away: the areas do
    not add up. Their corners are rounded to a grid of a millionth of a millionth of their size, which it handles.
    """
    common = shapely.area(shapely.intersection(first, second))
    areas = shapely.area(first), shapely.area(second)
    excess = areas[0] + areas[1] - shapely.area(shapely.union(first, second)) - common
    for row in np.flatnonzero(np.abs(excess) > _CONSISTENT * np.minimum(*areas)).tolist():
        size = float(np.abs(shapely.get_coordinates([first[row], second[row]])).max())
        common[row] = shapely.area(shapely.intersection(first[row], second[row], grid_size=size * 1e-12))
    return common


def shapely_overlaps(
    first: Float[np.ndarray, "n 7"], second: Float[np.ndarray, "n 7"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """IoU of the footprints and of the volumes of pairs, float64, from the very numbers that are given.

    Both boxes are moved by the centre of the first, so that no digit is lost far from the origin.
    """
    offset = second[:, :3].astype(np.float64) - first[:, :3].astype(np.float64)
    common = common_areas(footprints(first, np.zeros((len(first), 2))), footprints(second, offset[:, :2]))
    one, other = first[:, 3:6].astype(np.float64), second[:, 3:6].astype(np.float64)
    bev = common / (one[:, :2].prod(axis=1) + other[:, :2].prod(axis=1) - common)
    bottom = np.maximum(-one[:, 2] / 2, offset[:, 2] - other[:, 2] / 2)
    volume = common * np.maximum(np.minimum(one[:, 2] / 2, offset[:, 2] + other[:, 2] / 2) - bottom, 0)
    return bev, volume / (one.prod(axis=1) + other.prod(axis=1) - volume)


@dataclass(frozen=True)
class Group:
    """Pairs of boxes that are drawn from one range.

    Attributes:
        name: name in the table.
        within: ranges of the boxes.
        dtype: type of the boxes and of the arithmetic.
        tolerance: largest error of an IoU; infinity where the table alone says it.
        share: share of all pairs.
    """

    name: str
    within: Range
    dtype: type
    tolerance: float
    share: float


GROUPS = (
    Group("rooms, float32", ROOMS, np.float32, 1e-5, 0.4),
    Group("rooms up to 2 km away, float32", replace(ROOMS, reach=2e3), np.float32, 1e-5, 0.1),
    Group("1 mm to 100 m, float64", BEYOND, np.float64, 1e-9, 0.2),
    Group("rooms on map coordinates, float64", replace(ROOMS, reach=5e6), np.float64, 1e-9, 0.1),
    Group("1 mm to 100 m, float32", BEYOND, np.float32, math.inf, 0.2),
)
"""Tolerances are those of `tests/boxes/test_overlap_kinds.py`."""
FUNCTIONS: Mapping[str, Callable] = {
    "bev": rotated_bev_iou,
    "volume": rotated_iou,
    "few": partial(rotated_iou, few=True),
    "aligned": axis_aligned_iou,
}
"""Functions of the library that are compared."""
TURNS = ("as drawn", "nearly a right angle", "whole turns", "nearly equal")
"""What is done to the pairs beyond their kind."""


def turned(rng: np.random.Generator, first: np.ndarray, second: np.ndarray, turn: str) -> None:
    """Change pairs in place, as one of `TURNS` says."""
    count = len(first)
    if turn == "nearly a right angle":
        small = rng.choice([-1, 1], count) * 10 ** rng.uniform(-9, -2, count)
        second[:, 6] = first[:, 6] + rng.integers(-4, 5, count) * (np.pi / 2) + small
    elif turn == "whole turns":
        for boxes in (first, second):
            boxes[:, 6] += rng.integers(-1, 2, count) * 2 * np.pi
    elif turn == "nearly equal":
        second[:] = first * (1 + rng.choice([-1, 0, 1], (count, 7)) * 10 ** rng.uniform(-9, -3, (count, 1)))


@dataclass
class Overlaps:
    """Largest errors of the pairs of one group and kind.

    Attributes:
        group: the group.
        kind: kind of the pairs, of `KINDS`.
        pairs: number of pairs.
        overlapping: number of those whose footprints overlap.
        errors: largest error by function.
        worst: pair [2, 7] of the largest error.
    """

    group: Group
    kind: str
    pairs: int
    overlapping: int
    errors: dict[str, float]
    worst: np.ndarray


def compare_overlaps(group: Group, pairs: int, seed: int) -> Iterator[Overlaps]:
    """Compare the library's overlaps with shapely's, kind by kind; float64 needs jax_enable_x64."""
    functions = {name: jax.jit(function) for name, function in FUNCTIONS.items()}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([seed, number])
        found = Overlaps(group, kind, pairs // len(KINDS), 0, dict.fromkeys(functions, 0.0), np.zeros((2, 7)))
        for start in range(0, found.pairs, CHUNK):
            drawn = draw_pairs(rng, CHUNK, kind, group.within)  # whole chunks: another shape would compile anew
            for turn, rows in zip(TURNS, np.array_split(np.arange(CHUNK), len(TURNS)), strict=True):
                part = drawn[0][rows], drawn[1][rows]
                turned(rng, *part, turn)
                drawn[0][rows], drawn[1][rows] = part
            rows = rng.permutation(CHUNK)
            first: np.ndarray = drawn[0][rows].astype(group.dtype)
            second: np.ndarray = drawn[1][rows].astype(group.dtype)
            straight = [boxes.copy() for boxes in (first, second)]
            for boxes in straight:
                boxes[:, 6] = 0
            count = min(CHUNK, found.pairs - start)
            bev, volume = shapely_overlaps(first[:count], second[:count])
            aligned = shapely_overlaps(straight[0][:count], straight[1][:count])[1]
            found.overlapping += int(np.sum(bev > 1e-9))
            for name, function in functions.items():
                exact = {"bev": bev, "aligned": aligned}.get(name, volume)
                errors = np.abs(np.asarray(function(first, second), np.float64)[:count] - exact)
                errors = np.where(np.isnan(errors), np.inf, errors)
                if errors.max() > max(found.errors.values()):
                    found.worst = np.stack([first[errors.argmax()], second[errors.argmax()]])
                found.errors[name] = max(found.errors[name], float(errors.max()))
        yield found


# --- average precision by its definition ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A detection of one class.

    Attributes:
        score: its score.
        scan: its scan.
        bin_of: its own bin of sizes, and of distances.
        overlaps: overlap with each box of its class and scan, by the number of the box.
    """

    score: float
    scan: int
    bin_of: tuple[int, int]
    overlaps: Mapping[int, float]


@dataclass(frozen=True)
class Case:
    """An evaluation: what the library is given.

    Attributes:
        detections: detections by scan.
        ground_truth: annotated boxes by scan.
        num_classes: number of classes.
        thresholds: IoU thresholds.
        rotated: True if yaw counts.
        origins: x, y of the scans.
        measured_from: kind of the origins.
        draws: times that each drawing has each scan, [draws, scans].
    """

    detections: list[Detections]
    ground_truth: list[GroundTruth]
    num_classes: int
    thresholds: tuple[float, ...]
    rotated: bool
    origins: np.ndarray
    measured_from: Any
    draws: np.ndarray


Curve = list[tuple[int, int]]
"""Hits, and detections kept, of each prefix of a list by descending score."""


def prefixes(hits: Sequence[bool], weights: Sequence[int]) -> Curve:
    """The prefixes of a list, whose entries count as often as their weight says."""
    pairs = list(zip(hits, weights, strict=True))
    return [(sum(w for hit, w in pairs[:k] if hit), sum(weights[:k])) for k in range(1, len(pairs) + 1)]


def precision_from(curve: Curve, least: int) -> Fraction:
    """Best precision of the prefixes with so many hits or more; 0 if there is none."""
    return max((Fraction(hits, kept) for hits, kept in curve if hits >= least and kept), default=Fraction(0))


def area(curve: Curve, boxes: int) -> Fraction:
    """Sum over the boxes that are hit of the best precision at that recall or beyond, by box."""
    levels = sorted({0, *(hits for hits, _ in curve)})
    return sum((precision_from(curve, b) * (b - a) for a, b in itertools.pairwise(levels)), Fraction(0)) / boxes


def best_point(ranked: Sequence[Found], hits: Sequence[bool], boxes: int) -> tuple[float, ...] | None:
    """Score, precision, recall and F1 of the score to keep detections from; None without boxes."""
    if not boxes:
        return None
    points = []
    for score in {found.score for found in ranked}:
        kept = [hit for found, hit in zip(ranked, hits, strict=True) if found.score >= score]
        points.append((Fraction(2 * sum(kept), len(kept) + boxes), score, Fraction(sum(kept), len(kept)), sum(kept)))
    f1, score, precision, right = max(points, default=(Fraction(0), math.nan, Fraction(0), 0))
    if not f1:
        return math.nan, 0.0, 0.0, 0.0
    return score, float(precision), right / boxes, float(f1)


def bin_number(bins: Bins, value: float) -> int:
    """The bin of a value: the number of bounds that it reaches."""
    return sum(value >= bound for bound in bins.bounds)


def ranked_detections(case: Case, overlaps: Sequence[np.ndarray], label: int) -> list[Found]:
    """Detections of a class in all scans by descending score, equal ones in the order of the scans.

    Args:
        case: the evaluation.
        overlaps: IoU of every detection with every box, by scan.
        label: the class.
    """
    pool = []
    for scan, (found, there) in enumerate(zip(case.detections, case.ground_truth, strict=True)):
        for row in range(len(found.labels)):
            if found.labels[row] == label:
                own = {box: float(overlaps[scan][row, box]) for box in np.flatnonzero(there.labels == label).tolist()}
                pool.append(Found(float(found.scores[row]), scan, bins_of(case, scan, found.boxes[row]), own))
    return sorted(pool, key=lambda found: -found.score)


def bins_of(case: Case, scan: int, box: np.ndarray) -> tuple[int, int]:
    """Bins of a box by its volume and by its distance."""
    x, y, _, dx, dy, dz, _ = map(float, box)
    distance = math.hypot(x - case.origins[scan][0], y - case.origins[scan][1])
    return bin_number(SIZES, dx * dy * dz), bin_number(DISTANCES[case.measured_from], distance)


def score_by_definition(case: Case, overlaps: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Every figure of an evaluation, by name; NaN where it is not defined."""
    shape = (len(case.thresholds), case.num_classes)
    figures = {name: np.full(shape, np.nan) for name in ("ap", "ar")}
    figures |= {name: np.full((*shape, 3), np.nan) for name in ("by size", "by distance")}
    figures |= {"curves": np.full((*shape, 101), np.nan), "f1": np.full((*shape, 4), np.nan)}
    figures |= {"draws": np.full((*shape, len(case.draws)), np.nan), "f1 of all": np.full((shape[0], 4), np.nan)}
    figures["calibration"] = np.full((shape[0], 3, 10), np.nan)
    for t, threshold in enumerate(case.thresholds):
        everything: list[tuple[Found, bool]] = []
        for label in range(case.num_classes):
            ranked = ranked_detections(case, overlaps, label)
            taken: set[tuple[int, int]] = set()
            hits, counted_in = [], []
            for found in ranked:
                overlap, box = max(((overlap, -box) for box, overlap in found.overlaps.items()), default=(0.0, 0))
                box, is_near = -box, overlap > threshold
                hits.append(is_near and (found.scan, box) not in taken)
                counted_in.append(found.bin_of)
                if is_near:
                    taken.add((found.scan, box))
                    counted_in[-1] = bins_of(case, found.scan, case.ground_truth[found.scan].boxes[box])
            everything += zip(ranked, hits, strict=True)
            boxes = [
                (scan, bins_of(case, scan, there.boxes[box]))
                for scan, there in enumerate(case.ground_truth)
                for box in np.flatnonzero(there.labels == label)
            ]
            once = [1] * len(hits)
            curve = prefixes(hits, once)
            if boxes:
                figures["ap"][t, label] = area(curve, len(boxes))
                figures["ar"][t, label] = sum(hits) / len(boxes)
                best = [precision_from(curve, least) for least in range(len(boxes) + 1)]
                # The level i / 100 is reached by hits / boxes if 100 hits >= i boxes.
                figures["curves"][t, label] = [best[-(-i * len(boxes) // 100)] for i in range(101)]
                figures["f1"][t, label] = best_point(ranked, hits, len(boxes))
            for axis, name in enumerate(("by size", "by distance")):
                for b in range(3):
                    number = sum(own[axis] == b for _, own in boxes)
                    if number:
                        inside = [hit for hit, own in zip(hits, counted_in, strict=True) if own[axis] == b]
                        figures[name][t, label, b] = area(prefixes(inside, [1] * len(inside)), number)
            for d, times in enumerate(case.draws.tolist()):
                if number := sum(times[scan] for scan, _ in boxes):
                    weights = [times[found.scan] for found in ranked]
                    figures["draws"][t, label, d] = area(prefixes(hits, weights), number)
        everything.sort(key=lambda pair: -pair[0].score)
        total = sum(len(there.labels) for there in case.ground_truth)
        point = best_point([found for found, _ in everything], [hit for _, hit in everything], total)
        figures["f1 of all"][t] = np.nan if point is None else point
        for b in range(10):
            own = [(f.score, hit) for f, hit in everything if b / 10 <= f.score and (f.score < (b + 1) / 10 or b == 9)]
            figures["calibration"][t, 2, b] = len(own)
            if own:
                figures["calibration"][t, 0, b] = math.fsum(score for score, _ in own) / len(own)
                figures["calibration"][t, 1, b] = sum(hit for _, hit in own) / len(own)
    figures["draws"] = _mean_of_known(figures["draws"], 1)
    figures["map"], figures["mar"] = _mean_of_known(figures["ap"], 1), _mean_of_known(figures["ar"], 1)
    return figures


def _mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    return np.where(count, np.where(known, values, 0).sum(axis=axis) / np.maximum(count, 1), np.nan)


def figures_of_library(case: Case, result: Evaluation) -> dict[str, np.ndarray]:
    """The same figures as the library gives them."""

    def numbers(point: Any) -> list[float]:
        return [math.nan] * 4 if point is None else [point.score, point.precision, point.recall, point.f1]

    assert result.by_distance is not None
    return {
        "ap": result.average_precision,
        "ar": result.average_recall,
        "map": result.mean_average_precision,
        "mar": result.mean_average_recall,
        "curves": result.curves,
        "f1": np.array([[numbers(point) for point in own] for own in result.best_f1]).reshape(
            len(case.thresholds), case.num_classes, 4
        ),
        "f1 of all": np.array([numbers(point) for point in result.best_f1_of_all]),
        "calibration": result.calibration,
        "by size": result.by_size.average_precision.swapaxes(1, 2),
        "by distance": result.by_distance.average_precision.swapaxes(1, 2),
        "draws": result.matches.mean_average_precision(case.draws).T,
    }


# --- random evaluations -----------------------------------------------------------------------------------------------


def draw_case(rng: np.random.Generator) -> Case:
    """Draw an evaluation: half of them with boxes on a grid, whose overlaps are equal, or exactly a threshold."""
    scans, num_classes, on_grid = int(rng.integers(0, 6)), int(rng.integers(1, 5)), bool(rng.integers(2))
    rotated, large = bool(rng.integers(2)), rng.random() < 0.02
    detections, ground_truth = [], []
    for _ in range(scans):
        boxes = _draw_boxes(rng, int(rng.integers(0, 30 if large else 7)), on_grid, rotated)
        labels = rng.integers(0, num_classes, len(boxes)).astype(np.int32)
        if len(boxes) and rng.integers(2):  # a box that is there twice
            boxes, labels = np.concatenate([boxes, boxes[:1]]), np.append(labels, labels[:1])
        if len(boxes) and on_grid:  # one beside another, so that a detection overlaps both alike
            beside = boxes[:1].copy()
            beside[0, 0] += beside[0, 3]
            boxes, labels = np.concatenate([beside, boxes]), np.append(labels[:1], labels)
        found = _draw_boxes(rng, int(rng.integers(0, 60 if large else 12)), on_grid, rotated)
        classes = rng.integers(0, num_classes, len(found)).astype(np.int32)
        for row in np.flatnonzero(rng.random(len(found)) < 0.7 * bool(len(boxes))):
            source = rng.integers(len(boxes))
            found[row] = _moved(rng, boxes[source], on_grid, rotated)
            classes[row] = labels[source] if rng.random() < 0.9 else classes[row]
        scores = rng.integers(0, 17, len(found)) / 16 if rng.integers(2) else rng.uniform(0, 1, len(found))
        detections.append(Detections(found, scores.astype(np.float32), classes))
        ground_truth.append(GroundTruth(boxes, labels))
    thresholds = [(0.25, 0.5), (0.5, 0.25), (0.5,), (0.0, 0.125, 0.75), tuple(rng.uniform(0, 0.99, 2).tolist())]
    return Case(
        detections,
        ground_truth,
        num_classes,
        thresholds[rng.integers(len(thresholds))],
        rotated,
        rng.integers(-2, 3, (scans, 2)) * 1.25,
        ("sensor", "centre")[rng.integers(2)],
        rng.integers(0, 4, (3, scans)),
    )


def _draw_boxes(rng: np.random.Generator, count: int, on_grid: bool, rotated: bool) -> np.ndarray:
    if on_grid:
        boxes = np.concatenate([rng.integers(0, 9, (count, 3)) / 4, 2.0 ** rng.integers(-2, 2, (count, 3))], axis=1)
    else:
        boxes = np.concatenate([rng.uniform(0, 3, (count, 3)), np.exp(rng.uniform(-2, 0.8, (count, 3)))], axis=1)
    yaw = rng.uniform(-4, 4, (count, 1)) * (rotated and not on_grid)
    return np.concatenate([boxes, yaw], axis=1).astype(np.float32)


def _moved(rng: np.random.Generator, box: np.ndarray, on_grid: bool, rotated: bool) -> np.ndarray:
    """A detection about a box: on a grid moved by half of its size, or a half or a quarter of it."""
    moved = box.astype(np.float64)
    if on_grid:
        axis = rng.integers(3)
        if rng.integers(2):
            moved[axis] += rng.integers(-1, 2) * moved[3 + axis] / 2
        else:
            moved[rng.permutation([3, 4, 5])[: rng.integers(3)]] /= 2
    else:
        moved[:3] += rng.normal(0, 0.15, 3) * moved[3:6]
        moved[3:6] *= np.exp(rng.normal(0, 0.15, 3))
        moved[6] += rng.normal(0, 0.2) * rotated
    return moved.astype(np.float32)


def overlaps_of(case: Case) -> list[np.ndarray]:
    """IoU of every detection with every box [n, m], by scan, from shapely, rounded to ten digits.

    On a grid an overlap may be a threshold, or that of another box; shapely's last digits must not decide.
    """
    tables = []
    for found, there in zip(case.detections, case.ground_truth, strict=True):
        shape = (len(found.boxes), len(there.boxes))
        first, second = np.repeat(found.boxes, shape[1], axis=0), np.tile(there.boxes, (shape[0], 1))
        if not case.rotated:
            first[:, 6] = second[:, 6] = 0
        tables.append(np.round(shapely_overlaps(first, second)[1], 10).reshape(shape))
    return tables


def is_undecided(case: Case, overlaps: Sequence[np.ndarray]) -> bool:
    """True if the rounding of float32 may decide a match, or the bin of a score or a box."""
    for found, there, table in zip(case.detections, case.ground_truth, overlaps, strict=True):
        tenths = found.scores.astype(np.float64) * 10
        near = np.abs(tenths - np.round(tenths)) < 1e-5
        if (near & (found.scores.astype(np.float64) * 16 % 1 != 0)).any():
            return True
        for row, label in zip(table, found.labels, strict=True):
            own = row[there.labels == label]
            gaps = [np.abs(own - threshold) for threshold in case.thresholds] + [own.max(initial=0) - own]
            if any(((gap < _NEAR) & (gap > 1e-12)).any() for gap in gaps):
                return True
    return False


def compare_scores(cases: int, seed: int) -> tuple[dict[str, float], int]:
    """Compare the library's scores with the definition on random evaluations.

    Returns:
        Largest difference by figure, infinity where one is not defined and the other is; the number of evaluations
        that were drawn anew.
    """
    rng = np.random.default_rng(seed)
    largest: dict[str, float] = {}
    skipped = 0
    for number in range(cases):
        case = draw_case(rng)
        while is_undecided(case, overlaps := overlaps_of(case)):
            case, skipped = draw_case(rng), skipped + 1
        names = [f"class {label}" for label in range(case.num_classes)]
        result = evaluate_detections(
            case.detections,
            case.ground_truth,
            names,
            case.thresholds,
            rotated=case.rotated,
            origins=case.origins,
            measured_from=case.measured_from,
        )
        ours, theirs = figures_of_library(case, result), score_by_definition(case, overlaps)
        for name, expected in theirs.items():
            difference = _difference(ours[name], expected)
            if difference > max(SCORE_TOLERANCE, largest.get(name, 0.0)):
                print(f"{name} of evaluation {number} of seed {seed} differs by {difference:.1e}")
            largest[name] = max(largest.get(name, 0.0), difference)
    return largest, skipped


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    if np.shape(ours) != theirs.shape or (np.isnan(ours) != np.isnan(theirs)).any():
        return math.inf
    return float(np.abs(np.nan_to_num(ours) - np.nan_to_num(theirs)).max(initial=0))


def main() -> int:
    """Print the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="random evaluations")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of boxes")
    parser.add_argument("--seed", type=int, help="of the random numbers; a new one by default")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    differs = False
    for group in GROUPS:
        if not options.pairs:
            break
        columns = "".join(f" {name:>9}" for name in FUNCTIONS)
        print(f"\n{group.name}\n{'kind':18} {'pairs':>8} {'overlap':>8}{columns}")
        with jax.enable_x64(group.dtype is np.float64):
            for found in compare_overlaps(group, int(options.pairs * group.share), seed):
                errors = " ".join(f"{error:9.1e}" for error in found.errors.values())
                print(
                    f"{found.kind:18} {found.pairs:8} {found.overlapping / max(found.pairs, 1):8.1%} {errors}",
                    flush=True,
                )
                if max(found.errors.values()) > group.tolerance:
                    differs = True
                    print(f"more than {group.tolerance:g}, worst for {found.worst.tolist()}")
    largest, skipped = compare_scores(options.cases, seed)
    print(f"\n{options.cases} evaluations, {skipped} others left out because float32 decides in them")
    for name, difference in largest.items():
        print(f"{name:12} {difference:9.1e}")
        differs |= not difference <= SCORE_TOLERANCE
    print("Something differs." if differs else "All are equal within the tolerances.")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
