"""A training of three processes that SIGTERM stops: part of `benchmarks.faults`."""

import signal
import socket

from benchmarks.faults.children import CONFIG, SHORT, Bench, Fault, newest
from benchmarks.faults.stops import saved_step

_PROCESSES = 3


def processes(bench: Bench) -> None:
    """Send SIGTERM to a process other than the first; then resume with one process to the end."""
    workdir = bench.empty("processes")
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        address = f"localhost:{listening.getsockname()[1]}"
    several = [f"--coordinator={address}", f"--num_processes={_PROCESSES}"]
    children = [
        bench.start(["run.py", CONFIG, f"--workdir={workdir}", *SHORT, *several, f"--process_id={i}"])
        for i in range(_PROCESSES)
    ]
    first = children[0]
    if not first.wait_for(lambda: first.line_with("First step done")) or not first.wait(bench.rng.uniform(0, 2)):
        for child in children[1:]:
            child.kill()
        raise Fault(f"the first process ended before one got SIGTERM: {' / '.join(first.lines[-6:])}")
    children[-1].process.send_signal(signal.SIGTERM)
    line = first.expect(0, "Stopped by SIGTERM; step", "the same command")
    for child in children[1:]:
        child.expect(0)
    step = saved_step(line)
    bench.report.event(f"one of {_PROCESSES} processes got SIGTERM, all ended: {line}")
    if newest(workdir) != step:
        bench.report.failed(f"it printed that step {step} is saved, the newest checkpoint is of step {newest(workdir)}")
    bench.train(workdir, *SHORT).expect(0, f"after step {step} of 24")
    bench.report.event("one process alone resumes to the end")
