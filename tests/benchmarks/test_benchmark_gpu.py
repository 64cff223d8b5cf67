"""The benchmark for a lent GPU refuses a machine without one, and begins with what tells most."""

import jax
import numpy as np
import pytest

from benchmarks import gpu, gpu_programs
from benchmarks.gpu_programs import Case


def test_a_machine_without_gpu_is_refused_in_one_sentence(capsys):
    assert jax.default_backend() == "cpu" and gpu.main([]) == 2
    assert "expected a GPU" in capsys.readouterr().err


def test_the_first_cases_are_the_figures_to_show():
    order = list(gpu.cases(tiny=False))
    assert order[:2] == [(kind, "sfks", 16, "bfloat16", "implicit") for kind in ("evaluate", "step")]
    assert len(set(order)) == len(order)


@pytest.mark.parametrize("kind", ["evaluate", "step"])
def test_a_program_takes_its_arguments_and_the_plan(kind, monkeypatch):
    points = np.random.default_rng(0).uniform(0, 0.5, (300, 3)).astype(np.float32)
    monkeypatch.setattr(gpu_programs, "load_points", lambda path: ("points", points))
    case = Case.of(None, 1, "sfks", "small", "implicit")
    function, make = case.program(kind, "bfloat16", "implicit")
    out = jax.eval_shape(function, *jax.eval_shape(make), case.plan)
    if kind == "step":
        state, value = out
        jax.tree.map(lambda a, b: pytest.fail("state changed") if a != b else None, state, jax.eval_shape(make)[0])
        assert value.shape == ()
    else:
        assert out.logits.shape == (case.plan.ups[0].lateral.out_capacity + case.plan.ups[1].lateral.out_capacity, 18)
