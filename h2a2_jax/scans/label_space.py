"""One label space for several datasets: the union of their classes by name (UniDet3D, Kolodiazhnyi et al., AAAI 2025).

Classes are one if their names are, without case, blanks, hyphens and underscores: the "trash can" of one dataset is the
"trash_can" of another. A dataset's classes are columns of the union, whose order depends on the names alone.
"""

from collections.abc import Sequence

from h2a2_jax.scans.specs import Augmentation, CountSampling, DatasetSpec, plain_name

UNION = "union"
"""Name of the head that predicts every class of a label space."""


def union_columns(specs: Sequence[DatasetSpec]) -> tuple[tuple[int, ...], ...]:
    """Columns of each dataset's classes in the union of all, which is sorted by plain name."""
    plain = [[plain_name(name) for name in spec.classes] for spec in specs]
    column = {name: i for i, name in enumerate(sorted({name for names in plain for name in names}))}
    return tuple(tuple(column[name] for name in names) for names in plain)


def union_classes(specs: Sequence[DatasetSpec]) -> tuple[str, ...]:
    """Names of the classes of the union, in the order of its columns."""
    return union_spec(specs, union_columns(specs)).classes


def head_specs(specs: Sequence[DatasetSpec], label_space: str) -> tuple[DatasetSpec, ...]:
    """Specs of the heads of a detector: those of its datasets, and of one label space that of the union."""
    return (*specs, union_spec(specs, union_columns(specs))) if label_space == "union" else tuple(specs)


def union_spec(specs: Sequence[DatasetSpec], columns: Sequence[Sequence[int]]) -> DatasetSpec:
    """Spec of a dataset that has every class of the union: how scans of no dataset are predicted.

    Names may be others than those that the columns are sorted by (`specs.renamed`). Of several spellings of a class the
    first in alphabetical order stands; its head level is that of the first dataset in the order of their names. Boxes
    turn if those of a dataset do.
    """
    names: dict[int, set[str]] = {}
    levels: dict[int, int] = {}
    for spec, own in sorted(zip(specs, columns, strict=True), key=lambda pair: pair[0].name):
        for name, level, column in zip(spec.classes, spec.label_to_level, own, strict=True):
            names.setdefault(column, set()).add(name)
            levels.setdefault(column, level)
    return DatasetSpec(
        name=UNION,
        classes=tuple(min(names[column]) for column in sorted(names)),
        has_yaw=any(spec.has_yaw for spec in specs),
        label_to_level=tuple(levels[column] for column in sorted(names)),
        color_scale=1.0,
        repeats=1,
        augmentation=Augmentation(0.5, 0.5, 0.02, (0.9, 1.1), 0.1),
        train_sampling=CountSampling(100_000),
        test_sampling=CountSampling(100_000),
    )
