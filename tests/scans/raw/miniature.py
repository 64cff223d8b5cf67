"""Miniature copies of the benchmarks as people download them: the formats to the byte, a few small scans.

What the files say is in `SCANNET_SCENES`, `SUN_FRAMES`, `S3DIS_ROOMS` and `ARKIT_SCANS`, so that a test can compute
what a parser must return.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

# ScanNet: ten vertices to a segment, segment numbers as in the originals (the smallest vertex of each).
_QUARTER_TURN = ((0, -1, 0, 5.5), (1, 0, 0, -2.25), (0, 0, 1, 0.125), (0, 0, 0, 1))
_SLIGHT_TURN = (
    (0.945519, 0.325568, 0, -5.38439),
    (-0.325568, 0.945519, 0, -2.87178),
    (0, 0, 1, -0.06435),
    (0, 0, 0, 1),
)


def _scene(seed, segments, groups, alignment):
    rng = np.random.default_rng(seed)
    return {
        "vertices": rng.uniform((0, 0, 0), (6, 4, 2.5), (10 * segments, 3)).astype(np.float32),
        "colors": rng.integers(0, 256, (10 * segments, 3)).astype(np.uint8),
        "segments": np.repeat(np.arange(segments) * 10, 10),
        "groups": groups,  # objectId, label, segments
        "alignment": alignment,
    }


SCANNET_SCENES = {
    "scene0000_00": _scene(
        0,
        6,
        [
            (1, "office chair", [10, 20]),
            (0, "table", [20, 30]),  # takes segment 20 from the chair, and comes first by its id
            (2, "floor", [0]),
            (3, "doorframe", [990]),  # a segment of no vertex
            (4, "shower curtain", [40]),
        ],
        _QUARTER_TURN,
    ),
    "scene0001_00": _scene(1, 4, [(0, "trash can", [0]), (1, "trash can", [20])], _SLIGHT_TURN),
    "scene0002_00": _scene(2, 3, [], None),
    "scene0003_01": _scene(3, 3, [(0, "wall", [0]), (1, "bed", [10, 20])], None),
}
SCANNET_SPLITS = {"train": ("scene0001_00", "scene0000_00"), "val": ("scene0002_00", "scene0003_01")}
SCANNET_NYU40 = {  # raw category -> nyu40id
    "wall": 1,
    "floor": 2,
    "office chair": 5,
    "table": 7,
    "bed": 4,
    "doorframe": 8,
    "shower curtain": 28,
    "trash can": 39,
    "object": 40,
}


def write_ply(path, vertices, colors, faces=((0, 1, 2), (1, 2, 3)), form="binary_little_endian"):
    """A mesh with the header of ScanNet's files."""
    header = [
        "ply",
        f"format {form} 1.0",
        "comment MLIB generated",
        f"element vertex {len(vertices)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {channel}" for channel in ("red", "green", "blue", "alpha")),
        f"element face {len(faces)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    if form == "ascii":
        lines = [f"{x!r} {y!r} {z!r} {r} {g} {b} 255" for (x, y, z), (r, g, b) in zip(
            np.asarray(vertices).tolist(), np.asarray(colors).tolist(), strict=True)]  # fmt: skip
        lines += [" ".join(map(str, (len(face), *face))) for face in faces]
        path.write_text("\n".join(header + lines) + "\n")
        return
    order = "<" if form == "binary_little_endian" else ">"
    rows = np.zeros(len(vertices), [("xyz", f"{order}f4", 3), ("rgba", "u1", 4)])
    rows["xyz"], rows["rgba"][:, :3], rows["rgba"][:, 3] = vertices, colors, 255
    mesh = b"".join(bytes([len(face)]) + np.array(face, f"{order}i4").tobytes() for face in faces)
    path.write_bytes("\n".join([*header, ""]).encode() + rows.tobytes() + mesh)


