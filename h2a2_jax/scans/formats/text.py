"""Tables of points as text, a point a line.

Names of columns decide, in a line before the numbers or in a comment; without names the values do (`unnamed`).
Blanks, tabs, commas, semicolons or bars separate; numbers may be quoted or have decimal commas; lines that begin with
#, //, % or ; are comments; a line of one whole number is the number of points, as in Leica's PTS.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud, Thinning
from h2a2_jax.scans.formats.columns import SAY_COLUMNS, Layout, check_width, from_columns, roles, unread_colors
from h2a2_jax.scans.formats.unnamed import from_rows

_HEAD = 200  # lines that are not empty
_SHORTEST_LINE, _LONGEST_LINE = 6, 1 << 16  # letters; the shortest is "1 2 3"
_MARKS = "#%;!/"  # of comments
_BLANKS = " \r\n"  # not tabs, between which numbers may be missing
_DECIMAL_COMMA = re.compile(r"[+-]?\d*(,\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_LABEL = re.compile(r"^\s*(columns|fields|format|header)\s*[:=]?\s*", re.IGNORECASE)
_COMMENT = re.compile("#(?![0-9a-fA-F]{6}\\b)|//")  # not the colour #ff8040
_PROSE = {"and", "are", "as", "by", "for", "in", "is", "of", "the", "to", "with"}  # no line of names has them
_QUOTED_DECIMAL = re.compile(r'"([+-]?\d*),(\d+(?:e[+-]?\d+)?)"', re.IGNORECASE)
_MISSING = {"", "-", "na", "n/a", "null", "none", "nodata"}


class _Form(NamedTuple):
    """Form of a table.

    Attributes:
        encoding: of the text.
        delimiter: between numbers; None for blanks.
        decimal_comma: True if numbers have decimal commas.
        quoted_comma: True if they have them within quotes, between which commas delimit.
        trailing: True if lines end with a delimiter.
        marks: letters that begin a comment.
        before: lines before the numbers, comments too.
        width: number of columns.
        points: number of points by a line before them, or None.
        numbered: True if the first column may be row numbers or names.
    """

    encoding: str
    delimiter: str | None
    decimal_comma: bool
    quoted_comma: bool
    trailing: bool
    marks: str
    before: tuple[str, ...]
    width: int
    points: int | None
    numbered: bool


def read_text(path: Path, thinning: Thinning, columns: Layout | None) -> RawCloud:
    """Read the lines that `thinning` chooses; `columns` gives the meaning of the columns, whatever their names."""
    form = _find_form(path)
    if form is None:
        return RawCloud(np.zeros((0, 3)), None)
    if columns:
        check_width(path, columns, form.width)
    names, unknown = (list(columns), ()) if columns else _find_names(path, form)
    used = roles(names).used if names else None
    rows, more = _load(path, form, thinning, used)
    if names is None:
        raw = from_rows(path, rows, None, "the table")
    else:
        table: dict[str, np.ndarray] = {}
        for i, place in enumerate(range(len(names)) if rows.shape[1] == len(names) else used or ()):
            table.setdefault(names[place] or f"column {place + 1}", rows[:, i])
        raw = from_columns(path, table)
        more += unread_colors(name for name in names if name not in table) if raw.colors is None else ()
    return raw.remarked(*["has decimal commas"] * (form.decimal_comma or form.quoted_comma), *unknown, *more)


def is_table(path: Path) -> bool:
    """Return True for a file with a line of numbers near its beginning, or one that is no text."""
    try:
        encoding, head = _read_head(path)
        return encoding is None or _find_start(head) is not None
    except OSError:
        return True


def _read_head(path: Path) -> tuple[str | None, list[str]]:
    """Return the encoding, None for bytes that are no text, and the first lines that are not empty."""
    with path.open("rb") as file:
        start = file.read(4096)
    encoding = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb": "utf-8-sig"}.get(start[:2], "utf-8")
    if encoding == "utf-8" and "\ufffd" in start.rpartition(b"\n")[0].decode(errors="replace"):
        encoding = "latin1"
    if encoding != "utf-16" and b"\0" in start:
        return None, []
    with path.open(encoding=encoding, errors="replace") as text:
        lines = (text.readline(4096).strip(_BLANKS) for _ in range(2 * _HEAD))
        return encoding, [line for line in lines if line.strip()][:_HEAD]


def _find_start(head: list[str]) -> int | None:
    """Return the place of the first line of numbers; behind names, words may stand among the numbers."""
    has_names = False
    for place, line in enumerate(head):
        delimiter, decimal = _separator(line)
        words = _words(_COMMENT.split(line)[0], delimiter, decimal)
        are_places = _are_places(words, head[place + 1 : place + 2])
        numbers = 0 if are_places or line[0] in _marks(delimiter) else sum(map(_is_number, words))
        if numbers >= 3 and (has_names or all(not word or _is_number(word) for word in words)):
            return place
        has_names = has_names or all(roles(_split_names(line)[-1]).axes)
    return None


def _find_form(path: Path) -> _Form | None:
    """Find the form by the first lines; None for a file without any.

    Raises:
        InputError: the file is no text, or has no line of numbers among them.
    """
    encoding, head = _read_head(path)
    if encoding is None:
        raise InputError(f"{path} is no text: expected is one point a line, x y z or x y z r g b.")
    if not head:
        return None
    start = _find_start(head)
    if start is None:
        raise InputError(f"{path} has no line of numbers x y z in its first {len(head)} lines.")
    before, quoted_comma = head[:start], not any("." in line for line in head[start:])
    quoted_comma = quoted_comma and any(map(_QUOTED_DECIMAL.search, head[start:]))
    if quoted_comma:
        head = [_QUOTED_DECIMAL.sub(r"\1.\2", line) for line in head]
    delimiter, decimal = _separator(head[start])
    marks = _marks(delimiter)
    sample = [line for line in head[start:] if line[0] not in marks]
    if delimiter == "\t" and len({line.count("\t") for line in sample}) > 1:
        delimiter = None
    if delimiter in (";", "|", "\t"):
        decimal = any("," in line for line in sample)
    words = _words(_COMMENT.split(head[start])[0], delimiter, decimal)
    # A word behind the last delimiter is missing everywhere, and so is its name.
    named = [names for line in before for names in _split_names(line) if len(names) == len(words) and names[-1]]
    trailing = delimiter is not None and all(line.endswith(delimiter) for line in sample) and not named
    counts = [int(line) for line in before if line.isdecimal()]
    return _Form(
        encoding,
        delimiter,
        decimal,
        quoted_comma,
        trailing,
        marks=marks,
        before=tuple(before),
        width=len(words) - trailing,
        points=counts[-1] if counts else None,
        numbered=_are_row_names([_words(line, delimiter, decimal)[0] for line in sample]),
    )


def _marks(delimiter: str | None) -> str:
    """Return the letters that begin a comment; a line may begin with a delimiter for want of a number."""
    return _MARKS.replace(delimiter or " ", "")


def _separator(line: str) -> tuple[str | None, bool]:
    """Return the delimiter (None for blanks) and True for decimal commas."""
    for mark in ";|":
        if mark in line:
            return mark, "," in line
    cells = [cell.strip() for cell in line.split("\t")]
    if len(cells) >= 3 and not any(" " in cell for cell in cells):
        return "\t", "," in line
    if "," not in line:
        return None, False
    words = line.split()
    decimal = len(words) >= 3 and all(_DECIMAL_COMMA.fullmatch(word) for word in words)
    return (None, True) if decimal else (",", False)


def _words(line: str, delimiter: str | None, decimal: bool) -> list[str]:
    words = line.replace(",", ".") if decimal else line
    return [word.strip().strip('"').strip() for word in words.split(delimiter)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _are_places(words: list[str], after: list[str]) -> bool:
    """Return True for the numbers 0, 1, 2, ... of columns before numbers with fractions, as pandas writes them."""
    places = words[1:] if words[:1] == [""] else words
    return len(places) >= 3 and places == list(map(str, range(len(places)))) and any("." in line for line in after)


def _are_row_names(words: list[str]) -> bool:
    if not all(word.isdecimal() for word in words):
        return not any(map(_is_number, words))
    return all(int(a) < int(b) for a, b in itertools.pairwise(words))


def _split_names(line: str) -> list[list[str]]:
    """Split a line into names at its delimiters, and at blanks too."""
    line = re.sub(r"[\[(][^\])]*[\])]", "", line)  # units
    line = _LABEL.sub("", line.lstrip("#%!/ \t"))
    mark = next((mark for mark in ";|,\t" if mark in line), None)
    ways = [re.findall(r'"[^"]*"|[^\s,;|]+', line)]
    if mark:
        ways.insert(0, line.split(mark))
    return [[name.strip().strip('"').strip() for name in way] for way in ways]


def _find_names(path: Path, form: _Form) -> tuple[list[str] | None, tuple[str, ...]]:
    """Find the names of the columns among the lines before the numbers, or None with a remark on names not understood.

    Raises:
        InputError: names in a line of their own lack x, y or z, or are not as many as the columns.
    """
    remarks: tuple[str, ...] = ()
    for line in reversed(form.before):
        ways, is_comment = _split_names(line), line[0] in form.marks
        for names in ways:
            names = names[:-1] if form.trailing and not names[-1] else names
            if _PROSE & {name.lower() for name in names}:
                continue
            if len(names) == form.width - 1 and form.numbered and all(roles(names).axes):
                return ["", *names], ()  # the row numbers of a data frame have no name
            if len(names) == form.width and all(roles(names).axes):
                return names, ()
        if any(all(roles(names).axes) for names in ways):
            if is_comment:
                remarks = (f"has a comment {line[:40]!r} that does not name its {form.width} columns",)
                continue
            raise InputError(
                f"{path} names the columns {quoted(', '.join(ways[0]))}, but its rows have {form.width}: {SAY_COLUMNS}."
            )
        found = next((names for names in ways if len(names) == form.width), None)
        if found and not is_comment and not any(map(_is_number, found)):
            if any(roles(found).axes) or roles(found).colors:
                raise InputError(
                    f"{path} has no x, y, z among the names of its columns ({quoted(', '.join(found))}): {SAY_COLUMNS}."
                )
            remarks = (f"has names of columns that are not understood ({', '.join(found)}): the values decide",)
    return None, remarks


def _load(path: Path, form: _Form, thinning: Thinning, used: list[int] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read the table, [n, w]; only the columns `used` of one with words or gaps in it. Remark on another count."""
    try:
        rows = _parse(path, form, thinning, None, False)
    except InputError as error:
        raise InputError(f"{path} has {error}") from error
    except (ValueError, IndexError):
        try:
            rows = _parse(path, form, thinning, used, True)
        except InputError as error:
            raise InputError(f"{path} has {error}") from error
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{path} has a line that is not numbers ({quoted(error)}): repair or remove it."
            ) from error
    total = len(rows) + thinning.left_out
    if form.points is None or form.points == total:
        return rows, ()
    return rows, (f"says {form.points:,} points and has {total:,}",)


