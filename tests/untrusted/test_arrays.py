"""Archives and arrays of unknown origin are read whole, or end in a sentence before they take memory."""

import errno
import os
import struct
import zipfile

import numpy as np
import pytest

from h2a2_jax.errors import MOST_LETTERS, InputError, quoted
from h2a2_jax.untrusted import ALWAYS_FITS, MOST_GROWTH, check_growth, check_regular, read_bytes
from h2a2_jax.untrusted.arrays import NotAnArray, load_arrays


def npy(shape: str, content: bytes = b"", descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(header)) + header + content


def archive(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array('{"a": "\N{SNOWMAN}"}'),
        "none": np.zeros((0, 7), np.float32),
        "mask": np.zeros((100, 1000), bool),
    }
    save(tmp_path / "a.npz", **arrays)
    found = load_arrays(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy("(1000000000000,)"), "cut off"),
        (npy("(-4,)", bytes(16)), "states the shape"),
        (npy("(1000000000000,)", descr="<U0"), "cut off"),
        (npy("(2,)", b"\xff\xff\xff\x7f" * 2, "<U1"), "letters that there are not"),
        (npy("(1,)", bytes(8), "|O"), "Python objects"),
        (npy("(" * 900), "header is damaged"),
        (npy("(4,)", bytes(8)), "cut off"),
        (b"x" * 6000, "does not begin as one"),
    ],
)
def test_headers_that_lie(tmp_path, content, match):
    with pytest.raises(NotAnArray, match=match) as caught:
        load_arrays(archive(tmp_path / "a.npz", ("a.npy", content)))
    assert len(str(caught.value)) < 300


def test_archives_made_to_grow(tmp_path):
    with zipfile.ZipFile(tmp_path / "big.npz", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("a.npy", "w") as member:
            for _ in range(ALWAYS_FITS // (1 << 20) + 1):
                member.write(bytes(1 << 20))
    with pytest.raises(OSError, match=r"claims 68 MB in [\d,]+ bytes of the file"):
        load_arrays(tmp_path / "big.npz")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = archive(tmp_path / "twice.npz", ("a.npy", npy("(1,)", bytes(4))), ("a.npy", npy("(1,)", bytes(4))))
    with pytest.raises(NotAnArray, match="two members of one name"):
        load_arrays(twice)
    whole = archive(tmp_path / "a.npz", ("a.npy", npy("(1,)", bytes(4)))).read_bytes()
    start, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    entry = whole[start:end]
    shared = whole[:start] + entry + entry.replace(b"a.npy", b"b.npy") + whole[end:end + 8]  # fmt: skip
    shared += struct.pack("<HHIIH", 2, 2, 2 * len(entry), start, 0)
    (tmp_path / "shared.npz").write_bytes(shared)
    with pytest.raises(NotAnArray, match="overlap"):
        load_arrays(tmp_path / "shared.npz")


def test_growth_that_measured_values_have_is_admitted():
    check_growth(1, ALWAYS_FITS, "it")
    check_growth(2 * ALWAYS_FITS // MOST_GROWTH + 1, 2 * ALWAYS_FITS, "it")
    with pytest.raises(OSError, match="more than measured values"):
        check_growth(2 * ALWAYS_FITS // MOST_GROWTH, 2 * ALWAYS_FITS, "it")
    with pytest.raises(OSError, match="more than half of the") as caught:
        check_growth(1 << 60, 1 << 60, "it")
    assert caught.value.errno == errno.EFBIG


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    for name, match in (("pipe", "a pipe"), ("zero", "a device"), ("circle", "symbolic links"), ("", "Is a directory")):
        with pytest.raises(OSError, match=match):
            read_bytes(tmp_path / name)
    (tmp_path / "file").write_bytes(b"abc")
    check_regular(tmp_path / "file")
    assert read_bytes(tmp_path / "file") == b"abc"


def test_a_sentence_is_one_line_that_no_file_makes_long():
    told = str(InputError("a\x1b]0;b\x07\n\udcff.ply is damaged: copy it."))
    assert told == r"a\x1b]0;b\x07\n\udcff.ply is damaged: copy it."
    assert str(InputError(told)) == told
    long = str(InputError(f"The file a has {'x' * 9000}: copy it again."))
    assert len(long) == MOST_LETTERS and long.startswith("The file a has x") and long.endswith("x: copy it again.")
    assert quoted("a\n  b\x1b" + "c" * 500, 10) == r"a b\x1bcccc"[:10] + "..."
