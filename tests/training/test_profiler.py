"""Traces of steps: which, where, and what happens when they fail."""

import os
import signal
import threading
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest

from h2a2_jax.scans.specs import SPECS
from h2a2_jax.training.callbacks import StepProfiler
from tests.training.configs import batch_number, joint_config, part_of_run

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no such signal")


@jax.jit
def take_step(x):
    return jnp.sin(x) + 1


CONFIG = joint_config(SPECS)


def run(profiler: StepProfiler, steps, signal_at: int | None = None):
    """Take steps; the last one, where it ends."""
    x = jnp.zeros(4)
    for step in steps:
        if step == signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        profiler.before_batch(part_of_run(step=step - 1, config=CONFIG), batch_number(step - 1))
        x = take_step(x)
        profiler.after_step(part_of_run(step=step), x)


def traces(folder) -> int:
    return len(list(folder.glob("profile/**/*.xplane.pb")))


def said(capsys) -> list[str]:
    return [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]


def test_chosen_steps_are_traced(tmp_path, capsys):
    with closing(StepProfiler(tmp_path, 2, 3)) as profiler:
        run(profiler, [1])
        assert not (tmp_path / "profile").exists()
        run(profiler, [2, 3])
        assert traces(tmp_path) == 1
        run(profiler, [4, 5])
    assert traces(tmp_path) == 1
    assert said(capsys) == ["Profiling steps 2 to 3.", f"A profile is in {tmp_path / 'profile'}"]


def test_a_run_that_goes_on_within_them_traces_the_rest(tmp_path, capsys):
    with closing(StepProfiler(tmp_path, 2, 5)) as profiler:
        run(profiler, [4, 5])
    assert said(capsys)[0] == "Profiling steps 4 to 5."
    assert traces(tmp_path) == 1


def test_a_run_that_ends_within_them_leaves_a_trace(tmp_path):
    with closing(StepProfiler(tmp_path, 2, 50)) as profiler:
        run(profiler, [1, 2, 3])
        assert traces(tmp_path) == 0
    assert traces(tmp_path) == 1


def test_without_steps_nothing_is_traced(tmp_path, capsys):
    with closing(StepProfiler(tmp_path)) as profiler:
        run(profiler, range(1, 8))
    assert traces(tmp_path) == 0
    assert said(capsys) == []


def test_a_signal_traces_the_next_five_steps(tmp_path, capsys):
    with closing(StepProfiler(tmp_path)) as profiler:
        run(profiler, range(1, 20), signal_at=3)
    assert said(capsys) == ["Profiling steps 3 to 7.", f"A profile is in {tmp_path / 'profile'}"]
    assert traces(tmp_path) == 1


def test_a_signal_during_a_trace_asks_for_another(tmp_path, capsys):
    with closing(StepProfiler(tmp_path, 1, 2)) as profiler:
        run(profiler, range(1, 9), signal_at=2)
    assert said(capsys)[::2] == ["Profiling steps 1 to 2.", "Profiling steps 3 to 7."]


def test_the_handler_from_before_is_put_back(tmp_path):
    def mine(number, frame):
        pass

    original = signal.signal(signal.SIGUSR1, mine)
    try:
        with closing(StepProfiler(tmp_path)):
            assert signal.getsignal(signal.SIGUSR1) is not mine
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, original)


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)

    def elsewhere():
        with closing(StepProfiler(tmp_path, 1, 1)) as profiler:
            assert signal.getsignal(signal.SIGUSR1) is before
            run(profiler, [1])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert traces(tmp_path) == 1


def test_a_trace_that_cannot_start_is_said_once_and_ends_nothing(tmp_path, capsys):
    jax.profiler.start_trace(str(tmp_path / "other"))  # JAX traces one thing at a time
    try:
        with closing(StepProfiler(tmp_path, 1, 3)) as profiler:
            run(profiler, range(1, 5))
    finally:
        jax.profiler.stop_trace()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("The steps could not be profiled (") and line.endswith("); training goes on.")


def test_a_folder_that_cannot_be_made_is_said_and_another_trace_can_follow(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file, where a folder should be")
    with closing(StepProfiler(tmp_path, 1, 2)) as profiler:
        run(profiler, [1, 2])
    assert "could not be profiled" in capsys.readouterr().out
    with closing(StepProfiler(tmp_path / "elsewhere", 1, 1)) as profiler:
        run(profiler, [1])
    assert traces(tmp_path / "elsewhere") == 1
