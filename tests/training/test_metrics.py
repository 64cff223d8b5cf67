"""The metrics file as a program reads it, and the progress line as a person does."""

import io
import json
import re
from contextlib import closing, redirect_stderr

import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.training.callbacks import Progress
from h2a2_jax.training.metrics import MetricsWriter


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_opens_with_step_and_schema_version(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(3, {"loss/scannet": 0.5, "dropped_points": 7})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "version": 1, "loss/scannet": 0.5, "dropped_points": 7}\n'


def test_arrays_of_one_element_are_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        values = (jnp.float32(0.5), jnp.array([2]), jnp.bfloat16(3), np.int64(4), np.float32(5))
        writer.write(1, {str(i): value for i, value in enumerate(values)})
    assert list(read(tmp_path)[0].values()) == [1, 1, 0.5, 2, 3, 4, 5]


def test_values_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": float("nan"), "b": jnp.inf, "c": jnp.array(-jnp.inf), "d": 0.0})
    assert read(tmp_path) == [{"step": 1, "version": 1, "a": None, "b": None, "c": None, "d": 0.0}]


def test_a_line_can_be_read_before_the_file_is_closed(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": 1})
        assert len(read(tmp_path)) == 1
        writer.write(2, {"a": 1})
        assert len(read(tmp_path)) == 2
    with pytest.raises(ValueError, match="closed"):
        writer.write(3, {})


def test_going_on_appends_and_drops_a_line_that_was_cut_short(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "vers')
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {"a": 2})
    assert [(line["step"], line["a"]) for line in read(tmp_path)] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("value", [np.zeros(2), "0.5", True, 1j])
def test_what_is_no_number_is_refused_by_name(tmp_path, value):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"metric 'psi' is .*single number"):
        writer.write(1, {"psi": value})
    assert read(tmp_path) == []


def test_what_is_not_known_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"mAP@0.25/scannet": None, "psi": np.float32("inf")})
    assert read(tmp_path) == [{"step": 1, "version": 1, "mAP@0.25/scannet": None, "psi": None}]


def test_keys_of_the_schema_are_refused(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"\['step'\]"):
        writer.write(1, {"step": 2})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_whole_lines():
    with redirect_stderr(io.StringIO()) as log, closing(Progress(3, interval=0.0)) as progress:
        for step in (1, 2, 3):
            progress.update(step, loss=0.25, scans=2)
    lines = log.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    pattern = r"step 3/3  loss 0\.2500  \d+\.\d scans/s  elapsed 0:00:00  left 0:00:00"
    assert re.fullmatch(pattern, lines[-1])


def test_a_log_is_spared_all_lines_but_the_last_within_the_interval():
    with redirect_stderr(io.StringIO()) as log, closing(Progress(5, first_step=1, interval=1e9)) as progress:
        for step in (2, 3, 4, 5):
            progress.update(step, loss=0.5, scans=2)
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["5/5"]


def test_a_terminal_gets_one_line_updated_in_place():
    with redirect_stderr(Terminal()) as terminal, closing(Progress(4, first_step=1)) as progress:
        for step in (2, 4):
            progress.update(step, loss=0.5, scans=2)
    shown = terminal.getvalue()
    assert shown.count("\n") == 1 and "\r" in shown
    assert "4/4" in shown.split("\r")[-1] and "loss 0.5000" in shown.split("\r")[-1]
