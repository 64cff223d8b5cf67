"""The frame of a file: its up axis and unit as the user or the file says, else as the points show, with remarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from h2a2_jax.scans.formats.point_cloud import PointCloud
from h2a2_jax.scans.frame import UNITS
from h2a2_jax.scans.orientation import Guess, UpVotes, guess_up, up_votes
from h2a2_jax.scans.surfaces import extents

_MEASURED = 100_000  # points
_NOWHERE = 1e12  # in any unit
_ROOM = np.log([2.0, 4.0, 5.5])  # m, the extents of a room by size
_SPREAD = 0.6
_GUESSED = ("m", "cm", "mm")
_IMPERIAL = {"m": "ft", "cm": "in"}  # what a file that seems to be in the former may be in
_HIGHEST = 6.5  # m, which the smallest extent of a scan of a room does not exceed
_UNIT_CLEAR, _UNIT_ODD = 3.0, 14.0  # half the squared deviations of extents from those of rooms


def _off_a_room(sizes: Float[np.ndarray, "3"], unit: str) -> float:
    return float(np.square((np.log(sizes * UNITS[unit]) - _ROOM) / _SPREAD).sum() / 2)


def guess_unit(declared: str, scans: Sequence[tuple[float, float, float]]) -> Guess:
    """Guess the unit in which the extents of scans, in any order of axes, are those of rooms or of parts of rooms."""
    if not scans:
        return Guess(declared, None, False, "no scan could be read")
    sizes = np.sort(np.median(np.maximum(scans, 1e-9), axis=0))
    off = {unit: _off_a_room(sizes, unit) for unit in UNITS.keys() & {*_GUESSED, declared}}
    best, second = sorted(off, key=off.__getitem__)[:2]
    is_clear = off[second] - off[best] > _UNIT_CLEAR and off[best] < _UNIT_ODD
    shown = " x ".join(f"{size:,.0f}" if size >= 100 else f"{size * (size > 1e-6):.3g}" for size in sizes)
    return Guess(declared, best if is_clear else None, is_clear, f"extents {shown}; rooms measure 2 to 8 m")


def frame_signs(
    points: Float[np.ndarray, "m 3"], unit: str = "m"
) -> tuple[tuple[float, float, float], Guess, UpVotes] | None:
    """Extents of the points of a file in its unit, a guess of the unit, declared as `unit`, and votes on the up axis.

    None of no points that could be anywhere.
    """
    points = points[:: max(1, len(points) // _MEASURED)].astype(np.float64)
    points = points[(np.abs(points) < _NOWHERE).all(axis=1)]
    if not len(points):
        return None
    sizes = extents(points)
    guess = guess_unit(unit, [sizes])
    # A wrong unit must not hide which axis points up.
    return sizes, guess, up_votes(points * UNITS[guess.guess or unit])


OPEN: Mapping[str, str] = {"up": "does not show which axis points up", "unit": "does not show its unit"}
"""Beginnings of the remarks on what is left open and assumed."""
_USUAL = {"up": "z", "unit": "m"}
_LOOKS = {"up": "{} points up", "unit": "the unit is {}"}
_TAKEN = {"up": "{} is taken to point up, by its {}", "unit": "is taken to be in {} ({})"}


def decide_frame(cloud: PointCloud, up: str, unit: str, flag: str = "--{}={}") -> tuple[str, str, list[str]]:
    """Decide which axis of a file points up and its unit, with remarks on what was decided and on what looks wrong.

    Args:
        cloud: points of the file.
        up: the axis as the user says, or "auto": as the file says, else as the points show, else z.
        unit: the unit as the user says, or "auto": as the file says, else as the points show, else metres.
        flag: form in which the remarks name an argument and its value.
    """
    signs = frame_signs(cloud.points, (cloud.unit or "m") if unit == "auto" else unit)
    if signs is None:
        usual = cloud.up or "z", cloud.unit or "m"
        return usual[0] if up == "auto" else up, usual[1] if unit == "auto" else unit, []
    sizes, of_unit, votes = signs
    length = _Decision("unit", unit, cloud.unit, of_unit, flag)
    imperial = [] if unit != "auto" or cloud.unit else _imperial(sizes, length.value, flag)
    axis = _Decision("up", up, cloud.up, guess_up("z" if up == "auto" else up, [votes]), flag)
    return axis.value, length.value, [*length.remarks, *imperial, *axis.remarks]


@dataclass(frozen=True)
class _Decision:
    """The value of "up" or "unit": what the user asks for, else the file says, else the points show, else the usual."""

    key: str
    asked: str
    said: str | None
    guess: Guess
    flag: str

    @property
    def value(self) -> str:
        """The value taken."""
        if self.asked != "auto":
            return self.asked
        return self.said or self.guess.guess or _USUAL[self.key]

    @property
    def remarks(self) -> list[str]:
        """Parts of sentences on the value, unless it is the usual one and nothing speaks against it."""
        usual, found, evidence = _USUAL[self.key], self.guess.guess, self.guess.evidence
        flag = self.flag.format(self.key, found or self.said or usual)
        if self.asked == "auto" and self.said is None:
            if found is None:
                return [f"{OPEN[self.key]} ({evidence}): {usual} is assumed; {flag} confirms it"]
            return [] if found == usual else [f"{_TAKEN[self.key].format(found, evidence)}; {flag} confirms it"]
        looks = _LOOKS[self.key].format
        remarks = []
        if self.asked == "auto" and self.value != usual:
            remarks.append(f"{looks(self.value)}, as its format says")
        if found not in (None, self.value):
            perhaps = "" if self.guess.certain else "perhaps "
            remarks.append(f"looks as if {perhaps}{looks(found)} ({evidence}): add {flag}")
        return remarks


def _imperial(extent: tuple[float, float, float], unit: str, flag: str) -> list[str]:
    """Remark on a scan taken to be in m or cm that would rather be a room in feet or inches."""
    sizes, other = np.sort(np.maximum(extent, 1e-9)), _IMPERIAL.get(unit)
    if other is None or (unit == "m" and sizes[0] <= _HIGHEST):
        return []
    off = _off_a_room(sizes, other)
    if not off < _UNIT_CLEAR < _off_a_room(sizes, unit) - off:
        return []
    shown, word = " x ".join(f"{size:.3g}" for size in sizes), {"ft": "feet", "in": "inches"}[other]
    return [f"measures {shown}, as a room in {word} does: if it is one, add {flag.format('unit', other)}"]
