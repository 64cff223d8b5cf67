"""Buckets: few sets of static shapes for batches whose numbers of sites differ.

Shapes are static to the compiler, scans are not. All levels of a network are coupled to one scalar ladder (a rung
multiplies every capacity by the same ratio), so that a run compiles a handful of shapes and not one per combination
of levels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np

from h2a2_jax.errors import InputError

SizesT = TypeVar("SizesT", bound=tuple[int, ...])


@dataclass(frozen=True)
class BucketLadder(Generic[SizesT]):
    """Capacities by rung: those of rung r are base * ratio**r, rounded up to whole blocks of rows.

    Sizes and capacities are tuples with one number a level (`level_sizes`); a NamedTuple stays one.

    Attributes:
        base: capacities of rung 0.
        ratio: from one rung to the next, above 1.
        max_rung: highest rung that training may use; a batch that does not fit it is cropped.
    """

    base: SizesT
    ratio: float = 1.25
    max_rung: int = 8

    _BLOCK = 64

    def __post_init__(self) -> None:
        if not self.ratio > 1:
            raise InputError(f"a ladder of ratio {self.ratio} does not rise; choose one above 1, such as 1.25.")

    def capacities(self, rung: int) -> SizesT:
        """Capacities of a rung; at least one block of rows a level."""
        factor = self.ratio**rung
        sizes = (int(-(-max(size, 1) * factor // self._BLOCK) * self._BLOCK) for size in self.base)
        return _like(self.base, sizes)

    def rung(self, sizes: SizesT, limit: int | None = None) -> int | None:
        """Lowest rung that these sizes fit; None if it lies above the limit.

        Raises:
            InputError: the sizes have another number of levels than the ladder.
        """
        if len(sizes) != len(self.base):
            raise InputError(
                f"the ladder has {len(self.base)} levels, the sizes {len(sizes)}; measure a ladder for each network."
            )
        rung = 0
        while any(size > capacity for size, capacity in zip(sizes, self.capacities(rung), strict=True)):
            rung += 1
            if limit is not None and rung > limit:
                return None
        return rung

    def fit(self, sizes: SizesT) -> SizesT:
        """Capacities of the lowest rung that these sizes fit, however high it is."""
        return self.capacities(cast(int, self.rung(sizes)))

    @classmethod
    def measured(
        cls,
        sizes: Sequence[SizesT] | Sequence[Sequence[SizesT]],
        scans: int = 1,
        *,
        lowest: str = "usual",
        **options: Any,
    ) -> "BucketLadder[SizesT]":
        """A ladder from samples of what is to fit.

        Level by level the base holds the mean of the batch's sum plus three of its standard deviations, for whichever
        dataset needs most: nearly every batch is of one shape. Where batches differ much, as those of one scan do,
        that pads most of them heavily; `lowest="smallest"` begins at the smallest ones and makes more shapes.

        Args:
            sizes: of some sample batches; or for each dataset the sizes of some of its single scans.
            scans: how many samples a batch holds: 1 where samples are batches.
            lowest: what rung 0 holds, the "usual" batch or the "smallest".
            options: ratio and max_rung.

        Raises:
            InputError: there is no sample.
            ValueError: `lowest` is neither.
        """
        if lowest not in ("usual", "smallest"):
            raise ValueError(f"lowest is {lowest!r}, expected 'usual' or 'smallest'.")
        # A sample is a tuple of numbers; a dataset is a sequence of such tuples.
        flat = any(len(s) and np.ndim(s[0]) == 0 for s in sizes)
        datasets = cast(Sequence[Sequence[SizesT]], [sizes] if flat else [s for s in sizes if len(s)])
        if not datasets:
            raise InputError("a ladder is measured on samples, given none; pass the sizes of at least one batch.")
        tables = [np.asarray(s, np.float64) for s in datasets]
        means, spreads = [t.mean(0) * scans for t in tables], [3 * t.std(0) * scans**0.5 for t in tables]
        base = np.max([mean + spread for mean, spread in zip(means, spreads, strict=True)], 0)
        if lowest == "smallest":  # levels in their usual proportion
            usual = np.maximum(np.mean(means, 0), 1)
            least = [t.min(0) * scans for t in tables]
            lows = [np.maximum(a, b - c) for a, b, c in zip(least, means, spreads, strict=True)]
            base = usual * min((low / usual).max() for low in lows)
        return cls(_like(datasets[0][0], np.ceil(base).astype(int).tolist()), **options)


def _like(example: SizesT, sizes: Iterable[int]) -> SizesT:
    """The numbers as a tuple of the example's type."""
    kind: Any = type(example)
    return cast(SizesT, kind(*sizes) if hasattr(kind, "_fields") else tuple(sizes))
