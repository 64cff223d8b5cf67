"""Looks a folder of scans over before it is trained on: what it holds, what is odd, what must be mended.

    python run.py --mode=check --data=FOLDER [--dataset=scannet] [--output=runs/check/FOLDER]

The folder is one of a user's own scans (`scan_folder`), one prepared by mmdetection3d (`mmdet3d`), or one prepared by
`python -m data.<dataset>` (`tfds_source`). Every scan is read. What is found is printed, written as check.json (the
document of `CheckReport.document`) and drawn as contact_sheet.png.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tqdm import tqdm

from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.inputs.check_report import CheckReport, report_on
from h2a2_jax.inputs.examine import ScanFinding, examine, spread
from h2a2_jax.inputs.prepare.workers import in_processes
from h2a2_jax.inputs.recognise import CheckedFolder, Split, recognise
from h2a2_jax.inputs.scan import ScanError, ScanSource
from h2a2_jax.inputs.scan_folder import ScanFolder
from h2a2_jax.inputs.specs import dataset_spec

_FEW_SCANS = 8  # are read faster than processes start


def check(root: str | Path, dataset: str | None = None, output: str | Path | None = None) -> CheckReport:
    """Reads all scans of a folder, prints what it found, and writes check.json and contact_sheet.png.

    Args:
        root: the folder.
        dataset: "scannet", "sunrgbd" or "s3dis", whose classes count; None: by the files in the folder.
        output: folder for the two files; None for runs/check/<name of the folder>.

    Raises:
        InputError: there is no such folder, or it is none that is known, or `output` cannot be written.
    """
    output = Path("runs/check") / Path(root).resolve().name if output is None else Path(output)
    folder = recognise(Path(root), None if dataset is None else dataset_spec(dataset))
    print(f"{folder.root}: {folder.kind}, compared with the classes of {folder.spec.name}", flush=True)
    with _writing_to(output):  # before the scans are read, which may take long
        output.mkdir(parents=True, exist_ok=True)
    findings = list(tqdm(_findings(folder), total=sum(map(len, folder.sources.values())), unit="scan", disable=None))
    report = report_on(folder, findings)
    print(report)
    with _writing_to(output):
        (output / "check.json").write_text(json.dumps(report.document, indent=1) + "\n")
        usable = [(scan["split"], scan["name"]) for scan in report.document["scans"] if scan["error"] is None]
        if usable:
            from h2a2_jax.inputs.contact_sheet import draw_contact_sheet  # matplotlib takes a second

            draw_contact_sheet(folder.sources, usable, folder.spec, output / "contact_sheet.png")
    print(f"Written to {output / 'check.json'}" + (f", drawn in {output / 'contact_sheet.png'}" if usable else ""))
    return report


@contextlib.contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another folder, --output.") from error


@dataclass(frozen=True)
class _Examine:
    """The work on one scan, for another process; it is called by its split and number."""

    sources: Mapping[Split, ScanSource]

    def __call__(self, where: str) -> ScanFinding:
        split, number = where.split()
        source, index = self.sources[cast(Split, split)], int(number)
        cloud = None
        try:
            if isinstance(source, ScanFolder):
                cloud = source.read(index)
                return examine(split, source.convert(index, cloud), cloud)
            return examine(split, source[index])
        except ScanError as error:
            # A scan in another unit than is said may reach too far to be used, and still tells its unit.
            axes = spread(cloud.points) if cloud is not None and len(cloud.points) else ()
            return ScanFinding(split, source.names[index], str(error), axes=axes)


def _findings(folder: CheckedFolder) -> Iterator[ScanFinding]:
    """A finding for each scan, in no order."""
    work = _Examine(folder.sources)
    places = [f"{split} {i}" for split, source in folder.sources.items() for i in range(len(source))]
    if len(places) <= _FEW_SCANS:
        yield from map(work, places)
        return
    for outcome in in_processes(work, places, min(available_cores(), 16)):
        split, number = outcome.name.split()
        name = folder.sources[cast(Split, split)].names[int(number)]
        yield ScanFinding(split, name, outcome.failure) if outcome.failure else outcome.value
