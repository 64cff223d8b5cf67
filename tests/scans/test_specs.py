import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.sources import SourceConfig
from h2a2_jax.scans.specs import (
    ALL_SPECS,
    ARKITSCENES,
    MAX_NAME_BYTES,
    MULTISCAN,
    RSCAN,
    S3DIS,
    SCANNET,
    SCANNETPP,
    SPECS,
    SUNRGBD,
    UNIDET3D_SPECS,
    Augmentation,
    CountSampling,
    check_class_names,
    check_dataset_name,
    class_label,
    dataset_spec,
    fcaf3d_protocol,
    labels_among,
    own_spec,
    plain_name,
    renamed,
)


def test_number_of_classes_and_box_outputs():
    assert [spec.num_classes for spec in SPECS] == [18, 10, 5]
    assert [spec.num_outputs for spec in SPECS] == [6, 8, 6]
    assert [spec.num_classes for spec in UNIDET3D_SPECS] == [18, 5, 17, 18, 84, 17]
    assert [spec.num_outputs for spec in UNIDET3D_SPECS] == [6, 6, 6, 6, 6, 8]
    assert set(ALL_SPECS) == {*SPECS, *UNIDET3D_SPECS} and len(ALL_SPECS) == 7


def test_the_four_have_the_recipes_of_unidet3d():
    for spec in (ARKITSCENES, MULTISCAN, RSCAN, SCANNETPP):
        turn = 0.5 if spec is ARKITSCENES else 0.0
        assert spec.augmentation == Augmentation(0.5, 0.5, turn, (0.9, 1.1), 0.1)
        count = CountSampling(200_000 if spec is SCANNETPP else 100_000)
        assert spec.train_sampling == spec.test_sampling == count
        assert spec.color_scale == (1.0 if spec is ARKITSCENES else 255.0)


def test_fcaf3d_has_recipes_for_three():
    specs = [fcaf3d_protocol(spec) for spec in SPECS]
    assert [spec.repeats for spec in specs] == [10, 3, 13]
    assert {spec.train_sampling for spec in specs} == {spec.test_sampling for spec in specs} == {CountSampling(100_000)}
    rooms = Augmentation(0.5, 0.5, 0.087266, (0.9, 1.1), 0.1)
    assert [spec.augmentation for spec in specs] == [
        rooms, Augmentation(0.5, 0.0, 0.523599, (0.85, 1.15), 0.1), rooms
    ]  # fmt: skip
    for found, spec in zip(specs, SPECS, strict=True):
        assert (found.classes, found.floor, found.color_scale) == (spec.classes, spec.floor, spec.color_scale)
    assert all(fcaf3d_protocol(spec) is spec for spec in (ARKITSCENES, MULTISCAN, RSCAN, SCANNETPP))


def test_a_source_has_the_recipe_of_a_detector():
    assert SourceConfig("sunrgbd").spec == SUNRGBD
    assert SourceConfig("sunrgbd", recipe="fcaf3d").spec == fcaf3d_protocol(SUNRGBD)
    own = {"name": "own", "classes": ("chair",)}
    assert SourceConfig(**own, recipe="fcaf3d").spec == SourceConfig(**own).spec
    assert SourceConfig("s3dis", kind="synthetic", recipe="fcaf3d").spec == fcaf3d_protocol(S3DIS)
    near = SourceConfig("sunrgbd", kind="synthetic", gap=0.5, recipe="fcaf3d").spec
    assert (near.name, near.has_yaw, near.repeats) == ("sunrgbd", False, 10)
    assert near.augmentation == fcaf3d_protocol(SCANNET).augmentation


def test_classes_of_the_four_are_in_the_order_of_the_labels():
    assert ARKITSCENES.classes[:3] == ("cabinet", "refrigerator", "shelf") and ARKITSCENES.classes[-1] == "sofa"
    assert MULTISCAN.classes[8:11] == ("tv_monitor", "curtain", "trash_can") and MULTISCAN.classes[-1] == "toilet"
    assert RSCAN.classes == (*SCANNET.classes[:17], "otherfurniture")
    assert [SCANNETPP.classes.index(name) for name in ("table", "box", "computer tower", "marker")] == [0, 12, 24, 83]


def test_the_union_of_unidet3ds_six_has_99_plain_names():
    union = {name for spec in UNIDET3D_SPECS for name in spec.classes}
    assert len({plain_name(name) for name in union}) == 99 and len(union) == 100
    # UniDet3D gives ScanNet "otherfurniture" in place of "garbagebin": its union has 99 exact strings.
    assert len(union - {"garbagebin"}) == 99


def test_names_that_files_have_for_classes():
    assert class_label("fridge", RSCAN) == RSCAN.classes.index("refrigerator")
    assert class_label("Shower Curtain", RSCAN) == RSCAN.classes.index("showercurtrain")
    assert class_label("furniture", RSCAN) == 17 and class_label("furniture", SCANNET) == -1
    own = own_spec("kitchens", ("refrigerator", "fridge"))
    assert [class_label(name, own) for name in own.classes] == [0, 1]


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: spec.name)
def test_every_class_has_a_level(spec):
    assert len(spec.label_to_level) == spec.num_classes
    assert set(spec.label_to_level) == {0, 1}
    assert len(set(spec.classes)) == spec.num_classes


