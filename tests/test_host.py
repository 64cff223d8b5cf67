"""Cores, durations, and processes that end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from h2a2_jax.host import available_cores, core_numbers, duration


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0:00:00"), (59.6, "0:01:00"), (3599.4, "0:59:59"), (86_462.0, "24:01:02")]
)
def test_a_duration_in_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not tie processes to cores")
def test_cores_are_those_the_process_may_use():
    before = core_numbers()
    os.sched_setaffinity(0, before[-1:])
    try:
        assert core_numbers() == before[-1:] and available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores() == len(before)


_KILLED_PARENT = """
import multiprocessing, os, signal, time
from h2a2_jax.host import end_with_parent

def begins_late(seconds):
    time.sleep(seconds)
    end_with_parent()
    time.sleep(100)

if __name__ == "__main__":
    processes = [multiprocessing.get_context("spawn").Process(target=begins_late, args=(s,)) for s in (0, 1)]
    for process in processes:
        process.start()
        print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system does not tell which processes there are")
def test_a_process_ends_even_if_its_parent_was_killed_while_it_began(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_KILLED_PARENT)
    root = str(Path(__file__).parents[1])
    # Not to a pipe: the children would hold it open.
    with (tmp_path / "told").open("w+") as told:
        ended = subprocess.run([sys.executable, script], stdout=told, env={**os.environ, "PYTHONPATH": root})
        told.seek(0)
        children = [int(line) for line in told]
    assert ended.returncode == -signal.SIGKILL and len(children) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/exe").exists() for pid in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)
