"""Tables of sweeps as Markdown, CSV and LaTeX."""

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.joint import demo
from h2a2_jax.cli import main
from h2a2_jax.sweeps.ablation import ablation_rows, comparison_result
from h2a2_jax.sweeps.protocol import protocol_result, protocol_rows
from h2a2_jax.sweeps.sweep_plan import locate
from h2a2_jax.sweeps.sweep_results import write_results
from h2a2_jax.sweeps.tables import latex, markdown_page
from tests.sweeps.finished import LEVELS

BASE = replace(demo(), datasets=demo().datasets[:2])
GAINS = {"naive": 0.0, "sfks_ngh": 0.125}


def write_evaluation(folder: Path, scores: Mapping[str, Mapping[str, float | None]]) -> None:
    """Write evaluation.json with the same AP of classes at both thresholds, less 0.25 at the second."""
    document = {}
    for dataset, classes in scores.items():
        levels = []
        for t, iou in enumerate(LEVELS):
            found = {name: None if value is None else value - 0.25 * t for name, value in classes.items()}
            known = [value for value in found.values() if value is not None]
            levels.append({"iou": iou, "mAP": sum(known) / len(known), "AP": found})
        document[dataset] = {"thresholds": levels}
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(document))


def swept(workdir: Path) -> dict[str, Any]:
    """Result of an ablation of two rows and two seeds, stored in the folder."""
    rows = ablation_rows(BASE, (0, 1), [*GAINS])
    folders = locate(rows, workdir)
    for run, folder in folders.items():
        score = 0.5 + 0.25 * run.seed + GAINS[run.name]
        write_evaluation(folder, {"scannet": {"chair": score, "sofa": None, "trash_can & more": 0.25},
                                  "sunrgbd": {"bed": 0.5}})  # fmt: skip
        line = {"step": 1, "version": 1, "scans_per_second": 8.0 + run.seed}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    result = comparison_result("ablation", "Ablation_1", BASE, rows, ["naive joint"], folders)
    write_results([result], workdir)
    return json.loads((workdir / "results.json").read_text())["results"][0]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, swept(folder)


def tabulars(text: str) -> list[list[list[str]]]:
    """Cells of the lines of every tabular; fails where LaTeX would."""
    bare = re.sub(r"\\[{}&%$#_\\]", "", "\n".join(re.sub(r"^%.*", "", line) for line in text.splitlines()))
    depth = 0
    for character in bare:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0 and "%" not in bare and "#" not in bare
    environments: list[str] = []
    for end, name in re.findall(r"\\(begin|end)\{([\w*]+)\}", text):
        assert end == "begin" or environments.pop() == name
        environments += [name] * (end == "begin")
    assert not environments
    outside_of_math = "".join(bare.split("$")[::2])
    assert "_" not in outside_of_math and "^" not in outside_of_math and text.isascii()
    found = []
    for aligned, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        lines = [line.strip() for line in body.splitlines() if "&" in line]
        assert all(line.endswith(r" \\") for line in lines)
        cells = [re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in lines]
        for line in cells:
            spans = [int(span[1]) if (span := re.match(r" *\\multicolumn\{(\d+)\}", cell)) else 1 for cell in line]
            assert sum(spans) == len(aligned), line
        assert "&" not in "".join(line for line in body.splitlines() if line.strip() not in lines)
        found.append([[cell.strip() for cell in line] for line in cells])
    return found


