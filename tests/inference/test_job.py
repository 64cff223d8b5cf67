"""A folder of results as a job: whatever moment a kill comes at, the table ends as that of a job that nobody killed."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.inference.input_files import InputFile
from h2a2_jax.inference.job import JOURNAL, FileIdentity, Job, open_job
from h2a2_jax.inference.writers import TABLE

WHAT = {"weights": "abc", "--score": 0.3}


def entry(name: str, boxes: int = 2) -> dict:
    box = {"center": [1.0, 2.0, 3.0], "size": [1.0, 1.0, 1.0], "yaw": 0.0, "score": 0.5, "label": 0, "name": "chair"}
    return {"name": name, "file": f"{name}.ply", "boxes": [box] * boxes}


@pytest.fixture
def files(tmp_path: Path) -> list[InputFile]:
    (tmp_path / "in").mkdir()
    result = []
    for name in "abcd":
        path = tmp_path / "in" / f"{name}.ply"
        path.write_text(name)
        result.append(InputFile(path, name))
    return result


def run(folder: Path, files: list[InputFile], what=WHAT, overwrite=False, fails=()) -> list[str]:
    """Predict what is not done; the names of the scans that were predicted."""
    with open_job(folder, what, has_table=True, overwrite=overwrite) as job:
        todo = [file for file in job.named(files) if not job.is_done(file)]
        job.start()
        for file in todo:
            if file.name in fails:
                job.fail(file, FileIdentity.of(file.path), "It is damaged.")
            else:
                job.add(file, FileIdentity.of(file.path), entry(file.name))
        return [file.name for file in todo]


def test_what_is_done_is_skipped_and_another_folder_adds(tmp_path, files):
    out = tmp_path / "out"
    assert run(out, files[:2]) == ["a", "b"]
    before = (out / TABLE).read_bytes()
    assert run(out, files) == ["c", "d"]
    assert (out / TABLE).read_bytes().startswith(before)
    assert run(out, files) == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.ply").write_text("another a")
    assert run(out, [InputFile(other / "a.ply", "a")]) == ["a-2"]
    assert run(out, [InputFile(other / "a.ply", "a"), *files]) == []
    assert (out / TABLE).read_text().count("\n") == 1 + 2 * 5


def test_a_failed_file_is_tried_again(tmp_path, files):
    out = tmp_path / "out"
    assert run(out, files, fails=("b",)) == ["a", "b", "c", "d"]
    with open_job(out, WHAT, has_table=True, overwrite=False) as job:
        assert list(job.failed.values()) == ["It is damaged."] and list(job.entries) == ["a", "c", "d"]
    assert run(out, files) == ["b"]
    with open_job(out, WHAT, has_table=True, overwrite=False) as job:
        assert not job.failed and list(job.entries) == ["a", "c", "d", "b"]
    files[0].path.write_text("changed")
    assert run(out, files) == ["a"] and run(out, files) == []


def test_a_file_that_changed_is_predicted_again_and_its_old_rows_go(tmp_path, files):
    out = tmp_path / "out"
    run(out, files)
    files[1].path.write_text("longer")
    assert run(out, files) == ["b"]
    assert run(out, files) == []
    assert (out / TABLE).read_text().count("b.ply") == 2
    files[1].path.write_text("longer yet")
    assert run(out, files, fails=("b",)) == ["b"]
    assert "b.ply" not in (out / TABLE).read_text()


def test_every_cut_of_journal_and_table_ends_in_the_same_table(tmp_path, files):
    out = tmp_path / "out"
    run(out, files)
    journal, table = (out / JOURNAL).read_bytes(), (out / TABLE).read_bytes()
    ends = [i + 1 for i, byte in enumerate(journal) if byte == 10]
    cuts = {*ends, *(end - 7 for end in ends[1:]), *(end + 30 for end in ends[:-1])}
    for cut in sorted(cuts):
        # The rows of a scan are appended after its line in the journal: the table may be behind by what was under way.
        done = journal[:cut].count(b"\n") - 1
        rows = table.split(b"\r\n")
        for kept in {0, len(b"\r\n".join(rows[: 1 + 2 * max(done - 1, 0)])), len(b"\r\n".join(rows[: 1 + 2 * done]))}:
            (out / JOURNAL).write_bytes(journal[:cut])
            (out / TABLE).write_bytes(table[:kept])
            run(out, files)
            assert (out / TABLE).read_bytes() == table and (out / JOURNAL).read_bytes() == journal


def test_results_of_other_weights_or_flags_are_not_mixed(tmp_path, files):
    out = tmp_path / "out"
    run(out, files)
    with pytest.raises(InputError, match=r"holds results with --score=0.3, and now they would be with --score=0.1"):
        run(out, files, {**WHAT, "--score": 0.1})
    with pytest.raises(InputError, match="results of other weights"):
        run(out, files, {**WHAT, "weights": "def"})
    assert run(out, files[:1], {**WHAT, "--score": 0.1}, overwrite=True) == ["a"]
    assert (out / TABLE).read_text().count("\n") == 3


def test_what_other_programs_changed_is_left_alone(tmp_path, files):
    out = tmp_path / "out"
    run(out, files[:2])
    sorted_table = (out / TABLE).read_bytes().replace(b"chair", b"seat")
    (out / TABLE).write_bytes(sorted_table)
    with pytest.raises(InputError, match=r"boxes\.csv was changed by another program"):
        run(out, files)
    assert (out / TABLE).read_bytes() == sorted_table
    (out / JOURNAL).write_text("[]\n")
    with pytest.raises(InputError, match="is no journal of this program"):
        run(out, files)
    run(out, files, overwrite=True)
    lines = (out / JOURNAL).read_text().splitlines()
    (out / JOURNAL).write_text("\n".join([lines[0], "{}", *lines[2:], ""]))
    with pytest.raises(InputError, match=r"Line 2 of .* is damaged"):
        run(out, files)


def test_two_programs_do_not_share_a_folder(tmp_path, files):
    with (
        open_job(tmp_path, WHAT, has_table=True, overwrite=False),
        pytest.raises(InputError, match=r"Another prediction is at work in .* give another --output"),
        open_job(tmp_path, WHAT, has_table=True, overwrite=False),
    ):
        pass


def test_the_overview_is_not_refreshed_too_often(tmp_path):
    with open_job(tmp_path, WHAT, has_table=False, overwrite=False) as job:
        job.start()
        written = []
        for _ in range(3):
            job.refresh(lambda: written.append(1))
        assert len(written) == 1
        job.write_document("scannet")
    assert json.loads((tmp_path / "predictions.json").read_text())["dataset"] == "scannet"
    assert not (tmp_path / TABLE).exists()


def test_a_refusal_names_flags_as_they_are_typed(tmp_path, files):
    was = {"weights": "abc", "--agnostic_nms": True, "--names": {"chair": "seat"}, "--tile": "auto", "--classes": []}
    run(tmp_path / "out", files, was)
    now = {"weights": "abc", "--agnostic_nms": False, "--names": {}, "--tile": 8.0, "--classes": ["bed", "desk"]}
    with pytest.raises(InputError) as refused:
        run(tmp_path / "out", files, now)
    sentence = str(refused.value)
    assert "holds results with --agnostic_nms, with --names=chair=seat, with --tile=auto, without --classes" in sentence
    assert "without --agnostic_nms, without --names, with --tile=8, with --classes=bed,desk:" in sentence


def test_a_kill_while_a_file_is_predicted_again_ends_in_the_same_table(tmp_path, files, monkeypatch):
    out = tmp_path / "out"
    run(out, files)
    files[1].path.write_text("longer")

    def killed(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "_write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out, files)
    monkeypatch.undo()
    assert run(out, files) == []
    assert [line.split(",")[0] for line in (out / TABLE).read_text().splitlines()[1::2]] == ["a", "c", "d", "b"]


@pytest.mark.parametrize("full", [JOURNAL, TABLE])
def test_a_disk_that_is_full_for_a_while_spoils_nothing(tmp_path, files, monkeypatch, full):
    out, append = tmp_path / "out", Job._append

    def appended(job, name, text):
        if name == full:
            raise OSError(28, "No space left on device")
        append(job, name, text)

    with open_job(out, WHAT, has_table=True, overwrite=False) as job:
        job.start()
        for number, file in enumerate(job.named(files)):
            monkeypatch.setattr(Job, "_append", appended if number == 1 else append)
            with contextlib.suppress(OSError):
                job.add(file, FileIdentity.of(file.path), entry(file.name))
        job.complete_table()
    assert run(out, files) == (["b"] if full == JOURNAL else [])
    whole = tmp_path / "whole"
    run(whole, files if full == TABLE else [files[i] for i in (0, 2, 3, 1)])
    for name in (JOURNAL, TABLE):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_an_append_that_fails_half_way_leaves_the_file_as_it_was(tmp_path, files, monkeypatch):
    with open_job(tmp_path / "out", WHAT, has_table=True, overwrite=False) as job:
        job.start()
        before = (tmp_path / "out" / JOURNAL).read_bytes()

        class Full(io.FileIO):
            """A file on a disk that is full after a few bytes."""

            def write(self, content):
                if len(content) <= 5:
                    raise OSError(28, "No space left on device")
                return super().write(content[:5])

        monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Full(path, "r+"))
        with pytest.raises(OSError, match="No space"):
            job.add(files[0], FileIdentity.of(files[0].path), entry("a"))
        monkeypatch.undo()
        assert (tmp_path / "out" / JOURNAL).read_bytes() == before and not job.entries


def test_names_of_the_journal_stay_in_the_folder(tmp_path, files):
    out = tmp_path / "out"
    run(out, files[:1])
    journal = (out / JOURNAL).read_text()
    for name in ("../a", "/tmp/a", "x/../../a", "index", "boxes", "", "a\nb"):
        (out / JOURNAL).write_text(journal.replace('"name": "a"', f'"name": {json.dumps(name)}'))
        with pytest.raises(InputError, match=r"Line 2 of .* is damaged"):
            run(out, files[:1])
    for damaged in ('"boxes": 3', '"boxes": [{}]'):
        (out / JOURNAL).write_text(journal[: journal.index('"boxes"')] + damaged + "}}\n")
        with pytest.raises(InputError, match=r"Line 2 of .* is damaged"):
            run(out, files[:1])
    (out / JOURNAL).write_text(journal.replace('"version": 1', '"version": 2', 1))
    with pytest.raises(InputError, match="has version 2, this program reads version 1"):
        run(out, files[:1])
    (out / JOURNAL).unlink()
    (out / JOURNAL).mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        run(out, files[:1])


def test_files_whose_names_are_printed_alike_are_told_apart(tmp_path):
    names = ["a\n.ply", "a\r.ply", os.fsdecode(b"a\xff.ply"), os.fsdecode(b"a\xfe.ply")]
    files = [InputFile(tmp_path / name, f"a_-{number}") for number, name in enumerate(names)]
    for file in files:
        file.path.write_text("")
    assert len(run(tmp_path / "out", files)) == 4
    assert run(tmp_path / "out", files) == []
    again = [InputFile(tmp_path / "out" / ".." / file.path.name, file.name) for file in files]
    assert run(tmp_path / "out", again) == []


def test_a_table_that_is_not_asked_for_is_left_alone(tmp_path):
    (tmp_path / TABLE).write_text("of another program")
    with open_job(tmp_path, WHAT, has_table=False, overwrite=True) as job:
        job.start()
    assert (tmp_path / TABLE).read_text() == "of another program"


def test_what_a_kill_left_unfinished_is_removed(tmp_path, files):
    left = [
        tmp_path / "out" / name for name in (".a.12.part.json", "sub/.c.7.part.html", "thumbnails/sub/.c.7.part.jpg")
    ]
    others = [tmp_path / "out" / name for name in ("a.12.part.json", ".hidden", "sub/c.part")]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    run(tmp_path / "out", [*files, InputFile(files[0].path.with_name("c.ply"), "sub/c")])
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