def write_scene(root, name, scene):
    """The four files of one ScanNet scene that matter here."""
    folder = Path(root) / "scans" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_ply(folder / f"{name}_vh_clean_2.ply", scene["vertices"], scene["colors"])
    parameters = {"kThresh": "0.0100000", "segMinVerts": "20", "minPoints": "750"}
    segments = {"params": parameters, "sceneId": name, "segIndices": scene["segments"].tolist()}
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))
    groups = [
        {"id": number, "objectId": number, "segments": list(parts), "label": label}
        for number, label, parts in scene["groups"]
    ]
    aggregation = {"sceneId": f"scannet.{name}", "appId": "Aggregator.v2", "segGroups": groups, "segmentsFile": "..."}
    (folder / f"{name}.aggregation.json").write_text(json.dumps(aggregation))
    lines = ["colorHeight = 968", "colorWidth = 1296", "fx_depth = 577.870605", "sceneType = Living room / Lounge"]
    if scene["alignment"] is not None:
        numbers = " ".join(f"{number:.6f}" for row in scene["alignment"] for number in row)
        lines.insert(0, f"axisAlignment = {numbers} ")
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_scannet(root):
    """Four scenes, their lists and the table of labels."""
    for name, scene in SCANNET_SCENES.items():
        write_scene(root, name, scene)
    for split, names in SCANNET_SPLITS.items():
        (Path(root) / f"scannetv2_{split}.txt").write_text("\n".join(names) + "\n")
    rows = ["id\traw_category\tcategory\tcount\tnyu40id\teigen13id\tnyuClass\tnyu40class"]
    rows += [f"{i}\t{raw}\t{raw}\t12\t{nyu}\t7\t{raw}\totherprop" for i, (raw, nyu) in enumerate(SCANNET_NYU40.items())]
    (Path(root) / "scannetv2-labels.combined.tsv").write_text("\n".join(rows) + "\n")


# SUN RGB-D: depth in millimetres, 0 = not measured. Objects are (classname, centroid, coeffs, orientation).
_TILT = ((1, 0, 0), (0, 0.8, -0.6), (0, 0.6, 0.8))


def _frame(seed, folder, objects, tilt=_TILT, shape=(9, 12)):
    rng = np.random.default_rng(seed)
    depth = rng.integers(900, 9800, shape).astype(np.uint16)
    depth[rng.random(shape) < 0.2] = 0
    return {
        "folder": folder,
        "depth": depth,
        "color": np.kron(rng.integers(0, 256, (1, 1, 3)), np.ones((*shape, 1))).astype(np.uint8),
        "K": ((11.5, 0, 6.25), (0, 12.5, 4.75), (0, 0, 1)),
        "Rtilt": tilt,
        "objects": objects,
    }


SUN_FRAMES = [
    _frame(
        0,
        "SUNRGBD/kv2/kinect2data/000002_2014-05-26_14-23-37_260595134347_rgbf000103-resize",
        [
            ("bed", (0.5, 2.5, -0.75), (1.25, -0.75, 0.5), (0.6, 0.8, 0)),
            ("pillow", (0.25, 2, -0.5), (0.2, 0.3, 0.1), (1, 0, 0)),
            ("night_stand", (-1, 3, -1), (0.25, 0.5, 0.375), (-1, 0, 0)),
        ],
    ),
    _frame(1, "SUNRGBD/kv1/b3dodata/img_0063", []),
    _frame(
        2, "SUNRGBD/xtion/xtion_align_data/2014_10_22", [("chair", (1, 2, -0.5), (0.25, 0.375, 0.5), (0.5, -0.5, 0))]
    ),
    _frame(
        3,
        "SUNRGBD/realsense/lg/2014_10_21-18_16_30-1311000073",
        [("desk", (0, 2, -0.5), (0.5, 1, 0.375), (0, -1, 0)), ("table", (0, 3, -0.5), (0.5, 0.25, 0.375), (0, 1, 0))],
    ),
]
SUN_SPLITS = {"train": ("000001", "000004"), "val": ("000002", "000003")}
SUN_PREFIX = "/n/fs/sun3d/data/"


def write_depth(path, millimetres):
    """A grey PNG of 16 bits, the bits rotated left by three."""
    Image.fromarray((millimetres << 3) | (millimetres >> 13)).save(path)


def _struct(fields, rows):
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for place, row in enumerate(rows):
        for field in fields:
            array[field][0, place] = row[field]
    return array


