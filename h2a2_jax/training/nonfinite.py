"""Steps in which something was not finite: named, counted, kept for replay, and the end of a run of nothing else.

The step itself leaves the state as it was (`h2a2_jax.training.step`). What it reports is looked at one step later, when
the device is at work on the next one, so that looking takes no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from h2a2_jax.inputs.pipeline import JointStep, JointStream
from h2a2_jax.training.distributed import is_main, say
from h2a2_jax.training.kept_batch import FOLDER, KeptCell, write_batch
from h2a2_jax.training.parameter_groups import place_of
from h2a2_jax.training.step import StepMetrics

_MOST_KEPT = 20
_FIRST_SAID = 10


class NonFiniteError(Exception):
    """So many steps in a row were skipped that the run ends."""


@dataclass
class NonFiniteWatch:
    """Looks at what the steps report.

    Attributes:
        workdir: of the run.
        datasets: names, in the order of the dataset axis.
        tensors: what the columns of `StepMetrics.nonfinite` stand for.
        stream: the batches are drawn from it again.
        most_in_row: skipped steps in a row that end the run.
        skipped: steps skipped so far, as far as they were looked at.
    """

    workdir: Path
    datasets: Sequence[str]
    tensors: Sequence[str]
    stream: JointStream
    most_in_row: int
    skipped: int = 0
    _pending: tuple[int, StepMetrics] | None = None
    _said: int = field(default=0)

    def see(self, item: JointStep, metrics: StepMetrics) -> None:
        """Look at the batch before this one.

        Args:
            item: the batch.
            metrics: what the step reports, still on the device.

        Raises:
            NonFiniteError: so many steps in a row were skipped.
        """
        before, self._pending = self._pending, (item.step, metrics)  # not the batch, which fills memory
        if before is not None:
            self._look(*before)

    def look(self) -> None:
        """Look at the last batch now; waits for the device.

        Raises:
            NonFiniteError: so many steps in a row were skipped.
        """
        before, self._pending = self._pending, None
        if before is not None:
            self._look(*before)

    def _look(self, number: int, metrics: StepMetrics) -> None:
        found, self.skipped, in_row = jax.device_get((metrics.nonfinite, metrics.skipped, metrics.skipped_in_row))
        if not found.any():
            return
        drawn = self.stream.cells(number)
        cells = [KeptCell.of(self.datasets[d], cell) for (d, _), cell in sorted(drawn.items())]
        path = self._keep(number, cells)
        bad = {self.datasets[d] for d in np.flatnonzero(found.any(1)).tolist()}
        if self._said < _FIRST_SAID:
            if is_main() or any(cell.dataset in bad for cell in cells):  # who loads the scans knows their names
                print(self._sentence(number, found, cells, path), flush=True)
        elif self._said == _FIRST_SAID:
            say("Further batches that are not finite are counted (skipped_steps in metrics.jsonl), not named.")
        self._said += 1
        if in_row >= self.most_in_row:
            raise NonFiniteError(
                f"{in_row} steps in a row were not finite, so that the run ends; its parameters are those from before "
                f"them. Look at one of them again with: python run.py --mode=replay --workdir={self.workdir}"
            )

    def _sentence(self, number: int, found: np.ndarray, cells: list[KeptCell], path: Path) -> str:
        parts = []
        for d in np.flatnonzero(found.any(1)).tolist():
            columns = [name for name, bad in zip(self.tensors, found[d], strict=True) if bad]
            places = places_of(columns)
            scans = [suspects(cell) for cell in cells if cell.dataset == self.datasets[d]]
            where = "; ".join(filter(None, scans)) or "scans of another process"
            parts.append(f"{', '.join(places)} of {self.datasets[d]} ({where})")
        return f"Batch {number} is not finite and is skipped: {'; '.join(parts)}. It is kept in {path}."

    def _keep(self, number: int, cells: list[KeptCell]) -> Path:
        """Writes the batch; the oldest of many give way, for the last ones are those that end a run."""
        folder = self.workdir / FOLDER
        if jax.process_count() > 1:
            folder /= f"process{jax.process_index()}"
        others = sorted(folder.glob("*.npz"), key=lambda path: int(path.stem))
        for path in others[: max(0, len(others) + 1 - _MOST_KEPT)]:
            path.unlink()
        path = folder / f"{number}.npz"
        write_batch(path, cells)
        return path


def suspects(cell: KeptCell) -> str:
    """The scans of a cell of which an input is not finite; else all of them."""
    names = cell.bad_inputs()
    if names:
        return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} values that are not finite"
    return f"scans {', '.join(cell.names)}" if cell.names else ""


def places_of(columns: Sequence[str]) -> list[str]:
    """Where something is not finite, in few words: the loss, gradients by part of the network, statistics."""
    of_gradients = dict.fromkeys(place_of(name) for name in columns if name not in ("loss", "statistics"))
    parts = ["the loss"] if "loss" in columns else []
    parts += [f"the gradients of {', '.join(of_gradients)}"] if of_gradients else []
    return parts + (["the running statistics"] if "statistics" in columns else [])
