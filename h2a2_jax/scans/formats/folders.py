"""Files in a folder that are no point clouds: parts of meshes, and what to do about the others."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import unquote

_SHOWN = 8  # names of a kind
_MOST_BYTES = 1 << 28  # of a file that is searched for names
_NAMES = {
    ".gltf": re.compile(rb'"uri"\s*:\s*"((?:[^"\\]|\\.){1,1000})"'),
    ".mtl": re.compile(rb"^[ \t]*(?:map_\w+|bump|disp|decal|refl|norm)[ \t]+(.+?)\s*$", re.MULTILINE | re.IGNORECASE),
    ".ply": re.compile(rb"^comment TextureFile[ \t]+(.+?)\s*$", re.MULTILINE),
}
_ADVICE = {
    "compressed: unpack it": ".gz .tgz .zip .rar .7z .tar .bz2 .xz .zst .lz4",
    "export it as .glb, .obj or .ply": (
        ".fbx .dae .usd .usda .usdc .usdz .skp .3ds .3dm .blend .max .rvt .ifc .dwg .dxf .3mf .x3d .wrl .step .stp"
    ),
    "export it as .e57, .las or .ply": (
        ".rcp .rcs .fls .fws .lsproj .zfs .rdbx .imp .lgs .pod .potree .copc .splat .ksplat .spz .sog .vpc .draco .drc"
    ),
    "export its points as .pcd or .ply": ".bag .rosbag .db3 .mcap .pcap",
    "make a point cloud of it first": ".exr .depth .sens .mkv .svo .oni",
}
ADVICE = {suffix: advice for advice, suffixes in _ADVICE.items() for suffix in suffixes.split()}
"""What to do about a file that is not read, by its suffix."""


def parts_of_meshes(files: Collection[Path]) -> set[Path]:
    """Return those of some files that others name: buffers and pictures of .gltf, materials and pictures of .obj, .ply.

    A buffer ends with .bin, as files of points do.
    """
    named = set[Path]()
    for file in files:
        suffix = file.suffix.lower()
        if suffix == ".obj":
            named |= {other for other in files if other.suffix.lower() == ".mtl" and other.parent == file.parent}
        elif suffix in _NAMES:
            named |= {file.parent / name for name in _names(file, _NAMES[suffix])}
    return {file for file in files if file in named}


def _names(file: Path, pattern: re.Pattern[bytes]) -> Iterator[str]:
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return
        with file.open("rb") as opened:
            content = opened.read(4096 if file.suffix.lower() == ".ply" else -1)
    except OSError:
        return
    for name in pattern.findall(content):
        spelt = name.decode("utf-8", "replace").replace("\\/", "/").replace("\\", "/")
        yield unquote(spelt) if file.suffix.lower() == ".gltf" else without_options(spelt)


def without_options(name: str) -> str:
    """Return the file's name of a line of an .mtl file, which may stand behind options, as in "-s 1 1 1 wood.png"."""
    return re.sub(r"^(-\w+(\s+(-?[\d.]+|on|off))+\s+)+", "", name)


def describe_unread(files: Collection[Path]) -> Iterator[str]:
    """Yield a sentence for each reason why files are not read, with their names by suffix."""
    reasons = defaultdict[str, dict[str, list[str]]](lambda: defaultdict(list))
    for file in files:
        suffix = file.suffix.lower()
        reasons[ADVICE.get(suffix, "")][suffix].append(file.name)
    for advice, kinds in sorted(reasons.items()):
        groups = []
        for suffix, names in sorted(kinds.items()):
            count = "1 file" if len(names) == 1 else f"{len(names):,} files"
            shown = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
            groups.append(f"{count} {suffix or 'without suffix'} ({shown})")
        if sum(map(len, kinds.values())) > 1:
            advice = re.sub(r"\bit\b", "them", re.sub(r"\bits\b", "their", advice))
        reason = f" ({advice})" if advice else ""
        yield f"Not read, as no point clouds{reason}: {', '.join(groups)}."