def sun_meta(frames):
    """The variable SUNRGBDMeta: structs within structs, an empty matrix where a frame has no object."""
    rows = []
    for frame in frames:
        place, boxes = SUN_PREFIX + frame["folder"], np.zeros((0, 0))
        if frame["objects"]:
            boxes = _struct(
                ("basis", "coeffs", "centroid", "classname", "sequenceName", "orientation", "label"),
                [
                    {
                        "basis": np.eye(3),
                        "coeffs": np.array([coeffs], float),
                        "centroid": np.array([centroid], float),
                        "classname": name,
                        "sequenceName": frame["folder"],
                        "orientation": np.array([orientation], float),
                        "label": np.zeros((1, 0)),
                    }
                    for name, centroid, coeffs, orientation in frame["objects"]
                ],
            )
        rows.append(
            {
                "sequenceName": frame["folder"],
                "groundtruth3DBB": boxes,
                "Rtilt": np.array(frame["Rtilt"], float),
                "K": np.array(frame["K"], float),
                "depthpath": f"{place}/depth_bfx/depth.png",
                "rgbpath": f"{place}/image/color.jpg",
                "anno_extrinsics": np.eye(3),
                "depthname": "depth.png",
                "rgbname": "color.jpg",
                "sensorType": frame["folder"].split("/")[1],
                "valid": 1.0,
            }
        )
    return _struct(tuple(rows[0]), rows)


def cells(strings):
    """A MATLAB cell array of one row."""
    array = np.empty((1, len(strings)), object)
    array[0] = strings
    return array


def write_sunrgbd(root, frames=SUN_FRAMES, splits=SUN_SPLITS):
    """Frames with depth and colour images, the metadata of both versions, and the split."""
    root = Path(root)
    for frame in frames:
        for part in ("depth_bfx", "image"):
            (root / frame["folder"] / part).mkdir(parents=True, exist_ok=True)
        write_depth(root / frame["folder"] / "depth_bfx/depth.png", frame["depth"])
        Image.fromarray(frame["color"]).save(root / frame["folder"] / "image/color.jpg", quality=95)
    meta = {"SUNRGBDMeta": sun_meta(frames)}
    savemat(root / "SUNRGBDMeta3DBB_v2.mat", meta, do_compression=True)
    (root / "SUNRGBDtoolbox/Metadata").mkdir(parents=True, exist_ok=True)
    savemat(root / "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat", meta, do_compression=True)
    (root / "SUNRGBDtoolbox/traintestSUNRGBD").mkdir(parents=True, exist_ok=True)
    lists = {
        key: cells([f"{SUN_PREFIX}{frames[int(name) - 1]['folder']}/" for name in splits[split]])
        for key, split in (("alltrain", "train"), ("alltest", "val"))
    }
    savemat(root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", lists)


# S3DIS: objects of a room as (file name, rows x y z r g b).
def _object(seed, low, high, count=8):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(low, high, (count, 3)).round(3), rng.integers(0, 256, (count, 3))], axis=1)


S3DIS_ROOMS = {
    "Area_1_office_2": {
        "chair_1": _object(0, (-15.5, 39.5, 0.2), (-15, 40, 1)),
        "ceiling_1": _object(1, (-17, 38, 2.9), (-13, 42, 3)),
        "bookcase_10": _object(2, (-16, 39, 0), (-15.5, 41, 2)),
        "chair_2": _object(3, (-14, 41, 0.2), (-13.5, 41.5, 1)),
        "stairs_1": _object(4, (-14, 41, 0), (-13.5, 41.5, 0.2)),
    },
    "Area_2_hallway_11": {
        "floor_1": _object(5, (0, 0, 0), (2, 9, 0.01)),
        "board_1": _object(6, (1, 1, 1), (1.1, 3, 2)),
    },
    "Area_3_lounge_1": {"sofa_1": _object(7, (0, 0, 0), (1, 2, 0.8)), "table_1": _object(8, (2, 0, 0), (3, 1, 0.7))},
    "Area_4_storage_3": {"clutter_1": _object(9, (5, 5, 0), (6, 7, 1))},
    "Area_5_hallway_6": {
        "ceiling_1": _object(10, (3, -2, 2.5), (9, 1, 2.6)),
        "board_1": _object(11, (4, -2, 1), (6, 0, 2)),
    },
    "Area_6_office_9": {"table_1": _object(12, (2, 2, 0), (3, 3, 1))},
}
S3DIS_SPLITS = {
    "train": ("Area_1_office_2", "Area_2_hallway_11", "Area_3_lounge_1", "Area_4_storage_3", "Area_6_office_9"),
    "val": ("Area_5_hallway_6",),
}
BAD_LINE = 3  # of ceiling_1.txt of Area_5/hallway_6; 180389 in the original


def annotation(rows):
    """Text of one object, numbers as the published files have them."""
    return "".join("{:.3f} {:.3f} {:.3f} {:.0f} {:.0f} {:.0f}\n".format(*row) for row in rows).encode()


