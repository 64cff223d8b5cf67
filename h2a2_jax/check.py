"""Check a folder of scans before training: a report, a table and a contact sheet.

    python run.py --mode=check --data=FOLDER [--dataset=scannet] [--output=runs/check/FOLDER]

The folder holds a user's own scans (`scan_folder`), or was prepared by mmdetection3d (`mmdet3d`) or by
`python -m data.<dataset>` (`tfds_source`). Every scan is read. The findings are printed, written as check.json (the
document of `CheckReport`) and drawn as contact_sheet.png.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.prepare.worker_pool import run_in_processes
from h2a2_jax.scans.frame import AXES, UNITS, AxisFinding, Guess, guess_unit, guess_up, spread
from h2a2_jax.scans.scan import ScanError, ScanSource, points_in_box, some
from h2a2_jax.scans.scan_folder import BOXES_FILE, ScanFolder
from h2a2_jax.scans.sources import CheckedFolder, Split, recognise
from h2a2_jax.scans.specs import DatasetSpec, dataset_spec

_PROBLEMS = "mend"  # the key in check.json of version 1
_FEW_POINTS = 5
_FEW_SCANS = 8  # are read faster than processes start

USUAL_SIZES: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "scannet": {
        "cabinet": (0.77, 0.81, 0.93), "door": (0.53, 0.60, 1.75), "window": (0.96, 0.72, 1.15),
        "picture": (0.21, 0.42, 0.54), "counter": (1.44, 1.90, 0.27), "curtain": (1.38, 0.66, 1.68),
        "refrigerator": (0.67, 0.71, 1.30), "showercurtrain": (0.42, 0.38, 1.75), "sink": (0.51, 0.51, 0.30),
        "bathtub": (1.15, 1.05, 0.50), "garbagebin": (0.48, 0.49, 0.58),
    },
    "sunrgbd": {
        "bed": (2.11, 1.62, 0.93), "table": (0.79, 1.28, 0.72), "sofa": (0.92, 1.87, 0.85),
        "chair": (0.59, 0.55, 0.83), "toilet": (0.70, 0.45, 0.76), "desk": (0.70, 1.35, 0.74),
        "dresser": (0.53, 1.00, 1.17), "night_stand": (0.50, 0.63, 0.68), "bookshelf": (0.40, 1.07, 1.69),
        "bathtub": (0.77, 1.40, 0.47),
    },
    "s3dis": {
        "chair": (0.6, 0.6, 0.8), "table": (1.5, 0.9, 0.75), "bookcase": (1.0, 0.4, 2.0), "board": (2.0, 0.1, 1.2),
        "sofa": (1.8, 0.9, 0.8),
    },
}  # fmt: skip
"""Mean sizes dx, dy, dz (m) of boxes in the built-in datasets, of the classes whose sizes are known."""


@dataclass(frozen=True)
class BoxFinding:
    """Measurements of one box.

    Attributes:
        size: dx, dy, dz (m).
        held: points in the box.
        held_clockwise: points the box would hold if yaw counted clockwise.
        held_from_bottom: points the box would hold if its centre were that of its bottom.
        turned: True if yaw makes a difference.
        outside: True if the box does not even meet the box around all points.
    """

    label: int
    size: tuple[float, float, float]
    held: int
    held_clockwise: int
    held_from_bottom: int
    turned: bool
    outside: bool


@dataclass(frozen=True)
class ScanFinding:
    """Measurements of one scan.

    Attributes:
        error: why the scan cannot be used; then the fields below have their defaults, but for `axes` of a file that
            can be read.
        axes: spread along x, y, z of the file, in its unit.
        colors: smallest and largest number, in the file's scale; None without colours.
        duplicates: share of points that are exactly where another one is.
        boxes: usable boxes of a class, in metres, z up.
        notes: counts by kind of what loading left out or repaired.
        assumed: sentences on what the file leaves open.
    """

    split: str
    name: str
    error: str | None = None
    points: int = 0
    axes: tuple[AxisFinding, ...] = ()
    colors: tuple[float, float] | None = None
    duplicates: float = 0.0
    boxes: tuple[BoxFinding, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """Findings of a folder.

    Attributes:
        document: content of check.json: "version", "folder", "kind", "dataset", "ready", "mend" (problems) and "hints"
            (both sentences), "up" and "unit" ("declared", "guess" or null, "certain", "evidence"), "splits" (by name:
            "scans", "unreadable", "boxes", "points" and "extent" (m, of all but the outermost .2 % of points) with
            "min", "median", "max"), "classes" (by name: "boxes", "mean_size", "usual_size"), "notes" (a count by kind,
            over all scans), "scans" (one entry each, as in `ScanFinding`).
    """

    document: Mapping[str, Any]

    @property
    def ready(self) -> bool:
        """True if the folder has no problem."""
        return bool(self.document["ready"])

    def __str__(self) -> str:
        """Return the report for people."""
        return "\n".join(_lines(self.document))


def check(root: str | Path, dataset: str | None = None, output: str | Path | None = None) -> CheckReport:
    """Read all scans of a folder, print the findings, and write check.json and contact_sheet.png.

    The classes that count are those of `dataset`, or (None) of the one that the files name. The two files go to the
    folder `output`, or (None) to runs/check/<name of the folder>.

    Raises:
        InputError: the folder is missing or of no known kind, or `output` cannot be written.
    """
    output = Path("runs/check") / Path(root).resolve().name if output is None else Path(output)
    folder = recognise(Path(root), None if dataset is None else dataset_spec(dataset))
    print(f"{folder.root}: {folder.kind}, compared with the classes of {folder.spec.name}", flush=True)
    with _writing_to(output):  # before the scans are read, which may take long
        output.mkdir(parents=True, exist_ok=True)
    findings = list(tqdm(_findings(folder), total=sum(map(len, folder.sources.values())), unit="scan", disable=None))
    report = CheckReport(_document(folder, findings))
    print(report)
    with _writing_to(output):
        (output / "check.json").write_text(json.dumps(report.document, indent=1) + "\n")
        if usable := [(scan["split"], scan["name"]) for scan in report.document["scans"] if scan["error"] is None]:
            from h2a2_jax.viewer.contact_sheet import draw_contact_sheet

            draw_contact_sheet(folder.sources, usable, folder.spec, output / "contact_sheet.png")
    print(f"Written to {output / 'check.json'}" + (f", drawn in {output / 'contact_sheet.png'}" if usable else ""))
    return report


@contextlib.contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another folder, --output.") from error


def _findings(folder: CheckedFolder) -> Iterator[ScanFinding]:
    """Yield a finding for each scan, in no order."""
    measure = partial(_measure, folder.sources)
    places = [f"{split} {i}" for split, source in folder.sources.items() for i in range(len(source))]
    if len(places) <= _FEW_SCANS:
        yield from map(measure, places)
        return
    for outcome in run_in_processes(measure, places, min(available_cores(), 16)):
        split, number = outcome.name.split()
        name = folder.sources[cast(Split, split)].names[int(number)]
        yield ScanFinding(split, name, outcome.failure) if outcome.failure else outcome.value


def _measure(sources: Mapping[Split, ScanSource], place: str) -> ScanFinding:
    """Measure one scan, named by its split and number; this may run in another process."""
    split, number = place.split()
    source, index, cloud = sources[cast(Split, split)], int(number), None
    try:
        if isinstance(source, ScanFolder):  # whose files have a frame of their own
            cloud = source.read(index)
            scan = source.convert(index, cloud)
        else:
            scan = source[index]
    except ScanError as error:
        # A scan in another unit than declared may reach too far to be used, and its spread still shows its unit.
        axes = spread(cloud.points) if cloud is not None and len(cloud.points) else ()
        return ScanFinding(split, source.names[index], str(error), axes=axes)
    points, colors = (scan.points, scan.colors) if cloud is None else (cloud.points, cloud.colors)
    bits = np.ascontiguousarray(scan.points, np.float32).view(np.uint32).astype(np.uint64)
    mixed = bits @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
    return ScanFinding(
        split,
        scan.name,
        points=len(scan.points),
        axes=spread(points),
        colors=None if colors is None or not len(colors) else (float(colors.min()), float(colors.max())),
        duplicates=1 - len(np.unique(mixed)) / len(scan.points),
        boxes=tuple(
            _box(scan.points, box, int(label)) for box, label in zip(scan.boxes, scan.labels, strict=True) if label >= 0
        ),
        notes=dict(scan.notes),
        assumed=() if cloud is None else cloud.assumed,
    )


def _box(points: np.ndarray, box: np.ndarray, label: int) -> BoxFinding:
    # Points in the box are counted among those nearby: boxes are small, scans are not.
    near = points[(np.abs(points - box[:3]) <= 1.5 * np.linalg.norm(box[3:6])).all(axis=1)]
    clockwise, raised = box.copy(), box.copy()
    clockwise[6] *= -1
    raised[2] += box[5] / 2
    dx, dy, dz = (float(size) for size in box[3:6])
    cos, sin = np.abs(np.cos(box[6])), np.abs(np.sin(box[6]))
    half = np.array([dx * cos + dy * sin, dx * sin + dy * cos, dz]) / 2
    outside = (box[:3] + half < points.min(axis=0)).any() or (box[:3] - half > points.max(axis=0)).any()
    held, held_clockwise, held_from_bottom = (int(points_in_box(near, b).sum()) for b in (box, clockwise, raised))
    turned = bool(cos * sin > 0.1)
    return BoxFinding(label, (dx, dy, dz), held, held_clockwise, held_from_bottom, turned, bool(outside))


def _document(folder: CheckedFolder, findings: Sequence[ScanFinding]) -> dict[str, Any]:
    """Draw conclusions from the findings of all scans, given in any order."""
    order = {(split, name): i for split, source in folder.sources.items() for i, name in enumerate(source.names)}
    findings = sorted(findings, key=lambda finding: (finding.split, order[cast(Split, finding.split), finding.name]))
    good = [finding for finding in findings if finding.error is None]
    bad = [finding for finding in findings if finding.error is not None]
    notes = sum((Counter(finding.notes) for finding in good), Counter[str]())
    measured = [finding.axes for finding in findings if finding.axes]
    up, unit = guess_up(folder.up, measured), guess_unit(folder.unit, measured)
    problems, hints = [*folder.problems], [*folder.hints]
    _judge_frame(folder, up, unit, problems, hints)
    if bad:  # which may be because of the unit
        problems.append(f"{len(bad)} of {len(findings)} scans cannot be used; the first: {bad[0].error}")
    _judge_boxes(folder, good, problems, hints)
    train, val = ({finding.name for finding in findings if finding.split == split} for split in ("train", "val"))
    if twice := sorted(train & val):
        hints.append(f"{len(twice)} scans are in train and in val ({some(twice)}): scores say nothing new.")
    if crowded := [finding.name for finding in good if finding.duplicates > 0.5]:
        hints.append(f"In {len(crowded)} scans more than half of the points are exact duplicates ({some(crowded)}).")
    hints += dict.fromkeys(sentence for finding in good[:3] for sentence in finding.assumed)
    return {
        "version": 1,
        "folder": str(folder.root),
        "kind": folder.kind,
        "dataset": folder.spec.name,
        "ready": not problems,
        _PROBLEMS: problems,
        "hints": hints,
        "up": asdict(up),
        "unit": asdict(unit),
        "splits": {split: _split(folder, [f for f in findings if f.split == split]) for split in folder.sources},
        "classes": _classes(folder.spec, [box for finding in good for box in finding.boxes]),
        "notes": dict(notes.most_common()),
        "scans": [asdict(finding) for finding in findings],
    }


def _split(folder: CheckedFolder, findings: Sequence[ScanFinding]) -> dict[str, Any]:
    good = [finding for finding in findings if finding.error is None]
    metres = UNITS[folder.unit]
    colors = [finding.colors for finding in good if finding.colors is not None]
    return {
        "scans": len(findings),
        "unreadable": len(findings) - len(good),
        "boxes": sum(len(finding.boxes) for finding in good),
        "points": _range([finding.points for finding in good]),
        "extent": {
            axis: _range([round(finding.axes[i].extent * metres, 3) for finding in good]) for i, axis in enumerate(AXES)
        },
        "colors": [min(low for low, _ in colors), max(high for _, high in colors)] if colors else None,
        "without_colors": len(good) - len(colors),
    }


def _range(values: Sequence[int | float]) -> dict[str, int | float] | None:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)} if values else None


def _classes(spec: DatasetSpec, boxes: Sequence[BoxFinding]) -> dict[str, Any]:
    found = {}
    for label, name in enumerate(spec.classes):
        sizes = [box.size for box in boxes if box.label == label]
        usual = USUAL_SIZES.get(spec.name, {}).get(name)
        found[name] = {
            "boxes": len(sizes),
            "mean_size": np.mean(sizes, axis=0).round(3).tolist() if sizes else None,
            "usual_size": None if usual is None else list(usual),
        }
    return found


def _judge_frame(folder: CheckedFolder, up: Guess, unit: Guess, problems: list[str], hints: list[str]) -> None:
    for key, what, found in (("up", "The up axis", up), ("unit", "The unit", unit)):
        if not found.differs:
            continue
        remedy = (
            f'set "{key}": "{found.guess}" in {BOXES_FILE}'
            if any(isinstance(source, ScanFolder) for source in folder.sources.values())
            else f"prepare the folder again with {'z up' if key == 'up' else 'metres'}"
        )
        sentence = f"{what} looks like {found.guess}, not {found.declared} ({found.evidence})"
        if found.certain:
            problems.append(f"{sentence}: {remedy}.")
        else:
            hints.append(f"{sentence}; if it is, {remedy}.")


def _judge_boxes(folder: CheckedFolder, findings: Sequence[ScanFinding], problems: list[str], hints: list[str]) -> None:
    boxes = [box for finding in findings for box in finding.boxes]
    if not boxes:
        if findings and f"no {BOXES_FILE}" not in " ".join(folder.problems):
            problems.append(f"No scan has a box of a class of {folder.spec.name}: there is nothing to learn.")
        return
    for split, source in folder.sources.items():
        if len(source) and not any(finding.boxes for finding in findings if finding.split == split):
            problems.append(f"No scan of the split {split} has a box of a class of {folder.spec.name}.")
    if few := [box for box in boxes if box.held < _FEW_POINTS]:
        outside, empty = sum(box.outside for box in few), sum(box.held == 0 and not box.outside for box in few)
        where = [f.name for f in findings if any(box.held < _FEW_POINTS for box in f.boxes)]
        sentence = (
            f"{len(few)} of {len(boxes)} boxes hold fewer than {_FEW_POINTS} points: {outside} lie outside the cloud, "
            f"{empty} inside it hold none ({some(where)})"
        )
        if 2 * len(few) > len(boxes):
            problems.append(f"{sentence}: boxes and points are not in the same frame or unit.")
        else:
            hints.append(f"{sentence}.")
    turned = [box for box in boxes if box.turned]
    held, clockwise = sum(box.held for box in turned), sum(box.held_clockwise for box in turned)
    if len(turned) >= 3 and clockwise > 1.2 * held:
        problems.append(
            f"Turned boxes hold {clockwise / max(held, 1):.1f} times as many points if yaw counts clockwise: negate it."
        )
    held, raised = sum(box.held for box in boxes), sum(box.held_from_bottom for box in boxes)
    if len(boxes) >= 3 and raised > 1.3 * held:
        problems.append(
            f"Boxes hold {raised / max(held, 1):.1f} times as many points if their centres are those of their bottoms: "
            "give the centre of the whole box."
        )
    usual = USUAL_SIZES.get(folder.spec.name, {})
    ratios = [
        (np.prod(box.size) / np.prod(usual[name])) ** (1 / 3)
        for box in boxes
        if (name := folder.spec.classes[box.label]) in usual
    ]
    ratio = float(np.median(ratios)) if len(ratios) >= 3 else 1.0
    if not 0.6 < ratio < 1.7:
        half = ", as half sizes would be: give full ones" if 0.4 < ratio <= 0.6 else ": check sizes and unit"
        hints.append(f"Boxes are {ratio:.2g} times as large as is usual for their classes{half}.")


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    for split, found in document["splits"].items():
        yield f"{split}: {found['scans']} scans, {found['boxes']} boxes" + (
            f", {found['unreadable']} scans unreadable" if found["unreadable"] else ""
        )
        if found["points"] is None:
            continue
        yield f"  points   {_spread(found['points'], ',.0f')}"
        for axis, extent in found["extent"].items():
            yield f"  extent {axis} {_spread(extent, '.2f')} m"
        colors = found["colors"]
        without = f", {found['without_colors']} scans without" if found["without_colors"] else ""
        yield f"  colours  {'none' if colors is None else f'{colors[0]:g} to {colors[1]:g}'}{without}"
    for key in ("up", "unit"):
        found = document[key]
        yield f"{key}: {found['declared']}; looks like {found['guess'] or 'nothing certain'} ({found['evidence']})"
    yield f"{'class':16}{'boxes':>7}  {'mean size (m)':18}  usual size"
    for name, found in document["classes"].items():
        if found["boxes"]:
            yield f"{name:16}{found['boxes']:>7}  {_size(found['mean_size']):18}  {_size(found['usual_size'])}"
    if missing := [name for name, found in document["classes"].items() if not found["boxes"]]:
        yield f"no boxes of {', '.join(missing)}"
    for kind, count in document["notes"].items():
        yield f"left out or repaired: {count} {kind}"
    for hint in document["hints"]:
        yield f"note: {hint}"
    yield "ready" if document["ready"] else "to fix:"
    for number, sentence in enumerate(document[_PROBLEMS], 1):
        yield f"  {number}. {sentence}"


def _spread(found: Mapping[str, int | float], form: str) -> str:
    return f"{found['min']:{form}} to {found['max']:{form}}, median {found['median']:{form}}"


def _size(size: Sequence[int | float] | None) -> str:
    return "" if size is None else " x ".join(f"{length:.2f}" for length in size)
