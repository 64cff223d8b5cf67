"""Weights & Biases as a logger, with a stand-in for its package."""

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from configs.joint import tiny
from h2a2_jax.config import ExperimentConfig, changes, from_json, to_json
from h2a2_jax.errors import InputError
from h2a2_jax.training import wandb_writer
from h2a2_jax.training.loop import train
from h2a2_jax.training.wandb_writer import WandbWriter

CONFIG = replace(tiny(), train=replace(tiny().train, loggers=("tensorboard", "wandb")))


class StandIn(ModuleType):
    """The package's `init`, and the runs that it gave out, by id: rows, summary and the number of starts."""

    def __init__(self, on_init: Callable[[], None] = lambda: None, on_log: Callable[[], None] = lambda: None):
        super().__init__("wandb")
        self.runs: dict[str, SimpleNamespace] = {}
        self.options: list[dict[str, Any]] = []
        self._on_init, self._on_log = on_init, on_log

    def init(self, **options: Any) -> SimpleNamespace:
        self._on_init()
        self.options.append(options)
        rows: list[dict[str, Any]] = []
        axes: list[tuple[str, dict[str, str]]] = []
        run = SimpleNamespace(rows=rows, axes=axes, summary={}, finished=0)

        def log(row: dict[str, Any]) -> None:
            self._on_log()
            run.rows.append(dict(row))

        def finish() -> None:
            run.finished += 1

        run.log, run.finish = log, finish
        run.define_metric = lambda name, **axis: run.axes.append((name, axis))
        return self.runs.setdefault(options["id"], run) if options["resume"] == "allow" else run


def installed(monkeypatch: pytest.MonkeyPatch, **hooks: Callable[[], None]) -> StandIn:
    stand_in = StandIn(**hooks)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return stand_in


def test_a_resumed_run_goes_on_and_nothing_is_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in, workdir = installed(monkeypatch), tmp_path / "demo"
    with WandbWriter(workdir, CONFIG) as killed:
        for step in (2, 4, 6):
            killed.write(step, {"loss/scannet": 1.0 / step, "gradient_norm": float("nan"), "psi/mean": None})
    # Goes on from a checkpoint of step 4, is evaluated, and takes steps 6 and 8.
    with WandbWriter(workdir, CONFIG) as going_on:
        for step in (4, 6, 8):
            going_on.write(step, {"loss/scannet": 1.0 / step})
        going_on.write(8, {"loss/scannet": 0.125, "mAP@0.25/scannet": 0.5})  # the line of the step again
        level = {"iou": 0.25, "mAP": 0.5, "AP": {"chair": 0.5, "sofa": None}}
        going_on.summarize({"scannet": {"thresholds": [level]}})
    ((run_id, run),) = stand_in.runs.items()
    assert run.rows == [{"step": step, "loss/scannet": 1.0 / step} for step in (2, 4, 6, 8)] + [
        {"step": 8, "mAP@0.25/scannet": 0.5}
    ]
    assert run.summary == {"evaluation/mAP@0.25/scannet": 0.5, "evaluation/AP@0.25/scannet/chair": 0.5}
    assert run.axes[:2] == [("step", {}), ("*", {"step_metric": "step"})] and run.finished == 2
    assert [options["id"] for options in stand_in.options] == [run_id] * 2
    assert json.loads((workdir / "wandb.json").read_text())["id"] == run_id
    first = stand_in.options[0]
    assert (first["project"], first["name"], first["dir"]) == ("h2a2_jax", "demo", str(workdir))
    assert from_json(json.dumps(first["config"])) == CONFIG and "mode" not in first  # WANDB_MODE decides


def test_scores_of_an_evaluation_that_a_kill_prevented_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in = installed(monkeypatch)
    with WandbWriter(tmp_path, CONFIG) as killed:
        killed.write(4, {"loss/scannet": 1.0})
    with WandbWriter(tmp_path, CONFIG) as going_on:
        going_on.write(4, {"loss/scannet": 1.0, "mAP@0.25/scannet": 0.5})
    ((_, run),) = stand_in.runs.items()
    assert run.rows == [{"step": 4, "loss/scannet": 1.0}, {"step": 4, "mAP@0.25/scannet": 0.5}]


def test_the_environment_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in = installed(monkeypatch)
    for name in ("PROJECT", "NAME", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", f"/my/{name}")
    WandbWriter(tmp_path, CONFIG).close()
    assert [stand_in.options[0][key] for key in ("project", "name", "dir")] == ["/my/PROJECT", "/my/NAME", "/my/DIR"]


def fail() -> None:
    raise ConnectionError("no network\nsecond line")


@pytest.mark.parametrize("hook", ["on_init", "on_log"])
def test_a_failure_is_said_once_and_ends_nothing(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    installed(monkeypatch, **{hook: fail})
    with WandbWriter(tmp_path, CONFIG) as writer:
        writer.write(1, {"a": 1.0})
    writer.write(2, {"a": 1.0})
    assert capsys.readouterr().out == (
        "W&B gets no more metrics (ConnectionError: no network); metrics.jsonl has them.\n"
    )
    assert json.loads((tmp_path / "wandb.json").read_text())["step"] in (-1, 1)


def test_one_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    free = threading.Event()
    stand_in = installed(monkeypatch, on_init=lambda: free.wait(60) and None)
    monkeypatch.setattr(wandb_writer, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(wandb_writer, "_WAITING", 2)
    with WandbWriter(tmp_path, CONFIG) as writer:
        for step in range(100):
            writer.write(step, {"a": 1.0})
    assert "did not take all of the metrics within 0.05 s" in capsys.readouterr().out and not stand_in.options
    free.set()


def test_one_that_is_too_slow_loses_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    free = threading.Event()
    stand_in = installed(monkeypatch, on_init=lambda: free.wait(60) and None)
    monkeypatch.setattr(wandb_writer, "_WAITING", 2)
    with WandbWriter(tmp_path, CONFIG) as writer:
        for step in range(5):
            writer.write(step, {"a": 1.0})
        free.set()
    ((_, run),) = stand_in.runs.items()
    assert [row["step"] for row in run.rows] == [0, 1]
    assert "W&B was too slow for 3 lines of metrics" in capsys.readouterr().out


def test_without_the_package_a_run_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (None, ModuleType("wandb")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(InputError, match=r"has 'wandb', .* pip install 'h2a2_jax\[wandb\]', or leave"):
            train(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loggers_are_words_of_the_config_that_may_change(monkeypatch: pytest.MonkeyPatch):
    assert tiny().train.loggers == ("tensorboard",) and changes(tiny(), CONFIG) == []
    text = to_json(CONFIG)
    assert from_json(text) == CONFIG
    with pytest.raises(InputError, match=r"train.loggers.1 is 'wanddb'; expected one of 'tensorboard', 'wandb'"):
        from_json(text.replace('"wandb"', '"wanddb"'))
    old = json.loads(text)
    del old["train"]["loggers"]
    stored: ExperimentConfig = from_json(json.dumps(old))
    assert stored.train.loggers == ("tensorboard",)
