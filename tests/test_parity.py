"""The reference's numbers, case by case, and the tool that compares with them."""

from collections import Counter

import jax
import numpy as np
import pytest

from tests import parity, parity_fcaf3d
from tests.boxes.golden import FIXTURES, load_cases
from tests.parity_case import CaseResult, guarded


def assert_all_pass(path):
    results = list(parity.run_file(path))
    assert results
    assert [result.line() for result in results if not result.ok] == []
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ops_seed0.npz", "boxes_seed0.npz"])
def test_every_case_of_a_fixture_is_run_and_passes(name):
    results = assert_all_pass(FIXTURES / name)
    compared = {result.name.split(".")[0] for result in results}
    assert compared == set(load_cases(FIXTURES / name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scannet", "sunrgbd"])
def test_whole_models_of_the_fixtures(kind):
    path = FIXTURES / f"model_batch2_{kind}_seed7.npz"
    results = assert_all_pass(path)
    compared = Counter(result.name.split(".")[0] for result in results)
    with np.load(path) as stored:
        stages = {key.split(".")[0] for key in stored.files if key.endswith(".stride")}
        parameters = len(stored["train.grad_names"])
    assert stages | {"head", "pred", "train", "float64", "voxel_coords", "first_point_index"} == set(compared)
    assert compared["float64"] == compared["train"] > parameters
    assert max(result.tolerance for result in results if result.name.startswith("float64.")) == 1e-6


@pytest.mark.slow
def test_a_whole_fcaf3d_of_the_fixtures():
    # Turned boxes, and pruned on every level. The tool runs both passes in both types.
    golden = parity_fcaf3d.Golden.load(FIXTURES / "fcaf3d_batch2_sunrgbd_seed11.npz")
    results = list(parity_fcaf3d.evaluation(golden))
    with jax.enable_x64(True):
        results += parity_fcaf3d.training(golden.in_float64())
    assert [result.line() for result in results if not result.ok] == []
    compared = Counter(result.name.split(".")[0] for result in results)
    stages = Counter(key.split(".")[0] for key in golden.stored if key.endswith(".stride"))
    assert compared["eval"] > 5 * stages["eval"]
    assert compared["train"] > 5 * stages["train"] + len(golden.stored["train.grad_names"])


@pytest.mark.slow
def test_every_case_of_fcaf3d_is_run_and_passes():
    path = FIXTURES / "ops_fcaf3d_seed0.npz"
    compared = {result.name.removeprefix("float64.").split(".")[0] for result in assert_all_pass(path)}
    assert compared == set(load_cases(path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scannet", "sunrgbd"])
def test_whole_models_on_real_scans(golden_dir, kind):
    assert_all_pass(golden_dir / f"model_{kind}_seed0.npz")


def small_file(folder, name="boxes_seed99.npz", **cases):
    np.savez(folder / name, **{f"{case}.{key}": value for case, data in cases.items() for key, value in data.items()})
    return folder / name


FOCAL = load_cases(FIXTURES / "boxes_seed0.npz")["focal_loss"]


def run_tool(capsys, *paths):
    status = parity.main([str(path) for path in paths])
    return status, capsys.readouterr().out


def test_the_tool_passes_what_is_right(tmp_path, capsys):
    status, out = run_tool(capsys, small_file(tmp_path, focal_loss=FOCAL))
    assert status == 0 and "FAIL" not in out
    assert "boxes_seed99.npz focal_loss.loss  " in out and out.splitlines()[0].endswith("  ok")
    assert out.splitlines()[-1] == "2 comparisons in 1 files, 0 failed"


def test_the_tool_fails_on_wrong_numbers_and_unknown_cases(tmp_path, capsys):
    wrong = FOCAL | {"loss": FOCAL["loss"] + 1e-3}
    status, out = run_tool(capsys, small_file(tmp_path, focal_loss=wrong))
    assert status == 1 and out.count("FAIL") == 1 and "focal_loss.grad_logits" in out

    for name in ("boxes_seed99.npz", "ops_seed99.npz"):
        status, out = run_tool(capsys, small_file(tmp_path, name, new_case={"x": np.zeros(2)}))
        assert status == 1 and "new_case (not run)" in out and "FAIL" in out


def test_the_tool_goes_on_after_a_case_that_raises(tmp_path, capsys):
    lacking = {key: value for key, value in FOCAL.items() if key != "logits"}
    broken = small_file(tmp_path, "boxes_seed1.npz", focal_loss=lacking, decode_scannet={}, focal_loss_2=FOCAL)
    right = small_file(tmp_path, "boxes_seed2.npz", focal_loss=FOCAL)
    status, out = run_tool(capsys, broken, right)
    assert status == 1
    assert "boxes_seed1.npz focal_loss: KeyError: 'logits" in out
    assert out.count("boxes_seed2.npz focal_loss.") == 2


def test_the_tool_fails_on_files_it_cannot_read(tmp_path, capsys):
    whole = small_file(tmp_path, focal_loss=FOCAL)
    truncated = tmp_path / "ops_seed5.npz"
    truncated.write_bytes(whole.read_bytes()[:2000])
    status, out = run_tool(capsys, truncated, whole)
    assert status == 1 and out.splitlines()[0].startswith("ops_seed5.npz (file): ") and "focal_loss.loss" in out

    lonely = small_file(tmp_path, "model_scannet_seed5.npz", a={"b": np.zeros(1)})
    status, out = run_tool(capsys, lonely)
    assert status == 1 and "weights_scannet_seed5.npz" in out

    for name in ("other_seed5.npz", "ops_seed5.txt"):
        (tmp_path / name).write_bytes(b"")
        status, out = run_tool(capsys, tmp_path / name)
        assert status == 1 and "unknown file" in out


def test_the_tool_takes_folders_and_leaves_weights_to_their_models(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    small_file(tmp_path / "deep", focal_loss=FOCAL)
    (tmp_path / "weights_scannet_seed0.npz").write_bytes(b"")
    status, out = run_tool(capsys, tmp_path)
    assert status == 0 and "weights" not in out
    status, out = run_tool(capsys, tmp_path / "weights_scannet_seed0.npz")
    assert status == 1 and "nothing was run" in out


def test_a_missing_file_is_status_2(tmp_path, capsys):
    assert parity.main([str(tmp_path / "ops_seed1.npz"), str(FIXTURES / "ops_seed0.npz")]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "ops_seed1.npz" in streams.err


def test_nan_never_passes():
    assert not CaseResult.compare("x", float("nan"), 1.0).ok

    def raises():
        yield CaseResult.compare("x", 0.0, 1.0)
        raise ValueError("two\nlines")

    first, second = guarded("case", raises())
    assert first.ok and not second.ok and second.name == "case: ValueError: two lines"