def room_folder(root, name):
    """Folder of a room's annotations."""
    return Path(root) / name[:6] / name[7:] / "Annotations"


def write_s3dis(root):
    """Six areas with a room each; one file has the published broken line."""
    for name, objects in S3DIS_ROOMS.items():
        folder = room_folder(root, name)
        folder.mkdir(parents=True, exist_ok=True)
        for file, rows in objects.items():
            (folder / f"{file}.txt").write_bytes(annotation(rows))
        (folder.parent / f"{name[7:]}.txt").write_bytes(annotation(np.concatenate(list(objects.values()))))
        (folder.parent.parent / f"{name[7:]}_alignmentAngle.txt").write_text("## Global alignment angle\n0\n")
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    broken = room_folder(root, "Area_5_hallway_6") / "ceiling_1.txt"
    lines = broken.read_bytes().split(b"\n")
    x, y, z, r, g, b = lines[BAD_LINE].split()
    lines[BAD_LINE] = b"%s %s %s %s\x00%s %s" % (x, y, z, r, g, b)
    broken.write_bytes(b"\n".join(lines))


# ARKitScenes: objects as (label, centroid, axesLengths, normalizedAxes by rows). A row is the direction of an axis.
def _turned(cos, sin):
    return (cos, sin, 0, -sin, cos, 0, 0, 0, 1)


def _tablet_scan(seed, objects, skipped=False):
    rng = np.random.default_rng(seed)
    vertices = rng.uniform((-2, -3, -1.4), (2, 3, 1.2), (30, 3)).astype(np.float32)
    colors = rng.integers(0, 256, (30, 3)).astype(np.uint8)
    return {"vertices": vertices, "colors": colors, "objects": objects, "skipped": skipped}


ARKIT_SCANS = {
    "Training/40753679": _tablet_scan(
        0,
        [
            ("bed", (0.5, 1.0, -0.9), (2.0, 1.5, 0.8), _turned(0.8, 0.6)),
            ("tv_monitor", (-1.0, 0.25, 0.3), (0.1, 1.0, 0.6), _turned(0, -1)),
            ("window", (1.0, 2.0, 0.5), (0.1, 1.0, 1.0), _turned(1, 0)),  # of no class
            ("TV/Monitor", (1.5, -1.0, 0.2), (0.2, 0.5, 0.4), _turned(-1, 0)),
        ],
    ),
    "Training/40753680": _tablet_scan(1, [("sofa", (0, 0, 0), (1, 1, 1), _turned(1, 0))], skipped=True),
    "Training/40753686": _tablet_scan(2, []),
    "Validation/41069021": _tablet_scan(3, [("toilet", (0, 0.5, -1), (0.7, 0.4, 0.75), _turned(-0.6, 0.8))]),
}
ARKIT_SPLITS = {"train": ("40753679", "40753686"), "val": ("41069021",)}


def arkit_annotation(scan):
    """Content of an annotation file, with keys that a reader passes over."""
    data = [
        {
            "uid": f"{number:08x}-obj",
            "label": label,
            "modelId": None,
            "children": [],
            "objectId": number,
            "segments": {
                "obb": {"centroid": [9, 9, 9], "axesLengths": [9, 9, 9], "normalizedAxes": [0] * 9},
                "obbAligned": {
                    "centroid": list(centroid),
                    "axesLengths": list(lengths),
                    "normalizedAxes": list(axes),
                },
            },
            "attributes": {},
        }
        for number, (label, centroid, lengths, axes) in enumerate(scan["objects"])
    ]
    return {"data": data, "stats": {"total": len(data)}, "comment": "", "confirm": True, "skipped": scan["skipped"]}


def write_arkitscenes(root):
    """Four scans below 3dod, one of them skipped."""
    for place, scan in ARKIT_SCANS.items():
        folder, name = Path(root) / "3dod" / place, place.partition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        write_ply(folder / f"{name}_3dod_mesh.ply", scan["vertices"], scan["colors"])
        (folder / f"{name}_3dod_annotation.json").write_text(json.dumps(arkit_annotation(scan)))
        (folder / f"{name}_frames").mkdir(exist_ok=True)
    (Path(root) / "3dod" / "metadata.csv").write_text("visit_id,video_id,fold\n")
    (Path(root) / "3dod" / "Training" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
