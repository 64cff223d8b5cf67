"""What became of the arrays of a detector that starts with a checkpoint's, as values and in words."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from h2a2_jax.training.parameter_groups import place_of


class ArrayName(NamedTuple):
    """A parameter or a running statistic, shared or of one dataset.

    Attributes:
        path: in the detector.
        dataset: whose it is; "" where it is shared.
        note: what else is to be said of it.
    """

    path: str
    dataset: str = ""
    note: str = ""


@dataclass(frozen=True)
class WarmStart:
    """What was loaded from a checkpoint and what was not.

    Attributes:
        source: the checkpoint, in words.
        loaded: arrays of the detector that are those of the checkpoint.
        averaged: statistics of datasets that the checkpoint does not know: the mean over its own.
        initialised: arrays of the detector that the checkpoint does not have.
        other_shape: arrays of the detector that have another shape, type or meaning there; initialised too.
        left_over: arrays of the checkpoint that went nowhere.
        left_datasets: datasets of the checkpoint that the detector does not have.
    """

    source: str
    loaded: tuple[ArrayName, ...]
    averaged: tuple[ArrayName, ...]
    initialised: tuple[ArrayName, ...]
    other_shape: tuple[ArrayName, ...]
    left_over: tuple[ArrayName, ...]
    left_datasets: tuple[str, ...]

    def text(self) -> str:
        """Counts of what was loaded, and every path of what was not, with alternatives in braces as shells have them.

        Of datasets of the checkpoint that the detector does not have, the number of arrays only.
        """
        total = sum(map(len, (self.loaded, self.averaged, self.initialised, self.other_shape)))
        lines = [f"Warm start from {self.source}: {len(self.loaded)} of {total} arrays loaded: {_counts(self.loaded)}."]
        if self.averaged:
            lines.append(f"Statistics that start as the mean over the checkpoint's datasets: {_counts(self.averaged)}.")
        left = [name for name in self.left_over if name.dataset not in self.left_datasets]
        lines += _section("Initialised, for the checkpoint does not have them", self.initialised)
        lines += _section("Initialised, for those of the checkpoint do not fit", self.other_shape)
        lines += _section("Left over in the checkpoint", left)
        for dataset in self.left_datasets:
            count = sum(name.dataset == dataset for name in self.left_over)
            lines.append(f"Left over in the checkpoint: {count} arrays of {dataset}, which is not in this run.")
        return "\n".join(lines)


def _counts(names: Sequence[ArrayName]) -> str:
    """As in "stem 3, neck 18, of scannet 50"."""
    counts = Counter(f"of {name.dataset}" if name.dataset else place_of(name.path) for name in names)
    return ", ".join(f"{group} {count}" for group, count in counts.items())


def _section(title: str, names: Sequence[ArrayName]) -> list[str]:
    if not names:
        return []
    lines = [f"{title} ({_counts(names)}):"]
    for note in dict.fromkeys(name.note for name in names):
        for datasets, *parts in _products([(n.dataset, *n.path.split(".")) for n in names if n.note == note]):
            path = ".".join(part[0] if len(part) == 1 else f"{{{','.join(part)}}}" for part in parts)
            whose = f" of {', '.join(datasets)}" if datasets != ("",) else ""
            lines.append(f"  {path}{whose}{f' ({note})' if note else ''}")
    return lines


def _products(rows: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Different rows of words as few rows of alternatives that multiply out to them."""
    products: list[tuple[tuple[str, ...], ...]] = [tuple((word,) for word in row) for row in rows]
    for place in reversed(range(max(map(len, rows)))):
        # Those that are equal but for this place become one.
        merged: dict[tuple, list[tuple[str, ...]]] = {}
        for row in products:
            merged.setdefault((row[:place], row[place + 1 :]), []).append(row[place] if place < len(row) else ())
        products = [
            (*before, tuple(itertools.chain(*here)), *after) if any(here) else before
            for (before, after), here in merged.items()
        ]
    return products
