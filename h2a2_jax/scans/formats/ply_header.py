"""Headers of PLY files."""

import re
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from h2a2_jax.errors import InputError

_LONGEST_HEADER = 1 << 20
Order = Literal["<", ">"]
_ORDERS: dict[str, Order] = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
_KINDS = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{f"{sign}int{8 * size}": f"{kind}{size}" for sign, kind in (("", "i"), ("u", "u")) for size in (1, 2, 4, 8)},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
_INDICES = ("vertex_indices", "vertex_index")
_OTHER_NAMES = ("vertices", "point", "points")
_UPRIGHT = re.compile(r"vertical axis\s*:\s*(-?[xyz])$", re.IGNORECASE)


class Property(NamedTuple):
    """A number, or a list of numbers, of each row of an element; `length` is the type of a list's length."""

    name: str
    kind: np.dtype
    length: np.dtype | None = None


class Element(NamedTuple):
    """A table of a PLY file."""

    name: str
    rows: int
    properties: tuple[Property, ...]

    @property
    def has_lists(self) -> bool:
        """True if the rows may differ in length."""
        return any(item.length is not None for item in self.properties)

    @property
    def corners(self) -> int | None:
        """Which of the lists holds the corners of the faces."""
        lists = [item.name.lower() for item in self.properties if item.length is not None]
        return next((lists.index(name) for name in _INDICES if name in lists), None)

    @property
    def dtype(self) -> np.dtype:
        """Type of a row, its lists left out."""
        return np.dtype([(item.name, item.kind) for item in self.properties if item.length is None])


class Header(NamedTuple):
    """What the header of a PLY file says."""

    is_text: bool
    elements: tuple[Element, ...]
    comments: tuple[str, ...]

    @property
    def vertex(self) -> int | None:
        """Place of the vertices: the element of that name, or else the only one of a name that stands for it."""
        names = [element.name.lower() for element in self.elements]
        others = [place for place, name in enumerate(names) if name in _OTHER_NAMES]
        return names.index("vertex") if "vertex" in names else others[0] if len(others) == 1 else None

    @property
    def up(self) -> str | None:
        """Axis that points up, if a comment says so, as Nerfstudio's do."""
        found = [match for match in map(_UPRIGHT.search, self.comments) if match]
        return found[0][1].lower() if found else None

    @property
    def texture(self) -> str | None:
        """Name of the picture on the faces, as MeshLab writes it."""
        return next((each.split(None, 1)[1] for each in self.comments if each.startswith("TextureFile ")), None)


def read_ply_header(path: Path, file: BinaryIO) -> Header:
    """Parse the header; the file is left at its end.

    Raises:
        InputError: the file is no PLY file, or a line of its header is not understood.
    """
    if file.readline(16).strip() != b"ply":
        raise InputError(f"{path} is no PLY file: its first line is not 'ply'; export it again.")
    form, comments, elements = None, [], list[tuple[str, int, list[Property]]]()
    while True:
        line = file.readline(4096)
        if not line or file.tell() > _LONGEST_HEADER:
            raise InputError(f"{path} is cut off: its PLY header has no end_header; copy it again.")
        words = line.decode("latin1").split()
        if not line.endswith(b"\n") and words != ["end_header"]:
            raise InputError(f"{path} is cut off in its PLY header; copy it again.")
        match words:
            case []:
                pass
            case ["end_header"]:
                break
            case ["comment" | "obj_info", *rest]:
                comments.append(" ".join(rest))
            case ["format", found, "1.0"] if found in _ORDERS:
                form = found
            case ["element", name, count] if re.fullmatch(r"[+-]?\d{1,18}", count):
                elements.append((name, int(count), []))
            case ["property", "list", length, kind, _, *_] if elements and _is_list(length, kind):
                elements[-1][2].append(Property("_".join(words[4:]), np.dtype(_KINDS[kind]), np.dtype(_KINDS[length])))
            case ["property", kind, _, *_] if elements and kind in _KINDS:
                elements[-1][2].append(Property("_".join(words[2:]), np.dtype(_KINDS[kind])))
            case _:
                raise InputError(
                    f"{path} has the PLY header line {' '.join(words)!r}, not understood; expected is PLY 1.0 in the "
                    "format ascii, binary_little_endian or binary_big_endian: export it again."
                )
    if form is None:
        raise InputError(f"{path} has a PLY header that names no format: export it again.")
    for element, _, properties in elements:
        names = [item.name for item in properties]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{path} has a PLY header that names {element}.{twice} twice: export it again.")
    parsed = tuple(_element(*each, _ORDERS[form]) for each in elements)
    return Header(form == "ascii", parsed, tuple(comments))


def _is_list(length: str, kind: str) -> bool:
    return length in _KINDS and kind in _KINDS and _KINDS[length][0] in "iu"


def _element(name: str, count: int, properties: list[Property], order: Order) -> Element:
    return Element(
        name,
        count,
        tuple(
            Property(item.name, item.kind.newbyteorder(order), item.length and item.length.newbyteorder(order))
            for item in properties
        ),
    )


def check_size(path: Path, element: Element, left: int, is_text: bool, entries: int) -> int:
    """Refuse more rows than the `left` bytes hold; return the least bytes of the element, its lists of `entries`."""
    if element.rows < 0:
        raise InputError(f"{path} says it has {element.rows} {element.name} elements; write it again.")
    width = 0
    for item in element.properties:
        kinds = [item.kind] if item.length is None else [item.length, *[item.kind] * entries]
        # Of text, every number takes a digit and a separator, but for the last one of the file.
        width += 2 * len(kinds) if is_text else sum(kind.itemsize for kind in kinds)
    least = width * element.rows - is_text
    if least > left:
        raise InputError(
            f"{path} is cut off: its header says {element.rows} {element.name} elements of {width} bytes"
            f"{' at least' if is_text or element.has_lists else ''}, but {max(left, 0)} bytes follow; copy it again."
        )
    return max(least, 0)
