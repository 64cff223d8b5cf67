"""A sheet of pictures of scans with their boxes, for a look at whether they fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.scans.scan import ScanSource, load_or_skip
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.viewer.content import Content, make_content, opened
from h2a2_jax.viewer.image import View, draw_views

_MOST_SCANS = 12
_MOST_POINTS = 400_000
_PIXELS = {1: 720, 2: 560, 3: 440}  # width of a view by the number of columns


def draw_contact_sheet(
    sources: Mapping[Any, ScanSource], usable: Sequence[tuple[str, str]], spec: DatasetSpec, path: Path
) -> None:
    """Draw up to 12 of the usable (split, scan name), each from above and obliquely, without ceilings and near walls.

    The scans are chosen evenly from the sources, which are named by split.
    """
    splits: dict[str, list[str]] = {}
    for split, name in usable:
        splits.setdefault(name, []).append(split)
    names = list(splits)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, _MOST_SCANS).astype(int))]
    columns = 1 if len(chosen) == 1 else 2 if len(chosen) <= 4 else 3
    tiles = []
    for name in chosen:
        source = sources[splits[name][0]]
        for scan in load_or_skip(source, {}, [list(source.names).index(name)]):
            whole = make_content(scan, None, spec.classes, GroundTruth(scan.boxes, scan.labels), _MOST_POINTS)
            views: dict[View, Content] = {"top": whole, "oblique": opened(whole)}
            extents = " x ".join(f"{length:.1f}" for length in np.ptp(scan.points, axis=0))
            remark = f"{len(scan.points):,} points, {len(scan.boxes)} boxes, {extents} m"
            tiles.append(draw_views(views, f"{name} ({', '.join(splits[name])})", remark, _PIXELS[columns]))
    if not tiles:
        return
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    sheet.save(path, "PNG")
