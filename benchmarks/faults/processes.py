"""Trainings of three processes that do not come together, are stopped, and are killed: part of `benchmarks.faults`."""

import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults.children import (
    CONFIG,
    SHORT,
    STEPS,
    Bench,
    Child,
    Fault,
    half_saved,
    logged_step,
    newest,
)
from benchmarks.faults.compare import differences
from benchmarks.faults.stops import saved_step

_PROCESSES = 3
_LIMIT_S = 60
_START_S = 40
"""Time that the processes may take until they wait for one another, on a busy machine."""
_PAUSE_S = 10
_DIES = (
    "import os, signal, jax; from h2a2_jax.cli import run_py; "
    "jax.distributed.initialize = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL); run_py()"
)
"""In place of run.py: a process that is killed between the handshake and JAX's start."""
_LONG = ("--config.train.log_every=1", "--config.train.evaluate_every=0")


def processes(bench: Bench) -> None:
    """Stop a process for a while, then send SIGTERM to one other than the first; one process resumes to the end."""
    workdir = bench.empty("processes")
    children = _start(bench, workdir, SHORT)
    first = children[0]
    _first_step(children)
    children[1].process.send_signal(signal.SIGSTOP)
    survived = first.wait(_PAUSE_S)
    children[1].process.send_signal(signal.SIGCONT)
    if not survived or not first.wait(bench.rng.uniform(0, 2)):
        _kill(children)
        raise Fault(f"the first process ended before one got SIGTERM: {' / '.join(first.lines[-6:])}")
    bench.report.survived(f"one of three processes stopped for {_PAUSE_S} s (SIGSTOP)", "all went on")
    children[-1].process.send_signal(signal.SIGTERM)
    line = first.expect(0, "Stopped by SIGTERM; step", "the same command")
    for child in children[1:]:
        child.expect(0)
    step = saved_step(line)
    if newest(workdir) != step:
        bench.report.failed(f"it printed that step {step} is saved, the newest checkpoint is of step {newest(workdir)}")
    bench.train(workdir, *SHORT).expect(0, f"after step {step} of 24")
    bench.report.survived("SIGTERM for one of three processes", f"{line}; one process resumes to the end")


def silent(bench: Bench) -> None:
    """Stop a process for good: the others end; it learns of it when it goes on."""
    fault, limit = "one of three processes stopped for good (SIGSTOP)", 40
    children = _start(bench, bench.empty("silent"), (*SHORT, f"--process_timeout={limit}"))
    _first_step(children)
    began, stopped = time.monotonic(), children.pop()
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        lines = [child.expect(2, "run.py: process 2 of 3 has not answered for 30 s; ") for child in children]
        seconds = time.monotonic() - began
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    stopped.expect(2, "run.py: process ")
    if seconds > limit:
        bench.report.failed(f"took {seconds:.0f} s", fault)
    else:
        bench.report.sentence(fault, f"{lines[0]} (after {seconds:.0f} s)")


