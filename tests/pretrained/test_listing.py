"""The command `h2a2 weights`."""

from pathlib import Path

import pytest

from h2a2_jax.cli import main
from h2a2_jax.pretrained import catalog
from h2a2_jax.pretrained.card import CardFacts
from h2a2_jax.pretrained.catalog import CATALOG
from h2a2_jax.pretrained.folder import write_pretrained
from h2a2_jax.scans.specs import SUNRGBD
from tests.pretrained.detectors import stored_detector


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("H2A2_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("H2A2_WEIGHTS_MIRROR", raising=False)
    monkeypatch.setattr(catalog, "PACKAGED", tmp_path / "package")
    return tmp_path / "cache" / "weights"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["weights", *arguments]) == 0
    return capsys.readouterr().out


def row(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
    return line.split()


def test_all_weights_are_listed(capsys: pytest.CaptureFixture[str], cache: Path):
    table = printed(capsys)
    assert row(table, "tr3d-scannet") == ["tr3d-scannet", "scannet", "18", "72.9", "59.3", "unknown", "no"]
    assert row(table, "tr3d-sunrgbd") == ["tr3d-sunrgbd", "sunrgbd", "10", "67.1", "50.4", "unknown", "no"]
    assert row(table, "fcaf3d-scannet") == ["fcaf3d-scannet", "scannet", "18", "69.7", "55.2", "unknown", "no"]
    assert row(table, "fcaf3d-sunrgbd") == ["fcaf3d-sunrgbd", "sunrgbd", "10", "63.8", "47.3", "unknown", "no"]
    assert row(table, "fcaf3d-s3dis") == ["fcaf3d-s3dis", "s3dis", "5", "67.4", "45.7", "unknown", "no"]
    assert row(table, "tr3d-s3dis") == ["tr3d-s3dis", "s3dis", "5", "74.5", "51.7", "unknown", "no"]
    assert row(table, "rooms") == ["rooms", "-", "-", "-", "-", "-", "no"]
    assert str(cache) in table and all(entry.license in table and entry.address in table for entry in CATALOG)
    assert not cache.exists()


def test_weights_are_described_by_classes_scores_and_licence(capsys: pytest.CaptureFixture[str], cache: Path):
    text = printed(capsys, "tr3d-sunrgbd")
    assert ", ".join(SUNRGBD.classes) in text and "mAP@0.25 67.1, mAP@0.5 50.4" in text
    assert "SUN RGB-D states no licence" in text and str(cache / "tr3d_1xb16_sunrgbd-3d-10class.pth") in text


def test_weights_are_fetched_ahead(capsys: pytest.CaptureFixture[str], cache: Path):
    write_pretrained(stored_detector(), cache / "tr3d-sunrgbd")  # as a first download does (test_load.py)
    assert f"here: {cache / 'tr3d-sunrgbd'} (0.1 MB)" in printed(capsys, "--download", "tr3d-sunrgbd")
    assert row(printed(capsys), "tr3d-sunrgbd")[-3:] == ["0.1", "MB", "yes"]


def test_weights_of_the_package_are_described_by_their_card(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    facts = CardFacts(
        scores={"s3dis": {"0.25": 0.5}}, measured="procedural rooms", steps=12_000, trained_by="h2a2 train"
    )
    write_pretrained(stored_detector(), tmp_path / "package" / "rooms", facts)
    assert row(printed(capsys), "rooms")[1:5] == ["scannet,sunrgbd,s3dis", "18,10,5", "-,-,50.0", "-,-,-"]
    text = printed(capsys, "rooms")
    assert "s3dis: mAP@0.25 50.0 on procedural rooms" in text and "12,000 steps" in text and "by h2a2 train" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tr3d-scanet"], "There are no weights 'tr3d-scanet' (did you mean 'tr3d-scannet'"),
        (["--download"], "--download needs a name"),
        (["--download", "rooms"], "The weights 'rooms' are not part of this installation"),
        (["rooms", "--config=x.py"], "--config is not for h2a2 weights"),
    ],
    ids=str,
)
def test_wrong_input_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert main(["weights", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"h2a2: {sentence}") and error.count("\n") == 1
