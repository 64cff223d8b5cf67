"""Domain gap between the procedural datasets of H2A2's setting, as one number from 0 to 2.

At 0 the three are one distribution under three names, at 1 they are the stand-ins of the real datasets, at 2 they are
further apart. In between:

    gap < 1:  a scan is, with probability 1 - gap, a common scan: made as for one of the three datasets, drawn at
              random, in a room whose only annotated furniture is of the kinds that all three annotate. All datasets
              have ScanNet's recipe and box protocol (`protocol_at`).
    gap > 1:  with e = gap - 1, furniture and boxes of a dataset are scaled by its factors to the power e, its usual
              furniture becomes more frequent (share / mean share of the three, to the power e), its points fewer or
              noisier, and the axes of a share e of the S3DIS scans are permuted.

Stand-ins of the other datasets exist at 1 alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import SCANNET, SPECS, DatasetSpec
from h2a2_jax.scans.synthetic.rooms import Programme, Scale, Weights, label_of, programme
from h2a2_jax.scans.synthetic.sensors import Capture

LARGEST_GAP = 2.0


@dataclass(frozen=True)
class Exaggeration:
    """Changes of one dataset's scans at gap 2.

    Attributes:
        furniture: factor of the sizes of all furniture.
        extent: factor of the sizes of boxes.
        kept: share of the points that is kept.
        noise: standard deviation (m) of the noise that is added to every point.
        is_permuted: True if the new x, y, z are z, x, y.
    """

    furniture: float = 1.0
    extent: float = 1.0
    kept: float = 1.0
    noise: float = 0.0
    is_permuted: bool = False


EXAGGERATIONS: Mapping[str, Exaggeration] = {
    "scannet": Exaggeration(kept=0.6),
    "sunrgbd": Exaggeration(furniture=1.25, extent=1.2, noise=0.02),
    "s3dis": Exaggeration(furniture=0.8, extent=0.85, is_permuted=True),
}


def protocol_at(spec: DatasetSpec, gap: float) -> DatasetSpec:
    """Return the protocol of a dataset at a gap: below 1 ScanNet's but for name, classes and their levels.

    Raises:
        InputError: a gap other than 1 of a dataset beyond ScanNet, SUN RGB-D and S3DIS.
    """
    if gap != 1 and spec.name not in EXAGGERATIONS:
        raise InputError(
            f"The gap of the procedural {spec.name} is {gap:g}; only {', '.join(EXAGGERATIONS)} have gaps: give 1."
        )
    if gap >= 1:
        return spec
    return replace(SCANNET, name=spec.name, classes=spec.classes, label_to_level=spec.label_to_level)


def draw_style(spec: DatasetSpec, scale: Scale, gap: float, rng: Generator) -> tuple[str, Programme]:
    """Draw how a scan of a dataset is made: as for which dataset (its name), and in which rooms.

    Nothing is drawn from `rng` at a gap of 1 and above.
    """
    if gap >= 1:
        return spec.name, _exaggerated(programme(spec, scale), spec, gap - 1)
    if rng.random() < gap:
        return spec.name, programme(spec, scale)
    style = SPECS[rng.integers(len(SPECS))]
    return style.name, _common(programme(style, scale))


def exaggerate_capture(capture: Capture, name: str, gap: float, rng: Generator) -> Capture:
    """Leave out points and add noise as the dataset `name` wants at a gap above 1; at most 1: no change, no draw."""
    if gap <= 1:
        return capture
    change = EXAGGERATIONS[name]
    kept = np.flatnonzero(rng.random(len(capture.points)) < change.kept ** (gap - 1))
    noise = rng.standard_normal((len(kept), 3), np.float32) * np.float32(change.noise * (gap - 1))
    points, colors, owners = capture.points[kept] + noise, capture.colors[kept], capture.owners[kept]
    return replace(capture, points=points, colors=colors, owners=owners)


def exaggerate_scan(scan: Scan, name: str, gap: float, rng: Generator) -> Scan:
    """Scale boxes and permute axes as the dataset `name` wants at a gap above 1; at most 1: no change, no draw."""
    if gap <= 1:
        return scan
    change = EXAGGERATIONS[name]
    boxes = scan.boxes.copy()
    boxes[:, 3:6] *= np.float32(change.extent ** (gap - 1))
    if not change.is_permuted or rng.random() >= gap - 1:
        return replace(scan, boxes=boxes)
    return replace(scan, points=scan.points[:, [2, 0, 1]], boxes=boxes[:, [2, 0, 1, 5, 3, 4, 6]])


def _common(plan: Programme) -> Programme:
    """Rooms without the furniture that some of the datasets annotate and others do not."""
    uneven = {name for name in plan.kinds if len({label_of(name, spec) >= 0 for spec in SPECS}) > 1}
    rooms = tuple({name: weight for name, weight in room.items() if name not in uneven} for room in plan.rooms)
    return replace(plan, rooms=rooms)


def _exaggerated(plan: Programme, spec: DatasetSpec, excess: float) -> Programme:
    """Rooms of a dataset at gap 1 + excess."""
    if excess == 0:
        return plan
    factor = EXAGGERATIONS[spec.name].furniture ** excess
    kinds = {
        name: replace(kind, size=(kind.size[0] * factor, kind.size[1] * factor, kind.size[2] * factor))
        for name, kind in plan.kinds.items()
    }
    shares = [_shares(programme(other, plan.scale).rooms) for other in SPECS]
    own = _shares(plan.rooms)
    usual = {name: share / np.mean([other.get(name, 0.0) for other in shares]) for name, share in own.items()}
    rooms = tuple({name: float(weight * usual[name] ** excess) for name, weight in room.items()} for room in plan.rooms)
    return replace(plan, kinds=kinds, rooms=rooms)


def _shares(rooms: tuple[Weights, ...]) -> dict[str, float]:
    """Share of each kind of furniture over all rooms."""
    names = {name for room in rooms for name in room}
    return {name: float(np.mean([room.get(name, 0) / sum(room.values()) for room in rooms])) for name in names}
