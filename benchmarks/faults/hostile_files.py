"""Damaged files of every kind that is read, and files made to harm: part of `benchmarks.faults`.

`damaged_cases` takes small whole files and damages each in seeded ways; `made_cases` are written by hand, one for each
way in which a file can ask for memory, for time, or for the terminal.
"""

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import trimesh

from benchmarks.faults.damage import flipped
from h2a2_jax.convert.torch_file import write_torch_file
from h2a2_jax.evaluation.matches import Matches, write_matches
from h2a2_jax.prepare.scan_cache import ScanCache
from h2a2_jax.pretrained.folder import write_pretrained
from h2a2_jax.scans.formats.surface import MOST
from h2a2_jax.scans.scan import Scan
from h2a2_jax.training.nonfinite import KeptShard, write_batch
from tests.pretrained.detectors import stored_detector
from tests.scans.raw.miniature import write_arkitscenes, write_s3dis, write_scannet, write_sunrgbd

SETTINGS = {"scale": "demo"}
"""Settings of the cache of prepared scans."""


class Case(NamedTuple):
    """A file, or a folder with a file that was damaged.

    Attributes:
        reader: name of the reader, a key of `hostile.READERS`.
        what: what was done.
        path: the file or folder that the reader is given.
        declared: bytes of content that the file states, at least its size.
    """

    reader: str
    what: str
    path: str
    declared: int


class Sample(NamedTuple):
    """A whole input: its reader, the file that is damaged, and what the reader is given: the file or a folder."""

    reader: str
    file: Path
    given: Path


# --- whole files -----------------------------------------------------------------------------------------------------


def _rows(rng: np.random.Generator, count: int = 400) -> np.ndarray:
    return np.concatenate([rng.uniform(0, 4, (count, 3)), rng.integers(0, 256, (count, 3))], axis=1).astype(np.float32)


def _point_files(folder: Path, rng: np.random.Generator) -> Iterator[Sample]:
    """Files of every suffix that `read_point_cloud` reads."""
    folder.mkdir()
    rows = _rows(rng)
    xyz, rgb = rows[:, :3], rows[:, 3:].astype(np.uint8)
    np.save(folder / "a.npy", rows)
    np.savez(folder / "a.npz", points=xyz, colors=rgb)
    np.savez_compressed(folder / "packed.npz", points=xyz, colors=rgb)
    (folder / "a.bin").write_bytes(rows.tobytes())
    table = "".join(f"{x:.3f} {y:.3f} {z:.3f} {r:.0f} {g:.0f} {b:.0f}\n" for x, y, z, r, g, b in rows)
    (folder / "a.xyz").write_text(table)
    (folder / "a.csv").write_text("x,y,z,r,g,b\n" + table.replace(" ", ","))
    head = "".join(f"property float {axis}\n" for axis in "xyz")
    texts = "".join(f"{x:g} {y:g} {z:g}\n" for x, y, z in xyz).encode()
    triangles = [(i, i + 1, i + 2) for i in range(40)]
    for form, body, faces in (
        (
            "binary_little_endian",
            xyz.tobytes(),
            b"".join(b"\3" + struct.pack("<3i", *corners) for corners in triangles),
        ),
        ("ascii", texts, b"".join(b"3 %d %d %d\n" % corners for corners in triangles)),
    ):
        lists = "element face 40\nproperty list uchar int vertex_indices\n"
        lines = f"ply\nformat {form} 1.0\nelement vertex {len(xyz)}\n{head}{lists}end_header\n".encode()
        (folder / f"{form}.ply").write_bytes(lines + body + faces)
    raw = np.ascontiguousarray(xyz.T).tobytes()
    packed = b"".join(bytes([len(raw[i : i + 32]) - 1]) + raw[i : i + 32] for i in range(0, len(raw), 32))
    packed = struct.pack("<II", len(packed), len(raw)) + packed
    for data, body in (("binary", xyz.tobytes()), ("binary_compressed", packed), ("ascii", texts)):
        size = len(xyz)
        head_of_pcd = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {size}\nHEIGHT 1\nPOINTS {size}\nDATA {data}\n"
        (folder / f"{data}.pcd").write_bytes(head_of_pcd.encode() + body)
    identity = "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"
    axes = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n"
    directions = "".join(f"{x:.3f} {y:.3f} {z:.3f} 0.5 {r:.0f} {g:.0f} {b:.0f}\n" for x, y, z, r, g, b in rows)
    (folder / "a.ptx").write_text(f"20\n20\n{axes}{identity}{directions}")
    room = trimesh.creation.box((1.0, 0.8, 0.6))
    for kind in ("obj", "glb", "stl", "off"):
        exported = room.export(file_type=kind)
        (folder / f"a.{kind}").write_bytes(exported.encode() if isinstance(exported, str) else exported)
    (folder / "a.gltf").write_bytes(gltf())
    _las_files(folder, xyz, rgb)
    for path in sorted(folder.iterdir()):
        yield Sample(f"points {path.suffix}", path, path)


