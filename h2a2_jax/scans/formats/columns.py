"""Columns of points by their names, those of a file or those that the user gives with --columns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud

Layout = tuple[str, ...]
"""Meaning of each column: x, y, z, r, g, b, or _ for one that is not used."""

SAY_COLUMNS = "say what they are with --columns, as in x,y,z,_,r,g,b (_ for one that is not used)"
"""Advice on a file whose names or values leave its columns open."""

COLUMNS_NOT_USED = "says itself what its columns are, so that --columns is not used"
"""Remark on a file with names of its own."""

_FLAG_NAMES = {
    **{name: name for name in "xyzrgb_"},
    **{"red": "r", "green": "g", "blue": "b"},
    **dict.fromkeys(("nx", "ny", "nz", "i", "a", "intensity", "alpha", "label", "index"), "_"),
}
_PLACES = "coord|coords|coordinate|coordinates|pos|position|positions|point|points|vertex|vertices|loc|location"
_FRAMES = "local|global|world|utm|map|cartesian|xyz"
_AXES = {
    axis: re.compile(
        rf"(?:{_PLACES}|{_FRAMES})?(?:{axis}(?:{_PLACES}|{_FRAMES}|axis|m|cm|mm)?|{i})|{others}(?:m|cm|mm)?"
    )
    for i, (axis, others) in enumerate(
        [
            ("x", "(?:east|easting|eastings)"),
            ("y", "(?:north|northing|northings)"),
            ("z", "(?:height|elevation|elev|altitude|alt|up)"),
        ]
    )
}
_CHANNELS = re.compile(
    r"(|diffuse|scalar|color|colour|colors|colours|col|rgb|rgba|vertexcolor|vertexcolors|pointcolor|diffusecolor)"
    r"(r|g|b|rf|gf|bf|red|green|blue|0|1|2)(|color|colour|channel|8bit|16bit)"
)
_USUAL = [
    ("", "word", ""),
    ("", "letter", ""),
]  # red, green, blue before r, g, b before diffuse_red and the like
_HARMONIC = 0.28209479  # the first spherical harmonic
_LIKE_COLORS = re.compile("colou?r|rgb|^red$|^green$|^blue$|^hex$")
_LONGEST_NAME = 200  # letters
_SAMPLE, _LEAST_VALUES, _RELATED = 20_000, 32, 0.5
PACKED = ("rgb", "rgba")
"""Names of a column of packed colours."""


class Roles(NamedTuple):
    """Places of named columns: by axis, and triples of colours, both in order of preference, and packed colours."""

    axes: tuple[list[int], list[int], list[int]]
    colors: list[list[int]]
    packed: int | None

    @property
    def used(self) -> list[int]:
        """Places of the columns that may be read, rising."""
        places = {place for places in (*self.axes, *self.colors) for place in places}
        return sorted(places if self.packed is None else places | {self.packed})


def parse_columns(columns: str | Sequence[str] | None) -> Layout | None:
    """Check names of columns as --columns gives them, as in "x,y,z,_,r,g,b"; None stays None.

    Raises:
        InputError: a name is unknown, x, y, z are not all there once, or some of r, g, b are missing.
    """
    if columns is None:
        return None
    if not isinstance(columns, list | tuple | str) or not all(isinstance(name, str) for name in columns):
        raise InputError(f"The columns are {columns!r}; expected are names with commas between, as in x,y,z,_,r,g,b.")
    names = [name.strip().lower() for name in (columns.split(",") if isinstance(columns, str) else columns)]
    if unknown := [name for name in names if name not in _FLAG_NAMES]:
        raise InputError(
            f"--columns has the name {unknown[0]!r}; expected are x, y, z, r, g, b, and _ for one that is not used."
        )
    layout = tuple(_FLAG_NAMES[name] for name in names)
    counts = [layout.count(name) for name in "xyzrgb"]
    if counts[:3] != [1, 1, 1] or counts[3:] not in ([0, 0, 0], [1, 1, 1]):
        raise InputError(
            f"--columns is {','.join(names)}; expected are x, y, z once each, and r, g, b once each or not at all."
        )
    return layout


def by_layout(rows: np.ndarray, layout: Layout) -> RawCloud:
    """Take points and colours from the columns of [n, w] rows."""

    def take(names: str) -> np.ndarray:
        places = [layout.index(name) for name in names]
        first = places[0]
        return rows[:, first : first + 3] if places == [first, first + 1, first + 2] else rows[:, places]

    return RawCloud(take("xyz"), take("rgb") if "r" in layout else None)


def check_width(path: Path, layout: Layout, width: int) -> None:
    """Raise InputError if --columns names another number of columns than a file has."""
    if len(layout) != width:
        raise InputError(
            f"{path} has {width} columns, but --columns names {len(layout)} ({','.join(layout)}): name each, _ for one "
            "that is not used."
        )


def plain(name: str) -> str:
    """Reduce a name to its letters and digits: without quotes, marks of comments, units in brackets, case."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"[\[(][^\])]*[\])]", "", name[:_LONGEST_NAME].lower()))


