"""Files made to harm a reader, one for each way in which a file asks for memory, time or the terminal.

Part of `benchmarks.faults`; `hostile_files` has the damaged ones.
"""

import hashlib
import io
import json
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from benchmarks.faults.hostile_files import SETTINGS, Case, declared_size, gltf, infos, mmdet3d_folder, scan_folder
from h2a2_jax.prepare.scan_cache import ScanCache
from h2a2_jax.scans.specs import SCANNET
from tests.scans.raw.miniature import SUN_FRAMES, write_sunrgbd

_MB = 1 << 20
_GB = 1 << 30
_FLAG = b"\x1b]0;owned\x07\r\n"


# --- pickles ---------------------------------------------------------------------------------------------------------

_NEST = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200))
"""Tuples of tuples of one tuple, as (a, a) with a = (b, b): 2 ** 200 to hash."""
_NESTED = b"K\x01q\0" + b"0" + _NEST


def _with_letters(value: object, letters: bytes, protocol: int = 3) -> bytes:
    """A pickle of an array or a text of numpy, "abcd", with other letters."""
    whole = pickle.dumps(value, protocol)
    return whole.replace("abcd".encode("utf-32-le"), letters)


def pickles() -> dict[str, bytes]:
    """Pickles of plain data that harm where they are made, hashed, compared, printed or freed."""
    tuples = b"\x80\x02" + _NESTED
    deep_lists = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    deep_tuples = b"\x80\x02K\x01" + b"\x85" * 100_000 + b"."
    laughs = b"\x80\x02]q\0" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
    )
    numbers = b"\x80\x02](" + b"K\x01" * 100_000 + b"eq\0"
    array = pickle.dumps(np.zeros(100_000), 2)[:-1]
    letters = b"\xff\xff\xff\x7f" * 4
    return {
        "nested tuples as a member of a set": b"\x80\x04\x8f(" + _NESTED + b"\x90.",
        "nested tuples as a key": b"\x80\x02}" + _NESTED + b"K\x01s.",
        "nested tuples as a key among others": b"\x80\x02}(" + _NESTED + b"K\x01u.",
        "nested tuples as a key of DICT": b"(" + _NESTED + b"K\x01d.",
        "nested tuples in a frozenset": b"\x80\x04(" + _NESTED + b"\x91.",
        "nested tuples for set()": tuples + b"cbuiltins\nset\n" + b"h\xc8\x85\x85R.",
        "nested tuples for frozenset()": tuples + b"cbuiltins\nfrozenset\n" + b"h\xc8\x85\x85R.",
        "nested tuples for dict()": tuples + b"cbuiltins\ndict\n" + b"h\xc8K\x01\x86\x85\x85R.",
        "a tuple of numbers as a key": pickle.dumps({(1, 2): 3}, 2),
        "a number of a million digits as a key": pickle.dumps({10**300_000: 1}, 2),
        "one list in one list, sixty times": laughs + b".",
        "lists 100,000 deep": deep_lists,
        "tuples 100,000 deep": deep_tuples,
        "a list that holds itself": b"\x80\x02]q\0h\0a.",
        "a dictionary that holds itself": b"\x80\x02}q\0X\1\0\0\0ah\0s.",
        "copies of a list": numbers + b"]" + b"cbuiltins\nlist\nq\x01" + b"h\x01h\0\x85R" * 5000 + b".",
        "copies of bytes": b"\x80\x03B"
        + struct.pack("<I", _MB)
        + bytes(_MB)
        + b"q\0cbuiltins\nbytearray\nq\x01"
        + b"h\x01h\0\x85R" * 5000
        + b".",
        "one array in 100,000 places": array + b"q\xf0]q\xf1(" + b"h\xf0" * 100_000 + b"e.",
        "a million empty sets": b"\x80\x04](" + b"\x8f" * 1_000_000 + b"e.",
        "a million empty lists": b"\x80\x04](" + b"]" * 1_000_000 + b"e.",
        "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
        "bytes of 4 exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"a.",
        "text of 4 GB": b"\x80\x02X\xff\xff\xff\xffa.",
        "an array of bytes of 1 TB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
        "a text of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "a shape that overflows": pickle.dumps(np.zeros(3), 2).replace(
            b"K\x03\x85", b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85"
        ),
        "letters that there are not": _with_letters(np.array(["abcd"]), letters),
        "letters that there are not, protocol 5": _with_letters(np.array(["abcd"]), letters, 5),
        "a text of letters that there are not": _with_letters(np.str_("abcd"), letters),
        "an array of an array of objects": pickle.dumps(np.array([np.array([{}], object), 1], object), 2),
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id": b"Pabc\n.",
        "a buffer from outside": b"\x80\x05\x97.",
        "a name of a million letters": b"c" + b"a" * 1_000_000 + b"\nb\n.",
        "a name with commands to the terminal": b"cos\x1b]0;owned\x07\nsystem\n.",
        "items of an array": pickle.dumps(np.zeros(3, object), 2)[:-1] + b"K\x00]s.",
        "records": pickle.dumps(np.zeros(3, [("a", "f4")]), 2),
    }