def test_latex_is_whole_and_the_best_of_a_column_is_bold(sweep: tuple[Path, dict[str, Any]]):
    folder, result = sweep
    text = latex([result])
    assert (folder / "table.tex").read_text() == text and r"\label{tab:ablation}" in text and r"Ablation\_1" in text
    main_table, differences, *classes = tabulars(text)
    assert (
        main_table[0][:2] == ["", r"\multicolumn{2}{c}{scannet}"] and r"\cmidrule(lr){2-3} \cmidrule(lr){4-5}" in text
    )
    assert main_table[1] == ["setting", *["mAP@0.25", "mAP@0.5"] * 3, "parameters", "scans/s", "seeds"]
    by_name = {line[0]: line[1:] for line in main_table}
    # Of 37.5 and 50, of 43.75 and 56.25; SUN RGB-D is equal in both rows, and so both are the best.
    assert by_name["naive joint"][:3] == [r"$43.8 \pm 8.8$", r"$18.8 \pm 8.8$", r"$\mathbf{50.0 \pm 0.0}$"]
    assert by_name["SF-KS + NGH"][0] == r"$\mathbf{50.0 \pm 8.8}$" and by_name["SF-KS + NGH"][-2] == r"$8.5 \pm 0.7$"
    assert by_name["SF-KS + NGH"][-3].endswith(" M")
    gain, null = (next(line for line in differences[1:] if line[2] == name) for name in BASE.dataset_names)
    assert gain[:5] == ["SF-KS + NGH", "naive joint", "scannet", "mAP@0.25", "$+6.2$"] and gain[6] == "told apart"
    assert null[4:] == ["$+0.0$", "$[0.0, 0.0]$", "not told apart", "seeds", "2"]
    assert len(classes) == 4 and [line[0] for line in classes[0]] == [
        "class",
        "chair",
        r"trash\_can \& more",
        "mAP@0.25",
    ]
    assert classes[1][1] == ["chair", r"$37.5 \pm 17.7$", r"$\mathbf{50.0 \pm 17.7}$"]
    assert classes[2][0] == ["class", "naive joint", "SF-KS + NGH"]


def test_names_of_any_kind_are_escaped():
    column = {"title": "setting [50%]", "path": ["name"], "form": "text"}
    names = ["[a] * {b} & c_d", "*50 % #1 $ ~ ^ \\ <|>"]
    result = {"kind": "k_k", "title": "t", "note": "n ± m² → H²A²", "columns": [column, {**column, "title": "again"}],
              "rows": [{"name": name, "summary": {}} for name in names]}  # fmt: skip
    (table,) = tabulars(latex([result]))
    assert [line[0] for line in table] == [r"setting [50\%]", r"{}[a] * \{b\} \& c\_d",
                                           r"{}*50 \% \#1 \$ \textasciitilde{} \textasciicircum{} \textbackslash{} "
                                           r"\textless{}\textbar{}\textgreater{}"]  # fmt: skip


def test_classes_are_columns_where_settings_have_long_names():
    spreads = [{"mean": mean, "std": None, "n": 1} for mean in (10.0, 20.0)]
    labels = [f"H2A2, {head}, the mean of the datasets, shared kernels alone" for head in ("scannet", "sunrgbd")]
    rows = [
        {"name": label, "summary": {"s3dis": {"mAP@0.5": spread}},
         "class_scores": {"s3dis": {"AP@0.5": {"chair": spread} | ({"sofa": spread} if i else {})}}}
        for i, (label, spread) in enumerate(zip(labels, spreads, strict=True))
    ]  # fmt: skip
    columns = [{"title": "row", "path": ["name"], "form": "text"}]
    result = {"kind": "transfer", "title": "t", "note": "", "columns": columns, "rows": rows}
    _, table = tabulars(latex([result]))
    assert table == [
        ["setting", "chair", "sofa", "mAP@0.5"],
        [labels[0], "$10.0$", "--", "$10.0$"],
        [labels[1], r"$\mathbf{20.0}$", "$20.0$", "$20.0$"],  # means over other classes are not compared
    ]


def test_csv_has_a_line_for_each_value_in_full_precision(sweep: tuple[Path, dict[str, Any]]):
    folder, result = sweep
    lines = [*csv.DictReader(io.StringIO((folder / "table.csv").read_text()))]
    by_key = {tuple(line[k] for k in ("part", "row", "dataset", "metric", "class")): line for line in lines}
    assert len(by_key) == len(lines)
    of_rows = {row["name"]: row for row in result["rows"]}
    for (part, name, dataset, metric, of_class), line in by_key.items():
        if part == "differences":
            (one,) = (one for one in result["differences"] if one["row"] == name)
            value = one["values"][dataset][metric]
            assert (line["mean"], line["told_apart"]) == (str(value["difference"]), str(value["told_apart"]))
        elif metric == "parameters":
            assert int(line["mean"]) == of_rows[name]["parameters"] > 0
        else:
            found = of_rows[name]["summary" if part == "scores" else "class_scores"][dataset][metric]
            spread = found[of_class] if part == "classes" else found
            assert (float(line["mean"]) if line["mean"] else None, int(line["n"])) == (spread["mean"], spread["n"])
    assert by_key["scores", "naive joint", "all", "scans_per_second", ""]["mean"] == "8.5"
    assert by_key["classes", "naive joint", "scannet", "AP@0.5", "chair"]["std"] == repr(statistics.stdev([25, 50]))
    assert by_key["classes", "naive joint", "scannet", "AP@0.5", "sofa"]["mean"] == ""


