"""What all pictures share: matplotlib without a window or global state, colours, file names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from h2a2_jax.report.page import Picture

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333", "#999933")
"""Distinct to colour-blind eyes (Okabe and Ito)."""
SHARED_MAP = LinearSegmentedColormap.from_list("shared", ["#e08214", "#f7f7f7", "#542788"])
"""Colours from a dataset's own kernel (orange, 0) to the shared one (purple, 1)."""
_DPI = 110


def canvas(rows: int, columns: int, width: float | int, height: float | int, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns]; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Picture:
    """Write <folder>/<name>.png."""
    figure.suptitle(title, parse_math=False)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=_DPI)
    return Picture(path, title, caption)


def name_steps(axes: Any) -> None:
    """The axis that training goes along."""
    axes.set_xlabel("training step")


def as_text(name: str) -> str:
    """A name that matplotlib sets as it is: "$" begins a formula, and a label that begins with "_" is left out."""
    return f"\N{ZERO WIDTH SPACE}{name}".replace("$", r"\$")


def groups_of(layers: Sequence[str]) -> dict[str, list[str]]:
    """Layers by the part of the network they are in: layer1 to layer4, stem, neck."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.split("_")[0].split(".")[0], []).append(layer)
    return groups
