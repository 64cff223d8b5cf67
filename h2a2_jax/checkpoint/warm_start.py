"""Start a new run's detector from another run's checkpoint (fine-tuning), and report what was loaded.

    parameter or statistic    starts as the checkpoint's
    shared by the datasets    of the same path; a selection's shared kernel also as the plain kernel of the same place,
                              so that TR3D is a start for H2A2
    a dataset's own           of the same path and dataset name, or of the same path and shared there (neck, norms)
    columns of one label space  of the same class name
    a dataset's statistics    of the same path and dataset name; of a dataset that the checkpoint does not know, as the
                              mean over the checkpoint's datasets

An array without a counterpart of its shape stays as it was initialised, as the embedding, the kernels and the head of a
new dataset do. Between kinds of detectors heads have no counterparts: arrays of equal name and shape mean other numbers
of a box, read from the features of another neck. Statistics are the exception: behind mean 0 and variance 1 trained
kernels are far off until training has moved them. Scans of unseen datasets are run on the mean statistics, too
(`DatasetContext.mean`). If exclusive kernels start as a copy of the shared one (`exclusive_init`), those without a
counterpart copy the loaded one. The optimiser starts anew.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2a2_jax.checkpoint.parameter_groups import place_of
from h2a2_jax.checkpoint.store import CheckpointStore, StoredModel, existing_place
from h2a2_jax.checkpoint.train_state import merge_model, split_model
from h2a2_jax.checkpoint.tree import (
    Arrays,
    describe_array,
    filled,
    flat_names,
    stacked,
    stored_params,
    stored_statistics,
)
from h2a2_jax.errors import InputError
from h2a2_jax.models import DetectorConfig, DetectorNetwork, kind_of
from h2a2_jax.scans.label_space import union_classes
from h2a2_jax.scans.specs import DatasetSpec, plain_name

_SHARED = ""
"""Key of the shared arrays in dicts by dataset name."""


class ArrayName(NamedTuple):
    """Path in the detector of a parameter or a running statistic, and its dataset: "" if it is shared."""

    path: str
    dataset: str = _SHARED
    note: str = ""  # for the report, as on a shape that does not fit


@dataclass(frozen=True)
class WarmStart:
    """Report of a warm start: fates of the arrays of the detector, and arrays of the checkpoint that were not used."""

    source: str  # the checkpoint, in words
    loaded: tuple[ArrayName, ...]
    averaged: tuple[ArrayName, ...]  # statistics of datasets that the checkpoint does not know: the mean over its own
    initialised: tuple[ArrayName, ...]  # which the checkpoint does not have
    other_shape: tuple[ArrayName, ...]  # of another shape, dtype or meaning in the checkpoint; initialised too
    left_over: tuple[ArrayName, ...]
    left_datasets: tuple[str, ...]  # datasets of the checkpoint that the detector does not have

    def text(self) -> str:
        """The number of loaded arrays, and every path that was not loaded, with alternatives in shell braces.

        For datasets of the checkpoint that the detector does not have, the number of arrays only.
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
    """Number of arrays by place or dataset, as in "stem 3, neck 18, of scannet 50"."""
    counts = Counter(f"of {name.dataset}" if name.dataset else place_of(name.path) for name in names)
    return ", ".join(f"{group} {count}" for group, count in counts.items())


def _section(title: str, names: Sequence[ArrayName]) -> Iterator[str]:
    if names:
        yield f"{title} ({_counts(names)}):"
    for note in dict.fromkeys(name.note for name in names):
        for datasets, *parts in _products([(n.dataset, *n.path.split(".")) for n in names if n.note == note]):
            path = ".".join(part[0] if len(part) == 1 else f"{{{','.join(part)}}}" for part in parts)
            of_datasets = f" of {', '.join(datasets)}" if datasets != (_SHARED,) else ""
            yield f"  {path}{of_datasets}{f' ({note})' if note else ''}"


