"""Files of points: a reader for each format, and the choice of rows of a large table, read block by block."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

_BLOCK = 1 << 20  # rows
_SEED = 0


class Thinning:
    """Choice of rows of a table: one at random out of each of `most` equal parts, all of a table of no more rows.

    A table of a given length always gives the same rows, so that points and colours in two tables stay paired.

    Attributes:
        left_out: number of rows that were not read of the last table.

    Args:
        most: largest number of rows; None: all.
    """

    def __init__(self, most: int | None = None):
        self._most = most
        self.left_out = 0

    def rows(self, count: int) -> Int[np.ndarray, " k"] | None:
        """Return the numbers of the rows to read, rising; None for all of them."""
        if self._most is None or count <= self._most:
            self.left_out = 0
            return None
        self.left_out = count - self._most
        edges = np.arange(self._most + 1, dtype=np.int64) * count // self._most
        within = np.random.default_rng(_SEED).random(self._most)
        return edges[:-1] + (within * np.diff(edges)).astype(np.int64)

    def collect(self, read: Callable[[int], np.ndarray], count: int) -> np.ndarray:
        """Read a table block by block and keep the wanted rows.

        Args:
            read: returns that many next rows.
            count: rows of the table.
        """
        wanted, parts = self.rows(count), []
        for first in range(0, count, _BLOCK):
            size = min(_BLOCK, count - first)
            block = read(size)
            if wanted is not None:
                start, end = np.searchsorted(wanted, (first, first + size))
                block = block[wanted[start:end] - first]
            parts.append(block)
        return np.concatenate(parts) if parts else read(0)

    def read(self, file: Any, dtype: np.dtype, count: int, columns: int = 1) -> np.ndarray:
        """Read rows of a binary file from its position on, and leave it behind the table.

        Args:
            file: open for reading bytes; it need not be seekable.
            dtype: of an entry.
            count: rows of the table.
            columns: entries in a row; the result has two axes if there are several.

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
            yield from (line for _, line in zip(range(count), lines, strict=False))
            return
        position = 0
        for row in wanted.tolist():
            for line in lines:
                position += 1
                if position > row:
                    yield line
                    break
            else:
                return

    def kept(self, count: int) -> int:
        """Return the number of rows read of a table."""
        return count if self._most is None else min(count, self._most)


def count_lines(open_file: Callable[[], Any]) -> int:
    """Count the lines of a text that are not blank, without keeping it."""
    with open_file() as file:
        return sum(bool(line.strip()) for line in file)
