"""Check a folder of scans before training: a report, a table and a contact sheet.

    python run.py --mode=check --data=FOLDER [--dataset=scannet] [--output=runs/check/FOLDER]

The folder holds a user's own scans (`scan_folder`), or was prepared by mmdetection3d (`mmdet3d`) or by
`python -m data.<dataset>` (`tfds_source`). Every scan is read. The findings are printed, written as check.json (the
document of `CheckReport`) and drawn as contact_sheet.png.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.prepare.worker_pool import run_in_processes
from h2a2_jax.scans.file_frame import guess_unit
from h2a2_jax.scans.findings import NEARLY_SAME, BoxFinding, ScanFinding, measure_scan
from h2a2_jax.scans.frame import MOVED, NO_COLORS, UNITS
from h2a2_jax.scans.orientation import Guess, guess_up
from h2a2_jax.scans.scan import UNUSABLE, some
from h2a2_jax.scans.scan_folder import BOXES_FILE, ScanFolder
from h2a2_jax.scans.sources import CheckedFolder, Split, recognise
from h2a2_jax.scans.specs import DatasetSpec, dataset_spec

_PROBLEMS = "mend"  # the key in check.json of version 1
_FEW_POINTS = 5
_FEW_SCANS = 8  # are read faster than processes start
_MOST_NAMED = 20  # scans without a point in any box, or without a box
_NUMBER = re.compile(r"(?<![a-z])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", re.IGNORECASE)
_SCALES = {"0", "1", "8", "12", "16", "255", "4095", "65535"}  # numbers that make one remark another

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
class CheckReport:
    """Findings of a folder.

    Attributes:
        document: content of check.json: "version", "folder", "kind", "dataset", "ready", "mend" (problems) and "hints"
            (both sentences), "up" and "unit" ("declared", "guess" or null, "certain", "evidence"), "splits" (by name:
            "scans", "unreadable", "boxes", "points" and "extent" (m, of all but the outermost .2 % of points) with
            "min", "median", "max", "colors" in the files, "network_colors" with "min", "mean", "max",
            "without_colors"), "classes" (by name: "boxes", "mean_size", "usual_size"), "notes" (a count by kind,
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
    measure = partial(measure_scan, folder.sources)
    places = [f"{split} {i}" for split, source in folder.sources.items() for i in range(len(source))]
    if len(places) <= _FEW_SCANS:
        yield from map(measure, places)
        return
    for outcome in run_in_processes(measure, places, min(available_cores(), 16)):
        split, number = outcome.name.split()
        name = folder.sources[cast(Split, split)].names[int(number)]
        yield ScanFinding(split, name, outcome.failure) if outcome.failure else outcome.value


def _document(folder: CheckedFolder, findings: Sequence[ScanFinding]) -> dict[str, Any]:
    """Draw conclusions from the findings of all scans, given in any order."""
    order = {(split, name): i for split, source in folder.sources.items() for i, name in enumerate(source.names)}
    findings = sorted(findings, key=lambda finding: (finding.split, order[cast(Split, finding.split), finding.name]))
    good = [finding for finding in findings if finding.error is None]
    bad = [finding for finding in findings if finding.error is not None]
    notes = sum((Counter(finding.notes) for finding in good), Counter[str]())
    up = guess_up(folder.up, [finding.up for finding in findings if finding.up is not None])
    unit = guess_unit(folder.unit, [finding.extent for finding in findings if finding.extent is not None])
    problems, hints = [*folder.problems], [*folder.hints]
    _judge_frame(folder, up, unit, problems, hints)
    hints += _other_frames(folder, findings, up, unit)
    if bad:  # which may be because of the unit
        problems.append(f"{len(bad)} of {len(findings)} scans cannot be used; the first: {bad[0].error}")
    _judge_boxes(folder, good, problems, hints)
    train, val = ({finding.name for finding in findings if finding.split == split} for split in ("train", "val"))
    if twice := sorted(train & val):
        hints.append(f"{len(twice)} scans are in train and in val ({some(twice)}): scores say nothing new.")
    if crowded := [finding.name for finding in good if finding.duplicates > 0.5]:
        hints.append(f"In {len(crowded)} scans more than half of the points are exact duplicates ({some(crowded)}).")
    hints += _remarks(good)
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
    extents = [finding.extent for finding in good if finding.extent is not None]
    colors = [finding.colors for finding in good if finding.colors is not None]
    scaled = [finding.network_colors for finding in good if finding.network_colors is not None]
    low, mean, high = zip(*scaled, strict=True) if scaled else ((), (), ())
    return {
        "scans": len(findings),
        "unreadable": len(findings) - len(good),
        "boxes": sum(len(finding.boxes) for finding in good),
        "points": _range([finding.points for finding in good]),
        "extent": {
            axis: _range([round(extent[i] * UNITS[folder.unit], 3) for extent in extents])
            for i, axis in enumerate("xyz")
        },
        "colors": [min(low for low, _ in colors), max(high for _, high in colors)] if colors else None,
        "network_colors": {"min": min(low), "mean": float(np.mean(mean)), "max": max(high)} if scaled else None,
        "without_colors": len(good) - len(scaled),
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


def _other_frames(folder: CheckedFolder, findings: Sequence[ScanFinding], up: Guess, unit: Guess) -> Iterator[str]:
    """Yield sentences on scans that clearly have another up axis, or unit, than their folder."""
    axes, units = dict[str, list[str]](), dict[str, list[str]]()
    for name, finding in {finding.name: finding for finding in findings}.items():
        if finding.up is not None and (axis := guess_up(folder.up, [finding.up])).guess:
            axes.setdefault(axis.guess, []).append(name)
        if finding.extent is not None and (scale := guess_unit(folder.unit, [finding.extent])).guess:
            units.setdefault(scale.guess, []).append(name)
    for overall, found, words in ((up, axes, "{} points up"), (unit, units, "they are in {}")):
        usual = overall.guess or overall.declared
        for value, names in found.items():
            if value != usual:
                yield (
                    f"{len(names)} of {len(findings)} scans look as if {words.format(value)}, and not {usual} "
                    f"({some(names, _MOST_NAMED)}): one folder has one frame and one unit."
                )


def _judge_boxes(folder: CheckedFolder, findings: Sequence[ScanFinding], problems: list[str], hints: list[str]) -> None:
    boxes = [box for finding in findings for box in finding.boxes]
    lost = sum((Counter(finding.notes) for finding in findings), Counter[str]())
    lost = Counter({kind: lost[kind] for kind in UNUSABLE if lost[kind]})
    if 2 * lost.total() > len(boxes) + lost.total():
        counts = ", ".join(f"{count} {kind}" for kind, count in lost.items())
        problems.append(
            f"{lost.total()} of {len(boxes) + lost.total()} boxes cannot be used ({counts}): give centres and full "
            "sizes in the unit of the scans."
        )
    if not boxes:
        if findings and not lost and f"no {BOXES_FILE}" not in " ".join(folder.problems):
            problems.append(f"No scan has a box of a class of {folder.spec.name}: there is nothing to learn.")
        return
    for split, source in folder.sources.items():
        if len(source) and not any(finding.boxes for finding in findings if finding.split == split):
            problems.append(f"No scan of the split {split} has a box of a class of {folder.spec.name}.")
    if few := [box for box in boxes if box.held < _FEW_POINTS]:
        outside, empty = sum(box.outside for box in few), sum(box.held == 0 and not box.outside for box in few)
        where = [*dict.fromkeys(f.name for f in findings if any(box.held < _FEW_POINTS for box in f.boxes))]
        sentence = (
            f"{len(few)} of {len(boxes)} boxes hold fewer than {_FEW_POINTS} points: {outside} lie outside the cloud, "
            f"{empty} inside it hold none ({some(where)})"
        )
        if 2 * len(few) > len(boxes):
            problems.append(f"{sentence}: boxes and points are not in the same frame or unit.")
        else:
            hints.append(f"{sentence}.")
    if bare := [*dict.fromkeys(f.name for f in findings if f.boxes and not any(box.held for box in f.boxes))]:
        hints.append(f"In {len(bare)} scans no box holds a point ({some(bare, _MOST_NAMED)}).")
    if without := [*dict.fromkeys(f.name for f in findings if not f.boxes)]:
        hints.append(
            f"{len(without)} scans have no box of a class of {folder.spec.name} ({some(without, _MOST_NAMED)})."
        )
    hints += _repeats(folder.spec, findings)
    turned = [box for box in boxes if box.turned]
    held, clockwise = sum(box.held for box in turned), sum(box.held_clockwise for box in turned)
    crossed = sum(box.held_crossed for box in turned)
    if len(turned) >= 3 and max(clockwise, crossed) > 1.2 * held:
        times = f"Turned boxes hold {max(clockwise, crossed) / max(held, 1):.1f} times as many points"
        problems.append(
            f"{times} if yaw counts clockwise: negate it."
            if clockwise > crossed
            else f"{times} if dx and dy change places: a yaw of 0 lays dx along x."
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


def _repeats(spec: DatasetSpec, findings: Sequence[ScanFinding]) -> Iterator[str]:
    """Yield sentences on boxes that are there more than once; a scan of both splits counts once."""
    findings = [*{finding.name: finding for finding in findings}.values()]
    if repeated := [(finding.name, box) for finding in findings for box in finding.repeated]:
        places = [
            f"{name}: {box.count} of {' and '.join(spec.classes[label] for label in box.labels)}"
            for name, box in sorted(repeated, key=lambda entry: -entry[1].count)
        ]
        yield (
            f"{sum(box.count for _, box in repeated)} boxes are the same as others of their scan "
            f"({some(places, 8)}): none is dropped in training; keep one of each."
        )
    if near := {finding.name: finding.nearly_repeated for finding in findings if finding.nearly_repeated}:
        yield (
            f"{sum(near.values())} boxes overlap another of their class nearly wholly, by an IoU above {NEARLY_SAME:g} "
            f"({some(list(near))}): keep one of each."
        )


def _blank(number: re.Match[str]) -> str:
    return number[0] if number[0] in _SCALES else "#"


def _remarks(findings: Sequence[ScanFinding]) -> Iterator[str]:
    """Yield what the files leave open: a sentence for each kind of remark, whatever names and numbers it holds."""
    kinds: dict[str, dict[str, str]] = {}
    for finding in findings:
        for remark in finding.assumed:
            name, words = (_NUMBER.sub(_blank, text) for text in (Path(finding.name).name, remark))
            kind = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "#", words)
            kinds.setdefault(kind, {}).setdefault(finding.name, remark)
    for remarks in kinds.values():
        (first, remark), *others = remarks.items()
        scans = "scan" if len(others) == 1 else "scans"
        alike = f"; likewise {len(others)} other {scans} ({some([name for name, _ in others])})" if others else ""
        yield f"{first}: {remark.rstrip('.')}{alike}."


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
        yield f"  colours  {_colors(found)}"
    for key in ("up", "unit"):
        found = document[key]
        seen = "not clear from the points" if found["guess"] is None else f"looks like {found['guess']}"
        yield f"{key}: {found['declared']}; {seen} ({found['evidence']})"
    yield f"{'class':16}{'boxes':>7}  {'mean size (m)':18}  usual size"
    for name, found in document["classes"].items():
        if found["boxes"]:
            yield f"{name:16}{found['boxes']:>7}  {_size(found['mean_size']):18}  {_size(found['usual_size'])}"
    if missing := [name for name, found in document["classes"].items() if not found["boxes"]]:
        yield f"no boxes of {', '.join(missing)}"
    for kind, count in document["notes"].items():
        if kind not in (MOVED, NO_COLORS):  # which are said elsewhere
            yield f"left out or repaired: {count} {kind}"
    for hint in document["hints"]:
        yield f"note: {hint}"
    yield "ready" if document["ready"] else "to fix:"
    for number, sentence in enumerate(document[_PROBLEMS], 1):
        yield f"  {number}. {sentence}"


def _spread(found: Mapping[str, int | float], form: str) -> str:
    return f"{found['min']:{form}} to {found['max']:{form}}, median {found['median']:{form}}"


def _colors(found: Mapping[str, Any]) -> str:
    """Describe the colours of a split: in its files, and as the network gets them."""
    colors, scaled, without = found["colors"], found["network_colors"], found["without_colors"]
    parts = [] if colors is None else [f"{colors[0]:g} to {colors[1]:g} in the files"]
    if scaled is not None:
        parts.append(f"{scaled['min']:.2f} to {scaled['max']:.2f}, mean {scaled['mean']:.2f}, for the network")
    if without:
        parts.append(f"{without} scans without, grey for the network")
    return "; ".join(parts)


def _size(size: Sequence[int | float] | None) -> str:
    return "" if size is None else " x ".join(f"{length:.2f}" for length in size)
