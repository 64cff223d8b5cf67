"""Metrics of a run for Weights & Biases, an optional package, sent by a thread beside the training."""

import contextlib
import json
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from h2a2_jax.config import ExperimentConfig, to_json
from h2a2_jax.distributed import say
from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json, whole_file

RECORD = "wandb.json"
"""In the workdir: {"version": 1, "id", "step", "names"}, the run's id and the last line that was given to W&B."""
_VERSION = 1
_PROJECT = "h2a2_jax"
_WAITING = 1000
"""Lines that wait for W&B; further ones are left out."""
CLOSE_SECONDS = 10.0
"""Time that the end of a run waits for W&B. Short, for a job that gets SIGTERM may be killed after 30 seconds."""


def wandb_module() -> ModuleType:
    """Import the package wandb.

    Raises:
        InputError: it is not installed.
    """
    sentence = (
        "train.loggers has 'wandb', whose package cannot be imported ({}): pip install 'h2a2_jax[wandb]', or leave "
        "'wandb' out."
    )
    try:
        import wandb
    except ImportError as error:
        raise InputError(sentence.format(error)) from error
    if not hasattr(wandb, "init"):  # a folder of this name, as W&B itself leaves behind, is a module too
        raise InputError(sentence.format("there is only a folder of this name"))
    return wandb


class WandbWriter(contextlib.AbstractContextManager):
    """Send lines of metrics to one run of Weights & Biases, which a resumed training continues.

    All calls of the package are made by a thread, in order, and `write` only hands a line over: a W&B that is slow,
    hangs or fails costs lines there and a warning, never time or the training. `metrics.jsonl` has every line.

    Each value of a step is sent once. A resumed training takes the steps after its checkpoint again; what W&B was given
    of them before stays, which is the same, for a step is a function of its number and the seed. The steps are W&B's
    metric "step", so that its own count of lines has no meaning.

    The environment chooses where the run goes: WANDB_MODE (offline), WANDB_PROJECT ("h2a2_jax" by default),
    WANDB_ENTITY, WANDB_NAME (the name of the workdir by default), WANDB_RUN_GROUP, WANDB_DIR (the workdir by default).

    Args:
        workdir: folder of the run, which keeps the id of W&B's run in `wandb.json`.
        config: the run's configuration, which W&B shows.

    Raises:
        InputError: the package is not installed.
        OSError: the workdir cannot be written to.
    """

    def __init__(self, workdir: Path, config: ExperimentConfig):
        self._wandb = wandb_module()
        self._path = workdir / RECORD
        found = read_json(self._path)
        is_known = isinstance(found, dict) and found.get("version") == _VERSION
        new = {"version": _VERSION, "id": secrets.token_hex(4), "step": -1, "names": []}
        self._record: dict[str, Any] = found if is_known else new
        self._save_record()
        self._options = {
            "project": os.environ.get("WANDB_PROJECT", _PROJECT),
            "name": os.environ.get("WANDB_NAME", workdir.resolve().name),
            "dir": os.environ.get("WANDB_DIR", str(workdir)),
            "id": self._record["id"],
            "resume": "allow",
            "config": json.loads(to_json(config)),
            "allow_val_change": True,  # a resumed training may have another config
            # The output stays the run's own, nobody is asked for a key, and an exit waits for uploads as long as close.
            "settings": {"console": "off", "login_timeout": CLOSE_SECONDS, "finish_timeout": CLOSE_SECONDS},
        }
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | dict[str, float] | None] = queue.Queue(_WAITING)
        self._left_out = 0
        self._failed = False
        self._thread = threading.Thread(target=self._send_all, name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand over the values of one step, without those that are None or not finite.

        Args:
            step: optimiser steps done.
            values: numbers by name.
        """
        self._hand_over((int(step), _finite(values)))

    def summarize(self, documents: Mapping[str, Any]) -> None:
        """Hand over an evaluation.json for W&B's summary: mAP and the AP of every class, 0 to 1.

        The names are "evaluation/mAP@<IoU>/<dataset>" and "evaluation/AP@<IoU>/<dataset>/<class>".
        """
        values: dict[str, Any] = {}
        for dataset, document in documents.items():
            for level in document["thresholds"]:
                values[f"evaluation/mAP@{level['iou']:g}/{dataset}"] = level["mAP"]
                for name, value in level["AP"].items():
                    values[f"evaluation/AP@{level['iou']:g}/{dataset}/{name}"] = value
        self._hand_over(_finite(values))

    def close(self) -> None:
        """Wait until W&B has everything, at most `CLOSE_SECONDS`, and say what it does not have."""
        end = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=0 if self._failed else CLOSE_SECONDS)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._failed:
            return  # which the thread has said
        if self._thread.is_alive():
            say(f"W&B did not take all of the metrics within {CLOSE_SECONDS:g} s; metrics.jsonl has them.")
        elif self._left_out:
            say(f"W&B was too slow for {self._left_out} lines of metrics; metrics.jsonl has them.")

    def _hand_over(self, item: tuple[int, dict[str, float]] | dict[str, float]) -> None:
        if self._failed:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._left_out += 1

    def _send_all(self) -> None:
        """Send what is handed over until `close`; run by the thread."""
        try:
            run = self._wandb.init(**self._options)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            while (item := self._waiting.get()) is not None:
                if isinstance(item, tuple):
                    self._send(run, *item)
                else:
                    run.summary.update(item)
            run.finish()
        except Exception as error:  # whatever W&B raises, the training goes on
            self._failed = True
            reason = (str(error).splitlines() or [""])[0]
            say(f"W&B gets no more metrics ({type(error).__name__}: {reason}); metrics.jsonl has them.")

    def _send(self, run: Any, step: int, values: dict[str, float]) -> None:
        """Send the values of a step that were not sent before."""
        if step < self._record["step"]:
            return
        if step > self._record["step"]:
            self._record |= {"step": step, "names": []}
        fresh = {name: value for name, value in values.items() if name not in self._record["names"]}
        if fresh:
            run.log({"step": step, **fresh})
            self._record["names"] += fresh
            self._save_record()

    def _save_record(self) -> None:
        with whole_file(self._path) as part:
            part.write_text(json.dumps(self._record) + "\n")

    def __exit__(self, *exception: object) -> None:
        self.close()


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    known = {name: float(value) for name, value in values.items() if value is not None}
    return {name: value for name, value in known.items() if math.isfinite(value)}
