"""A batch that a run kept because something in it was not finite, run again: where does it begin?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import merge_model, split_model
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import pad_batch
from h2a2_jax.losses import detection_loss
from h2a2_jax.models import PlanLayout
from h2a2_jax.sparse import SparseTensor
from h2a2_jax.training.gradients import Targets
from h2a2_jax.training.nonfinite import KeptCell, kept_batches, places_of, read_batch


@dataclass(frozen=True)
class CellReplay:
    """What running a dataset's scans of a kept batch gave.

    Attributes:
        dataset: name.
        scans: names.
        bad_inputs: scans of which a colour or a box is not finite.
        loss: of the batch; NaN or infinite where it is not finite.
        first: what the network computed first that is not finite, by the name of the layer; None: all was finite.
        places: where else something is not finite: the loss, gradients by part of the network, running statistics.
    """

    dataset: str
    scans: tuple[str, ...]
    bad_inputs: tuple[str, ...]
    loss: float
    first: str | None
    places: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.bad_inputs or self.first or self.places)

    def text(self) -> str:
        """In a sentence or two."""
        head = f"{self.dataset} ({', '.join(self.scans)}): loss {self.loss:.6g}"
        if self.is_finite:
            return f"{head}, everything is finite."
        parts = [f"not finite among the inputs: {', '.join(self.bad_inputs)}"] if self.bad_inputs else []
        parts += [f"first in the network: {self.first}"] if self.first else []
        parts += [f"not finite: {', '.join(self.places)}"] if self.places else []
        return f"{head}; {'; '.join(parts)}."


class Replay(NamedTuple):
    """What running a kept batch again gave.

    Attributes:
        number: of the batch.
        step: of the checkpoint whose parameters it was run with.
        cells: what each dataset's scans on each device gave, as if each device had its dataset alone.
    """

    number: int
    step: int
    cells: list[CellReplay]


def replay(workdir: Path, number: int | None = None) -> Replay:
    """Run a kept batch again, in training mode, with the newest parameters saved before its step or right after it.

    Skipped steps change no parameter, so that those of a run which ended for them are the ones they were met with.
    Where no checkpoint is as old, the oldest one is taken.

    Args:
        workdir: of the run.
        number: of the batch; None: the last one kept.

    Raises:
        InputError: there is no such batch, or no checkpoint.
    """
    kept = kept_batches(workdir)
    numbers = [*kept]
    if not numbers:
        raise InputError(f"{workdir} has no kept batch: nothing was not finite in that run, or --workdir is another.")
    number = numbers[-1] if number is None else number
    if number not in numbers:
        listed = ", ".join(map(str, numbers))
        raise InputError(f"{workdir} has no kept batch {number}; there are those of {listed} (--step).")
    cells = [cell for path in kept[number] for cell in read_batch(path)]
    with CheckpointStore(workdir / "checkpoints") as store:
        batches = store.stored_config(store.existing(None)).optim.accumulate_steps
        step = checkpoint_of(number // batches, store.steps())
        detector, config = store.restore_model(step, averaged=False)
    return Replay(number, step, [_replayed(detector, config, cell) for cell in cells])


def checkpoint_of(step: int, saved: Sequence[int]) -> int:
    """Of rising steps that are saved, the one whose parameters are those of a step, counted from 0, that was skipped.

    The newest saved before it or right after it; where all are later, the oldest.
    """
    return max((before for before in saved if before <= step + 1), default=saved[0])


def _replayed(detector: Any, config: ExperimentConfig, cell: KeptCell) -> CellReplay:
    names = config.dataset_names
    index = names.index(cell.dataset)
    host = cell.batch()
    batch = jax.tree.map(
        jnp.asarray, pad_batch(host, host.tables.sizes, max(host.num_boxes, 1), PlanLayout.of(config.model))
    )
    targets = jax.tree.map(lambda leaf: leaf[index], Targets.of(config.specs))
    graph, exclusive, shared, stats = split_model(detector)

    def loss(shared: Any, exclusive: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        seen: dict[str, jax.Array] = {}

        def tap(name: str, value: Any) -> None:
            rows = value.features if isinstance(value, SparseTensor) else value
            valid = value.sites.valid[:, None] if isinstance(value, SparseTensor) else True
            seen[name] = jnp.isfinite(jnp.where(valid, rows, 0)).all()

        context = ForwardContext(
            DatasetContext.one(index, len(names)),
            training=True,
            dtype=None if config.train.precision == "float32" else jnp.dtype(config.train.precision),
            tap=tap,
        )
        model = merge_model(graph, exclusive, shared, jax.tree.map(jnp.copy, stats))
        out = model(batch.features, batch.plan, context)
        losses = detection_loss(
            out.locations, out.scan, out.level, out.boxes, out.logits, batch.boxes, batch.labels,
            targets.label_to_level, targets.class_mask, targets.has_yaw,
        )  # fmt: skip
        return losses.total, (seen, split_model(model)[3])

    with_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, (seen, new_stats)), grads = with_gradients(shared, exclusive)
    finite = [bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads)]
    bad = [name for name, ok in zip([*flat_names(shared), *flat_names(exclusive)], finite, strict=True) if not ok]
    bad += [] if all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new_stats)) else ["statistics"]
    bad += [] if np.isfinite(value) else ["loss"]
    first = next((name for name, ok in seen.items() if not ok), None)
    return CellReplay(cell.dataset, cell.names, cell.bad_inputs(), float(value), first, tuple(places_of(bad)))
