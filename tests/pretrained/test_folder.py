"""Pretrained folders: read as they were written, bit for bit; whole or not at all; foreign and damaged ones refused."""

import dataclasses
import hashlib
import json
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml

from h2a2_jax.checkpoint.store import StoredDetector, read_detector
from h2a2_jax.checkpoint.tree import checksum
from h2a2_jax.config import SourceConfig
from h2a2_jax.errors import InputError
from h2a2_jax.models import DetectorConfig
from h2a2_jax.pretrained.card import CardFacts
from h2a2_jax.pretrained.folder import FILES, card_facts, read_pretrained, weights_digest, write_pretrained
from tests.boxes.golden import FIXTURES
from tests.pretrained.detectors import assert_same, stored_detector

DETECTOR = stored_detector()
CHECKSUMS = [3273927112, 1903876811, 2601410586]
"""Of the parts of tests/fixtures/pretrained_1."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pretrained(DETECTOR, tmp_path / "mine")
    return tmp_path / "mine"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_pretrained(folder)
    assert "\n" not in str(caught.value)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change values of config.json, as a folder without a checksum has them."""
    stored = json.loads((folder / "config.json").read_text()) | changes
    stored.pop("checksum", None)
    (folder / "config.json").write_text(json.dumps(stored))


def test_folders_of_the_machine_that_trained_are_left_out(tmp_path: Path):
    sources = tuple(dataclasses.replace(s, root="/home/me/secret") for s in DETECTOR.config.datasets)
    train = dataclasses.replace(DETECTOR.config.train, init_from="/home/me/run")
    config = dataclasses.replace(DETECTOR.config, datasets=sources, train=train)
    write_pretrained(dataclasses.replace(DETECTOR, config=config), tmp_path / "mine")
    assert not any(b"/home/me" in (tmp_path / "mine" / name).read_bytes() for name in FILES)
    assert all(source.root for source in read_pretrained(tmp_path / "mine").config.datasets)


def test_a_folder_is_read_as_it_was_written(folder: Path):
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert_same(read_pretrained(folder), DETECTOR)
    write_pretrained(read_pretrained(folder), folder.with_name("again"))
    for name in FILES[:2]:
        assert (folder / name).read_bytes() == (folder.with_name("again") / name).read_bytes()


def test_arrays_of_any_type_form_and_memory_order_keep_every_bit(tmp_path: Path):
    odd = {
        "half": np.arange(3).astype(ml_dtypes.bfloat16),
        "number": np.array(7, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "turned": np.arange(12, dtype=np.float64).reshape(3, 4).T,
        "special": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
        "switch": np.array([True, False]),
    }
    written = dataclasses.replace(DETECTOR, parts=(*DETECTOR.parts[:2], odd))
    write_pretrained(written, tmp_path / "odd")
    assert_same(read_pretrained(tmp_path / "odd"), written)


def test_arrays_from_several_devices_are_those_of_one(folder: Path):
    mesh = jax.make_mesh((3,), ("dataset",), axis_types=(jax.sharding.AxisType.Auto,))
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("dataset"))
    exclusive = {path: np.asarray(jax.device_put(array, along)) for path, array in DETECTOR.parts[0].items()}
    write_pretrained(dataclasses.replace(DETECTOR, parts=(exclusive, *DETECTOR.parts[1:])), folder.with_name("spread"))
    assert (folder / FILES[0]).read_bytes() == (folder.with_name("spread") / FILES[0]).read_bytes()


def test_a_folder_of_another_machine_is_read():
    # Of six devices, Python 3.11 and jax 0.10.2; this test runs on later ones too.
    detector = read_pretrained(FIXTURES / "pretrained_1")
    assert [spec.name for spec in detector.specs] == ["scannet", "sunrgbd", "s3dis"]
    assert [checksum(part) for part in detector.parts] == CHECKSUMS
    detector.build()


def test_the_datasets_keep_their_order(tmp_path: Path):
    turned = dataclasses.replace(DETECTOR, specs=DETECTOR.specs[::-1])
    write_pretrained(turned, tmp_path / "turned")
    assert read_pretrained(tmp_path / "turned").specs == DETECTOR.specs[::-1]


def test_a_built_detector_is_stored_as_its_checkpoint_is(folder: Path):
    model = read_pretrained(folder).build()
    assert_same(StoredDetector.of(model, DETECTOR.config, "The detector"), DETECTOR)


