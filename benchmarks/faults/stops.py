"""Signals, a second run, another config, lost workers: part of `benchmarks.faults`."""

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.faults.children import Bench, Child, Fault, newest
from benchmarks.faults.compare import differences, state_differences
from benchmarks.input_kills import descendants

_LATEST_S = 12
_COMPILING_S = 10


def sigterm(bench: Bench) -> None:
    """Send signals at start-up, in steps and in an evaluation; then resume to the end."""
    report, early_workdir = bench.report, bench.empty("stopped_early")
    for number in (1, 2):
        child, seconds = bench.train(early_workdir), bench.rng.uniform(0.5, _LATEST_S)
        child.wait(seconds)
        status = child.signal(signal.SIGTERM)
        printed = child.lines[-1] if child.lines else "nothing"
        early = (
            status == -signal.SIGTERM and child.line_with("Training on") is None and child.line_with("Stopped") is None
        )
        if not early and (status != 0 or "Stopped by SIGTERM" not in printed):
            report.failed(f"SIGTERM {seconds:.1f} s after the start: status {status}, it printed: {printed}")
        report.event(f"SIGTERM {number}, {seconds:.1f} s after the start: status {status}, {printed!r}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        workdir = bench.rewound(f"stopped_{number.name}", 16)
        for when, condition in (("a step", _stepping), ("a step", _stepping), ("an evaluation", _evaluating)):
            _stop(bench, workdir, number, when, condition)
        if number == signal.SIGINT:
            _stop(bench, workdir, number, "a step", _stepping, times=2)
        bench.train(workdir).expect(0)
        fault = f"{number.name} in steps and an evaluation{', and twice at once' * (number == signal.SIGINT)}"
        report.equal("the end", differences(bench.reference, workdir, files=False), fault)


def compiling(bench: Bench) -> None:
    """Send SIGTERM and SIGHUP while the first step compiles; the process ends within ten seconds."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        workdir, fault = bench.empty("compiling"), f"{number.name} while the first step compiles"
        child = bench.train(workdir, "--config.train.compilation_cache=false", own_cache=True)
        if not child.wait_for(partial(child.line_with, "Training on")) or not child.wait(bench.rng.uniform(2, 8)):
            raise Fault(f"the training ended before {fault}")
        began = time.monotonic()
        child.process.send_signal(number)
        line = child.expect(0, f"Stopped by {number.name}; nothing was saved before")
        seconds = time.monotonic() - began
        if seconds > _COMPILING_S:
            bench.report.failed(f"took {seconds:.0f} s", fault)
        else:
            bench.report.sentence(fault, f"{line} (after {seconds:.1f} s)")


def _stepping(child: Child) -> Callable[[], object]:
    return lambda: child.line_with("First step done")


def _evaluating(child: Child) -> Callable[[], object]:
    return lambda: child.line_with("Evaluating step")


def _stop(
    bench: Bench,
    workdir: Path,
    number: signal.Signals,
    when: str,
    condition: Callable[[Child], Callable[[], object]],
    times: int = 1,
) -> None:
    """Send a signal during steps or an evaluation, once or several times."""
    child = bench.train(workdir)
    if not child.wait_for(condition(child)) or not child.wait(bench.rng.uniform(0, 1.5)):
        raise Fault(f"the training ended before {number.name} in {when}")
    for _ in range(times):
        child.process.send_signal(number)
        child.wait(0.05)  # signals that are pending at once count as one
    line = child.expect(130 if number == signal.SIGINT else 0, f"Stopped by {number.name}; step", "the same command")
    step = saved_step(line)
    bench.report.event(f"{number.name}{' twice' * (times > 1)} in {when}: {line}")
    if newest(workdir) != step:
        bench.report.failed(f"it printed that step {step} is saved, the newest checkpoint is of step {newest(workdir)}")


def saved_step(line: str) -> int:
    """The saved step in the last message of a training."""
    found = re.search(r"step (\d+) is saved|after step (\d+), which is saved", line)
    if found is None:
        raise Fault(f"no step is named in {line}")
    return int(found[1] or found[2])


def second(bench: Bench) -> None:
    """Start a second run beside the first, and resume one with another config."""
    report, workdir = bench.report, bench.rewound("second", 16)
    first = bench.train(workdir)
    if not first.wait_for(lambda: first.line_with("First step done")):
        raise Fault("the first run ended before the second one")
    line = bench.train(workdir).expect(2, "run.py: Another training run is at work in", str(first.process.pid))
    report.event(f"a second run: {line}")
    first.expect(0)
    report.equal("the first run, after the second was refused,", differences(bench.reference, workdir))
    workdir = bench.rewound("changed", 32)
    before = {path: path.read_bytes() for path in sorted(workdir.rglob("*.json*"))}
    line = bench.train(workdir, "--config.optim.lr=0.002").expect(2, "optim.lr was 0.001 and is 0.002")
    report.event(f"another learning rate: {line}")
    if changed := [str(path.relative_to(workdir)) for path, content in before.items() if path.read_bytes() != content]:
        report.failed(f"the run that was refused changed {', '.join(changed)}")
    child = bench.train(workdir, "--config.optim.lr=0.002", "--accept_changes")
    line = child.expect(0, "Going on with another config: optim.lr was 0.001 and is 0.002")
    report.event(f"with --accept_changes: {line}")
    if not state_differences(bench.reference, workdir):
        report.failed("another learning rate changed nothing")


def workers(bench: Bench) -> None:
    """Kill a process that loads scans."""
    workdir = bench.empty("workers")
    child = bench.train(workdir, "--config.train.workers=2")
    if not child.wait_for(lambda: child.line_with("First step done")):
        raise Fault("the training with workers ended before its first step")
    loading = sorted(pid for pid in descendants(child.process.pid) if _is_worker(pid))
    if not loading:
        raise Fault("there are no workers")
    os.kill(loading[0], signal.SIGKILL)
    line = child.expect(0, "a worker process that loads scans died", "They are started again (1 of 3 times).")
    bench.report.event(f"one of {len(loading)} workers killed: {line}")
    found = differences(bench.reference, workdir)
    bench.report.equal("the training that lost a worker", [name for name in found if name != "config.json"])


def _is_worker(pid: int) -> bool:
    """Return True for a process that Grain started, False for helpers of Python."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return "spawn_main" in command
