"""Rows of PLY files that hold lists, as faces do.

They differ in length: each is found from the one before, or many at once where their lists are as long as the first's.
"""

import io
import itertools
import struct
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.ply_header import Element, Property, check_size, read_ply_header

_BLOCK = 1 << 16  # rows with lists
_ALIKE, _ONE_BY_ONE = 64, 1024  # rows: with fewer alike, the next ones are found one by one


def read_ply_faces(path: Path) -> tuple[Int[np.ndarray, "f 3"], Mapping[str, np.ndarray]]:
    """Read the triangles, three numbers of vertices each, and the other numbers of the face that each is a part of.

    A polygon is cut into triangles at its first corner. A file without faces gives no triangles.
    """
    with path.open("rb") as file:
        header = read_ply_header(path, file)
        left = path.stat().st_size - file.tell()
        for element in header.elements:
            left -= check_size(path, element, left, header.is_text, entries=0)
            if element.name == "face" and element.corners is not None:
                rows = (TextRows if header.is_text else BinaryRows)(path, file, element)
                return _triangles(rows, element, element.corners)
            skip(path, file, element, header.is_text)
    return np.zeros((0, 3), np.int64), {}


def _triangles(
    rows: "TextRows | BinaryRows", face: Element, corners: int
) -> tuple[Int[np.ndarray, "f 3"], Mapping[str, np.ndarray]]:
    triangles, columns, faces, done = [np.zeros((0, 3), np.int64)], [np.zeros(0, face.dtype)], [np.zeros(0, int)], 0
    while done < face.rows:
        size = min(_BLOCK, face.rows - done)
        table, lists = rows.read(size, corners)
        for numbers, polygons in lists:
            for k in range(1, polygons.shape[1] - 1):
                triangles.append(polygons[:, [0, k, k + 1]].astype(np.int64))
                faces.append(done + numbers)
        columns.append(table)
        done += size
    face_of, whole = np.concatenate(faces), np.concatenate(columns)
    return np.concatenate(triangles), {name: whole[name][face_of] for name in face.dtype.names or ()}


def skip(path: Path, file: BinaryIO, element: Element, is_text: bool) -> None:
    """Move on behind an element that begins at the file's position."""
    if is_text:
        next(itertools.islice(filled(file), element.rows, element.rows), None)  # skips as many lines
    elif element.has_lists:
        rows = BinaryRows(path, file, element)
        for first in range(0, element.rows, _BLOCK):
            rows.places(min(_BLOCK, element.rows - first))
        file.seek(rows.place)
    else:
        file.seek(element.rows * element.dtype.itemsize, io.SEEK_CUR)


def filled(file: BinaryIO) -> Iterator[bytes]:
    """Lines that are not blank."""
    return filter(bytes.strip, file)


def without_lists(words: list[bytes], element: Element) -> tuple[list[bytes], list[list[bytes]]]:
    """Part the words of a line of text: the numbers that stand alone, and the lists."""
    plain, lists, at = [], [], 0
    for item in element.properties:
        if item.length is None:
            plain.append(words[at])
            at += 1
        else:
            end = at + 1 + int(words[at])
            if not at < end <= len(words):
                raise ValueError(f"a list of {words[at].decode('latin1')} entries")
            lists.append(words[at + 1 : end])
            at = end
    return plain, lists


Lists = list[tuple[Int[np.ndarray, " k"], np.ndarray]]
"""Lists of some rows: for each length, the numbers of the rows, and their entries [k, length]."""


