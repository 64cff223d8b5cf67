"""Evaluation of scans by request: files and tables, heads across datasets, folders of scans."""

import csv
import json
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs.joint import demo
from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.config import ExperimentConfig, SourceConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation import evaluate_detections
from h2a2_jax.evaluation.cross import cross_table
from h2a2_jax.evaluation.documents import evaluation_json
from h2a2_jax.evaluation.evaluate import EvalRequest, _check_classes, chosen_sources, evaluate, predict_source
from h2a2_jax.evaluation.evaluation_page import draw_curves, write_evaluation_page
from h2a2_jax.evaluation.matches import read_matches
from h2a2_jax.scans.sources import build_source
from h2a2_jax.scans.specs import dataset_spec
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource


def small() -> ExperimentConfig:
    config = demo()
    return replace(config, datasets=tuple(replace(d, train_size=1, val_size=2) for d in config.datasets))


class Knowing:
    """Finds every annotated box whose class the head has, the larger the surer, and a chair where there is none."""

    def __init__(self, of: dict[str, str]):
        self.of = of  # dataset of a scan, by the beginning of its name

    def predict(self, scans, dataset):
        head = dataset_spec(dataset)
        found = []
        for scan in scans:
            classes = dataset_spec(next(d for start, d in self.of.items() if scan.name.startswith(start))).classes
            rows = [g for g, label in enumerate(scan.labels) if label >= 0 and classes[label] in head.classes]
            labels = [head.classes.index(classes[scan.labels[g]]) for g in rows]
            boxes = np.concatenate([scan.boxes[rows], [[90, 0, 0, 1, 1, 1, 0]]]).astype(np.float32)
            scores = np.append(np.minimum(0.5 + scan.boxes[rows, 3] / 10, 0.9), 0.1 + len(scan.points) / 1e6)
            found.append(
                Detections(boxes, scores.astype(np.float32), np.array([*labels, head.classes.index("chair")], np.int32))
            )
        return found


KNOWING = Knowing({f"synthetic_{name}": name for name in ("scannet", "sunrgbd", "s3dis")})


