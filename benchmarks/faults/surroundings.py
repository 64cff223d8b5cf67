"""Unusual surroundings of a training: part of `benchmarks.faults`."""

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.children import CONFIG, ROOT, Bench, Child
from benchmarks.faults.compare import differences

_FROM = 32
"""Step that the trainings resume from."""
_WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
"""Starts a program of root for which permissions of files count."""
_JUMPS = """
import runpy, sys, time
now, jumps = time.time, (0.0, 86400.0, -3600.0)
time.time = lambda: now() + jumps[int(time.monotonic() / 2) % 3]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""`run.py` under a clock that jumps every other second: to tomorrow, to an hour ago, back to now."""


def surroundings(bench: Bench) -> None:
    """Resume a training in unusual surroundings; its end is that of a training without a fault."""
    unwritable = bench.empty("unwritable")
    unwritable.mkdir(parents=True)
    unwritable.chmod(0o500)
    cases: dict[str, dict[str, Any]] = {
        "no HOME": {"changed": {"HOME": None, "XDG_CACHE_HOME": None}},
        "HOME is missing": {"changed": {"HOME": str(bench.folder / "nobody"), "XDG_CACHE_HOME": None}},
        "HOME cannot be written to": {
            "changed": {"HOME": str(unwritable), "XDG_CACHE_HOME": None, "H2A2_CACHE": None},
            "prefix": _WITHOUT_RIGHTS,
        },
        "TMPDIR is missing": {"changed": {"TMPDIR": str(bench.folder / "nowhere")}},
        "TMPDIR cannot be written to": {"changed": {"TMPDIR": str(unwritable)}, "prefix": _WITHOUT_RIGHTS},
        "umask 077": {"prefix": _shell("umask 077")},
        "64 open files": {"prefix": _shell("ulimit -S -n 64")},
        "no LANG, ASCII output": {"changed": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}},
        "the clock jumps": {"program": ["-c", _JUMPS, "run.py"]},
    }
    for fault, how in cases.items():
        _resume(bench, fault, bench.rewound("surroundings", _FROM), **how)
    _resume(bench, "a path with spaces and a quote", bench.rewound("a 'workdir' of  mine", _FROM))
    _ended(bench, "a path not in UTF-8", bench.train(bench.rewound("not\udcffutf8", _FROM)))
    for fault, limit in (("10 open files", "-n 10"), ("files of 40 kB", "-f 40"), ("memory of 1.5 GB", "-v 1500000")):
        workdir = bench.rewound("surroundings", _FROM)
        _ended(bench, fault, bench.train(workdir, prefix=_shell(f"ulimit {limit}")))
        _resume(bench, f"{fault}, and then no limit", workdir)
    _linked(bench)
    _two_side_by_side(bench)
    _read_only_checkout(bench)


def _shell(command: str) -> tuple[str, ...]:
    return ("sh", "-c", f'{command}; exec "$@"', "sh")


def _resume(
    bench: Bench,
    fault: str,
    workdir: Path,
    *,
    changed: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
    program: Sequence[str] = ("run.py",),
) -> None:
    command = [*program, CONFIG, f"--workdir={workdir}"]
    _check_end(bench, fault, bench.start(command, changed=changed or {}, prefix=prefix), workdir)


def _check_end(bench: Bench, fault: str, child: Child, workdir: Path, *, files: bool = True) -> None:
    """Expect the end of the training without a fault; `files` is of `differences`."""
    with bench.report.attempt(fault):
        child.expect(0, f"after step {_FROM} of")
        bench.report.equal("the end", differences(bench.reference, workdir, files=files), fault)


def _ended(bench: Bench, fault: str, child: Child) -> None:
    """Expect a program to end with one sentence."""
    with bench.report.attempt(fault):
        bench.report.sentence(fault, child.expect(2, "run.py: "))


def _linked(bench: Bench) -> None:
    """A workdir that is a symbolic link, with checkpoints that are another one."""
    there, elsewhere = bench.rewound("linked_there", _FROM), bench.empty("linked_elsewhere")
    workdir = bench.folder / "link"
    (there / "checkpoints").rename(elsewhere)
    (there / "checkpoints").symlink_to(elsewhere)
    workdir.unlink(missing_ok=True)
    workdir.symlink_to(there)
    fault = "workdir and checkpoints are symbolic links"
    _check_end(bench, fault, bench.train(workdir), there, files=False)


def _two_side_by_side(bench: Bench) -> None:
    """Two trainings at once in folders of their own, which share the cache of compiled programs."""
    workdirs = [bench.rewound(f"beside{number}", _FROM) for number in range(2)]
    children = [bench.train(workdir) for workdir in workdirs]
    for number, (child, workdir) in enumerate(zip(children, workdirs, strict=True), 1):
        _check_end(bench, f"two trainings at once, number {number}", child, workdir)


def _read_only_checkout(bench: Bench) -> None:
    """The checkout cannot be written to, and the command is given from another folder."""
    place, workdir = bench.empty("checkout"), bench.rewound("surroundings", _FROM)
    place.mkdir(parents=True)
    mounted = [subprocess.run(["mount", *how], check=False, capture_output=True).returncode for how in (
        ("--bind", str(ROOT), str(place)), ("-o", "remount,bind,ro", str(place)))]  # fmt: skip
    if any(mounted):
        bench.report.event("a read-only checkout: skipped, because nothing can be mounted here")
        return
    try:
        flags = [f"--config={place}/configs/joint.py:tiny", f"--workdir={workdir}"]
        child = bench.start([str(place / "run.py"), *flags], changed={"PYTHONPATH": str(place)})
        _check_end(bench, "the checkout is read-only", child, workdir)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def occupied(bench: Bench) -> None:
    """Something else lies where a training writes: a folder in place of a file, a file in place of a folder."""
    names = ("metrics.jsonl", "selection.jsonl", "config.json", "evaluation.json", "summary.md", "lock")
    places: dict[str, Callable[[Path], Any]] = {f"{name} is a folder": _folder(name) for name in names}
    places |= {f"{name} is a file": _file(name) for name in ("checkpoints", "evaluations", "tensorboard", "nonfinite")}
    for fault, occupy in places.items():
        workdir = bench.rewound("occupied", _FROM)
        occupy(workdir)
        child = bench.train(workdir)
        with bench.report.attempt(fault):
            status = child.end()
            if status == 0 and not any("Traceback" in line for line in child.lines):
                found = [name for name in differences(bench.reference, workdir) if fault.split()[0] not in name]
                bench.report.equal("the rest", found, fault)
            else:
                bench.report.sentence(fault, child.expect(2, "run.py: "))


def _folder(name: str) -> Callable[[Path], Any]:
    def occupy(workdir: Path) -> None:
        (workdir / name).unlink(missing_ok=True)
        (workdir / name / "something").mkdir(parents=True)

    return occupy


def _file(name: str) -> Callable[[Path], Any]:
    def occupy(workdir: Path) -> None:
        shutil.rmtree(workdir / name, ignore_errors=True)
        (workdir / name).write_text("something else")

    return occupy
