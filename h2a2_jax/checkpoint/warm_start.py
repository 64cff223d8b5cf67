"""Start from parts of another run's checkpoint, and report what was taken.

Fine-tuning: a new run's detector starts with what another run's checkpoint holds for it.

    its parameter             starts as the checkpoint's
    shared by the datasets    of the same path; a selection's shared kernel also as the plain kernel of the same place,
                              which is how TR3D becomes the start of H2A2
    a dataset's own           of the same path and dataset name, or of the same path and shared there (neck, norms)
    a dataset's statistics    of the same path and dataset name; of a dataset that the checkpoint does not know, as the
                              mean over the checkpoint's datasets

What is not found there, or does not fit, stays as it was initialised: a new dataset's embedding, kernels and head too.
Statistics cannot, for behind mean 0 and variance 1 trained kernels are far off until training has moved them; their
mean is also what scans of unseen datasets are run on (`DatasetContext.mean`). Where exclusive kernels are to start as a
copy of the shared one (`exclusive_init`), those not found copy the loaded one. The optimiser starts anew.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2a2_jax.checkpoint.parameter_groups import place_of
from h2a2_jax.checkpoint.store import CheckpointStore, StoredModel, checkpoint_place
from h2a2_jax.checkpoint.train_state import merge_model, split_model
from h2a2_jax.checkpoint.tree import Arrays, filled, flat_names, stacked, stored_params, stored_statistics
from h2a2_jax.errors import InputError
from h2a2_jax.models import TR3D
from h2a2_jax.scans.specs import DatasetSpec


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


__all__ = ["ArrayName", "WarmStart", "warm_start"]

_SHARED = ""
"""In place of a dataset's name."""


def warm_start(
    model: TR3D, specs: Sequence[DatasetSpec], path: str | Path, step: int | None = None
) -> tuple[TR3D, WarmStart]:
    """A detector with what a checkpoint holds for it.

    Args:
        model: as it was initialised; is left as it is.
        specs: of its datasets, in the order of the dataset axis.
        path: the folder of a run, the "checkpoints" in it, or the folder of one step in that.
        step: of the checkpoint; None: that of the path, or the last.

    Returns:
        The detector, and what was loaded and what was not.

    Raises:
        InputError: there is no such checkpoint or it cannot be read; no parameter in it fits; or it selects its kernels
            and the model does not, whose backbone would then be initialised among trained norms.
    """
    stored, source = _read(Path(path), step)
    selection = model.config.selection
    if stored.config.model.selection is not None and selection is None:
        raise InputError(
            f"The {source} selects its kernels and this model does not, for which its shared kernels alone are another "
            "detector's: give a model.selection, or a checkpoint that was trained without one."
        )
    graph, exclusive, shared, stats = split_model(model)
    params, statistics = stored_params(shared, exclusive, specs), stored_statistics(stats, specs)
    ours = _by_owner(params["shared"], params["datasets"], statistics)
    copies = selection is not None and selection.exclusive_init == "copy"
    start, report = _matched(ours, stored, {spec.name: spec.classes for spec in specs}, copies, source)
    if not any(name.path not in statistics.get(name.dataset, {}) for name in report.loaded):
        raise InputError(
            f"No parameter of the {source} has the name and the shape of one of this model: give the config that it "
            "was trained with, or another checkpoint."
        )
    names = [spec.name for spec in specs]

    def refilled(tree: Any) -> Any:
        own = {name: {path: start[name][path] for path in flat_names(tree)} for name in names}
        return filled(tree, stacked(own, names, tree))

    return merge_model(graph, refilled(exclusive), filled(shared, start[_SHARED]), refilled(stats)), report


def _read(path: Path, step: int | None) -> tuple[StoredModel, str]:
    """A checkpoint, and in words which."""
    if not path.is_dir():
        raise InputError(
            f"{path} is no folder: give the folder of a run, its checkpoints or one of them; weights of other programs "
            "are turned into one by `python -m h2a2_jax.convert.tr3d_weights`."
        )
    place = checkpoint_place(path)
    with CheckpointStore(place.directory) as store:
        stored = store.restore_arrays(place.step if step is None else step)
    return stored, f"checkpoint of step {stored.step} in {place.directory}"


def _by_owner(shared: Arrays, own: Mapping[str, Arrays], statistics: Mapping[str, Arrays]) -> dict[str, Arrays]:
    return {_SHARED: shared, **{name: {**own[name], **statistics[name]} for name in own}}


def _matched(
    ours: Mapping[str, Arrays],
    stored: StoredModel,
    classes: Mapping[str, tuple[str, ...]],
    copies: bool,
    source: str,
) -> tuple[dict[str, Arrays], WarmStart]:
    """Arrays by owner and path as they are after a warm start.

    Args:
        ours: as they were initialised.
        stored: the checkpoint.
        classes: of our datasets.
        copies: whether exclusive kernels that are not found copy shared ones.
        source: the checkpoint in words.
    """
    theirs = _by_owner(stored.shared, stored.datasets, stored.statistics)
    other_classes = {s.name for s in stored.config.specs if s.name in classes and s.classes != classes[s.name]}
    means = _mean_statistics(stored)
    start = {owner: dict(arrays) for owner, arrays in ours.items()}
    used: set[tuple[str, str]] = set()
    loaded: list[ArrayName] = []
    averaged: list[ArrayName] = []
    initialised: list[ArrayName] = []
    other_shape: list[ArrayName] = []
    for owner, path in [(owner, path) for owner, arrays in ours.items() for path in arrays]:
        is_unknown = owner != _SHARED and owner not in theirs
        places = [place for place in _places(owner, path, copies) if place[1] in theirs.get(place[0], {})]
        if places:
            value = theirs[places[0][0]][places[0][1]]
            used.add(places[0])
        elif is_unknown and path in means:
            value = means[path]
            used.update((dataset, path) for dataset in stored.datasets)
        else:
            initialised.append(ArrayName(path, owner))
            continue
        own = ours[owner][path]
        if owner in other_classes and path.startswith("heads.class_"):
            other_shape.append(ArrayName(path, owner, "of other classes"))
        elif (value.shape, value.dtype) != (own.shape, own.dtype):
            note = f"{_form(value)} in the checkpoint, {_form(own)} here"
            other_shape.append(ArrayName(path, owner, note))
        else:
            start[owner][path] = value
            (loaded if places else averaged).append(ArrayName(path, owner))
    left = [ArrayName(path, owner) for owner in theirs for path in theirs[owner] if (owner, path) not in used]
    return start, WarmStart(
        source=f"the {source}",
        loaded=tuple(loaded),
        averaged=tuple(averaged),
        initialised=tuple(initialised),
        other_shape=tuple(other_shape),
        left_over=tuple(left),
        left_datasets=tuple(name for name in stored.datasets if name not in ours),
    )


def _places(owner: str, path: str, copies: bool) -> list[tuple[str, str]]:
    """Where an array may be found in a checkpoint, owner and path, best first."""
    layer, _, parameter = path.rpartition(".")
    places = [(owner, path), (_SHARED, path)]
    kernels = [(_SHARED, f"{layer}.shared"), (_SHARED, f"{layer}.kernel")]
    if layer.endswith(".conv") and (parameter == "shared" or (parameter == "exclusive" and copies)):
        places += kernels
    return places


def _mean_statistics(stored: StoredModel) -> Arrays:
    """Running statistics by path, averaged over the checkpoint's datasets."""
    of_each = list(stored.statistics.values())
    return {path: np.stack([arrays[path] for arrays in of_each]).mean(0) for path in of_each[0]}


def _form(array: np.ndarray) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
