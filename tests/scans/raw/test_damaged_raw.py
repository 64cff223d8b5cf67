"""Damaged downloads: a sentence for what cannot be used, a count for what was left out, and the other scans as ever."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from h2a2_jax.errors import InputError
from h2a2_jax.scans.raw.arkitscenes import TILTED, ArkitScenes
from h2a2_jax.scans.raw.s3dis import S3dis
from h2a2_jax.scans.raw.scannet import ScanNet
from h2a2_jax.scans.raw.sunrgbd import SunRgbd
from h2a2_jax.scans.scan import ScanError, validate_scan
from tests.scans.raw.miniature import (
    S3DIS_ROOMS,
    SCANNET_SCENES,
    SUN_FRAMES,
    SUN_PREFIX,
    SUN_SPLITS,
    cells,
    room_folder,
    sun_meta,
    write_arkitscenes,
    write_ply,
    write_s3dis,
    write_scannet,
    write_sunrgbd,
)

SCENE = "scene0000_00"
PLY, SEGMENTS, OBJECTS, TEXT = (
    f"scans/{SCENE}/{SCENE}{ending}"
    for ending in ("_vh_clean_2.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt")
)
LABELS = "scannetv2-labels.combined.tsv"
META = "SUNRGBDMeta3DBB_v2.mat"
SPLIT = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
DEPTH = f"{SUN_FRAMES[0]['folder']}/depth_bfx/depth.png"
COLOR = f"{SUN_FRAMES[0]['folder']}/image/color.jpg"
ROOM = "Area_1_office_2"
TABLET = "40753679"
MESH, ANNOTATION = (f"3dod/Training/{TABLET}/{TABLET}_3dod_{ending}" for ending in ("mesh.ply", "annotation.json"))
WRITERS = {ScanNet: write_scannet, SunRgbd: write_sunrgbd, S3dis: write_s3dis, ArkitScenes: write_arkitscenes}
VICTIMS = {ScanNet: SCENE, SunRgbd: "000001", S3dis: ROOM, ArkitScenes: TABLET}


def replace(path, old, new):
    def damage(root):
        content = (root / path).read_bytes()
        assert content.count(old) >= 1
        (root / path).write_bytes(content.replace(old, new, 1))

    return damage


def cut(path, part=0.5):
    def damage(root):
        content = (root / path).read_bytes()
        (root / path).write_bytes(content[: int(len(content) * part)])

    return damage


def overwrite(path, content):
    return lambda root: (root / path).write_bytes(content)


def remove(path):
    return lambda root: (root / path).unlink()


def as_folder(path):
    def damage(root):
        (root / path).unlink()
        (root / path).mkdir()

    return damage


def edit_json(path, change):
    def damage(root):
        content = json.loads((root / path).read_text())
        change(content)
        (root / path).write_text(json.dumps(content))

    return damage


def set_vertices(change):
    def damage(root):
        scene = SCANNET_SCENES[SCENE]
        vertices = scene["vertices"].copy()
        change(vertices)
        write_ply(root / PLY, vertices, scene["colors"])

    return damage


def remove_folder(path):
    def damage(root):
        (root / path).rename(root / "elsewhere")

    return damage


def set_meta(field, value):
    """Changes one field of the first frame."""

    def damage(root):
        meta = sun_meta(SUN_FRAMES)
        meta[field][0, 0] = value
        savemat(root / META, {"SUNRGBDMeta": meta})

    return damage


def set_object(**changes):
    """Changes the first frame's bed."""

    def damage(root):
        meta = sun_meta(SUN_FRAMES)
        for field, value in changes.items():
            meta["groundtruth3DBB"][0, 0][field][0, 0] = value
        savemat(root / META, {"SUNRGBDMeta": meta})

    return damage


def save_image(path, pixels):
    return lambda root: Image.fromarray(pixels).save(root / path)


def room_file(name, content):
    return lambda root: (room_folder(root, ROOM) / name).write_bytes(content)


