"""Columns without names: which are coordinates and which colours, by their values.

The first three columns are x, y, z, or those after a row number, a label, a time or a scanner's row and column. Three
neighbours behind them are colours if they are whole numbers from 0 to 255 (or to 65535, with channels alike), or
fractions from 0 to 1 (or to 255); they are normals if their rows have the length one. Whatever is not plain is put into
words, in the names of --columns, or refused.
"""

from pathlib import Path

import numpy as np

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud
from h2a2_jax.scans.formats.columns import COLUMNS_NOT_USED, Layout, by_layout, check_width, from_columns

WIDTHS = tuple(range(3, 17))
"""Numbers of columns that are looked into."""

_SAMPLE = 20_000  # rows
_FEW_ROWS = 10  # which may rise by chance
_UNIT = 0.02  # by which the length of a normal may differ from 1
_ALIKE = 20.0  # largest quotient of the brightest numbers of two channels of more than 255
_FEW_VALUES = 64  # labels have no more
_EARLIEST = 1e5  # s; times are larger, counted from any usual day or week
_CLOSER = 0.25  # difference of correlations that is no chance


def from_rows(
    path: Path, rows: np.ndarray, columns: Layout | None = None, what: str = "its array", *, explain: bool = False
) -> RawCloud:
    """Take points and colours from an array, structured or [n, w].

    Args:
        path: file, for the sentences.
        rows: the array.
        columns: meaning of the columns, which settles it.
        what: name of the array in an error message.
        explain: True to remark on the decision even if it is the plain one.

    Raises:
        InputError: the array has another shape or type, or its columns do not tell what they are.
    """
    if rows.dtype.names:
        raw = from_columns(path, _flat_fields(rows.reshape(-1)))
        return raw.remarked(after=[COLUMNS_NOT_USED] * bool(columns))
    if rows.dtype.kind not in "fiu":
        raise InputError(f"{path}: {what} has the type {rows.dtype}; expected are real numbers.")
    if rows.ndim != 2 or rows.shape[1] < 3:
        raise InputError(f"{path}: {what} has the shape {rows.shape}; expected are rows x, y, z or x, y, z, r, g, b.")
    if columns:
        check_width(path, columns, rows.shape[1])
        return by_layout(rows, columns)
    if rows.dtype == np.uint8:
        raise InputError(f"{path}: {what} holds bytes, as colours are; expected are coordinates x, y, z.")
    layout, reason = guess_layout(path, rows, is_pts=path.suffix.lower() == ".pts")
    is_obvious = reason is None and not explain
    return by_layout(rows, layout).remarked(*[_sentence(layout, reason)] * (not is_obvious))


