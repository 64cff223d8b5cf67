"""Tables of sweeps as Markdown, CSV and LaTeX, made of results as results.json holds them (`sweep_results`).

- Markdown is for reading: a table for each result, below it the differences between rows, and in a page the average
  precision of every class.
- CSV is tidy: a line for each row, dataset, metric and class, of all tables in one file, with full precision.
- LaTeX is for papers: `table*` floats with rules of the package booktabs, the best mean of each mAP column bold.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from h2a2_jax.errors import InputError

MEAN = "mean"
"""Dataset of scores that are means over the datasets."""
ALL = "all"
"""Dataset of scores of the training as a whole."""
PARAMETERS = "parameters"

_DIFFERENCES_NOTE = (
    "Differences of mAP in points, with 95 % intervals over what is named: the seeds that both rows have, and the "
    "validation scans. Not told apart: the interval holds zero. Runs without matches.npz, which --mode=eval writes, "
    "count over seeds alone, and with one seed have no interval."
)
_CLASSES_NOTE = (
    "AP in per cent, mean ± sample standard deviation; classes without ground truth in the validation scans are left "
    "out. mAP is the mean over classes."
)
_SPREAD = ("mean", "std", "std_seeds", "std_evaluations", "best", "worst")
_FIELDS = ("against", "dataset", "metric", "class", *_SPREAD, "low", "high", "told_apart", "over", "n")
"""Fields of a line of CSV behind those that name the table, its part and the row."""
_NO_FACTS = {"name", "seeds", "scores", "summary", "class_scores", "interval", PARAMETERS}
"""Keys of a row that are no facts about its setting."""


def chosen(
    results: Sequence[Mapping[str, Any]], kinds: Sequence[str] = (), metrics: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Restrict results to some kinds of tables and some metrics of datasets.

    Args:
        results: Tables of results.json.
        kinds: Kinds to keep, as in "ablation"; empty: all.
        metrics: Metrics to keep, as in "mAP@0.5", which keeps the AP of classes at this threshold too; empty: all.
            Parameters and scans per second always stay.

    Raises:
        InputError: no table is of a kind, or none has a metric.
    """
    known = {"kind": [result["kind"] for result in results], "metric": _metrics(results)}
    for flag, given in (("kind", kinds), ("metric", metrics)):
        if unknown := [name for name in given if name not in known[flag]]:
            raise InputError(f"--{flag} is {unknown[0]!r}; the tables there have {', '.join(known[flag]) or 'none'}.")
    kept = [dict(result) for result in results if not kinds or result["kind"] in kinds]
    return [_of_metrics(result, metrics) for result in kept] if metrics else kept