def set_box(**changes):
    """Changes the bed of the scan of ARKitScenes."""
    return edit_json(ANNOTATION, lambda content: content["data"][0]["segments"]["obbAligned"].update(changes))


def set_nan(vertices):
    vertices[[2, 50]] = np.nan


SCAN_ERRORS = [
    # ScanNet
    pytest.param(ScanNet, cut(PLY), "unreadable PLY file: .* is cut off", id="truncated PLY"),
    pytest.param(ScanNet, cut(PLY, 0.98), "says 2 face elements", id="PLY truncated in its faces"),
    pytest.param(ScanNet, cut(PLY, 0.05), "unreadable PLY file", id="PLY truncated in its header"),
    pytest.param(
        ScanNet,
        replace(PLY, b"vertex 60", b"vertex 900000000"),
        "is cut off: its header says 900000000 vertex",
        id="header promises more",
    ),
    pytest.param(ScanNet, replace(PLY, b"vertex 60", b"vertex 59"), "PLY file", id="header promises less"),
    pytest.param(ScanNet, replace(PLY, b"vertex 60", b"vertex -1"), "PLY file|vertices", id="negative count"),
    pytest.param(ScanNet, replace(PLY, b"uchar red", b"uchar r00"), "no vertices of x, y, z, red", id="no colours"),
    pytest.param(ScanNet, replace(PLY, b"element vertex", b"element vertey"), "without vertices", id="no vertices"),
    pytest.param(ScanNet, replace(PLY, b"ply\n", b"plt\n"), "unreadable PLY file", id="not a PLY"),
    pytest.param(ScanNet, overwrite(PLY, b""), "unreadable PLY file", id="empty PLY"),
    pytest.param(ScanNet, overwrite(PLY, b"\xff\xfe\x00" * 99), "unreadable PLY file", id="PLY of binary junk"),
    pytest.param(ScanNet, remove(PLY), "lacks the file .*download the scan again", id="no PLY"),
    pytest.param(ScanNet, set_vertices(lambda v: v.fill(np.nan)), "no usable vertex", id="all vertices NaN"),
    pytest.param(
        ScanNet,
        edit_json(SEGMENTS, lambda content: content["segIndices"].pop()),
        "59 segment numbers in .*60 vertices",
        id="lengths differ",
    ),
    pytest.param(
        ScanNet, edit_json(SEGMENTS, lambda c: c["segIndices"].__setitem__(3, 1.5)), "no list segIndices", id="float"
    ),
    pytest.param(
        ScanNet, edit_json(SEGMENTS, lambda c: c["segIndices"].__setitem__(3, [1])), "no list segIndices", id="ragged"
    ),
    pytest.param(
        ScanNet, edit_json(SEGMENTS, lambda c: c["segIndices"].__setitem__(3, 10**30)), "no list segIndices", id="huge"
    ),
    pytest.param(ScanNet, edit_json(SEGMENTS, lambda c: c.clear()), "no list segIndices", id="no segIndices"),
    pytest.param(ScanNet, cut(OBJECTS), "invalid JSON file .*download it again", id="truncated JSON"),
    pytest.param(ScanNet, overwrite(OBJECTS, b"[" * 100_000), "invalid JSON file", id="deeply nested JSON"),
    pytest.param(ScanNet, overwrite(OBJECTS, b"\xff{}"), "invalid JSON file", id="JSON that is no UTF-8"),
    pytest.param(ScanNet, overwrite(OBJECTS, b"[1, 2]"), "without objectId, label or segments", id="JSON is a list"),
    pytest.param(
        ScanNet,
        edit_json(OBJECTS, lambda content: content["segGroups"][1].pop("label")),
        "without objectId, label or segments",
        id="object without label",
    ),
    pytest.param(
        ScanNet, replace(TEXT, b" 1.000000 \n", b"\n"), "15 entries after axisAlignment .*16 numbers", id="15 numbers"
    ),
    pytest.param(ScanNet, replace(TEXT, b" 1.000000", b" 7.000000"), "no rotation and translation", id="no rotation"),
    pytest.param(ScanNet, replace(TEXT, b" 5.500000", b" nan"), "no rotation and translation", id="NaN in alignment"),
    pytest.param(ScanNet, remove(TEXT), "lacks the file", id="no text file"),
    pytest.param(ScanNet, remove(OBJECTS), "aggregation.json, which is missing: download", id="no aggregation"),
    pytest.param(ScanNet, remove(SEGMENTS), "segs.json, which is missing: download the scan", id="no segments"),
    pytest.param(ScanNet, as_folder(TEXT), "cannot be read from", id="a folder for a file"),
    pytest.param(ScanNet, remove_folder(f"scans/{SCENE}"), "download it, or take it off the list", id="no such scan"),
    # SUN RGB-D
    pytest.param(SunRgbd, set_meta("K", np.zeros((3, 3))), "focal lengths 0 and 0 .*hundreds of pixels", id="K of 0"),
    pytest.param(SunRgbd, set_meta("K", "camera"), "focal lengths nan", id="K of text"),
    pytest.param(SunRgbd, set_meta("Rtilt", np.zeros((3, 3))), "Rtilt in the metadata that is no rotation", id="tilt"),
    pytest.param(SunRgbd, set_meta("Rtilt", np.eye(2)), "no rotation", id="tilt of 2 x 2"),
    pytest.param(SunRgbd, save_image(DEPTH, np.zeros((9, 12), np.uint8)), "mode L at .*16 bits", id="depth of 8 bits"),
    pytest.param(SunRgbd, save_image(DEPTH, np.zeros((9, 12, 3), np.uint8)), "mode RGB at", id="depth in colour"),
    pytest.param(SunRgbd, save_image(DEPTH, np.zeros((9, 12), np.uint16)), "no depth at all", id="depth of zeros"),
    pytest.param(
        SunRgbd,
        save_image(COLOR, np.zeros((9, 13, 3), np.uint8)),
        "depth image of 12 x 9 pixels but a colour image of 13 x 9",
        id="images of different size",
    ),
    pytest.param(SunRgbd, save_image(COLOR, np.zeros((9, 12), np.uint8)), "mode L at .*mode RGB", id="grey colours"),
    pytest.param(SunRgbd, cut(COLOR, 0.9), "unreadable image", id="truncated JPEG"),
    pytest.param(SunRgbd, cut(DEPTH), "unreadable image", id="truncated PNG"),
    pytest.param(
        SunRgbd, remove(COLOR), "lacks the image .*which is missing: unpack SUNRGBD.zip", id="no colour image"
    ),
    pytest.param(SunRgbd, remove(DEPTH), "lacks the image .*depth.png, which is missing", id="no depth image"),
    pytest.param(
        SunRgbd,
        set_meta("depthpath", f"{SUN_PREFIX}SUNRGBD/../../../etc/passwd"),
        "does not stay inside .*it is not read",
        id="path out of the folder",
    ),
    pytest.param(SunRgbd, set_meta("rgbpath", "../../etc/passwd"), "does not stay inside", id="relative path outwards"),
    pytest.param(SunRgbd, set_meta("rgbpath", "/etc/passwd"), "lacks the image", id="absolute path"),
    pytest.param(SunRgbd, set_meta("depthpath", np.zeros((0, 0))), "does not stay inside", id="no path"),
    pytest.param(SunRgbd, set_meta("depthpath", "SUNRGBD/a\0b"), "unreadable image|lacks the image", id="NUL in path"),
    # S3DIS
    pytest.param(
        S3dis, remove_folder("Area_1/office_2/Annotations"), "no folder .*Annotations with text", id="no Annotations"
    ),
    pytest.param(
        S3dis,
        lambda root: [path.unlink() for path in room_folder(root, ROOM).iterdir()],
        r"no files <class>_<number>.txt in .*Annotations, they are missing",
        id="empty Annotations",
    ),
    pytest.param(S3dis, room_file("wall_1.txt", b"\x7fELF\x02\x01" * 500), "no line of six numbers", id="binary junk"),
    pytest.param(S3dis, room_file("wall_1.txt", b"1 2 3\n4 5 6\n"), "no line of six numbers", id="no colours in text"),
    pytest.param(
        S3dis, lambda root: (room_folder(root, ROOM) / "wall_1.txt").mkdir(), "cannot be read", id="folder named .txt"
    ),
    # ARKitScenes
    pytest.param(ArkitScenes, cut(MESH), "unreadable PLY file: .* is cut off", id="truncated mesh"),
    pytest.param(ArkitScenes, remove(MESH), "mesh.ply, which is missing: download", id="no mesh"),
    pytest.param(ArkitScenes, replace(MESH, b"uchar red", b"uchar r00"), "it lacks red", id="mesh without colours"),
    pytest.param(ArkitScenes, remove(ANNOTATION), "annotation.json, which is missing: download", id="no annotation"),
    pytest.param(ArkitScenes, cut(ANNOTATION), "invalid JSON file .*download it again", id="truncated annotation"),
    pytest.param(ArkitScenes, overwrite(ANNOTATION, b'{"skipped": true'), "invalid JSON", id="skipped, but truncated"),
    pytest.param(ArkitScenes, overwrite(ANNOTATION, b"[1, 2]"), "no list data in", id="annotation is a list"),
    pytest.param(ArkitScenes, edit_json(ANNOTATION, lambda c: c.pop("data")), "no list data in", id="no data"),
    pytest.param(
        ArkitScenes, edit_json(ANNOTATION, lambda c: c["data"][0].pop("label")), "object without a label", id="no label"
    ),
    pytest.param(
        ArkitScenes,
        edit_json(ANNOTATION, lambda c: c["data"][0].pop("segments")),
        "a bed without segments.obbAligned.centroid of 3 numbers",
        id="no segments",
    ),
    pytest.param(ArkitScenes, set_box(axesLengths=[1, 2]), "obbAligned.axesLengths of 3 numbers", id="two lengths"),
    pytest.param(ArkitScenes, set_box(normalizedAxes=[[1, 0, 0]]), "normalizedAxes of 9 numbers", id="axes in rows"),
    pytest.param(ArkitScenes, set_box(centroid="here"), "obbAligned.centroid of 3 numbers", id="centroid of text"),
]


