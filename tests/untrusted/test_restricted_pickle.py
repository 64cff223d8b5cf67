import os
import pickle

import numpy as np
import pytest

from benchmarks.faults.hostile_made import pickles
from h2a2_jax.errors import InputError
from h2a2_jax.untrusted.restricted_pickle import load_plain_pickle

PLAIN = {
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "strings": np.array(["chair", "table"], dtype=object),
    "scalars": [np.int64(3), np.float32(0.5), np.bool_(True)],
    "builtins": (None, True, 1, 2.5, 1j, "text", b"bytes", bytearray(b"x"), {1, 2}, frozenset({3})),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_survives_every_protocol(tmp_path, protocol):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(PLAIN, protocol))
    loaded = load_plain_pickle(path)
    np.testing.assert_array_equal(loaded["array"], PLAIN["array"])
    assert loaded["array"].dtype == np.float32
    assert loaded["strings"].tolist() == ["chair", "table"]
    assert loaded["scalars"] == PLAIN["scalars"]
    assert loaded["builtins"] == PLAIN["builtins"]


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_names_of_both_numpy_generations(tmp_path, core):
    old = (
        pickle.dumps(PLAIN["array"], 0)
        .replace(b"numpy._core.", b"numpy.core.")
        .replace(b"numpy.core.", core.encode() + b".")
    )
    (tmp_path / "array.pkl").write_bytes(old)
    np.testing.assert_array_equal(load_plain_pickle(tmp_path / "array.pkl"), PLAIN["array"])


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps([Executes(tmp_path / "made")]))
    with pytest.raises(InputError, match=r"(posix|nt)\.mkdir"):
        load_plain_pickle(tmp_path / "bad.pkl")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("function", [eval, getattr, np.load, np.frombuffer])
def test_other_functions_of_admitted_modules_are_refused(tmp_path, function):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(function))
    with pytest.raises(InputError, match=function.__name__):
        load_plain_pickle(tmp_path / "bad.pkl")


def test_broken_and_missing_files(tmp_path):
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(PLAIN)[:-20])
    (tmp_path / "empty.pkl").write_bytes(b"")
    (tmp_path / "text.pkl").write_text("not a pickle")
    for name in ("cut", "empty", "text"):
        with pytest.raises(InputError, match=f"{name}.pkl is not a readable pickle"):
            load_plain_pickle(tmp_path / f"{name}.pkl")
    with pytest.raises(InputError, match="There is no file"):
        load_plain_pickle(tmp_path / "none.pkl")


def as_text(array, **changes):
    """An array pickled by protocol 0 to 2, with something else written for a part of it."""
    content = pickle.dumps(array, 2)
    for old, new in changes.values():
        assert content.count(old) == 1
        content = content.replace(old, new)
    return content


@pytest.mark.parametrize(
    "content",
    [
        as_text(np.zeros(3), fewer_fields=(b"NNNJ", b"NNJ")),  # numpy's own check of the state crashes
        as_text(np.zeros(3), size=(b"NNNJ\xff\xff\xff\xff", b"NNNJ\xff\xff\xff\x7f")),
        as_text(np.zeros(3), objects=(b"f8q", b"O8q")),
        as_text(np.zeros(3), length=(b"K\x03\x85", b"K\x05\x85")),
        pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "O")]), 2),
        b"cnumpy\ndtype\nX\x03\x00\x00\x00V99\x85R.",
        b"c__builtin__\nlist\n)R}b.",  # a list has no state
    ],
    ids=["dtype of fewer fields", "dtype of another size", "objects", "another length", "records", "void", "list"],
)
def test_states_that_numpy_would_crash_on_are_refused(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.pkl is not a readable pickle"):
        load_plain_pickle(tmp_path / "bad.pkl")


QUICK = {what: content for what, content in pickles().items() if len(content) < 20_000}  # the scenario reads all


@pytest.mark.parametrize("content", QUICK.values(), ids=QUICK)
def test_pickles_made_to_harm_are_refused(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"write .*again") as caught:
        load_plain_pickle(tmp_path / "bad.pkl")
    assert len(str(caught.value)) < 600


def test_data_shared_and_nested_as_in_annotations_are_loaded(tmp_path):
    box = {"bbox_3d": [1.0] * 7, "name": "chair"}
    found = {"data_list": [{"instances": [box] * 20, "shape": ((1, 2), {"a", "b"})} for _ in range(50)], 3: np.ones(4)}
    (tmp_path / "good.pkl").write_bytes(pickle.dumps(found, 4))
    loaded = load_plain_pickle(tmp_path / "good.pkl")
    np.testing.assert_array_equal(loaded.pop(3), found.pop(3))
    assert loaded == found


def test_keys_of_one_hash_are_refused(tmp_path):
    numbers = {i * ((1 << 61) - 1): i for i in range(1, 50)}  # as many comparisons as the square of their number
    for content in (numbers, {*numbers}):
        (tmp_path / "keys.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=r"a int as a key .*text and numbers below 2\^63"):
            load_plain_pickle(tmp_path / "keys.pkl")