def _metrics(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Metrics of datasets in the order of the tables."""
    of_rows = [row["summary"] for result in results for row in result["rows"]]
    return [*dict.fromkeys(m for summary in of_rows for name, own in summary.items() if name != ALL for m in own)]


def _of_metrics(result: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    def keep(by_dataset: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Values by dataset and metric, of the metrics with these names."""
        kept = {d: {m: v for m, v in own.items() if d == ALL or m in names} for d, own in by_dataset.items()}
        return {dataset: own for dataset, own in kept.items() if own}

    rows = []
    for row in result["rows"]:
        summary = keep(row["summary"], metrics)
        if summary or not row["summary"]:  # a row of a protocol has one metric
            classes = keep(row.get("class_scores", {}), [name.removeprefix("m") for name in metrics])
            rows.append({**row, "summary": summary, "class_scores": classes})
    columns = [c for c in result["columns"] if _dataset_of(c) in (None, ALL) or c["path"][2] in ("*", *metrics)]
    differences = [{**one, "values": keep(one["values"], metrics)} for one in result.get("differences", ())]
    return {**result, "rows": rows, "columns": columns, "differences": [one for one in differences if one["values"]]}


def _dataset_of(column: Mapping[str, Any]) -> str | None:
    """Dataset whose metric a column shows; None for another fact."""
    return column["path"][1] if column["path"][0] == "summary" else None


class ClassTable(NamedTuple):
    """Average precision of the classes of one dataset at one threshold.

    Attributes:
        dataset: Name of the dataset.
        metric: As in "AP@0.25".
        rows: Names of the settings.
        means: By setting: spread of mAP, None where it is unknown.
        classes: By class and setting: spread of AP, None where it is unknown.
    """

    dataset: str
    metric: str
    rows: Sequence[str]
    means: Sequence[Mapping[str, Any] | None]
    classes: Mapping[str, Sequence[Mapping[str, Any] | None]]


def class_tables(result: Mapping[str, Any]) -> list[ClassTable]:
    """Tables of the classes of a result: one for each dataset and threshold; classes without any AP are left out."""
    rows = [row for row in result["rows"] if row.get("class_scores")]
    keys = dict.fromkeys((d, m) for row in rows for d, own in row["class_scores"].items() for m in own)
    tables = []
    for dataset, metric in keys:
        of_rows = {
            _label(row, result["columns"]): (own, row["summary"].get(dataset, {}).get(f"m{metric}"))
            for row in rows
            if (own := row["class_scores"].get(dataset, {}).get(metric))
        }
        names = dict.fromkeys(name for own, _ in of_rows.values() for name, spread in own.items() if spread["n"])
        classes = {name: [own.get(name) for own, _ in of_rows.values()] for name in names}
        if classes:
            tables.append(ClassTable(dataset, metric, [*of_rows], [mean for _, mean in of_rows.values()], classes))
    return tables


def _label(row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(_cell(row, column) for column in columns if column["form"] == "text")


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown_page(results: Sequence[Mapping[str, Any]]) -> str:
    """All tables of some results as a page of Markdown, with those of the classes."""
    return "\n".join(f"## {result['title']}\n\n{markdown(result)}{_markdown_classes(result)}" for result in results)


def markdown(result: Mapping[str, Any]) -> str:
    """The Markdown table of a result and the note below it; below these the table of differences, if it has some."""
    columns = result["columns"]
    lines = [[column["title"] for column in columns]]
    lines += [[_cell(row, column) for column in columns] for row in result["rows"]]
    text = f"{_table(lines)}\n\n{result['note']}\n"
    if differences := result.get("differences"):
        text += f"\n{_table(_difference_lines(differences))}\n\n{_DIFFERENCES_NOTE}\n"
    return text


def _markdown_classes(result: Mapping[str, Any]) -> str:
    tables = class_tables(result)
    text = ""
    for table in tables:
        lines = [["class", *table.rows], *([name, *map(_spread, own)] for name, own in table.classes.items())]
        lines.append([f"m{table.metric}", *map(_spread, table.means)])
        text += f"\n### {table.dataset}, {table.metric}\n\n{_table(lines)}\n"
    return f"{text}\n{_CLASSES_NOTE}\n" if tables else ""


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of lines of cells, the first of them the titles."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [text[0], rule, *text[1:]])


def _difference_lines(differences: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    keys = dict.fromkeys((name, m) for one in differences for name, of in one["values"].items() for m in of)
    titles = ["row", "against", *(f"{name} {metric}" for name, metric in keys), "over", "seeds"]
    lines = []
    for one in differences:
        cells = [difference_text(one["values"].get(name, {}).get(metric)) for name, metric in keys]
        lines.append([one["row"], one["against"], *cells, one["over"] or "-", str(len(one["seeds"]))])
    return [titles, *lines]


def difference_text(value: Mapping[str, Any] | None) -> str:
    """A difference and its interval, as in "+1.2 [-0.3, 2.9] not told apart"; a dash where it is not defined."""
    if value is None or value["difference"] is None:
        return "-"
    text = f"{value['difference']:+.1f}"
    if value["low"] is None:
        return text
    return f"{text} [{value['low']:.1f}, {value['high']:.1f}]" + ("" if value["told_apart"] else " not told apart")


def _value(row: Mapping[str, Any], column: Mapping[str, Any]) -> Any:
    """The value that the path of a column leads to; None or {} where there is none."""
    value: Any = row
    for key in column["path"]:
        value = next(iter(value.values()), {}) if key == "*" else (value or {}).get(key)
    return value


def _cell(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    value, form = _value(row, column), column["form"]
    if form == "count":
        return str(value or 0)
    if form == "length":
        return str(len(value))
    if form == "spread":
        return _spread(value)
    if form == "interval":
        low, high = (value or {}).get("low"), (value or {}).get("high")
        return "-" if low is None else f"[{low:.2f}, {high:.2f}]"
    if form == "decimals":
        return "-" if value is None else f"{value:.2f}"
    if form == "millions":
        return f"{value / 1e6:.2f} M"
    return str(value)


def _spread(value: Mapping[str, Any] | None) -> str:
    mean, std = (value or {}).get("mean"), (value or {}).get("std")
    return "-" if mean is None else f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}")


# --- CSV -------------------------------------------------------------------------------------------------------------


def csv_text(results: Sequence[Mapping[str, Any]]) -> str:
    """Write all tables as one tidy CSV: a line for each row, dataset, metric and class.

    The fields are "table" (kind of the result), "part" ("scores", "classes" or "differences"), "row", facts of the
    rows ("tau", "head", ...) and those of `_FIELDS`. "mean" of a difference is the difference, "n" counts values, for
    differences seeds. Numbers have full precision, in the unit of results.json; fields are empty where a value is not
    defined. The number of parameters is a line of dataset "all".
    """
    rows = [row for result in results for row in result["rows"]]
    facts = [*dict.fromkeys(k for row in rows for k, v in row.items() if k not in _NO_FACTS and v is not None)]
    out = io.StringIO()
    writer = csv.DictWriter(out, ["table", "part", "row", *facts, *_FIELDS], lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerows({"table": result["kind"], **line} for line in _csv_lines(result, facts))
    return out.getvalue()


def _csv_lines(result: Mapping[str, Any], facts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for row in result["rows"]:
        known = {key: "; ".join(v) if isinstance(v := row.get(key), list) else v for key in facts}
        named = {"row": row["name"], **known}
        interval = {key: (row.get("interval") or {}).get(key) for key in ("low", "high")}
        for dataset, metric, spread in _leaves(row["summary"]):
            line = {**named, "part": "scores", "dataset": dataset, "metric": metric}
            yield {**line, **_spread_fields(spread), **interval}
        if PARAMETERS in row:
            yield {**named, "part": "scores", "dataset": ALL, "metric": PARAMETERS, "mean": row[PARAMETERS]}
        for dataset, metric, classes in _leaves(row.get("class_scores", {})):
            for name, spread in classes.items():
                line = {**named, "part": "classes", "dataset": dataset, "metric": metric, "class": name}
                yield {**line, **_spread_fields(spread)}
    for one in result.get("differences", ()):
        for dataset, metric, value in _leaves(one["values"]):
            yield {
                "part": "differences",
                **{key: one[key] for key in ("row", "against", "over")},
                "dataset": dataset,
                "metric": metric,
                "mean": value["difference"],
                **{key: value[key] for key in ("low", "high", "told_apart")},
                "n": len(one["seeds"]),
            }


def _leaves(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    for dataset, own in values.items():
        for metric, value in own.items():
            yield dataset, metric, value


def _spread_fields(spread: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spread[key] for key in (*_SPREAD, "n")}


# --- LaTeX -----------------------------------------------------------------------------------------------------------

_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"±": r"$\pm$", "²": "$^2$", "³": "$^3$", "→": r"$\to$"}
)
_NONE = "--"
_CLASS = "class"
_COLUMN, _PAGE = 11, 110
"""Characters of a column of means with deviations, and of a line of a page."""
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}"


def latex(results: Sequence[Mapping[str, Any]]) -> str:
    r"""Write all tables as LaTeX floats, for `\input` in a document with the packages booktabs and graphicx.

    A table that is wider than the text is made smaller.
    Means are set with standard deviations; the best mean of an mAP column, and of a class among the settings, is bold,
    with all that are equal to it as printed. Rows of different classes, as those of different heads, are not compared.
    Differences have a line for each pair of rows, dataset and metric.
    """
    floats = [text for result in results for text in _floats(result)]
    return "\n".join(["% \\usepackage{booktabs,graphicx}", *floats])


def _floats(result: Mapping[str, Any]) -> Iterator[str]:
    kind, columns, rows = result["kind"], result["columns"], result["rows"]
    best = [_best_rows(rows, column) for column in columns]
    lines = [[_tex_cell(row, c, r in best[i]) for i, c in enumerate(columns)] for r, row in enumerate(rows)]
    aligned = "".join("l" if column["form"] == "text" else "r" for column in columns)
    yield _float(kind, f"{result['title']}. {result['note']}", aligned, _heads(columns), lines)
    if result.get("differences"):
        titles = ["row", "against", "dataset", "metric", "difference", "95 % interval", "", "over", "seeds"]
        lines = [*_tex_differences(result["differences"])]
        caption = f"{result['title']}: differences between rows. {_DIFFERENCES_NOTE}"
        yield _float(f"{kind}:differences", caption, "llllrrllr", [_line(map(_escape, titles))], lines)
    for table in class_tables(result):
        caption = f"{result['title']}: {table.metric} of the classes of {table.dataset}. {_CLASSES_NOTE}"
        label = f"{kind}:{table.dataset}:{table.metric}"
        titles, *lines = _class_grid(table)
        apart = titles[0] == _CLASS
        yield _float(label, caption, "l" + "r" * (len(titles) - 1), [_line(titles)], lines, last_apart=apart)


def _class_grid(table: ClassTable) -> list[list[str]]:
    """Cells of a table of classes: a line for each class, or for each setting where that is narrower on a page."""
    # Settings over other classes, as those of other heads, have means of their own.
    is_even = all(spread is not None for own in table.classes.values() for spread in own)
    means = _tex_compared(table.means) if is_even else [_tex_spread(mean, False) for mean in table.means]
    grid = [
        [_CLASS, *map(_escape, table.rows)],
        *([_escape(name), *_tex_compared(own)] for name, own in table.classes.items()),
        [f"m{table.metric}", *means],
    ]
    turned = [["setting", *grid[0][1:]], *grid[1:]]
    by_class, by_setting = (sum(max(len(text), _COLUMN) for text in row) for row in (grid[0], [r[0] for r in grid]))
    return [*map(list, zip(*turned, strict=True))] if by_setting < by_class > _PAGE else grid


def _float(
    label: str,
    caption: str,
    aligned: str,
    heads: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    last_apart: bool = False,
) -> str:
    """A `table*` of lines of cells; `last_apart` draws a rule above the last of them."""
    body = [f"    {_line(cells)}" for cells in lines]
    if last_apart:
        body.insert(-1, r"    \midrule")
    return "\n".join(
        [
            r"\begin{table*}",
            r"  \centering",
            f"  \\caption{{{_escape(caption)}}}",
            f"  \\label{{tab:{label.replace('_', '-')}}}",  # labels are read, not typeset: no escapes there
            r"  \footnotesize",
            r"  \setlength{\tabcolsep}{3pt}",
            f"  {_FITTED}{{\\begin{{tabular}}{{{aligned}}}",
            r"    \toprule",
            *(f"    {head}" for head in heads),
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


def _heads(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of titles: datasets above their metrics, if the titles begin with datasets."""
    pairs = []
    for column in columns:
        dataset, title = _dataset_of(column), column["title"]
        grouped = dataset is not None and title.startswith(f"{dataset} ")
        pairs.append((dataset, title.removeprefix(f"{dataset} ")) if grouped else ("", title))
    below = _line(_escape(title) for _, title in pairs)
    if not any(dataset for dataset, _ in pairs):
        return [below]
    cells, rules, first = [], [], 1
    for dataset, members in itertools.groupby(pairs, key=lambda pair: pair[0]):
        width = len([*members])
        if dataset:
            cells.append(f"\\multicolumn{{{width}}}{{c}}{{{_escape(dataset)}}}")
            rules.append(f"\\cmidrule(lr){{{first}-{first + width - 1}}}")
        else:
            cells += [""] * width
        first += width
    return [_line(cells), " ".join(rules), below]


def _line(cells: Any) -> str:
    text = " & ".join(cells)
    # A bracket or star behind the \\ of the line above would be read as its argument.
    return f"{'{}' if text.startswith(('[', '*')) else ''}{text} \\\\"


def _tex_differences(differences: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in differences:
        for dataset, metric, value in _leaves(one["values"]):
            low, high = value["low"], value["high"]
            known = value["difference"] is not None
            yield [
                *(_escape(text) for text in (one["row"], one["against"], dataset, metric)),
                f"${value['difference']:+.1f}$" if known else _NONE,
                _NONE if low is None else f"$[{low:.1f}, {high:.1f}]$",
                "" if value["told_apart"] is None else "told apart" if value["told_apart"] else "not told apart",
                one["over"] or _NONE,
                str(len(one["seeds"])),
            ]


def _best_rows(rows: Sequence[Mapping[str, Any]], column: Mapping[str, Any]) -> set[int]:
    """Numbers of the rows with the best mean of an mAP column, among rows over the same classes."""
    if column["form"] != "spread" or not column["path"][-1].startswith("mAP"):
        return set()
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(tuple(row.get("classes", ())), []).append(number)
    values = [_value(row, column) for row in rows]
    return {members[i] for members in groups.values() for i in _best([values[number] for number in members])}


def _best(values: Sequence[Mapping[str, Any] | None]) -> set[int]:
    """Numbers of the greatest means as printed, if there are several to compare."""
    means = {number: round(v["mean"], 1) for number, v in enumerate(values) if v and v["mean"] is not None}
    return {number for number, mean in means.items() if mean == max(means.values())} if len(means) > 1 else set()


def _tex_compared(values: Sequence[Mapping[str, Any] | None]) -> list[str]:
    best = _best(values)
    return [_tex_spread(value, number in best) for number, value in enumerate(values)]


def _tex_cell(row: Mapping[str, Any], column: Mapping[str, Any], bold: bool) -> str:
    if column["form"] == "spread":
        return _tex_spread(_value(row, column), bold)
    text = _cell(row, column)
    if text == "-":
        return _NONE
    return f"${text}$" if column["form"] in ("interval", "decimals") else _escape(text)


def _tex_spread(value: Mapping[str, Any] | None, bold: bool) -> str:
    text = _spread(value).replace("±", r"\pm")
    if text == "-":
        return _NONE
    return f"$\\mathbf{{{text}}}$" if bold else f"${text}$"


def _escape(text: str) -> str:
    return re.sub("-(?=-)", "-{}", text.translate(_ESCAPES))  # two hyphens would be set as a dash
