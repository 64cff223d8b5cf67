"""Output that nobody reads, terminals that close, workdirs that vanish: part of `benchmarks.faults`."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.faults.children import CONFIG, ROOT, STEPS, Bench, Fault, newest
from benchmarks.faults.compare import differences
from h2a2_jax.files import read_json_lines


def output(bench: Bench) -> None:
    """Train into closed, full and unread outputs; the result is that of the reference."""
    cases = {
        "| head -1": "{} | head -1",
        "standard output and error closed": "{} >&- 2>&-",
        "a full disk behind standard output and error": "{} > /dev/full 2> /dev/full",
    }
    for fault, form in cases.items():
        workdir = bench.rewound("output", 24)
        command = shlex.join([sys.executable, "run.py", CONFIG, f"--workdir={workdir}"])
        done = _shell(bench, f"set -o pipefail; {form.format(command)}")
        if done.returncode or "Traceback" in done.stderr:
            bench.report.failed(f"status {done.returncode}: {done.stderr[-300:]}", fault)
        else:
            bench.report.equal("the end", differences(bench.reference, workdir), fault)
    _other_commands(bench)
    _lost_terminal(bench)


def vanish(bench: Bench) -> None:
    """Remove, move and replace the workdir of a run in its steps."""

    def replace(workdir: Path, other: Path) -> None:
        workdir.rename(other)
        workdir.write_text("a file\n")

    def renew(workdir: Path, other: Path) -> None:
        workdir.rename(other)
        workdir.mkdir()

    def remove(workdir: Path, other: Path) -> None:
        workdir.rename(other)  # at once: a file that the run writes meanwhile would keep the folder
        shutil.rmtree(other)

    cases: dict[str, Callable[[Path, Path], object]] = {
        "workdir removed": remove,
        "workdir moved": lambda workdir, other: workdir.rename(other),
        "workdir replaced by a file": replace,
        "workdir replaced by an empty folder": renew,
    }
    for fault, vanishes in cases.items():
        other, workdir = bench.empty("elsewhere"), bench.rewound("vanishes", 16)
        child = bench.train(workdir)
        if not child.wait_for(partial(child.line_with, "First step done")):
            raise Fault(f"the training ended before {fault}")
        vanishes(workdir, other)
        line = child.expect(2, f"the workdir {workdir} was removed, moved, replaced or unmounted", "the same command")
        left = sorted(path.name for path in workdir.iterdir()) if workdir.is_dir() else []
        if left:
            bench.report.failed(f"the run made {', '.join(left)} anew", fault)
        else:
            bench.report.sentence(fault, line)
        if workdir.is_file():
            workdir.unlink()
        shutil.rmtree(workdir, ignore_errors=True)
        if other.is_dir():
            other.rename(workdir)
            bench.train(workdir).expect(0)
            found = differences(bench.reference, workdir, files=False)
            bench.report.equal("the end", found, f"{fault}, then put back")


def _shell(bench: Bench, command: str) -> "subprocess.CompletedProcess[str]":
    bench.report.started()
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=_environment(bench), capture_output=True, text=True, check=False
    )


def _environment(bench: Bench) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(bench.cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _other_commands(bench: Bench) -> None:
    """Commands end with status 1, with their results whole."""
    boxes = bench.empty("output_boxes")
    commands = {"predict": ["predict", "--sample", f"--output={boxes}"], "weights": ["weights"]}
    for name, arguments in commands.items():
        done = _shell(bench, f"{shlex.join([sys.executable, '-m', 'h2a2_jax', *arguments])} > /dev/full")
        if done.returncode != 1 or "Traceback" in done.stderr:
            bench.report.failed(f"status {done.returncode}: {done.stderr[-300:]}", f"h2a2 {name} > /dev/full")
        else:
            bench.report.survived(f"h2a2 {name} > /dev/full", "status 1, no traceback")
    if not list(boxes.glob("*.json")):
        bench.report.failed("h2a2 predict wrote no boxes")


def _lost_terminal(bench: Bench) -> None:
    """Close the terminal of a run: SIGHUP, and EIO on all that it prints."""
    fault, workdir = "a terminal that closes", bench.rewound("terminal", 16)
    main, terminal = os.openpty()
    bench.report.started()
    with subprocess.Popen(
        [sys.executable, "run.py", CONFIG, f"--workdir={workdir}", "--config.train.log_every=1"],
        cwd=ROOT,
        env=_environment(bench),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        text = b""
        with contextlib.suppress(OSError):
            while b"First step done" not in text:
                text += os.read(main, 1 << 16)
        os.close(main)
        process.send_signal(signal.SIGHUP)
        status = process.wait(120)
    saved, lines = newest(workdir), [line["step"] for line in read_json_lines(workdir / "metrics.jsonl", 1)]
    if status or not 16 < saved < STEPS or saved != max(lines):
        bench.report.failed(f"status {status}, step {saved} is saved, step {max(lines)} is logged", fault)
        return
    bench.train(workdir).expect(0, f"after step {saved}")
    bench.report.equal("the end", differences(bench.reference, workdir, files=False), f"{fault} (SIGHUP, EIO)")