@pytest.mark.parametrize(("kind", "damage", "sentence"), SCAN_ERRORS)
def test_a_scan_that_cannot_be_used(tmp_path, kind, damage, sentence):
    WRITERS[kind](tmp_path)
    damage(tmp_path)
    dataset, victim = kind(tmp_path), VICTIMS[kind]
    with pytest.raises(ScanError) as caught:
        dataset.load(victim)
    message = str(caught.value)
    assert caught.value.scan == victim and victim in message
    assert re.search(sentence, message) and message.endswith(".") and "\n" not in message
    for name in (*dataset.splits["train"], *dataset.splits["val"]):
        if name != victim:
            assert validate_scan(dataset.load(name)) == []


NO_CLASS, NO_BOX = "objects of no class of the dataset", "objects without a usable box"
SCENE_NOTES = {NO_CLASS: 1, "objects without points": 1}
ROOM_NOTES = {NO_CLASS: 2, "objects of an unknown name, taken as clutter": 1}

COUNTED = [
    # kind, damage, notes beside those of the undamaged scan, points lost, boxes lost
    pytest.param(ScanNet, set_vertices(set_nan), {"points with NaN or infinite values": 2}, 2, 0, id="NaN"),
    pytest.param(
        ScanNet,
        set_vertices(lambda v: v.__setitem__((5, 1), -np.inf)),
        {"points with NaN or infinite values": 1},
        1,
        0,
        id="infinite",
    ),
    pytest.param(
        ScanNet,
        set_vertices(lambda v: v.__setitem__((45, 0), 3e7)),
        {"points more than 1 km from the origin": 1},
        1,
        0,
        id="huge coordinate",
    ),
    pytest.param(ScanNet, set_vertices(lambda v: v[10:20].fill(1)), {NO_BOX: 1}, 0, 1, id="object in one point"),
    pytest.param(
        ScanNet,
        replace(TEXT, b"axisAlignment", b"axisalignment"),
        {"alignment missing, identity taken": 1},
        0,
        0,
        id="x",
    ),
    pytest.param(
        ScanNet,
        edit_json(OBJECTS, lambda c: c["segGroups"][0].update(label="offce chair")),
        {"objects whose name is not in the table of labels": 1},
        0,
        1,
        id="name that is not in the table",
    ),
    pytest.param(
        ScanNet,
        edit_json(OBJECTS, lambda c: c["segGroups"][0].update(objectId=0)),
        {"objects replaced by a later one of the same id": 1},
        0,
        1,
        id="object id used twice",
    ),
    pytest.param(
        ScanNet,
        edit_json(OBJECTS, lambda c: c["segGroups"][0].update(segments=[])),
        {"objects without points": 2},
        0,
        1,
        id="object without segments",
    ),
    pytest.param(SunRgbd, set_object(coeffs=[[1, 0, 1.0]]), {NO_BOX: 1}, 0, 1, id="degenerate box"),
    pytest.param(SunRgbd, set_object(centroid=[[1, np.nan, 1]]), {NO_BOX: 1}, 0, 1, id="centre of NaN"),
    pytest.param(SunRgbd, set_object(centroid=[[1, 1e300, 1]]), {NO_BOX: 1}, 0, 1, id="centre far away"),
    pytest.param(SunRgbd, set_object(coeffs=[[1.0, 2.0]]), {NO_BOX: 1}, 0, 1, id="two sizes"),
    pytest.param(SunRgbd, set_object(orientation="north"), {NO_BOX: 1}, 0, 1, id="orientation of text"),
    pytest.param(
        SunRgbd,
        set_object(orientation=[[0.0, 0.0, 0.0]]),
        {"objects with orientation 0, yaw 0 taken": 1},
        0,
        0,
        id="orientation of zeros",
    ),
    pytest.param(ArkitScenes, set_box(axesLengths=[1, 0, 1]), {NO_BOX: 1}, 0, 1, id="box without a height"),
    pytest.param(ArkitScenes, set_box(centroid=[0, float("nan"), 0]), {NO_BOX: 1}, 0, 1, id="box at NaN"),
    pytest.param(ArkitScenes, set_box(centroid=[0, 10**400, 0]), {NO_BOX: 1}, 0, 1, id="box beyond numbers"),
    pytest.param(ArkitScenes, set_box(normalizedAxes=[1, 0, 0, 0, 0, 1, 0, -1, 0]), {TILTED: 1}, 0, 1, id="fallen"),
    pytest.param(ArkitScenes, set_box(normalizedAxes=[0] * 9), {TILTED: 1}, 0, 1, id="axes of zeros"),
    pytest.param(SunRgbd, set_object(classname="beds"), {NO_CLASS: 2}, 0, 1, id="unknown class"),
    pytest.param(SunRgbd, set_object(classname=np.zeros((0, 0))), {NO_CLASS: 2}, 0, 1, id="no class name"),
    pytest.param(S3dis, room_file("chair_2.txt", b""), {"objects without points": 1}, 8, 1, id="empty annotation"),
    pytest.param(
        S3dis, room_file("table_9.txt", b"-14 40 1 9 9 9\n" * 3), {NO_BOX: 1}, -3, 0, id="object in one point of text"
    ),
    pytest.param(
        S3dis,
        room_file("wall_9.txt", b"-14 40 1 9 9 9\n-14 40 1 9 9 9 9\n-14 40"),
        {"lines that could not be read": 2, NO_CLASS: 3},
        -1,
        0,
        id="wrong column counts",
    ),
    pytest.param(
        S3dis, room_file(os.fsdecode(b"chair_\xff.txt"), b"-14 40 1 9 9 9\n-15 41 2 9 9 9"), {}, -2, -1, id="file name"
    ),
]