def _pickle_cases(folder: Path) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for number, (what, content) in enumerate(pickles().items()):
        path = folder / f"{number}.pkl"
        path.write_bytes(content)
        yield Case("pickle", what, str(path), len(content))
        given = mmdet3d_folder(folder / f"mmdet3d_{number}", rng, content).parent
        yield Case("mmdet3d", what, str(given), len(content))
    entry = infos(1)["data_list"][0]
    nest: list[Any] = [1.0]
    for _ in range(60):
        nest = [nest, nest]
    changes: dict[str, dict[str, Any]] = {
        "a box of nested lists": {"instances": [{"bbox_3d": nest, "bbox_label_3d": 2}]},
        "a box of text": {"instances": [{"bbox_3d": "\x1b[31m" * 1000, "bbox_label_3d": 2}]},
        "a label that is a list": {"instances": [{"bbox_3d": [1.0] * 7, "bbox_label_3d": [1]}]},
        "an alignment of text": {"axis_align_matrix": "x" * 10_000},
        "a path of many letters": {"lidar_points": {"lidar_path": "a" * 100_000 + ".bin"}},
        "a path out of the folder": {"lidar_points": {"lidar_path": "../../etc/passwd"}},
        "a path with a command": {"lidar_points": {"lidar_path": "a\x1b]0;b\x07\n.bin"}},
        "a path that is no text": {"lidar_points": {"lidar_path": "a\udcff.bin"}},
    }
    for number, (what, change) in enumerate(changes.items()):
        content = pickle.dumps({**infos(0), "data_list": [{**entry, **change}]}, 4)
        given = mmdet3d_folder(folder / f"entry_{number}", rng, content).parent
        yield Case("mmdet3d", what, str(given), len(content))


# --- archives and arrays ---------------------------------------------------------------------------------------------


def npy(shape: str, content: bytes = b"", descr: str = "'<f4'", fortran: bool = False, more: str = "") -> bytes:
    """An array in numpy's format with any header."""
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}{more}\n".encode("latin1")
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(header)) + header + content


def zip_of_zeros(path: Path, name: str, head: bytes, size: int) -> None:
    """Write an archive with a member of a head and zeros, a thousandth of their size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as file:
        file.write(head)
        for _ in range(size // _MB):
            file.write(bytes(_MB))


def _overlapping(path: Path, name: str, content: bytes, count: int) -> None:
    """Write an archive whose directory names one member many times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    whole = buffer.getvalue()
    start = whole.index(b"PK\1\2")
    entry = whole[start : whole.index(b"PK\5\6")]
    entries = b"".join(entry[:46] + b"%04d" % i + entry[50:] for i in range(count))
    body = whole[:start] + entries
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count % 65536, count % 65536, len(entries), start, 0)
    path.write_bytes(body + end)