@dataclass(frozen=True)
class Written:
    """An evaluation: its results, the folder they were written to, and what it printed."""

    results: dict[str, Any]
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return evaluated(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return evaluated(tmp_path_factory.mktemp("across"), request=EvalRequest(cross=True))


def evaluated(folder: Path, config: ExperimentConfig | None = None, **options: Any) -> Written:
    with redirect_stdout(StringIO()) as printed:
        results = evaluate(config or small(), KNOWING, folder, **options)
    return Written(results, folder, printed.getvalue())


@pytest.mark.parametrize(("devices", "batch"), [(3, 2), (6, 1)])
def test_any_devices_and_batches_give_the_same_evaluation(plain: Written, tmp_path: Path, devices: int, batch: int):
    config = small()
    process_layout = MeshLayout(train_mesh(3, jax.devices()[:devices]), 3)
    config = replace(config, eval=replace(config.eval, batch_size=batch))
    other = evaluated(tmp_path, config, process_layout=process_layout)
    assert (other.folder / "evaluation.json").read_text() == (plain.folder / "evaluation.json").read_text()
    theirs, ours = (read_matches(folder / "matches.npz") for folder in (other.folder, plain.folder))
    assert {name: own.to_dict() for name, own in theirs.items()} == {name: own.to_dict() for name, own in ours.items()}


def test_evaluation_json_has_the_scores_of_every_dataset(plain: Written):
    text = (plain.folder / "evaluation.json").read_text()
    results = json.loads(text)
    assert list(results) == ["scannet", "sunrgbd", "s3dis"]
    for values in results.values():
        assert values["version"] == 1 and values["scans"] == 2 and "protocol" not in values
        assert [level["mAP"] for level in values["thresholds"]] == pytest.approx([1, 1])
        assert values["num_detections"]["chair"] == values["num_ground_truth"]["chair"] + 2
    assert evaluation_json(results) == text


def test_matches_give_the_scores_of_every_dataset(plain: Written):
    matches = read_matches(plain.folder / "matches.npz")
    assert list(matches) == ["scannet", "sunrgbd", "s3dis"]
    for (name, own), source in zip(matches.items(), small().datasets, strict=True):
        assert own.names == tuple(build_source(source, "val").names)
        values = plain.results[name]
        found = own.mean_average_precision(np.ones((1, 2), np.int64))[0]
        np.testing.assert_allclose(found, [level["mAP"] for level in values["thresholds"]], rtol=1e-12)
        assert own.ground_truth.sum() == sum(values["num_ground_truth"].values())


def test_every_annotated_box_is_in_one_bin_of_size_and_one_of_distance(plain: Written):
    for name, values in plain.results.items():
        assert values["by_distance"]["from"] == ("sensor" if name == "sunrgbd" else "centre")
        for breakdown in (values["by_size"], values["by_distance"]):
            boxes = sum(sum(one["num_ground_truth"].values()) for one in breakdown["bins"])
            assert boxes == sum(values["num_ground_truth"].values())


def test_tables_and_summaries_are_printed(plain: Written):
    printed = plain.printed
    assert "sunrgbd, 2 scans" in printed and "mAP@0.25/0.5 by size: small" in printed and "mean" in printed


def test_evaluation_csv_has_a_row_per_dataset_threshold_and_class(plain: Written):
    rows = list(csv.DictReader((plain.folder / "evaluation.csv").read_text().splitlines()))
    assert len(rows) == 2 * ((18 + 1) + (10 + 1) + (5 + 1))
    missing = plain.results["scannet"]["classes_left_out"][0]
    cells = next(row for row in rows if row["dataset"] == "scannet" and row["class"] == missing)
    assert (cells["AP"], cells["ground_truth"], cells["best_f1"]) == ("", "0", "")
    mean = next(row for row in rows if row["dataset"] == "s3dis" and row["class"] == "(mean)")
    assert float(mean["AP"]) == pytest.approx(1) and float(mean["best_f1"]) == pytest.approx(1)


def test_heads_are_evaluated_on_the_scans_of_other_datasets(across: Written):
    assert {name: list(values["cross"]) for name, values in across.results.items()} == {
        "scannet": ["sunrgbd", "s3dis"],
        "sunrgbd": ["scannet", "s3dis"],
        "s3dis": ["scannet", "sunrgbd"],
    }
    assert across.results["s3dis"]["protocol"] == {"split": "val"}
    entry = across.results["s3dis"]["cross"]["scannet"]
    assert entry["classes"]["bookcase"] == "bookshelf" and entry["without_counterpart"] == ["board"]
    assert entry["thresholds"][0]["own_mAP"] == pytest.approx(1)
    # The predictor of the test knows no synonyms and finds no bookcase under its other name.
    has_bookcase = across.results["s3dis"]["num_ground_truth"]["bookcase"] > 0
    assert entry["thresholds"][0]["AP"]["bookcase"] == (0 if has_bookcase else None)
    assert entry["thresholds"][1]["AP"]["chair"] == pytest.approx(1)


def test_a_table_across_datasets_is_printed(across: Written):
    table = cross_table(across.results)
    assert table in across.printed and "scannet on s3dis: without counterpart are board." in table


def test_the_page_has_pictures_and_tables_and_refers_to_nothing_outside(across: Written):
    text = write_evaluation_page(across.results, across.folder, "what it is").read_text()
    assert text.count("<img") == 6 and not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert 'id="cross"' in text and "bookcase (bookshelf)" in text and "what it is" in text
    assert "left out of the means" in text and "AP by class, size and distance" in text


def test_names_of_classes_are_drawn_as_they_are(tmp_path: Path):
    box, one, zero = np.ones((1, 7), np.float32), np.ones(1, np.float32), np.zeros(1, np.int32)
    document = evaluate_detections(
        [Detections(box, one, zero)], [GroundTruth(box, zero)], ["cost $\\foo$"], rotated=False
    ).to_dict()
    picture = draw_curves("a $\\b$", document, tmp_path)
    assert picture.path.is_file() and picture.title.startswith("a $\\b$:")


def test_a_folder_is_evaluated_with_the_head_of_a_dataset(tmp_path: Path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("kitchen", "office"):
        np.save(folder / f"{name}.npy", np.concatenate([rng.random((300, 3)) * 3, rng.random((300, 3))], 1))
    box = {"center": [1, 1, 0.5], "size": [1, 1, 1], "class": "Chair"}
    scans = [{"file": "kitchen.npy", "boxes": [box]}, {"file": "office.npy", "split": "val", "boxes": [box, box]}]
    (folder / "boxes.json").write_text(json.dumps({"version": 1, "scans": scans}))
    knowing = Knowing({"kitchen": "s3dis", "office": "s3dis"})
    request = EvalRequest(dataset="s3dis", data=str(folder), tta=("flip_x",))
    for split, boxes in (("val", 2), ("train", 1)):
        results = evaluate(small(), knowing, tmp_path / split, request=replace(request, split=split))
        assert list(results) == ["s3dis"] and results["s3dis"]["scans"] == 1
        assert results["s3dis"]["num_ground_truth"]["chair"] == boxes
        assert results["s3dis"]["protocol"]["tta"] == ["flip_x"]


def test_another_drawing_gives_other_points_where_some_are_drawn(tmp_path: Path):
    class Counting:
        """Notes the points it is shown."""

        def __init__(self) -> None:
            self.seen: dict[str, list[float]] = {}

        def predict(self, scans, dataset):
            self.seen.setdefault(dataset, []).extend(float(scan.points.sum()) for scan in scans)
            return KNOWING.predict(scans, dataset)

    config = small()
    seen = []
    for draw in (0, 0, 1):
        counting = Counting()
        evaluate(config, counting, tmp_path, draw=draw)
        seen.append(counting.seen)
    assert seen[0] == seen[1] and seen[0]["scannet"] == seen[2]["scannet"]  # all points are used there
    assert seen[0]["sunrgbd"] != seen[2]["sunrgbd"]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (EvalRequest(dataset="kitti"), "was trained on scannet, sunrgbd, s3dis, not on 'kitti': choose one of them"),
        (EvalRequest(data="."), "has heads for scannet, sunrgbd, s3dis: say whose classes . has (--dataset)"),
        (EvalRequest(data="nowhere", dataset="s3dis"), "There is no folder nowhere"),
        (
            EvalRequest(data="docs", dataset="s3dis"),
            "Nothing in docs says where the boxes are: --mode=check --data=docs",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_an_error(request_: EvalRequest, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        chosen_sources(small(), request_)


def test_across_datasets_needs_two():
    with pytest.raises(InputError, match="trained on scannet alone"):
        chosen_sources(replace(small(), datasets=small().datasets[:1]), EvalRequest(cross=True))


def test_other_classes_than_the_checkpoints_are_refused():
    def config(**changes):
        own = {"name": "own", "root": "x", "classes": ("cup", "lamp"), **changes}
        return replace(small(), datasets=(SourceConfig(**own),))

    _check_classes(config(), config(root="y"))
    with pytest.raises(InputError, match="own has the classes cup, lamp, the config's lamp, cup: give those"):
        _check_classes(config(), config(classes=("lamp", "cup")))
    with pytest.raises(InputError, match="own has axis-aligned boxes, the config's turned ones"):
        _check_classes(config(), config(has_yaw=True))


def test_results_of_other_requests_leave_the_runs_own_alone():
    assert EvalRequest().results_folder == EvalRequest(output=Path("x")).results_folder == "."
    request = EvalRequest("train", "s3dis", "some/scans", ("flip_x", "scales"), True, None, 100)
    assert request.results_folder == "evaluation_train_s3dis_scans_flip_x_scales_cross_step100"


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_work(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken cannot be written to"):
        evaluate(small(), Knowing({}), tmp_path / "taken")


def test_boxes_found_that_are_none_are_left_out_and_counted():
    spec = dataset_spec("s3dis")
    source = SyntheticSource(spec, "val", 1, scale="demo")
    truth = source[0].boxes[:1]

    class Diverging:
        def predict(self, scans, dataset):
            boxes = np.repeat(truth, 4, axis=0)
            boxes[1, 0], boxes[2, 3], boxes[3, 5] = np.nan, np.inf, 0
            return [Detections(boxes, np.full(4, 0.5, np.float32), np.repeat(source[0].labels[:1], 4)) for _ in scans]

    result = predict_source(Diverging(), source, spec, progress=False)
    np.testing.assert_array_equal(result.detections[0].boxes, truth)
    assert result.notes[source.names[0]]["boxes found that are not finite or have no size, left out"] == 3
    assert result.evaluate(spec, (0.5,)).best_f1_of_all[0].precision == 1