def gltf(parts: int = 1, count: int = 12, nodes: int = 1) -> bytes:
    """A mesh of triangles of which several parts, and several nodes, share the arrays."""
    import base64

    corners = np.random.default_rng(0).random((count, 3), np.float32).tobytes()
    primitive = {"attributes": {"POSITION": 0}}
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": list(range(nodes))}],
        "nodes": [{"mesh": 0}] * nodes,
        "meshes": [{"primitives": [primitive] * parts}],
        "buffers": [
            {
                "uri": f"data:application/octet-stream;base64,{base64.b64encode(corners).decode()}",
                "byteLength": len(corners),
            }
        ],
        "bufferViews": [{"buffer": 0, "byteLength": len(corners)}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": count, "type": "VEC3"}],
    }
    return json.dumps(tree).encode()


def _las_files(folder: Path, xyz: np.ndarray, rgb: np.ndarray) -> None:
    import laspy

    header = laspy.LasHeader(point_format=2, version="1.2")
    header.scales = np.full(3, 0.001)
    las = laspy.LasData(header)
    las.x, las.y, las.z = xyz.astype(np.float64).T
    las.red, las.green, las.blue = rgb.astype(np.uint16).T * 256
    las.write(str(folder / "a.las"))
    las.write(str(folder / "a.laz"), laz_backend=laspy.LazBackend.Lazrs)


def e57_file(path: Path, rng: np.random.Generator) -> None:
    """Write an E57 file; ImportError without the extra e57."""
    import pye57

    columns = dict(zip(("cartesianX", "cartesianY", "cartesianZ"), rng.random((3, 200)) * 3, strict=True))
    file = pye57.E57(str(path), mode="w")
    file.write_scan_raw(columns)
    file.close()


def infos(scans: int = 3) -> dict[str, Any]:
    """Content of an info file of mmdetection3d, of version 2."""
    box = {"bbox_3d": [0.5, 0.5, 0.5, 1.0, 1.0, 1.0], "bbox_label_3d": 2}
    points = [{"num_pts_feats": 6, "lidar_path": f"scene000{i}_00.bin"} for i in range(scans)]
    entries = [{"lidar_points": each, "instances": [box, box], "axis_align_matrix": np.eye(4)} for each in points]
    return {"metainfo": {"categories": {"cabinet": 0, "bed": 1, "chair": 2}}, "data_list": entries}


def mmdet3d_folder(folder: Path, rng: np.random.Generator, content: bytes | None = None) -> Path:
    """Write a prepared folder of three scans; return its info file."""
    (folder / "points").mkdir(parents=True)
    for i in range(3):
        (folder / "points" / f"scene000{i}_00.bin").write_bytes(_rows(rng).tobytes())
    path = folder / "scannet_infos_train.pkl"
    path.write_bytes(pickle.dumps(infos(), 4) if content is None else content)
    return path


def scan_folder(folder: Path, rng: np.random.Generator, content: bytes | None = None) -> Path:
    """Write a folder of a user's own scans; return its boxes.json."""
    folder.mkdir(parents=True)
    np.save(folder / "a.npy", _rows(rng))
    box = {"center": [0.5, 0.5, 0.5], "size": [0.4, 0.4, 0.8], "class": "chair", "yaw": 0.5}
    document = {"version": 1, "scans": [{"file": "a.npy", "boxes": [box]}]}
    path = folder / "boxes.json"
    path.write_bytes(json.dumps(document, indent=1).encode() if content is None else content)
    return path


def _others(folder: Path, rng: np.random.Generator) -> Iterator[Sample]:
    """Whole inputs of the readers of folders and archives."""
    info = mmdet3d_folder(folder / "mmdet3d", rng)
    yield Sample("mmdet3d", info, info.parent)
    yield Sample("mmdet3d", info.parent / "points" / "scene0001_00.bin", info.parent)
    boxes = scan_folder(folder / "own", rng)
    yield Sample("scan folder", boxes, boxes.parent)
    plain = folder / "plain.pkl"
    plain.write_bytes(pickle.dumps({"a": np.arange(50.0), "b": np.array(["chair", "bed"]), "c": {1, 2}}, 2))
    yield Sample("pickle", plain, plain)
    state = {f"backbone.{i}.weight": rng.random((8, 4), np.float32) for i in range(5)}
    write_torch_file(folder / "a.pth", state, {"CLASSES": ["chair"]})
    yield Sample("torch", folder / "a.pth", folder / "a.pth")
    cache = ScanCache(folder / "cache", SETTINGS)
    cache.open()
    xyz = _rows(rng)
    cache.write(Scan("a", xyz[:, :3], xyz[:, 3:] / 255, np.ones((2, 7), np.float32), np.zeros(2, np.int32)))
    yield Sample("scan cache", cache.path("a"), folder / "cache")
    hits = np.array([[True, False]])
    found = Matches(("a",), (0.25,), np.ones(2), np.zeros(2, int), np.zeros(2, int), hits, np.array([[3]]))
    write_matches(folder / "matches.npz", {"scannet": found})
    yield Sample("matches", folder / "matches.npz", folder / "matches.npz")
    boxes_of = rng.random((2, 7)).astype(np.float32)
    labels = np.zeros(2, np.int32)
    keys = np.arange(9, dtype=np.int64)
    shard = KeptShard("scannet", ("a",), 1, keys, rng.random((9, 3), np.float32), boxes_of, labels, labels)
    write_batch(folder / "7.npz", [shard])
    yield Sample("kept batch", folder / "7.npz", folder / "7.npz")
    write_pretrained(stored_detector(), folder / "pretrained")
    for name in ("model.safetensors", "config.json"):
        yield Sample("pretrained", folder / "pretrained" / name, folder / "pretrained")


