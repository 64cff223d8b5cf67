"""JAX's compilations are counted, and a warning is printed if there are too many."""

import threading
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.training.callbacks import CompilationCounter
from h2a2_jax.training.step import StepMetrics
from tests.training.configs import batch_number, part_of_run

Capture = pytest.CaptureFixture[str]


def compile_one(size: int) -> None:
    jax.jit(lambda x: x + 1)(np.zeros(size, np.float32))


def test_programs_are_counted_while_entered():
    compile_one(3)
    with CompilationCounter(1) as counter:
        compile_one(3)
        step = jax.jit(jnp.sin)
        step(np.zeros(3, np.float32))
        step(np.zeros(3, np.float32))
        step(np.zeros(4, np.float32))
    compile_one(5)
    assert counter.count == 3
    assert counter.loaded <= 3
    assert counter.seconds > 0


def test_a_run_does_not_count_what_another_one_compiles():
    with CompilationCounter(1) as first:
        compile_one(3)
    with CompilationCounter(1) as second:
        compile_one(3)
        compile_one(4)
    assert (first.count, second.count) == (1, 2)


def test_listeners_that_someone_cleared_are_no_error():
    with CompilationCounter(1) as counter:
        counter.__exit__()
        compile_one(3)
    assert counter.count == 0


def take_step(counter: CompilationCounter, step: int, work: Callable[[], object], capsys: Capture) -> str:
    """The warning that a step prints, or nothing."""
    training, item, metrics = part_of_run(step=step), batch_number(step), StepMetrics(*[None] * 9)
    counter.before_batch(training, item)
    work()
    counter.after_batch(training, item, metrics)
    counter.after_step(training, metrics)
    return capsys.readouterr().out


def warned_at(counter: CompilationCounter, sizes: Iterable[int], capsys: Capture) -> list[int]:
    """Steps that warned, from 1, of a function that is called with arrays of these sizes."""
    function = jax.jit(lambda x: x * 2)
    calls = {step: partial(function, np.zeros(size, np.float32)) for step, size in enumerate(sizes, 1)}
    return [step for step, call in calls.items() if take_step(counter, step, call, capsys)]


def test_buckets_that_are_met_late_are_no_warning(capsys: Capture):
    with CompilationCounter(expected=3, first_steps=2) as counter:
        assert warned_at(counter, [1, 2, 3, 4, 5, 5, 4, 3, 2, 1], capsys) == []


def test_shapes_that_keep_changing_warn_whenever_their_number_doubled(capsys: Capture):
    with CompilationCounter(expected=1, first_steps=2) as counter:
        # 1 late program after step 3, 2 after step 4, 4 after step 6, 8 after step 10
        assert warned_at(counter, range(1, 12), capsys) == [4, 6, 10]
        assert take_step(counter, 12, lambda: None, capsys) == ""


def test_the_warning_names_number_and_remedy(capsys: Capture):
    with CompilationCounter(expected=1, first_steps=2) as counter:
        warnings = [take_step(counter, 700, partial(compile_one, size), capsys) for size in range(1, 5)]
    warning = next(filter(None, warnings))
    assert warning.startswith("Step 700: 2 programs were compiled after the first 2 steps, which took 0 s;")
    assert "account for 1 at most" in warning and "train.max_bucket=0" in warning


def test_programs_of_another_thread_and_between_steps_are_not_the_steps(capsys: Capture):
    def compile_in_thread() -> None:
        thread = threading.Thread(target=compile_one, args=(4,))
        thread.start()
        thread.join()

    with CompilationCounter(expected=0, first_steps=0) as counter:
        compile_one(3)
        assert take_step(counter, 1, compile_in_thread, capsys) == ""
        assert counter.count == 2
        assert take_step(counter, 2, partial(compile_one, 5), capsys)
