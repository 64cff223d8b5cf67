"""The page of a folder of predictions: counts, links, failures, and that names are text."""

import re
from urllib.parse import unquote

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.viewer.content import class_color
from h2a2_jax.viewer.index_page import write_index
from tests.viewer.scenes import entry
from tests.viewer.test_page import Page

NAMES = ("a/b #1", "100%?.v2", "K\u00fcche \u6905\u5b50", "javascript:alert(1)", "</script><img src=x>", "{{data}}")


class Index(Page):
    """Scripts, tags and references of an index; its data are the table of scans."""

    key = "data"


def written(tmp_path, entries, failures=None, **options):
    write_index(tmp_path / "index.html", entries, failures or {}, **{"title": "rooms", **options})
    return Index(tmp_path / "index.html")


def test_scans_have_their_counts_best_score_and_remarks(tmp_path):
    rooms = [
        entry("one", {"chair": 2, "desk": 3}, remarks=["is tilted"]),
        entry("two", {"chair": 2}),
        entry("none", {}),
    ]
    page = written(tmp_path, rooms)
    classes = page.data["classes"]
    assert [one["name"] for one in classes] == ["chair", "desk"]
    assert bytes.fromhex(classes[0]["color"][1:]) == bytes(round(255 * channel) for channel in class_color(5))
    one, two, none = page.data["scans"]
    assert one["counts"] == [[1, 3], [0, 2]] and one["boxes"] == 5 and one["best"] == 0.54
    assert one["remarks"] == ["is tilted"] and two["counts"] == [[0, 2]] and two["page"] is two["thumbnail"] is None
    assert none == {
        "name": "none",
        "page": None,
        "thumbnail": None,
        "boxes": 0,
        "best": None,
        "counts": [],
        "remarks": [],
    }
    assert "3 scans, 7 boxes" in page.source and "failed" not in page.source
    totals = re.findall(r"<td>(\d+)</td><td>(\d+)</td>", page.source)
    assert totals == [("4", "2"), ("3", "1")] and "--share: 75.0%" in page.source


def test_links_lead_to_the_files_whatever_their_names(tmp_path):
    rooms = [entry(name, {"chair": 1}, page=f"{name}.html", thumbnail=f"thumbnails/{name}.jpg") for name in NAMES]
    page = written(tmp_path, rooms)
    for name, scan in zip(NAMES, page.data["scans"], strict=True):
        assert scan["name"] == name and unquote(scan["page"]) == f"./{name}.html"
        assert unquote(scan["thumbnail"]) == f"./thumbnails/{name}.jpg"
        assert re.fullmatch(r"\./[\w%/.~-]+", scan["page"], re.ASCII)
    assert "%2F" not in page.data["scans"][0]["page"] and "javascript%3Aalert" in page.data["scans"][3]["page"]


def test_an_absolute_link_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"/tmp/one\.html is an absolute path; a link needs one relative"):
        written(tmp_path, [entry("one", {}, page="/tmp/one.html")])
    assert not list(tmp_path.iterdir())


def test_names_remarks_failures_and_facts_are_text(tmp_path):
    evil = "</script><img src=x onerror=alert(1)> {{data}} & more"
    rooms = [entry("plain", {"chair": 1}, remarks=["is tilted"], page="plain.html")]
    plain = written(tmp_path, rooms, {"a.ply": "It is empty."}, facts=[("weights", "tr3d")])
    rooms = [entry(evil, {evil: 1}, remarks=[evil], page="plain.html")]
    page = written(tmp_path, rooms, {evil: evil}, title=evil, facts=[(evil, evil)])
    assert page.tags == plain.tags and "<img src=x" not in page.source
    assert (
        page.data["scans"][0]["name"] == page.data["scans"][0]["remarks"][0] == page.data["classes"][0]["name"] == evil
    )
    assert page.texts["h1"] == evil and "1 file failed" in page.source


def test_an_index_refers_to_nothing_outside_its_folder(tmp_path):
    page = written(tmp_path, [entry("one", {"chair": 1}, page="one.html")], {"a.ply": "It is empty."})
    assert page.references == ["./one.html"] and "default-src 'none'" in page.source
    assert not re.search(r"https?:|@import|url\(|import\s*\(|fetch\(", page.source)
    wanted = set(re.findall(r'byId\("([\w-]+)"\)', page.source))
    assert len(wanted) > 8 and wanted <= set(re.findall(r'id="([\w-]+)"', page.source))


def test_many_failures_are_folded_and_few_are_open(tmp_path):
    assert "<details open>" in written(tmp_path, [], {"a.ply": "It is empty."}).source
    many = written(tmp_path, [], {f"{i}.ply": "It is empty." for i in range(1200)}).source
    assert "<details><summary>1,200 files failed</summary>" in many and "0 scans, 0 boxes, 1,200 failed" in many


def test_an_index_is_written_anew_and_leaves_nothing_else(tmp_path):
    written(tmp_path, [entry("one", {})])
    page = written(tmp_path, [entry("caf\udce9", {}, page="caf\udce9.html")])
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert page.data["scans"][0]["name"] == "caf?" and page.data["scans"][0]["page"] == "./caf%E9.html"
