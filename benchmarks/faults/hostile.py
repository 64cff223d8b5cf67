"""Damaged and hostile files over all readers, read in processes of their own: part of `benchmarks.faults`.

    python -m benchmarks.faults.hostile     reads cases, a JSON list a line, and answers with a result a line

A file is at fault if its reader raises anything but one sentence, ends the process, does not come back, needs more than
`MOST_SECONDS`, or takes more than twice the bytes that the file states and `ALLOWANCE`.
"""

import contextlib
import gc
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.children import ROOT, Bench

MOST_SECONDS, ALLOWANCE = 10.0, 64 << 20
"""Longest time of the processor for a file, and memory (bytes) that any file may take beside twice what it states."""

_PATIENCE_S = 120  # a machine that is busy with others takes ten times as long


def hostile(bench: Bench) -> None:
    """Read all cases; one row of the table for each reader."""
    from benchmarks.faults.hostile_files import damaged_cases, samples
    from benchmarks.faults.hostile_made import made_cases

    folder = bench.folder / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    whole = samples(folder / "whole", bench.rng)
    intact: list[list[Any]] = [
        [sample.reader, f"{sample.file.name}: whole", str(sample.given), 1 << 40] for sample in whole
    ]
    cases: list[list[Any]] = [list(case) for case in damaged_cases(folder / "damaged", whole, bench.rng)]
    cases += [list(case) for case in made_cases(folder / "made", folder / "whole" / "pretrained")]
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with Reader() as reader:
        for case in intact:
            if (found := reader.read(case))["outcome"] != "read":
                bench.report.failed(f"a whole file is refused: {found['text']}", " ".join(case[:2]))
        for case in cases:
            found = reader.read(case)
            if found["wrong"]:
                bench.report.failed(f"{found['wrong']}: {found['text']}", f"{case[0]}: {case[1]} ({case[2]})")
            results[case[0]].append({**found, "what": case[1], "declared": case[3]})
    for name, of_reader in sorted(results.items()):
        _tell(bench, name, of_reader)
    count = sum(map(len, results.values()))
    bench.report.event(f"{count} damaged and hostile files of {len(results)} readers")
    if count < 500:
        bench.report.failed(f"there are {count} cases, 500 are wanted")
    shutil.rmtree(folder)


def _tell(bench: Bench, name: str, results: list[dict[str, Any]]) -> None:
    refused = [found for found in results if found["outcome"] == "sentence"]
    longest = max(results, key=lambda found: found["seconds"])
    most = max(results, key=lambda found: found["memory"] - 2 * found["declared"])
    text = (
        f"{len(refused)} end with a sentence, {sum(found['outcome'] == 'read' for found in results)} are read as "
        f"harmless; at most {longest['seconds']:.1f} s ({longest['what']}), {most['memory'] / 1e6:.0f} MB of "
        f"{most['declared'] / 1e6:.1f} MB ({most['what']})"
    )
    if refused:
        text += f"; as in: {max(refused, key=lambda found: len(found['text']))['text']}"
    if not any(found["wrong"] for found in results):
        bench.report.sentence(f"{len(results)} damaged or hostile files of {name}", text)


class Reader:
    """A process that reads; it is started again where a file ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read(self, case: list[Any]) -> dict[str, Any]:
        """Return "outcome" ("sentence", "read", "fault"), "text", "seconds", "memory" and "wrong", "" for nothing."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        try:
            answer = self._answers.get(timeout=_PATIENCE_S)
        except queue.Empty:
            answer = ""
        if not answer:
            gone = process.poll()
            self._end()
            text = f"no answer in {_PATIENCE_S} s" if gone is None else f"the process ended with status {gone}"
            return {
                "outcome": "fault",
                "text": text,
                "seconds": _PATIENCE_S,
                "memory": 0,
                "wrong": "the reader is gone",
            }
        found = json.loads(answer)
        return {**found, "wrong": _wrong(found, case[3])}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._answers = queue.Queue()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.faults.hostile"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
            threading.Thread(target=_pass_on, args=(self._process.stdout, self._answers), daemon=True).start()
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _pass_on(lines: Any, answers: "queue.Queue[str]") -> None:
    for line in lines:
        if line.startswith("{"):
            answers.put(line)
    answers.put("")


def _wrong(found: dict[str, Any], declared: int) -> str:
    if found["outcome"] == "fault":
        return "no sentence"
    if found["seconds"] > MOST_SECONDS:
        return f"it took {found['seconds']:.0f} s"
    if found["memory"] > 2 * declared + ALLOWANCE:
        return f"it took {found['memory'] / 1e6:.0f} MB for a file of {declared / 1e6:.1f} MB"
    if found["outcome"] == "sentence" and not (found["text"].isprintable() and 20 < len(found["text"]) <= 1000):
        return "it is no line of at most 1,000 letters"
    return ""