def _raw(folder: Path) -> Iterator[Sample]:
    """Benchmarks as people download them, with the files whose damage their readers may meet."""
    for reader, write, patterns in (
        ("scannet", write_scannet, ("scans/scene0000_00/*", "*.tsv", "scannetv2_val.txt")),
        (
            "sunrgbd",
            write_sunrgbd,
            ("*.mat", "SUNRGBDtoolbox/*/allsplit.mat", "SUNRGBD/kv2/**/*.png", "SUNRGBD/kv2/**/*.jpg"),
        ),
        ("s3dis", write_s3dis, ("Area_1/office_2/Annotations/chair_1.txt",)),
        ("arkitscenes", write_arkitscenes, ("3dod/Training/40753679/*_3dod_*",)),
    ):
        root = folder / reader
        root.mkdir()
        write(root)
        for pattern in patterns:
            yield from (Sample(reader, path, root) for path in sorted(root.glob(pattern)) if path.is_file())


def declared_size(path: Path) -> int:
    """Bytes of content that a file states: a mesh states a surface, which is covered with points."""
    is_mesh = path.suffix in (".obj", ".glb", ".gltf", ".stl", ".off", ".ply")
    return max(path.stat().st_size, 24 * MOST * is_mesh)


# --- damage ----------------------------------------------------------------------------------------------------------


def _flip(content: bytearray, rng: np.random.Generator, count: int) -> bytes:
    changed = bytes(content)
    for bit in rng.integers(0, 8 * len(content), count).tolist():
        changed = flipped(changed, bit)
    return changed


def _zero(content: bytearray, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    size = min(len(content) - start, int(rng.integers(8, 200)))
    content[start : start + size] = bytes(size)
    return bytes(content)


def _full(content: bytearray, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(min(len(content), 600)))
    content[start : start + 8] = b"\xff" * len(content[start : start + 8])
    return bytes(content)


def _swapped(content: bytearray, rng: np.random.Generator) -> bytes:
    """The words of the second half with their bytes the other way round."""
    half = len(content) // 8 * 4
    words = np.frombuffer(bytes(content[half : half + (len(content) - half) // 4 * 4]), "<u4")
    return bytes(content[:half]) + words.byteswap().tobytes()


def _digits(content: bytearray, rng: np.random.Generator) -> bytes:
    """A digit of a text, or of a header, is a number of many digits."""
    places = [i for i, byte in enumerate(content[:4000]) if 48 <= byte < 58] or [0]
    place = places[int(rng.integers(len(places)))]
    return bytes(content[:place]) + b"9" * int(rng.choice([3, 12, 5000])) + bytes(content[place:])


DAMAGES: dict[str, Callable[[bytearray, np.random.Generator], bytes]] = {
    "a bit flipped": lambda content, rng: _flip(content, rng, 1),
    "twenty bits flipped": lambda content, rng: _flip(content, rng, 20),
    "cut off": lambda content, rng: bytes(content[: int(rng.integers(len(content)))]),
    "a block of zeros": _zero,
    "eight bytes of ones in the header": _full,
    "halves swapped": lambda content, rng: bytes(content[len(content) // 2 :] + content[: len(content) // 2]),
    "bytes of words swapped": _swapped,
    "a number with digits before it": _digits,
    "the first half twice": lambda content, rng: bytes(content[: len(content) // 2]) + bytes(content),
    "a command to the terminal": lambda content, rng: bytes(content).replace(b" ", b"\x1b]0;a\x07", 3),
}


def samples(folder: Path, rng: np.random.Generator) -> list[Sample]:
    """Write one whole file of every kind below a folder."""
    folder.mkdir(parents=True)
    found = [*_point_files(folder / "points", rng), *_others(folder, rng), *_raw(folder)]
    try:
        e57_file(folder / "a.e57", rng)
        found.append(Sample("points .e57", folder / "a.e57", folder / "a.e57"))
    except ImportError:
        pass  # its reader says so in a sentence
    return found


def damaged_cases(folder: Path, whole: list[Sample], rng: np.random.Generator) -> Iterator[Case]:
    """Damage each sample in each way; the others of its folder stay."""
    for number, sample in enumerate(whole):
        for what, damage in DAMAGES.items():
            place = folder / f"{number}_{what.replace(' ', '_')}"
            content = damage(bytearray(sample.file.read_bytes()), rng)
            if sample.given == sample.file:
                place.mkdir(parents=True)
                path = given = place / sample.file.name
            else:
                shutil.copytree(sample.given, place)
                path, given = place / sample.file.relative_to(sample.given), place
            path.write_bytes(content)
            yield Case(sample.reader, f"{sample.file.name}: {what}", str(given), declared_size(path))
