"""Guesses at the up axis and the unit of scans, from how their points spread."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from h2a2_jax.inputs.examine import AxisFinding

AXES = "xyz"
_CLEAR, _CERTAIN = 1.25, 1.6  # by how much more a slab must hold than those across the other axes
_UNIT_RANGES = (("m", 0.3, 40), ("cm", 40, 700), ("mm", 700, 40e3))
"""Middle extents of rooms and parts of rooms: one of 8 m is 8, 800 or 8000, a corner of 1 m is 1, 100 or 1000."""


@dataclass(frozen=True)
class Guess:
    """What something looks like, beside what was said.

    Attributes:
        declared: what was said.
        guess: what it looks like; None if that cannot be told.
        certain: whether there is little doubt.
        evidence: the numbers behind, in words.
    """

    declared: str
    guess: str | None
    certain: bool
    evidence: str

    @property
    def differs(self) -> bool:
        """Whether it looks like something else than was said."""
        return self.guess not in (None, self.declared)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def guess_up(declared: str, scans: Sequence[Sequence[AxisFinding]]) -> Guess:
    """Which axis points up: a floor and a ceiling are the fullest slabs, and furniture stands on the floor.

    Args:
        declared: axis that is said to, with its sign.
        scans: findings along x, y, z of each; together they are surer than each alone.
    """
    if not scans:
        return Guess(declared, None, False, "no scan could be read")
    slabs = [float(np.mean([axes[i].slab for axes in scans])) for i in range(3)]
    best = int(np.argmax(slabs))
    shares = ", ".join(f"{AXES[i]} {slabs[i]:.0%}" for i in np.argsort(slabs)[::-1])
    evidence = f"share of points in the fullest slab across an axis: {shares}"
    if slabs[best] < _CLEAR * sorted(slabs)[1]:
        return Guess(declared, None, False, f"{evidence}: no floor stands out; is it tilted?")
    votes = sum(_points_along(axes[best]) for axes in scans)
    if 2 * abs(votes) < len(scans):
        # Which end is up stays open; what was declared is as good as its opposite.
        sign = "-" if declared == f"-{AXES[best]}" else ""
    else:
        sign = "-" if votes < 0 else ""
        evidence += f"; floor or furniture at its {'high' if votes < 0 else 'low'} end"
    certain = slabs[best] >= _CERTAIN * sorted(slabs)[1]  # less may be a wall of a corridor
    return Guess(declared, sign + AXES[best], certain, evidence)


def _points_along(axis: AxisFinding) -> int:
    """1 if an axis points up, -1 if down, 0 if that cannot be told."""
    if axis.low > 3 * axis.high:
        return 1
    if axis.high > 3 * axis.low:
        return -1
    return int(axis.lower_half > 0.52) - int(axis.lower_half < 0.48)


def guess_unit(declared: str, scans: Sequence[Sequence[AxisFinding]]) -> Guess:
    """Which unit makes rooms of rooms, by the middle one of a scan's three extents.

    Args:
        declared: unit that is said to be meant.
        scans: findings along x, y, z of each.
    """
    if not scans:
        return Guess(declared, None, False, "no scan could be read")
    extents = np.median([[axis.extent for axis in axes] for axes in scans], axis=0)
    middle = float(np.sort(extents)[1])
    shown = " x ".join(f"{extent:,.0f}" if extent >= 100 else f"{extent:.3g}" for extent in extents)
    unit = next((name for name, low, high in _UNIT_RANGES if low <= middle < high), None)
    return Guess(declared, unit, unit is not None, f"median extents {shown}; rooms measure 3 to 10 m")