def test_an_earlier_folder_is_replaced_and_another_one_is_not(folder: Path, tmp_path: Path):
    other = stored_detector(2)
    write_pretrained(other, folder)
    assert_same(read_pretrained(folder), other)
    (tmp_path / "empty").mkdir()
    write_pretrained(other, tmp_path / "empty")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for place, match in (
        (folder, "holds notes.txt"),
        (tmp_path / "foreign", "holds config.json"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot be written"),
    ):
        with pytest.raises(InputError, match=match):
            write_pretrained(DETECTOR, place)
    assert (folder / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "empty", "foreign", "file"}


def test_a_disk_that_fails_leaves_the_earlier_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\): free space"):
            write_pretrained(stored_detector(2), folder)
    assert_same(read_pretrained(folder), DETECTOR)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_kill_in_the_middle_leaves_nothing_under_the_name(folder: Path):
    code = (
        "import os, signal; from pathlib import Path; from h2a2_jax.files import whole_folder\n"
        f"with whole_folder(Path({str(folder)!r})) as part:\n"
        "    (part / 'model.safetensors').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert_same(read_pretrained(folder), DETECTOR)
    assert len(list(folder.parent.iterdir())) == 2
    write_pretrained(stored_detector(2), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_folder_that_a_kill_had_moved_away_comes_back(folder: Path):
    gone = 2**22 + 1  # more than Linux gives to processes
    folder.rename(folder.with_name(f".mine.{gone}.0123abcd.earlier.part"))
    write_pretrained(DETECTOR, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_damaged_folders_are_refused(folder: Path):
    weights = folder / "model.safetensors"
    content, config = weights.read_bytes(), (folder / "config.json").read_text()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(folder, r"model.safetensors is not the file that config.json .* \(its sha256 differs\)")
    weights.unlink()
    refused(folder, "There is no file .*model.safetensors")
    weights.write_bytes(content)
    for text, match in (
        (config[:100], "is no JSON"),
        ("[1]", "is of another program"),
        ('{"architectures": ["Bert"]}', "is of another program"),
        ("[" * 100_000, "is no JSON"),
    ):
        (folder / "config.json").write_text(text)
        refused(folder, match)
    (folder / "config.json").unlink()
    refused(folder, "There is no file .*config.json")


def test_another_number_in_the_config_is_refused(folder: Path):
    stored = json.loads((folder / "config.json").read_text())
    stored["config"]["model"]["voxel_size"] *= 2
    (folder / "config.json").write_text(json.dumps(stored))
    refused(folder, r"config.json is damaged, .*its checksum differs\): write, copy or download it again\.")


def test_other_versions_and_configs_are_refused(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    for changes, match in (
        ({"version": 2}, "has version 2, this program reads version 1"),
        ({"config": None}, "cannot be used: The config has version None"),
        ({"config": config["config"] | {"version": 99}}, "The config has version 99"),
        ({"datasets": ["scannet"]}, r"lists the datasets \['scannet'\]; expected are those of its config"),
        ({"datasets": 3}, "lists the datasets 3"),
        ({"datasets": [["scannet"], "sunrgbd", "s3dis"]}, "lists the datasets"),
    ):
        rewrite(folder, **config | changes)
        refused(folder, match)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 16, safetensors.numpy.save({"a/b": np.zeros(3)})])
def test_files_without_arrays_of_a_detector_are_refused(folder: Path, content: bytes):
    (folder / "model.safetensors").write_bytes(content)
    rewrite(folder, sha256=hashlib.sha256(content).hexdigest())
    refused(folder, "holds no arrays of a detector")


def test_arrays_of_another_shape_are_refused_when_the_detector_is_built(tmp_path: Path):
    exclusive, shared, statistics = DETECTOR.parts
    path = next(iter(shared))
    cut = dataclasses.replace(DETECTOR, parts=(exclusive, shared | {path: shared[path][:-1]}, statistics))
    write_pretrained(cut, tmp_path / "cut")
    with pytest.raises(InputError, match=rf"The detector in .*cut is of another model: {re.escape(path)} is"):
        read_pretrained(tmp_path / "cut").build()


def test_the_digest_is_that_of_architecture_classes_and_arrays(folder: Path):
    digest = weights_digest(DETECTOR)
    assert digest == weights_digest(read_pretrained(folder)) and re.fullmatch("[0-9a-f]{64}", digest)
    moved = tuple(dataclasses.replace(source, root="elsewhere") for source in DETECTOR.config.datasets)
    assert digest == weights_digest(dataclasses.replace(DETECTOR, config=experiment_with(moved)))
    exclusive, shared, statistics = DETECTOR.parts
    path = next(iter(shared))
    nudged = shared | {path: np.nextafter(shared[path], np.float32(np.inf))}
    coarser = dataclasses.replace(DETECTOR.config.model, voxel_size=0.02)
    others = (
        dataclasses.replace(DETECTOR, parts=(exclusive, nudged, statistics)),
        dataclasses.replace(DETECTOR, config=dataclasses.replace(DETECTOR.config, model=coarser)),
        dataclasses.replace(DETECTOR, specs=DETECTOR.specs[::-1]),
    )
    assert len({digest, *map(weights_digest, others)}) == 4


def test_an_option_of_a_later_version_that_is_off_changes_no_digest():
    @dataclasses.dataclass(frozen=True)
    class Later(DetectorConfig):
        option: bool = False

    def digest(**options: bool) -> str:
        model = Later(**vars(DETECTOR.config.model), **options)
        return weights_digest(dataclasses.replace(DETECTOR, config=dataclasses.replace(DETECTOR.config, model=model)))

    assert digest() == weights_digest(DETECTOR) != digest(option=True)


def experiment_with(datasets: tuple[SourceConfig, ...]) -> Any:
    return dataclasses.replace(DETECTOR.config, datasets=datasets)


def test_a_runs_checkpoint_has_a_card_with_its_scores(tmp_path: Path):
    with tarfile.open(FIXTURES / "run_0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    detector = read_detector(tmp_path / "run")
    levels = [{"iou": 0.25, "mAP": 0.5}, {"iou": 0.5, "mAP": None}]
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"scannet": {"thresholds": levels}}))
    write_pretrained(detector, tmp_path / "mine")
    assert_same(read_pretrained(tmp_path / "mine"), detector)
    card = (tmp_path / "mine" / "README.md").read_text()
    head, _, text = card.removeprefix("---\n").partition("---\n")
    values = yaml.safe_load(head)
    assert (values["license"], values["library_name"]) == ("other", "h2a2_jax")
    assert values["pipeline_tag"] == "object-detection" and "point-cloud" in values["tags"]
    (result,) = values["model-index"][0]["results"]
    assert result["dataset"]["type"] == "scannet"
    assert result["metrics"] == [{"type": "mAP@0.25", "value": 50.0}]
    assert "h2a2 predict room.ply --weights=mine" in text and "40 optimiser steps" in text
    assert "| scannet | 50.0 |" in text and "garbagebin" in text and "night_stand" in text
    assert str(tmp_path) not in card, "a card is published"
    assert card_facts(read_pretrained(tmp_path / "mine")).scores == {"scannet": {"0.25": 0.5}}