def strangers(bench: Bench) -> None:
    """Start processes that miss one another, or do not agree; each must end with one sentence."""
    with socket.create_server(("localhost", 0)) as listening:
        taken = listening.getsockname()[1]
        cases: list[tuple[str, dict[int, Sequence[str]], str]] = [
            ("no process 0", {1: ()}, "process 1 of 3 waited 20 s for process 0 at localhost:"),
            ("process 0 alone", {0: ()}, "process 0 of 3 waited 20 s for processes 1, 2 at localhost:"),
            ("one of three is missing", {0: (), 2: ()}, "of 3 waited 20 s for process 1 at localhost:"),
            (
                "a name that does not resolve",
                {1: ("--coordinator=none.invalid:1234",)},
                "does not resolve): start it",
            ),
            ("a process that died at JAX's start", {0: (), 1: (), 2: (_DIES,)}, "run.py: process 2 of 3 died; start"),
            ("a process id given twice", {0: (), 1: (), 2: ("--process_id=1",)}, "--process_id=1 was given twice"),
            ("unequal --num_processes", {0: (), 1: ("--num_processes=2",)}, "was given --num_processes=2"),
            ("another config", {0: (), 1: ("--config.optim.lr=0.002",)}, "has --config.optim.lr 0.002, process 0 has"),
            ("a port of a silent service", {1: (f"--coordinator=localhost:{taken}",)}, "nothing that listens there"),
            ("a port that is taken", {0: (f"--coordinator=localhost:{taken}",)}, "cannot listen on port"),
            ("no cluster", {0: ("--coordinator=auto",)}, "--coordinator=auto finds no cluster here"),
        ]
        for fault, flags, sentence in cases:
            workdir, began = bench.empty("strangers"), time.monotonic()
            children = _start(bench, workdir, ("--process_timeout=20",), flags)
            try:
                dying = [i for i, own in flags.items() if _DIES in own]
                lines = [child.expect(2, sentence) for i, child in zip(flags, children, strict=True) if i not in dying]
            except Fault as unexpected:
                _kill(children)
                bench.report.failed(str(unexpected), fault)
                continue
            if time.monotonic() - began > _START_S + _LIMIT_S:
                bench.report.failed(f"took {time.monotonic() - began:.0f} s", fault)
            elif workdir.exists():
                bench.report.failed("the workdir was made", fault)
            else:
                bench.report.sentence(fault, lines[0])


def killed(bench: Bench) -> None:
    """Kill each of three processes in turn, and resume; the result equals that of an unkilled run of three."""
    reference, workdir = bench.folder / "three", bench.empty("three_killed")
    if not (reference / "summary.md").exists():
        for child in _start(bench, bench.empty(reference.name), _LONG):
            child.expect(0)
    moments: list[tuple[int, str, Callable[[], object]]] = [
        (1, "in a step", lambda: logged_step(workdir) >= 10),
        (2, "while a checkpoint is written", lambda: half_saved(workdir) or newest(workdir) >= 16),
        (0, "in a step", lambda: logged_step(workdir) >= 26),
        (1, "in the evaluation", lambda: logged_step(workdir) == STEPS),
    ]
    for victim, when, condition in moments:
        children = _start(bench, workdir, _LONG)
        others = [child for i, child in enumerate(children) if i != victim]
        if not others[0].wait_for(condition):
            _kill(children)
            raise Fault(f"it ended before process {victim} was killed: {' / '.join(others[0].lines[-6:])}")
        began, fault = time.monotonic(), f"process {victim} of three killed {when}"
        children[victim].kill()
        died = f"run.py: process {victim} of {_PROCESSES} died; "
        line = others[0].expect(2, died, "step" if victim else "the same command")
        others[1].expect(2, died, "the same command goes on from the newest checkpoint")
        if (seconds := time.monotonic() - began) > _LIMIT_S:
            bench.report.failed(f"took {seconds:.0f} s", fault)
        bench.report.sentence(fault, f"{line} (after {seconds:.0f} s)")
    for child in _start(bench, workdir, _LONG):
        child.expect(0)
    found = differences(reference, workdir)
    bench.report.equal("the end of three processes", found, "each of three processes killed in turn, and resumed")


def _start(
    bench: Bench, workdir: Path, common: Sequence[str], flags: dict[int, Sequence[str]] | None = None
) -> list[Child]:
    """Start processes of one run, each with flags of its own; later flags count."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        address = f"localhost:{listening.getsockname()[1]}"
    children = []
    for i, own in (flags or dict.fromkeys(range(_PROCESSES), ())).items():
        several = [f"--coordinator={address}", f"--num_processes={_PROCESSES}", f"--process_id={i}"]
        if "--coordinator=auto" in own:
            several = []
        program, own = (["-c", _DIES], ()) if _DIES in own else (["run.py"], own)
        children.append(bench.start([*program, CONFIG, f"--workdir={workdir}", *common, *several, *own]))
    return children


def _first_step(children: Sequence[Child]) -> None:
    """Wait until the processes took a step."""
    if not children[0].wait_for(lambda: children[0].line_with("First step done")):
        _kill(children)
        raise Fault(f"the first process ended before its first step: {' / '.join(children[0].lines[-6:])}")


def _kill(children: Sequence[Child]) -> None:
    for child in children:
        child.kill()
