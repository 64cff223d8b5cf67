"""The check of a folder: every problem is reported with its remedy, and a good folder is called ready."""

import json
import pickle

import matplotlib.image
import numpy as np
import pytest

from h2a2_jax.check import _remarks, check
from h2a2_jax.errors import InputError
from h2a2_jax.prepare.builder import Packing
from h2a2_jax.prepare.scan_cache import ScanCache
from h2a2_jax.scans.findings import ScanFinding
from h2a2_jax.scans.scan import points_in_box
from h2a2_jax.scans.specs import S3DIS
from tests.prepare.tiny import tiny_scan
from tests.prepare.tiny_builder import TinyBuilder

CHAIR = np.array([2.0, 1.0, 0.4, 0.6, 0.5, 0.8, 0.6])
TABLE = np.array([1.0, 2.5, 0.35, 1.5, 0.8, 0.7, -0.5])
BED = np.array([3.5, 2.2, 0.4, 1.2, 2.0, 0.8, 0.3])
BOXES = {"chair": CHAIR, "table": TABLE, "bed": BED}


def room(seed=0):
    """Floor, two walls, and the surfaces of three things, with colours in 0-255."""
    rng = np.random.default_rng(seed)
    parts = [
        rng.uniform([0, 0, 0], [5, 4, 0.01], (3000, 3)),
        rng.uniform([0, 0, 0], [0.01, 4, 2.6], (900, 3)),
        rng.uniform([0, 4, 0], [5, 4.01, 2.6], (1000, 3)),
    ]
    for box in BOXES.values():
        inside = rng.uniform(-0.5, 0.5, (400, 3)) * box[3:6]
        inside[:, 2] = box[5] / 2 * rng.uniform(0.6, 1, 400)  # mostly tops
        cos, sin = np.cos(box[6]), np.sin(box[6])
        turned = inside @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        parts.append(turned + box[:3])
    points = np.concatenate(parts)
    return np.concatenate([points, np.broadcast_to([200.0, 120, 60], points.shape)], axis=1)


def entry(name, box, **changes):
    return {"center": box[:3].tolist(), "size": box[3:6].tolist(), "yaw": float(box[6]), "class": name, **changes}


def entries(**changes):
    return [entry(name, box, **changes) for name, box in BOXES.items()]


def write(root, scans, **keys):
    """scans: {file: (split, rows, boxes)}."""
    root.mkdir(exist_ok=True)
    described = []
    for file, (split, rows, boxes) in scans.items():
        np.save(root / file, rows)
        described.append({"file": file, "split": split, "boxes": boxes})
    (root / "boxes.json").write_text(json.dumps({"version": 1, "scans": described, **keys}))
    return root


def checked(tmp_path, *arguments):
    return check(tmp_path / "scans", *arguments, output=tmp_path / "out").document


def test_a_good_folder_is_ready(tmp_path, capsys):
    write(tmp_path / "scans", {"a.npy": ("train", room(0), entries()), "b.npy": ("val", room(1), entries())})
    found = checked(tmp_path, "sunrgbd")
    printed = capsys.readouterr().out.splitlines()
    assert found["ready"] and found["mend"] == [] and "ready" in printed
    assert found["splits"]["train"]["points"]["max"] == len(room()) and found["splits"]["val"]["boxes"] == 3
    assert (found["up"]["guess"], found["unit"]["guess"]) == ("z", "m")
    assert found["splits"]["train"]["colors"] == [60, 200]
    assert found["classes"]["chair"]["boxes"] == 2
    assert found["classes"]["chair"]["mean_size"] == [0.6, 0.5, 0.8]
    assert found["classes"]["chair"]["usual_size"] == [0.59, 0.55, 0.83]
    held = [box["held"] for box in found["scans"][0]["boxes"]]
    assert held == [int(points_in_box(room(0)[:, :3], box).sum()) for box in BOXES.values()]
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == json.loads(json.dumps(found))
    assert matplotlib.image.imread(tmp_path / "out" / "contact_sheet.png").shape[0] > 300


