"""F between datasets: right where the difference is known, inside its null where there is none."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import f_oneway

from benchmarks.gradient_gap import compare, correlation, f_statistics, for_first_head, groupings, rises_of, table_of
from configs.joint import get_config
from h2a2_jax.config import experiment_config, to_json
from h2a2_jax.loader.batching import Batch
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.training.metrics import SelectionLog


def test_f_of_numbers_is_that_of_analysis_of_variance():
    groups = groupings(3, 5, seed=0)
    values = np.random.default_rng(0).normal(size=15) + np.repeat([0.0, 0.5, 2.0], 5)
    values -= values.mean()
    found = f_statistics(np.outer(values, values), groups)
    assert groups.shape == (200, 15) and (np.bincount(groups[7]) == 5).all()
    for row in (0, 7):
        assert found[row] == pytest.approx(f_oneway(*(values[groups[row] == k] for k in range(3))).statistic)


def test_f_of_vectors_with_a_known_difference():
    """M batches, means apart by a variance s2 a number, noise of variance 1: F is about 1 + M s2."""
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(3, 12, 27, 400)).astype(np.float32)
    gradients[:, :, 9:] += np.sqrt(0.5) * rng.normal(size=(3, 1, 18, 400)).astype(np.float32)
    found = compare(gradients, seed=0)
    offsets = np.array(found["offsets"])
    assert offsets[:9] == pytest.approx(1, abs=0.2) and offsets[9:].mean() == pytest.approx(7, abs=0.3)
    assert found["f"] == pytest.approx(1 + 12 * 0.5 * 18 / 27, abs=0.2)
    assert max(found["permuted"]) < 2 and found["offsets_above"] >= 18 / 27


def test_the_null_holds_where_nothing_differs():
    rng = np.random.default_rng(2)
    inside, above = 0, []
    for seed in range(100):
        scale = rng.lognormal(size=(3, 8, 1, 1))  # some batches have larger gradients, in every dataset
        found = compare(scale * rng.normal(size=(3, 8, 3, 3)), seed)
        low, high = np.quantile(found["permuted"], (0.025, 0.975))
        inside += low <= found["f"] <= high
        above.append(found["offsets_above"])
    assert inside >= 88  # of 95 expected
    assert np.mean(above) == pytest.approx(0.025, abs=0.025)


def test_scans_are_annotated_as_the_first_dataset():
    labels = np.array([[[[2, -1]]], [[[0, 3]]], [[[3, 4]]]], np.int32)  # chair; bed, chair; bookcase, board
    boxes = np.tile(np.array([0, 0, 0, 2, 1, 1, np.pi / 2], np.float32), (3, 1, 1, 2, 1))
    batch = Batch(np.zeros((3, 1, 4, 3), np.float32), None, boxes, labels, np.ones((3, 1), bool))
    result = for_first_head(batch, (SCANNET, SUNRGBD, S3DIS))
    names = [[SCANNET.classes[label] if label >= 0 else "" for label in row] for row in result.labels[:, 0, 0]]
    assert names == [["chair", ""], ["bed", "chair"], ["bookshelf", ""]]
    np.testing.assert_allclose(result.boxes[1, 0, 0, 0], [0, 0, 0, 1, 2, 1, 0], atol=1e-6)


def test_table():
    cells = [
        {"heads": "own", "gap": gap, "seed": seed, "layer": layer, "f": 1.0 + gap, "permuted": [0.9, 1.0, 1.1],
         "offsets": [1.0], "offsets_above": 0.1 * gap}
        for gap in (0.0, 2.0) for seed in (0, 1) for layer in ("backbone.stem", "neck")
    ]  # fmt: skip
    lines = table_of(cells).splitlines()
    assert len(lines) == 9
    assert lines[1].split() == ["own", "0", "backbone.stem", "1.000", "0.905-1.095", "inside", "2", "of", "2", "0.000"]
    assert lines[8].split()[-6:] == ["0.905-1.095", "above", "0", "of", "2", "0.200"]
    assert rises_of(cells).splitlines() == [
        f"own heads, gap 0 to 2, mean over {part}: F rises by 2.000 (2.000 to 2.000, 2 seeds)"
        for part in ("the backbone", "all layers")
    ]


def test_choices_that_follow_f_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    config = experiment_config(get_config("demo,gap2"))
    (tmp_path / "config.json").write_text(to_json(config))
    f = np.linspace(0.5, 3.0, 27)
    paths = {"layer1_0.conv1": "backbone.stages.0.0.first.conv", "layer4_0.conv2": "backbone.stages.3.0.second.conv"}
    cells = [
        {"gap": 2.0, "seed": 0, "heads": heads, "layer": path, "offsets": f.tolist()}
        for heads in ("first", "own")
        for path in paths.values()
    ]
    log = SelectionLog(tmp_path, config.dataset_names, 1, 1)
    gamma = jnp.broadcast_to(jnp.asarray(1.0 - (f > 2)), (3, 27))
    seen = SelectionMetrics(gamma, gamma, gamma, jnp.zeros(3), jnp.ones(3))
    log.add(1, [{name: seen for name in paths}])
    first, own = correlation(tmp_path, cells).splitlines()
    assert "first heads: rank correlation 0.8" in first and "own heads" in own
    assert "22 of 54 exclusive" in first and "within layers 0.8" in first
