"""Cores and durations."""

import os

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
