"""HTML page of a folder of predictions: its scans with pictures, counts and links; totals by class; failures."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.viewer.content import class_color
from h2a2_jax.viewer.page_parts import asset, filled, script_json

_MOST_OPEN = 10  # failures that are shown without a click


def write_index(
    path: str | Path,
    entries: Iterable[Mapping[str, Any]],
    failures: Mapping[str, str],
    *,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page of a folder of predictions, whole or not at all; it is read from disk, without a network.

    Scans can be filtered by name and class and sorted by name, boxes and best score. Thousands of them stay quick: the
    page builds a hundred rows at a time, and pictures load when they come into view.

    Args:
        path: path of the HTML file.
        entries: entries of scans in the schema of a document of predictions (`inference.results`), in the order to be
            shown. Two keys more are used if there: "page", path of the scan's page, and "thumbnail", path of its
            picture, both relative to the folder of the index.
        failures: sentences on the files that have no entry, by name.
        title: title of the page.
        facts: names and values for the head of the page, such as ("weights", "runs/rooms").

    Raises:
        InputError: the path of a page or a picture is absolute.
        OSError: the file cannot be written.
    """
    data = _table(entries)
    scans, classes = data["scans"], data["classes"]
    boxes = sum(scan["boxes"] for scan in scans)
    parts = {
        "title": escape(title),
        "style": asset("palette.css") + asset("index.css"),
        "summary": escape(", ".join(_summary(len(scans), boxes, len(failures)))),
        "facts": _facts(facts),
        "failures": _failures(failures),
        "totals": _totals(scans, classes),
        "links": "".join(_plain_row(scan) for scan in scans),
        "data": script_json(data),
        "script": asset("index.js"),
    }
    with whole_file(Path(path)) as part:
        part.write_text(filled("index.html", parts), encoding="utf-8", newline="\n")


def _table(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the classes of the boxes, most frequent first, and the scans with counts by row of the class."""
    scans, labels, totals = [], dict[str, int](), Counter[str]()
    for entry in entries:
        counts = Counter(box["name"] for box in entry["boxes"])
        totals.update(counts)
        labels |= {box["name"]: int(box["label"]) for box in entry["boxes"]}
        scans.append(
            {
                "name": entry["name"],
                "page": _link(entry.get("page")),
                "thumbnail": _link(entry.get("thumbnail")),
                "boxes": len(entry["boxes"]),
                "best": max((float(box["score"]) for box in entry["boxes"]), default=None),
                "counts": counts.most_common(),
                "remarks": list(entry.get("remarks", ())),
            }
        )
    rows = {name: row for row, (name, _) in enumerate(totals.most_common())}
    for scan in scans:
        scan["counts"] = [(rows[name], number) for name, number in scan["counts"]]
    return {"classes": [{"name": name, "color": _css_color(labels[name])} for name in rows], "scans": scans}


def _link(path: str | None) -> str | None:
    """Return the relative address of a file, whatever its name holds; None for none."""
    if path is None:
        return None
    if PurePath(path).is_absolute():
        raise InputError(f"{path} is an absolute path; a link needs one relative to the folder of the index.")
    # The bytes of the name, for names that are not UTF-8; "./" and "%3A", for names that begin like a scheme.
    return "./" + quote(os.fsencode(PurePath(path).as_posix()), safe="/")


def _css_color(label: int) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in class_color(label))


def _plural(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def _summary(scans: int, boxes: int, failures: int) -> list[str]:
    words = [_plural(scans, "scan", "scans"), _plural(boxes, "box", "boxes")]
    return [*words, f"{failures:,} failed"] if failures else words


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f"<dl>{rows}</dl>" if rows else ""


def _failures(failures: Mapping[str, str]) -> str:
    if not failures:
        return ""
    rows = "".join(f"<li><b><bdi>{escape(name)}</bdi></b>{escape(why)}</li>" for name, why in failures.items())
    opened = " open" if len(failures) <= _MOST_OPEN else ""
    files = _plural(len(failures), "file", "files")
    details = f"<details{opened}><summary>{files} failed</summary><ul>{rows}</ul></details>"
    return f'<section id="failures">{details}</section>'


def _totals(scans: list[dict[str, Any]], classes: list[dict[str, str]]) -> str:
    """Table of the classes: boxes and scans that have one, with a bar for the boxes."""
    if not classes:
        return ""
    boxes, holders = Counter[int](), Counter[int]()
    for scan in scans:
        for row, number in scan["counts"]:
            boxes[row] += number
            holders[row] += 1
    rows = "".join(
        f'<tr style="--own: {entry["color"]}; --share: {100 * boxes[row] / boxes[0]:.1f}%">'
        f'<th scope="row" title="{escape(entry["name"])}"><i></i><bdi>{escape(entry["name"])}</bdi></th>'
        f'<td>{boxes[row]:,}</td><td>{holders[row]:,}</td><td class="bar"><i></i></td></tr>'
        for row, entry in enumerate(classes)
    )
    head = '<tr><th scope="col">Class</th><th scope="col">Boxes</th><th scope="col">Scans</th><th></th></tr>'
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f'<section id="totals"><h2>Classes</h2><div>{table}</div></section>'


def _plain_row(scan: Mapping[str, Any]) -> str:
    """Row of the list for browsers without JavaScript."""
    name = f"<bdi>{escape(scan['name'])}</bdi>"
    link = f'<a href="{escape(scan["page"])}">{name}</a>' if scan["page"] else name
    return f"<li>{link}: {_plural(scan['boxes'], 'box', 'boxes')}</li>"
