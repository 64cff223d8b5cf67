"""The planted test of kernel selection, small: the default finds what is shared, and pays for nothing that is not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import planted
from benchmarks.planted import ROWS, Settings, Trainer, cell, interval, numbers, plant, table

SMALL = Settings(channels=3, sites=60, steps=200)


@pytest.fixture(scope="module")
def trainers() -> dict[str, Trainer]:
    return {name: Trainer(ROWS[name], 12, SMALL) for name in ("shared", "default")}


def test_the_default_finds_the_planted_offsets_and_beats_sharing_all(trainers: dict[str, Trainer]) -> None:
    found, shared = (cell(trainers[name], name, 1.0, 5) for name in ("default", "shared"))
    assert found["auc"] > 0.95 and found["shared_of_shared"] > 0.85 and found["shared_of_others"] < 0.6
    assert found["mse"] < 0.5 * shared["mse"]


def test_without_a_gap_it_shares_and_costs_nothing(trainers: dict[str, Trainer]) -> None:
    found, shared = (cell(trainers[name], name, 0.0, 6) for name in ("default", "shared"))
    assert found["kept"] > 0.95 and found["mse"] < 1.1 * shared["mse"]


def test_given_choices_are_taken_in_every_step() -> None:
    trainer = Trainer(ROWS["partition"], 2, Settings(channels=2, sites=20, steps=3))
    where = plant(3, 2, 0.5, trainer.settings)
    trained = trainer.run(where, 3)
    np.testing.assert_array_equal(trained.gamma, np.broadcast_to(where.is_shared, (3, 3, 27)))
    assert where.is_shared.sum() == 14 and np.isfinite(trained.mse)


def test_a_scan_is_the_convolution_of_its_features() -> None:
    settings = Settings(channels=2, sites=25, noise=0.0)
    kernel = np.random.default_rng(0).normal(size=(27, 2, 2))
    scan = planted.draw_scan(np.random.default_rng(1), kernel, settings)
    places = [tuple(row) for row in scan.coords]
    assert places == sorted(set(places)) and len(places) == 25
    here = {place: x for place, x in zip(places, scan.features, strict=True)}
    for place, target in zip(places, scan.noisy, strict=True):
        expected = np.zeros(2)
        for k in range(27):
            offset = (k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1)
            neighbor = tuple(a + b for a, b in zip(place, offset, strict=True))
            expected += here.get(neighbor, np.zeros(2)) @ kernel[k]
        np.testing.assert_allclose(target, expected, rtol=1e-10, atol=1e-12)


def test_numbers_by_hand() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2 and high == pytest.approx(2 + 4.302653 / 3**0.5, rel=1e-6) and low == pytest.approx(4 - high)
    assert interval([1.0])[1:] == (-np.inf, np.inf)
    assert numbers("0,3-5") == [0, 3, 4, 5]


def test_the_table_says_what_is_not_told_apart() -> None:
    def made(row: str, seed: int, mse: float) -> dict:
        return {"scans": 6, "gap": 0.2, "row": row, "seed": seed, "mse": mse, "auc": 0.5, "kept": 1.0}

    cells = [made("default", seed, 0.1 + 0.01 * seed) for seed in range(3)]
    cells += [made("worse", seed, 0.2 + 0.0101 * seed) for seed in range(3)]
    cells += [made("same", seed, 0.1 + 0.01 * (2 - seed)) for seed in range(3)]
    text = table(cells, ("default", "worse", "same"))
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert lines["same"].endswith("not told apart") and "default - worse -0.100" in lines["worse"]
    assert not lines["worse"].endswith("not told apart")


def test_cells_go_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cells.json"
    flags = "--seeds=4 --scans=2 --gap=0.2 --rows=exclusive --channels=2 --sites=20 --steps=2"
    monkeypatch.setattr(sys, "argv", ["planted", *flags.split(), f"--json={file}", f"--png={tmp_path / 'x.png'}"])
    planted.main()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (only,) = json.loads(file.read_text())["cells"]
    assert (only["scans"], only["gap"], only["row"], only["seed"]) == (2, 0.2, "exclusive", 4)
    assert only["mse"] > 0 and only["auc"] == 0.5
    monkeypatch.setattr(sys, "argv", ["planted", "--rows=defualt"])
    with pytest.raises(SystemExit, match="There is no row 'defualt'; the rows are shared, exclusive"):
        planted.main()
