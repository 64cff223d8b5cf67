"""Prepared datasets as sources: where they are found, what is read, what is refused."""

import dataclasses
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.prepare.builder import Packing
from h2a2_jax.prepare.scan_cache import ScanCache
from h2a2_jax.scans.scan import ScanError, ScanSource
from h2a2_jax.scans.specs import S3DIS, SCANNET
from h2a2_jax.scans.tfds_source import TfdsSource, is_tfds
from tests.prepare.tiny import assert_equal, tiny_scan
from tests.prepare.tiny_builder import TinyBuilder

_NAMES = {"train": [f"a/{i}" for i in range(6)], "val": ["b 0"]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder data/s3dis, so to say, with prepared/tiny/1.0.0 in it."""
    home = tmp_path_factory.mktemp("home")
    cache = ScanCache(home / "cache", {})
    cache.open()
    for name in (name for names in _NAMES.values() for name in names):
        cache.write(tiny_scan(name, 2000))
    metadata = {"dataset": "s3dis", "classes": list(S3DIS.classes), "names": _NAMES}
    builder = TinyBuilder(data_dir=home / "prepared", packing=Packing(cache, _NAMES, metadata, shard_bytes=130_000))
    builder.download_and_prepare(download_dir=home / "none")
    cache.remove()
    return home


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """A version's folder that may be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "home")) / "prepared" / "tiny" / "1.0.0"


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_module_that_a_prepared_dataset_names_is_not_imported(copy, monkeypatch, key):
    (copy / "strangers_module.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(copy))
    file = copy / "features.json"
    content = json.loads(file.read_text())
    del content["pythonClassName"]
    file.write_text(json.dumps(content | {key: "strangers_module.Feature", "content": {}}))
    with pytest.raises(
        InputError, match=r"features.json names 'strangers_module.Feature', which is no feature of TFDS"
    ):
        TfdsSource(copy, "train", S3DIS)[0]


@pytest.mark.parametrize("below", ["", "prepared", "prepared/tiny", "prepared/tiny/1.0.0"])
def test_found_from_each_level(prepared, below):
    source = TfdsSource(prepared / below, "train", S3DIS)
    assert is_tfds(prepared / below) and isinstance(source, ScanSource)
    assert list(source.names) == _NAMES["train"] and len(source) == 6
    for index, name in enumerate(_NAMES["train"]):
        assert_equal(source[index], tiny_scan(name, 2000))
    assert [scan.name for scan in TfdsSource(prepared / below, "val", S3DIS)] == ["b 0"]
    with pytest.raises(IndexError):
        source[-1]


def test_pickled_and_read_by_threads_and_other_processes(prepared):
    source = TfdsSource(prepared, "train", S3DIS)
    with ThreadPoolExecutor(8) as threads:
        for index, scan in enumerate(threads.map(source.__getitem__, list(range(6)) * 5)):
            assert_equal(scan, tiny_scan(_NAMES["train"][index % 6], 2000))
    assert_equal(pickle.loads(pickle.dumps(source))[2], tiny_scan("a/2", 2000))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        assert_equal(processes.submit(source.__getitem__, 3).result(60), tiny_scan("a/3", 2000))


def test_forks_before_reading_may_read_and_those_after_it_are_refused(prepared):
    script = f"""if True:
        import os
        from h2a2_jax.scans.specs import S3DIS
        from h2a2_jax.scans.tfds_source import TfdsSource

        def status(child):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        source = TfdsSource({str(prepared)!r}, "train", S3DIS)
        child = os.fork()
        mean = source[1].points.mean()
        if child == 0:
            os._exit(0 if mean > 0 else 1)
        assert status(child) == 0
        child = os.fork()
        if child == 0:
            try:
                source[1]
            except RuntimeError as error:
                os._exit(7 if "start processes by spawn" in str(error) else 1)
        assert status(child) == 7
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_another_dataset_or_split_is_refused(prepared):
    with pytest.raises(InputError, match=r"holds no prepared scannet, but .*1\.0\.0 \(s3dis\)"):
        TfdsSource(prepared, "train", SCANNET)
    with pytest.raises(InputError, match=r"holds the 5 classes table, .*; s3dis has table, chair: give another folder"):
        TfdsSource(prepared, "train", dataclasses.replace(S3DIS, classes=("table", "chair")))
    with pytest.raises(InputError, match="has no split test: use one of train, val"):
        TfdsSource(prepared, "test", S3DIS)


def test_missing_and_half_prepared_data_are_reported(tmp_path):
    with pytest.raises(InputError, match="holds no prepared dataset: prepare it with python -m data"):
        TfdsSource(tmp_path, "train", S3DIS)
    assert not is_tfds(tmp_path) and not is_tfds(tmp_path / "nowhere")
    (tmp_path / "prepared" / "tiny" / "incomplete.A1B2C3_1.0.0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"was only half prepared .*incomplete\.A1B2C3_1.0.0 is left"):
        TfdsSource(tmp_path, "train", S3DIS)
    assert is_tfds(tmp_path)


def test_the_newest_version_is_read_and_two_datasets_are_not_guessed_from(copy):
    shutil.copytree(copy, copy.with_name("1.10.0"))
    shutil.copytree(copy, copy.with_name("1.9.0"))
    assert TfdsSource(copy.parent, "train", S3DIS).folder.name == "1.10.0"
    shutil.copytree(copy.parent, copy.parent.with_name("other"))
    with pytest.raises(InputError, match=r"holds 2 prepared datasets of s3dis: give one of .*other, .*tiny\."):
        TfdsSource(copy.parent.parent, "train", S3DIS)


def test_files_that_were_cut_or_are_missing_are_refused(copy):
    file = copy / "tiny-train.array_record-00000-of-00002"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"files of train in .* have \d+ bytes instead of \d+: remove .* again"):
        TfdsSource(copy, "train", S3DIS)
    file.unlink()
    with pytest.raises(InputError, match=r"lacks tiny-train\.array_record-00000-of-00002: remove"):
        TfdsSource(copy, "val", S3DIS)


def test_a_damaged_record_fails_alone(copy):
    file = copy / "tiny-train.array_record-00000-of-00002"
    content = bytearray(file.read_bytes())
    middle = next(i for i in range(len(content) // 2, len(content)) if all(content[i : i + 8]))  # no padding
    content[middle : middle + 100] = bytes(100)
    file.write_bytes(content)
    source = TfdsSource(copy, "train", S3DIS)
    failed = []
    for index, name in enumerate(source.names):
        try:
            assert_equal(source[index], tiny_scan(name, 2000))
        except ScanError as error:
            assert str(error).startswith(f"Scan {name} cannot be read from")
            failed.append(name)
    assert len(failed) == 1


def test_missing_tfds_is_reported_with_its_package(prepared):
    script = f"""if True:
        import sys
        sys.modules["tensorflow_datasets"] = None
        from h2a2_jax.scans.specs import S3DIS
        from h2a2_jax.scans.tfds_source import TfdsSource

        TfdsSource({str(prepared)!r}, "train", S3DIS)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert 'which is not installed: pip install "h2a2_jax[data]"' in done.stderr.splitlines()[-1]


def test_names_of_the_metadata_are_those_of_the_records(copy):
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["names"]["train"][1] = "c"
    (copy / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ScanError, match="holds scan a/1 in the place of c"):
        TfdsSource(copy, "train", S3DIS)[1]
