"""A scan as it is prepared, and the statistics of a prepared dataset."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from h2a2_jax.prepare.scan_cache import DamagedScanError, ScanCache
from h2a2_jax.scans.raw import RawDataset
from h2a2_jax.scans.scan import FAR_POINTS, Scan, ScanError, usable_boxes, validate_scan, within_reach
from h2a2_jax.scans.specs import DatasetSpec

VERSION = 1
"""Of the schema of `statistics`."""

_SITE_SIZE = 0.01  # m, the finest voxels that indoor detectors use


@dataclass(frozen=True)
class ScanSummary:
    """What is counted of one scan.

    Attributes:
        points: their number.
        sites: voxels of 1 cm that hold a point.
        extent: of the points, x, y, z (m).
        boxes: by class.
        sizes: sums of the boxes' sizes dx, dy, dz (m) by class.
        ignored: boxes with label -1.
        notes: what loading left out or repaired.
    """

    points: int
    sites: int
    extent: tuple[float, float, float]
    boxes: tuple[int, ...]
    sizes: tuple[tuple[float, float, float], ...]
    ignored: int
    notes: Mapping[str, int]


def summarise(scan: Scan, num_classes: int) -> ScanSummary:
    """Counts what a scan holds.

    Args:
        scan: with at least one point.
        num_classes: labels are below it.
    """
    kept = scan.labels >= 0
    labels = scan.labels[kept]
    sizes = np.zeros((num_classes, 3))
    np.add.at(sizes, labels, scan.boxes[kept, 3:6])
    return ScanSummary(
        points=len(scan.points),
        sites=_sites(scan.points),
        extent=tuple(float(length) for length in np.ptp(scan.points, axis=0)),  # type: ignore[arg-type]
        boxes=tuple(np.bincount(labels, minlength=num_classes).tolist()),
        sizes=tuple((float(dx), float(dy), float(dz)) for dx, dy, dz in sizes),
        ignored=int((~kept).sum()),
        notes=dict(scan.notes),
    )


def statistics(
    spec: DatasetSpec,
    splits: Mapping[str, Sequence[ScanSummary]],
    published: Mapping[str, int] | None = None,
    failed: Mapping[str, str] | None = None,
    notes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Statistics of a dataset as what JSON can hold.

    Args:
        spec: the dataset's classes.
        splits: summaries of the scans by split.
        published: scans by split that the dataset's authors state.
        failed: scans left out, with the reason.
        notes: what was left out before any scan was loaded.

    Returns:
        "version", "dataset", "splits" (by name: "scans", "published_scans" or null; "points", "sites_1cm",
        "boxes_per_scan" and "extent" x, y, z (m) with "min", "median" and "max" over scans; "boxes" and "mean_size"
        dx, dy, dz (m; null where there is no box) by class; "ignored_boxes"; "notes" summed over scans), "notes",
        "failed" and "warnings", sentences on what is not as expected.
    """
    result: dict[str, Any] = {"version": VERSION, "dataset": spec.name, "splits": {}}
    result |= {"notes": dict(notes or {}), "failed": dict(failed or {}), "warnings": []}
    for split, scans in splits.items():
        found = _split_statistics(spec, scans)
        expected = (published or {}).get(split)
        result["splits"][split] = {"scans": len(scans), "published_scans": expected, **found}
        if expected is None:
            continue
        if expected != len(scans):
            result["warnings"].append(f"{split} has {len(scans)} scans; published are {expected}.")
        missing = [name for name, count in found["boxes"].items() if not count]
        if missing:
            result["warnings"].append(f"{split} has no box of {', '.join(missing)}.")
    return result


