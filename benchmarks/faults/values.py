"""Other numbers of devices, and values that are not finite: part of `benchmarks.faults`."""

import re
import shutil
import signal
from pathlib import Path

from benchmarks.faults.children import CONFIG, SHORT, Bench, Fault, newest
from benchmarks.faults.compare import metric_lines, state_differences
from benchmarks.faults.stops import saved_step

_FIRST, _TOLERANCE = 4, 1e-4
"""Number of steps after the change whose losses are compared, and the largest relative difference. Another number of
devices adds sums in another order, 1e-7 of a loss. Adam's first steps turn the noise of gradients near zero into
updates of the learning rate's size, so that the difference grows with every step: later steps cannot be compared."""
_MOST_SKIPPED = 10


def devices(bench: Bench) -> None:
    """Resume a training of three devices on one and on six; evaluate one checkpoint on one, three and six."""
    report, whole, stopped = bench.report, bench.empty("devices_whole"), bench.empty("devices_stopped")
    bench.train(whole, *SHORT, devices=3).expect(0, "3 cpu device(s), 3 x 1")
    child = bench.train(stopped, *SHORT, devices=3)
    if not child.wait_for(lambda: child.line_with("First step done")) or not child.wait(bench.rng.uniform(1, 3)):
        raise Fault("the training of three devices ended before SIGTERM")
    child.process.send_signal(signal.SIGTERM)
    step = saved_step(child.expect(0, "Stopped by SIGTERM; step"))
    report.event(f"a training on three devices got SIGTERM; step {step} is saved")
    for count, mesh in ((3, "3 x 1"), (1, "1 x 1"), (6, "3 x 2")):
        workdir = bench.empty(f"devices_{count}")
        shutil.copytree(stopped, workdir)
        bench.train(workdir, *SHORT, devices=count).expect(0, f"{count} cpu device(s), {mesh}")
        by_step = _loss_differences(whole, workdir, step)
        shown = ", ".join(f"{value:.1e}" for value in by_step)
        report.event(f"resumed on {count} devices, losses differ relatively by {shown} in the steps after {step}")
        limit = 0 if count == 3 else _TOLERANCE
        if max(by_step[:_FIRST]) > limit:
            report.failed(f"that is more than {limit} in the first {_FIRST} steps")
    texts = {count: _evaluation(bench, whole, count) for count in (1, 3, 6)}
    report.equal("an evaluation on 3 and 6 devices", [f"on {n}" for n in (3, 6) if texts[n] != texts[1]])


def _loss_differences(whole: Path, workdir: Path, step: int) -> list[float]:
    """Largest relative difference of the losses in each step after `step`."""
    found = []
    for a, b in zip(metric_lines(whole), metric_lines(workdir), strict=True):
        if a["step"] > step and "loss/scannet" in a:
            losses = [(a[key], b[key]) for key in a if key.startswith("loss/")]
            found.append(max(abs(x - y) / abs(x) for x, y in losses))
    return found[: _FIRST * 2]


def _evaluation(bench: Bench, workdir: Path, count: int) -> bytes:
    folder = bench.folder / f"evaluation_{count}"
    bench.start(["run.py", "--mode=eval", f"--workdir={workdir}", f"--output={folder}"], devices=count).expect(0)
    return (folder / "evaluation.json").read_bytes()


def poison(bench: Bench) -> None:
    """Train with NaN in one scan, then in all scans."""
    report, workdir = bench.report, bench.empty("poison_one")
    scan = "synthetic_sunrgbd/train/000003"
    child = bench.start(["-m", "benchmarks.faults.poison", scan, CONFIG, f"--workdir={workdir}", *SHORT])
    line = child.expect(0, "is not finite and is skipped", "of sunrgbd", f"{scan} has values", "the gradients of")
    report.event(f"one poisoned scan: {line}")
    kept = sorted(int(path.stem) for path in workdir.glob("nonfinite/*.npz"))
    warned, last = sum("is skipped" in line for line in child.lines), metric_lines(workdir)[-1]["skipped_steps"]
    if not len(kept) == warned == last > 0:
        report.failed(f"{len(kept)} batches are kept, {warned} were reported, {last} are counted")
    _replay(bench, workdir, kept[-1], scan)
    workdir = bench.rewound("poison_all", 16)
    child = bench.start(["-m", "benchmarks.faults.poison", "all", CONFIG, f"--workdir={workdir}"])
    line = child.expect(2, f"{_MOST_SKIPPED} steps in a row were not finite", "--mode=replay")
    report.event(f"all scans poisoned: {line}")
    if (step := newest(workdir)) != 16 + _MOST_SKIPPED:
        report.failed(f"the newest checkpoint is of step {step}, not of {16 + _MOST_SKIPPED}")
    found = state_differences(bench.every, workdir, 16, step)
    report.equal(
        "what it saved",
        [name for name in found if name not in ("optimizer//step", "optimizer//skipped", "optimizer//skipped_in_row")],
    )
    _replay(bench, workdir, step - 1, "scannet")
    bench.train(workdir).expect(0, f"after step {step} of")
    report.event("with finite scans it resumes to the end")


def _replay(bench: Bench, workdir: Path, number: int, named: str) -> None:
    child = bench.start(["run.py", "--mode=replay", f"--workdir={workdir}"])
    line = child.expect(1, named, "not finite among the inputs")
    if not re.match(rf"Batch {number} of", child.lines[0]):
        bench.report.failed(f"batch {number} is the last one kept, {child.lines[0]!r} was run again")
    bench.report.event(f"run again: {line.strip()}")
