"""A table has a row for each box; spreadsheets run none of its cells; numbers stay numbers."""

import csv
import io
import itertools

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.inference.box_table import CSV_COLUMNS, csv_header, csv_text, safe_cell, table_rows
from h2a2_jax.scans.specs import own_spec
from tests.inference.entries import scan_entry

BOXES = np.array([[-1, 2, 0.5, 0.6, 0.7, 1, -0.3], [-4, 0, 1, 2, 1, 0.5, -3.1]], np.float32)
FOUND = Detections(BOXES, np.array([0.9, 0.25], np.float32), np.array([1, 0], np.int32))
HOSTILE = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", ' "=1', "a;=1", "a\n=1", "\uff1d1", "\tx")


def test_rows_are_the_boxes():
    spec = own_spec("own", ("a, b", 'say "c"'))
    entry = scan_entry("room", np.eye(4), FOUND, spec, file="below/room.ply")
    text = csv_header() + csv_text(entry)
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    assert tuple(head) == CSV_COLUMNS and rows == table_rows(entry) and text == csv_header() + csv_text(entry)
    assert rows[0][:8] == ["room", "below/room.ply", 'say "c"', "1", "0.9", "-1", "2", "0.5"]
    turn = [np.cos(-0.15), 0, 0, np.sin(-0.15)]
    assert rows[0][11:15] == ["-0.3", "1", "z", "m"] and np.allclose([float(cell) for cell in rows[0][15:19]], turn)
    assert rows[0][19:] == [spec.name]
    assert (
        csv_text(scan_entry("none", np.eye(4), Detections(BOXES[:0], FOUND.scores[:0], FOUND.labels[:0]), spec)) == ""
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_formulas_are_escaped(text: str):
    safe = safe_cell(text)
    # Whatever separates cells and lines, none begins with what is run.
    for separators in itertools.chain.from_iterable(itertools.combinations(";\t\r\n", count) for count in range(5)):
        cells = [safe]
        for separator in separators:
            cells = [part for cell in cells for part in cell.split(separator)]
        assert not any(cell.strip(' "').startswith(("=", "+", "-", "@", "\uff1d")) for cell in cells)
    assert not safe.startswith(("\t", "\r", "\n")) and safe.replace("'", "") == text


@pytest.mark.parametrize("text", ["chair", "a-b", "x=1", "C:/scans/a+b.ply", "", "'=1", "night stand"])
def test_other_texts_stay(text: str):
    assert safe_cell(text) == text


def test_a_table_of_hostile_names_keeps_a_row_for_each_box():
    entry = scan_entry("=cmd|' /C calc'!A0", np.eye(4), FOUND, own_spec("own", ("a", "b")), file="-x\n.ply")
    entry["boxes"][0]["name"] = "=1\r\n+2"
    rows = list(csv.reader(io.StringIO(csv_text(entry), newline="")))
    assert [row[:3] for row in rows] == [
        ["'=cmd|' /C calc'!A0", "'-x\n.ply", "'=1\r\n'+2"],
        ["'=cmd|' /C calc'!A0", "'-x\n.ply", "a"],
    ]
    assert [len(row) for row in rows] == [len(CSV_COLUMNS)] * 2 and float(rows[0][5]) == -1