def test_the_page_has_the_classes_of_every_dataset_and_threshold(sweep: tuple[Path, dict[str, Any]]):
    folder, result = sweep
    page = (folder / "table.md").read_text()
    assert page == markdown_page([result]) and "not told apart" in page
    headings = [f"### {name}, AP@{level}" for name in BASE.dataset_names for level in LEVELS]
    assert re.findall("^###.*", page, flags=re.MULTILINE) == headings
    assert re.search(r"\| chair +\| 62.5 ± 17.7 \| 75.0 ± 17.7 \|", page) and "| sofa" not in page


def test_a_protocol_has_the_classes_of_all_evaluations(tmp_path: Path):
    rows = protocol_rows(BASE, 2, 2)
    folders = locate(rows, tmp_path)
    for run, folder in folders.items():
        write_evaluation(folder, {"scannet": {"chair": 0.5 + 0.25 * run.seed}, "sunrgbd": {"bed": 0.25}})
        write_evaluation(folder / "evaluation_draw1", {"sunrgbd": {"bed": 0.75}})
    write_results([protocol_result(BASE, rows, 2, folders)], tmp_path)
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    by_name = {row["name"]: row.get("class_scores") for row in result["rows"]}
    assert [*by_name["scannet @0.25"]["scannet"]] == ["AP@0.25"] and by_name["mean @0.5"] is None
    chair, bed = (by_name[f"{d} @0.5"][d]["AP@0.5"][c] for d, c in (("scannet", "chair"), ("sunrgbd", "bed")))
    assert (chair["mean"], chair["n"], bed["mean"], bed["n"]) == (37.5, 4, 25.0, 4)
    assert bed["std_evaluations"] == pytest.approx(50 / 2**0.5)
    protocol, *classes = tabulars((tmp_path / "table.tex").read_text())
    assert protocol[1][0] == "scannet @0.25" and protocol[1][1].startswith("$") and len(classes) == 4


def test_the_command_makes_tables_of_older_results(
    sweep: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, result = sweep
    bare = [{k: v for k, v in row.items() if k != "class_scores"} for row in result["rows"]]
    old = {k: v for k, v in result.items() if k != "differences"} | {"rows": bare}
    (tmp_path / "results.json").write_text(json.dumps({"version": 2, "results": [old]}))
    assert main(["table", str(tmp_path)]) == 0 and "table.tex" in capsys.readouterr().out
    assert len(tabulars((tmp_path / "table.tex").read_text())) == 1
    (tmp_path / "runs").symlink_to(folder / "runs")  # where the runs are, so are the classes
    assert main(["table", str(tmp_path), "--format=tex", "--metric=mAP@0.5"]) == 0
    main_table, *classes = tabulars(capsys.readouterr().out)
    assert main_table[1] == ["setting", *["mAP@0.5"] * 3, "parameters", "scans/s", "seeds"] and len(classes) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "needs the folder of a sweep, as in runs/sweep"),
        (["nowhere"], "There is no nowhere/results.json: give the folder of a sweep"),
        (["SWEEP", "--kind=tau"], "--kind is 'tau'; the tables there have ablation."),
        (["SWEEP", "--metric=AP"], "--metric is 'AP'; the tables there have mAP@0.25, mAP@0.5."),
        (["OLD"], "has version 1, this program reads versions 2, 3, 4"),
    ],
)
def test_what_cannot_be_set_is_a_sentence(
    arguments: list[str], sentence: str, sweep: tuple[Path, dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    (tmp_path / "results.json").write_text('{"version": 1, "results": []}')
    places = {"SWEEP": str(sweep[0]), "OLD": str(tmp_path)}
    assert main(["table", *(places.get(a, a) for a in arguments)]) == 2
    assert sentence in capsys.readouterr().err
