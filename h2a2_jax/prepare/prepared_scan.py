"""Preparation of one scan, and the statistics of a prepared dataset.

Worker processes import this module, but not `prepare`, which imports TFDS: that takes them seconds.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from h2a2_jax.prepare.scan_cache import DamagedScanError, ScanCache
from h2a2_jax.scans.raw import RawDataset
from h2a2_jax.scans.scan import FAR_POINTS, Scan, ScanError, usable_boxes, validate_scan, within_reach
from h2a2_jax.scans.specs import DatasetSpec, dataset_spec
from h2a2_jax.scans.synthetic.rooms import Scale
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

VERSION = 1
"""Version of the schema of `statistics`."""

_SITE_SIZE = 0.01  # m, the finest voxels that indoor detectors use


@dataclass(frozen=True)
class ScanSummary:
    """Counts of one scan."""

    points: int
    sites: int  # voxels of 1 cm that hold a point
    extent: tuple[float, float, float]  # of the points along x, y, z (m)
    boxes: tuple[int, ...]  # by class
    sizes: tuple[tuple[float, float, float], ...]  # sums of the boxes' sizes dx, dy, dz (m) by class
    ignored: int  # boxes with label -1
    notes: Mapping[str, int]  # counts of what loading left out or repaired


def summarise(scan: Scan, num_classes: int) -> ScanSummary:
    """Count the points, sites and boxes of a scan of at least one point."""
    voxels = np.floor(scan.points / _SITE_SIZE).astype(np.int64)
    voxels -= voxels.min(0)
    spans = voxels.max(0) + 1
    kept = scan.labels >= 0
    labels = scan.labels[kept]
    sizes = np.zeros((num_classes, 3))
    np.add.at(sizes, labels, scan.boxes[kept, 3:6])
    return ScanSummary(
        points=len(scan.points),
        sites=len(np.unique((voxels[:, 0] * spans[1] + voxels[:, 1]) * spans[2] + voxels[:, 2])),
        extent=tuple(np.ptp(scan.points, axis=0).tolist()),
        boxes=tuple(np.bincount(labels, minlength=num_classes).tolist()),
        sizes=tuple(map(tuple, sizes.tolist())),  # type: ignore[arg-type]
        ignored=int((~kept).sum()),
        notes=dict(scan.notes),
    )


class SyntheticRaw:
    """Procedural scans of one dataset as a `RawDataset`, generated when they are loaded.

    Args:
        name: name of a built-in dataset.
        sizes: number of scans by split.
        seed: another seed gives other scans.
        scale: "full" for rooms of the size of the real ones, "demo" for small ones, "varied" for homes of mixed use.

    Raises:
        InputError: there are no scans of this name, size, seed or scale.
    """

    def __init__(self, name: str, sizes: Mapping[str, int], seed: int, scale: Scale):
        self.spec = dataset_spec(name)
        self._sources = {
            split: SyntheticSource(self.spec, split, size, seed=seed, scale=scale)  # type: ignore[arg-type]
            for split, size in sizes.items()
        }
        self.splits = {split: tuple(source.names) for split, source in self._sources.items()}
        self.notes: Mapping[str, int] = {}

    def load(self, name: str) -> Scan:
        """Generate a scan by its name; the same name always gives the same scan."""
        _, split, index = name.rsplit("/", 2)
        return self._sources[split][int(index)]


@dataclass(frozen=True)
class PrepareScan:
    """Put a scan into the cache unless it is there; callable in any process."""

    raw: RawDataset
    cache: ScanCache

    def __call__(self, name: str) -> tuple[ScanSummary, bool]:
        """Return the summary of a scan, and True if it had to be loaded."""
        num_classes = self.raw.spec.num_classes
        with contextlib.suppress(DamagedScanError):
            return summarise(self.cache.read(name), num_classes), False
        scan = self.raw.load(name)
        if np.isfinite(scan.points).all():  # validate_scan refuses the others
            scan = _drop_far_points(scan)
        if problems := validate_scan(scan, num_classes):
            raise ScanError(name, " ".join(problems))
        self.cache.write(scan)
        return summarise(scan, num_classes), True


def _drop_far_points(scan: Scan) -> Scan:
    """Drop points, up to 1 %, that lie too far away to be voxelised, and the boxes that they stretched."""
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


def statistics(
    spec: DatasetSpec,
    splits: Mapping[str, Sequence[ScanSummary]],
    published: Mapping[str, int] | None = None,
    failed: Mapping[str, str] | None = None,
    notes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Statistics of a dataset as JSON values.

    "version", "dataset", "splits" (by name: "scans", "published_scans" or null; "points", "sites_1cm", "boxes_per_scan"
    and "extent" x, y, z (m) with "min", "median" and "max" over scans; "boxes" and "mean_size" dx, dy, dz (m; null
    where there is no box) by class; "ignored_boxes"; "notes" summed over scans), "notes" of what was left out before
    any scan was loaded, "failed" and "warnings", sentences on what is not as expected.
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
    array, names = np.asarray(values, float), ("min", "median", "max")
    if not len(array):
        return dict.fromkeys(names)
    found = (array.min(), np.median(array), array.max())
    return {name: round(float(value), 4) for name, value in zip(names, found, strict=True)}


def table(found: Mapping[str, Any]) -> str:
    """Statistics as lines of text."""
    splits = list(found["splits"].values())
    rows = [["", *found["splits"]], ["scans", *map(_format_scans, splits)]]
    for key, title in (("points", "points"), ("sites_1cm", "sites at 1 cm"), ("boxes_per_scan", "boxes in a scan")):
        rows.append([title, *(_format_spread(split[key], ",.0f") for split in splits)])
    rows += [[f"extent {xyz} (m)", *(_format_spread(s["extent"][xyz], ".1f") for s in splits)] for xyz in "xyz"]
    rows += [[name, *(_format_class(split, name) for split in splits)] for name in splits[0]["boxes"]]
    rows.append(["ignored boxes", *(f"{split['ignored_boxes']:,}" for split in splits)])
    for note in sorted({note for split in splits for note in split["notes"]}):
        rows.append([note, *(f"{split['notes'].get(note, 0):,}" for split in splits)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{note}: {count:,}" for note, count in found["notes"].items()]
    lines.append(
        "Points, sites, boxes and extents: min / median / max over scans. Classes: boxes, mean size dx dy dz (m)."
    )
    return "\n".join(lines + [f"Warning: {warning}" for warning in found["warnings"]])


def _format_scans(split: Mapping[str, Any]) -> str:
    published = split["published_scans"]
    return f"{split['scans']:,}" if published is None else f"{split['scans']:,} of {published:,} published"


def _format_spread(values: Mapping[str, float | None], form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in values.values())


def _format_class(split: Mapping[str, Any], name: str) -> str:
    size = split["mean_size"][name]
    return f"{split['boxes'][name]:,}" + (f"  ({' '.join(f'{length:.2f}' for length in size)})" if size else "")
