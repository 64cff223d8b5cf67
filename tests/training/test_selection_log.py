"""The log of kernel selection as a program reads it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.training.metrics import SelectionLog, read_selection_log

NAMES = ("scannet", "s3dis")


def metrics(value):
    full = jnp.full((2, 27), value)
    return {"layer1_0.conv1": SelectionMetrics(full, full / 2, full / 4, jnp.zeros(2), jnp.ones(2))}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "selection.jsonl").read_text().splitlines()]


def test_a_line_holds_the_means_over_the_steps_since_the_last(tmp_path):
    log = SelectionLog(tmp_path, NAMES, total_steps=6, log_every=2)
    log.add(2, [metrics(0.2), metrics(0.4)])
    log.add(4, [metrics(0.5), metrics(0.7)])
    first, second = lines(tmp_path)
    assert list(first)[:2] == ["step", "version"]
    assert (first["step"], first["version"], first["steps"], first["datasets"]) == (2, 1, 2, list(NAMES))
    layer = second["layers"]["layer1_0.conv1"]
    assert layer["alpha"] == [[0.6] * 27] * 2
    assert layer["beta"] == [[0.3] * 27] * 2
    assert layer["gamma"] == [[0.15] * 27] * 2


def test_values_have_four_digits_and_what_is_not_finite_is_null(tmp_path):
    log = SelectionLog(tmp_path, NAMES, 1, 1)
    log.add(1, [metrics(1 / 3)])
    assert lines(tmp_path)[0]["layers"]["layer1_0.conv1"]["alpha"][1][0] == 0.3333
    log.add(1, [metrics(float("nan"))])
    assert lines(tmp_path)[1]["layers"]["layer1_0.conv1"]["gamma"][1][26] is None


def test_a_dataset_that_took_no_part_in_a_step_does_not_count_there(tmp_path):
    log = SelectionLog(tmp_path, NAMES, 2, 2)
    absent = metrics(0.4)["layer1_0.conv1"]
    absent = absent._replace(gamma=absent.gamma.at[0].set(jnp.nan))
    log.add(2, [metrics(0.8), {"layer1_0.conv1": absent}])
    gamma = lines(tmp_path)[0]["layers"]["layer1_0.conv1"]["gamma"]
    assert gamma[0] == [0.2] * 27 and gamma[1] == [0.15] * 27


@pytest.mark.parametrize(("total", "log_every"), [(200, 10), (10_000, 50), (123_456, 50), (7, 50), (1001, 1)])
def test_a_run_writes_at_most_some_200_lines_and_always_the_last_step(tmp_path, total, log_every):
    log = SelectionLog(tmp_path, NAMES, total, log_every)
    assert log.every % log_every == 0
    steps = [*range(log_every, total, log_every), total]
    due = [step for step in steps if step % log.every == 0 or step == total]
    assert len(due) <= 201
    log.add(total, [metrics(0.5)])
    assert lines(tmp_path)[-1]["step"] == total


def test_a_run_without_kernel_selection_writes_no_file(tmp_path):
    log = SelectionLog(tmp_path, NAMES, 2, 1)
    log.add(1, [{}])
    log.add(2, [{}])
    assert not (tmp_path / "selection.jsonl").exists()


def test_reading_gives_arrays_in_the_order_asked_for_and_the_later_of_two_lines(tmp_path):
    log = SelectionLog(tmp_path, NAMES, 2, 1)
    own = SelectionMetrics(
        jnp.full((2, 27), 0.5), jnp.tile(jnp.array([[0.1], [0.9]]), 27), jnp.zeros((2, 27)), jnp.zeros(2), jnp.ones(2)
    )
    for value in (0.1, 0.9):
        log.add(1, [metrics(value)])
    log.add(2, [{"layer1_0.conv1": own}])
    with (tmp_path / "selection.jsonl").open("a") as file:
        file.write('{"step": 3, "vers')
    steps, history = read_selection_log(tmp_path / "selection.jsonl", ("s3dis", "scannet"))
    layer = history["layer1_0.conv1"]
    assert steps.tolist() == [1, 2]
    assert layer.alpha.shape == layer.beta.shape == layer.gamma.shape == (2, 2, 27)
    assert layer.alpha[0, 0, 0] == 0.9
    assert np.allclose(layer.beta[1], [[0.9], [0.1]])


def test_lines_of_other_datasets_are_refused(tmp_path):
    SelectionLog(tmp_path, NAMES, 1, 1).add(1, [metrics(0.5)])
    with pytest.raises(InputError, match=r"step 1 .* other datasets"):
        read_selection_log(tmp_path / "selection.jsonl", ("scannet", "sunrgbd"))


def test_damaged_lines_are_named(tmp_path):
    (tmp_path / "selection.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="Line 1"):
        read_selection_log(tmp_path / "selection.jsonl", NAMES)


def test_lines_of_another_shape_are_refused(tmp_path):
    SelectionLog(tmp_path, NAMES, 1, 1).add(1, [metrics(0.5)])
    path = tmp_path / "selection.jsonl"
    line = json.loads(path.read_text())
    name = next(iter(line["layers"]))
    layer = line["layers"][name]
    for change in (
        {"layers": []},
        {"layers": None},
        {"datasets": 3},
        {"datasets": [["scannet"]]},
        {"layers": {name: []}},
        {"layers": {name: {"alpha": layer["alpha"]}}},
        {"layers": {name: layer | {"beta": layer["beta"][:1]}}},
        {"layers": {name: layer | {"gamma": [[0.5], "much"]}}},
    ):
        path.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'step': 2} | change)}\n")
        with pytest.raises(InputError, match=r"The line of step \d in .*remove the line"):
            read_selection_log(path, NAMES)
    shorter = {part: [row[:-1] for row in layer[part]] for part in layer}
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'step': 2, 'layers': {name: shorter}})}\n")
    with pytest.raises(InputError, match="step 2"):
        read_selection_log(path, NAMES)