def _products(rows: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Write distinct rows of words as few products of alternatives, as shells expand {a,b}.{c,d}."""
    products: list[tuple[tuple[str, ...], ...]] = [tuple((word,) for word in row) for row in rows]
    for place in reversed(range(max(map(len, rows)))):
        # Rows that are equal except for this place become one.
        merged: dict[tuple, list[tuple[str, ...]]] = {}
        for row in products:
            merged.setdefault((row[:place], row[place + 1 :]), []).append(row[place] if place < len(row) else ())
        products = [
            (*before, tuple(itertools.chain(*here)), *after) if any(here) else before
            for (before, after), here in merged.items()
        ]
    return products


def warm_start(
    model: DetectorNetwork, specs: Sequence[DatasetSpec], path: str | Path, step: int | None = None
) -> tuple[DetectorNetwork, WarmStart]:
    """Load everything from a checkpoint that fits a detector.

    Args:
        model: the detector as it was initialised; not changed.
        specs: its datasets in the order of the dataset axis.
        path: the folder of a run, the "checkpoints" in it, or the folder of one step in that.
        step: number of the checkpoint; None: that of the path, or the last one.

    Raises:
        InputError: there is no such checkpoint or it cannot be read; no parameter in it fits; or it selects its kernels
            and the model does not, whose backbone would then be initialised among trained norms.
    """
    place = existing_place(path)
    with CheckpointStore(place.directory) as store:
        stored = store.restore_arrays(place.step if step is None else step)
    source = f"checkpoint of step {stored.step} in {place.directory}"
    selection = model.config.selection
    if stored.config.model.selection is not None and selection is None:
        raise InputError(
            f"The {source} selects its kernels and this model does not, for which its shared kernels alone are another "
            "detector's: give a model.selection, or a checkpoint that was trained without one."
        )
    graph, exclusive, shared, stats = split_model(model)
    params, statistics = stored_params(shared, exclusive, specs), stored_statistics(stats, specs)
    ours = _by_dataset(params["shared"], params["datasets"], statistics)
    copies = selection is not None and selection.exclusive_init == "copy"
    start, report = _match(ours, stored, specs, model.config, copies, f"the {source}")
    if not any(name.path not in statistics.get(name.dataset, {}) for name in report.loaded):
        raise InputError(
            f"No parameter of the {source} has the name and the shape of one of this model: give the config that it "
            "was trained with, or another checkpoint."
        )
    names = [spec.name for spec in specs]

    def refilled(tree: Any) -> Any:
        own = {name: {path: start[name][path] for path in flat_names(tree)} for name in names}
        return filled(tree, stacked(own, names))

    return merge_model(graph, refilled(exclusive), filled(shared, start[_SHARED]), refilled(stats)), report


def _by_dataset(shared: Arrays, own: Mapping[str, Arrays], statistics: Mapping[str, Arrays]) -> dict[str, Arrays]:
    return {_SHARED: shared, **{name: {**own[name], **statistics[name]} for name in own}}


def _match(
    ours: Mapping[str, Arrays],
    stored: StoredModel,
    specs: Sequence[DatasetSpec],
    model: DetectorConfig,
    copies: bool,
    source: str,
) -> tuple[dict[str, Arrays], WarmStart]:
    """Find a start for every array of a detector, by dataset and path.

    `copies` is True if exclusive kernels without a counterpart copy shared ones.
    """
    theirs = _by_dataset(stored.shared, stored.datasets, stored.statistics)
    classes = {spec.name: spec.classes for spec in specs}
    if model.label_space == stored.config.model.label_space == "union":
        theirs[_SHARED] = _columns_by_name(ours[_SHARED], theirs[_SHARED], specs, stored.config.specs)
    other_classes = {s.name for s in stored.config.specs if s.name in classes and s.classes != classes[s.name]}
    means = {
        path: np.stack([arrays[path] for arrays in stored.statistics.values()]).mean(0)
        for path in next(iter(stored.statistics.values()))
    }
    start = {dataset: dict(arrays) for dataset, arrays in ours.items()}
    used: set[tuple[str, str]] = set()
    found: dict[str, list[ArrayName]] = defaultdict(list)
    for dataset, path in [(dataset, path) for dataset, arrays in ours.items() for path in arrays]:
        counterparts = [(d, p) for d, p in _counterparts(dataset, path, copies) if p in theirs.get(d, {})]
        if counterparts:
            kind, sources = "loaded", counterparts[:1]
            value = theirs[sources[0][0]][sources[0][1]]
        elif dataset not in theirs and path in means:
            kind, sources = "averaged", [(d, path) for d in stored.datasets]
            value = means[path]
        else:
            found["initialised"].append(ArrayName(path, dataset))
            continue
        used.update(sources)
        own, note = ours[dataset][path], ""
        if path.startswith("heads.") and stored.config.model.kind != model.kind:
            kind, note = "other_shape", f"of {kind_of(stored.config.model).title}"
        elif dataset in other_classes and path.startswith("heads.class_"):
            kind, note = "other_shape", "of other classes"
        elif (value.shape, value.dtype) != (own.shape, own.dtype):
            kind, note = "other_shape", f"{describe_array(value)} in the checkpoint, {describe_array(own)} here"
        else:
            start[dataset][path] = value
        found[kind].append(ArrayName(path, dataset, note))
    fates = ("loaded", "averaged", "initialised", "other_shape")
    return start, WarmStart(
        source=source,
        **{fate: tuple(found[fate]) for fate in fates},
        left_over=tuple(ArrayName(p, d) for d, arrays in theirs.items() for p in arrays if (d, p) not in used),
        left_datasets=tuple(name for name in stored.datasets if name not in ours),
    )


def _columns_by_name(
    ours: Arrays, theirs: Arrays, specs: Sequence[DatasetSpec], stored: Sequence[DatasetSpec]
) -> Arrays:
    """Give the class columns of a stored label space the places of ours; those of new classes are ours."""
    here, there = ({plain_name(name): i for i, name in enumerate(union_classes(each))} for each in (specs, stored))
    common = [name for name in here if name in there]
    moved = dict(theirs)
    for path in (path for path in theirs if path.startswith("heads.class_") and common):
        moved[path] = ours[path].copy()
        moved[path][..., [here[name] for name in common]] = theirs[path][..., [there[name] for name in common]]
    return moved


def _counterparts(dataset: str, path: str, copies: bool) -> list[tuple[str, str]]:
    """Dataset and path of the arrays of a checkpoint that an array may start as, best first."""
    layer, _, parameter = path.rpartition(".")
    found = [(dataset, path), (_SHARED, path)]
    if layer.endswith(".conv") and (parameter == "shared" or (parameter == "exclusive" and copies)):
        found += [(_SHARED, f"{layer}.shared"), (_SHARED, f"{layer}.kernel")]
    return found
