import numpy as np

from tests.boxes.golden import FIXTURES, load_cases
from tests.parity_boxes import run_boxes_file

CASES = load_cases(FIXTURES / "boxes_seed0.npz")


def run(path, **cases):
    np.savez(path, **{f"{case}.{name}": value for case, data in cases.items() for name, value in data.items()})
    return {result.name: result for result in run_boxes_file(path)}


def test_any_number_of_known_cases_pass_and_an_unknown_one_fails(tmp_path):
    results = run(
        tmp_path / "boxes.npz",
        focal_loss=CASES["focal_loss"],
        assign_s3dis_17=CASES["assign_scannet_2"],
        new_case={"x": np.zeros(1)},
    )
    assert {name for name, result in results.items() if not result.ok} == {"new_case (not run)"}
    assert {name.split(".")[0] for name in results} == {"focal_loss", "assign_s3dis_17", "new_case (not run)"}


def test_a_wrong_number_fails(tmp_path):
    wrong = {
        case: dict(CASES[case])
        for case in ("focal_loss", "assign_scannet_2", "multiclass_nms_scannet", "eval_sunrgbd_1")
    }
    wrong["focal_loss"]["loss"] = wrong["focal_loss"]["loss"] + 1e-3
    wrong["assign_scannet_2"]["cls_targets"] = np.roll(wrong["assign_scannet_2"]["cls_targets"], 1)
    wrong["multiclass_nms_scannet"]["out_labels"] = wrong["multiclass_nms_scannet"]["out_labels"][:-1]
    wrong["eval_sunrgbd_1"]["AP"] = np.nan_to_num(wrong["eval_sunrgbd_1"]["AP"])
    results = run(tmp_path / "boxes.npz", **wrong)
    failed = {name for name, result in results.items() if not result.ok}
    assert {
        "focal_loss.loss",
        "assign_scannet_2.cls_targets",
        "multiclass_nms_scannet.out_labels",
        "eval_sunrgbd_1.AP",
    } <= failed
    assert {"focal_loss.grad_logits", "multiclass_nms_scannet.out_scores", "eval_sunrgbd_1.recall"}.isdisjoint(failed)
