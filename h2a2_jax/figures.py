"""Pages of HTML with matplotlib figures."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
p { max-width: 52rem; } .note { color: #555; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; color: #555; padding-bottom: .3rem; }
figure { margin: 1.5rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption { color: #333; max-width: 60rem; font-size: .92rem; } nav a { margin-right: 1.2rem; }
@media print { body { max-width: none; font-size: 11pt; } nav { display: none; } h2 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG with a title and a caption: sentences on the content and how it was computed."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text, each opening with its name, under column names; the caption is a sentence on the numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then pictures and tables; the anchor is its id, for links."""

    anchor: str
    title: str
    text: Sequence[str] = ()
    contents: Sequence[Picture | Table] = ()


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """An HTML document with its pictures inlined."""
    links = "".join(f'<a href="#{escape(s.anchor)}">{escape(s.title)}</a>' for s in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        f'<h1>{escape(title)}</h1>\n<p class="note">{escape(subtitle)}</p>\n<nav>{links}</nav>\n'
        + "\n".join(_section(section) for section in sections)
        + "\n</body>\n</html>\n"
    )


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "\N{EN DASH}" if value is None or value != value else f"{value:.{digits}f}"


def _section(section: Section) -> str:
    parts = [f'<section id="{escape(section.anchor)}">', f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.text]
    parts += [_table(item) if isinstance(item, Table) else _figure(item) for item in section.contents]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    head = row(table.columns, "th")
    return f"<table><caption>{escape(table.caption)}</caption>\n<thead>{head}</thead>\n<tbody>{body}</tbody></table>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption></figure>"
    )


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333", "#999933")
"""Colours that colour-blind people can tell apart (Okabe and Ito)."""
SHARED_MAP = LinearSegmentedColormap.from_list("shared", ["#e08214", "#f7f7f7", "#542788"])
"""Colours from a dataset's own kernel (orange, 0) to the shared one (purple, 1)."""


def canvas(rows: int, columns: int, width: float | int, height: float | int, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns]; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Picture:
    """Write <folder>/<name>.png."""
    figure.suptitle(title, parse_math=False)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110)
    return Picture(path, title, caption)


def step_axis(ax: Any) -> None:
    """Label the x axis as training steps, with few round ticks: 10k for ten thousand."""
    ax.set_xlabel("training step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend_below(figure: Figure, ax: Any, side: str = "center", columns: int = 6, title: str = "") -> None:
    """Put the legend of some axes at the bottom of a figure, "left", "center" or "right", where it covers no curve."""
    handles, labels = ax.get_legend_handles_labels()
    place: dict[str, Any] = {"loc": f"outside lower {side}", "ncols": columns, "title": title}
    figure.legend(
        handles, labels, **place, fontsize=8, title_fontsize=8, frameon=False, handlelength=1.2, columnspacing=1
    )


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis from low to high at 1, 2 and 5, or at decades alone where these would overlap."""
    few = high / low > 200
    axis.set_major_locator(LogLocator(10, subs=(1.0,) if few else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def as_text(name: str) -> str:
    """Escape a name for matplotlib, where "$" begins a formula and a label with a leading "_" is hidden."""
    return f"\N{ZERO WIDTH SPACE}{name}".replace("$", r"\$")


def groups_of(layers: Sequence[str]) -> dict[str, list[str]]:
    """Layers by part of the network: layer1 to layer4, stem, neck."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.split("_")[0].split(".")[0], []).append(layer)
    return groups