def table(found: Mapping[str, Any]) -> str:
    """Statistics as lines of text."""
    splits = found["splits"]
    rows = [["", *splits], ["scans", *(_scans(one) for one in splits.values())]]
    for key, title in (("points", "points"), ("sites_1cm", "sites at 1 cm"), ("boxes_per_scan", "boxes in a scan")):
        rows.append([title, *(_spread(one[key], ",.0f") for one in splits.values())])
    rows += [
        [f"extent {axis} (m)", *(_spread(one["extent"][axis], ".1f") for one in splits.values())] for axis in "xyz"
    ]
    classes = next(iter(splits.values()))["boxes"]
    rows += [[name, *(_class(one, name) for one in splits.values())] for name in classes]
    rows.append(["ignored boxes", *(f"{one['ignored_boxes']:,}" for one in splits.values())])
    for note in sorted({note for one in splits.values() for note in one["notes"]}):
        rows.append([note, *(f"{one['notes'].get(note, 0):,}" for one in splits.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{note}: {count:,}" for note, count in found["notes"].items()]
    lines.append(
        "Points, sites, boxes and extents: min / median / max over scans. Classes: boxes, mean size dx dy dz (m)."
    )
    return "\n".join(lines + [f"Warning: {warning}" for warning in found["warnings"]])


def _split_statistics(spec: DatasetSpec, scans: Sequence[ScanSummary]) -> dict[str, Any]:
    boxes = np.array([scan.boxes for scan in scans]).reshape(-1, spec.num_classes).sum(0)
    sizes = np.array([scan.sizes for scan in scans]).reshape(-1, spec.num_classes, 3).sum(0)
    extents = np.array([scan.extent for scan in scans]).reshape(-1, 3)
    notes: Counter[str] = Counter()
    for scan in scans:
        notes.update(scan.notes)
    return {
        "points": _min_median_max([scan.points for scan in scans]),
        "sites_1cm": _min_median_max([scan.sites for scan in scans]),
        "boxes_per_scan": _min_median_max([sum(scan.boxes) for scan in scans]),
        "extent": {axis: _min_median_max(extents[:, i]) for i, axis in enumerate("xyz")},
        "boxes": dict(zip(spec.classes, boxes.tolist(), strict=True)),
        "mean_size": {
            name: (size / count).round(4).tolist() if count else None
            for name, size, count in zip(spec.classes, sizes, boxes, strict=True)
        },
        "ignored_boxes": sum(scan.ignored for scan in scans),
        "notes": dict(notes),
    }


def _min_median_max(values: Any) -> dict[str, float | None]:
    array = np.asarray(values, float)
    if not len(array):
        return {"min": None, "median": None, "max": None}
    return {
        "min": round(float(array.min()), 4),
        "median": round(float(np.median(array)), 4),
        "max": round(float(array.max()), 4),
    }


def _sites(points: Float32[np.ndarray, "m 3"]) -> int:
    cells = np.floor(points / _SITE_SIZE).astype(np.int64)
    cells -= cells.min(0)
    spans = cells.max(0) + 1
    return len(np.unique((cells[:, 0] * spans[1] + cells[:, 1]) * spans[2] + cells[:, 2]))


def _scans(split: Mapping[str, Any]) -> str:
    published = split["published_scans"]
    return f"{split['scans']:,}" if published is None else f"{split['scans']:,} of {published:,} published"


def _spread(values: Mapping[str, float | None], how: str) -> str:
    return " / ".join("-" if value is None else format(value, how) for value in values.values())


def _class(split: Mapping[str, Any], name: str) -> str:
    size = split["mean_size"][name]
    return f"{split['boxes'][name]:,}" + (f"  ({' '.join(f'{length:.2f}' for length in size)})" if size else "")


@dataclass(frozen=True)
class PrepareScan:
    """Makes sure that the cache holds a scan; callable in any process.

    Attributes:
        raw: where scans come from.
        cache: where they go to.
    """

    raw: RawDataset
    cache: ScanCache

    def __call__(self, name: str) -> tuple[ScanSummary, bool]:
        """Loads a scan and writes it to the cache, unless it is there and whole.

        Returns:
            What is counted of it, and whether it had to be made.

        Raises:
            ScanError: the scan cannot be used.
            OutputError: it cannot be written.
        """
        num_classes = self.raw.spec.num_classes
        with contextlib.suppress(DamagedScanError):
            return summarise(self.cache.read(name), num_classes), False
        scan = _within_reach(self.raw.load(name))
        problems = validate_scan(scan, num_classes)
        if problems:
            raise ScanError(name, " ".join(problems))
        self.cache.write(scan)
        return summarise(scan, num_classes), True


def _within_reach(scan: Scan) -> Scan:
    """The scan without points too far away to be voxelised, and without the boxes that they stretched.

    Raises:
        ScanError: they are many.
    """
    if not np.isfinite(scan.points).all():
        return scan  # which is refused
    near = within_reach(scan.name, scan.points)
    if near.all():
        return scan
    usable, left_out = usable_boxes(scan.boxes)
    return replace(
        scan,
        points=scan.points[near],
        colors=scan.colors[near],
        boxes=scan.boxes[usable],
        labels=scan.labels[usable],
        notes={**scan.notes, FAR_POINTS: int((~near).sum()), **left_out},
    )