@pytest.mark.parametrize(("kind", "damage", "notes", "points", "boxes"), COUNTED)
def test_left_out_points_and_objects_are_counted(tmp_path, kind, damage, notes, points, boxes):
    WRITERS[kind](tmp_path)
    before = kind(tmp_path).load(VICTIMS[kind])
    damage(tmp_path)
    after = kind(tmp_path).load(VICTIMS[kind])
    assert after.notes == {**before.notes, **notes}
    assert len(before.points) - len(after.points) == points
    assert len(before.boxes) - len(after.boxes) == boxes
    assert validate_scan(after, kind(tmp_path).spec.num_classes) == []


def split_lists(train, test):
    def damage(root):
        lists = [[f"{SUN_PREFIX}{folder}/" for folder in folders] for folders in (train, test)]
        savemat(root / SPLIT, {"alltrain": cells(lists[0]), "alltest": cells(lists[1])})

    return damage


def drop_field(field):
    def damage(root):
        meta = loadmat(root / META)["SUNRGBDMeta"]
        kept = [name for name in meta.dtype.names if name != field]
        smaller = np.empty(meta.shape, [(name, object) for name in kept])
        for name in kept:
            smaller[name] = meta[name]
        savemat(root / META, {"SUNRGBDMeta": smaller})

    return damage