# --- the process that reads ------------------------------------------------------------------------------------------


def _read_raw(kind: str) -> Callable[[Path], None]:
    def read(root: Path) -> None:
        from h2a2_jax.scans.raw.arkitscenes import ArkitScenes
        from h2a2_jax.scans.raw.s3dis import S3dis
        from h2a2_jax.scans.raw.scannet import ScanNet
        from h2a2_jax.scans.raw.sunrgbd import SunRgbd

        dataset = {"scannet": ScanNet, "sunrgbd": SunRgbd, "s3dis": S3dis, "arkitscenes": ArkitScenes}[kind](root)
        for names in dataset.splits.values():
            for name in names:
                dataset.load(name)

    return read


def _read_mmdet3d(root: Path) -> None:
    from h2a2_jax.scans.mmdet3d import Mmdet3dFolder
    from h2a2_jax.scans.specs import SCANNET

    source = Mmdet3dFolder(root, "scannet_infos_train.pkl", SCANNET)
    for i in range(len(source)):
        source[i]


def _read_scan_folder(root: Path) -> None:
    from h2a2_jax.scans.scan_folder import ScanFolder
    from h2a2_jax.scans.specs import SUNRGBD

    source = ScanFolder(root, "train", SUNRGBD)
    for i in range(len(source)):
        source[i]


def _read_pickle(path: Path) -> None:
    from h2a2_jax.untrusted.restricted_pickle import load_plain_pickle

    found = load_plain_pickle(path)
    repr(found)
    with contextlib.suppress(ValueError):  # of numpy, on arrays of several numbers
        assert found is not None and found != 1


def _read_cache(folder: Path) -> None:
    from benchmarks.faults.hostile_files import SETTINGS
    from h2a2_jax.errors import InputError
    from h2a2_jax.prepare.scan_cache import DamagedScanError, ScanCache

    try:
        ScanCache(folder, SETTINGS).read("a")
    except DamagedScanError as error:  # the scan is prepared again
        raise InputError(error) from error


def _read_matches(path: Path) -> None:
    from h2a2_jax.errors import InputError
    from h2a2_jax.evaluation.matches import read_matches

    if not read_matches(path):
        raise InputError(f"{path} holds no matches that can be read.")


def _read_points(path: Path) -> None:
    from h2a2_jax.scans.formats.point_cloud import read_point_cloud

    cloud = read_point_cloud(path)
    assert all(len(remark) < 500 for remark in cloud.assumed)


def _read_pretrained(folder: Path) -> None:
    from h2a2_jax.pretrained.folder import read_pretrained

    read_pretrained(folder).build()


def _read_prepared(folder: Path) -> None:
    from h2a2_jax.scans.specs import SCANNET
    from h2a2_jax.scans.tfds_source import TfdsSource

    TfdsSource(folder, "train", SCANNET)


def _read_batch(path: Path) -> None:
    from h2a2_jax.training.nonfinite import read_batch

    read_batch(path)


def _read_torch(path: Path) -> None:
    from h2a2_jax.convert.torch_file import read_torch_file

    read_torch_file(path)


READERS: dict[str, Callable[[Path], None]] = {
    "points": _read_points,
    "pickle": _read_pickle,
    "mmdet3d": _read_mmdet3d,
    "scan folder": _read_scan_folder,
    "torch": _read_torch,
    "scan cache": _read_cache,
    "matches": _read_matches,
    "kept batch": _read_batch,
    "pretrained": _read_pretrained,
    "prepared": _read_prepared,
    **{kind: _read_raw(kind) for kind in ("scannet", "sunrgbd", "s3dis", "arkitscenes")},
}
"""Public entries of the readers by name; "points .ply" is "points" for files of that suffix."""


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


@contextlib.contextmanager
def _without_descriptors() -> Iterator[None]:
    """Leave no file descriptor to open another file with."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _result(case: list[Any]) -> dict[str, Any]:
    from h2a2_jax.errors import InputError
    from h2a2_jax.host import release_memory

    name, what, path, _ = case
    read = READERS[name.partition(" .")[0]]
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _memory("VmRSS"), time.process_time()
    outcome, text = "read", ""
    with _without_descriptors() if "descriptor" in what else contextlib.nullcontext():
        try:
            read(Path(path))
        except InputError as error:
            outcome, text = "sentence", str(error)
        except BaseException as error:
            outcome, text = "fault", f"{type(error).__name__}: {str(error)[:300]}"
    seconds = time.process_time() - started
    return {"outcome": outcome, "text": text, "seconds": seconds, "memory": max(_memory("VmHWM") - before, 0)}


def main() -> None:
    """Answer cases until the input ends."""
    import h2a2_jax.training.nonfinite  # noqa: F401  what loading takes is not the file's

    gc.collect()
    gc.freeze()  # what is loaded once is not looked through for each file
    for line in sys.stdin:
        print(json.dumps(_result(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