def _flat_fields(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Fields of a structured array; a field of several numbers gives one with a number behind its name for each."""
    fields = {}
    for name in rows.dtype.names or ():
        if rows[name].ndim == 1:
            fields[name] = rows[name]
        elif rows[name].ndim == 2:
            fields |= {f"{name}:{i}": rows[name][:, i] for i in range(rows[name].shape[1])}
    return {name: values for name, values in fields.items() if values.dtype.kind in "fiu"}


def _sentence(layout: Layout, reason: str | None) -> str:
    reasons = [*filter(None, [reason]), *["_ not used"] * ("_" in layout)]
    because = f" ({', '.join(reasons)})" if reasons else ""
    return f"has {len(layout)} columns without names, taken as {', '.join(layout)}{because}; --columns settles it"


def guess_layout(path: Path, rows: np.ndarray, *, is_pts: bool = False) -> tuple[Layout, str | None]:
    """Decide what the columns of [n, w] rows are, with the reason, or None for plain x, y, z or x, y, z, r, g, b.

    `is_pts` says that intensity goes before the colours if the values leave it open, as in files of Leica's format.

    Raises:
        InputError: the values leave it open.
    """
    width = rows.shape[1]
    if width == 3 or not len(rows):
        return ("x", "y", "z", *"_" * (width - 3)), None
    some = rows[:: max(1, len(rows) // _SAMPLE)].astype(np.float64)
    some = some[np.isfinite(some).all(axis=1)]
    start, first = (0, None) if width == 6 else _find_start(some)
    if width > WIDTHS[-1]:
        raise _undecided(path, width, "which are too many")
    colors, reason = _find_colors(path, some, start, is_pts)
    layout = ["_"] * width
    layout[start : start + 3] = "xyz"
    if colors is not None:
        layout[colors : colors + 3] = "rgb"
    return tuple(layout), ", ".join(filter(None, (first, reason))) or None


def _find_start(some: np.ndarray) -> tuple[int, str | None]:
    """Return the place of x behind columns that are no coordinates, and what these are.

    They are row numbers; or whole numbers, such as labels, or rows and columns of a scanner, before three columns of
    fractions; or times, which rise and are far larger than what follows.
    """
    if _is_row_number(some):
        return 1, "the first counts the rows"
    if len(some) < _FEW_ROWS:
        return 0, None
    has_fractions = (some != np.rint(some)).mean(axis=0) > 0.5
    varies = np.array([len(np.unique(column)) > 2 for column in some[:, :2].T])
    for start in range(1, min(2, some.shape[1] - 3) + 1):
        is_whole = not (some[:, :start] != np.rint(some[:, :start])).any()
        if is_whole and varies[:start].all() and has_fractions[start : start + 3].all():
            return start, f"the first{' two' * (start > 1)} of whole numbers"
    places = np.abs(np.median(some[:, :4], axis=0))
    if len(places) > 3 and (np.diff(some[:, 0]) >= 0).all() and places[0] > _EARLIEST > 10 * places[1:].max():
        return 1, "the first rises as times do"
    return 0, None


def _find_colors(path: Path, some: np.ndarray, start: int, is_pts: bool) -> tuple[int | None, str | None]:
    """Return the first of three columns of colours behind x, y, z from `start` on, None without, and the reason."""
    width = some.shape[1]
    if width - start < 6 or not len(some):
        is_packed = bool((some[:, start + 3 :] > 65535).any())
        few = "too few for colours, unless one is packed: then name it rgb" if is_packed else "too few for colours"
        return None, None if width == start + 3 else few
    triples = {place: some[:, place : place + 3] for place in range(start + 3, width - 2)}
    normals = next((place for place, triple in triples.items() if _is_normal(triple)), None)
    # The last three of six are hardly anything else: in an unusual range they are refused as colours.
    most = 65535.0 if width == 6 else 280.0
    places = [place for place, triple in triples.items() if _is_color(triple, most)]
    if normals is not None:
        places = [place for place in places if abs(place - normals) >= 3]
    if not places and normals is not None:
        return None, "the unit vectors are normals"
    if not places and width - start == 6:
        raise _undecided(path, width, "whose last three are neither colours nor normals")
    if not places:
        return None, "no three of them look like colours"
    place = places[0] if len(places) == 1 else _choose(some, places, is_pts)
    if place is None:
        shown = " or ".join(f"{place + 1} to {place + 3}" for place in places)
        raise _undecided(path, width, f"of which {shown} may be the colours")
    if width > 6:
        return place, "colours by their values"
    return place, None if _is_plain(path, some) else "with values unlike those of colours"


def _undecided(path: Path, width: int, why: str) -> InputError:
    example = quoted(",".join(("x", "y", "z", *"_" * (width - 6), "r", "g", "b")[: max(width, 6)]), 60)
    return InputError(
        f"{path} has {width} columns without names, {why}: say what they are with --columns, as in {example} (_ for "
        "one that is not used)."
    )


def _is_row_number(some: np.ndarray) -> bool:
    """Return True if the first column rises by whole numbers; of few rows, from 0 or 1 by 1 beside fractions."""
    first = some[:, 0]
    steps = np.diff(first)
    if len(first) < 3 or first[0] < 0 or (first != np.rint(first)).any() or (steps <= 0).any():
        return False
    by_one = bool(first[0] <= 1 and (steps == 1).all() and (some[:, 1:4] != np.rint(some[:, 1:4])).any())
    return by_one or len(first) >= _FEW_ROWS


def _is_normal(triple: np.ndarray) -> bool:
    """Return True for rows of length one, which colours could have by chance only if all are 0 or 1."""
    lengths = np.linalg.norm(triple, axis=1)
    some = lengths > 0
    is_unit = some.mean() > 0.5 and (np.abs(lengths[some] - 1) < _UNIT).mean() > 0.9
    return bool(is_unit and ((triple < 0).any() or (triple != np.rint(triple)).any()))


def _is_color(triple: np.ndarray, most: float) -> bool:
    """Return True for columns of the same kind in a range of colours, fractions in one up to `most`."""
    if triple.min() < 0:
        return False
    whole = (triple == np.rint(triple)).all(axis=0)
    tops = np.percentile(triple, 99, axis=0, method="higher")
    high = triple.max()
    if whole.all() and high <= 255:
        return True
    if high <= 1.1 and not whole.all():  # one channel may be 0 or 1 everywhere
        return all(
            not is_whole or (column == column[0]).all() for is_whole, column in zip(whole, triple.T, strict=True)
        )
    same = whole.all() or not whole.any()
    return bool(
        same and high <= (65535 if whole.all() else most) and tops.min() > 0 and tops.max() < _ALIKE * tops.min()
    )


def _is_plain(path: Path, some: np.ndarray) -> bool:
    """Return True if the last of six columns are not only possible but likely colours.

    Raises:
        InputError: the first three are rather the colours.
    """
    whole = (some == np.rint(some)).all(axis=0)
    if whole[:3].all() and not whole[3:].any() and some[:, :3].min() >= 0 and 1 < some[:, :3].max() <= 255:
        raise _undecided(path, 6, "the first three of which look like colours")
    counts = [len(np.unique(column)) for column in some[:, 3:].T]
    return min(counts) > _FEW_VALUES or 2 * min(counts) >= max(counts)


def _choose(some: np.ndarray, places: list[int], is_pts: bool) -> int | None:
    """Choose between triples that overlap, as where intensity or a label stands beside bytes of colours; None if open.

    Labels and alpha have few values, brightness is a mean of the colours, and channels are related to one another more
    than to anything else.
    """
    if is_pts and places == [places[0], places[0] + 1]:
        return places[1]
    counts = {column: len(np.unique(some[:, column])) for column in range(places[0], places[-1] + 3)}
    most = max(counts.values())
    few = {column for column, count in counts.items() if count <= _FEW_VALUES and 2 * count < most}
    places = [p for p in places if not few & {p, p + 1, p + 2}] or places
    if len(places) == 1 or len(some) < _FEW_ROWS:
        return places[0] if len(places) == 1 else None
    is_pair = places == [places[0], places[0] + 1]
    if is_pair and _is_brightness(some[:, places[0]], some[:, places[1] : places[1] + 3]):
        return places[1]
    if is_pair and _is_brightness(some[:, places[1] + 2], some[:, places[0] : places[0] + 3]):
        return places[0]
    kinships = {p: _kinship(some[:, p : p + 3]) for p in places}
    best, second = sorted(places, key=lambda p: -kinships[p])[:2]
    return best if kinships[best] - kinships[second] > _CLOSER else None


def _is_brightness(column: np.ndarray, triple: np.ndarray) -> bool:
    """Return True for a weighted mean of three columns."""
    weights = np.linalg.lstsq(triple, column, rcond=None)[0]
    is_mean = weights.min() > -0.1 and 0.8 < weights.sum() < 1.2
    return bool(is_mean and np.std(column - triple @ weights) < 0.1 * np.std(column))


def _kinship(triple: np.ndarray) -> float:
    """Smaller correlation of neighbouring channels; 0 if one is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        related = np.abs(np.corrcoef(triple.T))
    return float(np.nan_to_num(min(related[0, 1], related[1, 2])))