# Files whose y points up (z = -y of the room), down, and x up; in millimetres and centimetres.
@pytest.mark.parametrize(
    ("up", "unit", "axes", "scale"),
    [
        ("y", "mm", [[1, 0, 0], [0, 0, 1], [0, -1, 0]], 1000),
        ("-y", "cm", [[1, 0, 0], [0, 0, -1], [0, 1, 0]], 100),
        ("x", "mm", [[0, 0, 1], [1, 0, 0], [0, 1, 0]], 1000),
        ("z", "cm", [[1, 0, 0], [0, 1, 0], [0, 0, 1]], 100),
    ],
)
def test_frame_and_unit_are_guessed_and_the_keys_named(tmp_path, up, unit, axes, scale):
    rows, axes = room(), np.array(axes)
    rows[:, :3] = scale * rows[:, :3] @ axes.T
    boxes = [
        {
            **box,
            "center": (scale * axes @ box["center"]).tolist(),
            "size": (scale * np.abs(axes) @ box["size"]).tolist(),
        }
        for box in entries()
    ]
    scans = {"a.npy": ("train", rows, boxes)}
    write(tmp_path / "scans", scans)
    # In metres most of it lies beyond what a scan may reach, so that nothing can be used.
    wrong = checked(tmp_path, "sunrgbd")
    assert wrong["unit"]["guess"] == unit and wrong["up"]["guess"] == up
    assert any(f'set "unit": "{unit}" in boxes.json' in sentence for sentence in wrong["mend"])
    assert up == "z" or any(f'set "up": "{up}" in boxes.json' in sentence for sentence in wrong["mend"])
    write(tmp_path / "scans", scans, unit=unit, up=up)
    assert checked(tmp_path, "sunrgbd")["mend"] == []


def test_the_long_wall_of_a_corridor_is_no_reason_to_refuse_it(tmp_path):
    rng = np.random.default_rng(0)
    floor = rng.uniform([0, 0, 0], [9, 2, 0.01], (1800, 3))
    wall = rng.uniform([0, 2, 0], [9, 2.01, 3], (2700, 3))
    points = np.concatenate([floor, wall])
    chair = [entry("chair", CHAIR)]
    write(tmp_path / "scans", {"a.npy": ("train", np.concatenate([points, 0 * points], axis=1), chair)})
    found = checked(tmp_path, "sunrgbd")
    assert found["ready"] and found["up"]["guess"] in ("z", None)
    assert not any("up axis" in sentence for sentence in found["hints"])


def test_a_unit_that_still_loads_is_questioned(tmp_path):
    rows = room()
    rows[:, :3] *= 20  # centimetres are too small, metres too large: what is far is not a room
    write(tmp_path / "scans", {"a.npy": ("train", rows, entries())}, unit="m")
    found = checked(tmp_path, "sunrgbd")
    assert found["unit"]["guess"] == "cm" and any('set "unit": "cm"' in sentence for sentence in found["mend"])


def test_conventions_of_boxes_are_questioned(tmp_path):
    clockwise = [entry(name, box, yaw=-float(box[6])) for name, box in BOXES.items()]
    write(tmp_path / "scans", {"a.npy": ("train", room(), clockwise)})
    assert any("negate it" in sentence for sentence in checked(tmp_path, "sunrgbd")["mend"])
    bottom = [entry(name, box, center=(box[:3] - [0, 0, box[5] / 2]).tolist()) for name, box in BOXES.items()]
    write(tmp_path / "scans", {"a.npy": ("train", room(), bottom)})
    assert any("centre of the whole box" in sentence for sentence in checked(tmp_path, "sunrgbd")["mend"])
    elsewhere = [entry(name, box, center=[30, 30, 0]) for name, box in BOXES.items()]
    write(tmp_path / "scans", {"a.npy": ("train", room(), elsewhere)})
    sentences = " ".join(checked(tmp_path, "sunrgbd")["mend"])
    assert "3 of 3 boxes hold fewer than 5 points: 3 lie outside the cloud" in sentences
    crossed = [entry(name, box, size=box[[4, 3, 5]].tolist()) for name, box in BOXES.items()]
    write(tmp_path / "scans", {"a.npy": ("train", room(), crossed)})
    assert any("if dx and dy change places" in sentence for sentence in checked(tmp_path, "sunrgbd")["mend"])
    halved = [entry(name, box, size=(box[3:6] / 2).tolist()) for name, box in BOXES.items()]
    write(tmp_path / "scans", {"a.npy": ("train", room(), halved)})
    assert any("half sizes" in sentence for sentence in checked(tmp_path, "sunrgbd")["hints"])


