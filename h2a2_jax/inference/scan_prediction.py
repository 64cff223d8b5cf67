"""Prediction of one scan of any size: in one pass of the network, or tile by tile."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tqdm import tqdm

from h2a2_jax.boxes.nms import Detections, suppress_across_classes
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.background import read_ahead
from h2a2_jax.inference.placement import PlacedScan
from h2a2_jax.inference.predictor import PlannedPass, Predictor, prepare
from h2a2_jax.inference.tiles import (
    TILED_ABOVE,
    Tile,
    TileGrid,
    Tiling,
    boxes_of_tile,
    cut_tiles,
    join_tiles,
    thin_evenly,
    tile_scan,
    tiles_for,
)
from h2a2_jax.scans.frame import Floor
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import DatasetSpec, class_label, labels_among, plain_name, renamed

Seconds = dict[str, float] | None
"""Time by stage, added to as in `Predictor.predict`."""


def plan_scan(predictor: Predictor, placed: PlacedScan, tile: Tiling, seconds: Seconds = None) -> PlannedPass | None:
    """Make the maps for the one pass of a scan, beside another pass that runs; None for a scan of several tiles."""
    if tiles_for(len(placed.scan.points), tile) is not None:
        return None
    return predictor.plan([drawn_points(placed)], seconds)


def drawn_points(placed: PlacedScan) -> Scan:
    """The points of a scan that its one pass takes: as the dataset's test protocol draws, of half a million at most."""
    # The name seeds the drawing: one name, so that a cloud gives the same boxes wherever it comes from.
    return prepare(replace(thin_evenly(placed.scan, TILED_ABOVE), name="scan"), placed.spec)


def predict_scan(
    predictor: Predictor,
    placed: PlacedScan,
    planned: PlannedPass | None,
    tile: Tiling,
    floor: Floor,
    *,
    seconds: Seconds = None,
    progress: bool = True,
) -> Detections:
    """Boxes of a scan, in its frame.

    Args:
        predictor: runs the network.
        placed: the scan, and whose head predicts.
        planned: result of `plan_scan`.
        tile: how it is cut, as given to `plan_scan`.
        floor: as of `placement.Frame`; "auto" finds the floor of each tile anew: those of storeys differ.
        seconds: time by stage.
        progress: True shows a bar, a tile a step, where there are several.
    """
    scan, spec = placed.scan, placed.spec
    if planned is not None:
        (found,) = predictor.run(planned, spec.name, seconds)
        return found
    tiles = cut_tiles(scan, tiles_for(len(scan.points), tile) or TileGrid())
    height = spec.floor if floor == "auto" else None
    loads = [partial(_plan_tile, predictor, scan, part, height, seconds) for part in tiles]
    parts = []
    with tqdm(
        total=len(tiles),
        desc=scan.name,
        unit="tile",
        leave=False,
        mininterval=progress_interval(),
        disable=None if progress and len(tiles) > 1 else True,
    ) as bar:
        for part, pending in zip(tiles, read_ahead(loads), strict=True):
            maps, lowered = pending.result()
            (found,) = predictor.run(maps, spec.name, seconds)
            parts.append(boxes_of_tile(found, part, lowered))
            bar.update()
    return join_tiles(parts, tiles)


def _plan_tile(
    predictor: Predictor, scan: Scan, tile: Tile, floor: float | None, seconds: Seconds
) -> tuple[PlannedPass, float]:
    """Make the maps of a tile, and tell by how much (m) it was lowered."""
    part, lowered = tile_scan(scan, tile, floor)
    return predictor.plan([part], seconds), lowered


@dataclass(frozen=True)
class BoxChoice:
    """The boxes of a scan that are wanted.

    Attributes:
        classes: names of the classes; empty: all. A head that has none of them gives no box.
        agnostic_nms: True leaves one box, the best, where boxes of several classes overlap
            (`nms.suppress_across_classes`).
    """

    classes: tuple[str, ...] = ()
    agnostic_nms: bool = False

    def check(self, specs: Sequence[DatasetSpec]) -> None:
        """Raise InputError if no head has one of the classes."""
        _check_classes(self.classes, specs)

    def of(self, found: Detections, spec: DatasetSpec) -> Detections:
        """Choose among the boxes that the head of a dataset found; they come back best first."""
        rows = np.argsort(-found.scores, kind="stable")
        if self.classes:
            labels = [class_label(name, spec) for name in self.classes]
            rows = rows[np.isin(found.labels[rows], labels)]
        found = Detections(found.boxes[rows], found.scores[rows], found.labels[rows])
        if not self.agnostic_nms:
            return found
        kept = suppress_across_classes(found, rotated=spec.has_yaw)
        return Detections(found.boxes[kept], found.scores[kept], found.labels[kept])


def renamed_specs(specs: Sequence[DatasetSpec], names: Mapping[str, str]) -> tuple[DatasetSpec, ...]:
    """Give classes names of one's own in every head that has them (`specs.renamed`).

    Raises:
        InputError: no head has one of the classes, or the new names are none.
    """
    _check_classes(names, specs)
    return tuple(
        renamed(spec, {old: new for old, new in names.items() if class_label(old, spec) >= 0}) for spec in specs
    )


def present_names(classes: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """Return classes, named as in the detector or by names of one's own, by those that the results have."""
    own = {plain_name(old): new for old, new in names.items()}
    return tuple(own.get(plain_name(name), name) for name in classes)


def _check_classes(names: Collection[str], specs: Sequence[DatasetSpec]) -> None:
    """Raise InputError for a name that no head has as a class."""
    every = tuple(dict.fromkeys(known for spec in specs for known in spec.classes))
    if names:
        labels_among(tuple(names), every, "the detector")
