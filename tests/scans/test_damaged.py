"""Damaged scans, boxes and folders: each ends in a sentence that names it or in a counted note; the rest goes on."""

import dataclasses
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.loader.batching import collate
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder
from h2a2_jax.scans.scan import ENCLOSED, load_or_skip, validate_scan
from h2a2_jax.scans.scan_folder import ScanFolder
from h2a2_jax.scans.specs import SCANNET, SUNRGBD

TURNED = dataclasses.replace(SUNRGBD, floor=0.0, faces_y=False)  # its classes and yaw, rooms as they lie
ROWS = np.random.default_rng(0).uniform(0, 1, (60, 6)).astype("<f4")
CHAIR = {"center": [0.5, 0.5, 0.5], "size": [0.4, 0.4, 0.8], "class": "chair"}


class Executes:
    """Makes a folder where it is unpickled by Python's own means."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def own_folder(root: Path, scans: list, **keys) -> Path:
    (root / "boxes.json").write_text(json.dumps({"version": 1, "scans": scans, **keys}))
    return root


def survivors_make_a_batch(source, kept: list[str]) -> None:
    scans = list(load_or_skip(source, {}))
    assert [scan.name for scan in scans] == kept
    assert [problem for scan in scans for problem in validate_scan(scan, source.spec.num_classes)] == []
    batch = collate(scans, DetectorConfig(voxel_size=0.05))
    assert np.isfinite(batch.features).all() and (len(batch.features) > 0 or not kept)


# ---- files of points: (suffix, content, the sentence) --------------------------------------------------------------


def ply(body: bytes, *lines: str, form: str = "binary_little_endian", count: int | str = 60) -> bytes:
    lines = lines or (f"element vertex {count}", *(f"property float {axis}" for axis in "xyz"))
    return "\n".join(["ply", f"format {form} 1.0", *lines, "end_header", ""]).encode() + body


def pcd(body: bytes, data: str = "binary", fields: str = "x y z", points: int = 60, kind: str = "F 4") -> bytes:
    n, (letter, size) = len(fields.split()), kind.split()
    lines = [f"FIELDS {fields}", f"SIZE {' '.join([size] * n)}", f"TYPE {' '.join([letter] * n)}", f"WIDTH {points}"]
    return "\n".join([*lines, "HEIGHT 1", f"POINTS {points}", f"DATA {data}", ""]).encode() + body


def npy(array: np.ndarray, shape: tuple | None = None) -> bytes:
    """numpy's format, with any shape in the header."""
    header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {shape or array.shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.tobytes()


def npz(path: Path, **members: bytes) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path.read_bytes()


def flipped(content: bytes) -> bytes:
    """The same zip with a damaged byte in the middle of its first member."""
    return content[:200] + bytes([content[200] ^ 255]) + content[201:]


XYZ = np.ascontiguousarray(ROWS[:, :3])
LZF = struct.pack("<II", 11, 720) + b"\x01ab\xe0\x05\x01" + b"\x00" * 5
FILES = {
    "ply: empty": (".ply", b"", "no PLY file"),
    "ply: another format": (".ply", b"<html></html>", "no PLY file: its first line is not 'ply'"),
    "ply: header cut off": (".ply", ply(b"")[:60], "cut off in its PLY header"),
    "ply: a format of its own": (
        ".ply",
        ply(XYZ.tobytes(), form="binary_mixed"),
        "line 'format binary_mixed 1.0', not understood",
    ),
    "ply: points cut off": (".ply", ply(XYZ.tobytes()[:-1]), "cut off: its header says 60 vertex .* but 719 bytes"),
    "ply: a count that lies": (".ply", ply(XYZ.tobytes(), count=10**15), "header says 1000000000000000 vertex"),
    "ply: a negative count": (".ply", ply(XYZ.tobytes(), count=-1), "-1 vertex elements"),
    "ply: a count that is no number": (".ply", ply(b"", count="many"), "'element vertex many', not understood"),
    "ply: text cut off": (
        ".ply",
        ply(b"1.25 2.25 3.25\n4 5 6\n", form="ascii", count=3),
        "header says 3 vertex .* read were 2",
    ),
    "ply: text without numbers": (".ply", ply(b"1 2 x\n", form="ascii", count=1), "a vertex that is not 3 numbers"),
    "ply: colours that are no bytes": (
        ".ply",
        ply(
            b"1 2 300\n",
            "element vertex 1",
            *(f"property {t}" for t in ("float x", "float y", "uchar red")),
            form="ascii",
        ),
        "its field red of type uint8 cannot hold",
    ),
    "ply: no vertices": (".ply", ply(b"", "element face 0"), "without vertices"),
    "ply: no coordinates": (
        ".ply",
        ply(b"abcd", "element vertex 1", "property float red"),
        r"no x, y, z among its fields \(red\)",
    ),
    "ply: an unknown type": (
        ".ply",
        ply(b"", "element vertex 1", "property quad x"),
        "'property quad x', not understood",
    ),
    "ply: lists before the vertices, cut off": (
        ".ply",
        ply(b"\3\0\0", "element face 1", "property list uchar int i", "element vertex 0", "property float x"),
        "a list of its face elements does not end in the file",
    ),
    "ply: a property twice": (
        ".ply",
        ply(b"abcdefgh", "element vertex 1", "property float x", "property float x"),
        r"names vertex\.x twice",
    ),
    "pcd: no header": (".pcd", b"\0" * 500, "no PCD file or is cut off"),
    "pcd: points cut off": (".pcd", pcd(XYZ.tobytes()[:-1]), "says 60 points, which take 720 bytes, but 719"),
    "pcd: a count that lies": (".pcd", pcd(XYZ.tobytes(), points=10**14), "says 100000000000000 points"),
    "pcd: a type of its own": (".pcd", pcd(XYZ.tobytes(), kind="F 2"), "a field of type F and size 2"),
    "pcd: no coordinates": (".pcd", pcd(XYZ.tobytes(), fields="a b c"), "no x, y, z among its fields"),
    "pcd: text cut off": (".pcd", pcd(b"1.25 2.25 3\n4 5\n", "ascii", points=2), "a point that is not 3 numbers"),
    "pcd: sizes that lie": (
        ".pcd",
        pcd(struct.pack("<II", 4, 10**9) + b"abcd", "binary_compressed"),
        "claim 1000000000",
    ),
    "pcd: compressed data cut off": (".pcd", pcd(struct.pack("<II", 99, 720) + b"abc", "binary_compressed"), "cut off"),
    "pcd: no LZF": (".pcd", pcd(LZF, "binary_compressed"), "not LZF"),
    "npy: a header of another tongue": (".npy", npy(ROWS).replace(b"'descr'", b"b'desc'"), "is damaged|no numpy array"),
    "npy: no array": (".npy", b"nothing of that kind", "no numpy array"),
    "npy: cut off": (".npy", npy(ROWS)[:-9], "is cut off"),
    "npy: a shape that lies": (".npy", npy(ROWS, (10**12, 6)), "is cut off"),
    "npy: one row of numbers": (".npy", npy(ROWS.reshape(-1)), r"the shape \(360,\); expected are rows"),
    "npy: text": (".npy", npy(np.full((60, 6), "a")), "the type <U1; expected are real numbers"),
    "npz: no archive": (".npz", b"nothing of that kind", "no readable .npz"),
    "npz: other arrays": (
        ".npz",
        lambda tmp: npz(tmp, boxes=npy(ROWS)),
        "has the arrays boxes; expected is one called",
    ),
    "npz: a shape that lies": (".npz", lambda tmp: npz(tmp, points=npy(ROWS, (10**12, 6))), "is cut off"),
    "npz: a damaged byte": (".npz", lambda tmp: flipped(npz(tmp, points=npy(ROWS))), "damaged|no readable .npz"),
    "npz: too few colours": (
        ".npz",
        lambda tmp: npz(tmp, points=npy(XYZ), colors=npy(XYZ[:50])),
        "as many colours of three numbers",
    ),
    "bin: cut off": (".bin", ROWS.tobytes()[:-5], "no whole rows of 6, 4 or 3 float32 numbers"),
    "txt: bytes": (".txt", ROWS.tobytes(), "is no text"),
    "txt: words": (".txt", b"once upon a time\n" * 3, "no line of numbers"),
    "txt: a line cut off": (".xyz", b"1 2 3\n4 5 6\n7 8\n", "a line that is not numbers"),
    "a suffix that is not known": (".xyzw", b"1 2 3", r"the suffix '\.xyzw'; point clouds are read from \.ply"),
    "a suffix of a drawing": (
        ".fbx",
        b"1 2 3",
        r"the suffix '\.fbx': export it as \.glb, \.obj or \.ply; point clouds",
    ),
    "a folder": (".ply", None, "cannot be read: Is a directory"),
    "points without a number": (".npy", npy(np.full((60, 6), np.nan)), "no usable point"),
    "no points": (".npy", npy(ROWS[:0]), "no usable point"),
    "huge coordinates": (".npy", npy(ROWS * [1e38, 1, 1, 1, 1, 1]), "beyond 250 m from the origin .* check its unit"),
    "colours out of range": (".npy", npy(ROWS * 1000), "colours reach .* rescale them"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_points(tmp_path, kind):
    suffix, content, sentence = FILES[kind]
    path = tmp_path / f"bad{suffix}"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content(tmp_path / "made") if callable(content) else content)
    np.save(tmp_path / "good.npy", ROWS)
    own_folder(tmp_path, [{"file": path.name, "boxes": [CHAIR]}, {"file": "good.npy", "boxes": [CHAIR]}])
    source = ScanFolder(tmp_path, "train", TURNED)
    skipped: dict[str, str] = {}
    list(load_or_skip(source, skipped))
    assert list(skipped) == ["bad"] and "bad" in skipped["bad"]
    assert re.search(sentence, skipped["bad"]), skipped["bad"]
    survivors_make_a_batch(source, ["good"])


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickled_objects_in_numpy_files_are_never_loaded(tmp_path, suffix):
    rows = np.array([[Executes(tmp_path / "made")] * 3], object)
    np.save(tmp_path / "bad.npy", rows, allow_pickle=True)
    if suffix == ".npz":
        npz(tmp_path / "bad.npz", points=(tmp_path / "bad.npy").read_bytes())
    own_folder(tmp_path, [{"file": f"bad{suffix}"}])
    skipped: dict[str, str] = {}
    list(load_or_skip(ScanFolder(tmp_path, "train", TURNED), skipped))
    assert "Python objects, which are never loaded" in skipped["bad"] and not (tmp_path / "made").exists()


def test_a_scan_that_is_missing_is_the_only_one(tmp_path):
    np.save(tmp_path / "good.npy", ROWS)
    source = ScanFolder(own_folder(tmp_path, [{"file": "gone.ply"}, {"file": "good.npy"}]), "train", TURNED)
    skipped: dict[str, str] = {}
    list(load_or_skip(source, skipped))
    assert re.search(r"Scan gone: There is no file .*gone\.ply", skipped["gone"])
    survivors_make_a_batch(source, ["good"])


STRAY = np.concatenate([ROWS] * 5)
STRAY[7, 1] = 1e30
NAN = ROWS.copy()
NAN[3:5, 0], NAN[9, 5] = np.nan, np.inf


@pytest.mark.parametrize(
    ("rows", "boxes", "note", "left"),
    [
        (NAN, [CHAIR], {"points with NaN or infinite values": 2}, (58, 1)),
        (STRAY, [CHAIR], {"points beyond 250 m": 1}, (299, 1)),
        (ROWS, [CHAIR, {**CHAIR, "size": [1, 0, 1]}], {"boxes with a size that is not positive": 1}, (60, 1)),
        (ROWS, [{**CHAIR, "size": [1, -1, 1]}], {"boxes with a size that is not positive": 1}, (60, 0)),
        (ROWS, [{**CHAIR, "yaw": None}, CHAIR], {"boxes with NaN or infinite values": 1}, (60, 1)),
        (ROWS, [{**CHAIR, "center": [10**400, 0, 0]}], {"boxes with NaN or infinite values": 1}, (60, 0)),
        (ROWS, [{**CHAIR, "size": [1e30, 1, 1]}], {"boxes beyond 250 m": 1}, (60, 0)),
        (
            ROWS,
            [{**CHAIR, "class": "dragon"}],
            {"boxes of the class 'dragon', which sunrgbd does not have": 1},
            (60, 0),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_left_out_points_and_boxes_of_a_scan_are_counted(tmp_path, rows, boxes, note, left):
    np.save(tmp_path / "a.npy", rows)
    source = ScanFolder(own_folder(tmp_path, [{"file": "a.npy", "boxes": boxes}], colors="none"), "train", TURNED)
    scan = source[0]
    assert dict(scan.notes) == {**note, "scans without colours, made grey": 1} and len(scan.points) == left[0]
    assert len(scan.boxes) == len(scan.labels) == left[1]
    survivors_make_a_batch(source, ["a"])


# ---- boxes.json ----------------------------------------------------------------------------------------------------

A = {"file": "a.npy", "boxes": [CHAIR]}
DOCUMENTS = {
    "cut off": ('{"version": 1, "scans": [', "no JSON file"),
    "bytes": (b"\xff\xfe\x00", "no JSON file"),
    "too deep": ("[" * 100_000, "no JSON file"),
    "a list": ([A], "the document is list; expected is an object"),
    "another version": ({"version": 2, "scans": [A]}, "its version is 2, this program reads version 1"),
    "no version": ({"scans": [A]}, "has no 'version'"),
    "no scans": ({"version": 1, "scans": []}, "no list of at least one"),
    "a misspelt key": ({"version": 1, "units": "mm", "scans": [A]}, "unknown key 'units'; did you mean 'unit'"),
    "another unit": (
        {"version": 1, "unit": "inch", "scans": [A]},
        "\"unit\" is 'inch'; expected is one of m, cm, mm, ft, in",
    ),
    "another axis": ({"version": 1, "up": "w", "scans": [A]}, "\"up\" is 'w'"),
    "another range": ({"version": 1, "colors": 255, "scans": [A]}, '"colors" is 255'),
    "another split": ({"version": 1, "scans": [{**A, "split": "test"}]}, "\"split\" is 'test'; expected .* train, val"),
    "a path above": ({"version": 1, "scans": [{"file": "../a.npy"}]}, r"'\.\./a\.npy' lies outside the folder"),
    "a path from the root": ({"version": 1, "scans": [{"file": "/etc/passwd"}]}, "'/etc/passwd' lies outside"),
    "a link out of the folder": ({"version": 1, "scans": [{"file": "link.npy"}]}, r"'link\.npy' lies outside"),
    "no path": ({"version": 1, "scans": [{"file": 3}]}, "the file of scan 1 is 3"),
    "a scan twice": ({"version": 1, "scans": [A, {"file": "a.ply"}]}, "scan a is there more than once"),
    "boxes that are none": ({"version": 1, "scans": [{**A, "boxes": {}}]}, r"the boxes of a\.npy are no list"),
    "a box that is none": ({"version": 1, "scans": [{**A, "boxes": [[1, 2]]}]}, r"box 1 of a\.npy is \[1, 2\]"),
    "a box without size": (
        {"version": 1, "scans": [{**A, "boxes": [CHAIR, {"center": [1, 2, 3], "class": "bed"}]}]},
        r"the size of box 2 of a\.npy is None; expected are three numbers",
    ),
    "numbers as text": (
        {"version": 1, "scans": [{**A, "boxes": [{**CHAIR, "center": ["1", 2, 3]}]}]},
        r"the center of box 1 of a\.npy",
    ),
    "yaw as text": ({"version": 1, "scans": [{**A, "boxes": [{**CHAIR, "yaw": "90"}]}]}, r"the yaw of box 1"),
    "a misspelt centre": (
        {"version": 1, "scans": [{**A, "boxes": [{"centre": [1, 2, 3], "size": [1, 1, 1], "class": "bed"}]}]},
        "box 1 of .* has the unknown key 'centre'; did you mean 'center'",
    ),
    "a misspelt yaw": (
        {"version": 1, "scans": [{**A, "boxes": [{"center": [1, 2, 3], "size": [1, 1, 1], "Yaw": 1, "class": "bed"}]}]},
        "unknown key 'Yaw'; did you mean 'yaw'",
    ),
    "a class as number": ({"version": 1, "scans": [{**A, "boxes": [{**CHAIR, "class": 4}]}]}, r"the class of box 1"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_file_of_boxes(tmp_path, kind):
    content, sentence = DOCUMENTS[kind]
    (tmp_path / "outside").mkdir()
    root = tmp_path / "scans"
    root.mkdir()
    np.save(root / "a.npy", ROWS)
    np.save(tmp_path / "outside" / "a.npy", ROWS)
    (root / "link.npy").symlink_to(tmp_path / "outside" / "a.npy")
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    (root / "boxes.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=sentence) as caught:
        ScanFolder(root, "train", TURNED)
    assert "boxes.json" in str(caught.value)


# ---- folders prepared by mmdetection3d -----------------------------------------------------------------------------

BOX = ([0.5, 0.5, 0.5, 0.4, 0.4, 0.8, 0.1], 3)


def v2(name: str = "a", instances=(BOX,), path: str | None = None, **more) -> dict:
    return {
        "lidar_points": {"lidar_path": path or f"{name}.bin", "num_pts_feats": more.pop("columns", 6)},
        "instances": [{"bbox_3d": box, "bbox_label_3d": label} for box, label in instances],
        **more,
    }


def v1(name: str = "a", **annos) -> dict:
    return {"pts_path": f"points/{name}.bin", "annos": {"gt_num": 0, **annos}}


def infos(*entries: dict) -> dict:
    return {"metainfo": {}, "data_list": list(entries)}


def prepared(root: Path, content, rows=ROWS, name: str = "a") -> Path:
    (root / "points").mkdir(parents=True, exist_ok=True)
    for scan, values in ((name, rows), ("good", ROWS)):
        (root / "points" / f"{scan}.bin").write_bytes(values if isinstance(values, bytes) else values.tobytes())
    (root / "infos.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return root


def bomb(function: str, argument: bytes) -> bytes:
    """A pickle that calls a function of builtins with a number."""
    return b"\x80\x02cbuiltins\n" + function.encode() + b"\n" + argument + b"\x85R."


def array_bomb() -> bytes:
    real = pickle.dumps(np.zeros(3), 2)
    assert real.count(b"K\x00\x85") == 1  # the shape (0,) before the content
    return real.replace(b"K\x00\x85", b"\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85")


SKEW = np.diag([1, 2, 1, 1]).tolist()
FOLDERS = {
    "infos cut off": (pickle.dumps(infos(v2()))[:-30], "not a readable pickle"),
    "infos of another kind": ("text", "no mmdetection3d info file"),
    "no scan": (infos(), "name no scan"),
    "bytes without end": (bomb("bytearray", b"\x8a\x06" + (10**13).to_bytes(6, "little")), "not a readable pickle"),
    "an array without end": (array_bomb(), "not a readable pickle"),
    "a scan twice": (infos(v2(), v2("good"), v2()), r"name 1 scans more than once \(a\)"),
    "a path above": (infos(v2(path="../../a.bin")), r"the path '\.\./\.\./a\.bin' leaves the folder"),
    "a path above, backwards": (infos(v2(path="..\\a.bin")), "leaves the folder"),
    "no path": (infos(v2(path="/")), "the path of a scan is '/'"),
    "versions mixed": (infos(v2(), v1("good")), "it is of version 2, but 1 entries, the first at 1"),
    "versions mixed, the other way": ([v1("good"), v2()], "it is of version 1, but 1 entries, the first at 1"),
    "rows of four": (infos(v2(columns=4)), "scan a has 4 numbers per point, 6 expected"),
    "boxes of five": (infos(v2(instances=[([1, 2, 3, 1, 1], 0)])), "boxes of scan a have 5 numbers, 6 or 7 expected"),
    "boxes of words": (infos(v2(instances=[(["x"] * 6, 0)])), "no mmdetection3d info file"),
    "a label between two": (infos(v2(instances=[(BOX[0], 1.5)])), "scan a has a label that is no whole number"),
    "labels missing": (
        [v1(**{"gt_num": 1, "class": np.array([]), "gt_boxes_upright_depth": np.ones((1, 6))})],
        "scan a has 1 boxes but 0 labels",
    ),
    "an alignment of NaN": (infos(v2(axis_align_matrix=np.full((4, 4), np.nan))), "alignment of scan a is no rotation"),
    "an alignment that stretches": (infos(v2(axis_align_matrix=SKEW)), "alignment of scan a is no rotation and shift"),
    "an alignment of 3 x 3": (infos(v2(axis_align_matrix=np.eye(3))), r"has the shape \(3, 3\), \(4, 4\) expected"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_info_files(tmp_path, kind):
    content, sentence = FOLDERS[kind]
    with pytest.raises(InputError, match=sentence) as caught:
        Mmdet3dFolder(prepared(tmp_path, content), "infos.pkl", SUNRGBD)
    assert "infos.pkl" in str(caught.value)


@pytest.mark.parametrize("where", ["plain", "in an array", "as a scalar"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, where):
    evil = Executes(tmp_path / "made")
    if where == "as a scalar":
        content = b"\x80\x02cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\x01\x00\x00\x00OK\x00K\x01\x87R"
        content += pickle.dumps(evil, 2)[2:-1] + b"\x86R."
    else:
        content = pickle.dumps([evil] if where == "plain" else {"data_list": np.array([evil, 1], object)})
    with pytest.raises(InputError, match="mkdir, which is not plain data"):
        Mmdet3dFolder(prepared(tmp_path, content), "infos.pkl", SUNRGBD)
    assert not (tmp_path / "made").exists()


BYTES = ROWS * np.float32([1, 1, 1, 255, 255, 255])
DOUBLE = np.concatenate([ROWS[:, :3] * 4, ROWS[:, 3:]], axis=1).astype("<f8")
POINT_FILES = {
    "cut off": (ROWS.tobytes()[:-7], "Scan a is cut off: .*a.bin has 1433 bytes"),
    "empty": (b"", "Scan a has no usable point"),
    "NaN": (ROWS * np.nan, "Scan a has no usable point"),
    "float64": (DOUBLE, "Scan a has (colours|.*points beyond)"),
    "huge coordinates": (ROWS * np.float32([1e5, 1, 1, 1, 1, 1]), "Scan a has .* beyond 250 m .*check its unit"),
    "beyond float32": (ROWS * np.float32([3e38, 1, 1, 1, 1, 1]), "Scan a has .* beyond 250 m"),
    "colours of another range": (ROWS * np.float32([1, 1, 1, 400, 400, 400]), "Scan a has colours .* rescale them"),
}


@pytest.mark.parametrize("kind", POINT_FILES)
def test_files_of_points_of_prepared_folders(tmp_path, kind):
    rows, sentence = POINT_FILES[kind]
    source = Mmdet3dFolder(prepared(tmp_path, infos(v2(), v2("good")), rows), "infos.pkl", SUNRGBD)
    skipped: dict[str, str] = {}
    list(load_or_skip(source, skipped))
    assert list(skipped) == ["a"] and re.search(sentence, skipped["a"]), skipped
    survivors_make_a_batch(source, ["good"])


@pytest.mark.parametrize(
    ("entry", "rows", "spec", "note"),
    [
        (v2(), NAN, SUNRGBD, {"points with NaN or infinite values": 3}),
        (v2(), STRAY, SUNRGBD, {"points beyond 250 m": 1}),
        (v2(instances=[BOX, ([0] * 7, 1)]), ROWS, SUNRGBD, {"boxes with a size that is not positive": 1}),
        (v2(instances=[BOX, ([np.nan] * 7, 1)]), ROWS, SUNRGBD, {"boxes with NaN or infinite values": 1}),
        (v2(instances=[BOX, ([1e39] * 7, 1)]), ROWS, SUNRGBD, {"boxes with NaN or infinite values": 1}),
        (v2(instances=[BOX, ([1e9] * 7, 1)]), ROWS, SUNRGBD, {"boxes beyond 250 m": 1}),
        (v2(instances=[BOX, (BOX[0], 10**20), (BOX[0], -7)]), ROWS, SUNRGBD, {"boxes of no class of the dataset": 2}),
        (
            v2(),
            ROWS * np.float32([1, 1, 1, 255, 255, 255]),
            SCANNET,
            {ENCLOSED: 1, "scans without an alignment, taken as aligned": 1},
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_left_out_points_and_boxes_of_a_prepared_scan_are_counted(tmp_path, entry, rows, spec, note):
    source = Mmdet3dFolder(prepared(tmp_path, infos(entry), rows), "infos.pkl", spec)
    scan = source[0]
    assert dict(scan.notes) == note and len(scan.boxes) == 1
    survivors_make_a_batch(source, ["a"])