def _array_cases(folder: Path) -> Iterator[Case]:
    rows = npy("(60, 6)", np.ones((60, 6), "<f4").tobytes())
    headers = {
        "6 kB of a damaged header": npy("(60, 6)", more=" x" * 3000),
        "parentheses in parentheses": npy("(" * 3000 + ")" * 3000),
        "a shape of 4,000 digits": npy(f"({'9' * 4000},)"),
        "a negative shape": npy("(-1, 6)", bytes(2400)),
        "a shape of nothing": npy("(1000000000000, 6)", descr="'<U0'"),
        "letters that there are not": npy("(4, 1)", b"\xff" * 32, "'<U2'"),
        "100,000 columns of one": npy("(1, 100000)", bytes(400_000), fortran=True),
        "a record of 3,000 names": npy("(1,)", descr=str([(f"f{i}", "<f4") for i in range(400)])),
        "a command to the terminal": npy("(60, 6)", more="\x1b]0;owned\x07"),
        "objects": npy("(1,)", pickle.dumps([1]), "'|O'"),
        "a date": npy("(1,)", bytes(8), "'<M8[ns]'"),
        "a type of many bytes": npy("(1, 6)", bytes(24), "'<f999999999'"),
    }
    for number, (what, content) in enumerate(headers.items()):
        path = folder / f"{number}.npy"
        path.write_bytes(content)
        yield Case("points .npy", what, str(path), len(content))
        for reader, name in (("points .npz", "points.npy"), ("matches", "version.npy"), ("kept batch", "cells.npy")):
            archive = folder / f"{number}_{reader.split()[0]}.npz"
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr(name, content)
            yield Case(reader, what, str(archive), len(content))
    head = npy(f"({_GB // 24}, 6)")
    for reader, name in (("points .npz", "points"), ("matches", "version"), ("kept batch", "cells")):
        path = folder / f"zeros_{name}.npz"
        if name == "points":
            zip_of_zeros(path, f"{name}.npy", head, _GB)
        else:
            os.link(folder / "zeros_points.npz", path)
        yield Case(reader, "1 GB of zeros in 1 MB", str(path), path.stat().st_size)
        for what, count in (("one member by 1,000 names", 1000), ("one member by 60,000 names", 60_000)):
            path = folder / f"{name}_{count}.npz"
            _overlapping(path, f"0000{name}.npy", rows, count)
            yield Case(reader, what, str(path), path.stat().st_size)
        path = folder / f"{name}_names.npz"
        with zipfile.ZipFile(path, "w") as file:
            for letter in "(ab":
                file.writestr(letter * 60_000 + ".npy", rows)
            file.writestr(f"{_FLAG.decode('latin1')}.npy", rows)
        yield Case(reader, "names of 60,000 letters", str(path), path.stat().st_size)
        path = folder / f"{name}_twice.npz"
        with zipfile.ZipFile(path, "w") as file:
            for _ in range(2):
                file.writestr(f"{name}.npy", rows)
        yield Case(reader, "two members of one name", str(path), path.stat().st_size)
    masks = folder / "masks.npz"
    np.savez_compressed(masks, points=np.ones((60, 3), "<f4"), mask=np.zeros(40 * _MB, bool))
    yield Case("points .npz", "a mask of 40 MB that nobody asks for", str(masks), masks.stat().st_size)
    cache = ScanCache(folder / "cache", SETTINGS)
    cache.open()
    body = (folder / "zeros_points.npz").read_bytes()
    cache.path("a").write_bytes(b"h2a2scan" + hashlib.sha256(body).digest() + body)
    yield Case("scan cache", "1 GB of zeros in 1 MB", str(cache.folder), len(body))


# --- weights ---------------------------------------------------------------------------------------------------------


