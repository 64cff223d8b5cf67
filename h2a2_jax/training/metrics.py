"""What a run tells about itself: a file of metrics for programs, a line of progress for people."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from h2a2_jax.host import duration
from h2a2_jax.training.json_lines import JsonLinesWriter, read_json_lines

FILE_NAME = "metrics.jsonl"
SCHEMA_VERSION = 1


class MetricsWriter:
    """Writes `metrics.jsonl`, one JSON object a logged step, and appends to it when a run goes on.

    Schema, version 1. Each line is an object of its own:

    - "step": int, optimiser steps done; always the first key. Of two lines of one step the later one counts: where an
      evaluation follows, the line is written once more with its scores.
    - "version": int, the version of this schema; always the second key.
    - any further key: the value of a metric, a number or null. A slash parts a metric from what it is of, as in
      "loss/scannet". Null stands for a value that is not finite, which JSON cannot express.

    Every line is flushed when written, so that a killed run leaves its metrics behind. A last line that a kill cut
    short is dropped when the run goes on.

    Args:
        workdir: folder of the run; made if missing.
    """

    def __init__(self, workdir: str | Path):
        self._lines = JsonLinesWriter(Path(workdir) / FILE_NAME, SCHEMA_VERSION)
        self.path = self._lines.path

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of one step.

        Args:
            step: optimiser steps done.
            metrics: numbers by name, None for one that is not known; arrays of one element count as numbers and
                are fetched from their device here.

        Raises:
            ValueError: if a metric is no single number or is named as a key of the schema.
        """
        self._lines.write(step, {name: _number(name, value) for name, value in metrics.items()})

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._lines.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float | int | None]]:
    """The lines of a run's `metrics.jsonl` in the order of their steps, as `MetricsWriter` describes them.

    Raises:
        InputError: a line is damaged or of another version.
    """
    return read_json_lines(Path(workdir) / FILE_NAME, SCHEMA_VERSION)


class Progress:
    """A line of progress on standard error: step of total, loss, scans per second, time taken and time left.

    In a terminal the line is updated in place; in a log a new line is printed at most every `interval` seconds, and
    always for the last step. Time left extrapolates from the steps of this process, so a run that goes on from step 900
    of 1000 is not thought fast.

    Args:
        total_steps: steps of the whole run.
        first_step: steps done before this process, for a run that goes on.
        interval: seconds between two lines of a log.
    """

    def __init__(self, total_steps: int, first_step: int = 0, interval: float = 30.0):
        self._total, self._first, self._interval = total_steps, first_step, interval
        self._scans = 0
        self._start = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if terminal else None

    def update(self, step: int, loss: float, scans: int) -> None:
        """Report a step.

        Args:
            step: steps done, this one included.
            loss: the loss to show.
            scans: scans that were trained on since the last call.
        """
        self._scans += scans
        now = time.monotonic()
        elapsed = now - self._start
        rate = self._scans / max(elapsed, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} scans/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= self._total or now - self._last_line >= self._interval:
            self._last_line = now
            left = elapsed / max(step - self._first, 1) * (self._total - step)
            print(
                f"step {step}/{self._total}  loss {loss:.4f}  {rate:.1f} scans/s  "
                f"elapsed {duration(elapsed)}  left {duration(left)}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _number(name: str, value: Any) -> float | int | None:
    if value is None:
        return None
    array = np.asarray(value)
    # Kind V is bfloat16 and its like.
    if array.size != 1 or array.dtype.kind not in "iufV":
        raise ValueError(f"metric {name!r} is {value!r}, expected a single number; reduce or leave it out")
    number = array.item()
    return number if math.isfinite(number) else None
