"""Procedural stand-ins for the built-in datasets, for tests and demonstrations without a licence.

One generator of rooms and furniture serves all of them; classes, box protocol, sensor, frame, noise and colour differ
as the real datasets' do. Numbers measured on these scans say nothing about the real ones.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.synthetic.gap import LARGEST_GAP, draw_style, exaggerate_capture, exaggerate_scan, protocol_at
from h2a2_jax.scans.synthetic.homes import Home, build_home
from h2a2_jax.scans.synthetic.rooms import SCALES, Room, Scale, furnish_room, rearranged
from h2a2_jax.scans.synthetic.sensors import Capture, Surface, depth_frame, full_room, fused_mesh, tablet_mesh
from h2a2_jax.scans.synthetic.varied_sensors import merged_stations, single_frame, walked_mesh

_SENSORS: dict[str, Callable[[Room, Scale, np.random.Generator], Capture]] = {
    "scannet": fused_mesh,
    "sunrgbd": depth_frame,
    "s3dis": full_room,
    "arkitscenes": partial(tablet_mesh, surface=Surface((0.15, 0.35), spacing=1.2, noise=1.4)),
    "multiscan": partial(fused_mesh, surface=Surface((0.05, 0.15), spacing=0.9, noise=0.6)),
    "3rscan": partial(fused_mesh, surface=Surface((0.15, 0.30), spacing=1.1, noise=1.2)),
    "scannetpp": partial(full_room, surface=Surface((0.01, 0.03), spacing=0.85, noise=0.5, tint=(1.0, 1.0, 1.0))),
}
_VARIED: dict[str, Callable[[Home, np.random.Generator], Capture]] = {
    "scannet": walked_mesh,
    "sunrgbd": single_frame,
    "s3dis": merged_stations,
}
_SPLITS = ("train", "val")
_FEWEST_POINTS = 30
_FEWEST_POINTS_OF_SCAN = 5_000  # fewer: the camera faces a wall, so another room is made
_LEAST_VISIBLE = 0.15
_ATTEMPTS = 20


class SyntheticSource:
    """Generated scans of one dataset; the same index always gives the same scan.

    An annotated object that shows fewer than 30 points, or less than 15 % of itself, has no box. Every scan has at
    least 5,000 points, and 8-16 (scannet), 2-6 (sunrgbd), 6-14 (s3dis), 3-12 (arkitscenes), 6-16 (multiscan, 3rscan) or
    10-28 (scannetpp) boxes; 1-8 at scale "demo". Boxes enclose the visible points (axis-aligned datasets) or the whole
    object (datasets with yaw). Scans 2 k and 2 k + 1 of 3rscan show one room, the second with furniture moved. This is
    so at the default gap; `spec` is the dataset's protocol at the gap.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        split: Literal["train", "val"],
        size: int,
        *,
        seed: int = 0,
        scale: Scale = "full",
        gap: float = 1.0,
    ):
        """Name the scans; each is generated when it is read.

        The splits share no scan, and another seed gives other scans. Scale "demo" means small rooms with few, easily
        distinguished classes, "full" rooms like the real ones. At gap 0 the three datasets of H2A2 are one
        distribution, at 1 stand-ins of the real ones, up to 2 further apart (`h2a2_jax.scans.synthetic.gap`); the
        others exist at 1 alone.
        """
        if spec.name not in _SENSORS:
            raise InputError(f"There is no synthetic {spec.name}: use one of {', '.join(_SENSORS)}.")
        if split not in _SPLITS:
            raise InputError(f"There is no split {split!r}: use train or val.")
        if scale not in SCALES:
            raise InputError(f"There is no scale {scale!r}: use {', '.join(SCALES)}.")
        if scale == "varied" and (spec.name not in _VARIED or gap != 1):
            raise InputError(
                f"Varied rooms of {spec.name} at gap {gap:g} were asked for; there are those of "
                f"{', '.join(_VARIED)}, at 1."
            )
        if size < 1:
            raise InputError(f"A synthetic source of {size} scans was asked for: give at least 1.")
        if seed < 0:
            raise InputError(f"The seed {seed} was asked for: give 0 or more.")
        if not 0 <= gap <= LARGEST_GAP:
            raise InputError(f"The gap {gap} was asked for: give a number from 0 to {LARGEST_GAP:g}.")
        self.spec, self._split, self._seed, self._gap = protocol_at(spec, gap), split, seed, gap
        self._scale: Scale = scale
        self.names = [f"synthetic_{spec.name}/{split}/{index:06d}" for index in range(size)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Scan:
        """Generate one scan."""
        return self.acquire(index)[0]

    def acquire(self, index: int) -> tuple[Scan, Room, Capture]:
        """Generate one scan, with the room that it shows and the sensor's capture of that room.

        Boxes are scaled and axes permuted (gaps above 1) in the scan alone.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"scan {index} of {len(self)}")
        rng = self._rng(index)
        if self._scale == "varied":
            return self._acquire_varied(index, rng)
        name, gap = self.spec.name, self._gap
        style, plan = draw_style(self.spec, self._scale, gap, rng)
        for attempt in range(_ATTEMPTS):
            if name == "3rscan":
                room = furnish_room(plan, self.spec, self._rng(index // 2, attempt))
                room = rearranged(room, rng) if index % 2 else room
            else:
                room = furnish_room(plan, self.spec, rng)
            if self._scale == "full" and np.count_nonzero(room.labels >= 0) < plan.boxes[0]:
                continue  # no sensor can show enough boxes
            capture = exaggerate_capture(_SENSORS[style](room, self._scale, rng), name, gap, rng)
            boxes, labels = _annotation(room, capture, self.spec.has_yaw)
            if plan.boxes[0] <= len(labels) <= plan.boxes[1] and len(capture.points) >= _FEWEST_POINTS_OF_SCAN:
                scan = Scan(self.names[index], capture.points, capture.colors, boxes, labels)
                return exaggerate_scan(scan, name, gap, rng), room, capture
        raise RuntimeError(f"{_ATTEMPTS} rooms in a row show too little: the catalogue is broken.")

    def _acquire_varied(self, index: int, rng: np.random.Generator) -> tuple[Scan, Room, Capture]:
        """Generate one scan of varied rooms."""
        for _ in range(_ATTEMPTS):
            home = build_home(self.spec, rng)
            capture = _VARIED[self.spec.name](home, rng)
            boxes, labels = _annotation(home, capture, self.spec.has_yaw)
            if len(labels) and len(capture.points) >= _FEWEST_POINTS_OF_SCAN:
                return Scan(self.names[index], capture.points, capture.colors, boxes, labels), home, capture
        raise RuntimeError(f"{_ATTEMPTS} homes in a row show too little: the catalogue is broken.")

    def _rng(self, index: int, *more: int) -> np.random.Generator:
        """Return a generator that depends on the scans asked for, an index and further numbers alone."""
        name, split = zlib.crc32(self.spec.name.encode()), _SPLITS.index(self._split)
        return np.random.default_rng([self._seed, name, split, index, SCALES.index(self._scale), *more])


def _annotation(
    room: Room, capture: Capture, has_yaw: bool
) -> tuple[Float32[np.ndarray, "g 7"], Int32[np.ndarray, " g"]]:
    """Boxes and labels of the objects that show enough of themselves."""
    counts = np.bincount(capture.owners[capture.owners >= 0], minlength=len(room.labels))
    enough = (counts >= _FEWEST_POINTS) & (capture.visible >= _LEAST_VISIBLE) & (room.labels >= 0)
    chosen = np.flatnonzero(enough)
    if has_yaw:
        return capture.boxes[chosen], room.labels[chosen]
    boxes = np.zeros((len(chosen), 7), np.float32)
    for box, owner in zip(boxes, chosen, strict=True):
        points = capture.points[capture.owners == owner]
        low, high = points.min(axis=0), points.max(axis=0)
        box[:3], box[3:6] = (low + high) / 2, high - low
    return boxes, room.labels[chosen]
