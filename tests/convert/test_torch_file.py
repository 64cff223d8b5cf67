import functools
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from h2a2_jax.convert.torch_file import read_torch_file, write_torch_file
from h2a2_jax.errors import InputError
from h2a2_jax.untrusted import restricted_pickle
from h2a2_jax.untrusted.restricted_pickle import Inert

RNG = np.random.default_rng(0)
STATE = {
    "conv.kernel": RNG.normal(size=(27, 3, 4)).astype(np.float32),
    "head.bias": RNG.normal(size=(1, 3)).astype(np.float32),
    "bn.num_batches_tracked": np.array(5, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.pth"
    write_torch_file(path, STATE, {"dataset_meta": {"classes": ["chair", "table"]}})
    return path


def rewrite(path, change):
    """The archive with other records: `change` gets {name: bytes}."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def replace_pickle(path, content):
    rewrite(path, lambda records: records.update({"archive/data.pkl": content}))


def assert_refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)


def test_written_files_are_read_back(written):
    file = read_torch_file(written)
    assert list(file.tensors) == list(STATE)
    for name, array in STATE.items():
        np.testing.assert_array_equal(file.tensors[name], array)
        assert file.tensors[name].dtype == array.dtype and file.tensors[name].shape == array.shape
    assert file.classes == ("chair", "table")
    assert file.others == file.not_read == ()


def test_torch_reads_written_files(written):
    torch = pytest.importorskip("torch")
    loaded = torch.load(written, weights_only=True)
    assert loaded["meta"] == {"dataset_meta": {"classes": ["chair", "table"]}}
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded["state_dict"][name].numpy(), array)


def test_the_version_of_the_module_is_written_as_torch_keeps_it(tmp_path):
    path = tmp_path / "model.pth"
    write_torch_file(path, STATE, version=2)
    assert list(read_torch_file(path).tensors) == list(STATE)
    torch = pytest.importorskip("torch")
    assert torch.load(path, weights_only=True)["state_dict"]._metadata == {"": {"version": 2}}


@pytest.mark.parametrize("archive", [True, False])
def test_files_of_torch_are_read(tmp_path, archive):
    torch = pytest.importorskip("torch")
    base = torch.arange(40, dtype=torch.float32).reshape(10, 4) / 7
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    state |= {"view": base.t()[1:, 2:], "half": base.half(), "bfloat16": base.bfloat16(), "double": base.double()}
    state |= {"parameter": torch.nn.Parameter(base), "shared": base, "note": "no tensor"}
    meta = {"CLASSES": ("bed", "desk"), "history": np.arange(5.0), "hook": functools.partial(print, 1), "ids": {(1, 2)}}
    path = tmp_path / "model.pth"
    checkpoint = {"meta": meta, "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=archive)
    file = read_torch_file(path)
    assert file.others == ("note",) and file.classes == ("bed", "desk")
    assert "functools.partial" in file.not_read and "__builtin__.print" in file.not_read
    for name in set(state) - {"note"}:
        np.testing.assert_array_equal(file.tensors[name].astype(np.float64), state[name].detach().double().numpy())


def test_numbers_of_a_big_endian_machine(written):
    def swap(records):
        for name in [name for name in records if "/data/" in name]:
            size = 8 if len(records[name]) == 8 else 4
            swapped = np.frombuffer(records[name], f"<i{size}").byteswap().tobytes()
            records[name] = swapped
        records["archive/byteorder"] = b"big"

    rewrite(written, swap)
    np.testing.assert_array_equal(read_torch_file(written).tensors["conv.kernel"], STATE["conv.kernel"])


def test_no_such_file_a_folder_and_other_files(tmp_path):
    assert_refused(tmp_path / "none.pth", "There is no file")
    assert_refused(tmp_path, "Is a directory")
    for content, match in (
        (b"", "no file of PyTorch"),
        (b"weights", "no file of PyTorch"),
        (pickle.dumps([1, 2], 2), "not one of torch.save"),
        (b"\x80\x02", "damaged"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
    ):
        (tmp_path / "other.pth").write_bytes(content)
        assert_refused(tmp_path / "other.pth", match)
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert_refused(tmp_path / "other.pth", r"no data\.pkl")


def test_a_file_cut_off_anywhere_is_refused(written):
    whole = written.read_bytes()
    for length in range(1, len(whole), 97):
        written.write_bytes(whole[:length])
        assert_refused(written, "damaged|no file of PyTorch")


def test_a_bit_that_flipped_is_noticed(written):
    content = bytearray(written.read_bytes())
    place = content.index(STATE["conv.kernel"].tobytes()[:16])
    content[place + 5] ^= 1
    written.write_bytes(content)
    assert_refused(written, "CRC")


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_neither_run_nor_in_the_way(written, tmp_path, protocol):
    with zipfile.ZipFile(written) as archive:
        checkpoint = archive.read("archive/data.pkl")
    # The bad object stands beside the state dict: ..., "bad": <object>.
    bad = pickle.dumps(Executes(tmp_path / "made"), protocol)
    bad = bad[(2 if protocol >= 2 else 0) + (9 if protocol >= 4 else 0) : -1]
    replace_pickle(written, checkpoint[:-2] + b"X\x03\x00\x00\x00bad" + bad + b"u.")
    file = read_torch_file(written)
    np.testing.assert_array_equal(file.tensors["conv.kernel"], STATE["conv.kernel"])
    assert any("mkdir" in name for name in file.not_read)
    assert not (tmp_path / "made").exists()


def tensor_pickle(numel=6, offset=0, shape=(2, 3), strides=(3, 1), key="0", kind="torch\nFloatStorage"):
    """A state dict of one tensor that says of itself what it likes."""
    plain = lambda value: pickle.dumps(value, 2)[2:-1]  # noqa: E731
    return (
        b"\x80\x02}" + plain("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + plain("storage") + f"c{kind}\n".encode() + plain(key) + plain("cpu") + plain(numel) + b"tQ"
        + plain(offset) + plain(shape) + plain(strides) + b"\x89}tRs."
    )  # fmt: skip


@pytest.mark.parametrize(
    "claims",
    [
        {"numel": 10**12},
        {"numel": -1},
        {"numel": 10**12, "shape": (10**6, 10**6), "strides": (10**6, 1)},
        {"shape": (2, 10**12), "strides": (0, 0)},
        {"offset": -1},
        {"offset": 1},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"shape": (2, -3)},
        {"shape": (1,) * 40, "strides": (1,) * 40},
        {"key": "7"},
        {"key": "../../../etc/passwd"},
        {"key": 3},
        {"kind": "torch\nQUInt8Storage"},
        {"shape": [2, 3]},
    ],
    ids=str,
)
def test_tensors_that_reach_beyond_their_numbers_are_refused(written, claims):
    def change(records):
        records["archive/data.pkl"] = tensor_pickle(**claims)
        records["archive/data/0"] = np.arange(6, dtype=np.float32).tobytes()

    rewrite(written, change)
    assert_refused(written, "damaged")


def test_that_tensor_is_read_if_it_is_honest(written):
    def change(records):
        records["archive/data.pkl"] = tensor_pickle(shape=(3, 2), strides=(1, 3))
        records["archive/data/0"] = np.arange(6, dtype=np.float32).tobytes()

    rewrite(written, change)
    np.testing.assert_array_equal(read_torch_file(written).tensors["w"], [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x02" + b"]" * 100_000,
        b"\x80\x04" + b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
        b"\x80\x05" + b"\x96" + struct.pack("<Q", 2**40) + b"x.",
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        # A tuple of a tuple of a tuple ..., each twice, as a key: its hash would take for ever.
        b"\x80\x02})" + b"2\x86" * 200 + b"K\x01s.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02K\x01K\x02u.",
        b"\x80\x02K\x01}K\x02b" + b"." * 3,
        b"\x80\x02.",
    ],
    ids=range(9),
)
def test_bombs_end_in_a_sentence(written, bomb, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MAX_READS", 50_000)
    replace_pickle(written, bomb)
    assert_refused(written, "damaged|state dict")


@pytest.mark.parametrize("start", [b"", b"\x95" + struct.pack("<Q", 100_001)], ids=["plain", "in a frame"])
def test_objects_are_counted(written, monkeypatch, start):
    monkeypatch.setattr(restricted_pickle, "MAX_READS", 50_000)
    replace_pickle(written, b"\x80\x04" + start + b"]" * 100_000 + b".")
    assert_refused(written, "more objects")


def test_shapes_of_millions_of_digits_are_no_shapes(written):
    # Their product alone would take a minute.
    replace_pickle(written, tensor_pickle(shape=(1 << 8_000_000,) * 8, strides=(1,) * 8))
    assert_refused(written, "a number of 1000001 bytes")


def test_random_damage_ends_in_a_sentence_or_in_the_same_names(written):
    with zipfile.ZipFile(written) as archive:
        whole = archive.read("archive/data.pkl")
    rng = np.random.default_rng(1)
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        replace_pickle(written, bytes(content))
        try:
            read_torch_file(written)
        except InputError as error:
            assert "\n" not in str(error)[:50]


def test_compressed_and_overlapping_records_are_refused(written):
    with zipfile.ZipFile(written) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert_refused(written, "compressed")


def test_inert_objects_keep_nothing():
    content = pickle.dumps({"a": functools.partial(max, 1), "b": complex(1, 2), "c": {1, 2}, "d": frozenset({3})}, 2)
    loaded, names = restricted_pickle.load_inert_pickle(io.BytesIO(content), {}, Inert())
    assert set(loaded) == {"a", "b", "c", "d"} and all(isinstance(v, Inert) for v in loaded.values())
    assert "functools.partial" in names
