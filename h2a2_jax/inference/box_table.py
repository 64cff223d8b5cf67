"""Boxes as rows of a table, `boxes.csv`.

In a file of any frame, a corner of a box is center + Q @ (+-size_x/2, +-size_y/2, +-size_z/2), Q the rotation of the
unit quaternion qw, qx, qy, qz. Texts that a spreadsheet would run as a formula begin with an apostrophe (OWASP, "CSV
injection"); numbers are as they are.
"""

import csv
import io
import re
from collections.abc import Iterable
from typing import Any

from h2a2_jax.inference.results import predicted_scan

CSV_COLUMNS = (
    *("scan", "file", "class", "label", "score"),
    *("center_x", "center_y", "center_z", "size_x", "size_y", "size_z", "yaw", "upright", "up", "unit"),
    *("qw", "qx", "qy", "qz", "dataset"),
)

# A spreadsheet that takes another separator than the comma begins a cell behind that one too; some skip blanks and
# quotes. The last four are what East Asian keyboards type.
_FORMULA = re.compile(r"(^|[;\t\r\n])(?=(?:[^\S\t\r\n]|[\"\u200b\ufeff])*[=+\-@\uff1d\uff0b\uff0d\uff20])")
_FIRST = ("\t", "\r", "\n")


def safe_cell(text: str) -> str:
    """Return a text as a spreadsheet shows it, with an apostrophe before what it would run."""
    if text.startswith(_FIRST):
        text = f"'{text}"
    return _FORMULA.sub(r"\1'", text)


def table_rows(entry: dict[str, Any]) -> list[list[str]]:
    """Rows of the boxes of a scan, given by its entry (`results.entry_of`), with the columns `CSV_COLUMNS`.

    The cells are plain: `csv_text` escapes them. The names of the classes are those of the entry.
    """
    scan = predicted_scan(entry)
    found = scan.detections
    turns = scan.quaternions.round(9)  # so that 1e-17 is 0 in the table
    upright = str(int(scan.alignment is None))
    names = (box["name"] for box in entry["boxes"])
    return [
        [
            *(scan.name, scan.file or "", name, str(int(label)), f"{score:.6g}"),
            *(f"{value:.9g}" if abs(value) < 1e5 else f"{value:.6f}" for value in box),
            *(upright, scan.up, scan.unit),
            *(f"{value + 0:.9g}" for value in turn),
            entry.get("dataset", ""),
        ]
        for box, score, label, name, turn in zip(found.boxes, found.scores, found.labels, names, turns, strict=True)
    ]


_TEXTS = tuple(CSV_COLUMNS.index(name) for name in ("scan", "file", "class", "dataset"))


def csv_header() -> str:
    """Return the first line of a table."""
    return _lines([CSV_COLUMNS])


def csv_text(entry: dict[str, Any]) -> str:
    """Return the lines of the boxes of a scan, given by its entry (`results.entry_of`), without the header.

    Lines end with CRLF (RFC 4180); line breaks inside a name are in quotes. The same entry gives the same text.
    """
    rows = table_rows(entry)
    for row in rows:
        for column in _TEXTS:
            row[column] = safe_cell(row[column])
    return _lines(rows)


def _lines(rows: Iterable[Iterable[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()