def test_large_objects_are_learned_on_the_coarse_level():
    for spec, large, small in (
        (SCANNET, "bed sofa table window bookshelf counter desk curtain bathtub", "chair door toilet garbagebin"),
        (SUNRGBD, "bed table sofa desk bookshelf", "chair toilet dresser night_stand bathtub"),
        (S3DIS, "table sofa bookcase", "chair board"),
        (ARKITSCENES, "shelf bed bathtub fireplace table sofa", "cabinet refrigerator stove toilet tv_monitor chair"),
        (MULTISCAN, "table window sofa curtain bed", "door chair cabinet pillow toilet"),
        (RSCAN, "bed sofa desk bathtub", "door chair otherfurniture"),
        (SCANNETPP, "table whiteboard heater blinds bookshelf", "door box monitor chair marker"),
    ):
        assert {spec.label_to_level[spec.classes.index(name)] for name in large.split()} == {1}
        assert {spec.label_to_level[spec.classes.index(name)] for name in small.split()} == {0}


def test_look_up_by_name():
    assert dataset_spec("s3dis") is S3DIS
    with pytest.raises(InputError, match=r"'kitti'.*scannet, sunrgbd, s3dis"):
        dataset_spec("kitti")


def test_classes_are_chosen_by_any_plain_spelling():
    assert labels_among(("Night Stand", "bed", "night_stand"), SUNRGBD.classes, SUNRGBD.name) == (0, 7)
    assert labels_among(("shower curtain",), SCANNET.classes, SCANNET.name) == (
        SCANNET.classes.index("showercurtrain"),
    )
    with pytest.raises(InputError, match=r"sunrgbd has no class 'tabel' \(did you mean table\?\); it has bed, table,"):
        labels_among(("tabel",), SUNRGBD.classes, SUNRGBD.name)
    with pytest.raises(InputError, match=r"s3dis has no class 'xyz'; it has table"):
        labels_among(("chair", "xyz"), S3DIS.classes, S3DIS.name)
    with pytest.raises(InputError, match=r"No class is chosen; s3dis has table, chair"):
        labels_among((), S3DIS.classes, S3DIS.name)


def test_classes_have_names_of_ones_own():
    spec = renamed(SCANNET, {"Garbage Bin": "trash can", "sofa": "couch"})
    assert spec.classes[-1] == "trash can" and spec.classes[3] == "couch" and spec.name == "scannet"
    assert spec.label_to_level == SCANNET.label_to_level and SCANNET.classes[-1] == "garbagebin"
    assert renamed(S3DIS, {"table": "chair", "chair": "table"}).classes[:2] == ("chair", "table")
    for names, sentence in (
        ({"trash": "bin"}, "scannet has no class 'trash'"),
        ({"sofa": "chair"}, "the classes 'chair' and 'chair'"),
        ({"sofa": " "}, "a class called ' '"),
        ({"sofa": "a", "Sofa": "b"}, "sofa of scannet is renamed to 'a' and to 'b'"),
    ):
        with pytest.raises(InputError, match=sentence):
            renamed(SCANNET, names)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: spec.name)
def test_the_names_of_the_built_in_datasets_are_names(spec):
    check_dataset_name(spec.name)
    check_class_names(spec.classes, spec.name)
    with pytest.raises(InputError, match=f"{spec.name} is a built-in dataset"):
        own_spec(spec.name, spec.classes)
    assert own_spec(f"my {spec.name}", spec.classes).classes == spec.classes


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (("a", ""), "a class called ''"),
        (("a", " -"), "a class called ' -'"),
        (("a\nb",), "without line breaks"),
        (("a\x1b[0m",), "without line breaks"),
        (("a\u2028",), "without line breaks"),
        (("night stand", "Night_Stand"), "'night stand' and 'Night_Stand', which differ only in case"),
    ],
)
def test_names_of_classes_that_cannot_be_told_or_written_are_refused(classes, sentence):
    with pytest.raises(InputError, match=f"dataset own has .*{sentence}"):
        _ = SourceConfig("own", classes=classes).spec


@pytest.mark.parametrize(
    "name", ["", "..", ".own", "a/b", "a\\b", "c:", "a\n", " a", "a.", "x" * 101, "\u6905" * 34, "--"]
)
def test_names_of_datasets_that_cannot_be_files_are_refused(name):
    with pytest.raises(InputError, match=r"The name of the dataset .* give another one"):
        _ = SourceConfig(name, classes=("a",)).spec


def test_any_other_letters_may_be_in_names():
    classes = ("\u6905\u5b50", "Stuhl (gro\xdf)", "=chair", "a,b", "\u0645\u06cc\u200c\u062e")
    assert own_spec("x" * MAX_NAME_BYTES, classes).classes == classes and own_spec("my own-1.2", ("a",))
