"""Files of points: a reader for each format; points as a file has them; the choice of rows of a large table."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

_BLOCK = 1 << 20  # rows
_SEED = 0


@dataclass(frozen=True, eq=False)
class RawCloud:
    """Points as a file has them, of any real type, finite or not.

    Attributes:
        points: [n, 3] x, y, z.
        colors: [n, 3] red, green, blue, or None.
        assumed: parts of sentences on assumptions.
        up: axis that points up if the format or the file says so.
        unit: unit if the format or the file says so.
    """

    points: np.ndarray
    colors: np.ndarray | None = None
    assumed: tuple[str, ...] = ()
    up: str | None = None
    unit: str | None = None

    def remarked(self, *before: str, after: Iterable[str] = ()) -> "RawCloud":
        """Return the points with further remarks, before and after the others."""
        return replace(self, assumed=(*before, *self.assumed, *after))


class Thinning:
    """Choice of rows of a table: one at random out of each of `most` equal parts, all of a table of no more rows.

    A table of a given length always gives the same rows, so that points and colours in two tables stay paired.
    `left_out` is the number of rows that were not read of the last table; `most` None reads all.
    """

    def __init__(self, most: int | None = None):
        self.most, self.left_out = most, 0

    def rows(self, count: int) -> Int[np.ndarray, " k"] | None:
        """Return the numbers of the rows to read, rising; None for all of them."""
        self.left_out = count - self.kept(count)
        if self.most is None or not self.left_out:
            return None
        edges = np.arange(self.most + 1, dtype=np.int64) * count // self.most
        within = np.random.default_rng(_SEED).random(self.most)
        return edges[:-1] + (within * np.diff(edges)).astype(np.int64)

    def take(self, values: np.ndarray) -> np.ndarray:
        """Return the wanted rows of a table."""
        rows = self.rows(len(values))
        return values if rows is None else values[rows]

    def choose(self, blocks: Iterable[np.ndarray], count: int) -> np.ndarray:
        """Keep the wanted rows of a table of `count` rows that comes block by block, at least one."""
        wanted, first, parts = self.rows(count), 0, list[np.ndarray]()
        for block in blocks:
            end = first + len(block)
            if wanted is not None:
                block = block[wanted[slice(*np.searchsorted(wanted, (first, end)))] - first]
            parts.append(block)
            first = end
        return np.concatenate(parts)

    def collect(self, read: Callable[[int], np.ndarray], count: int) -> np.ndarray:
        """Read a table of `count` rows block by block, keep the wanted ones; `read` returns that many next rows."""
        sizes = [min(_BLOCK, count - first) for first in range(0, count, _BLOCK)]
        return self.choose(map(read, sizes or [0]), count)

    def read(self, file: Any, dtype: np.dtype, count: int, columns: int = 1) -> np.ndarray:
        """Read rows of a binary file, which need not be seekable, from its position on; leave it behind the table.

        The table has `count` rows of `columns` entries each; the result has two axes if there are several.

        Raises:
            EOFError: the file ends before.
        """

        def block(size: int) -> np.ndarray:
            content = file.read(size * columns * dtype.itemsize)
            missing = size * columns * dtype.itemsize - len(content)
            if missing:
                raise EOFError(f"{missing} bytes are missing at the end")
            return np.frombuffer(content, dtype, size * columns).reshape((-1, columns) if columns > 1 else -1)

        return block(count) if self.rows(count) is None else self.collect(block, count)

    def lines(self, lines: Iterator[Any], count: int) -> Iterator[Any]:
        """Yield the lines to read among `count`, as far as there are so many."""
        wanted = self.rows(count)
        if wanted is None:
            yield from itertools.islice(lines, count)
            return
        for passed in np.diff(wanted, prepend=-1).tolist():  # lines up to and with the wanted one
            yield from itertools.islice(lines, passed - 1, passed)

    def kept(self, count: int) -> int:
        """Return the number of rows read of a table."""
        return count if self.most is None else min(count, self.most)
