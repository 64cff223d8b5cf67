"""Overlap of rotated boxes against exact polygons, on a million pairs of every kind that formulas trip over.

    python -m benchmarks.overlaps [--pairs=1000000] [--seed=0]

First boxes as rooms have them, sides of 5 cm to 10 m and footprints up to 40 times as long as wide, centres up to 50 m
from the origin, in float32: the largest error of the footprint and of the volume IoU. Then sides of 1 mm to 100 m of
any aspect, in float64 and in float32.

The polygons are clipped in float64 from the very numbers that the library is given, in the frame of the first box.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from h2a2_jax.boxes import rotated_bev_iou, rotated_iou

KINDS = ("generic", "touching", "contained", "identical", "thin", "coincident edges")
CHUNK = 25_000


@dataclass(frozen=True)
class Range:
    """Ranges that boxes are drawn from.

    Attributes:
        smallest: Shortest side (m).
        largest: Longest side (m).
        aspect: Greatest ratio of the footprint's sides.
        reach: Farthest centre from the origin, along an axis (m).
    """

    smallest: float
    largest: float
    aspect: float
    reach: float


ROOMS = Range(0.05, 10.0, 40.0, 50.0)
BEYOND = Range(1e-3, 1e2, 1e5, 50.0)


def draw_pairs(
    rng: np.random.Generator, count: int, kind: str, within: Range
) -> tuple[Float[np.ndarray, "n 7"], Float[np.ndarray, "n 7"]]:
    """Pairs of boxes of one kind, in float64.

    Half of the yaws are multiples of a right angle; "touching" pairs share a piece of an edge or a corner and
    "coincident edges" lie on one line with one of theirs, as far as float64 has it.

    Args:
        rng: Random numbers.
        count: Pairs.
        kind: One of `KINDS`.
        within: What boxes are drawn.

    Returns:
        First and second boxes.
    """
    first, second = (
        _draw_boxes(rng, count, within, thin=kind == "thin"),
        _draw_boxes(rng, count, within, kind == "thin"),
    )
    if kind in ("generic", "thin"):
        # Near enough to meet more often than not.
        apart = rng.uniform(-0.5, 0.5, (count, 3)) * (first[:, 3:6] + second[:, 3:6]) * 0.8
    elif kind == "identical":
        second = first.copy()
        apart = np.zeros((count, 3))
        # One half of them as the same box told otherwise.
        turns = rng.integers(0, 4, count) * rng.integers(0, 2, count)
        second[:, 3:5] = np.where(turns[:, None] % 2 == 1, second[:, [4, 3]], second[:, 3:5])
        second[:, 6] += turns * np.pi / 2
    elif kind == "contained":
        second[:, 3:6] = first[:, 3:6] * rng.uniform(0.1, 0.7, (count, 3))
        _keep_within(second, within)
        apart = rng.uniform(-0.15, 0.15, (count, 3)) * first[:, 3:6]
        is_parallel = rng.integers(0, 2, count) == 0
        second[:, 6] = np.where(is_parallel, first[:, 6], second[:, 6])
    else:
        side = rng.choice([-1.0, 1.0], (count, 3)) / 2
        if kind == "touching":
            apart = side * (first[:, 3:6] + second[:, 3:6])
        else:
            apart = side * (first[:, 3:6] - second[:, 3:6])
        # Along one axis they meet anywhere, or (a third) end to end too.
        along = rng.integers(0, 3, count)
        anywhere = rng.uniform(-0.5, 0.5, (count, 3)) * (first[:, 3:6] + second[:, 3:6])
        for axis in (0, 1):
            apart[:, axis] = np.where(along == axis, anywhere[:, axis], apart[:, axis])
        apart[:, 2] = anywhere[:, 2] / 2
        turns = rng.integers(0, 4, count)
        second[:, 6] = first[:, 6] + turns * np.pi / 2
        second[:, 3:5] = np.where(turns[:, None] % 2 == 1, second[:, [4, 3]], second[:, 3:5])
    cos, sin = np.cos(first[:, 6]), np.sin(first[:, 6])
    second[:, 0] = first[:, 0] + cos * apart[:, 0] - sin * apart[:, 1]
    second[:, 1] = first[:, 1] + sin * apart[:, 0] + cos * apart[:, 1]
    second[:, 2] = first[:, 2] + apart[:, 2]
    return first, second


def exact_overlaps(
    first: Float[np.ndarray, "n 7"], second: Float[np.ndarray, "n 7"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Footprint and volume IoU by clipping polygons, in float64.

    Args:
        first: Boxes.
        second: Boxes.

    Returns:
        IoU of the footprints, IoU of the volumes.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    area = _clipped_area(*_corners_in_frame(first, second), first[:, 3] / 2, first[:, 4] / 2)
    bev_union = first[:, 3] * first[:, 4] + second[:, 3] * second[:, 4] - area
    top = np.minimum(first[:, 2] - second[:, 2] + first[:, 5] / 2, second[:, 5] / 2)
    bottom = np.maximum(first[:, 2] - second[:, 2] - first[:, 5] / 2, -second[:, 5] / 2)
    common = area * np.maximum(top - bottom, 0)
    return area / bev_union, common / (first[:, 3:6].prod(axis=1) + second[:, 3:6].prod(axis=1) - common)


def _draw_boxes(rng: np.random.Generator, count: int, within: Range, thin: bool) -> np.ndarray:
    boxes = np.empty((count, 7))
    boxes[:, :3] = rng.uniform(-within.reach, within.reach, (count, 3))
    low, high = np.log(within.smallest), np.log(within.largest)
    boxes[:, 3:6] = np.exp(rng.uniform(low, high, (count, 3)))
    aspect = min(within.aspect, within.largest / within.smallest)
    if thin:
        ratio = np.exp(rng.uniform(np.log(aspect / 2), np.log(aspect), count))
        long = np.exp(rng.uniform(np.log(within.smallest * ratio), high))
        boxes[:, 3:5] = np.stack([long, long / ratio], axis=1)
        swapped = rng.integers(0, 2, count) == 1
        boxes[swapped, 3:5] = boxes[swapped][:, [4, 3]]
    _keep_within(boxes, within)
    straight = rng.integers(-2, 3, count) * (np.pi / 2)
    boxes[:, 6] = np.where(rng.integers(0, 2, count) == 0, straight, rng.uniform(-np.pi, np.pi, count))
    return boxes


def _keep_within(boxes: np.ndarray, within: Range) -> None:
    """Lengthens sides that are too short."""
    shortest = np.maximum(within.smallest, boxes[:, 3:5].max(axis=1) / within.aspect)
    boxes[:, 3:5] = np.maximum(boxes[:, 3:5], shortest[:, None])
    boxes[:, 5] = np.maximum(boxes[:, 5], within.smallest)


def _corners_in_frame(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners x, y [n, 4] of the second footprints in the frames of the first boxes."""
    cos, sin = np.cos(second[:, 6, None]), np.sin(second[:, 6, None])
    along, across = (second[:, 3 + axis, None] / 2 * sign for axis, sign in ((0, [1, -1, -1, 1]), (1, [1, 1, -1, -1])))
    x = (second[:, 0] - first[:, 0])[:, None] + along * cos - across * sin
    y = (second[:, 1] - first[:, 1])[:, None] + along * sin + across * cos
    cos, sin = np.cos(first[:, 6, None]), np.sin(first[:, 6, None])
    return cos * x + sin * y, cos * y - sin * x