def test_left_out_points_and_oddities_are_reported(tmp_path, capsys):
    rows = np.concatenate([room(), room(), room()])
    rows[:7, 0] = np.nan
    boxes = [*entries(), entry("lamp", CHAIR), entry("chair", CHAIR, size=[0, 1, 1])]
    write(tmp_path / "scans", {"a.npy": ("train", rows, boxes)})
    np.save(tmp_path / "scans" / "stray.npy", rows)
    found = checked(tmp_path, "sunrgbd")
    assert found["ready"]
    assert found["notes"] == {
        "points with NaN or infinite values": 7,
        "boxes of the class 'lamp', which sunrgbd does not have": 1,
        "boxes with a size that is not positive": 1,
        "scans brought to the floor, or the view, of the dataset": 1,
    }
    hints = " ".join(found["hints"])
    assert "its floor at" in hints and "where the floors of sunrgbd are" in hints
    assert "stray.npy" in hints and "exact duplicates" in hints and "learnt by heart" in hints
    assert "1 boxes of the class 'lamp'" in capsys.readouterr().out
    # Without a dataset named, the folder's own classes count.
    assert list(checked(tmp_path)["classes"]) == ["bed", "chair", "lamp", "table"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"center": [3e3, 1e3, 400]}, "3 boxes beyond 250 m"), ({"size": [-1, 1, 1]}, "3 boxes with a size that is not")],
)
def test_boxes_that_cannot_be_used_are_a_problem(tmp_path, change, kind):
    write(tmp_path / "scans", {"a.npy": ("train", room(), entries(**change)), "b.npy": ("val", room(1), [])})
    (problem, *_) = checked(tmp_path, "sunrgbd")["mend"]
    assert problem.startswith(f"3 of 3 boxes cannot be used ({kind}")
    assert not any("nothing to learn" in sentence for sentence in checked(tmp_path, "sunrgbd")["mend"])


def test_single_scans_of_another_frame_or_unit_are_named(tmp_path):
    scans = {f"{i}.npy": ("train", room(i), entries()) for i in range(4)}
    lying, wide = room(5), room(6)
    lying[:, :3] = lying[:, [0, 2, 1]] * [1, 1, -1]
    wide[:, :3] *= 100
    write(tmp_path / "scans", scans | {"lying.npy": ("train", lying, []), "wide.npy": ("val", wide, entries())})
    hints = checked(tmp_path, "sunrgbd")["hints"]
    assert any(hint.startswith("1 of 6 scans look as if y points up, and not z (lying)") for hint in hints)
    assert any(hint.startswith("1 of 6 scans look as if they are in cm, and not m (wide)") for hint in hints)


def test_nothing_is_printed_twice_and_keys_of_the_file_are_named(tmp_path, capsys):
    rows = room()
    rows[:, 2] += 0.5
    write(tmp_path / "scans", {"a.npy": ("train", rows, entries()), "b.npy": ("val", room(1)[:, :3], entries())})
    np.savez(tmp_path / "scans" / "c.npz", points=rows[:, :3], colors=rows[:, 3:].astype(np.uint16))
    document = json.loads((tmp_path / "scans" / "boxes.json").read_text())
    document["scans"].append({"file": "./c.npz", "boxes": []})
    (tmp_path / "scans" / "boxes.json").write_text(json.dumps(document))
    hints = " ".join(checked(tmp_path, "sunrgbd")["hints"])
    printed = capsys.readouterr().out
    assert "brought to -1.28 m" in printed and "brought to the floor" not in printed and "made grey" not in printed
    assert 'say "colors" of boxes.json)' in hints and "not in boxes.json" not in hints


