"""Preparation of tiny scans: results, resumed calls, failures and refusals."""

import contextlib
import io
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.prepare.prepare import FailedScansError, prepare
from h2a2_jax.prepare.prepared_scan import PrepareScan
from h2a2_jax.prepare.scan_cache import OutputError, ScanCache, write_json
from h2a2_jax.scans.scan import ScanError
from h2a2_jax.scans.specs import S3DIS
from h2a2_jax.scans.tfds_source import TfdsSource
from tests.prepare.tiny import TinyRaw, assert_equal, tiny_scan
from tests.prepare.tiny_builder import TinyBuilder


def _loaded(raw: TinyRaw) -> list[str]:
    return sorted(raw.log.read_text().splitlines())


def _prepare(raw: TinyRaw, output: Path, **options) -> Path:
    return prepare(TinyBuilder, raw, {"seed": 3}, output, **{"workers": 1, **options})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared tiny scans: the raw ones, the output folder, the folder of the dataset, and the lines printed."""
    tmp_path = tmp_path_factory.mktemp("prepared")
    raw, printed = TinyRaw(tmp_path / "log"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        folder = _prepare(raw, tmp_path / "out", published={"train": 4, "val": 1}, workers=2)
    return raw, tmp_path / "out", folder, printed.getvalue()


def test_prepared_scans_are_read_back_equal(prepared):
    raw, output, _, _ = prepared
    for split, names in raw.splits.items():
        source = TfdsSource(output, split, S3DIS)
        assert tuple(source.names) == names
        for index, name in enumerate(names):
            assert_equal(source[index], tiny_scan(name, raw.points))
    assert sorted(path.name for path in output.iterdir()) == ["tiny", "tiny.lock"]


def test_statistics_count_the_scans_and_compare_them_with_the_published_numbers(prepared):
    raw, _, folder, printed = prepared
    found = json.loads((folder / "statistics.json").read_text())
    labels = [tiny_scan(name, raw.points).labels[0] for name in raw.splits["train"]]
    train = found["splits"]["train"]
    assert list(train["boxes"].values()) == np.bincount(labels, minlength=5).tolist()
    assert (train["scans"], train["published_scans"], train["ignored_boxes"]) == (3, 4, 3)
    assert train["points"] == {"min": 50, "median": 50, "max": 50}
    assert train["notes"] == {"lines repaired": 9} and found["notes"] == {"areas missing": 2}
    assert "train has 3 scans; published are 4." in found["warnings"]
    assert "Warning: train has 3 scans; published are 4." in printed


def test_a_prepared_dataset_is_not_prepared_again(prepared, capsys, tmp_path):
    raw, output, folder, _ = prepared
    before = folder.stat().st_mtime_ns
    _prepare(raw, output)
    assert "holds all 4 scans already" in capsys.readouterr().out
    assert _loaded(raw) == ["a/0", "a/1", "a/2", "b 0"] and folder.stat().st_mtime_ns == before
    (folder / "statistics.json").rename(tmp_path / "taken away")
    _prepare(raw, output)
    assert "There is no statistics.json beside them" in capsys.readouterr().out
    (tmp_path / "taken away").rename(folder / "statistics.json")


def test_a_prepared_dataset_of_other_settings_is_refused(prepared):
    raw, output, _, _ = prepared
    with pytest.raises(InputError, match=r"other settings \(seed: 3 there, 4 asked for\): remove that folder, or"):
        prepare(TinyBuilder, raw, {"seed": 4}, output, workers=1)


def test_points_too_far_to_be_voxelised_are_left_out_and_counted(tmp_path):
    cache = ScanCache(tmp_path / "cache", {})
    cache.open()
    work = PrepareScan(TinyRaw(tmp_path / "log", bad={"a/0": "stray", "a/1": "far"}), cache)
    _, made = work("a/0")
    scan, whole = cache.read("a/0"), tiny_scan("a/0", 200)
    assert made and np.array_equal(scan.points, whole.points[1:]) and len(scan.colors) == 199
    assert np.array_equal(scan.boxes, whole.boxes[1:]) and np.array_equal(scan.labels, whole.labels[1:])
    assert scan.notes == {**whole.notes, "points beyond 250 m": 1, "boxes beyond 250 m": 1}
    with pytest.raises(ScanError, match="a/1 has 100 of 200 points beyond 250 m"):
        work("a/1")


def test_failed_scans_are_all_named_and_the_next_call_tries_only_those(tmp_path, capsys):
    bad = {"a/0": "missing", "a/1": "bug", "a/2": "death", "a/3": "no points", "a/4": "label", "a/5": "memory"}
    raw, output = TinyRaw(tmp_path / "log", 8, bad=bad), tmp_path / "out"
    with pytest.raises(FailedScansError, match=r"6 of 9 scans failed.*--skip-failed"):
        _prepare(raw, output)
    printed = capsys.readouterr().out
    for sentence in (
        "Scan a/0 lacks its file.",
        "a/1 cannot be prepared (KeyError: 'vertex').",
        "The process that worked on a/2 was killed (SIGKILL; where memory ran out, use fewer --workers).",
        "Scan a/3: it has no points.",
        "Scan a/4: some labels are outside the classes.",
        "There was not enough memory for a/5: use fewer --workers.",
    ):
        assert sentence in printed
    assert json.loads((output / "tiny.cache" / "failed.json").read_text()).keys() == bad.keys()
    assert not (output / "tiny").exists()

    raw.log.unlink()
    _prepare(TinyRaw(raw.log, 8, bad={"a/4": "label"}), output, skip_failed=True)
    assert _loaded(raw) == sorted(bad)
    expected = [name for name in raw.splits["train"] if name != "a/4"]
    assert TfdsSource(output, "train", S3DIS).names == tuple(expected)
    assert json.loads((output / "tiny" / "1.0.0" / "statistics.json").read_text())["failed"].keys() == {"a/4"}

    raw.log.unlink()
    _prepare(TinyRaw(raw.log, 8), output)
    assert _loaded(raw) == ["a/4"]
    assert TfdsSource(output, "train", S3DIS).names == raw.splits["train"]
    assert not (output / "tiny.cache").exists()


def test_a_split_without_a_scan_left_is_not_packed(tmp_path):
    with pytest.raises(FailedScansError, match="No scan of val could be prepared"):
        _prepare(TinyRaw(tmp_path / "log", bad={"b 0": "missing"}), tmp_path / "out", skip_failed=True)
    with pytest.raises(InputError, match="There is no scan in train"):
        _prepare(TinyRaw(tmp_path / "log", 0), tmp_path / "out")


def test_damaged_files_of_the_cache_are_made_again(tmp_path, capsys):
    raw, output = TinyRaw(tmp_path / "log", 5), tmp_path / "out"
    _prepare(raw, output, keep_cache=True)
    cache = output / "tiny.cache"
    content = (cache / "a%2F0.scan").read_bytes()
    (cache / "a%2F0.scan").write_bytes(content[: len(content) // 2])
    (cache / "a%2F1.scan").write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    (cache / "a%2F2.scan").write_bytes(b"")
    (cache / "a%2F3.scan").write_bytes(content)  # of another scan
    (cache / "left.scan.123.writing").write_bytes(content[:10])
    (output / "tiny" / "incomplete.ABC_1.0.0").mkdir()
    (output / "tiny" / "1.0.0" / "metadata.json").unlink()
    raw.log.unlink()
    _prepare(raw, output)
    assert _loaded(raw) == ["a/0", "a/1", "a/2", "a/3"]
    assert "4 scans prepared, 4 of them since their files were damaged." in capsys.readouterr().out
    source = TfdsSource(output, "train", S3DIS)
    for index, name in enumerate(raw.splits["train"]):
        assert_equal(source[index], tiny_scan(name, raw.points))
    assert [path.name for path in (output / "tiny").iterdir()] == ["1.0.0"]


def test_scans_of_other_settings_are_not_mixed_in(tmp_path):
    raw, output = TinyRaw(tmp_path / "log", bad={"a/1": "missing"}), tmp_path / "out"
    with pytest.raises(FailedScansError):
        _prepare(raw, output)
    with pytest.raises(InputError, match=r"tiny.cache holds scans .* other settings \(seed: 3 there, 4 asked for\)"):
        prepare(TinyBuilder, raw, {"seed": 4}, output, workers=1)
    (output / "tiny.cache" / "settings.json").unlink()  # the files of the scans hold the settings too
    raw.log.unlink()
    prepare(TinyBuilder, TinyRaw(raw.log), {"seed": 4}, output, workers=1)
    assert _loaded(raw) == ["a/0", "a/1", "a/2", "b 0"]


def test_a_dataset_with_more_scans_than_before_is_packed_again(tmp_path):
    raw = TinyRaw(tmp_path / "log")
    _prepare(raw, tmp_path / "out")
    _prepare(TinyRaw(raw.log, 4), tmp_path / "out")
    assert len(TfdsSource(tmp_path / "out", "train", S3DIS)) == 4


def test_a_second_preparation_of_the_same_output_is_refused(tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"tiny is being prepared in .* already: wait"):
            _prepare(TinyRaw(tmp_path / "log"), tmp_path / "out")
    _prepare(TinyRaw(tmp_path / "log"), tmp_path / "out")


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file cannot be written \(File exists\): give an --output that can\."):
        _prepare(TinyRaw(tmp_path / "log"), tmp_path / "file")
    (tmp_path / "out" / "tiny.cache" / "b 0.scan").mkdir(parents=True)  # where a scan's file should go
    with pytest.raises(OutputError, match=r"b 0.scan cannot be written \(Is a directory\)"):
        _prepare(TinyRaw(tmp_path / "log"), tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path / "out" / "tiny.cache") if name.endswith(".writing")]


def test_a_shard_that_cannot_be_written_is_one_sentence_and_the_cache_stays(tmp_path):
    raw, output = TinyRaw(tmp_path / "log", 20, 3000), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # bytes: enough for a scan, not for a shard
    try:
        with pytest.raises(OutputError, match=r"tiny/1\.0\.0 cannot be written \(File too large"):
            _prepare(raw, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((output / "tiny").glob("*.*.*")) == []
    raw.log.unlink()
    _prepare(raw, output)
    assert not raw.log.exists() and len(TfdsSource(output, "train", S3DIS)) == 20


def test_a_full_disk_is_one_sentence(tmp_path):
    # The temporary name leads to the device that is always full.
    (tmp_path / f"scan.{os.getpid()}.writing").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"No space is left on the disk of .*: free some, or give an --output"):
        write_json(tmp_path / "scan", "content")
    assert list(tmp_path.iterdir()) == []
