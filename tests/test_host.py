"""Cores, durations, processes that end with their parent, log messages of a command line."""

import errno
import logging
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import logging as absl_logging

from h2a2_jax.host import (
    OutputFile,
    allow_open_files,
    available_cores,
    core_numbers,
    duration,
    keep_output,
    quiet_command_line,
    release_memory,
    shortage,
)


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0:00:00"), (59.6, "0:01:00"), (3599.4, "0:59:59"), (86_462.0, "24:01:02")]
)
def test_a_duration_in_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another allocator than glibc's")
def test_freed_memory_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    blocks = [np.ones(100_000, np.uint8) for _ in range(1000)]
    last = blocks.pop()  # holds the end of the heap, so that glibc itself gives nothing back
    del blocks
    before = resident()
    release_memory()
    assert before - resident() > 50_000_000 and last.all()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not tie processes to cores")
def test_cores_are_limited_by_the_affinity_of_the_process():
    before = core_numbers()
    os.sched_setaffinity(0, before[-1:])
    try:
        assert core_numbers() == before[-1:] and available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores() == len(before)


def test_a_command_line_filters_messages_of_orbax_once(monkeypatch):
    logger, verbosity, printed = logging.getLogger("absl"), absl_logging.get_verbosity(), []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(logger, "filters", [])
    quiet_command_line()
    hook = sys.unraisablehook
    quiet_command_line()
    absl_logging.set_verbosity(verbosity)
    assert sys.unraisablehook is hook and len(logger.filters) == 1

    def passes(path: str, level: int, error: bool = False) -> bool:
        exception = (ValueError, ValueError(), None) if error else None
        return bool(logger.filter(logging.LogRecord("absl", level, path, 1, "", (), exception)))

    assert passes("jax/a.py", logging.WARNING) and passes("orbax/a.py", logging.ERROR)
    assert not passes("orbax/a.py", logging.WARNING) and not passes("orbax/a.py", logging.ERROR, error=True)
    for error in (RuntimeError("Event loop is closed"), RuntimeError("other")):
        hook(SimpleNamespace(exc_value=error))
    assert [str(unraisable.exc_value) for unraisable in printed] == ["other"]


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


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_process_ends_if_its_parent_was_killed_while_it_began(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_KILLED_PARENT)
    root = str(Path(__file__).parents[1])
    # Not to a pipe: the children would hold it open.
    with (tmp_path / "printed").open("w+") as printed:
        ended = subprocess.run([sys.executable, script], stdout=printed, env={**os.environ, "PYTHONPATH": root})
        printed.seek(0)
        children = [int(line) for line in printed]
    assert ended.returncode == -signal.SIGKILL and len(children) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/exe").exists() for pid in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)


def test_text_that_nobody_reads_is_dropped() -> None:
    reading, writing = os.pipe()
    file = OutputFile(writing)
    assert file.write(b"read") == 4 and os.read(reading, 9) == b"read" and not file.is_lost
    os.close(reading)
    assert file.write(b"lost") == 4 and file.is_lost
    os.write(writing, b"by a library")  # to the null device
    os.close(writing)


def test_a_full_disk_may_have_space_later() -> None:
    number = os.open("/dev/full", os.O_WRONLY)
    file = OutputFile(number)
    assert file.write(b"lost") == 4 and file.is_lost
    with pytest.raises(OSError, match="No space left"):
        os.write(number, b"the file is still that one")
    os.close(number)


def test_streams_of_a_caller_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    keep_output()
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (MemoryError(), "there is not enough memory (no more can be had): end other programs, raise the limit"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "the device has not enough memory"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
        (RuntimeError("can't start new thread"), "no further thread can be started"),
    ],
)
def test_a_shortage_is_told_with_what_to_do(error: BaseException, phrase: str):
    found = shortage(error)
    assert found is not None and found.startswith(phrase) and "\n" not in found


@pytest.mark.parametrize("error", [RuntimeError("of another kind"), OSError(errno.ENOENT, "No such file"), KeyError(1)])
def test_another_error_is_no_shortage(error: BaseException):
    assert shortage(error) is None


def test_a_command_may_open_as_many_files_as_the_system_lets_it():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
