"""What is counted of JAX's compilations, and when their number is a warning."""

import threading

import jax
import jax.numpy as jnp
import numpy as np

from h2a2_jax.compilation import CompilationCounter


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
    assert counter.compiled + counter.loaded == 3
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


def take_steps(counter: CompilationCounter, sizes) -> list[int]:
    """Steps that warned, from 1."""
    function, warned = jax.jit(lambda x: x * 2), []
    for step, size in enumerate(sizes, 1):
        with counter.step():
            function(np.zeros(size, np.float32))
        if counter.warning(step):
            warned.append(step)
    return warned


def test_buckets_that_are_met_late_are_no_warning():
    with CompilationCounter(expected=3, first_steps=2) as counter:
        assert take_steps(counter, [1, 2, 3, 4, 5, 5, 4, 3, 2, 1]) == []


def test_shapes_that_keep_changing_warn_whenever_their_number_doubled():
    with CompilationCounter(expected=1, first_steps=2) as counter:
        # 1 late program after step 3, 2 after step 4, 4 after step 6, 8 after step 10
        assert take_steps(counter, range(1, 12)) == [4, 6, 10]
        with counter.step():
            pass
        assert counter.warning(12) is None


def test_the_warning_names_number_and_remedy():
    with CompilationCounter(expected=1, first_steps=2) as counter:
        sentence = None
        for size in range(1, 5):
            with counter.step():
                compile_one(size)
            sentence = sentence or counter.warning(700)
    assert sentence is not None
    assert sentence.startswith("Step 700: 2 programs were compiled after the first 2 steps, which took 0 s;")
    assert "account for 1 at most" in sentence and "train.max_bucket=0" in sentence


def test_what_is_compiled_between_steps_or_beside_them_is_not_the_steps():
    with CompilationCounter(expected=0, first_steps=0) as counter:
        compile_one(3)
        with counter.step():
            beside = threading.Thread(target=compile_one, args=(4,))
            beside.start()
            beside.join()
        assert counter.count == 2
        assert counter.warning(1) is None
        with counter.step():
            compile_one(5)
        assert counter.warning(2) is not None
