import numpy as np
import pytest
from scipy.io import loadmat, savemat

from h2a2_jax.errors import InputError
from h2a2_jax.scans.raw.sunrgbd import load_mat
from tests.scans.raw.miniature import SUN_FRAMES, sun_meta

VARIABLES = {
    "numbers": np.arange(6.0).reshape(2, 3),
    "text": "SUNRGBD/kv1",
    "empty": np.zeros((0, 0)),
    "flags": np.array([[True, False]]),
    "complex": np.array([[1 + 2j]]),
    "meta": sun_meta(SUN_FRAMES),
}
KINDS = {"numbers": "double", "text": "char", "empty": "double", "flags": "logical"}
KINDS |= {"complex": "double", "meta": "struct"}


@pytest.mark.parametrize("compressed", [True, False])
def test_variables_are_those_of_scipy(tmp_path, compressed):
    savemat(tmp_path / "a.mat", VARIABLES, do_compression=compressed)
    reference = loadmat(tmp_path / "a.mat")
    for name, value in zip(VARIABLES, load_mat(tmp_path / "a.mat", KINDS), strict=True):
        assert value.dtype == reference[name].dtype and value.shape == reference[name].shape
        if value.dtype.names is None:
            np.testing.assert_array_equal(value, reference[name])
    (meta,) = load_mat(tmp_path / "a.mat", {"meta": "struct"})
    assert meta["groundtruth3DBB"][0, 0]["classname"][0, 2].tolist() == ["night_stand"]


def cell_file(path):
    cells = np.empty((1, 2), object)
    cells[0] = ["SUNRGBD/kv1", "SUNRGBD/kv2"]
    savemat(path, {"cells": cells})
    return bytearray(path.read_bytes())


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (128 + 4, 255, "cut off"),
        (128, 99, "element of the kind 99"),
        (126, 0, "header"),
    ],
)
def test_damaged_files(tmp_path, place, value, reason):
    content = cell_file(tmp_path / "a.mat")
    content[place] = value
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match=rf"no readable MATLAB file \(.*{reason}.*\): download it again\.$"):
        load_mat(tmp_path / "a.mat", {"cells": "cell"})


@pytest.mark.parametrize("place", [0.4, 0.6, 0.99])
def test_a_changed_byte_of_a_compressed_file(tmp_path, place):
    savemat(tmp_path / "a.mat", VARIABLES, do_compression=True)
    content = bytearray((tmp_path / "a.mat").read_bytes())
    content[int(len(content) * place)] ^= 0x55
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match="no readable MATLAB file"):
        load_mat(tmp_path / "a.mat", KINDS)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"no readable MATLAB file \(.*No such file"):
        load_mat(tmp_path / "a.mat", {"cells": "cell"})


def test_other_variables(tmp_path):
    cell_file(tmp_path / "a.mat")
    with pytest.raises(InputError, match=r"holds no variable meta and no other: download it again\.$"):
        load_mat(tmp_path / "a.mat", {"meta": "struct", "cells": "cell", "other": "cell"})
    with pytest.raises(InputError, match=r"holds a cell cells, no struct: download it again\.$"):
        load_mat(tmp_path / "a.mat", {"cells": "struct"})