def test_the_folder_that_was_meant_is_named(tmp_path):
    for split in ("train", "val"):
        mmdet3d(tmp_path / "scans" / "inner", "000001", f"sunrgbd_infos_{split}.pkl", [(3, CHAIR)])
    with pytest.raises(InputError, match=r"scans itself holds no scans, but .*inner does: give that folder"):
        checked(tmp_path)
    np.save(tmp_path / "scans" / "a.npy", room())
    assert checked(tmp_path)["kind"] == "point clouds without boxes.json"
    with pytest.raises(InputError, match=r"holds info files of sunrgbd .*, none of scannet: say --dataset=sunrgbd"):
        check(tmp_path / "scans" / "inner", "scannet", output=tmp_path / "out")


def test_many_scans_in_processes_and_a_damaged_one(tmp_path):
    scans = {f"{i}.npy": ("train" if i else "val", room(i)[::5], entries()) for i in range(10)}
    write(tmp_path / "scans", scans)
    (tmp_path / "scans" / "3.npy").write_bytes(b"nothing")
    found = checked(tmp_path, "sunrgbd")
    assert [scan["name"] for scan in found["scans"]] == [*map(str, range(1, 10)), "0"]
    assert "1 of 10 scans cannot be used; the first: Scan 3: " in found["mend"][0] and not found["ready"]
    assert found["splits"]["train"]["unreadable"] == 1


def mmdet3d(root, name, info_file, boxes):
    (root / "points").mkdir(parents=True, exist_ok=True)
    rows = room().astype("<f4")
    rows[:, 3:] /= 255
    rows.tofile(root / "points" / f"{name}.bin")
    instances = [{"bbox_3d": box.tolist(), "bbox_label_3d": label} for label, box in boxes]
    scans = [{"lidar_points": {"lidar_path": f"{name}.bin"}, "instances": instances}]
    (root / info_file).write_bytes(pickle.dumps({"metainfo": {}, "data_list": scans}))


def test_folders_of_mmdetection3d(tmp_path):
    boxes = [(3, CHAIR), (1, TABLE), (0, BED)]
    mmdet3d(tmp_path / "scans", "000001", "sunrgbd_infos_train.pkl", boxes)
    found = checked(tmp_path)
    assert found["kind"] == "a folder prepared by mmdetection3d" and found["dataset"] == "sunrgbd"
    assert len(found["mend"]) == 1 and "no file" in found["mend"][0] and "sunrgbd_infos_val.pkl" in found["mend"][0]
    mmdet3d(tmp_path / "scans", "000002", "sunrgbd_infos_val.pkl", boxes)
    assert checked(tmp_path)["ready"]
    for file in (tmp_path / "scans").glob("*.pkl"):
        file.rename(file.with_name(f"my_{file.name}"))
    with pytest.raises(InputError, match=r"do not tell the dataset: choose one with --dataset"):
        checked(tmp_path)


def test_scans_without_boxes_get_an_example_of_boxes_json(tmp_path):
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "a.npy", room())
    found = checked(tmp_path)
    assert len(found["mend"]) == 1 and '"file": "a.npy"' in found["mend"][0]
    assert found["up"]["guess"] == "z" and (tmp_path / "out" / "contact_sheet.png").exists()


