"""Worker processes: early deaths, and complete outcomes."""

import os

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.prepare.worker_pool import ScanOutcome, run_in_processes


class _EndsWhereItArrives:
    """Unpickling it ends the process."""

    def __reduce__(self):
        return os._exit, (3,)

    def __call__(self, name: str) -> None:
        raise AssertionError("it never arrives")


def test_three_processes_in_a_row_that_die_early_are_an_error():
    with pytest.raises(InputError, match=r"One process after another ended with status 3, before it had begun\."):
        list(run_in_processes(_EndsWhereItArrives(), ["a", "b"], 1))


def test_outcomes_are_complete_whatever_the_number_of_processes():
    names = [str(number) for number in range(7)]
    for workers in (1, 3):
        found = sorted(run_in_processes(len, names, workers), key=lambda outcome: outcome.name)
        assert found == [ScanOutcome(name, 1) for name in names]
    assert list(run_in_processes(len, [], 2)) == []
