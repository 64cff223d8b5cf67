"""An evaluation as one HTML page: tables, precision-recall curves, AP by size and distance, calibration of scores."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from h2a2_jax.figures import COLORS, Picture, Section, Table, as_text, canvas, number, page, save
from h2a2_jax.viewer.content import class_color

PAGE_FILE = "evaluation.html"

Document = Mapping[str, Any]


def write_evaluation_page(documents: Mapping[str, Document], folder: Path, subtitle: str) -> Path:
    """Write <folder>/evaluation.html, which refers to nothing outside itself, from evaluation.json; return its path."""
    with TemporaryDirectory() as pictures:
        sections = [_summary(documents)]
        for name, document in documents.items():
            contents: list[Table | Picture] = [_classes(document)]
            contents += [draw(name, document, Path(pictures)) for draw in (draw_curves, draw_breakdowns)]
            text = [f"{document['scans']} scans. A dash: no ground truth."]
            sections.append(Section(name, name, text, [*contents, _bins_table(document)]))
        if any("cross" in document for document in documents.values()):
            sections.append(_cross(documents))
        html = page("Evaluation", subtitle, sections)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE_FILE
    path.write_text(html, encoding="utf-8")
    return path


def draw_curves(name: str, document: Document, folder: Path) -> Picture:
    """Precision against recall of every class with ground truth, one diagram per IoU threshold."""
    levels = document["thresholds"]
    figure, axes = canvas(1, len(levels), 5.2 * len(levels), 4.6)
    for ax, level in zip(axes[0], levels, strict=True):
        for label, (title, curve) in enumerate(level["curves"].items()):
            if curve is not None:
                reach = next((i for i, value in enumerate(curve) if value == 0), len(curve))
                recall = [i / (len(curve) - 1) for i in range(reach)]
                style = ("-", "--")[label // 10 % 2]
                ax.plot(recall, curve[:reach], style, color=class_color(label), label=as_text(title), linewidth=1.6)
        ax.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        ax.set_title(f"IoU above {level['iou']:g}", fontsize="medium")
        ax.grid(alpha=0.3)
    handles, titles = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, titles, loc="outside lower center", ncols=6, fontsize="small")
    caption = (
        "Precision at a recall is the best at that recall or beyond; a curve ends at the recall that all detections "
        "reach. Average precision is the area below."
    )
    return save(figure, folder, f"{name}_curves", f"{name}: precision and recall by class", caption)


def draw_breakdowns(name: str, document: Document, folder: Path) -> Picture:
    """AP by size and by distance, and the share of hits by score."""
    figure, axes = canvas(1, 3, 12.5, 4.0)
    for ax, key in zip(axes[0], ("by_size", "by_distance"), strict=False):
        breakdown = document[key]
        if breakdown is None:
            ax.set_axis_off()
            continue
        _draw_bars(ax, breakdown)
        title = "AP by size" if key == "by_size" else f"AP by distance from the {breakdown['from']}"
        ax.set_title(title, fontsize="medium")
    ax = axes[0][2]
    ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
    for color, level in zip(COLORS, document["thresholds"], strict=False):
        known = [(bin_["score"], bin_["precision"]) for bin_ in level["calibration"] if bin_["detections"]]
        if known:
            ax.plot(*zip(*known, strict=True), "o-", color=color, label=f"IoU above {level['iou']:g}", markersize=4)
    ax.set(xlim=(0, 1.02), ylim=(-0.01, 1.03), xlabel="score", ylabel="share of detections that are hits")
    ax.set_title("what a score means", fontsize="medium")
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small")
    caption = (
        "Left and middle: mean AP over the classes with ground truth in a bin. A detection counts in the bin of the "
        "box that it overlaps most, or else in that of its own size or place; size is the volume, distance is "
        "horizontal. Right: hits among the detections of each tenth of the score; on the dotted line a score is the "
        "probability of a hit."
    )
    return save(figure, folder, f"{name}_bins", f"{name}: where it does well", caption)


def _draw_bars(ax: Any, breakdown: Mapping[str, Any]) -> None:
    bins = breakdown["bins"]
    count = len(bins[0]["thresholds"])
    width = 0.8 / count
    for t, color in zip(range(count), COLORS, strict=False):
        levels = [one["thresholds"][t] for one in bins]
        places = [b + (t - (count - 1) / 2) * width for b in range(len(bins))]
        heights = [100 * (level["mAP"] or 0) for level in levels]
        ax.bar(places, heights, width * 0.92, color=color, label=f"IoU above {levels[0]['iou']:g}")
        for place, height, level in zip(places, heights, levels, strict=True):
            text = "none" if level["mAP"] is None else f"{height:.0f}"
            ax.annotate(text, (place, height), (0, 2), textcoords="offset points", ha="center", fontsize="small")
    ticks = []
    for one, values in zip(bins, _ranges(breakdown), strict=True):
        boxes = sum(one["num_ground_truth"].values())
        ticks.append(f"{one['name']}\n{values}\n{boxes} {'box' if boxes == 1 else 'boxes'}")
    ax.set_xticks(range(len(bins)), ticks)
    ax.set(ylim=(0, 108), ylabel="mAP (%)")
    ax.legend(fontsize="small", loc="upper right")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _ranges(breakdown: Mapping[str, Any]) -> list[str]:
    bounds, unit = breakdown["bounds"], breakdown["unit"].replace("m3", "m\N{SUPERSCRIPT THREE}")
    inner = [f"{low:g}\N{EN DASH}{high:g} {unit}" for low, high in itertools.pairwise(bounds)]
    return [f"< {bounds[0]:g} {unit}", *inner, f"\N{GREATER-THAN OR EQUAL TO} {bounds[-1]:g} {unit}"]


def _summary(documents: Mapping[str, Document]) -> Section:
    levels = next(iter(documents.values()))["thresholds"]
    columns = ["dataset", "scans", "ground truth", "detections"]
    columns += [f"{kind}@{level['iou']:g}" for level in levels for kind in ("mAP", "mAR")]
    columns += [f"keep scores from, for IoU {level['iou']:g}" for level in levels]
    rows = []
    for name, document in documents.items():
        counts = (sum(document[key].values()) for key in ("num_ground_truth", "num_detections"))
        scores = [_per_cent(level[kind]) for level in document["thresholds"] for kind in ("mAP", "mAR")]
        kept = [_of(level["best_f1_of_all"], "score", 2) for level in document["thresholds"]]
        rows.append([name, str(document["scans"]), *map(str, counts), *scores, *kept])
    caption = (
        "Means over the classes with ground truth, in per cent. The score to keep boxes from is the one of the "
        "greatest F1, for all classes alike."
    )
    text = []
    for name, document in documents.items():
        if document["classes_left_out"]:
            left_out = ", ".join(document["classes_left_out"])
            text.append(f"{name}: left out of the means, for want of ground truth: {left_out}.")
        if document["skipped"]:
            reasons = "; ".join(document["skipped"].values())
            text.append(f"{name}: {len(document['skipped'])} scans could not be used: {reasons}")
    return Section("summary", "Summary", text, [Table(caption, columns, rows)])


def _classes(document: Document) -> Table:
    levels = document["thresholds"]
    columns = ["class", "boxes", "detections"]
    for level in levels:
        columns += [f"AP@{level['iou']:g}", f"AR@{level['iou']:g}", "best F1", "score from"]

    def row(title: str, truth: int, detections: int, figures: Iterable[tuple[Any, Any, Any]]) -> list[str]:
        cells = [title, str(truth), str(detections)]
        for precision, recall, point in figures:
            cells += [_per_cent(precision), _per_cent(recall), _of(point, "f1", 1, 100.0), _of(point, "score", 2)]
        return cells

    truth, detections = document["num_ground_truth"], document["num_detections"]
    rows = [
        row(name, truth[name], detections[name], ((o["AP"][name], o["AR"][name], o["best_f1"][name]) for o in levels))
        for name in truth
    ]
    means = [(level["mAP"], level["mAR"], level["best_f1_of_all"]) for level in levels]
    rows.append(row("mean", sum(truth.values()), sum(detections.values()), means))
    caption = (
        "Per cent; AP: area below the precision-recall curve, AR: recall of all detections, score from: where F1 is "
        "greatest, in the last row for all classes alike."
    )
    return Table(caption, columns, rows)


def _bins_table(document: Document) -> Table:
    found = [document[key] for key in ("by_size", "by_distance") if document[key]]
    bins = [(one, t) for breakdown in found for one in breakdown["bins"] for t in range(len(one["thresholds"]))]
    columns = ["class", *(f"{one['name']} @{one['thresholds'][t]['iou']:g}" for one, t in bins)]
    rows = [
        [label, *(_per_cent(one["thresholds"][t]["AP"][label]) for one, t in bins)]
        for label, count in document["num_ground_truth"].items()
        if count
    ]
    return Table("AP by class, size and distance, in per cent, at each IoU threshold.", columns, rows)


def _cross(documents: Mapping[str, Document]) -> Section:
    heads = list(dict.fromkeys(head for name, one in documents.items() for head in (name, *one["cross"])))
    tables: list[Table | Picture] = []
    for t, level in enumerate(next(iter(documents.values()))["thresholds"]):
        rows = [[head, *(_cell(head, name, one, t) for name, one in documents.items())] for head in heads]
        caption = (
            f"mAP@{level['iou']:g} in per cent of each head (rows) on each dataset's scans (columns), over the classes "
            "that both have; in brackets the scans' own head over the same classes, and how many they are."
        )
        tables.append(Table(caption, ["head", *(f"on {name}" for name in documents)], rows))
    text = [
        "Boxes are compared as the dataset of the scans annotates them: where it has no yaw, a turned box counts as "
        "the axis-aligned one around it."
    ]
    for name, one in documents.items():
        for head, entry in one["cross"].items():
            pairs = [name if name == other else f"{name} ({other})" for name, other in entry["classes"].items()]
            common = f"common are {', '.join(pairs)}" if pairs else "no common class"
            text.append(
                f"{head} on {name}: {common}. Without counterpart: "
                f"{', '.join(entry['without_counterpart']) or 'none'}; of the head unused: "
                f"{', '.join(entry['unused']) or 'none'}."
            )
    return Section("cross", "Across datasets", text, tables)


def _cell(head: str, name: str, document: Document, t: int) -> str:
    if head == name:
        return _per_cent(document["thresholds"][t]["mAP"])
    entry = document["cross"].get(head)
    if entry is None:
        return number(None)
    level = entry["thresholds"][t]
    return f"{_per_cent(level['mAP'])} ({_per_cent(level['own_mAP'])}, {len(entry['classes'])})"


def _of(point: Mapping[str, float | None] | None, key: str, digits: int, factor: float = 1.0) -> str:
    value = None if point is None else point[key]
    return number(None if value is None else factor * value, digits)


def _per_cent(share: float | None) -> str:
    return number(None if share is None else 100 * share, 1)
