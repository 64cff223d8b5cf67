"""A run's metrics for TensorBoard, which `metrics.jsonl` holds for programs; written without TensorFlow."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

FOLDER = "tensorboard"
"""In the workdir of a run."""


class TensorBoardWriter:
    """Writes scalars to an event file of its own; `tensorboard --logdir=<folder>` shows those of all files as one run.

    Every line is on the disk when `write` returns, so that a killed run leaves its metrics behind. A run that goes on
    tells TensorBoard to forget the steps after its checkpoint, which it takes again: none is shown twice.

    Args:
        folder: of the event files, <workdir>/tensorboard; made if missing.
        first_step: optimiser steps done before this process; 0 for a new run.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    # tensorboardX's own writers hand events to a thread, which a kill ends with what it holds, and name the file by the
    # second, so that a run which goes on within one overwrites it: here are its records and messages alone.
    def __init__(self, folder: str | Path, first_step: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: ten digits of seconds first, as all writers have them.
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{os.getpid()}"
        self.path = folder / name
        self._records = RecordWriter(str(self.path))
        self._write(file_version="brain.Event:2")
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write the scalars of one step; what is None or not finite is left out.

        Args:
            step: optimiser steps done.
            values: numbers by name; a slash groups them, as in "loss/scannet".

        Raises:
            ValueError: the writer was closed.
            OSError: the disk is full, or the folder is gone.
        """
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._write(step=int(step), summary=Summary(value=scalars))
        self._records.flush()

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