def test_no_such_folder_or_nothing_in_it(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        checked(tmp_path)
    (tmp_path / "scans").touch()
    with pytest.raises(InputError, match="scans is a file, not a folder: give a folder of scans"):
        checked(tmp_path)
    (tmp_path / "scans").unlink()
    (tmp_path / "scans").mkdir()
    with pytest.raises(InputError, match=r"holds no scans: expected are boxes\.json"):
        checked(tmp_path)


def test_an_unwritable_output_is_refused_before_scans_are_read(tmp_path, capsys):
    write(tmp_path / "scans", {"a.npy": ("train", room(), entries())})
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"out cannot be written .* choose another folder"):
        checked(tmp_path)
    assert "boxes" not in capsys.readouterr().out


def test_yaw_in_degrees(tmp_path):
    boxes = [{**box, "yaw": float(np.degrees(box["yaw"]))} for box in entries()]
    write(tmp_path / "scans", {"a.npy": ("train", room(), boxes), "b.npy": ("val", room(1), entries())})
    assert "3 boxes have a yaw of more than a full turn, up to 34.3775: give radians" in checked(tmp_path)["mend"][0]


def test_prepared_datasets(tmp_path):
    names = {"train": ["a/0", "a/1"], "val": ["b 0"]}
    cache = ScanCache(tmp_path / "cache", {})
    cache.open()
    for name in ("a/0", "a/1", "b 0"):
        cache.write(tiny_scan(name, 200))
    metadata = {"dataset": "s3dis", "classes": list(S3DIS.classes), "names": names}
    packing = Packing(cache, names, metadata)
    TinyBuilder(data_dir=tmp_path / "scans", packing=packing).download_and_prepare(download_dir=tmp_path / "none")
    found = checked(tmp_path)
    assert found["dataset"] == "s3dis" and found["kind"] == "a dataset prepared by python -m data"
    assert [(name, split["scans"], split["boxes"]) for name, split in found["splits"].items()] == [
        ("train", 2, 2),
        ("val", 1, 1),
    ]
    (shard,) = (tmp_path / "scans").rglob("*-train.array_record-*")
    shard.write_bytes(shard.read_bytes()[:-9])
    assert any("prepare the dataset again" in sentence for sentence in checked(tmp_path)["mend"])


def test_repeated_boxes_are_listed(tmp_path, capsys):
    again, other = entry("table", TABLE), entry("bed", TABLE)
    near = entry("chair", CHAIR, center=(CHAIR[:3] + 0.002).tolist())
    scans = {
        "a.npy": ("train", room(0), [*entries(), *[again] * 199]),
        "b.npy": ("train", room(1), [*entries(), other]),
        "c.npy": ("val", room(2), [*entries(), near]),
    }
    write(tmp_path / "scans", scans)
    found = checked(tmp_path, "sunrgbd")
    assert (
        "202 boxes are the same as others of their scan (a: 200 of table, b: 2 of bed and table): none is dropped in "
        "training; keep one of each." in found["hints"]
    )
    nearly = "1 boxes overlap another of their class nearly wholly, by an IoU above 0.95 (c): keep one of each."
    assert nearly in found["hints"] and f"note: {nearly}" in capsys.readouterr().out
    assert (
        found["scans"][0]["repeated"] == ({"labels": (1,), "count": 200},) and found["splits"]["train"]["boxes"] == 206
    )


def test_boxes_that_only_touch_or_are_turned_otherwise_repeat_nothing(tmp_path):
    turned, smaller = entry("chair", CHAIR, yaw=CHAIR[6] + 0.5), entry("bed", BED, size=[1.2, 2.0, 0.7])
    write(tmp_path / "scans", {"a.npy": ("train", room(0), [*entries(), turned, smaller])})
    assert not any("overlap" in hint or "the same" in hint for hint in checked(tmp_path, "sunrgbd")["hints"])


def test_scans_whose_boxes_hold_no_point_are_listed(tmp_path):
    away = [entry("chair", CHAIR, center=[2.5, 2.0, 2.2])]
    scans = {f"{i}.npy": ("train", room(i)[::3], entries() if i < 6 else away) for i in range(10)}
    write(tmp_path / "scans", {**scans, "empty.npy": ("val", room(0)[::3], [])})
    hints = checked(tmp_path, "sunrgbd")["hints"]
    assert "In 4 scans no box holds a point (6, 7, 8, 9)." in hints
    assert "1 scans have no box of a class of sunrgbd (empty)." in hints


