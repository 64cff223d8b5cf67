"""Detectors by name: downloaded and converted once, then from the cache; folders, files, the hub; sentences."""

import os
import pickle
import sys
import tarfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h2a2_jax.checkpoint.store import read_detector
from h2a2_jax.convert.torch_file import write_torch_file
from h2a2_jax.errors import InputError
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.models.fcaf3d_weights import fcaf3d_slots
from h2a2_jax.models.tr3d_weights import tr3d_slots
from h2a2_jax.models.weight_slots import export_slots
from h2a2_jax.pretrained import catalog
from h2a2_jax.pretrained.catalog import CatalogEntry, find_entry
from h2a2_jax.pretrained.folder import card_facts, weights_digest, write_pretrained
from h2a2_jax.pretrained.load import load_pretrained
from h2a2_jax.scans.scan import Scan
from tests.boxes.golden import FIXTURES
from tests.convert.test_command import STATE
from tests.parity_model import MATCHED_SHARE, matched_share
from tests.pretrained.detectors import assert_same, stored_detector
from tests.pretrained.server import Behaviour, serving

NAME = "tr3d-sunrgbd"


def entry(name: str = NAME) -> CatalogEntry:
    found = find_entry(name)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test alone, and a working folder without anything in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("H2A2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of a tiny TR3D for SUN RGB-D."""
    path = tmp_path_factory.mktemp("tiny") / "tr3d.pth"
    write_torch_file(path, STATE)
    return path.read_bytes()


@pytest.fixture
def server(tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Behaviour]:
    """A mirror that has the tiny TR3D in place of the published one."""
    with serving({f"/mirror/{entry().path}": tiny}) as behaviour:
        monkeypatch.setenv("H2A2_WEIGHTS_MIRROR", f"{behaviour.address}/mirror/")
        yield behaviour


def refused(name: str | Path, match: str, **options: Any) -> str:
    with pytest.raises(InputError, match=match) as caught:
        load_pretrained(name, list[str]().append, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(cache: Path) -> set[str]:
    """What is in the cache, without locks."""
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name) as stored:
        return {key: stored[key] for key in stored.files}


@pytest.mark.slow
def test_the_golden_weights_by_name_find_the_golden_boxes(server: Behaviour, tmp_path: Path):
    state = arrays("weights_scannet_seed7.npz")
    write_torch_file(tmp_path / "golden.pth", state)
    server.files = {f"/mirror/{entry('tr3d-scannet').path}": (tmp_path / "golden.pth").read_bytes()}
    said = list[str]()
    detector = load_pretrained("tr3d-scannet", said.append)
    found = export_slots(tr3d_slots(detector.build()))
    assert detector.config.dataset_names == ("scannet",) and set(found) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert sum("under terms of their own" in sentence for sentence in said) == 1
    assert card_facts(detector).scores == entry("tr3d-scannet").shares

    golden = arrays("model_batch2_scannet_seed7.npz")
    clouds = np.split(golden["points"].astype(np.float32), np.cumsum(golden["num_points"])[:-1])[:1]  # one is enough
    scans = [Scan(str(i), c[:, :3], c[:, 3:], *no_boxes()) for i, c in enumerate(clouds)]
    for i, boxes in enumerate(Predictor(detector, detector.specs).predict(scans, "scannet")):
        mine = boxes.boxes[:, :6], boxes.scores, boxes.labels
        original = tuple(golden[f"pred.scene{i}.{key}"] for key in ("boxes", "scores", "labels"))
        assert min(matched_share(*mine, *original), matched_share(*original, *mine)) >= MATCHED_SHARE


def test_fcaf3d_by_name_is_converted_too(server: Behaviour, tmp_path: Path):
    state = arrays("weights_fcaf3d_scannet_seed9.npz")
    older = {name.removeprefix("bbox_"): value for name, value in state.items()}
    write_torch_file(tmp_path / "fcaf3d.pth", older)
    server.files = {f"/mirror/{entry('fcaf3d-scannet').path}": (tmp_path / "fcaf3d.pth").read_bytes()}
    said = list[str]()
    detector = load_pretrained("fcaf3d-scannet", said.append)
    found = export_slots(fcaf3d_slots(detector.build()))
    assert set(found) == {name for name in state if not name.endswith("num_batches_tracked")}
    for name, value in found.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    assert (detector.config.model.kind, detector.config.datasets[0].recipe) == ("fcaf3d", "fcaf3d")
    assert card_facts(detector).scores == {"scannet": {"0.25": 0.697, "0.5": 0.552}}
    assert sum("under terms of their own" in sentence for sentence in said) == 1
    assert_same(load_pretrained("fcaf3d-scannet"), detector)


def no_boxes() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((0, 7), np.float32), np.zeros(0, np.int32)


def test_the_second_time_neither_network_nor_file_is_needed(server: Behaviour, cache: Path):
    said = list[str]()
    first = load_pretrained(NAME, said.append)
    assert len(server.asked) == 1 and names(cache) == {NAME, entry().file.name, f"{entry().file.name}.json"}
    server.status = 500
    again = list[str]()
    assert_same(load_pretrained(NAME, again.append), first)
    entry().file.unlink()
    assert_same(load_pretrained(NAME, again.append), first)
    assert len(server.asked) == 1 and said and not again


def test_offline_the_file_can_be_put_there_by_hand(server: Behaviour, cache: Path, tiny: bytes):
    server.status = 503
    sentence = refused(NAME, f"{server.address}/mirror/{entry().path} cannot be downloaded")
    assert f"put it at {entry().file} by hand" in sentence and not names(cache)
    entry().file.write_bytes(tiny)
    assert load_pretrained(NAME, print).config.dataset_names == ("sunrgbd",)
    assert len(server.asked) == 1


def test_what_differs_later_is_refused(server: Behaviour, cache: Path):
    load_pretrained(NAME, print)
    for path, match in (
        (entry().file, "is not the file that was stored .its sha256 differs., and nothing of it is loaded"),
        (cache / NAME / "model.safetensors", "is not the file that config.json beside it was written with"),
        (cache / NAME / "config.json", "is no JSON"),
    ):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        refused(NAME, match)
        path.write_bytes(content)
    load_pretrained(NAME, print)


def test_a_file_that_came_broken_is_not_kept(server: Behaviour, cache: Path, tiny: bytes):
    path = f"/mirror/{entry().path}"
    for content, match in (
        (tiny[:-1000], "is damaged or cut off"),
        (tiny[:2000] + bytes(100) + tiny[2100:], "is damaged or cut off|hold|lacks|are no weights"),
        (b"<html>Log in to this network</html>", "is no file of PyTorch"),
    ):
        server.files = {path: content}
        assert "sent cannot be used and is not kept" in refused(NAME, match)
        assert not names(cache)


def test_a_broken_file_put_there_by_hand_stays_until_its_owner_replaces_it(server: Behaviour, cache: Path, tiny: bytes):
    cache.mkdir(parents=True)
    entry().file.write_bytes(tiny[:-1000])
    refused(NAME, f"{entry().file} is damaged or cut off")
    assert entry().file.read_bytes() == tiny[:-1000] and names(cache) == {entry().file.name} and not server.asked


def test_a_download_that_was_cut_goes_on(server: Behaviour, cache: Path, tiny: bytes):
    server.cuts, server.silent = [5000, 0], True
    assert "5,000 bytes are kept" in refused(NAME, r"silent for 0\.2 s", silence=0.2)
    assert names(cache) == {f"{entry().file.name}.part", f"{entry().file.name}.part.json"}
    load_pretrained(NAME, print)
    assert server.asked[-1][1] == "bytes=5000-" and entry().file.read_bytes() == tiny


class _Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_file_does_not_run(server: Behaviour, cache: Path, tmp_path: Path, protocol: int):
    evil = pickle.dumps({"state_dict": {"a": _Evil(f"touch {tmp_path / 'ran'}")}}, protocol)
    server.files = {f"/mirror/{entry().path}": evil}
    refused(NAME, "sent cannot be used and is not kept")
    assert not (tmp_path / "ran").exists() and not names(cache)


def test_weights_of_another_dataset_are_refused(server: Behaviour, tiny: bytes):
    server.files = {f"/mirror/{entry('tr3d-scannet').path}": tiny}
    refused("tr3d-scannet", "holds a detector for sunrgbd; expected is one for scannet")


def test_two_at_once_download_once(server: Behaviour, cache: Path):
    found, said = [], list[str]()
    threads = [threading.Thread(target=lambda: found.append(load_pretrained(NAME, said.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(server.asked) == 1
    assert len({weights_digest(detector) for detector in found}) == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("H2A2_CACHE", str(tmp_path / "file"))
    refused(NAME, "The cache .*file/weights cannot be written to .*H2A2_CACHE")


def test_a_mirror_is_of_the_web(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("H2A2_WEIGHTS_MIRROR", "file:///weights")
    refused(NAME, "expected is one of http:// or https://")
    monkeypatch.delenv("H2A2_WEIGHTS_MIRROR")
    assert entry("tr3d-s3dis").address == (
        "https://download.openmmlab.com/mmdetection3d/v1.1.0_models/tr3d/tr3d_1xb16_s3dis-3d-5class/"
        "tr3d_1xb16_s3dis-3d-5class.pth"
    )
    assert entry("fcaf3d-sunrgbd").address == (
        "https://download.openmmlab.com/mmdetection3d/v1.0.0_models/fcaf3d/fcaf3d_8x2_sunrgbd-3d-10class/"
        "fcaf3d_8x2_sunrgbd-3d-10class_20220805_165017.pth"
    )


def test_the_weights_of_the_package_are_a_folder_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(catalog, "PACKAGED", tmp_path)
    refused("rooms", "The weights 'rooms' are not part of this installation")
    detector = stored_detector()
    write_pretrained(detector, tmp_path / "rooms")
    Path("rooms").mkdir()  # of scans, say
    assert_same(load_pretrained("rooms"), detector)


def test_a_folder_a_run_and_a_file_are_taken_as_they_are(tmp_path: Path, tiny: bytes):
    detector = stored_detector()
    write_pretrained(detector, tmp_path / "mine")
    assert_same(load_pretrained(str(tmp_path / "mine")), detector)
    assert_same(load_pretrained(tmp_path / "mine" / "model.safetensors"), detector)
    with tarfile.open(FIXTURES / "run_0.1.0.tar.gz") as archive:
        archive.extractall("run", filter="data")
    assert_same(load_pretrained("run"), read_detector("run"))
    Path("tr3d.pth").write_bytes(tiny)
    said = list[str]()
    found = load_pretrained("tr3d.pth", said.append)
    assert found.config.dataset_names == ("sunrgbd",) and not said
    np.testing.assert_array_equal(
        export_slots(tr3d_slots(found.build()))["backbone.conv1.kernel"], STATE["backbone.conv1.kernel"]
    )
    assert "Trained by another program" in written_card(found, tmp_path / "converted")


def written_card(detector: Any, folder: Path) -> str:
    write_pretrained(detector, folder)
    return (folder / "README.md").read_text()


def test_what_is_no_detector_is_refused(tmp_path: Path):
    Path("scans").mkdir()
    refused("scans", "scans holds neither a pretrained detector .* nor the checkpoints of a run")
    refused("gone.pth", "There is no file or folder gone.pth")
    refused(Path("tr3d-scanet"), "There is no file or folder tr3d-scanet")
    refused("/gone/folder", "There is no file or folder /gone/folder")
    refused("tr3d-scanet", r"no weights 'tr3d-scanet' \(did you mean 'tr3d-scannet'.*\): expected is one of rooms")
    refused("a/b/c", "There are no weights 'a/b/c': expected is one of")
    headless = {name: value for name, value in STATE.items() if not name.startswith("bbox_head")}
    write_torch_file("headless.pth", headless)
    refused("headless.pth", "headless.pth is no TR3D or FCAF3D of a known dataset: No head distinguishes")
    write_torch_file("part.pth", {name: value for name, value in STATE.items() if not name.startswith("neck")})
    refused("part.pth", r"part.pth lacks neck\..* and \d+ more: give a whole detector")


def test_a_name_on_the_hub_is_downloaded_by_its_own_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/mine", r"need the package huggingface_hub: pip install 'h2a2_jax\[hub\]'")
    detector, asked = stored_detector(), list[Any]()
    write_pretrained(detector, tmp_path / "snapshot")

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "org/mine":
            raise OSError("404 Client Error.\nMore on many lines.")
        return str(tmp_path / "snapshot")

    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same(load_pretrained("org/mine"), detector)
    assert asked == [("org/mine", ["model.safetensors", "config.json", "README.md"])]
    refused("org/other", r"org/other cannot be downloaded from the Hugging Face hub \(404 Client Error\.\)")
    write_pretrained(stored_detector(2), "org/mine")
    assert_same(load_pretrained("org/mine"), stored_detector(2))
    assert len(asked) == 2, "a folder here wins"