def drop_object_field(root):
    meta = sun_meta(SUN_FRAMES)
    frame = np.empty((1, 1), [("classname", object)])
    frame["classname"][0, 0] = "bed"
    meta["groundtruth3DBB"][0, 0] = frame
    savemat(root / META, {"SUNRGBDMeta": meta})


def no_rooms(root):
    (root / "Area_5").rename(root / "Area_7")


FOLDERS = [SUN_FRAMES[int(name) - 1]["folder"] for split in ("train", "val") for name in SUN_SPLITS[split]]
VERSION_7_3 = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n"

INPUT_ERRORS = [
    pytest.param(ScanNet, remove_folder("scans"), "no folder scans in .*holds scans/<scan>/", id="no scans"),
    pytest.param(ScanNet, remove(LABELS), "no file .*--label_map", id="no table"),
    pytest.param(ScanNet, replace(LABELS, b"nyu40id", b"nyu41id"), "no column nyu40id .*it has id, raw", id="column"),
    pytest.param(ScanNet, overwrite(LABELS, b""), "no column raw_category and no column nyu40id", id="empty table"),
    pytest.param(ScanNet, overwrite(LABELS, b"\xff\xfe"), "cannot be read as text", id="table that is no UTF-8"),
    pytest.param(ScanNet, remove("scannetv2_val.txt"), "scannetv2_val.txt from https://github.com/ScanNet", id="list"),
    pytest.param(
        ScanNet,
        overwrite("scannetv2_val.txt", b"scene0002_00\nscene0002_00\n"),
        "lists scene0002_00 twice",
        id="duplicate ids",
    ),
    pytest.param(
        ScanNet, overwrite("scannetv2_val.txt", b"scene0001_00\n"), "scene0001_00 are in .*and in", id="in both lists"
    ),
    pytest.param(
        ScanNet, overwrite("scannetv2_val.txt", b"../../etc\n"), "no name of a scan", id="name out of the folder"
    ),
    pytest.param(ScanNet, overwrite("scannetv2_val.txt", b"\n"), "lists no scan", id="empty list"),
    pytest.param(SunRgbd, remove_folder("SUNRGBD"), "no folder SUNRGBD in .*SUNRGBDMeta3DBB_v2.mat", id="no frames"),
    pytest.param(SunRgbd, remove(META), "There is no SUNRGBDMeta3DBB_v2.mat .*fetch it from", id="no metadata"),
    pytest.param(SunRgbd, remove(SPLIT), "There is no allsplit.mat", id="no split"),
    pytest.param(SunRgbd, overwrite(META, b"<html>404</html>"), "no readable MATLAB file", id="a web page"),
    pytest.param(SunRgbd, overwrite(META, b""), "no readable MATLAB file", id="empty metadata"),
    pytest.param(SunRgbd, overwrite(META, VERSION_7_3), "version 7.3", id="version 7.3"),
    pytest.param(SunRgbd, cut(META), "no readable MATLAB file", id="truncated metadata"),
    pytest.param(SunRgbd, lambda root: savemat(root / META, {"a": 1}), "no variable SUNRGBDMeta", id="variable"),
    pytest.param(SunRgbd, drop_field("Rtilt"), "without the field Rtilt", id="no Rtilt"),
    pytest.param(SunRgbd, drop_object_field, "without the field coeffs, centroid, orientation", id="no coeffs"),
    pytest.param(SunRgbd, split_lists(FOLDERS[:2], FOLDERS[1:]), "for training and for testing", id="in both splits"),
    pytest.param(SunRgbd, split_lists(["SUNRGBD/a"], FOLDERS[2:]), "None of the frames .*train", id="unknown frames"),
    pytest.param(S3dis, no_rooms, "no rooms in Area_5 of .*Area_1/ to Area_6/", id="no area for validation"),
    pytest.param(
        S3dis,
        lambda root: (root / "Area_2" / os.fsdecode(b"office_\xff")).mkdir(),
        r"folder office_\\xff, whose name is no UTF-8",
        id="room whose name is no UTF-8",
    ),
]


