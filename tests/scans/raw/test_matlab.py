import numpy as np
import pytest
from scipy.io import loadmat, savemat

from h2a2_jax.errors import InputError
from h2a2_jax.scans.raw.matlab import load_mat
from tests.scans.raw.miniature import SUN_FRAMES, sun_meta

VARIABLES = {
    "numbers": np.arange(6.0).reshape(2, 3),
    "text": "SUNRGBD/kv1",
    "empty": np.zeros((0, 0)),
    "flags": np.array([[True, False]]),
    "complex": np.array([[1 + 2j]]),
    "meta": sun_meta(SUN_FRAMES),
}


@pytest.mark.parametrize("compressed", [True, False])
def test_variables_are_those_of_scipy(tmp_path, compressed):
    savemat(tmp_path / "a.mat", VARIABLES, do_compression=compressed)
    reference = loadmat(tmp_path / "a.mat")
    for name, value in zip(VARIABLES, load_mat(tmp_path / "a.mat", tuple(VARIABLES)), strict=True):
        assert value.dtype == reference[name].dtype and value.shape == reference[name].shape
        if value.dtype.names is None:
            np.testing.assert_array_equal(value, reference[name])
    (meta,) = load_mat(tmp_path / "a.mat", ("meta",))
    assert meta["groundtruth3DBB"][0, 0]["classname"][0, 2].tolist() == ["night_stand"]


def cell_file(path):
    cells = np.empty((1, 2), object)
    cells[0] = ["SUNRGBD/kv1", "SUNRGBD/kv2"]
    savemat(path, {"cells": cells})
    return bytearray(path.read_bytes())


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (
            128 + 16,
            10,
            "class and sizes do not allow",
        ),  # a cell array that says it holds numbers: ends SciPy's process
        (128 + 16, 99, "unknown class 99"),
        (
            128 + 104,
            137,
            "class and sizes do not allow",
        ),  # text in an encoding that does not exist: ends SciPy's process
        (128 + 4, 255, "cut off"),
        (126, 0, "header"),
    ],
)
def test_damage_that_scipy_would_not_survive(tmp_path, place, value, reason):
    content = cell_file(tmp_path / "a.mat")
    assert content[128 + 16] == 1 and content[128 + 104] == 16
    content[place] = value
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match=rf"no readable MATLAB file \(.*{reason}.*\): download it again\.$"):
        load_mat(tmp_path / "a.mat", ("cells",))


@pytest.mark.parametrize("place", [0.4, 0.6, 0.99])
def test_a_changed_byte_of_a_compressed_file(tmp_path, place):
    savemat(tmp_path / "a.mat", VARIABLES, do_compression=True)
    content = bytearray((tmp_path / "a.mat").read_bytes())
    content[int(len(content) * place)] ^= 0x55
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match="no readable MATLAB file"):
        load_mat(tmp_path / "a.mat", tuple(VARIABLES))


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"no readable MATLAB file \(.*No such file"):
        load_mat(tmp_path / "a.mat", ("cells",))
