"""DXF (R2010, ASCII) for CAD: boxes as edges, footprints and texts on layers of their classes.

Coordinates are those of the input, in its unit ($INSUNITS), turned so that z is up where another axis is; of tilted
points they are not turned, and footprints are the bottoms of the boxes. A class has two layers in its colour: its name
has the edges, and in two lines of text the class and score, and length x width x height; "<name>_footprint" has a
closed polyline at the height of the bottom. Letters that DXF forbids in names of layers become "_".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from h2a2_jax.boxes.codec import BOX_EDGES
from h2a2_jax.inference.exports.upright import plain_text
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.input_files import OWN_COMMENT
from h2a2_jax.scans.frame import UNITS, UPRIGHT

_UNITS = {"in": 1, "ft": 2, "mm": 4, "cm": 5, "m": 6}
_FORBIDDEN = '<>/\\":;?*|=`,'
_LONGEST = 200  # letters of a name; AutoCAD takes 255 in a layer's name and in a text
_FOOTPRINT = "_footprint"
_BOTTOM = (0, 1, 3, 2)  # corners in turn, counter-clockwise from above
_TEXT_HEIGHT = 0.1  # m


def write(path: Path, boxes: Boxes) -> None:
    """Write boxes as DXF."""
    import ezdxf
    from ezdxf.enums import TextEntityAlignment

    from h2a2_jax.viewer.content import class_color  # here, for training loads this package and draws nothing

    document = ezdxf.new("R2010", units=_UNITS[boxes.unit])
    document.header["$MEASUREMENT"] = int(boxes.unit not in ("in", "ft"))
    document.header["$LWDISPLAY"] = 0
    space, layers = document.modelspace(), layer_names(boxes.class_names)
    used = sorted(set(boxes.labels.tolist()))
    for label in used:
        red, green, blue = (round(255 * channel) for channel in class_color(label))
        for name in (layers[label], layers[label] + _FOOTPRINT):
            document.layers.add(name).rgb = red, green, blue
    turn = np.array(UPRIGHT[boxes.up], np.float64)  # z up already where points are tilted
    corners = boxes.corners @ turn.T
    # Sizes run along the axes of the input: corners are counted anew from below.
    order = _corners_from_below(boxes.up)
    height = _TEXT_HEIGHT / UNITS[boxes.unit]
    columns = (boxes.labels.tolist(), boxes.scores, boxes.names, boxes.dimensions)
    for number, (corner, label, score, name, size) in enumerate(zip(corners[:, order], *columns, strict=True), 1):
        on_layer = {"layer": layers[label]}
        edges: list[Any] = [space.add_line(corner[one], corner[other], on_layer) for one, other in BOX_EDGES]
        bottom = corner[list(_BOTTOM)]
        on_footprint = {"layer": layers[label] + _FOOTPRINT}
        if boxes.alignment is None:
            flat = {**on_footprint, "elevation": bottom[:, 2].mean()}
            edges.append(space.add_lwpolyline(bottom[:, :2], close=True, dxfattribs=flat))
        else:
            edges.append(space.add_polyline3d(bottom, close=True, dxfattribs=on_footprint))
        top = corner[4:].mean(axis=0)
        words = (f"{name[:_LONGEST]} {score:.2f}", height, 0.0), (f"{_measures(size)} {boxes.unit}", 0.7 * height, 1.2)
        for line, tall, below in words:
            text = space.add_text(_spelt(line), height=tall, dxfattribs=on_layer)
            edges.append(text.set_placement(top - [0, below * height, 0], align=TextEntityAlignment.MIDDLE_CENTER))
        # Named, for the search of a free number takes longer with every group.
        document.groups.new(f"BOX_{number}", description=_spelt(name)[:_LONGEST]).extend(edges)
    if len(boxes):
        document.set_modelspace_vport(
            height=1.2 * max(float(np.ptp(corners[..., :2].reshape(-1, 2), axis=0).max()), height),
            center=corners[..., :2].reshape(-1, 2).mean(axis=0),
        )
    with path.open("w", encoding=document.output_encoding, errors="dxfreplace", newline="\n") as file:
        file.write(f"999\n{OWN_COMMENT}\n")
        document.write(file)


def layer_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the name of the layer of each class: allowed in DXF, and all different whatever the case."""
    taken, names = {"0", "defpoints"}, []
    for name in classes:
        allowed = "".join("_" if letter in _FORBIDDEN else letter for letter in plain_text(name)).strip()
        base = allowed[:_LONGEST].strip() or "_"
        chosen, number = base, 2
        while {chosen.lower(), chosen.lower() + _FOOTPRINT} & taken:
            chosen, number = f"{base}-{number}", number + 1
        taken |= {chosen.lower(), chosen.lower() + _FOOTPRINT}
        names.append(chosen)
    return tuple(names)


def _corners_from_below(up: str) -> list[int]:
    """Numbers of the corners of `Boxes.corners` in the order of `box_corners` for z up."""
    turn = np.array(UPRIGHT[up])
    signs = np.array([[1 if i & bit else -1 for bit in (1, 2, 4)] for i in range(8)])
    turned = signs @ turn.T
    places = (turned > 0) @ np.array([1, 2, 4])
    return np.argsort(places).tolist()


def _measures(size: np.ndarray) -> str:
    digits = 2 if size.max() < 100 else 0
    return " x ".join(f"{side:.{digits}f}" for side in size)


def _spelt(text: str) -> str:
    """Spell a text so that CAD shows it as it is: "%%" and "^" begin codes."""
    return plain_text(text).replace("%%", "% %").replace("^", "^ ")
