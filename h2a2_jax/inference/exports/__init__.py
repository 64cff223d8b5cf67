"""Files of boxes for other programs: glTF (.glb), CAD (.dxf) and Rerun (.rrd).

| format | frame | package |
|---|---|---|
| glb | metres, y up (the frame of glTF), relative to an origin that the root node names | none |
| dxf | that of the input, in its unit, turned so that z is up | ezdxf |
| rrd | metres, z up, relative to an origin that is logged beside | rerun-sdk |
"""

import importlib.util
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.inference.found_boxes import Boxes

EXPORTS = ("glb", "dxf", "rrd")
_PACKAGES = {"dxf": ("ezdxf", "ezdxf", "dxf"), "rrd": ("rerun", "rerun-sdk", "rerun")}  # module, package, extra
_HOMES = {"glb": "gltf", "dxf": "dxf", "rrd": "rrd"}


def export_boxes(path: Path, boxes: Boxes) -> None:
    """Write boxes in one of `EXPORTS`, by the suffix of the path.

    Raises:
        InputError: the package that the format needs is not installed.
    """
    kind = path.suffix.lower().removeprefix(".")
    require_packages([kind])
    write = import_module(f"{__name__}.{_HOMES[kind]}").write
    with whole_file(path) as part:
        write(part, boxes)


def require_packages(formats: Iterable[str]) -> None:
    """Check that the packages of formats are installed; formats that need none may be among them.

    Raises:
        InputError: a package is missing; the sentence says how to install it.
    """
    for kind in formats:
        module, package, extra = _PACKAGES.get(kind, ("json", "", ""))
        if importlib.util.find_spec(module) is None:
            raise InputError(f'Files with .{kind} need {package}: pip install "h2a2_jax[{extra}]".')