def roles(names: Sequence[str]) -> Roles:
    """Find points and colours among names of columns, in any order and spelling."""
    keys = [plain(name) for name in names]
    axes: tuple[list[int], list[int], list[int]] = ([], [], [])
    families: dict[tuple[str, str, str], dict[int, int]] = {}
    for place, key in enumerate(keys):
        if key.isdigit():
            continue
        for axis, pattern in zip(axes, _AXES.values(), strict=True):
            if pattern.fullmatch(key):
                axis.append(place)
        if found := _CHANNELS.fullmatch(key):
            before, name, after = found.groups()
            kind = (
                "number" if name.isdigit() else "float" if name[1:] == "f" else "letter" if len(name) == 1 else "word"
            )
            families.setdefault((before, kind, after), {}).setdefault("rgb012".index(name[0]) % 3, place)
    for axis, letter in zip(axes, _AXES, strict=True):
        axis.sort(key=lambda place: keys[place] != letter)  # stable: x itself goes first
    complete = [family for family, places in families.items() if len(places) == 3]
    complete.sort(key=lambda family: [family != first for first in _USUAL])
    packed = next((place for place, key in enumerate(keys) if key in PACKED), None)
    return Roles(axes, [[families[family][i] for i in range(3)] for family in complete], packed)


def from_columns(path: Path, columns: Mapping[str, np.ndarray]) -> RawCloud:
    """Make points and colours of named columns of one length.

    Of several sets of names the first in the order of `roles` is taken, of colours the first that is not all 0, nor one
    colour everywhere, and a remark says so.

    Raises:
        InputError: x, y or z is missing.
    """
    names, values = list(columns), list(columns.values())
    found = roles(names)
    if missing := [axis for axis, places in zip("xyz", found.axes, strict=True) if not places]:
        shown = quoted(", ".join(name or "(no name)" for name in names)) or "none"
        raise InputError(
            f"{path} has no {', '.join(missing)} among its fields ({shown}): name them so, or say --columns of a table."
        )
    remarks = []
    chosen = [places[0] for places in found.axes]
    if any(len(places) > 1 for places in found.axes):
        others = [names[place] for places in found.axes for place in places[1:]]
        remarks.append(f"has its points in {', '.join(names[place] for place in chosen)}, not in {', '.join(others)}")
    colors = None
    if found.colors:
        some = [triple for triple in found.colors if any(values[i].any() for i in triple)] or found.colors
        best = next((t for t in some if len(found.colors) > 1 and any(np.ptp(values[i]) > 0 for i in t)), some[0])
        if len(found.colors) > 1:
            others = [", ".join(names[place] for place in triple) for triple in found.colors if triple is not best]
            shown = ", ".join(names[place] for place in best)
            remarks.append(f"has its colours in {shown}, not in {' or '.join(others)}")
        colors = np.stack([values[place] for place in best], axis=1)
    elif found.packed is not None:
        colors = unpacked(path, values[found.packed])
    elif {"f_dc_0", "f_dc_1", "f_dc_2"} <= columns.keys():
        colors = np.clip(0.5 + _HARMONIC * np.stack([columns[f"f_dc_{i}"] for i in range(3)], axis=1), 0, 1)
        remarks.append("has Gaussian splats, whose centres and mean colours are taken")
    elif (first := _colors_by_values(values, found.used)) is not None:
        colors = np.stack(values[first : first + 3], axis=1)
        remarks.append(f"has its colours in {', '.join(names[first : first + 3])}, by their values")
    else:
        remarks += unread_colors(names)
    return RawCloud(np.stack([values[place] for place in chosen], axis=1), colors, tuple(remarks))


