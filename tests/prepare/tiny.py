"""A raw dataset of tiny scans that can fail in every way, and writes down what is loaded."""

import os
import signal
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from h2a2_jax.scans.scan import Scan, ScanError
from h2a2_jax.scans.specs import S3DIS, DatasetSpec


@dataclass(frozen=True)
class TinyRaw:
    """Scans "a/0", "a/1", ... for training and "b 0" for validation, of random points.

    Attributes:
        log: file with the name of every scan that was loaded, a line each.
        train: number of training scans.
        points: in a scan.
        bad: scan -> what its loading does: "missing", "bug", "no points", "label", "memory", "death", "stray", "far".
    """

    log: Path
    train: int = 3
    points: int = 50
    bad: Mapping[str, str] | None = None

    @property
    def spec(self) -> DatasetSpec:
        return S3DIS

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        return {"train": tuple(f"a/{i}" for i in range(self.train)), "val": ("b 0",)}

    @property
    def notes(self) -> Mapping[str, int]:
        return {"areas missing": 2}

    def load(self, name: str) -> Scan:
        with self.log.open("a") as log:
            log.write(f"{name}\n")
        match (self.bad or {}).get(name):
            case "missing":
                raise ScanError(name, f"Scan {name} lacks its file.")
            case "bug":
                raise KeyError("vertex")
            case "memory":
                raise MemoryError
            case "death":
                os.kill(os.getpid(), signal.SIGKILL)
            case "no points":
                return tiny_scan(name, 0)
            case "stray" | "far" as kind:
                # One point and the box that encloses it, or every second point.
                scan = tiny_scan(name, 4 * self.points)
                scan.points[:: 2 if kind == "far" else len(scan.points), 0] = 400
                scan.boxes[0, 3] = 400
                return scan
            case "label":
                scan = tiny_scan(name, self.points)
                scan.labels[0] = 5
                return scan
        return tiny_scan(name, self.points)


def tiny_scan(name: str, points: int) -> Scan:
    """A scan of random points with two boxes."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return Scan(
        name,
        rng.uniform(0, 4, (points, 3)).astype(np.float32),
        rng.integers(0, 256, (points, 3)).astype(np.float32) / 255,
        rng.uniform(0.5, 1, (2, 7)).astype(np.float32),
        np.array([int(rng.integers(5)), -1], np.int32),
        rng.normal(size=(4, 4)).astype(np.float32),
        {"lines repaired": len(name)},
    )


def assert_equal(found: Scan, expected: Scan) -> None:
    """Everything is the same, colours up to their rounding to 1/255."""
    assert found.name == expected.name
    for field in ("points", "boxes", "labels", "transform"):
        a, b = getattr(found, field), getattr(expected, field)
        assert a.dtype == b.dtype and np.array_equal(a, b), field
    assert found.colors.dtype == np.float32
    np.testing.assert_allclose(found.colors, expected.colors, rtol=0, atol=0.501 / 255)
    assert dict(found.notes) == dict(expected.notes)