def _clipped_area(x: np.ndarray, y: np.ndarray, half_x: np.ndarray, half_y: np.ndarray) -> np.ndarray:
    """Area of convex polygons inside |x| <= half_x, |y| <= half_y (Sutherland-Hodgman, all pairs in step)."""
    count = np.full(len(x), x.shape[1])
    for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
        x, y, count = _clip(x, y, count, sign * (x, y)[axis], (half_x, half_y)[axis])
    # Relative to one corner, so that small polygons keep their digits.
    is_point = np.arange(x.shape[1]) < count[:, None]
    u, v = np.where(is_point, x - x[:, :1], 0), np.where(is_point, y - y[:, :1], 0)
    return np.abs((u[:, :-1] * v[:, 1:] - u[:, 1:] * v[:, :-1]).sum(axis=1)) / 2


def _clip(
    x: np.ndarray, y: np.ndarray, count: np.ndarray, along: np.ndarray, bound: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Polygons' part where `along`, a signed coordinate of their corners, is at most `bound`."""
    rows, width = np.arange(len(x)), x.shape[1]
    out_x, out_y = np.zeros((2, len(x), width + 2))
    kept = np.zeros(len(x), int)
    depth = bound[:, None] - along
    for corner in range(width):
        is_point = corner < count
        following = np.where(corner + 1 < count, corner + 1, 0) % width
        here, there = depth[:, corner], depth[rows, following]
        is_inside, is_crossing = is_point & (here >= 0), is_point & (here * there < 0)
        fraction = np.where(is_crossing, here, 0) / np.where(is_crossing, here - there, 1)
        crossing_x = x[:, corner] + fraction * (x[rows, following] - x[:, corner])
        crossing_y = y[:, corner] + fraction * (y[rows, following] - y[:, corner])
        for is_new, new_x, new_y in ((is_inside, x[:, corner], y[:, corner]), (is_crossing, crossing_x, crossing_y)):
            chosen = rows[is_new]
            out_x[chosen, kept[chosen]], out_y[chosen, kept[chosen]] = new_x[is_new], new_y[is_new]
            kept[chosen] += 1
    most = max(int(kept.max(initial=0)), 1)
    return out_x[:, :most], out_y[:, :most], kept


@dataclass(frozen=True)
class Errors:
    """Largest errors over the pairs of one kind.

    Attributes:
        kind: Of the pairs.
        pairs: How many.
        overlapping: Share of them whose footprints overlap.
        bev: Of the footprint IoU.
        volume: Of the volume IoU.
        worst: The pair of the largest.
    """

    kind: str
    pairs: int
    overlapping: float
    bev: float
    volume: float
    worst: np.ndarray


def measure(pairs: int, within: Range, dtype: type, seed: int) -> Iterator[Errors]:
    """Errors of the library's overlaps, kind by kind.

    Args:
        pairs: Of all kinds together.
        within: What boxes are drawn.
        dtype: float32 or float64 (which needs jax_enable_x64).
        seed: Of the random numbers.
    """
    functions: tuple[Callable, ...] = (jax.jit(rotated_bev_iou), jax.jit(rotated_iou))
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([seed, number])
        wanted = pairs // len(KINDS)
        largest, worst, meeting = np.zeros(2), np.zeros((2, 7)), 0
        for start in range(0, wanted, CHUNK):
            drawn = draw_pairs(rng, CHUNK, kind, within)
            first: np.ndarray = drawn[0].astype(dtype)[: wanted - start]
            second: np.ndarray = drawn[1].astype(dtype)[: wanted - start]
            exact = exact_overlaps(first, second)
            meeting += int(np.sum(exact[0] > 1e-9))
            for of, function in enumerate(functions):
                # One shape for all, or each last chunk would compile anew.
                found = np.asarray(function(*(boxes.astype(dtype) for boxes in drawn)))[: len(first)]
                errors = np.abs(found - exact[of])
                if not errors.max() <= largest.max():
                    worst = np.stack([first[errors.argmax()], second[errors.argmax()]])
                largest[of] = max(largest[of], errors.max())
        yield Errors(kind, wanted, meeting / max(wanted, 1), float(largest[0]), float(largest[1]), worst)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worst", action="store_true", help="print the worst pair of each kind")
    arguments = parser.parse_args()
    for title, within, dtype in (
        ("sides .05 to 10 m, aspect up to 40, float32", ROOMS, np.float32),
        ("sides 1e-3 to 1e2 m, float64", BEYOND, np.float64),
        ("sides 1e-3 to 1e2 m, float32", BEYOND, np.float32),
    ):
        print(f"{title}\n{'kind':18} {'pairs':>8} {'overlap':>8} {'bev':>9} {'volume':>9}")
        with jax.enable_x64(dtype is np.float64):
            for errors in measure(arguments.pairs, within, dtype, arguments.seed):
                figures = f"{errors.overlapping:8.1%} {errors.bev:9.1e} {errors.volume:9.1e}"
                print(f"{errors.kind:18} {errors.pairs:8} {figures}", flush=True)
                if arguments.worst:
                    print(errors.worst.tolist())


if __name__ == "__main__":
    main()