def unread_colors(names: Iterable[str]) -> tuple[str, ...]:
    """Remark on names, of columns that are not used, which say that they are of colours."""
    like = [name for name in names if _LIKE_COLORS.search(plain(name))]
    return (f"has no colours that can be read, though it has {', '.join(like)}",) if like else ()


def _colors_by_values(values: Sequence[np.ndarray], used: Sequence[int]) -> int | None:
    """First of three neighbouring columns of bytes, none of them in use, that are related as channels of colours are.

    Other bytes, such as labels and numbers of returns, have few values.
    """
    for place in range(len(values) - 2):
        if {place, place + 1, place + 2}.isdisjoint(used):
            some = np.stack([each[:: max(1, len(each) // _SAMPLE)] for each in values[place : place + 3]], axis=1)
            is_bytes = len(some) and some.min() >= 0 and some.max() <= 255 and (some == np.rint(some)).all()
            if is_bytes and min(len(np.unique(column)) for column in some.T) >= _LEAST_VALUES:
                related = np.asarray(np.corrcoef(some.T.astype(np.float64)))
                if min(related[0, 1], related[1, 2]) > _RELATED:
                    return place
    return None


def to_type(path: Path, name: str, values: np.ndarray, kind: str | np.dtype) -> np.ndarray:
    """Convert float64 numbers read from text to the numpy type that the header gives them, if it can hold them.

    Coordinates and packed colours of a floating type stay as they are: their digits may be more than it holds. So do
    fractions in a field of integers, such as colours of 0-1 in one of bytes.
    """
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        if name.lower() in ("x", "y", "z", *PACKED):
            return values
        with np.errstate(over="ignore"):  # to infinity, which is left out later
            return values.astype(dtype)
    bounds = np.iinfo(dtype)
    if not ((values >= bounds.min) & (values <= bounds.max)).all():
        raise InputError(f"{path} has numbers that its field {name} of type {dtype} cannot hold; write it again.")
    return values.astype(dtype) if (values == np.rint(values)).all() else values


_NO_COLOR = 0x7FC00000  # the usual NaN in float32


def unpacked(path: Path, packed: np.ndarray) -> np.ndarray:
    """Unpack 0xRRGGBB to [n, 3]: uint8, or float32 if some are NaN.

    Numbers of 4 bytes or more are the packed integers, or floats whose 32 bits are these, as PCL has them. Floats that
    are whole numbers of at least 1 are the integers themselves, which programs write into fields of floats.
    """
    if packed.dtype.itemsize < 4:
        raise InputError(f"{path} packs colours into {packed.dtype.itemsize} bytes; expected are 4: write it again.")
    missing = np.zeros(len(packed), bool)
    if packed.dtype.kind == "f":
        single = np.ascontiguousarray(packed, np.float32)
        missing = ~np.isfinite(packed) if packed.dtype.itemsize > 4 else single.view(np.uint32) == _NO_COLOR
        known = packed[~missing & (packed != 0) & np.isfinite(packed)]
        if len(known) and (known == np.rint(known)).all() and (np.abs(known) >= 1).all() and np.abs(known).max() < 1e10:
            bits = np.where(np.isfinite(packed), packed, 0).astype(np.int64)
        else:
            bits = single.view(np.uint32)
    else:
        bits = packed
    colors = np.stack([(bits >> shift & 255).astype(np.uint8) for shift in (16, 8, 0)], axis=1)
    return np.where(missing[:, None], np.float32(np.nan), colors.astype(np.float32)) if missing.any() else colors