def _parse(path: Path, form: _Form, thinning: Thinning, used: list[int] | None, patient: bool) -> np.ndarray:
    with path.open(encoding=form.encoding, errors="replace") as text:
        rows = _filled(text, form)
        if thinning.kept(size := path.stat().st_size // _SHORTEST_LINE) < size:
            with path.open(encoding=form.encoding, errors="replace") as whole:
                count = sum(1 for _ in _filled(whole, form))
            rows = thinning.lines(rows, count)
        if patient:
            rows = (_patched(line, form) for line in rows)
        return np.loadtxt(
            rows, np.float64, comments=None, delimiter=form.delimiter, ndmin=2, usecols=used, quotechar='"'
        )


def _filled(text: Iterator[str], form: _Form) -> Iterator[str]:
    """Lines of numbers as numpy parses them, without empty ones and comments."""
    stripped = (line.strip(_BLANKS) for line in text) if form.delimiter == "\t" else map(str.strip, text)
    filled = (line for line in stripped if line and line[0] not in form.marks and _is_short(line))
    for _ in range(sum(line[0] not in form.marks for line in form.before)):
        next(filled)
    if form.quoted_comma:
        filled = (_QUOTED_DECIMAL.sub(r"\1.\2", line) for line in filled)
    if form.trailing:
        filled = (line.removesuffix(form.delimiter or " ") for line in filled)
    if form.decimal_comma:
        filled = (line.replace(",", ".") for line in filled)
    if form.points is not None:  # files put together have a count before each part
        filled = (line for line in filled if not line.isdecimal())
    return filled


def _is_short(line: str) -> bool:
    """Return True, or raise InputError for a line of which numpy would make many times its size."""
    if len(line) > _LONGEST_LINE:
        raise InputError(
            f"a line of {len(line):,} letters, {line[:40]!r}..., which no point has; write a point a line."
        )
    return True


def _patched(line: str, form: _Form) -> str:
    """Cut off a comment, check the number of words, and write nan for those that stand for no number."""
    words = _COMMENT.split(line, maxsplit=1)[0].split(form.delimiter)
    if len(words) != form.width:
        raise InputError(
            f"a line that is not numbers like the others, {len(words)} in place of {form.width}: {line[:60]!r}; repair "
            "or remove it."
        )
    return (form.delimiter or " ").join("nan" if word.strip(' "').lower() in _MISSING else word for word in words)
