"""What the tables of sweeps have in common."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MEAN = "mean"
"""In place of a dataset's name: the mean over datasets."""


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of cells, the first of which are titles; columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [text[0], rule, *text[1:]])


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, sample standard deviation (None for one value) and number of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, "n": len(known)}


def spread_cell(value: Mapping[str, Any] | None) -> str:
    """A `spread` as in "51.3 ± 0.7"."""
    if value is None:
        return "-"
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def per_cent(share: float | None) -> float | None:
    """A share in per cent."""
    return None if share is None else 100 * share
