"""How often the up axis is named rightly, wrongly and not at all, on procedural scans and files in six orientations.

    python -m benchmarks.orientation --scans=100 [--files FILE:AXIS ...] [--fit]

Every scan is turned so that each of the six axes points up. "Needs it" are the five turned ones, which are declared as
z up; advice on the untouched one is always wrong. With --fit the weights of `scans.orientation` are fitted first, on
scans of another seed, each as it is and turned, tilted and cropped at random, and printed.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from h2a2_jax.scans import orientation
from h2a2_jax.scans.formats.point_cloud import read_point_cloud
from h2a2_jax.scans.frame import UPRIGHT
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.scans.synthetic.rooms import Scale
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

SCALES: tuple[Scale, ...] = ("demo", "full")
_MOST = 120_000
_RIDGE = 2.0


def scans(seed: int, count: int, place: int) -> list[tuple[str, Float[np.ndarray, "m 3"]]]:
    """Kind and points of one scan of each dataset and scale."""
    found = []
    for spec in SPECS:
        for scale in SCALES:
            points = SyntheticSource(spec, "val", count, seed=seed, scale=scale)[place].points
            rng = np.random.default_rng(place)
            if len(points) > _MOST:
                points = points[rng.choice(len(points), _MOST, replace=False)]
            found.append((f"{spec.name}, {scale}", points.astype(np.float64)))
    return found


def disturbed(points: Float[np.ndarray, "m 3"], rng: np.random.Generator) -> Float[np.ndarray, "m 3"]:
    """Turn a scan by any angle, tilt it by up to 8 degrees and crop it to part of its floor."""
    keep = np.ones(len(points), bool)
    for axis in (0, 1):
        low, high = np.percentile(points[:, axis], [0, 100])
        first = rng.uniform(0, 0.3) * (high - low)
        keep &= (points[:, axis] > low + first) & (points[:, axis] < low + first + 0.7 * (high - low))
    yaw, tilt = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(0, 8))
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    return points[keep] @ (about_x @ about_z).T


def _features(count: int, place: int) -> list[np.ndarray]:
    rng, rows = np.random.default_rng(place), []
    for _, points in scans(5, count, place):
        for shown in (points, disturbed(points, rng)):
            found, _ = orientation.features(shown)
            if found is not None:
                rows.append(found)
    return rows


def fit(tables: Float[np.ndarray, "n 6 f"]) -> dict[str, float]:
    """Weights with which the votes are the log-odds of the true axis, z: a conditional logit with a small ridge."""
    scale, true = tables.reshape(-1, tables.shape[2]).std(axis=0), orientation.AXES.index("z")
    scaled = tables / scale

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = scaled @ weights
        odds -= odds.max(axis=1, keepdims=True)
        shares = np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)
        slope = ((shares[:, :, None] * scaled).sum(axis=1) - scaled[:, true]).sum(axis=0)
        return float(-np.log(shares[:, true]).sum() + _RIDGE * weights @ weights), slope + 2 * _RIDGE * weights

    weights = minimize(loss, np.zeros(tables.shape[2]), jac=True).x / scale
    return {name: round(float(weight), 2) for name, weight in zip(orientation.FEATURES, weights, strict=True)}


def outcomes(points: Float[np.ndarray, "m 3"], up: str = "z") -> Iterator[tuple[str, str]]:
    """The true axis in the turned file, and "right", "wrong" or "silent", of a scan turned to all orientations."""
    standing = points @ np.array(UPRIGHT[up], np.float64).T
    for axis, matrix in UPRIGHT.items():
        guess = orientation.guess_up("z", [orientation.up_votes(standing @ np.array(matrix, np.float64))])
        if axis == "z":
            yield axis, "wrong" if guess.differs else "right"
        else:
            yield axis, "silent" if not guess.differs else "right" if guess.guess == axis else "wrong"


def _outcomes(count: int, place: int) -> list[tuple[str, str, str]]:
    return [(kind, *each) for kind, points in scans(11, count, place) for each in outcomes(points)]


def main() -> None:
    """Fit if asked to, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=100, help="procedural scans of each dataset and scale")
    parser.add_argument("--files", nargs="*", default=[], help="files of points in metres, with the axis that is up")
    parser.add_argument("--fit", action="store_true", help="fit the weights, print and use them")
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        if options.fit:
            rows = [row for found in pool.map(partial(_features, options.scans), range(options.scans)) for row in found]
            print(weights := fit(np.array(rows)))
            orientation.WEIGHTS = weights
    with ProcessPoolExecutor(2) as pool:  # whose processes take over the weights
        found = [each for part in pool.map(partial(_outcomes, options.scans), range(options.scans)) for each in part]
    for file in options.files:
        path, up = file.rsplit(":", 1)
        found += [(path.rsplit("/", 1)[-1], *each) for each in outcomes(read_point_cloud(path).points, up)]
    print(f"{'scans':28}{'as they are, wrong':>20}{'turned: right':>16}{'wrong':>8}{'silent':>8}")
    for kind in [*dict.fromkeys(kind for kind, _, _ in found), "all"]:
        mine = [(axis, what) for name, axis, what in found if kind in (name, "all")]
        straight = [what for axis, what in mine if axis == "z"]
        turned = [what for axis, what in mine if axis != "z"]
        shares = [turned.count(what) / len(turned) for what in ("right", "wrong", "silent")]
        print(f"{kind:28}{straight.count('wrong') / len(straight):>20.1%}{shares[0]:>16.1%}", end="")
        print(f"{shares[1]:>8.1%}{shares[2]:>8.1%}")


if __name__ == "__main__":
    main()