def _torch_cases(folder: Path) -> Iterator[Case]:
    def write(name: str, content: bytes, **records: bytes) -> Path:
        path = folder / f"{name}.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            for record, data in records.items():
                archive.writestr(f"archive/data/{record}", data)
        return path

    def tensor(storage: bytes = b"K\x04", shape: bytes = b"K\x02K\x02\x86", key: bytes = b"X\1\0\0\0" + b"0") -> bytes:
        kind = b"ctorch\nFloatStorage\n"
        ids = b"(X\7\0\0\0storage" + kind + key + b"X\3\0\0\0cpu" + storage + b"tQ"
        return b"ctorch._utils\n_rebuild_tensor_v2\n((" + ids[1:] + b"K\0" + shape + b"K\2K\1\x86\x89NtR"

    big = b"X\1\0\0\0a" + b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
    pairs = b"\x80\x02](" + b"X\1\0\0\0aK\1\x86" * 20_000 + b"eq\0ccollections\nOrderedDict\nq\1"
    for what, content in {
        "nested tuples as a key": b"\x80\x02}" + _NESTED + b"K\x01s.",
        "copies of a dictionary": pairs + b"](" + b"h\1h\0\x85R" * 20_000 + b"e.",
        "a number of 60,000 digits as keys": b"\x80\x02}"
        + pickle.dumps(1 << 200_000, 2)[2:-1]
        + b"q\0"
        + b"h\0K\1s" * 9999
        + b".",
        "lists 100,000 deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a storage of exabytes": b"\x80\x02}X\1\0\0\0a" + tensor(b"\x8a\x08" + b"\xff" * 7 + b"\x7f") + b"s.",
        "names with commands": b"\x80\x02}X\5\0\0\0\x1b[31mcos\x1b[31m\nsystem\n)Rs.",
        "no state": b"\x80\x02}" + big + b"s.",
    }.items():
        path = write(str(abs(zlib.crc32(what.encode()))), content, **{"0": bytes(16)})
        yield Case("torch", what, str(path), path.stat().st_size)
    path = folder / "many.pth"
    _overlapping(path, "0000/data.pkl", b"\x80\x02}.", 60_000)
    yield Case("torch", "one record by 60,000 names", str(path), path.stat().st_size)
    path = folder / "packed.pth"
    zip_of_zeros(path, "archive/data.pkl", b"", 32 * _MB)
    yield Case("torch", "a packed pickle", str(path), path.stat().st_size)


