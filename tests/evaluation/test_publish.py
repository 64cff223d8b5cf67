"""Names of classes that a pretrained folder shows, and the command that writes one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.evaluation import publish as command
from h2a2_jax.evaluation.matches import Matches, write_matches
from h2a2_jax.pretrained.folder import read_pretrained, write_pretrained
from h2a2_jax.scans.specs import renamed
from tests.pretrained.detectors import stored_detector

DETECTOR = stored_detector()


def test_a_folder_shows_the_names_that_it_was_written_with(tmp_path: Path):
    first = DETECTOR.specs[0]
    plain = renamed(first, {first.classes[0]: "big thing"})
    write_pretrained(replace(DETECTOR, specs=(plain, *DETECTOR.specs[1:])), tmp_path / "mine")
    found = read_pretrained(tmp_path / "mine")
    assert found.specs[0].classes == ("big thing", *first.classes[1:])
    assert found.specs[1:] == DETECTOR.specs[1:] and found.config == DETECTOR.config
    assert replace(found.specs[0], classes=first.classes) == first


@pytest.mark.parametrize("classes", [["one"], "chair", [1, 2, 3]])
def test_names_of_another_number_or_type_are_refused(tmp_path: Path, classes: object):
    write_pretrained(DETECTOR, tmp_path / "mine")
    file = tmp_path / "mine" / "config.json"
    stored = json.loads(file.read_text())
    stored.pop("checksum")
    name, count = DETECTOR.specs[0].name, DETECTOR.specs[0].num_classes
    file.write_text(json.dumps(stored | {"classes": {name: classes}}))
    with pytest.raises(InputError, match=f"of {name}; expected are {count} names: write or download the folder again"):
        read_pretrained(tmp_path / "mine")


def test_the_command_calibrates_renames_and_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_pretrained(DETECTOR, tmp_path / "run")
    spec = DETECTOR.specs[0]
    scores = np.linspace(0.99, 0.01, 200, dtype=np.float32)
    matches = {
        each.name: Matches(
            names=("a",), iou_thresholds=(0.25,), scores=scores, labels=np.zeros(200, int), scans=np.zeros(200, int),
            is_hit=np.zeros((1, 200), bool), ground_truth=np.ones((1, each.num_classes), int),
        )
        for each in DETECTOR.specs
    }  # fmt: skip
    write_matches(tmp_path / "matches.npz", matches)
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--calibrate", f"--matches={tmp_path / 'matches.npz'}",
                 f"--names={spec.classes[0]}=big thing",
                 "--name=mine", "--license=mit", "--trained_by=run.py"]  # fmt: skip
    command.main(arguments)
    found = read_pretrained(tmp_path / "out")
    assert found.specs[0].classes[0] == "big thing"
    assert (found.origin["name"], found.origin["license"], found.origin["trained_by"]) == ("mine", "mit", "run.py")
    before, after = (each.parts[0]["heads.class_bias"] for each in (DETECTOR, found))
    assert (after[:, 0] < before[:, 0]).all()  # nothing was right, so the scores fall
    assert str(tmp_path / "out") in capfd.readouterr().out


@pytest.mark.parametrize(("names", "sentence"), [("sofa", "expected names as in"), ("sofass=couch", "has no class")])
def test_names_that_rename_nothing_end_in_a_sentence(
    names: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    write_pretrained(DETECTOR, tmp_path / "run")
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "run"), str(tmp_path / "out"), f"--names={names}"])
    assert sentence in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_without_matches_ends_in_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_pretrained(DETECTOR, tmp_path / "run")
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "run"), str(tmp_path / "out"), "--calibrate"])
    error = capfd.readouterr().err
    assert "no matches" in error and "--mode=eval" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