def test_colours_are_shown_as_the_network_gets_them(tmp_path, capsys):
    bright, grey = room(), room()[:, :3]
    write(tmp_path / "scans", {"a.npy": ("train", bright, entries()), "b.npy": ("val", grey, entries())})
    found = checked(tmp_path, "sunrgbd")["splits"]
    expected = {"min": 60 / 255, "mean": 380 / 3 / 255, "max": 200 / 255}
    assert found["train"]["network_colors"] == pytest.approx(expected) and found["train"]["without_colors"] == 0
    assert (found["val"]["network_colors"], found["val"]["without_colors"]) == (None, 1)
    printed = capsys.readouterr().out
    assert "  colours  60 to 200 in the files; 0.24 to 0.78, mean 0.50, for the network\n" in printed
    assert "  colours  1 scans without, grey for the network\n" in printed
    prepared = tmp_path / "prepared"
    for split in ("train", "val"):
        mmdet3d(prepared, "000001", f"sunrgbd_infos_{split}.pkl", [(3, CHAIR)])
    found = check(prepared, output=tmp_path / "out").document["splits"]["train"]
    assert found["colors"] is None and found["network_colors"] == pytest.approx(expected)


def test_remarks_of_all_scans_are_grouped_by_kind():
    remarks = {str(i): (f"{i}.bin is taken as float32 rows, {i * 1.5} of them",) for i in range(12)}
    remarks |= {name: (f"{name}.bin is taken as float64 rows",) for name in ("kitchen", "hall_2")}
    remarks |= {name: (f"colours reach {most} of {most}",) for name, most in (("c", 255), ("d", 65535), ("e", 65535))}
    remarks["7"] = ("the colours are taken as bytes", *remarks["7"])
    findings = [ScanFinding("train", f"b/{name}", assumed=assumed) for name, assumed in remarks.items()]
    assert list(_remarks(findings)) == [
        "b/0: 0.bin is taken as float32 rows, 0.0 of them; likewise 11 other scans (b/1, b/2, b/3, ...).",
        "b/7: the colours are taken as bytes.",
        "b/kitchen: kitchen.bin is taken as float64 rows; likewise 1 other scan (b/hall_2).",
        "b/c: colours reach 255 of 255.",
        "b/d: colours reach 65535 of 65535; likewise 1 other scan (b/e).",
    ]


def test_remarks_of_later_scans_are_printed(tmp_path):
    (tmp_path / "scans").mkdir()
    described = []
    for i in range(6):
        rows = room(i).astype("<f4")
        np.ascontiguousarray(rows[:, : 3 if i == 5 else 6]).tofile(tmp_path / "scans" / f"{i}.bin")
        described.append({"file": f"{i}.bin", "boxes": entries()})
    (tmp_path / "scans" / "boxes.json").write_text(json.dumps({"version": 1, "scans": described}))
    hints = checked(tmp_path, "sunrgbd")["hints"]
    assert any(hint.startswith("5: ") for hint in hints)
    assert any(hint.startswith("0: ") and hint.endswith("; likewise 4 other scans (1, 2, 3, ...).") for hint in hints)


def test_numbers_of_an_info_file_without_names_are_said(tmp_path):
    for name, split in (("000001", "train"), ("000002", "val")):
        mmdet3d(tmp_path / "scans", name, f"sunrgbd_infos_{split}.pkl", [(3, CHAIR)])
    (tmp_path / "scans" / "._sunrgbd_infos_train.pkl").touch()
    (said,) = [hint for hint in checked(tmp_path)["hints"] if "do not name the classes" in hint]
    assert said.endswith("numbers are taken in the order of sunrgbd (0 bed, 1 table, ...).")