@pytest.mark.parametrize(("kind", "damage", "sentence"), INPUT_ERRORS)
def test_a_folder_that_cannot_be_used(tmp_path, kind, damage, sentence):
    WRITERS[kind](tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        kind(tmp_path)
    message = str(caught.value)
    assert re.search(sentence, message) and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("kind", WRITERS)
def test_no_folder_at_all(tmp_path, kind):
    with pytest.raises(InputError, match=r"There is no folder .*nowhere: it should hold .*\."):
        kind(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["unknown", "../../etc", "000000", "000005", ""])
def test_unknown_scans(tmp_path, kind, name):
    WRITERS[kind](tmp_path)
    with pytest.raises(ScanError, match=r"There is no (scan|frame|room) .*\."):
        kind(tmp_path).load(name)


def test_unknown_options(tmp_path):
    with pytest.raises(InputError, match="'v3': use 'v2' or 'v1'"):
        SunRgbd(tmp_path, "v3")
    with pytest.raises(InputError, match=r"area 7 .*use 1 to 6"):
        S3dis(tmp_path, val_area=7)


def test_frames_that_only_one_file_knows_are_counted(tmp_path):
    write_sunrgbd(tmp_path)
    split_lists([FOLDERS[0], FOLDERS[0], "SUNRGBD/kv1/gone"], FOLDERS[2:])(tmp_path)
    dataset = SunRgbd(tmp_path)
    assert dataset.splits == {"train": ("000001",), "val": ("000002", "000003")}
    assert dataset.notes == {
        "entries of the split lists given twice": 1,
        "frames of the split lists without metadata": 1,
        "frames of the metadata in no split": 1,
    }


def test_files_of_archives_and_file_managers_are_passed_over(tmp_path):
    write_s3dis(tmp_path)
    plain = S3dis(tmp_path)
    (tmp_path / "Area_1" / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "Area_1").mkdir(parents=True)
    for stray in ("._chair_1.txt", ".DS_Store", "Thumbs.db"):
        (room_folder(tmp_path, ROOM) / stray).write_bytes(b"\0\5\x16\7")
    found = S3dis(tmp_path)
    assert found.splits == plain.splits
    np.testing.assert_array_equal(found.load(ROOM).points, plain.load(ROOM).points)


def test_missing_areas_are_counted(tmp_path):
    write_s3dis(tmp_path)
    (tmp_path / "Area_3").rename(tmp_path / "Area_3_unpacking")
    dataset = S3dis(tmp_path)
    assert dataset.notes == {"areas missing": 1} and len(dataset.splits["train"]) == 4
    assert len(S3DIS_ROOMS) == 6
