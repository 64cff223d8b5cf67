"""Which datasets take part in which step."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

_BLOCK = 1024
"""Steps that are drawn together."""


class Turns:
    """Draws the datasets of each step by their weights, from the seed and the number of the step alone.

    A dataset of weight w takes part in a step with probability w, independently of the others; where that would leave
    a step without any, the one that missed its weight by the smallest factor takes part. With all weights 1 every
    dataset takes part in every step.

    Args:
        seed: another one gives other steps.
        weights: above 0 up to 1, in the order of the dataset axis.
    """

    def __init__(self, seed: int, weights: Sequence[float]):
        self._seed, self._weights = seed, np.asarray(weights, float)
        self._present: list[Bool[np.ndarray, "steps d"]] = []
        self._before: list[Int[np.ndarray, " d"]] = [np.zeros(len(weights), np.int64)]

    def present(self, step: int) -> tuple[bool, ...]:
        """Whether each dataset takes part in a step."""
        return tuple(self._block(step // _BLOCK)[step % _BLOCK].tolist())

    def before(self, dataset: int, step: int) -> int:
        """In how many of the steps before this one a dataset took part."""
        block, row = divmod(step, _BLOCK)
        return int(self._block(block)[:row, dataset].sum() + self._before[block][dataset])

    def _block(self, index: int) -> Bool[np.ndarray, "steps d"]:
        while len(self._present) <= index:
            number = len(self._present)
            draws = [
                np.random.default_rng([self._seed, d, number, 2]).random(_BLOCK) for d in range(len(self._weights))
            ]
            misses = np.stack(draws, axis=1) / self._weights
            present = misses < 1
            none = np.flatnonzero(~present.any(1))
            present[none, misses[none].argmin(1)] = True
            self._present.append(present)
            self._before.append(self._before[-1] + present.sum(0))
        return self._present[index]