class BinaryRows:
    """Rows with lists of a binary element, found one after the other; `place` is that of the next row."""

    def __init__(self, path: Path, file: BinaryIO, element: Element):
        self._path, self._element, self.place = path, element, file.tell()
        self._content = np.memmap(path, np.uint8, "r")
        self._runs: list[list[Property]] = [[]]  # of numbers, each but the last one before a list
        self._lists: list[Property] = []
        for item in element.properties:
            if item.length is None:
                self._runs[-1].append(item)
            else:
                self._lists.append(item)
                self._runs.append([])
        *self._before, self._tail = (sum(item.kind.itemsize for item in run) for run in self._runs)
        # Bytes of the numbers before a list, a reader of its length, bytes of the length and of an entry.
        self._steps = [
            (before, struct.Struct(_struct_code(item.length)), item.kind.itemsize)
            for before, item in zip(self._before, self._lists, strict=True)
            if item.length is not None
        ]

    def read(self, size: int, which: int | None = None) -> tuple[np.ndarray, Lists]:
        """Read the next rows: their numbers as a table, and their lists of one property, if one is asked for."""
        places = self.places(size)
        table = np.empty(size, self._element.dtype)
        for run, at in zip(self._runs, places.T, strict=True):
            dtype = np.dtype([(item.name, item.kind) for item in run])
            if run:
                values = self._content[at[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
                for name in dtype.names or ():
                    table[name] = values[name]
        if which is None:
            return table, []
        item, width = self._lists[which], self._steps[which][1].size
        start = places[:, which] + self._before[which] + width
        lengths = (places[:, which + 1] - start) // item.kind.itemsize
        lists = []
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            entries = self._content[start[rows, None] + np.arange(length * item.kind.itemsize)]
            lists.append((rows, entries.view(item.kind)))
        return table, lists

    def places(self, size: int) -> Int[np.ndarray, "{size} runs"]:
        """Find the places of the runs of numbers in the next rows."""
        parts, done = [np.zeros((0, len(self._runs)), np.int64)], 0
        while done < size:
            part = self._alike(size - done)
            if len(part) < min(_ALIKE, size - done):
                part = self._one_by_one(min(_ONE_BY_ONE, size - done))
            parts.append(part)
            done += len(part)
            self.place = int(part[-1, -1]) + self._tail
        return np.concatenate(parts)

    def _alike(self, most: int) -> np.ndarray:
        """Places in the next rows, as long as all lists are as long as those of the first."""
        first = self._one_by_one(1)[0] - self.place
        width, count, checked = int(first[-1]) + self._tail, 1, 1
        most = min(most, (len(self._content) - self.place) // width)
        while count == checked and checked < most:
            checked = min(4 * checked, most)
            rows = self._content[self.place : self.place + checked * width].reshape(checked, width)
            differs = np.zeros(checked, bool)
            for place, (before, length, _) in zip(first.tolist(), self._steps, strict=False):
                found = rows[:, place + before : place + before + length.size]
                differs |= (found != found[0]).any(axis=1)
            count = int(differs.argmax()) if differs.any() else checked
        return self.place + np.arange(count)[:, None] * width + first

    def _one_by_one(self, count: int) -> np.ndarray:
        places, content, place, end = array("q"), self._content.data, self.place, len(self._content)
        for _ in range(count):
            for before, length, width in self._steps:
                places.append(place)
                place += before
                entries = length.unpack_from(content, place)[0] if place + length.size <= end else end
                if entries < 0 or (place := place + length.size + entries * width) > end:
                    raise InputError(
                        f"{self._path} is cut off or damaged: a list of its {self._element.name} elements does not "
                        "end in the file; copy it again."
                    )
            places.append(place)
            place += self._tail
        if place > end:
            raise InputError(f"{self._path} is cut off in its {self._element.name} elements; copy it again.")
        return np.frombuffer(places, np.int64).reshape(count, -1)


def _struct_code(kind: np.dtype) -> str:
    letter = {1: "b", 2: "h", 4: "i", 8: "q"}[kind.itemsize]
    return (">" if kind.str[0] == ">" else "<") + (letter.upper() if kind.kind == "u" else letter)


class TextRows:
    """Rows of a text element with lists."""

    def __init__(self, path: Path, file: BinaryIO, element: Element):
        self._path, self._element, self._lines = path, element, filled(file)

    def read(self, size: int, which: int) -> tuple[np.ndarray, Lists]:
        """Read the next rows: their numbers as a table, and their lists of one property."""
        lines = list(itertools.islice(self._lines, size))
        if len(lines) < size:
            raise InputError(f"{self._path} is cut off in its {self._element.name} elements; copy it again.")
        try:
            return self._alike(lines, which) or self._one_by_one(lines, which)
        except (ValueError, IndexError, OverflowError) as error:
            raise InputError(f"{self._path} has a {self._element.name} that is not understood ({error}).") from error

    def _alike(self, lines: list[bytes], which: int) -> tuple[np.ndarray, Lists] | None:
        """Read lines whose lists are as long as those of the first; None if they are not."""
        try:
            rows = np.loadtxt(lines, np.float64, comments=None, ndmin=2, encoding="latin1")
        except ValueError:  # of lines that differ in length
            return None
        table, lists, at = np.empty(len(rows), self._element.dtype), [], 0
        for item in self._element.properties:
            if item.length is None:
                table[item.name] = rows[:, at]
                at += 1
            else:
                length = int(rows[0, at])
                if length < 0 or (rows[:, at] != length).any():
                    return None
                lists.append(rows[:, at + 1 : at + 1 + length].astype(item.kind))
                at += 1 + length
        return (table, [(np.arange(len(rows)), lists[which])]) if at <= rows.shape[1] else None

    def _one_by_one(self, lines: list[bytes], which: int) -> tuple[np.ndarray, Lists]:
        numbers, lists = [], defaultdict[int, tuple[list[int], list[list[bytes]]]](lambda: ([], []))
        for row, line in enumerate(lines):
            plain, found = without_lists(line.split(), self._element)
            numbers.append(tuple(map(float, plain)))
            rows, entries = lists[len(found[which])]
            rows.append(row)
            entries.append(found[which])
        kind = [item.kind for item in self._element.properties if item.length is not None][which]
        arrays = [(np.array(rows), np.array(entries).astype(kind)) for rows, entries in lists.values()]
        return np.array(numbers, self._element.dtype), arrays