def test_facts_that_are_no_facts_are_left_out():
    facts = CardFacts("a", "b", "mit", "c", {"d": {"0.25": 0.5}}, "e", 3, "f")
    assert CardFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    wild = {"name": 3, "steps": True, "scores": {"a": {"0.5": 7, "0.25": "x"}, "b": 1}, "later": 1}
    assert CardFacts.from_json(wild) == CardFacts.from_json(None) == CardFacts()


def test_hostile_names_stay_text_in_a_card(tmp_path: Path):
    facts = CardFacts(name='a"\n---\nb', terms="| x | <script>\n# y", trained_by="rm\n```\nx")
    write_pretrained(DETECTOR, tmp_path / "it's `mine`", facts)
    card = (tmp_path / "it's `mine`" / "README.md").read_text()
    assert card.count("\n---\n") == 1 and card.count("```") == 6 and "<script>" not in card.replace("\\<script\\>", "")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "h2a2_jax"


def test_the_current_folder_and_names_that_are_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "", ".."):
        with pytest.raises(InputError, match="the folder that this program runs in"):
            write_pretrained(DETECTOR, Path(place))
    with pytest.raises(InputError, match=r"cannot be written \(File name too long\)"):
        write_pretrained(DETECTOR, tmp_path / ("n" * 300))
    assert list(tmp_path.iterdir()) == [tmp_path / "here"]