def _pretrained_cases(folder: Path, whole: Path) -> Iterator[Case]:
    config = json.loads((whole / "config.json").read_text())
    deep = b"[" * 100_000
    tensors = {
        "offsets beyond the end": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
        "offsets that overlap": {
            n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("shared/a", "shared/b")
        },
        "a shape that overflows": {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}},
        "a type of its own": {"shared/a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        "a name of its own": {"\x1b[31m/a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    }
    weights = {what: json.dumps(header).encode() for what, header in tensors.items()}
    contents = {what: struct.pack("<Q", len(head)) + head + bytes(8) for what, head in weights.items()}
    contents["a header of exabytes"] = struct.pack("<Q", 1 << 62) + b"{}"
    contents["a header of nested lists"] = struct.pack("<Q", len(deep)) + deep
    documents = {what: {**config, "sha256": hashlib.sha256(content).hexdigest()} for what, content in contents.items()}
    texts = {what: json.dumps(document).encode() for what, document in documents.items()}
    for number, what in enumerate([*contents, "config of nested lists", "config of many digits", "other datasets"]):
        place = folder / f"pretrained_{number}"
        place.mkdir()
        other = {
            "config of nested lists": deep,
            "config of many digits": b'{"format": ' + b"9" * 1_000_000 + b"}",
            "other datasets": json.dumps({**config, "datasets": ["\x1b[31m" * 1000] * 100}).encode(),
        }
        (place / "config.json").write_bytes(texts.get(what) or other[what])
        (place / "model.safetensors").write_bytes(contents.get(what) or (whole / "model.safetensors").read_bytes())
        yield Case("pretrained", what, str(place), sum(path.stat().st_size for path in place.iterdir()))


# --- points and folders ----------------------------------------------------------------------------------------------


def _point_cases(folder: Path) -> Iterator[Case]:
    head = "ply\nformat {} 1.0\nelement vertex {}\n{}end_header\n"
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    lists = "property list uint int i\n"
    las = bytearray(227)
    las[:4], las[24:26], las[94:96] = b"LASF", b"\1\2", struct.pack("<H", 227)
    struct.pack_into("<II", las, 96, 227, 0)
    files: dict[str, tuple[str, bytes]] = {
        "a list of 4 G numbers": (
            "a.ply",
            head.format("binary_little_endian", 1, axes + lists).encode() + bytes(12) + b"\xff" * 4,
        ),
        "a list of 100 of 4 G numbers": (
            "b.ply",
            head.format("binary_little_endian", 9, axes + lists).encode()
            + bytes(12)
            + struct.pack("<I", 20)
            + bytes(200),
        ),
        "10**18 vertices": ("c.ply", head.format("ascii", 10**18, axes).encode() + b"1 2 3\n"),
        "vertices without properties": ("d.ply", head.format("ascii", 10**17, "").encode()),
        "a list in a text of 10**9 numbers": (
            "e.ply",
            head.format("ascii", 1, axes + lists).encode() + b"1 2 3 1000000000 1\n",
        ),
        "9,000 properties": (
            "f.ply",
            head.format(
                "binary_little_endian", 1, axes + "".join(f"property float p{i}\n" for i in range(9000))
            ).encode(),
        ),
        "a property with a command": ("g.ply", head.format("ascii", 1, "property float \x1b]0;owned\x07\n").encode()),
        "a line of 60 MB": ("a.xyz", b"1 " * (30 * _MB)),
        "lines, then one of 30 MB": ("b.xyz", b"1 2 3\n" * 500 + b"1 " * (15 * _MB)),
        "lines of words": ("c.xyz", b"1 2 3\n" * 500 + _FLAG * 2000),
        "quotes": ("d.csv", b'"1,5";"2,5";"3,5"\n' * 300 + b'"' * _MB),
        "names with commands": ("e.csv", b"\x1b]0;owned\x07,b,c\n" + b"1,2,3\n" * 300),
        "a count of 10**15": ("a.ptx", b"1000000000000000\n1000000\n" + b"0 0 0\n" * 4 + b"1 0 0 0\n" * 4),
        "a count of a million digits": ("b.ptx", b"9" * 4000 + b"\n1\n" + b"0 0 0\n" * 4 + b"1 0 0 0\n" * 4),
        "a COUNT of a million": (
            "a.pcd",
            b"FIELDS x\nSIZE 4\nTYPE F\nCOUNT 1000000\nWIDTH 1\nHEIGHT 1\nPOINTS 1\nDATA binary\n",
        ),
        "POINTS of many digits": (
            "b.pcd",
            b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 1\nHEIGHT 1\nPOINTS " + b"9" * 4000 + b"\nDATA binary\n",
        ),
        "64 kB of names": ("c.pcd", b"FIELDS " + b"\x1b[31m " * 9000 + b"\nDATA ascii\n"),
        "the most that LZF packs": ("d.pcd", _lzf(600_000)),
        "2**32 points": ("a.las", bytes(las[:107]) + b"\xff" * 4 + bytes(las[111:])),
        "4 G records": ("b.las", bytes(las[:100]) + b"\xff" * 4 + bytes(las[104:])),
        "parts that share an array": ("a.gltf", gltf(parts=20_000, count=60_000)),
        "200,000 nodes of one mesh": ("b.gltf", gltf(count=30_000, nodes=200_000)),
        "a node that holds itself": ("c.gltf", gltf().replace(b'[{"mesh": 0}]', b'[{"children": [0], "mesh": 0}]')),
        "nodes that hold each other": (
            "f.gltf",
            gltf().replace(b'[{"mesh": 0}]', b'[{"children": [1, 1]}, {"children": [0, 0], "mesh": 0}]'),
        ),
        "nested lists in JSON": ("d.gltf", b"[" * 100_000),
        "a number of many digits in JSON": ("e.gltf", b'{"asset": ' + b"9" * 1_000_000 + b"}"),
        "a length of 4 GB": ("a.glb", b"glTF" + struct.pack("<III4s", 2, 1 << 30, 0xFFFFFFF0, b"JSON") + b"{}"),
        "faces of vertices that there are not": ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 999999999\n"),
        "a face of 300,000 corners": ("b.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf" + b" 1 2 3" * 100_000 + b"\n"),
        "20,000 materials": (
            "c.obj",
            b"v 0 0 0\nv 1 0 0\nv 0 1 0\n" + b"".join(b"usemtl m%d\nf 1 2 3\n" % i for i in range(20_000)),
        ),
        "10**9 vertices": ("a.off", b"OFF\n1000000000 1000000000 0\n0 0 0\n"),
        "many digits": ("b.off", b"OFF\n" + b"9" * 5000 + b" 1 0\n0 0 0\n"),
        "4 G faces": ("a.stl", bytes(80) + b"\xff" * 4 + bytes(50)),
        "no numbers": ("b.stl", b"solid a\nfacet normal x y z\n" * 1000 + b"endsolid\n"),
        "a length of exabytes": (
            "a.e57",
            b"ASTM-E57" + struct.pack("<IIQQQQ", 1, 0, 1 << 62, 48, 9, 1024) + bytes(2000),
        ),
        "an XML part of its own": (
            "b.e57",
            b"ASTM-E57" + struct.pack("<IIQQQQ", 1, 0, 2048, 48, 1 << 40, 1024) + bytes(2000),
        ),
    }
    for what, (name, content) in files.items():
        path = folder / f"{name[0]}_{len(what)}.{name.partition('.')[2]}"
        path.write_bytes(content)
        declared = max(declared_size(path), 600_000 // 3 * 264 if "LZF" in what else 0)
        yield Case(f"points {path.suffix}", what, str(path), declared)


def _lzf(packed: int) -> bytes:
    """A PCD file of zeros, packed by LZF as much as it can pack."""
    body = b"\x00\x00" + b"\xe0\xff\x00" * (packed // 3)
    size = 1 + packed // 3 * 264
    points, rest = divmod(size, 12)
    body += bytes([12 - rest - 1]) + bytes(12 - rest)
    points += 1
    lines = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {points}\nHEIGHT 1\nPOINTS {points}\nDATA binary_compressed\n"
    return lines.encode() + struct.pack("<II", len(body), 12 * points) + body


def _folder_cases(folder: Path) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    scan = {"file": "a.npy", "boxes": []}
    box = {"center": [0, 0, 0], "size": [1, 1, 1], "class": "chair"}
    documents = {
        "nested lists": b"[" * 100_000,
        "nested objects in a box": json.dumps({"version": 1, "scans": [{**scan, "boxes": [{**box, "more": 0}]}]})
        .replace('"more": 0', '"more": ' + '{"a": ' * 900 + "0" + "}" * 900)
        .encode(),
        "a number of a million digits": b'{"version": ' + b"9" * 1_000_000 + b"}",
        "1e999 and NaN": json.dumps({"version": 1, "scans": [{**scan, "boxes": [{**box, "center": [1, 2, 3]}]}]})
        .replace("[1, 2, 3]", "[1e999, NaN, -Infinity]")
        .encode(),
        "a key twice": b'{"version": 1, "version": 1, "scans": []}',
        "a key of a million letters": json.dumps({"version": 1, "scans": [], "\x1b[31m" * 200_000: 1}).encode(),
        "a key with half a letter": b'{"version": 1, "scans": [], "\\ud800": 1}',
        "a file with half a letter": b'{"version": 1, "scans": [{"file": "\\ud800.ply"}]}',
        "a file with a command": b'{"version": 1, "scans": [{"file": "a\\u001b[31m\\n.ply"}]}',
        "a file out of the folder": b'{"version": 1, "scans": [{"file": "../../../etc/passwd"}]}',
        "a class of a million letters": json.dumps(
            {"version": 1, "scans": [{**scan, "boxes": [{**box, "class": "x" * _MB}]}]}
        ).encode(),
        "other text": b"\xff\xfe\0{",
        "a million empty lists": b'{"version": 1, "scans": [' + b"[]," * 1_000_000 + b"[]]}",
    }
    for number, (what, content) in enumerate(documents.items()):
        path = scan_folder(folder / f"own_{number}", rng, content)
        yield Case("scan folder", what, str(path.parent), max(len(content), 22 * _MB if "million empty" in what else 0))
    frame = SUN_FRAMES[0]["folder"]
    packed = zlib.compress(struct.pack("<II", 14, 256 * _MB) + bytes(256 * _MB))
    pictures = {
        "a picture of 170 million pixels": (f"{frame}/depth_bfx/depth.png", _png(13_000, 13_000)),
        "a picture of 10**9 pixels": (f"{frame}/depth_bfx/depth.png", _png(40_000, 40_000, rows=1)),
        "a picture with half of its rows": (f"{frame}/depth_bfx/depth.png", _png(12, 9, rows=4)),
        "256 MB of zeros in a MATLAB file": (
            "SUNRGBDMeta3DBB_v2.mat",
            b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 256, b"IM") + struct.pack("<II", 15, len(packed)) + packed,
        ),
        "cells 20,000 deep": ("SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", _deep_cells(20_000)),
        "a MATLAB file of other variables": ("SUNRGBDMeta3DBB_v2.mat", _mat(SUNRGBDMeta=np.zeros(3))),
        "a cell of 2**31 cells": (
            "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat",
            _mat(alltrain=np.array([["a"]], object), alltest=np.array([["b"]], object)).replace(
                struct.pack("<IIii", 5, 8, 1, 1), struct.pack("<IIii", 5, 8, 1 << 15, 1 << 15)
            ),
        ),
    }
    for number, (what, (name, content)) in enumerate(pictures.items()):
        root = folder / f"sun_{number}"
        root.mkdir()
        write_sunrgbd(root)
        (root / name).write_bytes(content)
        yield Case("sunrgbd", what, str(root), len(content))


def _deep_cells(depth: int) -> bytes:
    """A MATLAB file of a cell in a cell in a cell."""

    def matrix(name: bytes, kind: int, content: bytes) -> bytes:
        named = struct.pack("<II", 1, len(name)) + name + bytes(-len(name) % 8)
        body = struct.pack("<IIIIIIii", 6, 8, kind, 0, 5, 8, 1, 1) + named + content
        return struct.pack("<II", 14, len(body)) + body

    head = struct.pack("<IIIIIIiiII", 6, 8, 1, 0, 5, 8, 1, 1, 1, 0)
    inner = b"".join(struct.pack("<II", 14, 48 * (depth - level) - 8) + head for level in range(depth))
    outer = b"".join(matrix(name, 1, inner) for name in (b"alltrain", b"alltest"))
    return b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 256, b"IM") + outer


def _prepared_cases(folder: Path) -> Iterator[Case]:
    """Folders of prepared datasets whose two JSON files have any form; no record is reached."""
    info = {
        "name": "scannet",
        "splits": [{"name": "train", "shardLengths": ["1"], "numBytes": "8"}],
        "fileFormat": "array_record",
    }
    metadata = {"dataset": "scannet", "classes": list(SCANNET.classes), "names": {"train": ["a"]}}
    texts: list[Any] = [[], 1, "\x1b[31m", None, {}, b"[" * 100_000, b"9" * 100_000, b"\xff\xfe{", {"a": [{}]}]
    changes: list[tuple[str, Any]] = [("metadata.json", text) for text in texts]
    changes += [("dataset_info.json", text) for text in texts]
    other: list[Any] = [1, ["\x1b[31m" * 999], {"train": 1}, [{"name": {}}], None]
    for key in metadata:
        changes += [("metadata.json", {**metadata, key: text}) for text in other]
    for key in info:
        changes += [("dataset_info.json", {**info, key: text}) for text in other]
    for number, (name, content) in enumerate(changes):
        place = folder / f"prepared_{number}"
        place.mkdir()
        (place / "dataset_info.json").write_text(json.dumps(info))
        (place / "metadata.json").write_text(json.dumps(metadata))
        (place / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        yield Case("prepared", f"another {name}, {number}", str(place), (place / name).stat().st_size)


def _mat(**variables: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def _png(width: int, height: int, rows: int | None = None) -> bytes:
    """A grey picture of 16 bits, all of it 0."""
    packer = zlib.compressobj(1)
    line = bytes(1 + 2 * width)
    data = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# --- what is no file -------------------------------------------------------------------------------------------------


def _place_cases(folder: Path) -> Iterator[Case]:
    """Pipes, sockets, devices, folders, circles of links and names of any bytes in the place of each kind of file."""

    def make_socket(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.open(path.parent, os.O_RDONLY)  # a long path is no name of a socket
            try:
                listener.bind(f"/proc/self/fd/{here}/{path.name}")
            finally:
                os.close(here)

    makers: dict[str, Callable[[Path], object]] = {
        "a pipe": lambda path: os.mkfifo(path),
        "a socket": make_socket,
        "an endless device": lambda path: path.symlink_to("/dev/zero"),
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "an empty file": lambda path: path.write_bytes(b""),
        "no file": lambda path: None,
    }
    names = [
        *(
            ("points", f"a{suffix}")
            for suffix in (".ply", ".npy", ".npz", ".bin", ".xyz", ".pcd", ".las", ".laz", ".e57")
        ),
        *(("points", f"a{suffix}") for suffix in (".obj", ".glb", ".gltf", ".stl", ".off", ".ptx", ".csv")),
        ("pickle", "a.pkl"),
        ("torch", "a.pth"),
        ("matches", "a.npz"),
        ("kept batch", "7.npz"),
        ("scan folder", "boxes.json"),
        ("pretrained", "config.json"),
        ("scan cache", "a.scan"),
    ]
    for number, (what, make) in enumerate(makers.items()):
        for reader, name in names:
            place = folder / f"{number}_{reader.replace(' ', '_')}_{name.partition('.')[2]}"
            place.mkdir()
            make(place / name)
            if reader == "scan cache":
                (place / "settings.json").write_text(json.dumps(ScanCache(place, SETTINGS).settings))
            if reader == "pretrained":
                (place / "model.safetensors").write_bytes(b"")
            is_folder = reader in ("scan folder", "pretrained", "scan cache")
            label = f"points {Path(name).suffix}" if reader == "points" else reader
            yield Case(label, what, str(place if is_folder else place / name), 1)
    for reader, name in names:
        if reader in ("points", "pickle", "torch", "kept batch"):
            suffix = os.fsencode(Path(name).suffix)
            label = f"points {Path(name).suffix}" if reader == "points" else reader
            path = os.path.join(
                os.fsencode(folder), b"name_\xff\n\x1b[31m_" + reader.replace(" ", "_").encode() + suffix
            )
            with open(path, "wb") as file:
                file.write(b"nothing of that kind\n")
            yield Case(label, "a name with other bytes, a line break and a command", os.fsdecode(path), 20)
            yield Case(label, "no file descriptor left", os.fsdecode(path), 20)


def made_cases(folder: Path, pretrained: Path) -> Iterator[Case]:
    """Write the files below a folder; `pretrained` is a whole pretrained folder."""
    makers: dict[str, Callable[[Path], Iterator[Case]]] = {
        "pickles": _pickle_cases,
        "arrays": _array_cases,
        "torch": _torch_cases,
        "points": _point_cases,
        "folders": _folder_cases,
        "prepared": _prepared_cases,
        "places": _place_cases,
        "weights": lambda place: _pretrained_cases(place, pretrained),
    }
    for name, make in makers.items():
        (folder / name).mkdir(parents=True)
        yield from make(folder / name)
